//! `linux.seccomp`: actions, arguments, flags, architectures.

use serde_json::{Value, json};

use crate::case::{Case, case};
use crate::host::When;

fn profile(default: &str, rules: Value) -> Value {
    json!({ "linux": { "seccomp": { "defaultAction": default, "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"], "syscalls": rules } } })
}

fn deny(rule: Value) -> Value {
    profile("SCMP_ACT_ALLOW", json!([rule]))
}

fn with(mut value: Value, key: &str, more: Value) -> Value {
    value["linux"]["seccomp"][key] = more;
    value
}

/// The group.
// A table: one case a line where it fits.
#[rustfmt::skip]
pub fn all() -> Vec<Case> {
    let keyctl = |action: &str| deny(json!({ "names": ["keyctl"], "action": action }));
    let compare = |op: &str, value: u64, two: u64| {
        deny(json!({ "names": ["socket"], "action": "SCMP_ACT_ERRNO", "errnoRet": 13,
            "args": [{ "index": 0, "value": value, "valueTwo": two, "op": op }] }))
    };
    let is = |call: &str, answer: &str| json!({ "syscalls": { call: answer } });
    let mut cases = vec![
        case("seccomp::errno", keyctl("SCMP_ACT_ERRNO")).sees("syscalls,capabilities")
            .both(json!({ "syscalls": { "keyctl": "EPERM" }, "capabilities": { "seccomp": "2" } })),
        case("seccomp::errno_of_the_rule", deny(json!({ "names": ["keyctl", "add_key"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38 })))
            .sees("syscalls").both(is("keyctl", "ENOSYS")),
        case("seccomp::default_errno", with(profile("SCMP_ACT_ERRNO", json!([{ "names": ALLOWED, "action": "SCMP_ACT_ALLOW" }])), "defaultErrnoRet", json!(13)))
            .sees("syscalls").both(is("keyctl", "EACCES")),
        case("seccomp::default_errno_left_out", profile("SCMP_ACT_ERRNO", json!([{ "names": ALLOWED, "action": "SCMP_ACT_ALLOW" }])))
            .sees("syscalls").both(is("keyctl", "EPERM")),
        case("seccomp::kill", keyctl("SCMP_ACT_KILL")).does("call-in-child keyctl").both(json!("signal 31")),
        case("seccomp::kill_thread", keyctl("SCMP_ACT_KILL_THREAD")).does("call-in-child keyctl").both(json!("signal 31")),
        case("seccomp::kill_process", keyctl("SCMP_ACT_KILL_PROCESS")).does("call-in-child keyctl").both(json!("signal 31")),
        case("seccomp::kill_of_the_first_process", keyctl("SCMP_ACT_KILL_PROCESS")).does("call keyctl").status(159),
        case("seccomp::trap", keyctl("SCMP_ACT_TRAP")).does("call-in-child keyctl").both(json!("signal 31")),
        case("seccomp::trace_without_tracer", keyctl("SCMP_ACT_TRACE")).sees("syscalls").both(is("keyctl", "ENOSYS")),
        case("seccomp::log", keyctl("SCMP_ACT_LOG")).sees("syscalls"),
        case("seccomp::notify", keyctl("SCMP_ACT_NOTIFY")).sees("syscalls").refused(&["SCMP_ACT_NOTIFY"]),
        case("seccomp::listener", with(keyctl("SCMP_ACT_ERRNO"), "listenerPath", json!("/run/listener.sock")))
            .sees("syscalls").ours_refuses("linux.seccomp.listenerPath", "the listener is a process of the host"),
        case("seccomp::unknown_action", keyctl("SCMP_ACT_SING")).sees("syscalls").refused(&["SCMP_ACT_SING"]),
        case("seccomp::unknown_system_call", deny(json!({ "names": ["no_such_call", "keyctl"], "action": "SCMP_ACT_ERRNO" })))
            .sees("syscalls").both(is("keyctl", "EPERM")),
        case("seccomp::unknown_system_calls_alone", deny(json!({ "names": ["no_such_call"], "action": "SCMP_ACT_ERRNO" }))).sees("syscalls"),
        case("seccomp::unknown_architecture", with(keyctl("SCMP_ACT_ERRNO"), "architectures", json!(["SCMP_ARCH_ABACUS"])))
            .sees("syscalls").refused(&["SCMP_ARCH_ABACUS"]),
        case("seccomp::architectures_left_out", with(keyctl("SCMP_ACT_ERRNO"), "architectures", json!([]))).sees("syscalls").both(is("keyctl", "EPERM")),
        case("seccomp::architecture_of_another_machine", with(keyctl("SCMP_ACT_ERRNO"), "architectures", json!(["SCMP_ARCH_X86_64", "SCMP_ARCH_AARCH64"])))
            .sees("syscalls").survives(),
        case("seccomp::no_rules", profile("SCMP_ACT_ALLOW", json!([]))).sees("syscalls"),
        case("seccomp::rule_with_the_default_action", profile("SCMP_ACT_ALLOW", json!([{ "names": ["keyctl"], "action": "SCMP_ACT_ALLOW" }]))).sees("syscalls"),
        case("seccomp::two_conditions_on_two_arguments", deny(json!({ "names": ["socket"], "action": "SCMP_ACT_ERRNO", "errnoRet": 13,
            "args": [{ "index": 0, "value": 2, "op": "SCMP_CMP_EQ" }, { "index": 1, "value": 3, "op": "SCMP_CMP_EQ" }] })))
            .sees("syscalls").both(json!({ "syscalls": { "socket raw": "EACCES", "socket inet": "ok" } })),
        case("seccomp::two_conditions_on_one_argument", deny(json!({ "names": ["socket"], "action": "SCMP_ACT_ERRNO", "errnoRet": 13,
            "args": [{ "index": 0, "value": 1, "op": "SCMP_CMP_EQ" }, { "index": 0, "value": 2, "op": "SCMP_CMP_EQ" }] })))
            .sees("syscalls").both(json!({ "syscalls": { "socket unix": "EACCES", "socket inet": "EACCES" } })),
        case("seccomp::argument_out_of_range", deny(json!({ "names": ["socket"], "action": "SCMP_ACT_ERRNO", "args": [{ "index": 6, "value": 1, "op": "SCMP_CMP_EQ" }] })))
            .sees("syscalls").refused(&["seccomp"]),
        case("seccomp::unknown_operator", deny(json!({ "names": ["socket"], "action": "SCMP_ACT_ERRNO", "args": [{ "index": 0, "value": 1, "op": "SCMP_CMP_ISH" }] })))
            .sees("syscalls").refused(&["SCMP_CMP_ISH"]),
        case("seccomp::flag_log", with(keyctl("SCMP_ACT_ERRNO"), "flags", json!(["SECCOMP_FILTER_FLAG_LOG"]))).sees("syscalls").both(is("keyctl", "EPERM")).beyond(When::OldRunc),
        case("seccomp::flag_spec_allow", with(keyctl("SCMP_ACT_ERRNO"), "flags", json!(["SECCOMP_FILTER_FLAG_SPEC_ALLOW"]))).sees("syscalls").both(is("keyctl", "EPERM")).beyond(When::OldRunc),
        case("seccomp::flag_tsync", with(keyctl("SCMP_ACT_ERRNO"), "flags", json!(["SECCOMP_FILTER_FLAG_TSYNC"]))).sees("syscalls").both(is("keyctl", "EPERM")).beyond(When::OldRunc),
        case("seccomp::flag_unknown", with(keyctl("SCMP_ACT_ERRNO"), "flags", json!(["SECCOMP_FILTER_FLAG_MAGIC"]))).sees("syscalls").refused(&["SECCOMP_FILTER_FLAG_MAGIC"]),
        case("seccomp::without_no_new_privileges", {
            let mut patch = keyctl("SCMP_ACT_ERRNO");
            patch["process"] = json!({ "noNewPrivileges": false });
            patch
        })
        .sees("syscalls,capabilities").both(json!({ "syscalls": { "keyctl": "EPERM" }, "capabilities": { "no_new_privs": "0", "seccomp": "2" } })),
        case("seccomp::of_a_user", {
            let mut patch = keyctl("SCMP_ACT_ERRNO");
            patch["process"] = json!({ "user": { "uid": 1000, "gid": 1000 } });
            patch
        })
        .sees("syscalls,capabilities,identity").both(is("keyctl", "EPERM")),
        case("seccomp::execve_denied", deny(json!({ "names": ["execve"], "action": "SCMP_ACT_ERRNO" }))).sees("identity").refused(&["operation not permitted"]),
    ];
    // socket(2, …), socket(1, …), socket(16, …), socket(17, …) are tried: the domain is argument 0.
    for (op, value, two) in [("EQ", 2, 0), ("NE", 2, 0), ("LT", 2, 0), ("LE", 2, 0), ("GE", 16, 0), ("GT", 16, 0), ("MASKED_EQ", 16, 16), ("MASKED_EQ", 1, 0)] {
        let name = format!("seccomp::compare_{}_{value}_{two}", op.to_lowercase());
        cases.push(case(&name, compare(&format!("SCMP_CMP_{op}"), value, two)).sees("syscalls"));
    }
    cases
}

/// What the probe needs.
const ALLOWED: &[&str] = &[
    "access",
    "arch_prctl",
    "brk",
    "capget",
    "capset",
    "chdir",
    "clock_gettime",
    "clone",
    "clone3",
    "close",
    "close_range",
    "dup",
    "dup2",
    "epoll_create1",
    "epoll_ctl",
    "epoll_pwait",
    "epoll_wait",
    "execve",
    "execveat",
    "exit",
    "exit_group",
    "faccessat",
    "faccessat2",
    "fchdir",
    "fchown",
    "fcntl",
    "fstat",
    "fstatfs",
    "futex",
    "getcwd",
    "getdents64",
    "getegid",
    "geteuid",
    "getgid",
    "getpid",
    "getppid",
    "getrandom",
    "gettid",
    "getuid",
    "ioctl",
    "lseek",
    "lstat",
    "madvise",
    "mmap",
    "mprotect",
    "munmap",
    "nanosleep",
    "newfstatat",
    "openat",
    "openat2",
    "prctl",
    "pread64",
    "prlimit64",
    "read",
    "readlink",
    "rseq",
    "rt_sigaction",
    "rt_sigprocmask",
    "rt_sigreturn",
    "sched_yield",
    "set_robust_list",
    "set_tid_address",
    "sigaltstack",
    "stat",
    "wait4",
    "write",
];
