//! Differences that are right, and why. A difference that matches no entry fails its case.

use serde_json::Value;

use crate::{
    compare::Difference,
    host::{Host, When},
};

/// An entry.
struct Explained {
    /// Keys from the outside in; `*` is any, `x*` begins with x. What lies below matches as well.
    at: &'static [&'static str],
    /// A word of the case's name.
    cases: &'static str,
    /// What Bulkhead's side must have seen; null is any.
    ours: &'static str,
    /// The words that the lists of the two sides may differ in; none is any.
    only: &'static [&'static str],
    when: When,
    why: &'static str,
}

const fn entry(at: &'static [&'static str], why: &'static str) -> Explained {
    Explained {
        at,
        cases: "",
        ours: "",
        only: &[],
        when: When::Always,
        why,
    }
}

const fn within(cases: &'static str, at: &'static [&'static str], why: &'static str) -> Explained {
    Explained {
        cases,
        ..entry(at, why)
    }
}

const fn when(when: When, at: &'static [&'static str], why: &'static str) -> Explained {
    Explained {
        when,
        ..entry(at, why)
    }
}

const fn seen(at: &'static [&'static str], ours: &'static str, why: &'static str) -> Explained {
    Explained {
        ours,
        ..entry(at, why)
    }
}

const fn words(
    only: &'static [&'static str],
    at: &'static [&'static str],
    why: &'static str,
) -> Explained {
    Explained {
        only,
        ..entry(at, why)
    }
}

const V1: &str =
    "runc on this host mounts cgroup v1, a folder a controller; the guest has v2 on every host";
const NO_FILE: &str = "a file of /proc or /sys that one of the two kernels does not have";
const MASK: &str = "a masked file is covered by the guest's own /dev/null, read-only, where runc takes the container's";
const MASK_FOLDER: &str = "a masked folder is covered by an empty read-only tmpfs, which here is nosuid, nodev and noexec as well";
const FLAG: &str = "a read-only sysfs is made by a flag of the mount, where runc makes the file system itself read-only, which the \
                    kernel then shows for every later mount of it";
const TMPFS_MODE: &str = "a tmpfs without mode takes that of the folder it covers: as an option here, by chmod after the mount in runc";
const ORDER: &str = "a bind's source is cloned before the rootfs is made, so the kernel numbers and lists it first; what covers what is the same";
const KERNEL: &str = "the two kernels differ in version and in what they are built with";
const NO_MODULES: &str = "the guest's kernel has no modules, so these system calls do not exist";
const LIMITS: &str =
    "not in the spec: the machine's default, where runc hands on what its caller has";

const TABLE: &[Explained] = &[
    // Files come from the host by virtio-fs.
    seen(
        &["mounts", "at", "*", "type"],
        "virtiofs",
        "files of the host come into the machine by virtio-fs",
    ),
    seen(
        &["signals", "ignored"],
        "0000000000000000",
        "none is ignored here; runc hands on what its caller ignores, as signal 32 is below a program started by posix_spawn",
    ),
    // What is masked or read-only depends on what the kernel has.
    entry(&["mounts", "at", "/proc/acpi"], NO_FILE),
    entry(&["mounts", "at", "/proc/scsi"], NO_FILE),
    entry(&["mounts", "at", "/proc/asound"], NO_FILE),
    entry(&["mounts", "at", "/proc/latency_stats"], NO_FILE),
    entry(&["mounts", "at", "/proc/timer_stats"], NO_FILE),
    entry(&["mounts", "at", "/proc/sched_debug"], NO_FILE),
    seen(&["mounts", "at", "/proc/sysrq-trigger"], "{", NO_FILE),
    seen(&["mounts", "at", "/proc/kcore"], "null", NO_FILE),
    seen(&["mounts", "at", "*", "type"], "devtmpfs", MASK),
    entry(&["mounts", "at", "/proc/keys", "o*"], MASK),
    entry(&["mounts", "at", "/proc/timer_list", "o*"], MASK),
    entry(&["mounts", "at", "/proc/kcore", "o*"], MASK),
    within("masked", &["mounts", "at", "/etc/passwd", "o*"], MASK),
    within("masked", &["mounts", "at", "/proc/version", "o*"], MASK),
    entry(&["mounts", "at", "/sys/firmware", "options"], MASK_FOLDER),
    within("masked", &["mounts", "at", "/etc", "options"], MASK_FOLDER),
    within(
        "masked",
        &["mounts", "at", "/etc#2", "options"],
        MASK_FOLDER,
    ),
    within(
        "masked",
        &["mounts", "at", "/proc/sys#2", "options"],
        MASK_FOLDER,
    ),
    entry(&["mounts", "at", "/sys", "own"], FLAG),
    within("sysfs", &["mounts", "at", "/s", "own"], FLAG),
    within("sysfs_readonly", &["paths", "/sys"], NO_FILE),
    words(&["inode64"], &["mounts", "at", "*", "own"], KERNEL),
    words(
        &["noatime", "relatime"],
        &["mounts", "at", "*", "options"],
        "a bind takes over how the host keeps times of access; in the machine the files lie on another mount",
    ),
    entry(&["mounts", "at", "/tmp", "own"], TMPFS_MODE),
    within("parent_after", &["mounts", "at", "/a", "own"], TMPFS_MODE),
    within(
        "nothing_optional",
        &["mounts", "at", "/dev", "own"],
        TMPFS_MODE,
    ),
    within(
        "a_later_mount_covers",
        &["paths", "/a", "mode"],
        "runc gives a tmpfs over a folder the folder's mode, even where the spec names one",
    ),
    within("copy_up", &["mounts", "at", "/etc", "own"], TMPFS_MODE),
    within("bind", &["mounts", "order"], ORDER),
    within("the_same_source", &["mounts", "order"], ORDER),
    within(
        "rootfs_propagation_",
        &["mounts", "at"],
        "the propagation of the spec holds for the container's root, as the spec says; runc makes it private \
                                                      again by pivot_root",
    ),
    when(When::CgroupV1, &["mounts", "at", "/sys/fs/cgroup*"], V1),
    when(When::CgroupV1, &["cgroup"], V1),
    seen(&["cgroup", "io.bfq.weight"], "default", KERNEL),
    // Devices.
    seen(&["devices", "core"], "null", NO_FILE),
    entry(
        &["access", "c 10:200"],
        "runc up to 1.1 lets every container use /dev/net/tun; the spec's default devices do not hold it",
    ),
    within(
        "new_folder",
        &["paths", "/dev/net/tun"],
        "runc up to 1.1 lets every container use /dev/net/tun; the spec's default devices do not hold it",
    ),
    within(
        "dev_is_a_link",
        &["devices"],
        "runc leaves /dev out of its set-up when it is a link",
    ),
    Explained {
        when: When::CgroupV1,
        ..within(
            "devices::deny_one",
            &["access"],
            "cgroup v1 forgets the default rule to make nodes when a device is denied",
        )
    },
    Explained {
        when: When::CgroupV1,
        ..within(
            "devices::default_devices_cannot",
            &["access"],
            "cgroup v1 forgets the default rule to make nodes when a device is denied",
        )
    },
    within(
        "devices::allow_all",
        &["access", "c 1:1"],
        "the guest has no /dev/mem to open; the host's refuses by itself",
    ),
    within(
        "exec_sees",
        &["identity", "umask"],
        "runc up to 1.1 gives an exec its own default umask, whatever the process's says",
    ),
    // The machine is not the host.
    entry(&["syscalls", "acct"], KERNEL),
    entry(&["syscalls", "ioperm"], KERNEL),
    entry(&["syscalls", "iopl"], KERNEL),
    entry(&["syscalls", "lookup_dcookie"], KERNEL),
    entry(&["syscalls", "open_by_handle_at"], KERNEL),
    entry(&["syscalls", "quotactl"], KERNEL),
    entry(&["syscalls", "kexec_load"], KERNEL),
    entry(&["syscalls", "userfaultfd"], KERNEL),
    entry(&["syscalls", "perf_event_open"], KERNEL),
    entry(&["syscalls", "bpf"], KERNEL),
    entry(&["syscalls", "init_module"], NO_MODULES),
    entry(&["syscalls", "delete_module"], NO_MODULES),
    entry(&["rlimits", "NPROC"], LIMITS),
    entry(&["rlimits", "MEMLOCK"], LIMITS),
    entry(&["rlimits", "SIGPENDING"], LIMITS),
    entry(
        &["rlimits", "NOFILE"],
        "not in the spec: the agent's own limit, where runc hands on containerd's",
    ),
    entry(
        &["oom"],
        "not in the spec: runc hands on the score of containerd's shim",
    ),
    within(
        "nothing_optional",
        &["names", "host"],
        "without a host name in the spec it is the machine's",
    ),
    within(
        "network_of_the_pod",
        &["namespaces", "net"],
        "each container has a network namespace of its own until the pod has a network",
    ),
    // Numbers that are measured.
    within(
        "cpu_quota",
        &["percent"],
        "measured; both within 5 % of the quota",
    ),
    within(
        "open_files",
        &["opened"],
        "descriptors that the runtime leaves open during the set-up are none of the program's",
    ),
    Explained {
        when: When::OldRunc,
        ..within(
            "hooks::",
            &["poststart", "status"],
            "runc up to 1.1 says `created` in poststart; the spec says `running`",
        )
    },
];

/// Why a difference of a case is right.
pub fn of(host: &Host, case: &str, difference: &Difference) -> Option<&'static str> {
    TABLE
        .iter()
        .find(|entry| {
            case.contains(entry.cases)
                && host.is(entry.when)
                && (entry.ours.is_empty()
                    || difference
                        .ours
                        .to_string()
                        .trim_matches('"')
                        .starts_with(entry.ours))
                && only(entry.only, difference)
                && matches(entry.at, &difference.at)
        })
        .map(|entry| entry.why)
}

/// Whether two lists are the same but for these words.
fn only(words: &[&str], difference: &Difference) -> bool {
    let rest = |value: &Value| {
        let list = value.as_array()?.iter();
        let other = list.filter(|item| !item.as_str().is_some_and(|text| words.contains(&text)));
        Some(other.cloned().collect::<Vec<_>>())
    };
    let (ours, runc) = (rest(&difference.ours), rest(&difference.runc));
    words.is_empty() || (ours.is_some() && ours == runc)
}

fn matches(pattern: &[&str], at: &[String]) -> bool {
    pattern.len() <= at.len()
        && pattern
            .iter()
            .zip(at)
            .all(|(wanted, key)| match wanted.strip_suffix('*') {
                Some(start) => key.starts_with(start),
                None => key == wanted,
            })
}

/// What the product's own table of fields says of a field.
pub fn of_field(host: &Host, field: &str) -> Option<String> {
    let reason = host.refused.get(field)?;
    Some(format!("{field} is refused: {reason}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn words_that_may_differ_explain_no_other_difference() {
        let between = |ours: Value, runc: Value| Difference {
            at: Vec::new(),
            ours,
            runc,
        };
        let alike = between(json!(["rw"]), json!(["inode64", "rw"]));
        assert!(only(&["inode64"], &alike));
        assert!(!only(
            &["inode64"],
            &between(json!(["ro"]), json!(["inode64", "rw"]))
        ));
        assert!(!only(&["inode64"], &between(Value::Null, Value::Null)));
        assert!(only(&[], &between(json!(1), json!(2))));
    }

    #[test]
    fn a_star_matches_the_rest_of_a_key() {
        let at = |keys: &[&str]| keys.iter().map(ToString::to_string).collect::<Vec<_>>();
        assert!(matches(
            &["mounts", "*", "type"],
            &at(&["mounts", "/", "type"])
        ));
        assert!(matches(
            &["mounts", "/sys*"],
            &at(&["mounts", "/sys/fs", "type"])
        ));
        assert!(!matches(&["mounts", "/"], &at(&["mounts", "/dev"])));
        assert!(!matches(&["a", "b"], &at(&["a"])));
    }
}
