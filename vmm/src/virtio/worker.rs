//! One thread for a device with few queues: waits for kicks, for its own event and for the order to stop.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::thread::JoinHandle;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::ActivateError;
use crate::jail::seccomp::Kind;
use crate::jail::threads;

/// A running thread; dropping it stops the thread and waits for it.
pub struct Worker {
    stop: EventFd,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    /// Calls `serve` each time one of `events` was signalled (they are read before). It runs until `serve` says that
    /// it cannot go on, or until the worker is dropped.
    pub fn start(
        name: &str,
        events: Vec<EventFd>,
        serve: impl FnMut() -> bool + Send + 'static,
    ) -> Result<Self, ActivateError> {
        Self::start_with(name, events, Vec::new(), serve)
    }

    /// The same, and `serve` is also called each time one of `sources` becomes readable. It reads from them until they
    /// have nothing left, or looks again when its own events call.
    pub fn start_with(
        name: &str,
        events: Vec<EventFd>,
        sources: Vec<OwnedFd>,
        mut serve: impl FnMut() -> bool + Send + 'static,
    ) -> Result<Self, ActivateError> {
        let failed = |what| move |source| ActivateError::Io { what, source };
        let stop = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(failed("make an event"))?;
        let ours = stop.try_clone().map_err(failed("share an event"))?;
        let epoll = Epoll::new().map_err(failed("make an epoll"))?;
        let watch = |event: &EventFd, token| {
            epoll.ctl(
                ControlOperation::Add,
                event.as_raw_fd(),
                EpollEvent::new(EventSet::IN, token),
            )
        };
        watch(&ours, STOP).map_err(failed("watch an event"))?;
        for (token, event) in (0u64..).zip(&events) {
            watch(event, token).map_err(failed("watch an event"))?;
        }
        for source in &sources {
            let edges = EventSet::IN | EventSet::EDGE_TRIGGERED;
            epoll
                .ctl(
                    ControlOperation::Add,
                    source.as_raw_fd(),
                    EpollEvent::new(edges, SOURCE),
                )
                .map_err(failed("watch a descriptor"))?;
        }
        let builder = std::thread::Builder::new().name(name.to_owned());
        let body = move || {
            // What came before the device started has no event of its own.
            let mut alive = serve();
            while let Some(ready) = wait(&epoll, alive) {
                for token in ready {
                    if let Some(event) = usize::try_from(token).ok().and_then(|i| events.get(i)) {
                        // Nonblocking; nothing to read means that somebody else was quicker.
                        let _ = event.read();
                    }
                }
                alive = alive && serve();
            }
            drop((ours, sources));
        };
        let thread =
            threads::spawn(Kind::Device, builder, body).map_err(failed("start a thread"))?;
        Ok(Self {
            stop,
            thread: Some(thread),
        })
    }
}

const STOP: u64 = u64::MAX;
const SOURCE: u64 = u64::MAX - 1;

/// Tokens of what was signalled; `None` when it is time to stop, or when a broken queue leaves nothing to do.
fn wait(epoll: &Epoll, alive: bool) -> Option<Vec<u64>> {
    if !alive {
        return None;
    }
    let mut ready = [EpollEvent::default(); 8];
    loop {
        match epoll.wait(-1, &mut ready) {
            Ok(count) => {
                let tokens: Vec<u64> = ready.iter().take(count).map(EpollEvent::data).collect();
                return (!tokens.contains(&STOP)).then_some(tokens);
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return None,
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // The counter cannot be full: this is its only write.
        let _ = self.stop.write(1);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("a device thread had panicked");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;
    use std::time::Duration;

    use super::*;

    #[test]
    fn it_serves_once_at_the_start_and_at_each_event_until_dropped() {
        let event = EventFd::new(EFD_NONBLOCK).unwrap();
        let (sender, receiver) = channel();
        let worker = Worker::start("test", vec![event.try_clone().unwrap()], move || {
            sender.send(()).is_ok()
        })
        .unwrap();
        for _ in 0..3 {
            receiver.recv_timeout(Duration::from_secs(5)).unwrap();
            event.write(1).unwrap();
        }
        drop(worker);
        while receiver.recv_timeout(Duration::from_secs(5)).is_ok() {}
    }
}
