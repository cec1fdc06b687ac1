//! Reading the OCI JSON into the types of the spec's crate, so that an error names its field.
//!
//! Two things are put right first. Capabilities that this runtime does not know are taken out, as runc does (a spec made
//! for a newer kernel still runs; the set only gets smaller). And two scheduler flags are spelled by the crate otherwise than by
//! the specification.

use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::error::{Error, Result};

/// Reads a value whose fields are called `prefix.…` in errors.
pub fn parse<T: DeserializeOwned>(prefix: &str, json: &[u8]) -> Result<T> {
    let mut value: Value =
        serde_json::from_slice(json).map_err(|error| Error::field(prefix, error.to_string()))?;
    match prefix {
        "process" => put_right(&mut value),
        _ => value.get_mut("process").map(put_right).unwrap_or_default(),
    }
    serde_path_to_error::deserialize(value).map_err(|error| {
        let path = error.path().to_string();
        let field = match (prefix, path.as_str()) {
            (_, ".") => prefix.to_string(),
            ("spec", path) => path.to_string(),
            (prefix, path) => format!("{prefix}.{path}"),
        };
        Error::field(field, error.into_inner().to_string())
    })
}

fn put_right(process: &mut Value) {
    let sets = process
        .get_mut("capabilities")
        .and_then(Value::as_object_mut);
    for (set, names) in sets.into_iter().flatten() {
        let Some(names) = names.as_array_mut() else {
            continue;
        };
        names.retain(|name| {
            let known = !name.is_string()
                || serde_json::from_value::<oci_spec::runtime::Capability>(name.clone()).is_ok();
            if !known {
                eprintln!("process.capabilities.{set}: {name} is not known here and passed over");
            }
            known
        });
    }
    if let Some(sets) = process.get("capabilities") {
        let set = |name: &str| sets.get(name).and_then(Value::as_array).cloned();
        let has = |name: &str, one: &Value| set(name).unwrap_or_default().contains(one);
        for one in set("ambient").unwrap_or_default() {
            if !has("permitted", &one) || !has("inheritable", &one) {
                eprintln!(
                    "process.capabilities.ambient: {one} is not permitted and inheritable, and passed over"
                );
            }
        }
    }
    let flags = process
        .pointer_mut("/scheduler/flags")
        .and_then(Value::as_array_mut);
    for flag in flags.into_iter().flatten() {
        let spelled = match flag.as_str() {
            Some("SCHED_FLAG_RESET_ON_FORK") => "SCHED_RESET_ON_FORK",
            Some("SCHED_FLAG_DL_OVERRUN") => "SCHED_FLAG_D_L_OVERRUN",
            _ => continue,
        };
        *flag = spelled.into();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use oci_spec::runtime::{LinuxResources, Process, Spec};

    const PROCESS: &str = r#""user":{"uid":0,"gid":0},"args":["sh"],"cwd":"/""#;

    #[test]
    fn an_error_names_its_field() {
        let json = format!(
            r#"{{"ociVersion":"1.2.0","process":{{{PROCESS},"rlimits":[{{"type":"RLIMIT_X","hard":1,"soft":1}}]}}}}"#
        );
        let error = parse::<Spec>("spec", json.as_bytes()).unwrap_err().text();
        assert!(error.starts_with("process.rlimits[0].type"), "{error}");
        let json = br#"{"memory":{"limit":"x"}}"#;
        let error = parse::<LinuxResources>("linux.resources", json).unwrap_err();
        assert!(
            error.text().starts_with("linux.resources.memory.limit"),
            "{}",
            error.text()
        );
    }

    #[test]
    fn unknown_capabilities_are_passed_over() {
        let json = format!(
            r#"{{{PROCESS},"capabilities":{{"bounding":["CAP_CHOWN","CAP_NO_SUCH","chown"]}}}}"#
        );
        let process: Process = parse("process", json.as_bytes()).unwrap();
        let bounding = process.capabilities().clone().unwrap();
        assert_eq!(bounding.bounding().as_ref().unwrap().len(), 1);
    }

    #[test]
    fn scheduler_flags_are_those_of_the_specification() {
        let json = format!(
            r#"{{{PROCESS},"scheduler":{{"policy":"SCHED_OTHER","flags":["SCHED_FLAG_RESET_ON_FORK","SCHED_FLAG_DL_OVERRUN","SCHED_FLAG_RECLAIM"]}}}}"#
        );
        let process: Process = parse("process", json.as_bytes()).unwrap();
        let scheduler = process.scheduler().clone().unwrap();
        assert_eq!(scheduler.flags().as_ref().unwrap().len(), 3);
    }
}
