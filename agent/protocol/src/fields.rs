//! What becomes of each field of the OCI runtime specification: one table for the shim's checks, the features that are advertised
//! and the page `docs/oci-spec.md`.
//!
//! A path is made of the JSON names with dots between them; the elements of a list have their list's path, `*` stands for the keys
//! of a map. [`walk`] meets every field of a `config.json`, or of a part of it; what the file holds is not trusted.

mod table;

use std::{
    collections::{HashMap, HashSet},
    fmt,
    sync::LazyLock,
};

use serde_json::Value;

pub use table::FIELDS;

/// What is done with a field.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Status {
    /// It holds in the guest as the specification says.
    Enforced,
    /// It names something of the host, and holds for what stands for that in the guest.
    Translated,
    /// It has no meaning for a container in a machine; it is logged, nothing is lost.
    NotApplicable,
    /// A container that sets it is refused.
    Refused,
}

impl Status {
    /// All of them.
    pub const ALL: [Self; 4] = [
        Self::Enforced,
        Self::Translated,
        Self::NotApplicable,
        Self::Refused,
    ];
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Enforced => "enforced",
            Self::Translated => "translated",
            Self::NotApplicable => "not applicable",
            Self::Refused => "refused",
        })
    }
}

/// A line of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Field {
    /// Its path.
    pub path: &'static str,
    /// What is done with it.
    pub status: Status,
    /// How, or why not; empty where there is nothing to say.
    pub how: &'static str,
}

struct Index {
    fields: HashMap<&'static str, &'static Field>,
    /// Paths that have fields below them.
    inner: HashSet<&'static str>,
}

static INDEX: LazyLock<Index> = LazyLock::new(|| {
    let mut index = Index {
        fields: HashMap::new(),
        inner: HashSet::from([""]),
    };
    for field in FIELDS {
        index.fields.insert(field.path, field);
        for (dot, _) in field.path.match_indices('.') {
            index.inner.extend(field.path.get(..dot));
        }
    }
    index
});

/// The table's line for a path.
pub fn field(path: &str) -> Option<&'static Field> {
    INDEX.fields.get(path).copied()
}

/// Calls `meet` for each field that `value`, which stands at `at` (`""` is the whole spec), sets: with its name there and its line of
/// the table, or none if the table does not know it. What is null, empty, zero or false sets nothing.
pub fn walk<'a>(
    at: &str,
    value: &'a Value,
    meet: &mut dyn FnMut(&str, Option<&'static Field>, &'a Value),
) {
    descend(at, at, value, meet);
}

/// `path` is the table's, `name` has the keys of maps as they are.
fn descend<'a>(
    path: &str,
    name: &str,
    value: &'a Value,
    meet: &mut dyn FnMut(&str, Option<&'static Field>, &'a Value),
) {
    if is_empty(value) {
        return;
    }
    if let Some(field) = field(path) {
        return meet(name, Some(field), value);
    }
    if !INDEX.inner.contains(path) {
        return meet(name, None, value);
    }
    match value {
        Value::Array(list) => {
            for element in list {
                descend(path, name, element, meet);
            }
        }
        Value::Object(map) => {
            for (key, value) in map {
                let known = join(path, key);
                let any = join(path, "*");
                let below = |path: &str| field(path).is_some() || INDEX.inner.contains(path);
                let path = if below(&any) { &any } else { &known };
                descend(path, &join(name, key), value, meet);
            }
        }
        // Not of the specification's type: whoever reads it says so.
        _ => {}
    }
}

fn join(path: &str, key: &str) -> String {
    match path {
        "" => key.into(),
        path => format!("{path}.{key}"),
    }
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(set) => !set,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => text.is_empty(),
        Value::Array(list) => list.iter().all(is_empty),
        Value::Object(map) => map.values().all(is_empty),
    }
}

#[cfg(test)]
mod trace;

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// A refusal above a field covers it; to enforce something, the table must name it.
    fn is_covered(path: &str) -> bool {
        let above = path
            .match_indices('.')
            .filter_map(|(dot, _)| path.get(..dot));
        field(path).is_some() || above.filter_map(field).any(|f| f.status == Status::Refused)
    }

    /// The crate misspells two names.
    fn fields_of_the_crate() -> Vec<String> {
        let names = trace::fields_of::<oci_spec::runtime::Spec>().into_iter();
        names
            .map(|path| path.replace("enableCmt", "enableCMT"))
            .map(|path| path.replace("enableMbm", "enableMBM"))
            .collect()
    }

    #[test]
    fn every_field_of_the_spec_crate_is_in_the_table() {
        let missing: Vec<String> = fields_of_the_crate()
            .into_iter()
            .filter(|path| !is_covered(path))
            .collect();
        assert!(
            missing.is_empty(),
            "missing in fields/table.rs: {missing:#?}"
        );
    }

    #[test]
    fn every_line_of_the_table_is_a_field_of_the_spec_crate() {
        let crates = fields_of_the_crate();
        for field in FIELDS.iter().filter(|f| f.path != "freebsd") {
            let below = format!("{}.", field.path);
            assert!(
                crates
                    .iter()
                    .any(|path| path == field.path || path.starts_with(&below)),
                "{} is no field of the crate",
                field.path
            );
        }
    }

    #[test]
    fn no_path_is_twice_in_the_table_and_none_stands_above_another() {
        assert_eq!(INDEX.fields.len(), FIELDS.len());
        for field in FIELDS {
            assert!(!INDEX.inner.contains(field.path), "{}", field.path);
        }
    }

    #[test]
    fn what_is_not_enforced_says_why() {
        for field in FIELDS {
            assert!(
                field.status == Status::Enforced || !field.how.is_empty(),
                "{}",
                field.path
            );
            assert!(
                !field.how.ends_with('.') && !field.how.contains('|'),
                "{}",
                field.path
            );
        }
    }

    fn met(at: &str, value: &Value) -> Vec<(String, Option<Status>)> {
        let mut met = Vec::new();
        walk(at, value, &mut |name, field, _| {
            met.push((name.to_owned(), field.map(|f| f.status)))
        });
        met
    }

    #[test]
    fn a_walk_meets_what_is_set_with_the_keys_of_maps() {
        let spec = json!({
            "process": { "args": ["sh"], "terminal": false, "user": { "uid": 0 }, "selinuxLabel": "a:b" },
            "linux": { "sysctl": { "net.a": "1" }, "timeOffsets": { "boottime": { "secs": 5 } }, "new": {}, "newer": [1],
                       "resources": { "rdma": { "hca1": { "hcaObjects": 3 } } } },
            "mounts": [{ "type": "proc" }, { "type": "tmpfs", "flavour": "x" }],
            "windows": { "layerFolders": ["a"] }
        });
        let met = met("", &spec);
        for (name, status) in [
            ("process.args", Some(Status::Enforced)),
            ("process.selinuxLabel", Some(Status::Refused)),
            ("linux.sysctl.net.a", Some(Status::Enforced)),
            ("linux.timeOffsets.boottime.secs", Some(Status::Enforced)),
            (
                "linux.resources.rdma.hca1.hcaObjects",
                Some(Status::Refused),
            ),
            ("linux.newer", None),
            ("mounts.type", Some(Status::Enforced)),
            ("mounts.flavour", None),
            ("windows", Some(Status::Refused)),
        ] {
            assert!(met.contains(&(name.to_owned(), status)), "{name}: {met:?}");
        }
        assert_eq!(met.len(), 10, "{met:?}");
    }

    #[test]
    fn a_part_of_a_spec_can_be_walked() {
        let resources = json!({ "memory": { "limit": 5, "kernel": 0, "soft": 3 }, "pids": null });
        assert_eq!(
            met("linux.resources", &resources),
            [
                (
                    "linux.resources.memory.limit".to_owned(),
                    Some(Status::Enforced)
                ),
                ("linux.resources.memory.soft".to_owned(), None)
            ]
        );
    }

    #[test]
    fn values_of_a_wrong_type_do_no_harm() {
        for value in [
            json!("x"),
            json!([[[1]]]),
            json!({ "process": 5, "linux": [["a"]], "mounts": { "type": [{}] } }),
        ] {
            met("", &value);
        }
    }
}
