//! Whether the worker lives: one that is stopped, or stuck for good, answers nothing, and its pod could not even be removed.

use std::{
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

use bulkhead_failpoint::patience;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

/// A call that has no answer for so long makes the keeper ask for a sign of life, and again so long after each.
const ASK_AFTER: Duration = Duration::from_secs(15);
/// A worker that gives none for so long is killed. Its own work waits in tasks, so a busy one answers.
pub const STANDS_STILL: Duration = Duration::from_secs(30);

/// What the keeper has to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Nothing.
    Wait,
    /// Ask for a sign of life.
    Ask,
    /// Kill it.
    Kill,
}

/// A worker's life.
pub struct Life {
    process: Option<OwnedFd>,
    /// The last sign, of which its start is the first.
    sign: Instant,
    asked: Option<Instant>,
}

impl Life {
    /// Of the process `pid`, just started.
    pub fn of(pid: Option<Pid>) -> Self {
        Self {
            // One that is gone already is seen by its channel.
            process: pid.and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok()),
            sign: Instant::now(),
            asked: None,
        }
    }

    /// It has answered.
    pub fn gave_sign(&mut self) {
        self.sign = Instant::now();
        self.asked = None;
    }

    /// What is due `now`, with a call that has no answer since `unanswered`.
    pub fn look(&mut self, unanswered: Option<Instant>, now: Instant) -> Next {
        let due = self
            .timeout(unanswered, now)
            .is_some_and(|rest| rest.is_zero());
        match (due, self.asked) {
            (false, _) => Next::Wait,
            (true, None) => {
                self.asked = Some(now);
                Next::Ask
            }
            (true, Some(_)) => Next::Kill,
        }
    }

    /// How long until something is due.
    pub fn timeout(&self, unanswered: Option<Instant>, now: Instant) -> Option<Duration> {
        let (since, rest) = match self.asked {
            Some(asked) => (asked, patience(STANDS_STILL)),
            None => (unanswered?.max(self.sign), patience(ASK_AFTER)),
        };
        Some(rest.saturating_sub(now.saturating_duration_since(since)))
    }

    /// Kills it; its end is seen as any other.
    pub fn kill(&mut self) {
        self.gave_sign();
        if let Some(process) = &self.process {
            let _ = pidfd_send_signal(process, Signal::KILL);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_is_asked_while_a_call_is_open_and_killed_if_it_says_nothing() {
        let mut life = Life::of(None);
        let start = life.sign;
        let at = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(life.timeout(None, at(100)), None);
        assert_eq!(life.look(None, at(100)), Next::Wait);
        let call = Some(at(100));
        assert_eq!(life.timeout(call, at(100)), Some(ASK_AFTER));
        assert_eq!(life.look(call, at(114)), Next::Wait);
        assert_eq!(life.look(call, at(115)), Next::Ask);
        assert_eq!(life.look(call, at(116)), Next::Wait);
        // Whatever becomes of the call, it was asked.
        assert_eq!(life.look(None, at(144)), Next::Wait);
        assert_eq!(life.look(None, at(145)), Next::Kill);
        life.kill();
        assert_eq!(life.asked, None);
    }

    #[test]
    fn one_that_answers_is_asked_again_later() {
        let mut life = Life::of(None);
        let call = Some(life.sign);
        let at = |seconds| Instant::now() + Duration::from_secs(seconds);
        assert_eq!(life.look(call, at(16)), Next::Ask);
        life.gave_sign();
        assert_eq!(life.look(call, at(14)), Next::Wait);
        assert_eq!(life.look(call, at(16)), Next::Ask);
    }
}
