//! Virtio-vsock (virtio 1.3 section 5.10): stream sockets between the guest and unix sockets of the host.
//!
//! # The host's side
//!
//! `vsock.sock` in the state folder: a client connects, writes `CONNECT <port>\n` and reads `OK <host port>\n` once the
//! guest accepted; its socket is closed if the guest refused. What the guest asks for a port of CID 2 goes to the shim by the
//! [`Uplink`]; for a port that is not configured it gets RST.
//!
//! # The protocol, in short
//!
//! Packets of both directions are a header of 44 bytes and, for RW, data. REQUEST asks for a connection, RESPONSE
//! accepts and RST refuses it. Each side tells in every packet how large its buffer is (`buf_alloc`) and how much
//! has left it (`fwd_cnt`); the other may have `buf_alloc - (sent - fwd_cnt)` more bytes in flight. CREDIT_UPDATE only tells
//! these numbers, CREDIT_REQUEST asks for them. SHUTDOWN with SEND ends the sender's direction, with RECEIVE the
//! other; once both are ended, RST acknowledges.
//!
//! # A connection
//!
//! ```text
//!  host: CONNECT line                                guest: REQUEST
//!          |  REQUEST to the guest                          |  a pair of sockets, one end to the shim
//!          v                                                v
//!      Requested -- RESPONSE: "OK <port>\n" -----------> Open -------------------------+
//!          |                                              |                            | protocol broken,
//!          | RST, or the client hung up                   | guest: RST, or SHUTDOWN    | credit overrun:
//!          v                                              | of both ways (RST back)    | RST to the guest
//!        Done <------- everything written ----------- Draining                         |
//!          ^                                                                           |
//!          +---------------------------------------------------------------------------+
//! ```
//!
//! Half-close while open: SHUTDOWN(SEND) of the guest becomes `shutdown(SHUT_WR)` after the last buffered byte was written;
//! end of file on the host's socket becomes SHUTDOWN(SEND) after the last byte was delivered, and
//! SHUTDOWN(SEND|RECEIVE) if the host's peer is gone whole. A drained connection has left the table of names, so
//! the guest may use its ports anew.
//!
//! # Memory
//!
//! Towards the guest nothing is buffered: bytes stay in the host's socket until there is credit and a receive buffer. Towards
//! the host, what the socket does not take waits in a buffer of [`limits::VSOCK_BUFFER`] bytes; then credit
//! stops the guest. So a stuck reader stops its own connection and no other. The guest itself may ask for
//! [`limits::VSOCK_GUEST_CONNECTIONS`]: otherwise it could fill as many buffers as a host's listener has room for.

mod client;
mod connection;
mod muxer;
mod packet;
mod payload;
#[cfg(test)]
mod tests;
mod uplink;
mod worker;

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;

use vmm_sys_util::eventfd::EventFd;

pub use self::muxer::{FirstConnection, MuxerError};
pub use self::uplink::Uplink;

use self::muxer::Muxer;
use self::worker::Worker;
use super::{ActivateError, Activation, VirtioDevice};
use crate::jail::seccomp::Kind;
use crate::jail::threads;

/// VIRTIO_VSOCK_F_STREAM (section 5.10.3).
const F_STREAM: u64 = 1 << 0;
const DEVICE_TYPE: u32 = 19;
/// Receive, transmit, event. The driver holds 4 KiB for each entry of the first, whether or not anything comes; a stream's credit
/// is 256 KiB.
const QUEUE_SIZES: [u16; 3] = [64, 256, 64];

/// The device.
pub struct Vsock {
    cid: u64,
    state: State,
}

enum State {
    Idle(Box<Muxer>),
    Running {
        stop: EventFd,
        thread: JoinHandle<Box<Muxer>>,
    },
    /// The thread died, or could not be started.
    Broken,
}

impl Vsock {
    /// A device for the guest with `cid`, which listens on `socket` from now on and reaches the host by `uplink`.
    ///
    /// `on_first_guest_connection` is called once, from the device's thread: the agent dials when it serves.
    pub fn new(
        cid: u64,
        socket: &Path,
        uplink: Arc<Uplink>,
        on_first_guest_connection: FirstConnection,
    ) -> Result<Self, MuxerError> {
        let muxer = Muxer::new(cid, socket, uplink, on_first_guest_connection)?;
        Ok(Self {
            cid,
            state: State::Idle(Box::new(muxer)),
        })
    }
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn name(&self) -> &'static str {
        "vsock"
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        F_STREAM
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = self.cid.to_le_bytes();
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        for (to, from) in data.iter_mut().zip(config.iter().skip(start)) {
            *to = *from;
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let io = |what| move |source| ActivateError::Io { what, source };
        let mut queues = activation.queues.into_iter();
        let rx = queues
            .next()
            .flatten()
            .ok_or(ActivateError::MissingQueue(0))?;
        let tx = queues
            .next()
            .flatten()
            .ok_or(ActivateError::MissingQueue(1))?;
        // Only a transport reset after a migration would be told there (section 5.10.6.7).
        let event = queues.next().flatten();

        let stop = EventFd::new(0).map_err(io("make the vsock device's stop event"))?;
        let worker_stop = stop
            .try_clone()
            .map_err(io("copy the vsock device's stop event"))?;
        let State::Idle(muxer) = std::mem::replace(&mut self.state, State::Broken) else {
            let source = io::Error::other("its thread is gone or runs already");
            return Err(ActivateError::Io {
                what: "start the vsock device",
                source,
            });
        };
        let worker = Worker::new(muxer, rx, tx, event, worker_stop)
            .map_err(io("watch the vsock device's queues"))?;
        let builder = std::thread::Builder::new().name("vsock".into());
        let thread = threads::spawn(Kind::Device, builder, move || worker.run())
            .map_err(io("start the vsock device's thread"))?;
        self.state = State::Running { stop, thread };
        Ok(())
    }

    fn reset(&mut self) {
        self.state = match std::mem::replace(&mut self.state, State::Broken) {
            State::Running { stop, thread } => {
                let stopped = stop.write(1).map(|()| thread.join());
                match stopped {
                    Ok(Ok(muxer)) => State::Idle(muxer),
                    _ => State::Broken,
                }
            }
            state => state,
        };
    }
}

impl Drop for Vsock {
    fn drop(&mut self) {
        self.reset();
    }
}
