//! System calls that no library wraps. The only file of the agent with `unsafe`, beside `sys/bpf.rs`.
//! Callers: boot, the container steps. Nothing here trusts its caller with memory: all arguments are owned or borrowed.

pub mod bpf;

use std::{
    ffi::CString,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
};

use tokio::io::{Interest, unix::AsyncFd};

/// `CLONE_INTO_CGROUP` (clone3 only; wider than the constants of libc).
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// What `clone3` returned.
pub enum Cloned {
    /// In the child.
    Child,
    /// In the parent, with the child's pid in the caller's pid namespace.
    Parent(u32),
}

/// Forks a child into new namespaces (`flags`) and a cgroup, as a sibling of the caller (`CLONE_PARENT`).
///
/// Only for a single-threaded caller: the child runs on a copy of its memory.
pub fn clone_sibling(flags: u64, cgroup: BorrowedFd<'_>) -> io::Result<Cloned> {
    clone3(
        flags | libc::CLONE_PARENT as u64 | CLONE_INTO_CGROUP,
        0,
        cgroup.as_raw_fd() as u64,
    )
}

/// Forks a child that does nothing, in a new user namespace; answers its pid. The caller ends it.
///
/// Only for a single-threaded caller, as [`clone_sibling`].
pub fn clone_idle_in_user_namespace() -> io::Result<u32> {
    match clone3(libc::CLONE_NEWUSER as u64, libc::SIGCHLD as u64, 0)? {
        Cloned::Parent(pid) => Ok(pid),
        Cloned::Child => loop {
            // SAFETY: pause touches no memory. It returns only for a signal with a handler, of which there is none.
            unsafe { libc::pause() };
        },
    }
}

fn clone3(flags: u64, exit_signal: u64, cgroup: u64) -> io::Result<Cloned> {
    // SAFETY: clone_args is plain data for which zero is valid.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = flags;
    args.exit_signal = exit_signal;
    args.cgroup = cgroup;
    // SAFETY: no CLONE_VM and no stack, so this is a fork; args outlives the call and its size is given.
    let pid = unsafe {
        libc::syscall(
            libc::SYS_clone3,
            &raw mut args,
            std::mem::size_of::<libc::clone_args>(),
        )
    };
    match pid {
        0 => Ok(Cloned::Child),
        pid if pid > 0 => Ok(Cloned::Parent(pid as u32)),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Scheduling of a process (`struct sched_attr`, version 0).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct SchedAttr {
    /// Size of this struct; set by [`sched_setattr`].
    pub size: u32,
    /// `SCHED_*`.
    pub policy: u32,
    /// `SCHED_FLAG_*`.
    pub flags: u64,
    /// For SCHED_OTHER and SCHED_BATCH.
    pub nice: i32,
    /// For SCHED_FIFO and SCHED_RR.
    pub priority: u32,
    /// For SCHED_DEADLINE, in nanoseconds.
    pub runtime: u64,
    /// For SCHED_DEADLINE, in nanoseconds.
    pub deadline: u64,
    /// For SCHED_DEADLINE, in nanoseconds.
    pub period: u64,
}

/// Sets the scheduling of a process.
pub fn sched_setattr(pid: u32, mut attr: SchedAttr) -> io::Result<()> {
    attr.size = std::mem::size_of::<SchedAttr>() as u32;
    // SAFETY: attr lives through the call and says its own size.
    let result = unsafe { libc::syscall(libc::SYS_sched_setattr, pid, &raw const attr, 0) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Sets the I/O priority of a process: class and level as the kernel packs them.
pub fn ioprio_set(pid: u32, value: u32) -> io::Result<()> {
    const IOPRIO_WHO_PROCESS: u32 = 1;
    // SAFETY: no pointers are passed.
    let result = unsafe { libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, pid, value) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Sets the execution domain of the calling process.
pub fn personality(domain: u32) -> io::Result<()> {
    // SAFETY: no pointers are passed; the domains used change what uname tells, not how memory is laid out.
    let result = unsafe { libc::personality(domain.into()) };
    if result >= 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Loads a seccomp filter, instructions of `struct sock_filter` as bytes, for the calling thread.
pub fn seccomp_load(program: &[u8], flags: u32) -> io::Result<()> {
    const SECCOMP_SET_MODE_FILTER: u32 = 1;
    const INSTRUCTION: usize = std::mem::size_of::<libc::sock_filter>();
    let filter: Vec<libc::sock_filter> = program
        .chunks_exact(INSTRUCTION)
        .map(|bytes| libc::sock_filter {
            code: u16::from_ne_bytes([bytes[0], bytes[1]]),
            jt: bytes[2],
            jf: bytes[3],
            k: u32::from_ne_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]),
        })
        .collect();
    let program = libc::sock_fprog {
        len: u16::try_from(filter.len()).map_err(|_| io::ErrorKind::InvalidInput)?,
        filter: filter.as_ptr().cast_mut(),
    };
    // SAFETY: program and the filter it points to live through the call; the kernel only reads them.
    let result = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            SECCOMP_SET_MODE_FILTER,
            flags,
            &raw const program,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Lets the child of a command do `steps` before its execve. Only for a single-threaded caller, where no lock is held by another
/// thread when it forks: the steps may allocate.
pub fn before_exec(
    command: &mut std::process::Command,
    steps: impl FnMut() -> io::Result<()> + Send + Sync + 'static,
) {
    use std::os::unix::process::CommandExt;
    // SAFETY: the caller has one thread, so its copy is as whole as itself.
    unsafe { command.pre_exec(steps) };
}

/// Gives the calling process a session keyring of its own, without a name.
pub fn join_session_keyring() -> io::Result<()> {
    const KEYCTL_JOIN_SESSION_KEYRING: libc::c_int = 1;
    // SAFETY: a null name asks for a new keyring; nothing else is passed.
    let result = unsafe {
        libc::syscall(
            libc::SYS_keyctl,
            KEYCTL_JOIN_SESSION_KEYRING,
            std::ptr::null::<libc::c_char>(),
        )
    };
    if result >= 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Moves the calling thread into new namespaces; a user, time or mount namespace only a process of one thread.
pub fn unshare(flags: rustix::thread::UnshareFlags) -> io::Result<()> {
    // SAFETY: without CLONE_FILES and CLONE_FS no descriptor or folder shared with another thread changes, and the namespaces are
    // the calling thread's alone.
    unsafe { rustix::thread::unshare_unsafe(flags) }.map_err(io::Error::from)
}

/// Attributes of a mount, for [`mount_setattr`]; names and values of `linux/mount.h`.
pub mod attr {
    /// Read-only.
    pub const RDONLY: u64 = 0x1;
    /// No set-user-id programs.
    pub const NOSUID: u64 = 0x2;
    /// No devices.
    pub const NODEV: u64 = 0x4;
    /// No execution.
    pub const NOEXEC: u64 = 0x8;
    /// The access-time modes are one field; this mask clears it.
    pub const ATIME_MASK: u64 = 0x70;
    /// Access times as `relatime`.
    pub const RELATIME: u64 = 0x0;
    /// No access times.
    pub const NOATIME: u64 = 0x10;
    /// Access times always.
    pub const STRICTATIME: u64 = 0x20;
    /// No access times of folders.
    pub const NODIRATIME: u64 = 0x80;
    /// Do not follow symbolic links.
    pub const NOSYMFOLLOW: u64 = 0x20_0000;
}

/// Change of a mount's attributes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MountAttr {
    /// Attributes to set ([`attr`]).
    pub set: u64,
    /// Attributes to clear.
    pub clear: u64,
    /// `MS_SHARED`, `MS_SLAVE`, `MS_PRIVATE`, `MS_UNBINDABLE` or 0 for no change.
    pub propagation: u64,
}

/// Changes the attributes of the mount `fd` is the root of, with all below it if `recursive`.
pub fn mount_setattr(fd: BorrowedFd<'_>, recursive: bool, change: MountAttr) -> io::Result<()> {
    set_mount(fd, recursive, change, None)
}

/// Maps the owners of the files of a detached mount as the user namespace does.
pub fn mount_idmap(
    fd: BorrowedFd<'_>,
    recursive: bool,
    namespace: BorrowedFd<'_>,
) -> io::Result<()> {
    const IDMAP: u64 = 0x10_0000;
    let change = MountAttr {
        set: IDMAP,
        ..MountAttr::default()
    };
    set_mount(fd, recursive, change, Some(namespace))
}

fn set_mount(
    fd: BorrowedFd<'_>,
    recursive: bool,
    change: MountAttr,
    namespace: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    #[repr(C)]
    struct Raw {
        set: u64,
        clear: u64,
        propagation: u64,
        userns_fd: u64,
    }
    let raw = Raw {
        set: change.set,
        clear: change.clear,
        propagation: change.propagation,
        userns_fd: namespace.map_or(0, |fd| fd.as_raw_fd() as u64),
    };
    let mut flags = libc::AT_EMPTY_PATH;
    if recursive {
        flags |= libc::AT_RECURSIVE;
    }
    // SAFETY: the path is a C string, raw lives through the call and its size is given.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            fd.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const raw,
            std::mem::size_of::<Raw>(),
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Brings the loopback interface of the current network namespace up.
pub fn loopback_up() -> io::Result<()> {
    let socket = rustix::net::socket_with(
        rustix::net::AddressFamily::INET,
        rustix::net::SocketType::DGRAM,
        rustix::net::SocketFlags::CLOEXEC,
        None,
    )?;
    // SAFETY: ifreq is plain data for which zero is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = *from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: the request is a valid ifreq and lives through the call.
    let result = unsafe {
        libc::ioctl(
            socket.as_fd().as_raw_fd(),
            libc::SIOCSIFFLAGS,
            &raw const request,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Gives every signal its default action back: the Rust runtime ignores SIGPIPE, the C library the two signals it keeps for
/// itself, and `execve` keeps that.
pub fn default_signals() {
    // struct sigaction of the kernel: SIG_DFL, no flags, empty mask.
    let default = [0u64; 4];
    for signal in 1..=64 {
        // SAFETY: default lives through the call and has the kernel's layout and mask size; no handler is installed. SIGKILL and
        // SIGSTOP are refused, which changes nothing.
        unsafe {
            libc::syscall(
                libc::SYS_rt_sigaction,
                signal,
                default.as_ptr(),
                std::ptr::null_mut::<u64>(),
                8usize,
            )
        };
    }
}

/// Marks every descriptor from `first` on as close-on-exec.
pub fn close_on_exec_from(first: u32) -> io::Result<()> {
    // SAFETY: with CLOSE_RANGE_CLOEXEC no descriptor is closed, so none becomes invalid under its owner.
    let result = unsafe {
        libc::syscall(
            libc::SYS_close_range,
            first,
            u32::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Closes every descriptor from `first` on, for a process that goes on without whoever owned them.
pub fn close_from(first: u32) -> io::Result<()> {
    // SAFETY: the only caller never returns and uses no descriptor from here on.
    match unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Gives the process the name, and the command line, that its work has. It keeps its own where the kernel does not tell where that is.
pub fn rename_process(line: &str) {
    let name = line.rsplit('/').next().unwrap_or(line);
    if let Ok(name) = CString::new(name) {
        let _ = rustix::thread::set_name(&name);
    }
    // proc(5): fields 48 and 49, counted from the third after the name in brackets.
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let mut fields = stat.rsplit(')').next().unwrap_or("").split_whitespace();
    let mut field = |skip| fields.nth(skip)?.parse::<usize>().ok();
    let (Some(start), Some(end)) = (field(45), field(0)) else {
        return;
    };
    let length = end.saturating_sub(start);
    if start == 0 || line.len() >= length {
        return;
    }
    // SAFETY: the kernel says that these bytes are this process's arguments; they are writable and at least `length`, and of this
    // single-threaded process nothing reads them any more: what it parsed are copies.
    unsafe {
        let place = std::ptr::with_exposed_provenance_mut::<u8>(start);
        std::ptr::write_bytes(place, 0, length);
        std::ptr::copy_nonoverlapping(line.as_ptr(), place, line.len());
    }
}

/// Takes a descriptor over that was inherited under a number on the command line.
pub fn inherited_fd(number: i32) -> io::Result<OwnedFd> {
    // SAFETY: F_GETFD touches no memory; it tells whether the number is open at all.
    if unsafe { libc::fcntl(number, libc::F_GETFD) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it is open, and the caller takes each inherited number over once, at its start.
    let fd = unsafe { OwnedFd::from_raw_fd(number) };
    rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::CLOEXEC)?;
    Ok(fd)
}

/// Replaces the process. Returns only on failure.
pub fn execve(path: &CString, args: &[CString], env: &[CString]) -> io::Error {
    match nix::unistd::execve(path, args, env) {
        Ok(never) => match never {},
        Err(errno) => errno.into(),
    }
}

/// Lets the runtime watch a descriptor.
pub fn watch(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd stays open and the same until it is dropped, which AsyncFd does after deregistering.
    unsafe { AsyncFd::register_with_interest(fd, interest) }.map_err(io::Error::from)
}
