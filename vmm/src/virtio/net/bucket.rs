//! A token bucket: how many bytes and frames a direction may carry.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// A cap for one direction; 0 is no cap.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Rate {
    /// Bytes a second.
    pub bytes: u64,
    /// Frames a second; one that is still to be segmented counts as one.
    pub frames: u64,
    /// Bytes that may come at once after a rest, beside the tenth of a second that always may.
    pub burst_bytes: u64,
    /// Frames likewise.
    pub burst_frames: u64,
}

/// The two directions of a device, shared by its pairs of queues: one flow may have all of it.
pub struct Rates {
    inward: Mutex<Bucket>,
    outward: Mutex<Bucket>,
}

impl Rates {
    /// Both full.
    pub fn new(rate: Rate, now: Instant) -> Self {
        Self {
            inward: Bucket::new(rate, now).into(),
            outward: Bucket::new(rate, now).into(),
        }
    }

    /// To the guest.
    pub fn inward(&self) -> MutexGuard<'_, Bucket> {
        self.inward.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From the guest.
    pub fn outward(&self) -> MutexGuard<'_, Bucket> {
        self.outward.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Both caps of a direction and what is left of them.
pub struct Bucket {
    bytes: Tokens,
    frames: Tokens,
}

impl Bucket {
    /// Full.
    pub fn new(rate: Rate, now: Instant) -> Self {
        Self {
            bytes: Tokens::new(rate.bytes, rate.burst_bytes, now),
            frames: Tokens::new(rate.frames, rate.burst_frames, now),
        }
    }

    /// How long the next frame has to wait; zero if it may go now.
    pub fn wait(&mut self, now: Instant) -> Duration {
        self.bytes.wait(now).max(self.frames.wait(now))
    }

    /// A frame went. It may be larger than what was left: the next ones wait for it.
    pub fn spend(&mut self, bytes: usize) {
        self.bytes.spend(bytes as u64);
        self.frames.spend(1);
    }
}

/// Tokens in millionths, so that slow rates and short times lose nothing.
pub(in crate::virtio) struct Tokens {
    a_second: u64,
    most: i128,
    left: i128,
    filled: Instant,
}

const UNIT: i128 = 1_000_000;

impl Tokens {
    /// Full: a tenth of a second's, and `burst`. None a second is no cap.
    pub fn new(a_second: u64, burst: u64, now: Instant) -> Self {
        let most = (i128::from(a_second / 10) + i128::from(burst)).max(1) * UNIT;
        Self {
            a_second,
            most,
            left: most,
            filled: now,
        }
    }

    /// How long until one may be spent; zero if it may be now.
    pub fn wait(&mut self, now: Instant) -> Duration {
        if self.a_second == 0 {
            return Duration::ZERO;
        }
        let elapsed = now.saturating_duration_since(self.filled).as_micros();
        let earned = i128::try_from(elapsed)
            .unwrap_or(i128::MAX)
            .saturating_mul(self.a_second.into());
        self.left = self.left.saturating_add(earned).min(self.most);
        self.filled = now;
        if self.left > 0 {
            return Duration::ZERO;
        }
        let micros = (1 - self.left).div_euclid(self.a_second.into()) + 1;
        Duration::from_micros(u64::try_from(micros).unwrap_or(u64::MAX))
    }

    /// Takes some, though there may be fewer.
    pub fn spend(&mut self, count: u64) {
        if self.a_second != 0 {
            self.left = self.left.saturating_sub(i128::from(count) * UNIT);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sends frames of `size` as fast as allowed for ten seconds of a clock of its own.
    fn sent_in_ten_seconds(rate: Rate, size: usize) -> u64 {
        let start = Instant::now();
        let (mut now, mut sent) = (start, 0);
        let mut bucket = Bucket::new(rate, start);
        while now < start + Duration::from_secs(10) {
            let wait = bucket.wait(now);
            if wait.is_zero() {
                bucket.spend(size);
                sent += 1;
            } else {
                now += wait;
            }
        }
        sent
    }

    #[test]
    fn a_rate_holds_over_time_whatever_the_size_of_frames() {
        for size in [60, 1514, 65550] {
            let rate = Rate {
                bytes: 10_000_000,
                ..Rate::default()
            };
            let bytes = sent_in_ten_seconds(rate, size) * size as u64;
            assert!(
                (100_000_000..=101_200_000).contains(&bytes),
                "{size}: {bytes}"
            );
        }
        let rate = Rate {
            frames: 1000,
            burst_frames: 500,
            ..Rate::default()
        };
        assert!((10_000..=10_601).contains(&sent_in_ten_seconds(rate, 1514)));
    }

    #[test]
    fn without_a_rate_nothing_waits() {
        let mut bucket = Bucket::new(Rate::default(), Instant::now());
        for _ in 0..1000 {
            bucket.spend(usize::MAX);
        }
        assert!(bucket.wait(Instant::now()).is_zero());
    }
}
