//! The one place that reaps. PID 1 gets every orphan of the machine besides its own children; SIGCHLD wakes it.
//!
//! A process's pid is known only after the set-up copy reported it, and it may have ended by then: while a launch is on, ends of
//! unknown pids are kept and handed out when the pid is claimed.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use rustix::{
    process::WaitOptions,
    time::{ClockId, clock_gettime},
};
use tokio::{signal::unix::Signal, sync::watch};

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reaped {
    /// Exit code, or 128 + signal.
    pub status: u32,
    /// When, by [`now`].
    pub at: i64,
}

#[derive(Default)]
struct Table {
    watched: HashMap<u32, watch::Sender<Option<Reaped>>>,
    launches: usize,
    unclaimed: HashMap<u32, Reaped>,
}

/// Table of the processes that somebody waits for.
#[derive(Default)]
pub struct Reaper {
    table: Mutex<Table>,
}

/// A launch that is on.
pub struct Launch {
    reaper: Arc<Reaper>,
    /// When it began: what ended before is not its child.
    began: i64,
}

impl Reaper {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Announces that a child is about to be made.
    pub fn launch(self: &Arc<Self>) -> Launch {
        let mut table = self.table();
        table.launches = table.launches.saturating_add(1);
        Launch {
            reaper: Arc::clone(self),
            began: now(),
        }
    }

    fn ended(&self, pid: u32, end: Reaped) {
        let mut table = self.table();
        if let Some(watched) = table.watched.remove(&pid) {
            watched.send_replace(Some(end));
        } else if table.launches > 0 {
            table.unclaimed.insert(pid, end);
        }
    }

    /// Reaps whatever has ended; false once there is no child at all.
    pub fn reap(&self) -> bool {
        loop {
            match rustix::process::wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) => {
                    let code = match (status.exit_status(), status.terminating_signal()) {
                        (Some(code), _) => code.unsigned_abs(),
                        (None, Some(signal)) => signal.unsigned_abs().saturating_add(128),
                        (None, None) => continue,
                    };
                    let pid = pid.as_raw_nonzero().get().unsigned_abs();
                    self.ended(
                        pid,
                        Reaped {
                            status: code,
                            at: now(),
                        },
                    );
                }
                Ok(None) => return true,
                Err(rustix::io::Errno::INTR) => {}
                Err(_) => return false,
            }
        }
    }

    /// Reaps for ever.
    pub async fn run(self: Arc<Self>, mut sigchld: Signal) {
        loop {
            self.reap();
            if sigchld.recv().await.is_none() {
                return;
            }
        }
    }
}

impl Launch {
    /// Says that `pid` is ours; its end arrives at the receiver, even if it was before.
    pub fn claim(&self, pid: u32) -> watch::Receiver<Option<Reaped>> {
        let mut table = self.reaper.table();
        let (sender, receiver) = watch::channel(None);
        let unclaimed = table.unclaimed.remove(&pid);
        match unclaimed.filter(|end| end.at >= self.began) {
            Some(end) => {
                sender.send_replace(Some(end));
            }
            None => {
                table.watched.insert(pid, sender);
            }
        }
        receiver
    }
}

impl Drop for Launch {
    fn drop(&mut self) {
        let mut table = self.reaper.table();
        table.launches = table.launches.saturating_sub(1);
        if table.launches == 0 {
            table.unclaimed.clear();
        }
    }
}

/// Nanoseconds since the guest's start: its date is a container's to change.
pub fn now() -> i64 {
    let time = clock_gettime(ClockId::Boottime);
    time.tv_sec
        .saturating_mul(1_000_000_000)
        .saturating_add(time.tv_nsec)
}

#[cfg(test)]
mod tests {
    use super::*;

    const END: Reaped = Reaped {
        status: 3,
        at: i64::MAX,
    };

    #[test]
    fn an_end_before_the_claim_is_kept() {
        let reaper = Arc::new(Reaper::default());
        let launch = reaper.launch();
        reaper.ended(7, END);
        assert_eq!(*launch.claim(7).borrow(), Some(END));
    }

    #[test]
    fn an_end_before_the_launch_is_another_process() {
        let reaper = Arc::new(Reaper::default());
        let _other = reaper.launch();
        let old = Reaped { status: 3, at: 0 };
        reaper.ended(7, old);
        let receiver = reaper.launch().claim(7);
        assert_eq!(*receiver.borrow(), None);
        reaper.ended(7, END);
        assert_eq!(*receiver.borrow(), Some(END));
    }

    #[test]
    fn an_end_after_the_claim_is_told() {
        let reaper = Arc::new(Reaper::default());
        let receiver = reaper.launch().claim(7);
        assert_eq!(*receiver.borrow(), None);
        reaper.ended(7, END);
        assert_eq!(*receiver.borrow(), Some(END));
    }

    #[test]
    fn ends_of_orphans_do_not_pile_up() {
        let reaper = Arc::new(Reaper::default());
        reaper.ended(5, END);
        assert!(reaper.table().unclaimed.is_empty());
        let launch = reaper.launch();
        reaper.ended(6, END);
        drop(launch);
        assert!(reaper.table().unclaimed.is_empty());
    }
}
