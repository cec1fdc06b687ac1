//! How fast the guest's time stamp counter runs: the emulator hands out the host's.
//!
//! The guest is told (`tsc_early_khz`), because what it would measure against an emulated PIT on a busy host is wrong
//! or nothing, and a guest without TSC counts time in ticks of 4 ms.

use std::time::{Duration, Instant};

/// Apart far enough for an error below a millionth or two.
const APART: Duration = Duration::from_millis(50);
const TRIES: usize = 16;

/// The counter and the clock at one moment.
pub struct Sample {
    ticks: u64,
    time: Instant,
}

impl Sample {
    /// Reads both as close together as a few tries get them.
    pub fn take() -> Self {
        let read = || {
            let before = ticks();
            let time = Instant::now();
            let after = ticks();
            (
                after.wrapping_sub(before),
                Self {
                    ticks: before.midpoint(after),
                    time,
                },
            )
        };
        let best = (0..TRIES).map(|_| read()).min_by_key(|(width, _)| *width);
        best.unwrap_or_else(read).1
    }

    /// The frequency since this sample in kHz; waits if that was too short ago.
    pub fn khz_until_now(&self) -> u64 {
        std::thread::sleep(APART.saturating_sub(self.time.elapsed()));
        let now = Self::take();
        let ticks = u128::from(now.ticks.saturating_sub(self.ticks));
        let nanoseconds = now.time.duration_since(self.time).as_nanos().max(1);
        u64::try_from(ticks * 1_000_000 / nanoseconds).unwrap_or_default()
    }
}

fn ticks() -> u64 {
    // SAFETY: every x86-64 processor has the instruction; it touches no memory.
    unsafe { std::arch::x86_64::_rdtsc() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_measurements_agree() {
        let first = Sample::take().khz_until_now();
        let second = Sample::take().khz_until_now();
        assert!(first > 100_000, "{first} kHz");
        assert!(
            first.abs_diff(second) < first / 500,
            "{first} and {second} kHz"
        );
    }
}
