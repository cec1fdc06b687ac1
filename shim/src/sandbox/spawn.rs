//! Starts the pod's helpers: a session of their own (they survive the shim), only the descriptors they are given,
//! stderr into a log file. The shim's only code between fork and exec.

use std::{
    fs::OpenOptions,
    io,
    os::{
        fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd},
        unix::fs::OpenOptionsExt,
    },
    path::Path,
    process::{ExitStatus, Stdio},
};

use rustix::{
    net::{AddressFamily, SocketFlags, SocketType, socketpair, sockopt},
    process::{Pid, PidfdFlags, pidfd_open},
    thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space},
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    process::{Child, Command},
};

use super::state::ProcessId;
use crate::watch::watch;

/// Workers of the file server.
pub const FS_WORKERS: usize = 4;
/// Room for the largest FUSE message (1 MiB and 4 KiB) beside the kernel's overhead.
const FUSE_BUFFER: usize = 4 << 20;

/// Pairs of SEQPACKET sockets: the VMM's ends and the file server's ends.
pub fn fs_channels() -> io::Result<(Vec<OwnedFd>, Vec<OwnedFd>)> {
    let mut vmm = Vec::new();
    let mut fs = Vec::new();
    for _ in 0..FS_WORKERS {
        let (a, b) = socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )?;
        for end in [&a, &b] {
            // The forced form passes net.core.wmem_max; without CAP_NET_ADMIN the limit stands.
            if sockopt::set_socket_send_buffer_size_force(end, FUSE_BUFFER).is_err() {
                sockopt::set_socket_send_buffer_size(end, FUSE_BUFFER)?;
            }
        }
        vmm.push(a);
        fs.push(b);
    }
    Ok((vmm, fs))
}

/// A process of the pod: started by us, or by a shim before.
pub enum Helper {
    /// A child.
    Child(Child),
    /// Somebody else's child, by its pidfd.
    Adopted(AsyncFd<OwnedFd>),
}

impl Helper {
    /// The process of `id`, if it is still there. In the runtime of the caller.
    pub fn adopt(id: ProcessId) -> io::Result<Self> {
        let gone = || io::Error::from(io::ErrorKind::NotFound);
        let pid = Pid::from_raw(id.pid).ok_or_else(gone)?;
        let fd = pidfd_open(pid, PidfdFlags::empty())?;
        // Only now is the number known to be this process's.
        if !id.is_alive() {
            return Err(gone());
        }
        let fd = watch(fd, Interest::READABLE)?;
        Ok(Self::Adopted(fd))
    }

    /// Waits for its end; how it ended is known of children only.
    pub async fn wait(&mut self) -> io::Result<ExitStatus> {
        match self {
            Self::Child(child) => child.wait().await,
            Self::Adopted(fd) => {
                fd.readable().await?.retain_ready();
                Err(io::Error::other("an earlier shim's child"))
            }
        }
    }
}

impl From<Child> for Helper {
    fn from(child: Child) -> Self {
        Self::Child(child)
    }
}

/// The network that a child is in: never the host's.
#[derive(Clone, Copy)]
pub enum Net<'a> {
    /// This namespace.
    Of(BorrowedFd<'a>),
    /// None: an empty namespace.
    Empty,
}

/// Where on the host a child is from before its program runs.
#[derive(Clone, Copy)]
pub struct Place<'a> {
    /// Its network.
    pub net: Net<'a>,
    /// The `cgroup.procs` of its cgroups.
    pub cgroups: &'a [OwnedFd],
}

/// Starts `program`, which inherits `keep` under the same numbers.
pub fn spawn(
    program: &Path,
    args: &[String],
    keep: &[OwnedFd],
    place: Place<'_>,
    log: &Path,
) -> io::Result<Child> {
    let log = OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(log)?;
    let keep: Vec<RawFd> = keep.iter().map(AsRawFd::as_raw_fd).collect();
    let cgroups: Vec<RawFd> = place.cgroups.iter().map(AsRawFd::as_raw_fd).collect();
    let net = match place.net {
        Net::Of(namespace) => Some(namespace.as_raw_fd()),
        Net::Empty => None,
    };
    let mut command = Command::new(program);
    command
        .args(args)
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log);
    // SAFETY: between fork and exec only system calls are made, on memory allocated before; the numbers in `keep`,
    // `cgroups` and `net` are the caller's descriptors, open until `spawn` returns. CLONE_FILES is not passed to unshare.
    unsafe {
        command.pre_exec(move || {
            rustix::process::setsid()?;
            for &fd in &cgroups {
                // 0 stands for the process that writes (cgroups(7)).
                rustix::io::write(BorrowedFd::borrow_raw(fd), b"0")?;
            }
            match net {
                Some(fd) => {
                    let fd = BorrowedFd::borrow_raw(fd);
                    move_into_link_name_space(fd, Some(LinkNameSpaceType::Network))?;
                }
                None => rustix::thread::unshare_unsafe(UnshareFlags::NEWNET)?,
            }
            if libc::close_range(3, libc::c_uint::MAX, CLOSE_RANGE_CLOEXEC) != 0 {
                return Err(io::Error::last_os_error());
            }
            for &fd in &keep {
                let fd = BorrowedFd::borrow_raw(fd);
                rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::empty())?;
            }
            Ok(())
        });
    }
    command.spawn()
}

const CLOSE_RANGE_CLOEXEC: libc::c_int = libc::CLOSE_RANGE_CLOEXEC as libc::c_int;

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_child_has_its_own_session_and_no_other_descriptors() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        let leak = std::fs::File::open("/dev/null").unwrap();
        rustix::io::fcntl_setfd(&leak, rustix::io::FdFlags::empty()).unwrap();
        let (a, _b) = fs_channels().unwrap();
        let kept = a[0].as_raw_fd();
        let script = "cut -d' ' -f6 /proc/self/stat; ls /proc/self/fd";
        let mut child = spawn(
            Path::new("/bin/sh"),
            &["-c".into(), script.into()],
            &a[..1],
            Place {
                net: Net::Empty,
                cgroups: &[],
            },
            &log,
        )
        .unwrap();
        let pid = child.id().unwrap();
        assert!(child.wait().await.unwrap().success());
        let text = std::fs::read_to_string(&log).unwrap();
        let mut lines = text.lines();
        assert_eq!(lines.next(), Some(pid.to_string().as_str()));
        let fds: Vec<i32> = lines.map(|l| l.parse().unwrap()).collect();
        assert!(fds.contains(&kept), "{fds:?}");
        // 0, 1, 2, the kept one and the listing's own.
        assert_eq!(fds.len(), 5, "{fds:?}");
    }
}
