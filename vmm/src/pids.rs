//! Pids on the host for the containers of a pod: a thread each, that only waits. A client of containerd tells containers apart by
//! their pid, and finds the pod's network namespace in `/proc/<pid>/ns/net`: that holds for a thread's id as for a process's. It is
//! here, and not in the shim, so that a pid stays when the shim does not.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::io;
use std::sync::mpsc::{Sender, channel};
use std::thread::{Builder, JoinHandle};

use crate::jail::seccomp::Kind;
use crate::jail::threads;
use crate::limits;

/// Stack of a thread that does nothing.
const STACK: usize = 64 << 10;

/// Why there is no such pid.
#[derive(Debug, thiserror::Error)]
pub enum PidError {
    /// The limit.
    #[error("a pod has {} pids at most", limits::PIDS)]
    TooMany,
    /// Not one of these.
    #[error("there is no pid {0}")]
    Unknown(u32),
    /// No thread.
    #[error("cannot start a thread: {0}")]
    Thread(io::Error),
}

/// The pids that were given out.
#[derive(Debug, Default)]
pub struct Pids(BTreeMap<u32, Waiting>);

#[derive(Debug)]
struct Waiting {
    /// The thread ends when this goes.
    end: Sender<Infallible>,
    thread: JoinHandle<()>,
}

impl Pids {
    /// Gives out one more.
    pub fn add(&mut self) -> Result<u32, PidError> {
        if self.0.len() >= limits::PIDS {
            return Err(PidError::TooMany);
        }
        let (tell, told) = channel();
        let (end, ended) = channel::<Infallible>();
        let builder = Builder::new().name("container".into()).stack_size(STACK);
        let body = move || {
            let _ = tell.send(rustix::thread::gettid());
            let _ = ended.recv();
        };
        bulkhead_failpoint::reach("vmm.add-pid").map_err(PidError::Thread)?;
        let thread = threads::spawn(Kind::Pid, builder, body).map_err(PidError::Thread)?;
        let pid = told
            .recv()
            .map_err(|error| PidError::Thread(io::Error::other(error)))?;
        let pid = pid.as_raw_nonzero().get().unsigned_abs();
        self.0.insert(pid, Waiting { end, thread });
        Ok(pid)
    }

    /// Takes one back; it is gone when this returns.
    pub fn remove(&mut self, pid: u32) -> Result<(), PidError> {
        let waiting = self.0.remove(&pid).ok_or(PidError::Unknown(pid))?;
        drop(waiting.end);
        let _ = waiting.thread.join();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pid_has_our_network_namespace_until_it_is_taken_back() {
        let namespace = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/net"));
        let mut pids = Pids::default();
        let (one, two) = (pids.add().unwrap(), pids.add().unwrap());
        assert_ne!(one, two);
        for pid in [one, two] {
            assert_eq!(
                namespace(&pid.to_string()).unwrap(),
                namespace("self").unwrap()
            );
        }
        pids.remove(one).unwrap();
        assert!(namespace(&one.to_string()).is_err());
        assert!(namespace(&two.to_string()).is_ok());
        assert!(matches!(pids.remove(one), Err(PidError::Unknown(_))));
    }

    #[test]
    fn there_is_a_most() {
        let mut pids = Pids::default();
        let all: Vec<u32> = (0..limits::PIDS).map(|_| pids.add().unwrap()).collect();
        assert!(matches!(pids.add(), Err(PidError::TooMany)));
        for pid in all {
            pids.remove(pid).unwrap();
        }
    }
}
