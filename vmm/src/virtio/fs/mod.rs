//! Virtio-fs (virtio 1.3 section 5.11): carries the guest's FUSE requests to the file server.
//!
//! ```text
//!  guest: request queue, hiprio queue
//!     |  chain: request to read, room for the reply to write
//!     v
//!  worker thread -- one datagram: header + body --> its SEQPACKET socket --> a worker of bulkhead-fs
//!     ^------------ one datagram: header + body ---------------------------------'
//! ```
//!
//! The file server sees messages, never guest memory. A worker does one request at a time, so requests and replies on a
//! socket alternate. Of the FUSE protocol this device knows the two headers, and which requests have no reply.
//! It checks both sides: the guest's lengths before they are sent, the file server's reply before it reaches the guest.

mod message;
#[cfg(test)]
mod tests;
mod worker;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;
use rustix::net::sockopt::{
    set_socket_recv_buffer_size, set_socket_send_buffer_size, set_socket_send_buffer_size_force,
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use self::worker::{Queues, Worker};
use super::{ActivateError, Activation, VirtioDevice};
use crate::jail::seccomp::Kind;
use crate::jail::threads;
use crate::limits;
use crate::machine::end::EndSender;

const DEVICE_TYPE: u32 = 26;
/// Hiprio, and one request queue: large enough for requests of 256 pages and their headers.
const QUEUE_SIZES: [u16; 2] = [512, 512];
const REQUEST_QUEUES: u32 = 1;
/// Bytes of the tag in the configuration space (section 5.11.4).
const TAG_LEN: usize = 36;

/// Why the device could not be made.
#[derive(Debug, thiserror::Error)]
pub enum FsError {
    /// Longer than the field for it.
    #[error("file system tag {0:?} is longer than 36 bytes")]
    Tag(String),
    /// The device cannot do without.
    #[error("no socket to the file server")]
    NoWorker,
    /// A socket to the file server cannot be used.
    #[error("cannot prepare socket {index} to the file server")]
    Socket {
        /// Which of the workers.
        index: usize,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
}

/// Called at each request.
type Seen = Arc<dyn Fn() + Send + Sync>;

/// The device.
pub struct Fs {
    config: [u8; TAG_LEN + 4],
    sockets: Vec<Arc<OwnedFd>>,
    end: EndSender,
    seen: Seen,
    running: Option<Running>,
}

struct Running {
    stop: EventFd,
    queues: Arc<Queues>,
    threads: Vec<JoinHandle<()>>,
}

impl Fs {
    /// A device with mount tag `tag`; each of `sockets` is a SEQPACKET socket to a worker of the file server. If
    /// one of them breaks, the machine ends: `end` hears of it.
    pub fn new(tag: &str, sockets: Vec<OwnedFd>, end: EndSender) -> Result<Self, FsError> {
        let mut config = [0; TAG_LEN + 4];
        let field = config
            .get_mut(..tag.len())
            .filter(|field| field.len() <= TAG_LEN);
        field
            .ok_or_else(|| FsError::Tag(tag.to_owned()))?
            .copy_from_slice(tag.as_bytes());
        config[TAG_LEN..].copy_from_slice(&REQUEST_QUEUES.to_le_bytes());
        if sockets.is_empty() {
            return Err(FsError::NoWorker);
        }
        for (index, socket) in sockets.iter().enumerate() {
            prepare(socket).map_err(|error| FsError::Socket {
                index,
                source: error.into(),
            })?;
        }
        let sockets = sockets.into_iter().map(Arc::new).collect();
        Ok(Self {
            config,
            sockets,
            end,
            seen: Arc::new(|| ()),
            running: None,
        })
    }

    /// The device, with `seen` called at each request: the first shows that the guest's kernel is up.
    pub fn seen_by(mut self, seen: impl Fn() + Send + Sync + 'static) -> Self {
        self.seen = Arc::new(seen);
        self
    }
}

/// A message goes through whole, and a thread waits for it.
fn prepare(socket: &OwnedFd) -> Result<(), Errno> {
    // Room for a message and the kernel's own overhead.
    let size = 4 * limits::FS_MESSAGE;
    if set_socket_send_buffer_size_force(socket, size).is_err() {
        // Without CAP_NET_ADMIN: as much as the system's limit allows.
        set_socket_send_buffer_size(socket, size)?;
    }
    set_socket_recv_buffer_size(socket, size)?;
    fcntl_setfl(socket, fcntl_getfl(socket)? & !OFlags::NONBLOCK)
}

impl VirtioDevice for Fs {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn name(&self) -> &'static str {
        "fs"
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        for (to, from) in data.iter_mut().zip(self.config.iter().skip(start)) {
            *to = *from;
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let io = |what| move |source| ActivateError::Io { what, source };
        let mut given = activation.queues.into_iter();
        let hiprio = given
            .next()
            .flatten()
            .ok_or(ActivateError::MissingQueue(0))?;
        let request = given
            .next()
            .flatten()
            .ok_or(ActivateError::MissingQueue(1))?;
        let stop = EventFd::new(EFD_NONBLOCK).map_err(io("make the fs device's stop event"))?;
        let queues = Queues::new(hiprio, request, &stop, &self.sockets)
            .map_err(io("watch the fs device's queues"))?;
        let shared = Arc::new(queues);
        let leader = Arc::new(Mutex::new(()));
        // Threads that did start end with `running`, whatever happens to the others.
        let running = self.running.insert(Running {
            stop,
            queues: shared.clone(),
            threads: Vec::new(),
        });
        for (index, socket) in self.sockets.iter().enumerate() {
            let worker = Worker {
                socket: socket.clone(),
                queues: shared.clone(),
                leader: leader.clone(),
                end: self.end.clone(),
                seen: self.seen.clone(),
            };
            let builder = std::thread::Builder::new().name(format!("fs-{index}"));
            let thread = threads::spawn(Kind::Device, builder, move || worker.run())
                .map_err(io("start a thread of the fs device"))?;
            running.threads.push(thread);
        }
        Ok(())
    }

    fn reset(&mut self) {
        let Some(running) = self.running.take() else {
            return;
        };
        running.queues.stop_taking();
        if let Err(error) = running.stop.write(1) {
            tracing::error!(%error, "cannot stop the fs device");
            return;
        }
        for thread in running.threads {
            drop(thread.join());
        }
    }
}

impl Drop for Fs {
    fn drop(&mut self) {
        self.reset();
    }
}
