//! The channel between keeper and worker: packets of JSON, each with at most one descriptor.

use std::{
    fs,
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::{
        fd::{BorrowedFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
    path::{Path, PathBuf},
};

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};
use serde::{Deserialize, Serialize};

/// Longest packet: a path and ids.
const PACKET_MAX: usize = 16 << 10;

/// What the two tell each other.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Message {
    /// To the keeper: keep this descriptor. To a new worker: this was kept.
    Store {
        /// Whose it is.
        process: String,
        /// What it is.
        role: String,
    },
    /// To the keeper: open these ends of a fifo, keep them, and answer at the descriptor that comes along: with a [`Message::Store`] for
    /// each, or with [`Message::Refused`].
    Open {
        /// Whose it is.
        process: String,
        /// Where it is.
        path: PathBuf,
        /// Each becomes a descriptor of its own, in this order.
        ends: Vec<End>,
    },
    /// The answer when a fifo could not be opened.
    Refused {
        /// The operating system's error number.
        errno: i32,
    },
    /// To the keeper: close it; without a role, all of the process.
    Forget {
        /// Whose it is.
        process: String,
        /// What it is.
        role: Option<String>,
    },
    /// To the worker: a connection of containerd.
    Client,
    /// To the worker: that was all, begin.
    Go {
        /// There was none before it.
        first: bool,
    },
    /// To the keeper: the pod is over, and so are we.
    End,
    /// To the keeper: we end, and another shall take over.
    Replace,
    /// To the worker: give a sign of life.
    Ping,
    /// To the keeper: here it is.
    Pong,
    /// Of another version: to be ignored.
    Unknown,
}

/// How a fifo is opened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct End {
    /// What the descriptor is kept as.
    pub role: String,
    /// To read from.
    pub read: bool,
    /// To write to.
    pub write: bool,
}

impl End {
    /// To read from.
    pub fn reader(role: &str) -> Self {
        Self {
            role: role.into(),
            read: true,
            write: false,
        }
    }

    /// To write to.
    pub fn writer(role: &str) -> Self {
        Self {
            role: role.into(),
            read: false,
            write: true,
        }
    }

    /// To write to whether or not there is a reader.
    pub fn both(role: &str) -> Self {
        Self {
            read: true,
            ..Self::writer(role)
        }
    }

    /// Opens it; waits for no peer.
    pub fn open(&self, path: &Path) -> io::Result<OwnedFd> {
        let file = fs::OpenOptions::new()
            .read(self.read)
            .write(self.write)
            .custom_flags(libc::O_NONBLOCK)
            .open(path)?;
        Ok(file.into())
    }
}

/// Both ends.
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let flags = SocketFlags::CLOEXEC;
    Ok(socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        flags,
        None,
    )?)
}

/// Sends a message; waits while the peer is busy.
pub fn send(
    channel: BorrowedFd<'_>,
    message: &Message,
    fd: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    let text = serde_json::to_vec(message).map_err(io::Error::other)?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = fd.map(|fd| [fd]);
    if let Some(fds) = &fds
        && !control.push(SendAncillaryMessage::ScmRights(fds))
    {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let data = [IoSlice::new(&text)];
    sendmsg(channel, &data, &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// The next message; none if there is none and `wait` is false. The end of the peer is an error.
pub fn receive(
    channel: BorrowedFd<'_>,
    wait: bool,
) -> io::Result<Option<(Message, Option<OwnedFd>)>> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut buffer = [0; PACKET_MAX];
    let mut flags = RecvFlags::CMSG_CLOEXEC;
    if !wait {
        flags |= RecvFlags::DONTWAIT;
    }
    let received = loop {
        let mut data = [IoSliceMut::new(&mut buffer)];
        match recvmsg(channel, &mut data, &mut control, flags) {
            // A peer that ended and left something unread: told once, and before what it has said.
            Err(rustix::io::Errno::INTR | rustix::io::Errno::CONNRESET) => {}
            Err(rustix::io::Errno::AGAIN) if !wait => return Ok(None),
            other => break other?.bytes,
        }
    };
    if received == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let mut fd = None;
    for part in control.drain() {
        if let RecvAncillaryMessage::ScmRights(fds) = part {
            fd = fds.last();
        }
    }
    let text = buffer.get(..received).unwrap_or_default();
    let message = serde_json::from_slice(text).unwrap_or(Message::Unknown);
    Ok(Some((message, fd)))
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn what_was_said_is_heard_though_the_peer_left_something_unread() {
        let (ours, theirs) = pair().unwrap();
        send(ours.as_fd(), &Message::Client, None).unwrap();
        send(theirs.as_fd(), &Message::End, None).unwrap();
        drop(theirs);
        let heard = receive(ours.as_fd(), false).unwrap();
        assert_eq!(heard.map(|(message, _)| message), Some(Message::End));
        let end = receive(ours.as_fd(), false).unwrap_err();
        assert_eq!(end.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn messages_and_descriptors_arrive_and_the_end_is_told() {
        let (a, b) = pair().unwrap();
        assert!(receive(b.as_fd(), false).unwrap().is_none());
        let store = || Message::Store {
            process: "web/".into(),
            role: "stdout".into(),
        };
        let file = std::fs::File::open("/dev/null").unwrap();
        send(a.as_fd(), &store(), Some(file.as_fd())).unwrap();
        send(a.as_fd(), &Message::Go { first: false }, None).unwrap();
        let (message, fd) = receive(b.as_fd(), true).unwrap().unwrap();
        assert!(message == store() && fd.is_some());
        let (message, fd) = receive(b.as_fd(), true).unwrap().unwrap();
        assert!(message == Message::Go { first: false } && fd.is_none());
        rustix::net::send(&a, b"\"later\"", SendFlags::empty()).unwrap();
        let (message, _) = receive(b.as_fd(), true).unwrap().unwrap();
        assert_eq!(message, Message::Unknown);
        drop(a);
        assert!(receive(b.as_fd(), false).is_err());
    }
}
