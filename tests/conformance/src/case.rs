//! A case: a change to the base spec, what the probe does in the container, and what must hold.

use bulkhead_harness::Outcome;
use serde_json::{Map, Value, json};

use crate::{
    host::When,
    side::{Bundle, Side},
};

/// Something that must be there before the container is made. Paths that begin with `$ROOT` or `$DIR`.
#[derive(Clone, Debug)]
pub enum Fixture {
    /// A folder.
    Folder(&'static str),
    /// A file with text.
    File(&'static str, &'static str),
    /// A link and its target.
    Link(&'static str, &'static str),
}

/// How the container should end up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Expect {
    /// It runs under both, and what is seen is compared.
    Runs,
    /// Neither starts it; our error holds these words.
    Refused(Vec<&'static str>),
    /// Bulkhead refuses the field by its name; runc does not.
    OursRefuses(&'static str, &'static str),
    /// runc refuses it, for this reason; Bulkhead runs it.
    RuncRefuses(&'static str),
    /// Both end, one way or the other; the pod goes on.
    Survives,
}

/// What a case written as code does on one side: what it answers is compared.
pub type Code = fn(&Side, Bundle) -> Outcome<Value>;

/// A case.
#[derive(Clone, Debug)]
pub struct Case {
    /// Group and claim, `group::claim`.
    pub name: String,
    /// Change to the base spec: objects are merged, `key+` appends to a list, null removes.
    pub patch: Value,
    /// What the probe is told.
    pub args: Vec<String>,
    /// What must be there.
    pub files: Vec<Fixture>,
    /// What must hold on both sides.
    pub both: Value,
    /// What must hold on our side: the guest has cgroup v2 and a new kernel wherever it runs.
    pub ours: Value,
    /// Exit status on both sides.
    pub status: i32,
    /// How it ends.
    pub expect: Expect,
    /// The text of `config.json`, when it is no patch.
    pub raw: Option<fn(&Value) -> String>,
    /// Instead of running the probe once.
    pub code: Option<Code>,
    /// What runc cannot do on hosts like these: there, only ours is looked at.
    pub beyond: Option<When>,
    /// What this host's cgroup v1 gives otherwise.
    pub needs_v2: bool,
}

/// A case that runs the probe.
pub fn case(name: &str, patch: Value) -> Case {
    Case {
        name: name.into(),
        patch,
        args: Vec::new(),
        files: Vec::new(),
        both: Value::Null,
        ours: Value::Null,
        status: 0,
        expect: Expect::Runs,
        raw: None,
        code: None,
        beyond: None,
        needs_v2: false,
    }
}

impl Case {
    /// The probe prints these sections and looks at these paths.
    pub fn sees(mut self, words: &str) -> Self {
        let words = words.split(' ').map(str::to_owned);
        self.args = std::iter::once("see".to_owned()).chain(words).collect();
        self
    }

    /// The probe does something.
    pub fn does(mut self, words: &str) -> Self {
        self.args = words.split(' ').map(str::to_owned).collect();
        self
    }

    /// Things that must be there.
    pub fn with(mut self, files: &[Fixture]) -> Self {
        self.files = files.to_vec();
        self
    }

    /// Must hold on both sides.
    pub fn both(mut self, holds: Value) -> Self {
        self.both = holds;
        self
    }

    /// Must hold on ours.
    pub fn ours(mut self, holds: Value) -> Self {
        self.ours = holds;
        self
    }

    /// Both end with this status.
    pub fn status(mut self, status: i32) -> Self {
        self.status = status;
        self
    }

    /// Must hold on ours; what runc of a v1 host makes of it is not compared.
    pub fn cgroup(mut self, files: Value) -> Self {
        self = self.sees("cgroup");
        self.ours = json!({ "cgroup": files });
        self.needs_v2 = true;
        self
    }

    /// Neither starts it; our error holds these words.
    pub fn refused(mut self, words: &[&'static str]) -> Self {
        self.expect = Expect::Refused(words.to_vec());
        self
    }

    /// Bulkhead refuses `field`, for a reason.
    pub fn ours_refuses(mut self, field: &'static str, reason: &'static str) -> Self {
        self.expect = Expect::OursRefuses(field, reason);
        self
    }

    /// Whatever happens, both do it and the pod goes on.
    pub fn survives(mut self) -> Self {
        self.expect = Expect::Survives;
        self
    }

    /// runc cannot do this on hosts like these: only ours is looked at.
    pub fn beyond(mut self, when: When) -> Self {
        self.beyond = Some(when);
        self
    }

    /// runc refuses it, for a reason; Bulkhead runs it.
    pub fn runc_refuses(mut self, reason: &'static str) -> Self {
        self.expect = Expect::RuncRefuses(reason);
        self
    }

    /// Another text as `config.json`.
    pub fn raw(mut self, text: fn(&Value) -> String) -> Self {
        self.raw = Some(text);
        self
    }

    /// Runs this on each side.
    pub fn code(mut self, code: Code) -> Self {
        self.code = Some(code);
        self
    }
}

/// Capabilities of the base spec: containerd's.
use bulkhead_harness::spec::CAPABILITIES;

/// The base spec: containerd's default one with every namespace that it has, in the pod of `$POD`.
pub fn base() -> Value {
    let mount = |kind: &str, to: &str, options: &[&str]| json!({ "type": kind, "source": kind, "destination": to, "options": options });
    json!({
        "ociVersion": "1.0.2",
        "process": {
            "user": { "uid": 0, "gid": 0 },
            "args": [],
            "env": ["PATH=/bin:/usr/bin", "GREETING=hello world", "EMPTY="],
            "cwd": "/",
            "capabilities": { "bounding": CAPABILITIES, "effective": CAPABILITIES, "permitted": CAPABILITIES },
            "rlimits": [{ "type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024 }],
            "noNewPrivileges": true,
        },
        "root": { "path": "$ROOT" },
        "hostname": "conformance",
        "mounts": [
            mount("proc", "/proc", &["nosuid", "noexec", "nodev"]),
            mount("tmpfs", "/dev", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
            mount("devpts", "/dev/pts", &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]),
            mount("tmpfs", "/dev/shm", &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]),
            mount("mqueue", "/dev/mqueue", &["nosuid", "noexec", "nodev"]),
            mount("sysfs", "/sys", &["nosuid", "noexec", "nodev", "ro"]),
            mount("cgroup", "/sys/fs/cgroup", &["nosuid", "noexec", "nodev", "relatime", "ro"]),
        ],
        "annotations": { "io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": "$POD" },
        "linux": {
            "cgroupsPath": "/$NS/$NAME",
            "maskedPaths": ["/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list",
                "/proc/timer_stats", "/proc/sched_debug", "/sys/firmware", "/proc/scsi"],
            "readonlyPaths": ["/proc/asound", "/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
            "namespaces": [{ "type": "pid" }, { "type": "ipc" }, { "type": "uts" }, { "type": "mount" },
                { "type": "network" }, { "type": "cgroup" }],
            "resources": { "devices": [{ "allow": false, "access": "rwm" }] },
        },
    })
}

/// Changes `value` by `patch`: objects are merged, `key+` appends to the list `key`, null removes.
pub fn apply(value: &mut Value, patch: &Value) {
    let Value::Object(changes) = patch else {
        *value = patch.clone();
        return;
    };
    if !value.is_object() {
        *value = Value::Object(Map::new());
    }
    let Value::Object(map) = value else { return };
    for (key, change) in changes {
        if let Some(list) = key.strip_suffix('+') {
            let entry = map.entry(list).or_insert_with(|| json!([]));
            if let (Value::Array(all), Value::Array(more)) = (entry, change) {
                all.extend(more.iter().cloned());
            }
        } else if change.is_null() {
            map.remove(key);
        } else {
            apply(map.entry(key).or_insert(Value::Null), change);
        }
    }
}

/// Puts the names of this side in place of `$ROOT`, `$DIR`, `$NAME`, `$POD` and `$PID` in every string.
pub fn fill_in(value: &mut Value, names: &[(&str, String)]) {
    match value {
        Value::String(text) if text.contains('$') => {
            for (name, real) in names {
                *text = text.replace(name, real);
            }
        }
        Value::Array(list) => list.iter_mut().for_each(|v| fill_in(v, names)),
        Value::Object(map) => map.values_mut().for_each(|v| fill_in(v, names)),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_patch_merges_appends_and_removes() {
        let mut value = json!({ "a": { "b": 1, "c": 2 }, "list": [1] });
        apply(
            &mut value,
            &json!({ "a": { "b": null, "d": 3 }, "list+": [2], "new+": [9] }),
        );
        assert_eq!(
            value,
            json!({ "a": { "c": 2, "d": 3 }, "list": [1, 2], "new": [9] })
        );
    }

    #[test]
    fn a_list_without_plus_is_replaced() {
        let mut value = json!({ "list": [1, 2] });
        apply(&mut value, &json!({ "list": [] }));
        assert_eq!(value, json!({ "list": [] }));
    }

    #[test]
    fn names_are_filled_in_everywhere() {
        let mut value = json!({ "path": "$ROOT/x", "list": ["$NAME"] });
        fill_in(
            &mut value,
            &[("$ROOT", "/r".into()), ("$NAME", "c1".into())],
        );
        assert_eq!(value, json!({ "path": "/r/x", "list": ["c1"] }));
    }
}
