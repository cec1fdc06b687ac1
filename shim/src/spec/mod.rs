//! A bundle's `config.json`: the host's checks, and the rewriting for the guest.
//!
//! The file comes from containerd's client. What the agent enforces goes to it unchanged (the JSON is edited, not re-made, so that no
//! field is lost); what neither side can do is refused by the field's name. `check.rs` refuses by the table of fields, `devices.rs`
//! what the guest does not have; `translate.rs` turns host numbers and paths into the guest's, `size.rs` sizes the machine.

mod cgroup;
mod check;
mod cpuset;
mod devices;
mod size;
mod translate;
mod view;

use std::{
    collections::BTreeMap,
    fs,
    io::{self, Read},
    path::{Path, PathBuf},
};

use bulkhead_protocol::limits::SPEC_MAX;
use serde::Deserialize;
use serde_json::Value;

use self::{
    translate::HostCpus,
    view::{ProcessView, View},
};
use crate::{
    hooks::Hooks,
    refusal::{Refusal, wrong},
};

pub use cgroup::CgroupPath;
pub use size::{Claim, Host, changed_claim, needed};
pub use translate::{Cpus, Guest};

/// Annotation of containerd's CRI plugin: the pod a container belongs to.
const SANDBOX_ID: &str = "io.kubernetes.cri.sandbox-id";

/// Another of them: `sandbox` for a pod's pause container.
const CONTAINER_TYPE: &str = "io.kubernetes.cri.container-type";
/// The program of a pause image, alone.
const PAUSE: &str = "/pause";

/// Why a spec is refused.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be read.
    #[error("reading {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file cannot be written.
    #[error("writing {path}: {source}")]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// More than the limit.
    #[error("{path} is larger than {SPEC_MAX} bytes")]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
    /// Not JSON, or not of the spec's types.
    #[error("{path} is not a valid OCI spec: {source}")]
    Json {
        /// The file.
        path: PathBuf,
        /// Why.
        source: serde_json::Error,
    },
    /// One of its fields.
    #[error(transparent)]
    Refused(#[from] Refusal),
}

/// A `config.json` that passed the host's checks.
#[derive(Debug)]
pub struct Spec {
    /// The JSON, to be edited and sent to the agent.
    pub value: Value,
    /// `root.path`, absolute.
    pub root: PathBuf,
    /// `root.readonly`.
    pub root_readonly: bool,
    view: View,
}

impl Spec {
    /// Reads and checks the bundle's `config.json`.
    pub fn load(bundle: &Path) -> Result<Self, Error> {
        let path = bundle.join("config.json");
        let text = read(&path)?;
        Self::parse(&text, &path, bundle, &HostCpus::read())
    }

    fn parse(text: &[u8], path: &Path, bundle: &Path, host: &HostCpus) -> Result<Self, Error> {
        let json = |source| Error::Json {
            path: path.to_owned(),
            source,
        };
        let mut value: Value = serde_json::from_slice(text).map_err(json)?;
        // Go writes null for an empty list or map.
        drop_nulls(&mut value);
        let view = View::deserialize(&value).map_err(json)?;
        let root = view.root.as_ref();
        let mut spec = Self {
            root: bundle.join(root.map_or(Path::new("rootfs"), |r| &r.path)),
            root_readonly: root.is_some_and(|r| r.readonly),
            value,
            view,
        };
        check::fields("", &spec.value)?;
        check::spec(&spec.view)?;
        translate::check(&spec.view, host)?;
        spec.cgroup()?;
        translate::drop_defaults(&mut spec.value);
        let linux = &spec.view.linux;
        devices::check(&linux.devices, &linux.resources.devices, &mut spec.value)?;
        let resources = spec.value.pointer("/linux/resources");
        resources.map_or(Ok(()), devices::check_block_io)?;
        Ok(spec)
    }

    /// The program that the container runs.
    pub fn program(&self) -> &str {
        let process = self.view.process.as_ref();
        process.and_then(|p| p.args.first()).map_or("", |arg| arg)
    }

    /// Whether it is the pause container of a pod, which the agent holds without running its program.
    pub fn is_pause(&self) -> bool {
        let kind = self.view.annotations.get(CONTAINER_TYPE);
        let process = self.view.process.as_ref();
        kind.is_some_and(|kind| kind == "sandbox")
            && process.is_some_and(|p| p.args == [PAUSE] && !p.terminal)
    }

    /// The hooks that run on the host.
    pub fn hooks(&self) -> &Hooks {
        &self.view.hooks
    }

    /// The path of its network namespace, if it has one.
    pub fn network(&self) -> Option<&Path> {
        let mut namespaces = self.view.linux.namespaces.iter();
        let network = namespaces.find(|n| n.r#type == "network")?;
        (!network.path.is_empty()).then(|| Path::new(&network.path))
    }

    /// The cgroup of the host that it names: of the pod's first container, that of the pod.
    pub fn cgroup(&self) -> Result<Option<CgroupPath>, Refusal> {
        match self.view.linux.cgroups_path.as_str() {
            "" => Ok(None),
            path => CgroupPath::parse(path).map(Some),
        }
    }

    /// `ociVersion`.
    pub fn version(&self) -> &str {
        &self.view.oci_version
    }

    /// `annotations`.
    pub fn annotations(&self) -> &BTreeMap<String, String> {
        &self.view.annotations
    }

    /// The JSON for the agent.
    pub fn to_json(&self) -> Vec<u8> {
        self.value.to_string().into_bytes()
    }
}

/// The pod that a container belongs to, when it is not a pod of its own. `config.json` is in `bundle`; without one the bundle is that
/// of a sandbox (`sandbox_api`).
pub fn sandbox_of(bundle: &Path, id: &str) -> Result<Option<String>, Error> {
    #[derive(Default, Deserialize)]
    #[serde(default)]
    struct Annotated {
        annotations: Option<BTreeMap<String, String>>,
    }
    let path = bundle.join("config.json");
    let text = match read(&path) {
        Err(Error::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
            return Ok(None);
        }
        text => text?,
    };
    let spec: Annotated =
        serde_json::from_slice(&text).map_err(|source| Error::Json { path, source })?;
    Ok(spec
        .annotations
        .unwrap_or_default()
        .remove(SANDBOX_ID)
        .filter(|sandbox| sandbox != id))
}

/// The OCI process of an exec, checked and for the guest. `cpus` is what the container's cpuset became.
pub fn process(json: &[u8], cpus: &Cpus) -> Result<Vec<u8>, Refusal> {
    let mut value = object("process", json)?;
    check::fields("process", &value)?;
    let process = ProcessView::deserialize(&value)
        .map_err(|e| wrong("process", format!("is not an OCI process: {e}")))?;
    check::process(&process)?;
    translate::process(&mut value, &process, cpus)?;
    Ok(value.to_string().into_bytes())
}

/// The resources of an update, checked and for the guest.
pub fn resources(json: &[u8], vcpus: u64) -> Result<Vec<u8>, Refusal> {
    resources_on(&HostCpus::read(), json, vcpus)
}

fn resources_on(host: &HostCpus, json: &[u8], vcpus: u64) -> Result<Vec<u8>, Refusal> {
    let mut value = object("linux.resources", json)?;
    check::fields("linux.resources", &value)?;
    translate::check_resources(&value, host)?;
    devices::check_block_io(&value)?;
    translate::resources(&mut value, vcpus)?;
    Ok(value.to_string().into_bytes())
}

fn object(field: &str, json: &[u8]) -> Result<Value, Refusal> {
    if json.len() > SPEC_MAX {
        return Err(wrong(field, "is larger than the limit"));
    }
    let mut value: Value = serde_json::from_slice(json)
        .map_err(|e| wrong(field, format!("is not valid JSON: {e}")))?;
    if !value.is_object() {
        return Err(wrong(field, "is not a JSON object"));
    }
    drop_nulls(&mut value);
    Ok(value)
}

fn read(path: &Path) -> Result<Vec<u8>, Error> {
    let mut text = Vec::new();
    fs::File::open(path)
        .and_then(|file| file.take(SPEC_MAX as u64 + 1).read_to_end(&mut text))
        .map_err(|source| Error::Read {
            path: path.to_owned(),
            source,
        })?;
    if text.len() > SPEC_MAX {
        return Err(Error::TooLarge {
            path: path.to_owned(),
        });
    }
    Ok(text)
}

fn drop_nulls(value: &mut Value) {
    match value {
        Value::Object(map) => {
            map.retain(|_, v| !v.is_null());
            map.values_mut().for_each(drop_nulls);
        }
        Value::Array(list) => list.iter_mut().for_each(drop_nulls),
        _ => {}
    }
}

#[cfg(test)]
mod tests;
