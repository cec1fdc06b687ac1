//! The way from the guest to ports of the host. The shim holds the other end of a socket of packets: for each connection that the guest asks
//! for, one end of a new pair of sockets goes there with the port's number (4 bytes, little-endian). So the VMM reaches nothing by a
//! name, and only the ports of its configuration.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
    sendmsg, socketpair,
};

/// Shared by the device and the machine: another shim brings another socket.
#[derive(Debug)]
pub struct Uplink {
    ports: Vec<u32>,
    socket: Mutex<Option<OwnedFd>>,
}

impl Uplink {
    /// To the host's `ports`, by `socket`; without one nothing is reached until [`Self::replace`].
    pub fn new(ports: Vec<u32>, socket: Option<OwnedFd>) -> Arc<Self> {
        Arc::new(Self {
            ports,
            socket: Mutex::new(socket),
        })
    }

    fn socket(&self) -> MutexGuard<'_, Option<OwnedFd>> {
        self.socket.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What was connected stays so.
    pub fn replace(&self, socket: OwnedFd) {
        *self.socket() = Some(socket);
    }

    /// A connection to `port`, without waiting: a shim that does not take what came before refuses.
    pub fn connect(&self, port: u32) -> io::Result<UnixStream> {
        if !self.ports.contains(&port) {
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        let socket = self.socket();
        let socket = socket.as_ref().ok_or(io::ErrorKind::NotConnected)?;
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        let theirs = [theirs.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        ancillary.push(SendAncillaryMessage::ScmRights(&theirs));
        let port = port.to_le_bytes();
        let parts = [IoSlice::new(&port)];
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        sendmsg(socket, &parts, &mut ancillary, flags)?;
        Ok(ours.into())
    }
}
