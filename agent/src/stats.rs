//! Values of a container's cgroup files for the Stats call. A file that the kernel does not have counts as empty.

use std::{collections::HashMap, fs, path::Path};

use bulkhead_protocol::agent::{CpuStats, IoStats, MemoryStats, PidsStats, StatsResponse};

use crate::container::cgroup::value_of;

/// Reads them all.
pub fn collect(cgroup: &Path) -> StatsResponse {
    let read = |file: &str| fs::read_to_string(cgroup.join(file)).unwrap_or_default();
    let cpu = read("cpu.stat");
    let of = |key| value_of(&cpu, key).unwrap_or(0);
    let mut response = StatsResponse::new();
    response.cpu = Some(CpuStats {
        usage_usec: of("usage_usec"),
        user_usec: of("user_usec"),
        system_usec: of("system_usec"),
        nr_periods: of("nr_periods"),
        nr_throttled: of("nr_throttled"),
        throttled_usec: of("throttled_usec"),
        ..Default::default()
    })
    .into();
    response.memory = Some(MemoryStats {
        usage: number(&read("memory.current")),
        usage_limit: number(&read("memory.max")),
        swap_usage: number(&read("memory.swap.current")),
        swap_limit: number(&read("memory.swap.max")),
        stat: table(&read("memory.stat")),
        events: table(&read("memory.events")),
        ..Default::default()
    })
    .into();
    response.pids = Some(PidsStats {
        current: number(&read("pids.current")),
        limit: number(&read("pids.max")),
        ..Default::default()
    })
    .into();
    response.io = read("io.stat").lines().filter_map(device).collect();
    response
}

/// A file of one number; `max` is the largest there is.
fn number(text: &str) -> u64 {
    match text.trim() {
        "max" => u64::MAX,
        text => text.parse().unwrap_or(0),
    }
}

fn table(text: &str) -> HashMap<String, u64> {
    text.lines()
        .filter_map(|line| {
            let (key, value) = line.split_once(' ')?;
            Some((key.to_string(), value.trim().parse().ok()?))
        })
        .collect()
}

/// A line of io.stat: `8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0`.
fn device(line: &str) -> Option<IoStats> {
    let mut words = line.split_whitespace();
    let (major, minor) = words.next()?.split_once(':')?;
    let mut stats = IoStats {
        major: major.parse().ok()?,
        minor: minor.parse().ok()?,
        ..Default::default()
    };
    for (key, value) in words.filter_map(|word| word.split_once('=')) {
        let value = value.parse().unwrap_or(0);
        match key {
            "rbytes" => stats.rbytes = value,
            "wbytes" => stats.wbytes = value,
            "rios" => stats.rios = value,
            "wios" => stats.wios = value,
            _ => {}
        }
    }
    Some(stats)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_io_stat_is_read() {
        let stats = device("8:16 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0").unwrap();
        assert_eq!((stats.major, stats.minor), (8, 16));
        assert_eq!(
            (stats.rbytes, stats.wbytes, stats.rios, stats.wios),
            (1, 2, 3, 4)
        );
        assert!(device("").is_none());
    }

    #[test]
    fn no_limit_is_the_largest_number() {
        assert_eq!(number("max\n"), u64::MAX);
        assert_eq!(number("12\n"), 12);
        assert_eq!(number(""), 0);
    }

    #[test]
    fn a_missing_cgroup_has_empty_stats() {
        let stats = collect(Path::new("/nonexistent"));
        assert_eq!(stats.cpu.usage_usec, 0);
        assert!(stats.io.is_empty());
    }
}
