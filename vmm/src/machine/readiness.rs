//! The moments of a machine's start, for its report and for `exit.json`.

use std::sync::{Arc, OnceLock};
use std::time::Instant;

use serde::Serialize;

use crate::engine::kvm::exits::ExitCounts;

/// When the guest first dialled the host, and what it took to get there.
#[derive(Clone, Copy, Debug)]
struct Ready {
    at_us: u64,
    exits: u64,
}

/// Takes note of the moments; of each only the first call counts. Clones share them.
#[derive(Clone)]
pub struct Readiness {
    process: Instant,
    /// VM exits, by kind.
    pub exits: Arc<ExitCounts>,
    moments: Arc<Moments>,
}

#[derive(Default)]
struct Moments {
    started: OnceLock<u64>,
    booted: OnceLock<u64>,
    ready: OnceLock<Ready>,
}

/// The moments, in microseconds since this process began.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Times {
    uptime_us: u64,
    /// The vCPUs run.
    started_us: Option<u64>,
    /// The guest's first file request: its kernel is up.
    booted_us: Option<u64>,
    /// The guest's first call to the host.
    ready_us: Option<u64>,
}

impl Readiness {
    /// `process` is when this process began.
    pub fn new(process: Instant) -> Self {
        Self {
            process,
            exits: Arc::default(),
            moments: Arc::default(),
        }
    }

    /// The vCPUs run.
    pub fn started(&self) {
        self.moments.started.get_or_init(|| self.elapsed_us());
    }

    /// The guest asked for a file.
    pub fn booted(&self) {
        self.moments.booted.get_or_init(|| self.elapsed_us());
    }

    /// The guest is ready.
    pub fn mark(&self) {
        self.moments.ready.get_or_init(|| Ready {
            at_us: self.elapsed_us(),
            exits: self.exits.total(),
        });
    }

    /// VM exits until the guest was ready.
    pub fn exits_until_ready(&self) -> Option<u64> {
        self.moments.ready.get().map(|ready| ready.exits)
    }

    /// All of it as of now.
    pub fn times(&self) -> Times {
        Times {
            uptime_us: self.elapsed_us(),
            started_us: self.moments.started.get().copied(),
            booted_us: self.moments.booted.get().copied(),
            ready_us: self.moments.ready.get().map(|ready| ready.at_us),
        }
    }

    fn elapsed_us(&self) -> u64 {
        u64::try_from(self.process.elapsed().as_micros()).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_moment_is_the_first_one_and_clones_share_it() {
        let readiness = Readiness::new(Instant::now());
        assert_eq!(readiness.times().started_us, None);
        readiness.clone().started();
        let first = readiness.times();
        std::thread::sleep(std::time::Duration::from_millis(2));
        readiness.started();
        readiness.booted();
        let later = readiness.times();
        assert_eq!(later.started_us, first.started_us);
        assert!(later.booted_us > later.started_us && later.ready_us.is_none());
    }
}
