//! System calls with arguments that do nothing: what answers tells whether the call is allowed.

use serde_json::{Map, Value, json};

use crate::sys;

const NONE: usize = usize::MAX;

/// Name, number, arguments. Those that could do something get arguments that the kernel refuses first.
const CALLS: &[(&str, i64, [usize; 5])] = &[
    ("acct", libc::SYS_acct, [1, 0, 0, 0, 0]),
    ("add_key", libc::SYS_add_key, [0, 0, 0, 0, 0]),
    ("adjtimex", libc::SYS_adjtimex, [0, 0, 0, 0, 0]),
    ("bpf", libc::SYS_bpf, [NONE, 0, 0, 0, 0]),
    ("chroot", libc::SYS_chroot, [0, 0, 0, 0, 0]),
    ("clock_adjtime", libc::SYS_clock_adjtime, [0, 0, 0, 0, 0]),
    ("clock_settime", libc::SYS_clock_settime, [0, 0, 0, 0, 0]),
    ("clone3", libc::SYS_clone3, [0, 0, 0, 0, 0]),
    ("delete_module", libc::SYS_delete_module, [0, 0, 0, 0, 0]),
    ("fanotify_init", libc::SYS_fanotify_init, [NONE, 0, 0, 0, 0]),
    ("fsopen", libc::SYS_fsopen, [0, NONE, 0, 0, 0]),
    ("get_mempolicy", libc::SYS_get_mempolicy, [1, 0, 0, 0, 1]),
    ("getpid", libc::SYS_getpid, [0, 0, 0, 0, 0]),
    ("init_module", libc::SYS_init_module, [0, 0, 0, 0, 0]),
    ("io_uring_setup", libc::SYS_io_uring_setup, [0, 0, 0, 0, 0]),
    ("ioperm", libc::SYS_ioperm, [NONE, 1, 1, 0, 0]),
    ("iopl", libc::SYS_iopl, [99, 0, 0, 0, 0]),
    ("kcmp", libc::SYS_kcmp, [NONE, NONE, 99, 0, 0]),
    ("kexec_load", libc::SYS_kexec_load, [0, 99, 0, NONE, 0]),
    ("keyctl", libc::SYS_keyctl, [NONE, 0, 0, 0, 0]),
    (
        "landlock_create_ruleset",
        libc::SYS_landlock_create_ruleset,
        [0, 0, 99, 0, 0],
    ),
    ("lookup_dcookie", libc::SYS_lookup_dcookie, [0, 0, 0, 0, 0]),
    ("mbind", libc::SYS_mbind, [1, 1, 99, 0, 0]),
    ("membarrier", libc::SYS_membarrier, [0, 0, 0, 0, 0]),
    ("mount", libc::SYS_mount, [0, 0, 0, 0, 0]),
    (
        "mount_setattr",
        libc::SYS_mount_setattr,
        [NONE, 0, NONE, 0, 0],
    ),
    ("move_mount", libc::SYS_move_mount, [NONE, 0, NONE, 0, NONE]),
    (
        "name_to_handle_at",
        libc::SYS_name_to_handle_at,
        [NONE, 0, 0, 0, NONE],
    ),
    (
        "open_by_handle_at",
        libc::SYS_open_by_handle_at,
        [NONE, 0, 0, 0, 0],
    ),
    ("open_tree", libc::SYS_open_tree, [NONE, 0, NONE, 0, 0]),
    (
        "perf_event_open",
        libc::SYS_perf_event_open,
        [0, 0, 0, 0, 0],
    ),
    ("pidfd_open", libc::SYS_pidfd_open, [0, 0, 0, 0, 0]),
    ("pivot_root", libc::SYS_pivot_root, [0, 0, 0, 0, 0]),
    (
        "process_vm_readv",
        libc::SYS_process_vm_readv,
        [NONE, 0, 0, 0, 0],
    ),
    ("ptrace", libc::SYS_ptrace, [16, NONE, 0, 0, 0]),
    ("quotactl", libc::SYS_quotactl, [NONE, 0, 0, 0, 0]),
    ("reboot", libc::SYS_reboot, [0, 0, 0, 0, 0]),
    ("request_key", libc::SYS_request_key, [0, 0, 0, 0, 0]),
    ("seccomp", libc::SYS_seccomp, [99, 0, 0, 0, 0]),
    ("setdomainname", libc::SYS_setdomainname, [0, NONE, 0, 0, 0]),
    ("sethostname", libc::SYS_sethostname, [0, NONE, 0, 0, 0]),
    ("setns", libc::SYS_setns, [NONE, 0, 0, 0, 0]),
    ("settimeofday", libc::SYS_settimeofday, [1, 0, 0, 0, 0]),
    ("swapon", libc::SYS_swapon, [0, NONE, 0, 0, 0]),
    ("syslog", libc::SYS_syslog, [10, 0, 0, 0, 0]),
    ("umount2", libc::SYS_umount2, [0, 0, 0, 0, 0]),
    ("unshare", libc::SYS_unshare, [1, 0, 0, 0, 0]),
    ("userfaultfd", libc::SYS_userfaultfd, [0xffff, 0, 0, 0, 0]),
    ("socket inet", libc::SYS_socket, [2, 1, 0, 0, 0]),
    ("socket packet", libc::SYS_socket, [17, 3, 0, 0, 0]),
    ("socket raw", libc::SYS_socket, [2, 3, 1, 0, 0]),
    ("socket netlink", libc::SYS_socket, [16, 3, 0, 0, 0]),
    ("socket unix", libc::SYS_socket, [1, 1, 0, 0, 0]),
    ("unshare user", libc::SYS_unshare, [0x1000_0000, 0, 0, 0, 0]),
    (
        "unshare mount",
        libc::SYS_unshare,
        [0x0002_0000, 0, 0, 0, 0],
    ),
];

/// One call by name.
pub fn one(name: &str) -> Value {
    match CALLS.iter().find(|(known, ..)| *known == name) {
        Some((_, number, args)) => json!(sys::answer(sys::call(*number, *args))),
        None => json!(format!("no call {name}")),
    }
}

/// Every call, each in a child of its own, so that one that changes or kills the process changes nothing else.
pub fn all() -> Value {
    let mut all = Map::new();
    for (name, number, args) in CALLS {
        let child = sys::fork();
        if child == 0 {
            let result = sys::call(*number, *args);
            sys::exit(if result < 0 { sys::errno() } else { 0 });
        }
        let seen = match sys::wait(child) {
            Some(0) => "ok".into(),
            Some(code) if code > 128 => format!("signal {}", code.wrapping_sub(128)),
            Some(code) => sys::name(code),
            None => "no child".into(),
        };
        all.insert((*name).into(), json!(seen));
    }
    all.into()
}
