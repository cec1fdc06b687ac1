//! VM exits that reached this process, counted by kind.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

/// Kinds of exits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum ExitKind {
    /// A port was read.
    PortRead,
    /// A port was written.
    PortWrite,
    /// An MMIO address was read.
    MmioRead,
    /// An MMIO address was written.
    MmioWrite,
    /// A signal came, or KVM asked to be called again.
    Interrupted,
    /// Anything else.
    Other,
}

const KINDS: [(ExitKind, &str); 6] = [
    (ExitKind::PortRead, "port_read"),
    (ExitKind::PortWrite, "port_write"),
    (ExitKind::MmioRead, "mmio_read"),
    (ExitKind::MmioWrite, "mmio_write"),
    (ExitKind::Interrupted, "interrupted"),
    (ExitKind::Other, "other"),
];

/// One counter a kind.
#[derive(Default)]
pub struct ExitCounts([AtomicU64; KINDS.len()]);

impl ExitCounts {
    /// One more.
    pub fn count(&self, kind: ExitKind) {
        if let Some(counter) = self.0.get(kind as usize) {
            counter.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// All of them.
    pub fn total(&self) -> u64 {
        self.0
            .iter()
            .map(|counter| counter.load(Ordering::Relaxed))
            .fold(0, u64::saturating_add)
    }

    /// By name, for a report.
    pub fn by_name(&self) -> BTreeMap<&'static str, u64> {
        KINDS
            .iter()
            .zip(&self.0)
            .map(|((_, name), counter)| (*name, counter.load(Ordering::Relaxed)))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_is_counted_under_its_name() {
        let counts = ExitCounts::default();
        for (kind, name) in KINDS {
            counts.count(kind);
            assert_eq!(counts.by_name()[name], 1);
        }
        assert_eq!(counts.total(), KINDS.len() as u64);
    }
}
