//! What the host refuses: by the table of fields, and what the table cannot say.

use bulkhead_protocol::fields::{Field, Status, walk};
use serde_json::Value;

use super::{
    size,
    view::{NamespaceView, ProcessView, View},
};
use crate::{
    refusal::{Refusal, unsupported, wrong},
    sandbox::machine::printable,
};

/// Names of unknown fields that are logged, and the longest of them.
const UNKNOWN_MAX: usize = 32;
const NAME_MAX: usize = 200;
/// AppArmor profiles that engines set unasked where the host has AppArmor, and the word for none.
pub const APPARMOR_DEFAULTS: [&str; 4] = [
    "cri-containerd.apparmor.d",
    "docker-default",
    "nerdctl-default",
    "unconfined",
];

/// Refuses the first field in `value`, which stands at `at` in the spec, that the table refuses.
pub fn fields(at: &str, value: &Value) -> Result<(), Refusal> {
    let mut refused = None;
    let mut unknown = 0;
    walk(at, value, &mut |name, field, value| {
        if refused.is_some() {
            return;
        }
        match field {
            Some(field) => refused = known(name, field, value),
            None if name.starts_with("linux.resources.") => {
                let why = "is not known here, and a limit is never dropped; remove it";
                refused = Some(unsupported(printable(name, NAME_MAX), why));
            }
            None => {
                unknown += 1;
                if unknown <= UNKNOWN_MAX {
                    let field = printable(name, NAME_MAX);
                    tracing::warn!(field, "a field that is not known here has no effect");
                }
            }
        }
    });
    refused.map_or(Ok(()), Err)
}

fn known(name: &str, field: &Field, value: &Value) -> Option<Refusal> {
    let name = || printable(name, NAME_MAX);
    match field.status {
        Status::Enforced | Status::Translated => None,
        Status::Refused => Some(unsupported(name(), field.how)),
        Status::NotApplicable if field.path == "process.apparmorProfile" => {
            if value
                .as_str()
                .is_some_and(|p| APPARMOR_DEFAULTS.contains(&p))
            {
                tracing::info!(profile = %value, "not enforced: the guest has no AppArmor");
                return None;
            }
            let why = "the guest has no AppArmor; remove the profile, or use \"unconfined\"";
            Some(unsupported(name(), why))
        }
        Status::NotApplicable => {
            tracing::debug!(field = name(), why = field.how, "not applicable");
            None
        }
    }
}

/// What the table cannot say of a whole spec.
pub fn spec(view: &View) -> Result<(), Refusal> {
    let version = view.oci_version.as_str();
    if !version.is_empty() && !version.starts_with("1.") {
        let version = printable(version, NAME_MAX);
        return Err(wrong(
            "ociVersion",
            format!("{version:?} is not a version 1.x"),
        ));
    }
    match &view.process {
        None => return Err(wrong("process", "is missing: a container needs one")),
        Some(view) => process(view)?,
    }
    let root = view.root.as_ref();
    if root.is_none_or(|r| r.path.as_os_str().is_empty()) {
        return Err(wrong("root.path", "is missing or empty"));
    }
    size::check_annotations(&view.annotations)?;
    view.hooks.check()?;
    namespaces(&view.linux.namespaces)
}

/// What the table cannot say of a process.
pub fn process(process: &ProcessView) -> Result<(), Refusal> {
    if process.args.is_empty() {
        return Err(wrong("process.args", "is empty: name the program to run"));
    }
    Ok(())
}

fn namespaces(namespaces: &[NamespaceView]) -> Result<(), Refusal> {
    if !namespaces.iter().any(|n| n.r#type == "network") {
        return Err(unsupported(
            "linux.namespaces",
            "joining the host's network is not supported: \
             add a namespace of type \"network\" (no hostNetwork, no --net-host)",
        ));
    }
    Ok(())
}
