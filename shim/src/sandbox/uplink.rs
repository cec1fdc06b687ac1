//! The guest's connections to ports of the host. The VMM has no way to anything by a name: it sends one end of each connection here, with
//! the port (4 bytes, little-endian), over a socket of packets that it was given.

use std::{
    io::{self, IoSliceMut},
    mem::MaybeUninit,
    os::{fd::OwnedFd, unix::net},
    sync::Arc,
};

use bulkhead_protocol::limits::{READY_PORT, RESOLVER_PORT};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketFlags, SocketType,
    recvmsg, socketpair,
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    net::UnixStream,
    sync::mpsc,
};

use super::network::Network;
use crate::{limits::READY_CONNECTIONS, watch::watch};

/// The ports that a guest reaches.
pub const PORTS: [u32; 2] = [READY_PORT, RESOLVER_PORT];

/// Our end, and the VMM's.
pub fn pair() -> io::Result<(Uplink, OwnedFd)> {
    let flags = SocketFlags::CLOEXEC;
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    rustix::io::ioctl_fionbio(&ours, true)?;
    Ok((Uplink(watch(ours, Interest::READABLE)?), theirs))
}

/// Our end.
pub struct Uplink(AsyncFd<OwnedFd>);

impl Uplink {
    /// The next connection and its port; `None` once the VMM is gone.
    async fn accept(&self) -> io::Result<Option<(u32, UnixStream)>> {
        loop {
            let mut ready = self.0.readable().await?;
            match ready.try_io(|fd| receive(fd.get_ref())) {
                Ok(Ok(Some((port, Some(stream))))) => {
                    stream.set_nonblocking(true)?;
                    return Ok(Some((port, UnixStream::from_std(stream)?)));
                }
                Ok(Ok(Some((port, None)))) => tracing::warn!(port, "a connection without socket"),
                Ok(Ok(None)) => return Ok(None),
                Ok(Err(error)) => return Err(error),
                Err(_would_block) => {}
            }
        }
    }

    /// Serves until the VMM is gone. The connections to the ready port come out of the answer, the first few of them.
    pub fn serve(self, network: Arc<Network>) -> mpsc::Receiver<UnixStream> {
        let (tell, ready) = mpsc::channel(READY_CONNECTIONS);
        tokio::spawn(async move {
            loop {
                match self.accept().await {
                    // What nobody waits for is closed.
                    Ok(Some((READY_PORT, stream))) => drop(tell.try_send(stream)),
                    Ok(Some((RESOLVER_PORT, stream))) => network.answer(stream),
                    Ok(Some((port, _))) => tracing::debug!(port, "nobody serves this port"),
                    Ok(None) => return,
                    Err(error) => {
                        tracing::warn!(%error, "the guest does not reach the host any more");
                        return;
                    }
                }
            }
        });
        ready
    }
}

fn receive(socket: &OwnedFd) -> io::Result<Option<(u32, Option<net::UnixStream>)>> {
    let mut port = [0; 4];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut parts = [IoSliceMut::new(&mut port)];
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    let message = recvmsg(socket, &mut parts, &mut ancillary, flags)?;
    if message.bytes == 0 {
        return Ok(None);
    }
    let mut stream = None;
    for part in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(mut sockets) = part {
            stream = sockets.next().map(net::UnixStream::from);
        }
    }
    Ok(Some((u32::from_le_bytes(port), stream)))
}
