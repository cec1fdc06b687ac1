//! `process`: user, capabilities, limits, environment, terminal, scheduling.

use bulkhead_harness::Outcome;
use serde_json::{Value, json};

use super::EVERYTHING;
use crate::{
    case::{Case, case},
    host::When,
    side::{Bundle, Side},
};

/// The group.
// A table: one case a line where it fits.
#[rustfmt::skip]
pub fn all() -> Vec<Case> {
    let process = |change: Value| json!({ "process": change });
    let user = |change: Value| json!({ "process": { "user": change } });
    let rlimit = |name: &str, soft: u64, hard: u64| json!({ "process": { "rlimits": [{ "type": name, "soft": soft, "hard": hard }] } });
    let caps = |change: Value| json!({ "process": { "capabilities": change } });
    vec![
        case("process::everything_of_the_base_spec", json!({})).sees(EVERYTHING),
        case("process::everything_of_a_privileged_spec", privileged()).sees(EVERYTHING).beyond(When::LesserRoot),
        case("process::everything_of_a_spec_with_nothing_optional", bare()).sees(EVERYTHING),
        // user
        case("process::uid_and_gid", user(json!({ "uid": 1000, "gid": 1001 })))
            .sees("identity,capabilities,process,environment")
            .both(json!({ "identity": { "uid": "1000 1000 1000 1000", "gid": "1001 1001 1001 1001" } })),
        case("process::additional_groups", user(json!({ "uid": 1000, "gid": 1000, "additionalGids": [5, 20, 65534] })))
            .sees("identity")
            .both(json!({ "identity": { "groups": [5, 20, 65534] } })),
        case("process::additional_groups_of_root", user(json!({ "additionalGids": [10] })))
            .sees("identity")
            .both(json!({ "identity": { "groups": [10] } })),
        case("process::the_largest_uid", user(json!({ "uid": 4_294_967_294_u32, "gid": 4_294_967_294_u32 })))
            .sees("identity")
            .both(json!({ "identity": { "uid": "4294967294 4294967294 4294967294 4294967294" } }))
            .runc_refuses("runc takes ids up to 2147483647 only; the kernel has more"),
        case("process::umask_077", user(json!({ "umask": 0o77 })))
            .sees("identity")
            .both(json!({ "identity": { "umask": "0077" } })),
        case("process::umask_0", user(json!({ "umask": 0 }))).sees("identity").both(json!({ "identity": { "umask": "0000" } })),
        case("process::umask_default", json!({})).sees("identity").both(json!({ "identity": { "umask": "0022" } })),
        // capabilities
        case("process::no_capabilities", caps(json!({ "bounding": [], "effective": [], "permitted": [] })))
            .sees("capabilities,syscalls")
            .both(json!({ "capabilities": { "bounding": "0000000000000000", "effective": "0000000000000000" } })),
        case("process::capabilities_left_out", json!({ "process": { "capabilities": null } })).sees("capabilities"),
        case("process::ambient_capabilities", caps(json!({ "bounding": ["CAP_NET_RAW"], "effective": ["CAP_NET_RAW"],
            "permitted": ["CAP_NET_RAW"], "inheritable": ["CAP_NET_RAW"], "ambient": ["CAP_NET_RAW"] })))
            .sees("capabilities")
            .both(json!({ "capabilities": { "ambient": "0000000000002000", "inheritable": "0000000000002000" } })),
        case("process::ambient_capabilities_of_a_user", json!({ "process": { "user": { "uid": 1000, "gid": 1000 },
            "capabilities": { "bounding": ["CAP_NET_RAW"], "effective": ["CAP_NET_RAW"], "permitted": ["CAP_NET_RAW"],
            "inheritable": ["CAP_NET_RAW"], "ambient": ["CAP_NET_RAW"] } } }))
            .sees("capabilities,syscalls")
            .both(json!({ "capabilities": { "effective": "0000000000002000", "ambient": "0000000000002000" } })),
        case("process::permitted_but_not_effective", caps(json!({ "effective": [] }))).sees("capabilities"),
        case("process::inheritable_alone", caps(json!({ "inheritable": ["CAP_CHOWN", "CAP_KILL"] }))).sees("capabilities"),
        case("process::ambient_without_inheritable", caps(json!({ "bounding": ["CAP_CHOWN"], "permitted": ["CAP_CHOWN"],
            "effective": ["CAP_CHOWN"], "inheritable": [], "ambient": ["CAP_CHOWN"] })))
            .sees("capabilities"),
        case("process::capabilities_of_a_user", user(json!({ "uid": 1000, "gid": 1000 }))).sees("capabilities,syscalls"),
        case("process::every_capability", caps(json!({ "bounding": ALL_CAPS, "effective": ALL_CAPS, "permitted": ALL_CAPS,
            "inheritable": ALL_CAPS, "ambient": ALL_CAPS })))
            .sees("capabilities,syscalls")
            .both(json!({ "capabilities": { "effective": "000001ffffffffff", "ambient": "000001ffffffffff" } }))
            .beyond(When::LesserRoot),
        case("process::a_capability_that_does_not_exist", caps(json!({ "bounding": ["CAP_FLY", "CAP_KILL"],
            "effective": ["CAP_FLY", "CAP_KILL"], "permitted": ["CAP_FLY", "CAP_KILL"] })))
            .sees("capabilities"),
        case("process::effective_beyond_permitted", caps(json!({ "bounding": ["CAP_KILL"], "effective": ["CAP_KILL"], "permitted": [] })))
            .sees("capabilities").survives(),
        case("process::permitted_beyond_bounding", caps(json!({ "bounding": [], "effective": ["CAP_KILL"], "permitted": ["CAP_KILL"] })))
            .sees("capabilities"),
        // privileges
        case("process::no_new_privileges_off", process(json!({ "noNewPrivileges": false })))
            .sees("capabilities")
            .both(json!({ "capabilities": { "no_new_privs": "0" } })),
        case("process::no_new_privileges_on", process(json!({ "noNewPrivileges": true })))
            .sees("capabilities")
            .both(json!({ "capabilities": { "no_new_privs": "1" } })),
        // limits
        case("process::rlimits_soft_below_hard", rlimit("RLIMIT_NOFILE", 64, 128))
            .sees("rlimits")
            .both(json!({ "rlimits": { "NOFILE": ["64", "128"] } })),
        case("process::every_rlimit", json!({ "process": { "rlimits": [
            { "type": "RLIMIT_CPU", "soft": 100, "hard": 200 }, { "type": "RLIMIT_FSIZE", "soft": 1_000_000, "hard": 2_000_000 },
            { "type": "RLIMIT_DATA", "soft": 1_000_000_000, "hard": 2_000_000_000 }, { "type": "RLIMIT_STACK", "soft": 4_194_304, "hard": 8_388_608 },
            { "type": "RLIMIT_CORE", "soft": 0, "hard": 4096 }, { "type": "RLIMIT_RSS", "soft": 1_000_000, "hard": 2_000_000 },
            { "type": "RLIMIT_NPROC", "soft": 100, "hard": 200 }, { "type": "RLIMIT_NOFILE", "soft": 100, "hard": 200 },
            { "type": "RLIMIT_MEMLOCK", "soft": 4096, "hard": 8192 }, { "type": "RLIMIT_AS", "soft": 1_000_000_000, "hard": 2_000_000_000 },
            { "type": "RLIMIT_LOCKS", "soft": 10, "hard": 20 }, { "type": "RLIMIT_SIGPENDING", "soft": 10, "hard": 20 },
            { "type": "RLIMIT_MSGQUEUE", "soft": 1000, "hard": 2000 }, { "type": "RLIMIT_NICE", "soft": 10, "hard": 20 },
            { "type": "RLIMIT_RTPRIO", "soft": 1, "hard": 2 }, { "type": "RLIMIT_RTTIME", "soft": 1000, "hard": 2000 },
        ] } }))
            .sees("rlimits")
            .both(json!({ "rlimits": { "RTTIME": ["1000", "2000"], "CPU": ["100", "200"], "NICE": ["10", "20"] } }))
            .beyond(When::LesserRoot),
        case("process::rlimit_without_end", rlimit("RLIMIT_CORE", u64::MAX, u64::MAX))
            .sees("rlimits")
            .both(json!({ "rlimits": { "CORE": ["max", "max"] } })),
        case("process::rlimit_soft_over_hard", rlimit("RLIMIT_NOFILE", 128, 64)).sees("rlimits").refused(&["rlimit"]),
        case("process::rlimit_that_does_not_exist", rlimit("RLIMIT_WINGS", 1, 1)).sees("rlimits").refused(&["RLIMIT_WINGS"]),
        case("process::rlimit_twice", json!({ "process": { "rlimits": [{ "type": "RLIMIT_CORE", "soft": 1, "hard": 1 },
            { "type": "RLIMIT_CORE", "soft": 2, "hard": 2 }] } }))
            .sees("rlimits").ours_refuses("RLIMIT_CORE", "the spec: a limit that is listed twice is an error; runc takes the last"),
        case("process::rlimits_left_out", json!({ "process": { "rlimits": null } })).sees("rlimits"),
        // out of memory
        case("process::oom_score_raised", process(json!({ "oomScoreAdj": 500 }))).sees("oom").both(json!({ "oom": "500" })),
        case("process::oom_score_lowered", process(json!({ "oomScoreAdj": -500 }))).sees("oom").both(json!({ "oom": "-500" })).beyond(When::LesserRoot),
        case("process::oom_score_out_of_range", process(json!({ "oomScoreAdj": 1001 }))).sees("oom").refused(&["oom"]),
        // arguments, environment, folder
        case("process::arguments", process(json!({ "args": ["/probe", "see", "process", "two words", "", "$HOME*"] })))
            .both(json!({ "process": { "argv": ["/probe", "see", "process", "two words", "", "$HOME*"] } })),
        case("process::program_by_path_variable", process(json!({ "args": ["probe", "see", "process"], "env": ["PATH=/none:/"] })))
            .both(json!({ "process": { "argv": ["probe", "see", "process"] } })),
        case("process::program_by_relative_path", process(json!({ "args": ["./probe", "see", "process"] }))),
        case("process::program_by_relative_path_in_cwd", process(json!({ "args": ["../probe", "see", "process"], "cwd": "/tmp" }))),
        case("process::missing_program", process(json!({ "args": ["/nothing"] }))).refused(&["/nothing", "no such file"]),
        case("process::missing_program_in_path", process(json!({ "args": ["nothing"] }))).refused(&["nothing", "not found in $PATH"]),
        case("process::program_that_is_a_folder", process(json!({ "args": ["/tmp"] }))).refused(&["/tmp"]),
        case("process::program_that_may_not_run", process(json!({ "args": ["/etc/passwd"] }))).refused(&["/etc/passwd", "permission denied"]),
        case("process::no_arguments", process(json!({ "args": [] }))).refused(&["args"]),
        case("process::environment_in_order", process(json!({ "env": ["B=2", "A=1", "EMPTY=", "SPACE=a b", "UTF=grüße"] })))
            .sees("environment")
            .both(json!({ "environment": { "entries": ["B=2", "A=1", "EMPTY=", "SPACE=a b", "UTF=grüße"] } })),
        case("process::environment_with_doubles", process(json!({ "env": ["A=1", "A=2"] }))).sees("environment"),
        case("process::environment_without_equals_sign", process(json!({ "env": ["NOTHING", "A=1"] }))).sees("environment").refused(&["NOTHING"]),
        case("process::environment_with_home", process(json!({ "env": ["HOME=/here"] })))
            .sees("environment")
            .both(json!({ "environment": { "home": "HOME=/here" } })),
        case("process::home_of_a_user", json!({ "process": { "user": { "uid": 1000, "gid": 1000 } } }))
            .sees("environment")
            .both(json!({ "environment": { "home": "HOME=/home/user" } })),
        case("process::home_of_an_unknown_user", user(json!({ "uid": 77, "gid": 77 }))).sees("environment"),
        case("process::environment_empty", process(json!({ "env": [] }))).sees("environment"),
        case("process::cwd", process(json!({ "cwd": "/tmp" }))).sees("process").both(json!({ "process": { "cwd": "/tmp" } })),
        case("process::cwd_is_made", process(json!({ "cwd": "/made/for/this" })))
            .sees("process /made")
            .both(json!({ "process": { "cwd": "/made/for/this" } })),
        case("process::cwd_relative", process(json!({ "cwd": "tmp" }))).sees("process").refused(&["cwd"]),
        case("process::cwd_that_is_a_file", process(json!({ "cwd": "/etc/passwd" }))).sees("process").refused(&["/etc/passwd"]),
        case("process::cwd_that_the_user_may_not_enter", json!({ "process": { "cwd": "/secret", "user": { "uid": 1000, "gid": 1000 } },
            "mounts+": [{ "type": "tmpfs", "source": "tmpfs", "destination": "/secret", "options": ["mode=700"] }] }))
            .sees("process"),
        case("process::cwd_through_a_link", process(json!({ "cwd": "/link" })))
            .with(&[crate::case::Fixture::Link("$ROOT/link", "tmp")])
            .sees("process")
            .both(json!({ "process": { "cwd": "/tmp" } })),
        case("process::cwd_empty", process(json!({ "cwd": "" }))).sees("process").refused(&["cwd"]),
        // scheduling
        case("process::scheduler_batch", process(json!({ "scheduler": { "policy": "SCHED_BATCH", "nice": 5 } })))
            .sees("scheduling").beyond(When::OldRunc)
            .ours(json!({ "scheduling": { "policy": 3, "nice": 5 } })),
        case("process::scheduler_idle", process(json!({ "scheduler": { "policy": "SCHED_IDLE" } })))
            .sees("scheduling").beyond(When::OldRunc).ours(json!({ "scheduling": { "policy": 5 } })),
        case("process::scheduler_fifo", process(json!({ "scheduler": { "policy": "SCHED_FIFO", "priority": 7, "flags": ["SCHED_FLAG_RESET_ON_FORK"] } })))
            .sees("scheduling").beyond(When::OldRunc)
            .ours(json!({ "scheduling": { "policy": 1, "priority": 7, "flags": 1 } })),
        case("process::scheduler_deadline", process(json!({ "scheduler": { "policy": "SCHED_DEADLINE", "runtime": 10_000_000, "deadline": 50_000_000, "period": 100_000_000 } })))
            .sees("scheduling").beyond(When::OldRunc)
            .ours(json!({ "scheduling": { "policy": 6, "runtime": 10_000_000, "deadline": 50_000_000, "period": 100_000_000 } })),
        case("process::scheduler_that_does_not_exist", process(json!({ "scheduler": { "policy": "SCHED_LUCKY" } })))
            .sees("scheduling").beyond(When::OldRunc).refused(&["SCHED_LUCKY"]),
        case("process::io_priority_idle", process(json!({ "ioPriority": { "class": "IOPRIO_CLASS_IDLE", "priority": 0 } })))
            .sees("scheduling").beyond(When::OldRunc).ours(json!({ "scheduling": { "io_class": 3 } })),
        case("process::io_priority_best_effort", process(json!({ "ioPriority": { "class": "IOPRIO_CLASS_BE", "priority": 6 } })))
            .sees("scheduling").beyond(When::OldRunc).ours(json!({ "scheduling": { "io_class": 2, "io_level": 6 } })),
        case("process::io_priority_out_of_range", process(json!({ "ioPriority": { "class": "IOPRIO_CLASS_BE", "priority": 8 } })))
            .sees("scheduling").beyond(When::OldRunc).refused(&["ioPriority"]),
        case("process::exec_cpu_affinity", process(json!({ "execCPUAffinity": { "initial": "0", "final": "0" } })))
            .code(exec_affinity).beyond(When::OldRunc)
            .ours(json!("0")),
        // security modules
        case("process::apparmor_profile_of_ones_own", process(json!({ "apparmorProfile": "my-profile" })))
            .sees("identity").refused(&["apparmorProfile"]),
        case("process::apparmor_unconfined", process(json!({ "apparmorProfile": "unconfined" })))
            .sees("identity").beyond(When::Always),
        case("process::selinux_label", process(json!({ "selinuxLabel": "system_u:system_r:svirt_lxc_net_t:s0" })))
            .sees("identity").ours_refuses("process.selinuxLabel", "the guest has no SELinux; runc without SELinux drops the label"),
        // terminal
        case("process::terminal", json!({})).code(terminal).both(json!({ "terminal": { "sizes": [[24, 80], [24, 80], [24, 80]] } })),
        case("process::descriptors", json!({})).sees("descriptors,signals"),
        case("process::exec_sees_what_init_sees", user(json!({ "uid": 1000, "gid": 1000, "additionalGids": [7], "umask": 0o27 }))).code(exec_sees),
        case("process::exec_of_a_missing_program", json!({})).code(exec_missing),
    ]
}

const ALL_CAPS: &[&str] = &[
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETPCAP",
    "CAP_LINUX_IMMUTABLE",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST",
    "CAP_NET_ADMIN",
    "CAP_NET_RAW",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_SYS_MODULE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_CHROOT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_PACCT",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_NICE",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_MKNOD",
    "CAP_LEASE",
    "CAP_AUDIT_WRITE",
    "CAP_AUDIT_CONTROL",
    "CAP_SETFCAP",
    "CAP_MAC_OVERRIDE",
    "CAP_MAC_ADMIN",
    "CAP_SYSLOG",
    "CAP_WAKE_ALARM",
    "CAP_BLOCK_SUSPEND",
    "CAP_AUDIT_READ",
    "CAP_PERFMON",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
];

fn privileged() -> Value {
    json!({
        "process": { "capabilities": { "bounding": ALL_CAPS, "effective": ALL_CAPS, "permitted": ALL_CAPS, "inheritable": ALL_CAPS },
            "noNewPrivileges": false },
        "linux": { "maskedPaths": [], "readonlyPaths": [], "resources": { "devices": [{ "allow": true, "access": "rwm" }] } },
    })
}

fn bare() -> Value {
    json!({
        "hostname": null,
        "process": { "capabilities": null, "rlimits": null, "noNewPrivileges": null, "env": null },
        "linux": { "maskedPaths": null, "readonlyPaths": null, "resources": null },
        "mounts": [{ "type": "proc", "source": "proc", "destination": "/proc" },
            { "type": "tmpfs", "source": "tmpfs", "destination": "/dev" }],
    })
}

/// With a terminal of 24 × 80.
fn terminal(side: &Side, mut bundle: Bundle) -> Outcome<Value> {
    bundle.spec["process"]["terminal"] = json!(true);
    bundle.spec["process"]["args"] = json!([
        "/probe",
        "see",
        "late,terminal,descriptors,devices,process",
        "/dev/console"
    ]);
    let running = side
        .start(&bundle.name, &bundle.spec)?
        .terminal(24, 80)
        .spawn()?;
    let end = side.end(&bundle, running)?;
    Ok(if end.started {
        end.seen["view"].clone()
    } else {
        json!({ "started": false, "error": end.error })
    })
}

fn with_exec(side: &Side, mut bundle: Bundle, words: &[&str]) -> Outcome<Value> {
    bundle.spec["process"]["args"] = json!(["/probe", "hold", ""]);
    let (pod, client) = side.start(&bundle.name, &bundle.spec)?.attach()?;
    client.wait_for("}\n", side.suite.scale.seconds(20))?;
    let output = pod.exec(words).output()?;
    let seen = serde_json::from_str(&output.text()).unwrap_or_else(
        |_| json!({ "status": output.status, "said": output.text(), "error": output.errors() }),
    );
    pod.kill("SIGTERM")?;
    client.wait()?;
    pod.delete()?;
    Ok(seen)
}

fn exec_affinity(side: &Side, bundle: Bundle) -> Outcome<Value> {
    let seen = with_exec(side, bundle, &["/probe", "see", "affinity"])?;
    Ok(seen["affinity"].clone())
}

fn exec_sees(side: &Side, bundle: Bundle) -> Outcome<Value> {
    let sections = "identity,capabilities,rlimits,oom,scheduling,mounts,environment,descriptors,signals,personality,terminal,names,network";
    with_exec(side, bundle, &["/probe", "see", sections])
}

fn exec_missing(side: &Side, bundle: Bundle) -> Outcome<Value> {
    let seen = with_exec(side, bundle, &["/nothing"])?;
    Ok(json!({ "status": seen["status"] }))
}
