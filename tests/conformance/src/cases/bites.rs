//! Limits that are run into: what the kernel says, and what containerd hears of it.

use bulkhead_harness::{Outcome, events::Events};
use serde_json::{Value, json};

use crate::{
    case::{Case, case},
    side::{Bundle, Side},
};

/// The group.
// A table: one case a line where it fits.
#[rustfmt::skip]
pub fn all() -> Vec<Case> {
    let with = |value: Value| json!({ "linux": { "resources": value } });
    let limit = |name: &str, value: u64| json!({ "process": { "rlimits": [{ "type": name, "soft": value, "hard": value }] } });
    let quota = |percent: u64| json!({ "linux": { "resources": { "cpu": { "quota": percent * 500, "period": 50_000 } } } });
    vec![
        case("bites::fork_bomb_stops_at_pids_limit", with(json!({ "pids": { "limit": 20 } }))).does("forks 100000")
            .both(json!({ "forked": 19, "then": "EAGAIN" })),
        case("bites::threads_stop_at_pids_limit", with(json!({ "pids": { "limit": 20 } }))).does("threads 100000")
            .both(json!({ "started": 19, "then": "EAGAIN" })),
        case("bites::memory_over_the_limit_is_killed_and_reported", with(json!({ "memory": { "limit": 33_554_432, "swap": 33_554_432 } })))
            .does("eat 96").code(out_of_memory).both(json!({ "status": 137, "reported": true })),
        case("bites::a_child_over_the_memory_limit_is_killed_alone", with(json!({ "memory": { "limit": 33_554_432, "swap": 33_554_432 } })))
            .does("eat-in-child 96").both(json!("signal 9")),
        case("bites::memory_below_the_limit_is_not_killed", with(json!({ "memory": { "limit": 67_108_864, "swap": 67_108_864 } })))
            .does("eat 24").both(json!("not killed")),
        case("bites::cpu_quota_of_a_quarter_holds", quota(25)).does("spin 25 1").code(spin).both(json!({ "holds": true })),
        case("bites::cpu_quota_of_a_half_holds", quota(50)).does("spin 50 1").code(spin).both(json!({ "holds": true })),
        case("bites::cpu_quota_holds_for_three_processes_together", quota(40)).does("spin 40 3").code(spin).both(json!({ "holds": true })),
        case("bites::a_denied_device_cannot_be_opened", json!({})).sees("access").both(json!({ "access": {
            "b 8:0": ["ok", "denied", "denied", "denied"], "c 1:11": ["ok", "denied", "denied", "denied"], "c 10:232": ["ok", "denied", "denied", "denied"] } })),
        case("bites::a_denied_system_call_fails", json!({ "linux": { "seccomp": { "defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64"],
            "syscalls": [{ "names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1 }] } } })).does("mkdir /tmp/x").both(json!("EPERM")),
        case("bites::a_forbidden_system_call_kills", json!({ "linux": { "seccomp": { "defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64"],
            "syscalls": [{ "names": ["keyctl"], "action": "SCMP_ACT_KILL_PROCESS" }] } } })).does("call keyctl").status(159),
        case("bites::a_full_tmpfs_takes_no_more", json!({ "mounts+": [{ "type": "tmpfs", "source": "tmpfs", "destination": "/m", "options": ["size=1m"] }] }))
            .does("fill /m/file 16").both(json!({ "bytes": 1_048_576, "then": "ENOSPC" })),
        case("bites::a_full_dev_shm_takes_no_more", json!({})).does("fill /dev/shm/file 80").both(json!({ "bytes": 67_108_864, "then": "ENOSPC" })),
        case("bites::a_readonly_root_takes_nothing", json!({ "root": { "readonly": true } })).does("fill /file 1").both(json!({ "bytes": 0, "then": "EROFS" })),
        case("bites::open_files_stop_at_the_rlimit", limit("RLIMIT_NOFILE", 30)).does("files").both(json!({ "then": "EMFILE" })),
        case("bites::a_file_stops_at_its_rlimit", limit("RLIMIT_FSIZE", 65536)).does("grow /tmp/file 65536").both(json!("signal 25")),
        case("bites::processes_of_a_user_stop_at_the_rlimit", json!({ "process": { "user": { "uid": 4711, "gid": 4711 },
            "rlimits": [{ "type": "RLIMIT_NPROC", "soft": 10, "hard": 10 }] } })).does("forks 1000").both(json!({ "forked": 9, "then": "EAGAIN" })),
        case("bites::address_space_stops_at_the_rlimit", limit("RLIMIT_AS", 33_554_432)).does("eat 96").status(12),
    ]
}

/// Runs into the memory limit, and waits for containerd's event.
fn out_of_memory(side: &Side, bundle: Bundle) -> Outcome<Value> {
    let events = Events::subscribe(side.suite)?;
    let end = side.run(&bundle)?;
    if !end.started {
        return Ok(json!({ "started": false, "error": end.error }));
    }
    let heard = events.wait_for(&bundle.name, "/tasks/oom", side.suite.scale.seconds(3));
    Ok(json!({ "status": end.seen["status"], "reported": heard.is_ok() }))
}

/// One side after the other: both at once would share the host's CPUs. The number is for the report.
fn spin(side: &Side, bundle: Bundle) -> Outcome<Value> {
    let end = side.run(&bundle)?;
    if !end.started {
        return Ok(json!({ "started": false, "error": end.error }));
    }
    Ok(end.seen["view"].clone())
}
