//! The device's threads. One of them, the leader, waits for the next request; once it has one, another leads. So a request
//! is served by the thread that saw it, without a hand-over, and a slow one does not keep others waiting.

use std::fmt::Display;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::message::{Kind, Request, refuse};
use crate::machine::end::{End, EndReason, EndSender};
use crate::virtio::chain::Chain;
use crate::virtio::queue::{QueueError, VirtQueue, log_broken};

const STOP: u64 = 2;
const HANG_UP: u64 = 3;

/// The queues, and what the leader waits on.
pub struct Queues {
    /// Hiprio first: it is looked at first. `None` after the driver broke the ring.
    queues: [Mutex<Option<VirtQueue>>; 2],
    epoll: Epoll,
    _stop: EventFd,
    stopping: AtomicBool,
}

enum Next {
    Chain(usize, Chain),
    Stop,
    /// The file server is gone, though nobody asked it anything.
    HangUp,
}

impl Queues {
    /// `stop` ends all threads and stays signalled; `sockets` are watched for the file server's end.
    pub fn new(
        hiprio: VirtQueue,
        request: VirtQueue,
        stop: &EventFd,
        sockets: &[Arc<OwnedFd>],
    ) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        let stop = stop.try_clone()?;
        let fds = [
            hiprio.kick().as_raw_fd(),
            request.kick().as_raw_fd(),
            stop.as_raw_fd(),
        ];
        for (token, fd) in (0..).zip(fds) {
            epoll.ctl(
                ControlOperation::Add,
                fd,
                EpollEvent::new(EventSet::IN, token),
            )?;
        }
        for socket in sockets {
            let event = EpollEvent::new(EventSet::READ_HANG_UP, HANG_UP);
            epoll.ctl(ControlOperation::Add, socket.as_raw_fd(), event)?;
        }
        let queues = [Mutex::new(Some(hiprio)), Mutex::new(Some(request))];
        Ok(Self {
            queues,
            epoll,
            _stop: stop,
            stopping: AtomicBool::new(false),
        })
    }

    /// No further request is taken, however many there are.
    pub fn stop_taking(&self) {
        self.stopping.store(true, Ordering::SeqCst);
    }

    fn lock(&self, index: usize) -> MutexGuard<'_, Option<VirtQueue>> {
        self.queues[index]
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Does something with a queue; a broken ring is served no more.
    fn with<T>(
        &self,
        index: usize,
        act: impl FnOnce(&mut VirtQueue) -> Result<T, QueueError>,
    ) -> Option<T> {
        let mut slot = self.lock(index);
        match act(slot.as_mut()?) {
            Ok(value) => Some(value),
            Err(error) => {
                log_broken("fs", &error);
                if let Some(queue) = slot.take() {
                    let gone = EpollEvent::default();
                    let kick = queue.kick().as_raw_fd();
                    drop(self.epoll.ctl(ControlOperation::Delete, kick, gone));
                }
                None
            }
        }
    }

    fn pop(&self) -> Option<Next> {
        (0..self.queues.len()).find_map(|index| {
            let chain = self.with(index, |queue| {
                loop {
                    if let Some(chain) = queue.pop()? {
                        return Ok(Some(chain));
                    }
                    if !queue.enable_kicks()? {
                        return Ok(None);
                    }
                }
            });
            Some(Next::Chain(index, chain??))
        })
    }

    fn next(&self) -> Next {
        let mut events = [EpollEvent::default(); 3];
        loop {
            if self.stopping.load(Ordering::SeqCst) {
                return Next::Stop;
            }
            if let Some(next) = self.pop() {
                return next;
            }
            let count = self.epoll.wait(-1, &mut events).unwrap_or_default();
            for event in events.iter().take(count) {
                match event.data() {
                    STOP => return Next::Stop,
                    HANG_UP => return Next::HangUp,
                    // Read before the queues are looked at. Failing means that it was read already.
                    index => self.with(index as usize, |queue| {
                        drop(queue.kick().read());
                        Ok(())
                    }),
                };
            }
        }
    }

    fn finish(&self, index: usize, chain: Chain, written: u32) {
        self.with(index, |queue| {
            queue.push(chain, written)?;
            queue.notify()
        });
    }
}

/// One thread with its socket.
pub struct Worker {
    /// To a worker of the file server.
    pub socket: Arc<OwnedFd>,
    /// Shared by all threads.
    pub queues: Arc<Queues>,
    /// Held by the thread that waits for the next request.
    pub leader: Arc<Mutex<()>>,
    /// Hears that the file server is gone.
    pub end: EndSender,
    /// Called at each request.
    pub seen: Arc<dyn Fn() + Send + Sync>,
}

impl Worker {
    /// Serves until the device is stopped or the file server is gone.
    pub fn run(self) {
        loop {
            let next = {
                let _leads = self.leader.lock().unwrap_or_else(PoisonError::into_inner);
                self.queues.next()
            };
            let (index, chain) = match next {
                Next::Chain(index, chain) => (index, chain),
                Next::Stop => return,
                Next::HangUp => return self.file_server_died("it closed its sockets"),
            };
            (self.seen)();
            let result = self.serve(&chain);
            let written = match &result {
                Ok(written) => *written,
                Err(_) => refuse(&chain, libc::EIO),
            };
            self.queues.finish(index, chain, written);
            if let Err(error) = result {
                return self.file_server_died(error);
            }
        }
    }

    fn file_server_died(&self, reason: impl Display) {
        let detail = format!("the file server does not answer: {reason}");
        self.end.send(End::new(EndReason::FileServerDied, detail));
    }

    fn serve(&self, chain: &Chain) -> io::Result<u32> {
        let Some(request) = Request::parse(chain) else {
            tracing::debug!("refused a malformed FUSE request");
            return Ok(refuse(chain, libc::EINVAL));
        };
        match request.kind() {
            Kind::Dropped => Ok(0),
            Kind::Unanswered => match request.send(&self.socket) {
                Err(error) if !is_short_of_memory(&error) => Err(error),
                _ => Ok(0),
            },
            Kind::Answered => match request.send(&self.socket) {
                Ok(()) => request.receive(&self.socket),
                Err(error) if is_short_of_memory(&error) => Ok(refuse(chain, libc::ENOMEM)),
                Err(error) => Err(error),
            },
        }
    }
}

/// The request did not leave: the kernel has no memory for so large a datagram, or the socket's buffer is too small.
/// The file server lives.
fn is_short_of_memory(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EMSGSIZE | libc::ENOBUFS | libc::ENOMEM)
    )
}
