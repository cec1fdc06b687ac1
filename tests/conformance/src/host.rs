//! What of this host decides what can be compared.

use std::{collections::BTreeMap, path::Path};

use bulkhead_harness::{Engine, command::Invocation};

/// What a host is like, as a condition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    /// On every host.
    Always,
    /// runc here uses cgroup v1; the guest has v2.
    CgroupV1,
    /// runc here is older than 1.2, which learned what 1.1 of the spec added.
    OldRunc,
    /// root of this host lacks capabilities, so runc's does as well.
    LesserRoot,
}

/// The host.
#[derive(Clone, Debug)]
pub struct Host {
    /// Engine under test.
    pub engine: Engine,
    /// Whether runc here uses cgroup v2, as the guest does.
    pub cgroup_v2: bool,
    /// runc's version.
    pub runc: (u32, u32),
    /// Whether root here has every capability.
    pub full_root: bool,
    /// What `bulkhead features` says of each field that is refused.
    pub refused: BTreeMap<String, String>,
}

impl Host {
    /// Looks at it.
    pub fn look(engine: Engine, dist: &Path) -> Self {
        let said = |command: Invocation| command.output().map(|o| o.text()).unwrap_or_default();
        let version = said(Invocation::new("runc").arg("--version"));
        let features = said(Invocation::new(dist.join("bulkhead")).arg("features"));
        Self {
            engine,
            cgroup_v2: Path::new("/sys/fs/cgroup/cgroup.controllers").exists(),
            runc: parse_version(&version).unwrap_or((0, 0)),
            full_root: has_sys_resource(
                &std::fs::read_to_string("/proc/self/status").unwrap_or_default(),
            ),
            refused: refused_fields(&features),
        }
    }

    /// Whether it is like that.
    pub fn is(&self, when: When) -> bool {
        match when {
            When::Always => true,
            When::CgroupV1 => !self.cgroup_v2,
            When::OldRunc => self.runc < (1, 2),
            When::LesserRoot => !self.full_root,
        }
    }
}

/// CAP_SYS_RESOURCE is what hosts that are machines of somebody else lack first.
fn has_sys_resource(status: &str) -> bool {
    let line = status.lines().find_map(|line| line.strip_prefix("CapBnd:"));
    let bits = line.and_then(|text| u64::from_str_radix(text.trim(), 16).ok());
    bits.is_some_and(|bits| bits & (1 << 24) != 0)
}

/// The rows `  name  refused  reason` below their sections' names; a long reason goes on in the next line.
fn refused_fields(text: &str) -> BTreeMap<String, String> {
    let mut fields = BTreeMap::new();
    let mut section = "";
    let mut last: Option<String> = None;
    for line in text.lines() {
        if !line.starts_with(' ') {
            section = line.trim();
            last = None;
            continue;
        }
        if line.starts_with("     ") {
            if let Some(reason) = last.as_ref().and_then(|field| fields.get_mut(field)) {
                *reason = format!("{reason} {}", line.trim());
            }
            continue;
        }
        let mut words = line.split_whitespace();
        last = match (words.next(), words.next()) {
            (Some(name), Some("refused")) => {
                let field = match section {
                    "config.json" => name.to_owned(),
                    _ => format!("{section}.{name}"),
                };
                let reason: Vec<&str> = words.collect();
                fields.insert(field.clone(), reason.join(" "));
                Some(field)
            }
            _ => None,
        };
    }
    fields
}

fn parse_version(text: &str) -> Option<(u32, u32)> {
    let mut numbers = text
        .lines()
        .next()?
        .strip_prefix("runc version ")?
        .split('.');
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_bounding_set_without_sys_resource_is_seen() {
        assert!(super::has_sys_resource("CapBnd:\t000001ffffffffff\n"));
        assert!(!super::has_sys_resource("CapBnd:\t000001fffeffffff\n"));
    }

    #[test]
    fn a_refused_fields_reason_is_read_over_two_lines() {
        let text = "1 fields:\n\nconfig.json\n  vm  refused  the machine is\n               made here\n\nlinux\n  x  enforced\n  y  refused  no\n";
        let fields = super::refused_fields(text);
        assert_eq!(fields.len(), 2);
        assert_eq!(fields["vm"], "the machine is made here");
        assert_eq!(fields["linux.y"], "no");
    }

    #[test]
    fn debians_version_line_is_read() {
        assert_eq!(
            super::parse_version("runc version 1.1.5+ds1\ncommit: x"),
            Some((1, 1))
        );
    }
}
