//! How far a pod's start came and when: each stage's end, counted from the moment when the shim began to serve. What only the
//! VMM sees (its vCPUs run, the guest's first word) comes from its report and from `exit.json`.

use std::{
    fmt,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};

/// Stages of a start, in the order in which they end; `Rootfs` alone goes on beside the boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// The shim waits for containerd's `Create`.
    Shim,
    /// Checks, then the VMM and the file server are started.
    Vmm,
    /// The VMM builds the machine, until its vCPUs run.
    Machine,
    /// The guest's kernel boots, until the agent asks for the trees.
    Kernel,
    /// The agent sets the guest up and calls.
    Agent,
    /// The file server serves the container's trees.
    Rootfs,
    /// The guest's half of the network.
    Network,
    /// The agent makes the container.
    Container,
}

/// All stages, in order.
const STAGES: [Stage; 8] = [
    Stage::Shim,
    Stage::Vmm,
    Stage::Machine,
    Stage::Kernel,
    Stage::Agent,
    Stage::Rootfs,
    Stage::Network,
    Stage::Container,
];

impl Stage {
    /// Its name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Shim => "shim",
            Self::Vmm => "vmm",
            Self::Machine => "machine",
            Self::Kernel => "kernel",
            Self::Agent => "agent",
            Self::Rootfs => "rootfs",
            Self::Network => "network",
            Self::Container => "container",
        }
    }

    /// What was going on, for "… while …".
    fn doing(self) -> &'static str {
        match self {
            Self::Shim => "the shim waited for containerd",
            Self::Vmm => "the VMM was started",
            Self::Machine => "the machine was started",
            Self::Kernel => "the guest's kernel booted",
            Self::Agent => "the agent set up the guest",
            Self::Rootfs => "the rootfs was prepared",
            Self::Network => "the network was set up",
            Self::Container => "the container was made",
        }
    }

    /// The stage whose end is this one's begin.
    fn before(self) -> Option<Self> {
        Some(match self {
            Self::Shim => return None,
            Self::Vmm => Self::Shim,
            Self::Machine | Self::Rootfs => Self::Vmm,
            Self::Kernel => Self::Machine,
            Self::Agent => Self::Kernel,
            Self::Network => Self::Agent,
            Self::Container => Self::Network,
        })
    }
}

/// What the VMM knows, in microseconds since its start (its report and `exit.json`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct OfVmm {
    /// The vCPUs run.
    pub started_us: Option<u64>,
    /// The guest's first file request: its kernel has booted.
    pub booted_us: Option<u64>,
    /// The guest's first call: the agent serves.
    pub ready_us: Option<u64>,
}

/// The ends of the stages so far.
pub struct Timeline {
    begun: Instant,
    ends: Mutex<Ends>,
}

type Ends = [Option<Duration>; STAGES.len()];

impl Timeline {
    /// It begins now.
    pub fn begin() -> Self {
        Self {
            begun: Instant::now(),
            ends: Mutex::default(),
        }
    }

    fn ends(&self) -> MutexGuard<'_, Ends> {
        self.ends.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A stage has ended, now; only the first time counts.
    pub fn end(&self, stage: Stage) {
        self.end_at(stage, self.begun.elapsed());
    }

    fn end_at(&self, stage: Stage, at: Duration) {
        if let Some(slot) = self.ends().get_mut(stage as usize) {
            slot.get_or_insert(at);
        }
    }

    /// Takes over what the VMM tells; it was started when stage `Vmm` ended.
    pub fn of_vmm(&self, told: OfVmm) {
        let Some(start) = self.ends().get(Stage::Vmm as usize).copied().flatten() else {
            return;
        };
        for (stage, us) in [
            (Stage::Machine, told.started_us),
            (Stage::Kernel, told.booted_us),
        ] {
            if let Some(at) = us.and_then(|us| start.checked_add(Duration::from_micros(us))) {
                self.end_at(stage, at);
            }
        }
    }

    /// How things stand.
    pub fn now(&self) -> Stages {
        Stages {
            ends: *self.ends(),
            now: self.begun.elapsed(),
        }
    }
}

/// A copy of a timeline at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stages {
    ends: Ends,
    now: Duration,
}

impl Stages {
    fn end(&self, stage: Stage) -> Option<Duration> {
        self.ends.get(stage as usize).copied().flatten()
    }

    /// The stage that was under way; none once a container was made.
    pub fn current(&self) -> Option<Stage> {
        if self.end(Stage::Container).is_some() {
            return None;
        }
        // A stage that nobody reported is over if a later one is.
        let last = STAGES
            .iter()
            .rposition(|&stage| stage != Stage::Rootfs && self.end(stage).is_some());
        let rest = STAGES.get(last.map_or(0, |at| at.saturating_add(1))..)?;
        rest.iter()
            .copied()
            .find(|&stage| stage != Stage::Rootfs || self.end(stage).is_none())
    }

    /// Whether the pod had started.
    pub fn are_done(&self) -> bool {
        self.current().is_none()
    }

    /// "while the guest's kernel booted", or "while it ran".
    pub fn doing(&self) -> &'static str {
        self.current().map_or("the pod ran", Stage::doing)
    }

    /// How long a stage took, or has been going on for.
    fn spent(&self, stage: Stage, end: Duration) -> Duration {
        let mut before = stage.before();
        while let Some(earlier) = before {
            if let Some(at) = self.end(earlier) {
                return end.saturating_sub(at);
            }
            before = earlier.before();
        }
        end
    }

    /// How long each stage took in microseconds, for reports.
    pub fn durations_us(&self) -> Durations {
        let us = |stage: Stage| {
            let spent = self.spent(stage, self.end(stage)?);
            u64::try_from(spent.as_micros()).ok()
        };
        Durations {
            shim: us(Stage::Shim),
            vmm: us(Stage::Vmm),
            machine: us(Stage::Machine),
            kernel: us(Stage::Kernel),
            agent: us(Stage::Agent),
            rootfs: us(Stage::Rootfs),
            network: us(Stage::Network),
            container: us(Stage::Container),
            total: self
                .end(Stage::Container)
                .and_then(|end| u64::try_from(end.as_micros()).ok()),
        }
    }
}

/// Microseconds that each stage took; `rootfs` goes on beside `machine`, `kernel` and `agent`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[allow(missing_docs)]
pub struct Durations {
    pub shim: Option<u64>,
    pub vmm: Option<u64>,
    pub machine: Option<u64>,
    pub kernel: Option<u64>,
    pub agent: Option<u64>,
    pub rootfs: Option<u64>,
    pub network: Option<u64>,
    pub container: Option<u64>,
    /// From the shim's begin to the first container.
    pub total: Option<u64>,
}

/// `shim 12 ms, vmm 80 ms, machine 31 ms, kernel failed after 1.2 s`.
impl fmt::Display for Stages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut comma = "";
        for stage in STAGES {
            if let Some(end) = self.end(stage) {
                let took = short(self.spent(stage, end));
                write!(f, "{comma}{} {took}", stage.name())?;
                comma = ", ";
            }
        }
        if let Some(stage) = self.current() {
            let after = short(self.spent(stage, self.now));
            write!(f, "{comma}{} not done after {after}", stage.name())?;
        }
        Ok(())
    }
}

/// A duration in three digits or so.
pub fn short(duration: Duration) -> String {
    match duration.as_micros() {
        us @ 0..1_000 => format!("{us} us"),
        us @ 1_000..10_000 => format!("{:.1} ms", us as f64 / 1e3),
        us @ 10_000..1_000_000 => format!("{} ms", us / 1000),
        us => format!("{:.1} s", us as f64 / 1e6),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn timeline(ends: &[(Stage, u64)], now: u64) -> Stages {
        let timeline = Timeline::begin();
        for &(stage, ms) in ends {
            timeline.end_at(stage, Duration::from_millis(ms));
        }
        Stages {
            now: Duration::from_millis(now),
            ..timeline.now()
        }
    }

    #[test]
    fn each_stage_is_counted_from_the_one_before_and_the_failed_one_is_named() {
        let ends = [(Stage::Shim, 12), (Stage::Vmm, 92), (Stage::Rootfs, 120)];
        let stages = timeline(&ends, 2092);
        assert_eq!(
            stages.to_string(),
            "shim 12 ms, vmm 80 ms, rootfs 28 ms, machine not done after 2.0 s"
        );
        assert_eq!(stages.doing(), "the machine was started");
        assert_eq!(stages.durations_us().rootfs, Some(28_000));
        assert_eq!(stages.durations_us().machine, None);
    }

    #[test]
    fn what_the_vmm_tells_is_counted_from_its_start() {
        let timeline = Timeline::begin();
        timeline.of_vmm(OfVmm::default());
        timeline.end_at(Stage::Shim, Duration::from_millis(1));
        timeline.end_at(Stage::Vmm, Duration::from_millis(3));
        timeline.of_vmm(OfVmm {
            started_us: Some(20_000),
            booted_us: Some(420_000),
            ready_us: None,
        });
        let us = timeline.now().durations_us();
        assert_eq!((us.machine, us.kernel), (Some(20_000), Some(400_000)));
        assert_eq!(timeline.now().current(), Some(Stage::Agent));
        // A guest cannot make it overflow, nor anything twice.
        timeline.of_vmm(OfVmm {
            started_us: Some(u64::MAX),
            booted_us: Some(1),
            ready_us: None,
        });
        assert_eq!(timeline.now().durations_us(), us);
    }

    #[test]
    fn a_stage_that_nobody_reported_is_over_when_a_later_one_is() {
        let ends = [(Stage::Shim, 1), (Stage::Vmm, 2), (Stage::Agent, 900)];
        let stages = timeline(&ends, 1000);
        assert_eq!(stages.current(), Some(Stage::Rootfs));
        assert_eq!(stages.durations_us().agent, Some(898_000));
        let ends = [(Stage::Shim, 1), (Stage::Container, 2000)];
        let stages = timeline(&ends, 9000);
        assert_eq!(stages.current(), None);
        assert_eq!(stages.doing(), "the pod ran");
        assert_eq!(stages.durations_us().total, Some(2_000_000));
    }
}
