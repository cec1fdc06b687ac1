//! The agent's cgroup values as containerd's `io.containerd.cgroups.v2.Metrics`.

use std::collections::HashMap;

use bulkhead_protocol::agent;
use containerd_shim_protos::cgroups_v2::metrics::{
    CPUStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, PidsStat,
};
use protobuf::{Message, MessageField, MessageFull, well_known_types::any::Any};

/// Packs the values into the message that containerd's clients know.
pub fn to_any(stats: &agent::StatsResponse) -> protobuf::Result<Any> {
    let metrics = to_metrics(stats);
    let mut any = Any::new();
    any.type_url = Metrics::descriptor().full_name().to_owned();
    any.value = metrics.write_to_bytes()?;
    Ok(any)
}

fn to_metrics(stats: &agent::StatsResponse) -> Metrics {
    let mut metrics = Metrics::new();
    if let Some(from) = stats.pids.as_ref() {
        let mut pids = PidsStat::new();
        pids.current = from.current;
        pids.limit = from.limit;
        metrics.pids = MessageField::some(pids);
    }
    if let Some(from) = stats.cpu.as_ref() {
        let mut cpu = CPUStat::new();
        cpu.usage_usec = from.usage_usec;
        cpu.user_usec = from.user_usec;
        cpu.system_usec = from.system_usec;
        cpu.nr_periods = from.nr_periods;
        cpu.nr_throttled = from.nr_throttled;
        cpu.throttled_usec = from.throttled_usec;
        metrics.cpu = MessageField::some(cpu);
    }
    if let Some(from) = stats.memory.as_ref() {
        metrics.memory = MessageField::some(memory(from));
        let event = |key: &str| from.events.get(key).copied().unwrap_or_default();
        let mut events = MemoryEvents::new();
        events.low = event("low");
        events.high = event("high");
        events.max = event("max");
        events.oom = event("oom");
        events.oom_kill = event("oom_kill");
        metrics.memory_events = MessageField::some(events);
    }
    let mut io = IOStat::new();
    io.usage = stats.io.iter().map(io_entry).collect();
    metrics.io = MessageField::some(io);
    metrics
}

fn memory(from: &agent::MemoryStats) -> MemoryStat {
    let mut memory = MemoryStat::new();
    memory.usage = from.usage;
    memory.usage_limit = from.usage_limit;
    memory.swap_usage = from.swap_usage;
    memory.swap_limit = from.swap_limit;
    // cgroup-v2's memory.stat and the message have the same names, except for swap.
    macro_rules! copy {
        ($map:expr; $($key:ident),* $(,)?) => {
            $(memory.$key = value($map, stringify!($key));)*
        };
    }
    copy!(&from.stat; anon, file, kernel_stack, slab, sock, shmem, file_mapped, file_dirty, file_writeback,
        anon_thp, inactive_anon, active_anon, inactive_file, active_file, unevictable, slab_reclaimable,
        slab_unreclaimable, pgfault, pgmajfault, workingset_nodereclaim, pgrefill, pgscan, pgsteal, pgactivate,
        pgdeactivate, pglazyfree, pglazyfreed, thp_fault_alloc, thp_collapse_alloc);
    // Linux 5.9 split these two into anon and file.
    let split = |key: &str| {
        let anon = value(&from.stat, &format!("{key}_anon"));
        anon.saturating_add(value(&from.stat, &format!("{key}_file")))
    };
    memory.workingset_refault = split("workingset_refault");
    memory.workingset_activate = split("workingset_activate");
    memory
}

fn value(stat: &HashMap<String, u64>, key: &str) -> u64 {
    stat.get(key).copied().unwrap_or_default()
}

fn io_entry(from: &agent::IoStats) -> IOEntry {
    let mut entry = IOEntry::new();
    entry.major = from.major;
    entry.minor = from.minor;
    entry.rbytes = from.rbytes;
    entry.wbytes = from.wbytes;
    entry.rios = from.rios;
    entry.wios = from.wios;
    entry
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_carry_containerds_name_and_field_numbers() {
        let mut stats = agent::StatsResponse::new();
        let mut memory = agent::MemoryStats::new();
        memory.usage = 5;
        memory.stat.insert("anon".into(), 7);
        memory.stat.insert("workingset_refault_anon".into(), 1);
        memory.stat.insert("workingset_refault_file".into(), 2);
        memory.events.insert("oom_kill".into(), 3);
        stats.memory = MessageField::some(memory);
        let any = to_any(&stats).unwrap();
        assert_eq!(any.type_url, "io.containerd.cgroups.v2.Metrics");
        // memory = 4 { anon = 1, workingset_refault = 20, usage = 32 }, io = 6, memory_events = 8 { oom_kill = 5 }
        let expected = [
            0x22, 8, 0x08, 7, 0xa0, 0x01, 3, 0x80, 0x02, 5, 0x32, 0, 0x42, 2, 0x28, 3,
        ];
        assert_eq!(any.value, expected);
    }
}
