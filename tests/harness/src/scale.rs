//! Sizes and waits by the speed of the host: one suite runs on a fast host, and inside an emulated one that is
//! ten to thirty times slower.

use std::time::Duration;

/// How much a case does and how long it waits.
#[derive(Clone, Debug)]
pub struct Scale {
    /// How it is called in the report.
    pub name: &'static str,
    /// Factor on every time limit.
    pub patience: u32,
    /// Bytes of the big transfers.
    pub bulk: u64,
    /// Execs one after another.
    pub execs: u32,
    /// Execs at the same time.
    pub execs_at_once: u32,
    /// Pods one after another.
    pub pods: u32,
    /// Pods at the same time.
    pub pods_at_once: u32,
    /// Kills at the same time.
    pub kills_at_once: u32,
    /// Rounds of a case that looks for a race.
    pub rounds: u32,
    /// Folders of a hundred files each that are walked.
    pub folders: u32,
}

impl Scale {
    /// For a host that is no emulated computer.
    pub const FULL: Self = Self {
        name: "full",
        patience: 1,
        bulk: 1 << 30,
        execs: 100,
        execs_at_once: 20,
        // More of them are the soak's.
        pods: 10,
        pods_at_once: 8,
        kills_at_once: 100,
        rounds: 50,
        folders: 500,
    };

    /// For a look in between.
    pub const QUICK: Self = Self {
        name: "quick",
        patience: 1,
        bulk: 64 << 20,
        execs: 20,
        execs_at_once: 20,
        pods: 5,
        pods_at_once: 4,
        kills_at_once: 20,
        rounds: 5,
        folders: 20,
    };

    /// For a host that is itself emulated.
    pub const SLOW: Self = Self {
        name: "slow host",
        patience: 8,
        bulk: 32 << 20,
        execs: 8,
        execs_at_once: 8,
        pods: 3,
        pods_at_once: 3,
        kills_at_once: 9,
        rounds: 5,
        folders: 20,
    };

    /// The scale for this host, with as many pods at once as `BULKHEAD_E2E_PODS_AT_ONCE` says.
    pub fn detect(quick: bool) -> Self {
        let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let scale = if cpu.contains("QEMU TCG") || cpu.contains("QEMU Virtual CPU") {
            Self::SLOW
        } else if quick {
            Self::QUICK
        } else {
            Self::FULL
        };
        let asked = std::env::var("BULKHEAD_E2E_PODS_AT_ONCE").ok();
        Self {
            pods_at_once: asked
                .and_then(|text| text.parse().ok())
                .unwrap_or(scale.pods_at_once),
            ..scale
        }
    }

    /// Whether a pod costs little: cases then say again what the next case would show anyway.
    pub fn pods_are_cheap(&self) -> bool {
        self.patience == 1
    }

    /// `seconds` on a fast host, in this host's measure.
    pub fn seconds(&self, seconds: u32) -> Duration {
        Duration::from_secs(u64::from(seconds)) * self.patience
    }

    /// `bytes` as a person writes it.
    pub fn size(bytes: u64) -> String {
        match bytes {
            0..0x10_0000 => format!("{} KiB", bytes >> 10),
            0x10_0000..0x4000_0000 => format!("{} MiB", bytes >> 20),
            _ => format!("{} GiB", bytes >> 30),
        }
    }
}
