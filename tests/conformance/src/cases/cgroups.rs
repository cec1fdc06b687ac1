//! `linux.resources` as files of the cgroup. The guest has v2; where runc has v2 as well, it must have written the same.

use serde_json::{Value, json};

use crate::case::{Case, case};
use crate::host::When;

/// The group.
// A table: one case a line where it fits.
#[rustfmt::skip]
pub fn all() -> Vec<Case> {
    let with = |value: Value| json!({ "linux": { "resources": value } });
    let file = |name: &str, value: &str| json!({ name: value });
    let unified = |name: &str, value: &str| json!({ "linux": { "resources": { "unified": { name: value } } } });
    let mut cases = vec![
        case("cgroups::no_limits", json!({})).cgroup(json!({ "memory.max": "max", "pids.max": "max", "cpu.max": "max 100000", "cpu.weight": "100" })),
        case("cgroups::memory_limit", with(json!({ "memory": { "limit": 67_108_864 } }))).cgroup(file("memory.max", "67108864")),
        case("cgroups::memory_limit_of_no_pages", with(json!({ "memory": { "limit": 67_108_865 } }))).cgroup(file("memory.max", "67108864")),
        case("cgroups::memory_without_limit", with(json!({ "memory": { "limit": -1 } }))).cgroup(file("memory.max", "max")),
        case("cgroups::memory_reservation", with(json!({ "memory": { "limit": 67_108_864, "reservation": 33_554_432 } })))
            .cgroup(file("memory.low", "33554432")),
        case("cgroups::memory_and_swap", with(json!({ "memory": { "limit": 67_108_864, "swap": 134_217_728 } }))).cgroup(file("memory.max", "67108864")),
        case("cgroups::swap_below_memory", with(json!({ "memory": { "limit": 67_108_864, "swap": 33_554_432 } }))).sees("cgroup").refused(&["memory"]),
        case("cgroups::memory_high_by_unified", unified("memory.high", "50331648")).cgroup(file("memory.high", "50331648")).beyond(When::CgroupV1),
        case("cgroups::memory_swappiness", with(json!({ "memory": { "swappiness": 10 } })))
            .sees("cgroup").ours_refuses("linux.resources.memory.swappiness", "cgroup v2 has no swappiness"),
        case("cgroups::oom_killer_off", with(json!({ "memory": { "disableOOMKiller": true } })))
            .sees("cgroup").ours_refuses("linux.resources.memory.disableOOMKiller", "cgroup v2 cannot switch the killer off"),
        case("cgroups::kernel_memory", with(json!({ "memory": { "kernel": 67_108_864 } })))
            .sees("cgroup").ours_refuses("linux.resources.memory.kernel", "cgroup v2 counts kernel memory in memory.max"),
        case("cgroups::kernel_tcp_memory", with(json!({ "memory": { "kernelTCP": 67_108_864 } })))
            .sees("cgroup").ours_refuses("linux.resources.memory.kernelTCP", "cgroup v2 counts socket buffers in memory.max"),
        case("cgroups::cpu_quota_and_period", with(json!({ "cpu": { "quota": 50_000, "period": 100_000 } }))).cgroup(file("cpu.max", "50000 100000")),
        case("cgroups::cpu_quota_alone", with(json!({ "cpu": { "quota": 20_000 } }))).cgroup(file("cpu.max", "20000 100000")),
        case("cgroups::cpu_period_alone", with(json!({ "cpu": { "period": 50_000 } }))).cgroup(file("cpu.max", "max 50000")),
        case("cgroups::cpu_without_quota", with(json!({ "cpu": { "quota": -1, "period": 100_000 } }))).cgroup(file("cpu.max", "max 100000")),
        case("cgroups::cpu_quota_too_small", with(json!({ "cpu": { "quota": 10, "period": 100_000 } }))).sees("cgroup").refused(&["cpu"]),
        case("cgroups::cpu_shares_1024", with(json!({ "cpu": { "shares": 1024 } }))).cgroup(file("cpu.weight", "39")),
        case("cgroups::cpu_shares_2", with(json!({ "cpu": { "shares": 2 } }))).cgroup(file("cpu.weight", "1")),
        case("cgroups::cpu_shares_262144", with(json!({ "cpu": { "shares": 262_144 } }))).cgroup(file("cpu.weight", "10000")),
        case("cgroups::cpu_burst", with(json!({ "cpu": { "quota": 50_000, "period": 100_000, "burst": 20_000 } })))
            .cgroup(file("cpu.max.burst", "20000")).beyond(When::OldRunc),
        case("cgroups::cpu_burst_above_quota", with(json!({ "cpu": { "quota": 50_000, "period": 100_000, "burst": 60_000 } })))
            .sees("cgroup").refused(&["burst"]).beyond(When::OldRunc),
        case("cgroups::cpu_idle", with(json!({ "cpu": { "idle": 1 } }))).cgroup(file("cpu.idle", "1")).beyond(When::OldRunc),
        case("cgroups::cpuset_of_the_first_cpu", with(json!({ "cpu": { "cpus": "0", "mems": "0" } }))).cgroup(json!({ "cpuset.cpus": "0", "cpuset.mems": "0" })),
        case("cgroups::cpuset_of_a_cpu_that_is_missing", with(json!({ "cpu": { "cpus": "500" } }))).sees("cgroup").refused(&["linux.resources.cpu.cpus", "500"]),
        case("cgroups::cpuset_that_is_no_list", with(json!({ "cpu": { "cpus": "a-b" } }))).sees("cgroup").refused(&["cpu"]),
        case("cgroups::realtime", with(json!({ "cpu": { "realtimeRuntime": 1000, "realtimePeriod": 100_000 } })))
            .sees("cgroup").ours_refuses("linux.resources.cpu.realtime", "cgroup v2 has no realtime limits"),
        case("cgroups::pids_limit", with(json!({ "pids": { "limit": 42 } }))).cgroup(file("pids.max", "42")),
        case("cgroups::pids_without_limit", with(json!({ "pids": { "limit": -1 } }))).cgroup(file("pids.max", "max")),
        case("cgroups::pids_limit_0", with(json!({ "pids": { "limit": 0 } }))).cgroup(file("pids.max", "max")),
        case("cgroups::hugepages", with(json!({ "hugepageLimits": [{ "pageSize": "2MB", "limit": 4_194_304 }] }))).cgroup(file("hugetlb.2MB.max", "4194304")).beyond(When::CgroupV1),
        case("cgroups::hugepages_of_an_unknown_size", with(json!({ "hugepageLimits": [{ "pageSize": "3MB", "limit": 0 }] })))
            .sees("cgroup").refused(&["hugepageLimits"]),
        case("cgroups::io_weight", with(json!({ "blockIO": { "weight": 500 } }))).sees("cgroup").survives(),
        case("cgroups::io_weight_out_of_range", with(json!({ "blockIO": { "weight": 5 } }))).sees("cgroup").survives(),
        case("cgroups::io_leaf_weight", with(json!({ "blockIO": { "leafWeight": 500 } })))
            .sees("cgroup").ours_refuses("linux.resources.blockIO.leafWeight", "cgroup v2 has no leaf weights"),
        case("cgroups::io_throttle_of_a_device_of_the_host", with(json!({ "blockIO": { "throttleReadBpsDevice": [{ "major": 254, "minor": 0, "rate": 1_000_000 }] } })))
            .sees("cgroup").ours_refuses("linux.resources.blockIO.throttleReadBpsDevice", "the machine has no block device of the host"),
        case("cgroups::network_class", with(json!({ "network": { "classID": 1 } })))
            .sees("cgroup").ours_refuses("linux.resources.network", "cgroup v2 has no net_cls and net_prio"),
        case("cgroups::rdma", with(json!({ "rdma": { "mlx5_1": { "hcaHandles": 3 } } })))
            .sees("cgroup").ours_refuses("linux.resources.rdma", "the machine has no RDMA device"),
        // Not for runc: it would move the host's process 1.
        case("cgroups::unified_of_no_controller", unified("cgroup.procs", "1")).sees("cgroup").beyond(When::Always).refused(&["unified"]),
        case("cgroups::unified_with_a_path", unified("../memory.max", "1")).sees("cgroup").beyond(When::CgroupV1).refused(&["unified"]),
        case("cgroups::unified_of_a_missing_file", unified("memory.nothing", "1")).sees("cgroup").beyond(When::CgroupV1).refused(&["memory.nothing"]),
        case("cgroups::a_resource_that_no_spec_knows", with(json!({ "gravity": { "limit": 1 } })))
            .sees("cgroup").ours_refuses("linux.resources.gravity", "an unknown limit is refused, never dropped"),
        case("cgroups::path_of_the_spec", json!({ "linux": { "cgroupsPath": "/$NS/other-$NAME" } })).sees("process,identity"),
        case("cgroups::path_left_out", json!({ "linux": { "cgroupsPath": null } })).sees("process,identity"),
    ];
    // The same as `unified`, which runc knows on v2 alone.
    for (name, value) in [("memory.min", "8388608"), ("memory.low", "8388608"), ("memory.max", "67108864"), ("memory.oom.group", "1"),
        ("pids.max", "17"), ("cpu.max", "30000 60000"), ("cpu.weight", "77"), ("cpu.idle", "1"), ("cpuset.cpus", "0")] {
        cases.push(case(&format!("cgroups::unified_{}", name.replace('.', "_")), unified(name, value)).cgroup(file(name, value)).beyond(When::CgroupV1));
    }
    cases
}
