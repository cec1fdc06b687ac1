//! What of this host decides what can be compared.

use std::path::Path;

use bulkhead_harness::{Engine, command::Invocation};
use serde_json::Value;

/// The host.
#[derive(Clone, Debug)]
pub struct Host {
    /// Engine under test.
    pub engine: Engine,
    /// Whether runc here uses cgroup v2, as the guest does.
    pub cgroup_v2: bool,
    /// runc's version.
    pub runc: (u32, u32),
    /// What `bulkhead features` prints.
    pub features: Value,
}

impl Host {
    /// Looks at it.
    pub fn look(engine: Engine, dist: &Path) -> Self {
        let said = |command: Invocation| command.output().map(|o| o.text()).unwrap_or_default();
        let version = said(Invocation::new("runc").arg("--version"));
        let features = said(Invocation::new(dist.join("bulkhead")).args(["features", "--json"]));
        Self {
            engine,
            cgroup_v2: Path::new("/sys/fs/cgroup/cgroup.controllers").exists(),
            runc: parse_version(&version).unwrap_or((0, 0)),
            features: serde_json::from_str(&features).unwrap_or(Value::Null),
        }
    }
}

fn parse_version(text: &str) -> Option<(u32, u32)> {
    let mut numbers = text.lines().next()?.strip_prefix("runc version ")?.split('.');
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    #[test]
    fn debians_version_line_is_read() {
        assert_eq!(super::parse_version("runc version 1.1.5+ds1\ncommit: x"), Some((1, 1)));
    }
}
