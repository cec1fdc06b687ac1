//! `bpf(2)`: programs on cgroups, and the ring by which they wake the agent. With `sys.rs` the only file with `unsafe`.
//! Callers: the device rules of a container, the watch for listening ports. The kernel checks every program.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    sync::atomic::{AtomicU64, Ordering},
};

const BPF_MAP_CREATE: libc::c_long = 0;
const BPF_PROG_LOAD: libc::c_long = 5;
const BPF_PROG_ATTACH: libc::c_long = 8;

/// One BPF instruction (`struct bpf_insn`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct BpfInsn {
    /// Operation.
    pub code: u8,
    /// Destination register in the low half, source register in the high half.
    pub regs: u8,
    /// Jump distance or memory offset.
    pub off: i16,
    /// Immediate value.
    pub imm: i32,
}

/// Where a program is attached; names and values of `linux/bpf.h`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// `BPF_CGROUP_DEVICE`: a device is opened or made.
    Device,
    /// `BPF_CGROUP_INET4_POST_BIND`: an IPv4 socket was bound.
    Inet4Bound,
    /// `BPF_CGROUP_INET6_POST_BIND`: an IPv6 socket was bound.
    Inet6Bound,
    /// `BPF_CGROUP_INET_SOCK_RELEASE`: a socket is closed.
    InetReleased,
    /// `BPF_CGROUP_INET4_CONNECT`: an IPv4 socket is connected.
    Inet4Connect,
    /// `BPF_CGROUP_UDP4_SENDMSG`: a datagram is sent to an address.
    Udp4Send,
    /// `BPF_CGROUP_UDP4_RECVMSG`: the address that a datagram came from is told.
    Udp4Receive,
}

impl Hook {
    fn program_type(self) -> u32 {
        const BPF_PROG_TYPE_CGROUP_SOCK: u32 = 9;
        const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
        const BPF_PROG_TYPE_CGROUP_SOCK_ADDR: u32 = 18;
        match self {
            Self::Device => BPF_PROG_TYPE_CGROUP_DEVICE,
            Self::Inet4Bound | Self::Inet6Bound | Self::InetReleased => BPF_PROG_TYPE_CGROUP_SOCK,
            Self::Inet4Connect | Self::Udp4Send | Self::Udp4Receive => {
                BPF_PROG_TYPE_CGROUP_SOCK_ADDR
            }
        }
    }

    fn attach_type(self) -> u32 {
        match self {
            Self::Device => 6,
            Self::Inet4Bound => 12,
            Self::Inet6Bound => 13,
            Self::InetReleased => 34,
            Self::Inet4Connect => 10,
            Self::Udp4Send => 14,
            Self::Udp4Receive => 19,
        }
    }
}

/// `bpf(2)` with its attributes; a new descriptor, or 0.
fn bpf<T>(command: libc::c_long, attributes: &T) -> io::Result<i32> {
    // SAFETY: the attributes, and what the callers let them point to, live through the call; their size is given. The kernel only
    // reads them with the commands used here.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_ref(attributes),
            std::mem::size_of::<T>(),
        )
    };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result as i32)
    }
}

/// Loads a program for a hook.
pub fn load(hook: Hook, program: &[BpfInsn]) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Load {
        prog_type: u32,
        insn_cnt: u32,
        insns: u64,
        license: u64,
        log_level: u32,
        log_size: u32,
        log_buf: u64,
        kern_version: u32,
        prog_flags: u32,
        prog_name: [u8; 16],
        prog_ifindex: u32,
        expected_attach_type: u32,
    }
    let load = Load {
        prog_type: hook.program_type(),
        insn_cnt: u32::try_from(program.len()).map_err(|_| io::ErrorKind::InvalidInput)?,
        insns: program.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log_buf: 0,
        kern_version: 0,
        prog_flags: 0,
        prog_name: [0; 16],
        prog_ifindex: 0,
        expected_attach_type: hook.attach_type(),
    };
    let fd = bpf(BPF_PROG_LOAD, &load)?;
    // SAFETY: the kernel has just returned this descriptor (close-on-exec by default); nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Attaches a program to a cgroup, replacing `old` if there is one.
pub fn attach(
    hook: Hook,
    cgroup: BorrowedFd<'_>,
    program: BorrowedFd<'_>,
    old: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    #[repr(C)]
    struct Attach {
        target_fd: u32,
        attach_bpf_fd: u32,
        attach_type: u32,
        attach_flags: u32,
        replace_bpf_fd: u32,
    }
    const BPF_F_ALLOW_MULTI: u32 = 2;
    const BPF_F_REPLACE: u32 = 4;
    let attach = Attach {
        target_fd: cgroup.as_raw_fd() as u32,
        attach_bpf_fd: program.as_raw_fd() as u32,
        attach_type: hook.attach_type(),
        attach_flags: BPF_F_ALLOW_MULTI | if old.is_some() { BPF_F_REPLACE } else { 0 },
        replace_bpf_fd: old.map_or(0, |fd| fd.as_raw_fd() as u32),
    };
    bpf(BPF_PROG_ATTACH, &attach).map(drop)
}

/// A ring (`BPF_MAP_TYPE_RINGBUF`) that programs write to: its descriptor is readable while it holds something. What they write has
/// no meaning but that there is something new to look at.
pub struct Ring {
    fd: OwnedFd,
    consumer: Page,
    producer: Page,
}

const PAGE: usize = 4096;

/// One mapped page, whose first word is a position in the ring.
struct Page(std::ptr::NonNull<AtomicU64>);

// SAFETY: the page is shared memory that is only read and written atomically, from whatever thread.
unsafe impl Send for Page {}
// SAFETY: as for Send.
unsafe impl Sync for Page {}

impl Page {
    fn map(fd: BorrowedFd<'_>, protection: libc::c_int, offset: usize) -> io::Result<Self> {
        // SAFETY: a new mapping at an address of the kernel's choice; no memory in use is touched.
        let at = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                PAGE,
                protection,
                libc::MAP_SHARED,
                fd.as_raw_fd(),
                offset as libc::off_t,
            )
        };
        match std::ptr::NonNull::new(at.cast()) {
            Some(page) if at != libc::MAP_FAILED => Ok(Self(page)),
            _ => Err(io::Error::last_os_error()),
        }
    }

    fn position(&self) -> &AtomicU64 {
        // SAFETY: the mapping is a page long, page-aligned and lives as long as self; the kernel too uses the word atomically.
        unsafe { self.0.as_ref() }
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and no reference into it outlives self.
        unsafe { libc::munmap(self.0.as_ptr().cast(), PAGE) };
    }
}

impl Ring {
    /// A ring of one page.
    pub fn new() -> io::Result<Self> {
        #[repr(C)]
        struct Create {
            map_type: u32,
            key_size: u32,
            value_size: u32,
            max_entries: u32,
        }
        const BPF_MAP_TYPE_RINGBUF: u32 = 27;
        let create = Create {
            map_type: BPF_MAP_TYPE_RINGBUF,
            key_size: 0,
            value_size: 0,
            max_entries: PAGE as u32,
        };
        let fd = bpf(BPF_MAP_CREATE, &create)?;
        // SAFETY: as in load.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let consumer = Page::map(fd.as_fd(), libc::PROT_READ | libc::PROT_WRITE, 0)?;
        let producer = Page::map(fd.as_fd(), libc::PROT_READ, PAGE)?;
        Ok(Self {
            fd,
            consumer,
            producer,
        })
    }

    /// Takes everything out, so that the next write wakes again.
    pub fn drain(&self) {
        let end = self.producer.position().load(Ordering::Acquire);
        self.consumer.position().store(end, Ordering::Release);
    }
}

impl AsFd for Ring {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
