//! What the agent and its set-up copy say to each other, over a SEQPACKET socket pair: reports up, one byte down.

use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use oci_spec::runtime::{LinuxNamespaceType, LinuxPersonality, LinuxSeccomp, Process, Spec};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use serde::{Deserialize, Serialize};

use super::{hooks::Identity, ids::Ids, rootfs::Rootfs};
use crate::error::{Class, Error};

/// First argument of the copy.
pub const COPY_ARG: &str = "container-init";

/// Largest report: an error text of 4 KiB, escaped.
const REPORT_MAX: usize = 32 * 1024;

/// What the copy has to do.
#[derive(Serialize, Deserialize)]
pub enum Work {
    /// Make a container. Descriptors of the namespaces to join come with it.
    Create {
        /// The checked spec.
        spec: Box<Spec>,
        /// Its rootfs.
        rootfs: Rootfs,
        /// Whether the process gets a terminal.
        terminal: bool,
        /// Whether the process stays as the pod's pause, without a program.
        pause: bool,
        /// What the hooks are told.
        container: Identity,
        /// What execs will share.
        shared: Shared,
        /// Kinds of the namespaces to join, in the order of the descriptors.
        joins: Vec<LinuxNamespaceType>,
    },
    /// Run a process in a container. The pidfd of its init comes with it.
    Exec {
        /// The checked process.
        process: Box<Process>,
        /// Whether the process gets a terminal.
        terminal: bool,
        /// What it shares with the init.
        shared: Shared,
    },
}

/// What all processes of a container have in common, beside namespaces and cgroup.
#[derive(Clone, Default, Serialize, Deserialize)]
pub struct Shared {
    /// The filter of system calls.
    pub seccomp: Option<LinuxSeccomp>,
    /// The execution domain.
    pub personality: Option<LinuxPersonality>,
    /// The mappings of the user namespace; empty without one.
    pub ids: Ids,
    /// Whether the container's cgroup namespace is another than the agent's.
    pub cgroup_namespace: bool,
}

impl Work {
    /// The process of the spec, and whether it is an exec.
    pub fn process(&self) -> (Option<&Process>, bool) {
        match self {
            Self::Create { spec, .. } => (spec.process().as_ref(), false),
            Self::Exec { process, .. } => (Some(process), true),
        }
    }

    /// What its container's processes share.
    pub fn shared(&self) -> &Shared {
        match self {
            Self::Create { shared, .. } | Self::Exec { shared, .. } => shared,
        }
    }
}

/// What the copy and the process it makes report.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Report {
    /// Pid of the process, in the agent's pid namespace.
    Pid(u32),
    /// The master of the pty comes with this message.
    Pty,
    /// Only the execve is missing; waits for the start byte.
    Ready,
    /// It failed; nothing more comes.
    Failed {
        /// Class of the error.
        class: Class,
        /// Its text.
        text: String,
    },
}

impl From<&Error> for Report {
    fn from(error: &Error) -> Self {
        Self::Failed {
            class: error.class(),
            text: error.text(),
        }
    }
}

/// Sends a report, with a descriptor if there is one.
pub fn send(socket: BorrowedFd<'_>, report: &Report, fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let bytes = serde_json::to_vec(report)?;
    let fds: Vec<BorrowedFd<'_>> = fd.into_iter().collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        control.push(SendAncillaryMessage::ScmRights(&fds));
    }
    rustix::net::sendmsg(
        socket,
        &[IoSlice::new(&bytes)],
        &mut control,
        SendFlags::NOSIGNAL,
    )?;
    Ok(())
}

/// Receives a report; `None` at the end of the socket.
pub fn receive(socket: impl AsFd) -> io::Result<Option<(Report, Option<OwnedFd>)>> {
    let mut bytes = vec![0; REPORT_MAX];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let message = rustix::net::recvmsg(
        socket,
        &mut [IoSliceMut::new(&mut bytes)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC,
    )?;
    let mut fd = None;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(fds) = message {
            fd = fds.into_iter().next().or(fd);
        }
    }
    if message.bytes == 0 {
        return Ok(None);
    }
    if message.flags.contains(ReturnFlags::TRUNC) {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let report = serde_json::from_slice(bytes.get(..message.bytes).unwrap_or_default())?;
    Ok(Some((report, fd)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    fn pair() -> (OwnedFd, OwnedFd) {
        socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .unwrap()
    }

    #[test]
    fn reports_arrive_one_by_one_with_their_descriptors() {
        let (a, b) = pair();
        send(a.as_fd(), &Report::Pid(7), None).unwrap();
        send(a.as_fd(), &Report::Pty, Some(a.as_fd())).unwrap();
        assert!(matches!(receive(&b).unwrap(), Some((Report::Pid(7), None))));
        assert!(matches!(receive(&b).unwrap(), Some((Report::Pty, Some(_)))));
        drop(a);
        assert!(receive(&b).unwrap().is_none());
    }

    #[test]
    fn the_longest_error_fits_into_a_report() {
        let (a, b) = pair();
        let error = Error::field("x", "\u{1}".repeat(10_000));
        send(a.as_fd(), &Report::from(&error), None).unwrap();
        assert!(matches!(
            receive(&b).unwrap(),
            Some((Report::Failed { .. }, None))
        ));
    }
}
