//! Starts the pod's helpers: a session of their own (they survive the shim), only the descriptors they are given,
//! stderr into a log file.

use std::{
    fs::{File, OpenOptions},
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::{fs::OpenOptionsExt, process::ExitStatusExt},
    },
    path::Path,
    process::ExitStatus,
};

use rustix::{
    net::{AddressFamily, SocketFlags, SocketType, socketpair, sockopt},
    process::{Pid, PidfdFlags, WaitId, WaitIdOptions, WaitIdStatus, pidfd_open, waitid},
};
use tokio::io::{Interest, unix::AsyncFd};

use super::state::ProcessId;
use super::{
    cgroup::Membership,
    launch::{Launch, launch},
};
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

/// A process of the pod, by its pidfd: started by us, or by a shim before.
pub struct Helper(AsyncFd<OwnedFd>);

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
        Ok(Self(watch(fd, Interest::READABLE)?))
    }

    /// Waits for its end; how it ended is known of children only.
    pub async fn wait(&mut self) -> io::Result<ExitStatus> {
        self.0.readable().await?.retain_ready();
        let status = waitid(
            WaitId::PidFd(self.0.get_ref().as_fd()),
            WaitIdOptions::EXITED,
        );
        match status {
            Ok(Some(status)) => Ok(exit_status(&status)),
            _ => Err(io::Error::other("an earlier shim's child")),
        }
    }
}

/// In the form of wait(2).
fn exit_status(status: &WaitIdStatus) -> ExitStatus {
    let code = status.exit_status().map(|code| (code & 0xff) << 8);
    let raw = code.or_else(|| status.terminating_signal());
    ExitStatus::from_raw(raw.unwrap_or_default())
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
    /// In a pid namespace of its own, as its first process.
    pub own_pids: bool,
    /// Its cgroups.
    pub cgroups: &'a Membership,
}

/// Starts `program`, which inherits `keep` under the same numbers; gives back its pid as well.
pub fn spawn(
    program: &Path,
    args: &[String],
    keep: &[OwnedFd],
    place: Place<'_>,
    log: &Path,
) -> io::Result<(Helper, i32)> {
    let log = OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(log)?;
    let launched = launch(&Launch {
        program,
        args,
        keep,
        stdin: File::open("/dev/null")?.as_fd(),
        output: log.as_fd(),
        net: match place.net {
            Net::Of(namespace) => Some(namespace),
            Net::Empty => None,
        },
        own_pids: place.own_pids,
        cgroups: place.cgroups,
    })?;
    let (pidfd, pid) = launched;
    Ok((Helper(watch(pidfd, Interest::READABLE)?), pid))
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use super::*;

    #[tokio::test]
    async fn a_child_has_its_own_session_and_no_other_descriptors() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        let leak = std::fs::File::open("/dev/null").unwrap();
        rustix::io::fcntl_setfd(&leak, rustix::io::FdFlags::empty()).unwrap();
        let (a, _b) = fs_channels().unwrap();
        let kept = a[0].as_raw_fd();
        let (mut child, pid) = sh(
            "cut -d' ' -f6 /proc/self/stat; ls /proc/self/fd; exit 7",
            &a[..1],
            &log,
        );
        let status = child.wait().await.unwrap();
        assert_eq!(status.code(), Some(7));
        let text = std::fs::read_to_string(&log).unwrap();
        let mut lines = text.lines();
        assert_eq!(lines.next(), Some(pid.to_string().as_str()));
        let fds: Vec<i32> = lines.map(|l| l.parse().unwrap()).collect();
        assert!(fds.contains(&kept), "{fds:?}");
        // 0, 1, 2, the kept one and the listing's own.
        assert_eq!(fds.len(), 5, "{fds:?}");
    }

    fn sh(script: &str, keep: &[OwnedFd], log: &Path) -> (Helper, i32) {
        let cgroups = Membership::default();
        let place = Place {
            net: Net::Empty,
            own_pids: false,
            cgroups: &cgroups,
        };
        let args = ["-c".to_owned(), script.to_owned()];
        spawn(Path::new("/bin/sh"), &args, keep, place, log).unwrap()
    }

    #[tokio::test]
    async fn signals_are_as_a_program_expects_them_and_its_end_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        let (mut child, _) = sh(
            "grep -E 'Sig(Blk|Ign)' /proc/self/status; kill -9 $$",
            &[],
            &log,
        );
        assert_eq!(child.wait().await.unwrap().signal(), Some(9));
        let text = std::fs::read_to_string(&log).unwrap();
        let mask = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name));
            u64::from_str_radix(line.unwrap().trim(), 16).unwrap()
        };
        assert_eq!(mask("SigBlk:"), 0);
        assert_eq!(mask("SigIgn:") & (1 << (libc::SIGPIPE - 1)), 0, "{text}");
    }

    #[tokio::test]
    async fn a_program_that_is_not_there_is_an_error_and_leaves_no_process() {
        let dir = tempfile::tempdir().unwrap();
        let cgroups = Membership::default();
        let place = Place {
            net: Net::Empty,
            own_pids: false,
            cgroups: &cgroups,
        };
        let none = dir.path().join("none");
        let started = spawn(&none, &[], &[], place, &dir.path().join("log"));
        let error = started.err().unwrap();
        assert_eq!(error.kind(), io::ErrorKind::NotFound, "{error}");
    }
}
