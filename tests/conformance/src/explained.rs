//! Differences that are right, and why. A difference that matches no entry fails its case.

use crate::{compare::Difference, host::Host};

/// When an entry applies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum When {
    Always,
    /// runc here uses cgroup v1, the guest has v2.
    CgroupV1,
    /// runc here is older than 1.2.
    OldRunc,
}

/// An entry.
struct Explained {
    /// Keys from the outside in; `*` is any, `x*` begins with x. What lies below matches as well.
    at: &'static [&'static str],
    /// Words of the case's name.
    cases: &'static str,
    when: When,
    why: &'static str,
}

const fn entry(at: &'static [&'static str], why: &'static str) -> Explained {
    Explained { at, cases: "", when: When::Always, why }
}

const fn when(when: When, at: &'static [&'static str], why: &'static str) -> Explained {
    Explained { at, cases: "", when, why }
}

const V1: &str = "runc on this host mounts cgroup v1, a folder a controller; the guest has v2 on every host";

const TABLE: &[Explained] = &[
    entry(&["mounts", "at", "/", "type"], "the rootfs comes over virtio-fs from the host's file system"),
    when(When::CgroupV1, &["mounts", "at", "/sys/fs/cgroup*"], V1),
    when(When::CgroupV1, &["mounts", "order"], V1),
    when(When::CgroupV1, &["cgroup"], V1),
];

/// Why a difference of a case is right.
pub fn of(host: &Host, case: &str, difference: &Difference) -> Option<&'static str> {
    TABLE
        .iter()
        .find(|entry| {
            case.contains(entry.cases)
                && match entry.when {
                    When::Always => true,
                    When::CgroupV1 => !host.cgroup_v2,
                    When::OldRunc => host.runc < (1, 2),
                }
                && matches(entry.at, &difference.at)
        })
        .map(|entry| entry.why)
}

fn matches(pattern: &[&str], at: &[String]) -> bool {
    pattern.len() <= at.len()
        && pattern.iter().zip(at).all(|(wanted, key)| match wanted.strip_suffix('*') {
            Some(start) => key.starts_with(start),
            None => key == wanted,
        })
}

/// What the product's own table of fields says of a field.
pub fn of_field(host: &Host, field: &str) -> Option<String> {
    let rows = host.features.pointer("/fields")?.as_array()?;
    let row = rows.iter().find(|row| row["path"].as_str() == Some(field))?;
    Some(format!("{} ({})", row["how"].as_str()?, row["verdict"].as_str().unwrap_or("table of fields")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_star_matches_the_rest_of_a_key() {
        let at = |keys: &[&str]| keys.iter().map(ToString::to_string).collect::<Vec<_>>();
        assert!(matches(&["mounts", "*", "type"], &at(&["mounts", "/", "type"])));
        assert!(matches(&["mounts", "/sys*"], &at(&["mounts", "/sys/fs", "type"])));
        assert!(!matches(&["mounts", "/"], &at(&["mounts", "/dev"])));
        assert!(!matches(&["a", "b"], &at(&["a"])));
    }
}
