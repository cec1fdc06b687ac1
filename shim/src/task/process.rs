//! One process of a container: its init or an exec.
//!
//! ```text
//!   Created ── Start ──► Starting ──► Running ──► Stopped
//!      └── killed or machine ended ──────────────────┘
//! ```
//!
//! The exit is recorded and its event queued in one place, after the start was settled: so TaskExit never comes
//! before TaskStart.

use std::sync::{
    Arc, Mutex, MutexGuard, PoisonError,
    atomic::{AtomicBool, Ordering},
};

use protobuf::well_known_types::timestamp::Timestamp;
use tokio::sync::watch;

use crate::stdio::{Paths, Pumps};

/// How a process ended.
#[derive(Clone, Debug, PartialEq)]
pub struct Exit {
    /// Exit code, or 128 + signal.
    pub status: u32,
    /// When.
    pub at: Timestamp,
    /// By the out-of-memory killer.
    pub oom: bool,
}

/// Where a process is in its life.
#[derive(Clone, Debug, PartialEq)]
pub enum Phase {
    /// Nothing runs yet.
    Created,
    /// The agent was asked to start it.
    Starting,
    /// Runs.
    Running,
    /// Has ended.
    Stopped(Exit),
}

/// A process.
pub struct Process {
    /// Empty for init.
    pub exec_id: String,
    /// The host's ends of its streams.
    pub paths: Paths,
    phase: watch::Sender<Phase>,
    pumps: Mutex<Option<Pumps>>,
    /// containerd has its exit.
    told: AtomicBool,
    /// Taken over, and nobody has asked for its start since.
    recovered: AtomicBool,
}

impl Process {
    /// A created process.
    pub fn new(exec_id: &str, paths: Paths) -> Arc<Self> {
        Arc::new(Self {
            exec_id: exec_id.into(),
            paths,
            phase: watch::Sender::new(Phase::Created),
            pumps: Mutex::new(None),
            told: AtomicBool::new(false),
            recovered: AtomicBool::new(false),
        })
    }

    /// Whether containerd was told of its end.
    pub fn is_told(&self) -> bool {
        self.told.load(Ordering::Relaxed)
    }

    /// containerd was told of its end.
    pub fn set_told(&self) {
        self.told.store(true, Ordering::Relaxed);
    }

    /// It was taken over: a call for it may come again that was answered by nobody.
    pub fn recover(&self) {
        self.recovered.store(true, Ordering::Relaxed);
    }

    /// Whether a call that would do again what is done is such a one; true once.
    pub fn is_asked_again(&self) -> bool {
        self.recovered.swap(false, Ordering::Relaxed)
    }

    /// The phase now.
    pub fn phase(&self) -> Phase {
        self.phase.borrow().clone()
    }

    /// The exit, if it has ended.
    pub fn exit(&self) -> Option<Exit> {
        match &*self.phase.borrow() {
            Phase::Stopped(exit) => Some(exit.clone()),
            _ => None,
        }
    }

    /// Moves from `Created` to `Starting`; false if it was not `Created`.
    pub fn begin_start(&self) -> bool {
        self.phase.send_if_modified(|phase| {
            let created = *phase == Phase::Created;
            if created {
                *phase = Phase::Starting;
            }
            created
        })
    }

    /// Settles the start; called after its event was queued.
    pub fn started(&self) {
        self.phase.send_if_modified(|phase| {
            let starting = *phase == Phase::Starting;
            if starting {
                *phase = Phase::Running;
            }
            starting
        });
    }

    /// Records the end, once; true for the caller that did, who queues the event.
    pub fn stop(&self, exit: Exit) -> bool {
        let first = self.phase.send_if_modified(|phase| {
            if matches!(phase, Phase::Stopped(_)) {
                return false;
            }
            *phase = Phase::Stopped(exit);
            true
        });
        if let Some(pumps) = self.pumps().as_mut() {
            pumps.drop_stdin();
        }
        first
    }

    /// Waits until a start under way is settled.
    pub async fn settled(&self) {
        let mut phase = self.phase.subscribe();
        let _ = phase.wait_for(|p| *p != Phase::Starting).await;
    }

    /// Waits for the end.
    pub async fn wait(&self) -> Option<Exit> {
        let mut phase = self.phase.subscribe();
        let stopped = phase
            .wait_for(|p| matches!(p, Phase::Stopped(_)))
            .await
            .ok()?;
        match &*stopped {
            Phase::Stopped(exit) => Some(exit.clone()),
            _ => None,
        }
    }

    /// Keeps the pumps until the end.
    pub fn set_pumps(&self, pumps: Pumps) {
        *self.pumps() = Some(pumps);
    }

    /// Opens its stdin.
    pub fn begin_stdin(&self) {
        if let Some(pumps) = self.pumps().as_ref() {
            pumps.begin_stdin();
        }
    }

    /// Ends its stdin.
    pub fn close_stdin(&self) {
        if let Some(pumps) = self.pumps().as_ref() {
            pumps.close_stdin();
        }
    }

    /// Delivers what its streams still hold, for a bounded time, and closes them.
    pub async fn drain(&self) {
        let pumps = self.pumps().take();
        if let Some(pumps) = pumps {
            pumps.drain().await;
        }
    }

    /// Closes its streams at once.
    pub fn cut_off(&self) {
        drop(self.pumps().take());
    }

    fn pumps(&self) -> MutexGuard<'_, Option<Pumps>> {
        self.pumps.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exit(status: u32) -> Exit {
        Exit {
            status,
            at: Timestamp::new(),
            oom: false,
        }
    }

    #[tokio::test]
    async fn an_end_during_the_start_waits_until_the_start_is_settled() {
        let process = Process::new("", Paths::default());
        assert!(process.begin_start());
        let order = Arc::new(Mutex::new(Vec::new()));
        let ending = tokio::spawn({
            let (process, order) = (process.clone(), order.clone());
            async move {
                process.settled().await;
                assert!(process.stop(exit(0)));
                order.lock().unwrap().push("exit");
            }
        });
        tokio::task::yield_now().await;
        order.lock().unwrap().push("start");
        process.started();
        ending.await.unwrap();
        assert_eq!(*order.lock().unwrap(), ["start", "exit"]);
        assert_eq!(process.wait().await.unwrap().status, 0);
    }

    #[test]
    fn a_process_starts_once_and_ends_once() {
        let process = Process::new("e", Paths::default());
        assert!(process.begin_start());
        assert!(!process.begin_start());
        process.started();
        assert!(process.stop(exit(3)));
        assert!(!process.stop(exit(137)));
        process.started();
        assert_eq!(process.exit().unwrap().status, 3);
        assert!(!process.begin_start());
    }
}
