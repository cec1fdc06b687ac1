//! `linux.namespaces`, names, mappings, offsets, sysctls, personality.

use serde_json::{Value, json};

use crate::case::{Case, case};
use crate::host::When;

/// The base spec's namespaces with one left out, joined or added.
fn list(change: impl Fn(&str) -> Option<Value>) -> Value {
    let kinds = ["pid", "ipc", "uts", "mount", "network", "cgroup"];
    let all: Vec<Value> = kinds.iter().filter_map(|kind| change(kind)).collect();
    json!({ "linux": { "namespaces": all } })
}

fn without(kind: &'static str) -> Value {
    list(|k| (k != kind).then(|| json!({ "type": k })))
}

fn joined(kind: &'static str, file: &str) -> Value {
    list(|k| {
        Some(if k == kind {
            json!({ "type": k, "path": format!("/proc/$PID/ns/{file}") })
        } else {
            json!({ "type": k })
        })
    })
}

fn at(kind: &'static str, path: &str) -> Value {
    list(|k| {
        Some(if k == kind {
            json!({ "type": k, "path": path })
        } else {
            json!({ "type": k })
        })
    })
}

fn and(mut value: Value, patch: Value) -> Value {
    crate::case::apply(&mut value, &patch);
    value
}

fn unnamed(mut value: Value) -> Value {
    value["hostname"] = Value::Null;
    value
}

/// The group.
// A table: one case a line where it fits.
#[rustfmt::skip]
pub fn all() -> Vec<Case> {
    let ns = |kind: &str, whose: &str| json!({ "namespaces": { kind: whose } });
    let sysctl = |key: &str, value: &str| json!({ "linux": { "sysctl": { key: value } } });
    let userns = json!({ "linux": { "namespaces+": [{ "type": "user" }],
        "uidMappings": [{ "containerID": 0, "hostID": 100_000, "size": 65536 }],
        "gidMappings": [{ "containerID": 0, "hostID": 100_000, "size": 65536 }] } });
    vec![
        case("namespaces::each_of_the_base_spec_is_its_own", json!({})).sees("namespaces,process,names,network").both(json!({
            "namespaces": { "pid": "its own", "ipc": "its own", "uts": "its own", "mnt": "its own", "net": "its own", "cgroup": "its own" } })),
        case("namespaces::no_new_ipc", without("ipc")).sees("namespaces").both(ns("ipc", "the machine's")),
        case("namespaces::no_new_uts", unnamed(without("uts"))).sees("namespaces").both(ns("uts", "the machine's")),
        case("namespaces::no_new_pid", without("pid")).sees("namespaces").both(ns("pid", "the machine's")),
        case("namespaces::no_new_cgroup", without("cgroup")).sees("namespaces").both(ns("cgroup", "the machine's")),
        case("namespaces::no_new_mount", without("mount")).sees("namespaces")
            .ours_refuses("linux.namespaces", "without a mount namespace the container's mounts would be the machine's"),
        case("namespaces::no_new_network", without("network")).sees("namespaces")
            .ours_refuses("linux.namespaces", "the host's network is not inside the machine"),
        case("namespaces::ipc_of_the_pod", joined("ipc", "ipc")).sees("namespaces").both(ns("ipc", "the pod's")),
        case("namespaces::uts_of_the_pod", unnamed(joined("uts", "uts")))
            .sees("namespaces,names").both(json!({ "namespaces": { "uts": "the pod's" }, "names": { "host": "conformance" } })),
        case("namespaces::pid_of_the_pod", joined("pid", "pid")).sees("namespaces").both(ns("pid", "the pod's")),
        case("namespaces::network_of_the_pod", joined("network", "net")).sees("namespaces,network"),
        case("namespaces::path_outside_of_proc", at("ipc", "/etc/passwd")).sees("namespaces").refused(&["linux.namespaces"]),
        case("namespaces::path_that_is_missing", at("ipc", "/proc/999999/ns/ipc")).sees("namespaces").refused(&["linux.namespaces"]),
        case("namespaces::path_of_another_kind", at("ipc", "/proc/$PID/ns/uts")).sees("namespaces").refused(&["linux.namespaces"]),
        case("namespaces::ipc_of_the_machines_first_process", at("ipc", "/proc/1/ns/ipc")).sees("namespaces")
            .ours_refuses("linux.namespaces", "pid 1 of the guest is the agent, no container of the pod"),
        case("namespaces::path_through_dots", at("ipc", "/proc/$PID/../1/ns/ipc")).sees("namespaces")
            .ours_refuses("linux.namespaces", "a path in the guest has the form /proc/N/ns/KIND"),
        case("namespaces::listed_twice", json!({ "linux": { "namespaces+": [{ "type": "ipc" }] } }))
            .sees("namespaces").refused(&["linux.namespaces"]),
        case("namespaces::of_an_unknown_kind", json!({ "linux": { "namespaces+": [{ "type": "dream" }] } }))
            .sees("namespaces").refused(&["dream"]),
        // names
        case("namespaces::hostname", json!({ "hostname": "a-name" })).sees("names").both(json!({ "names": { "host": "a-name" } })),
        case("namespaces::hostname_without_uts", without("uts")).sees("names").refused(&["hostname"]),
        case("namespaces::hostname_of_65_bytes", json!({ "hostname": "x".repeat(65) })).sees("names").refused(&["hostname"]),
        case("namespaces::hostname_of_64_bytes", json!({ "hostname": "x".repeat(64) })).sees("names"),
        case("namespaces::domainname", json!({ "domainname": "example.org" }))
            .sees("names").beyond(When::OldRunc).ours(json!({ "names": { "domain": "example.org" } })),
        // user
        case("namespaces::user_with_mappings", userns.clone()).sees("namespaces,identity,capabilities")
            .both(json!({ "namespaces": { "user": "its own", "uid_map": ["0 100000 65536"], "gid_map": ["0 100000 65536"] } })),
        case("namespaces::user_without_mappings", json!({ "linux": { "namespaces+": [{ "type": "user" }] } }))
            .sees("namespaces").refused(&["uidMappings"]),
        case("namespaces::mappings_without_user", json!({ "linux": { "uidMappings": [{ "containerID": 0, "hostID": 100_000, "size": 65536 }] } }))
            .sees("namespaces").ours_refuses("linux.uidMappings", "mappings without a user namespace have nothing to map; runc drops them"),
        case("namespaces::mapping_of_a_user_inside", and(userns, json!({ "process": { "user": { "uid": 1000, "gid": 1000 } } })))
            .sees("namespaces,identity").both(json!({ "identity": { "uid": "1000 1000 1000 1000" } })),
        // time
        case("namespaces::time_with_offsets", json!({ "linux": { "namespaces+": [{ "type": "time" }],
            "timeOffsets": { "boottime": { "secs": 1000, "nanosecs": 5 }, "monotonic": { "secs": 500, "nanosecs": 0 } } } }))
            .sees("namespaces").beyond(When::OldRunc)
            .ours(json!({ "namespaces": { "time": "its own", "offsets": ["monotonic 500 0", "boottime 1000 5"] } })),
        case("namespaces::offsets_without_time", json!({ "linux": { "timeOffsets": { "boottime": { "secs": 1 } } } }))
            .sees("namespaces").beyond(When::OldRunc).refused(&["timeOffsets"]),
        // sysctl
        case("namespaces::sysctl_of_ipc", sysctl("kernel.msgmax", "12345")).sees("names /proc/sys/kernel/msgmax")
            .both(json!({ "paths": { "/proc/sys/kernel/msgmax": { "text": "12345\n" } } })),
        case("namespaces::sysctl_of_network", sysctl("net.ipv4.ip_unprivileged_port_start", "80"))
            .sees("names /proc/sys/net/ipv4/ip_unprivileged_port_start")
            .both(json!({ "paths": { "/proc/sys/net/ipv4/ip_unprivileged_port_start": { "text": "80\n" } } })),
        case("namespaces::sysctl_with_slashes", sysctl("net/ipv4/ip_forward", "1")).sees("names /proc/sys/net/ipv4/ip_forward"),
        case("namespaces::sysctl_of_mqueue", sysctl("fs.mqueue.msg_max", "17")).sees("names /proc/sys/fs/mqueue/msg_max")
            .both(json!({ "paths": { "/proc/sys/fs/mqueue/msg_max": { "text": "17\n" } } })),
        case("namespaces::several_sysctls", json!({ "linux": { "sysctl": { "kernel.shmmax": "1000000", "kernel.sem": "10 20 30 40", "net.ipv4.tcp_syncookies": "0" } } }))
            .sees("names /proc/sys/kernel/shmmax /proc/sys/kernel/sem /proc/sys/net/ipv4/tcp_syncookies"),
        case("namespaces::sysctl_of_the_machine", sysctl("vm.swappiness", "1")).sees("names").refused(&["vm.swappiness"]),
        case("namespaces::sysctl_of_the_kernel", sysctl("kernel.panic", "1")).sees("names").refused(&["kernel.panic"]),
        case("namespaces::sysctl_with_dots", sysctl("net.ipv4./../../../kernel.panic", "1")).sees("names").refused(&["sysctl"]),
        case("namespaces::sysctl_that_is_missing", sysctl("net.ipv4.nothing", "1")).sees("names").refused(&["net.ipv4.nothing"]),
        case("namespaces::sysctl_with_a_bad_value", sysctl("kernel.msgmax", "many")).sees("names").refused(&["kernel.msgmax"]),
        case("namespaces::sysctl_of_a_shared_ipc", and(without("ipc"), sysctl("kernel.msgmax", "99"))).sees("names").refused(&["kernel.msgmax"]),
        case("namespaces::sysctl_of_the_pods_network", and(joined("network", "net"), sysctl("net.ipv4.ip_forward", "1")))
            .sees("names /proc/sys/net/ipv4/ip_forward").survives(),
        case("namespaces::sysctl_hostname", sysctl("kernel.hostname", "other")).sees("names").survives(),
        case("namespaces::sysctl_domainname", sysctl("kernel.domainname", "dom.example")).sees("names")
            .both(json!({ "names": { "domain": "dom.example" } })),
        // personality
        case("namespaces::personality_linux32", json!({ "linux": { "personality": { "domain": "LINUX32" } } }))
            .sees("personality").beyond(When::OldRunc).ours(json!({ "personality": "0x8" })),
        case("namespaces::personality_linux", json!({ "linux": { "personality": { "domain": "LINUX" } } }))
            .sees("personality").both(json!({ "personality": "0x0" })),
        case("namespaces::personality_with_flags", json!({ "linux": { "personality": { "domain": "LINUX", "flags": ["ADDR_NO_RANDOMIZE"] } } }))
            .sees("personality").beyond(When::OldRunc).survives(),
    ]
}
