//! System calls without a safe wrapper in the libraries used. All `unsafe` of the file server stands here.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};

/// Sets attributes of a detached mount and of all below it, and makes them private.
pub fn set_mount_attributes(mount: impl AsFd, attributes: u64) -> io::Result<()> {
    let attr = libc::mount_attr {
        attr_set: attributes,
        attr_clr: 0,
        propagation: libc::MS_PRIVATE,
        userns_fd: 0,
    };
    // SAFETY: the path is a NUL-terminated string and `attr` a live struct whose size is passed; the kernel only
    // reads both.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_fd().as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | libc::AT_RECURSIVE,
            &raw const attr,
            size_of::<libc::mount_attr>(),
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Sets this thread's file-system user and says whether the kernel took it.
pub fn set_fsuid(uid: u32) -> bool {
    // SAFETY: both calls take a number and change only this thread's credentials.
    unsafe {
        libc::setfsuid(uid);
        // -1 is never valid: the call only tells the present one.
        libc::setfsuid(u32::MAX).cast_unsigned() == uid
    }
}

/// Sets this thread's file-system group and says whether the kernel took it.
pub fn set_fsgid(gid: u32) -> bool {
    // SAFETY: as above.
    unsafe {
        libc::setfsgid(gid);
        libc::setfsgid(u32::MAX).cast_unsigned() == gid
    }
}

/// Parts this thread from what it shares with the process; it keeps its descriptors.
pub fn unshare(flags: rustix::thread::UnshareFlags) -> io::Result<()> {
    debug_assert!(!flags.contains(rustix::thread::UnshareFlags::FILES));
    // SAFETY: the only unsoundness of unshare is with CLONE_FILES, which is never passed.
    unsafe { rustix::thread::unshare_unsafe(flags) }.map_err(Into::into)
}

/// Copies this process; 0 is the copy's answer.
pub fn fork() -> io::Result<libc::pid_t> {
    // SAFETY: the file server calls it while it has one thread, so that the copy finds every lock free.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        pid => Ok(pid),
    }
}

/// Takes over inherited sockets of packets, as [`inherited`] does.
pub fn inherited_sockets(numbers: &[RawFd]) -> io::Result<Vec<OwnedFd>> {
    let descriptors = inherited(numbers)?;
    for descriptor in &descriptors {
        if rustix::net::sockopt::socket_type(descriptor)? != rustix::net::SocketType::SEQPACKET {
            return Err(io::ErrorKind::InvalidInput.into());
        }
    }
    Ok(descriptors)
}

/// Takes over inherited descriptors, each once and none of the standard ones.
pub fn inherited(numbers: &[RawFd]) -> io::Result<Vec<OwnedFd>> {
    let bad = |number: &RawFd| {
        *number <= libc::STDERR_FILENO || numbers.iter().filter(|n| *n == number).count() > 1
    };
    if numbers.iter().any(bad) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    numbers
        .iter()
        .map(|number| {
            // SAFETY: the number is one the starting process passed for this use, it is none of the standard ones
            // and stands once in the list, and nothing else of this process has opened or owns it. If it is not
            // open the next call fails and the descriptor is not closed.
            unsafe {
                if libc::fcntl(*number, libc::F_SETFD, libc::FD_CLOEXEC) < 0 {
                    return Err(io::Error::last_os_error());
                }
                Ok(OwnedFd::from_raw_fd(*number))
            }
        })
        .collect()
}

/// Most bytes of a file handle (`MAX_HANDLE_SZ`).
const HANDLE_BYTES: usize = 128;

/// `struct file_handle` with room for the largest: names an inode without keeping a descriptor. Made by the host's
/// kernel and given back to it; the guest never sees one.
#[repr(C)]
#[derive(Clone, PartialEq, Eq)]
pub struct FileHandle {
    bytes: u32,
    kind: i32,
    handle: [u8; HANDLE_BYTES],
}

/// The file handle of what `fd` (O_PATH or not) is open on, and the id of its mount. Not every file system has them.
pub fn file_handle(fd: impl AsFd) -> io::Result<(FileHandle, i32)> {
    let mut handle = FileHandle {
        bytes: HANDLE_BYTES as u32,
        kind: 0,
        handle: [0; HANDLE_BYTES],
    };
    let mut mount: libc::c_int = 0;
    // SAFETY: the path is NUL-terminated; `handle` has the layout of struct file_handle and as many bytes behind it
    // as its first field says; the kernel writes no more, and writes `mount`.
    let result = unsafe {
        libc::syscall(
            libc::SYS_name_to_handle_at,
            fd.as_fd().as_raw_fd(),
            c"".as_ptr(),
            &raw mut handle,
            &raw mut mount,
            libc::AT_EMPTY_PATH,
        )
    };
    if result == 0 {
        Ok((handle, mount))
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Opens `handle` as O_PATH in the mount that `mount` (not O_PATH) is a file of.
pub fn open_file_handle(mount: impl AsFd, handle: &FileHandle) -> io::Result<OwnedFd> {
    // SAFETY: `handle` has the layout of struct file_handle and holds as many bytes as its first field says; the
    // kernel only reads it. A descriptor returned is new and nobody else's.
    unsafe {
        let flags = libc::O_PATH | libc::O_NOFOLLOW | libc::O_CLOEXEC;
        let fd = libc::syscall(
            libc::SYS_open_by_handle_at,
            mount.as_fd().as_raw_fd(),
            std::ptr::from_ref(handle),
            flags,
        );
        match RawFd::try_from(fd) {
            Ok(fd) if fd >= 0 => Ok(OwnedFd::from_raw_fd(fd)),
            _ => Err(io::Error::last_os_error()),
        }
    }
}
