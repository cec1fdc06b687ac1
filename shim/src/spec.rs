//! Checks of a bundle's `config.json` that the host makes, and the rewriting for the guest.
//!
//! The file comes from containerd's client. What the agent enforces goes to it unchanged (the JSON is edited, not
//! re-made, so that no field is lost); what neither side can do is refused here by the field's name.

use std::{
    fs,
    io::{self, Read},
    path::{Path, PathBuf},
};

use bulkhead_protocol::limits::SPEC_MAX;
use serde::Deserialize;
use serde_json::Value;

use crate::{
    config::{self, Config},
    sandbox::machine::Size,
};

/// Annotation: vCPUs of the pod's machine.
pub const VCPUS: &str = "io.bulkhead.vcpus";
/// Annotation: memory of the pod's machine in MiB.
pub const MEMORY: &str = "io.bulkhead.memory_mib";
const PREFIX: &str = "io.bulkhead.";
const KNOWN: [&str; 2] = [VCPUS, MEMORY];
/// Annotation of containerd's CRI plugin: the pod a container belongs to.
const SANDBOX_ID: &str = "io.kubernetes.cri.sandbox-id";
/// What the guest needs beside the container's own memory limit, in MiB.
const OVERHEAD_MIB: u64 = 128;
/// Hooks that run in the runtime's namespaces, which are the host's.
const HOST_HOOKS: [&str; 4] = ["prestart", "createRuntime", "poststart", "poststop"];

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
    /// A field is missing or has a wrong value.
    #[error("{field}: {why}")]
    Field {
        /// Path of the field.
        field: String,
        /// What is wrong, and what to do.
        why: String,
    },
    /// A field that asks for what there is not.
    #[error("{field}: {why}")]
    Unsupported {
        /// Path of the field.
        field: String,
        /// What is not there, and what to do.
        why: String,
    },
}

/// The parts of the spec that the host looks at.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct View {
    process: Option<ProcessView>,
    root: Option<RootView>,
    hooks: serde_json::Map<String, Value>,
    annotations: std::collections::BTreeMap<String, String>,
    linux: LinuxView,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct ProcessView {
    args: Vec<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct RootView {
    path: PathBuf,
    readonly: bool,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct LinuxView {
    namespaces: Vec<NamespaceView>,
    resources: ResourcesView,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct NamespaceView {
    r#type: String,
    path: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct ResourcesView {
    memory: MemoryView,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct MemoryView {
    limit: Option<i64>,
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
        Self::parse(&text, &path, bundle)
    }

    fn parse(text: &[u8], path: &Path, bundle: &Path) -> Result<Self, Error> {
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
        spec.check()?;
        spec.drop_network_path();
        Ok(spec)
    }

    fn check(&self) -> Result<(), Error> {
        match &self.view.process {
            None => return Err(field("process", "is missing: a container needs one")),
            Some(p) if p.args.is_empty() => {
                return Err(field("process.args", "is empty: name the program to run"));
            }
            _ => {}
        }
        let root = self.view.root.as_ref();
        if root.is_none_or(|r| r.path.as_os_str().is_empty()) {
            return Err(field("root.path", "is missing or empty"));
        }
        self.check_annotations()?;
        for hook in HOST_HOOKS {
            let hooks = self.view.hooks.get(hook).and_then(Value::as_array);
            if hooks.is_some_and(|list| !list.is_empty()) {
                return Err(unsupported(
                    &format!("hooks.{hook}"),
                    "hooks in the host's namespaces are not supported; remove them from the spec",
                ));
            }
        }
        self.check_namespaces()
    }

    fn check_annotations(&self) -> Result<(), Error> {
        for key in self.view.annotations.keys() {
            if key.starts_with(PREFIX) && !KNOWN.contains(&key.as_str()) {
                return Err(field(
                    &format!("annotations[{key}]"),
                    &format!("is unknown; there are {}", KNOWN.join(", ")),
                ));
            }
        }
        if let Some(vcpus) = self.number(VCPUS)? {
            config::check_vcpus(vcpus).map_err(|why| annotation(VCPUS, &why))?;
        }
        if let Some(memory) = self.number(MEMORY)? {
            config::check_memory(memory).map_err(|why| annotation(MEMORY, &why))?;
        }
        Ok(())
    }

    fn check_namespaces(&self) -> Result<(), Error> {
        let namespaces = &self.view.linux.namespaces;
        if !namespaces.iter().any(|n| n.r#type == "network") {
            return Err(unsupported(
                "linux.namespaces",
                "joining the host's network is not supported: \
                 add a namespace of type \"network\" (no hostNetwork, no --net-host)",
            ));
        }
        for n in namespaces {
            if !n.path.is_empty() && n.r#type != "network" {
                return Err(unsupported(
                    &format!("linux.namespaces[{}].path", n.r#type),
                    &format!(
                        "joining {} of the host is not supported: leave the path empty",
                        n.path
                    ),
                ));
            }
        }
        Ok(())
    }

    /// The path of a network namespace is the host's: in the guest it becomes one of its own.
    fn drop_network_path(&mut self) {
        let list = self
            .value
            .pointer_mut("/linux/namespaces")
            .and_then(Value::as_array_mut);
        for namespace in list.into_iter().flatten() {
            if namespace.get("type").and_then(Value::as_str) != Some("network") {
                continue;
            }
            let removed = namespace.as_object_mut().and_then(|o| o.remove("path"));
            if let Some(path) = removed {
                tracing::info!(%path, "linux.namespaces[network]: only loopback in the guest");
            }
        }
    }

    fn number(&self, key: &str) -> Result<Option<u64>, Error> {
        let Some(text) = self.view.annotations.get(key) else {
            return Ok(None);
        };
        match text.parse() {
            Ok(number) => Ok(Some(number)),
            Err(_) => Err(annotation(key, &format!("{text:?} is not a number"))),
        }
    }

    /// How large the machine must be: configuration or annotations, and room for the container's memory limit
    /// (no more than the host has).
    pub fn size(&self, config: &Config, host_mib: u64) -> Result<Size, Error> {
        let base = self.number(MEMORY)?.unwrap_or(config.memory_mib);
        let limit = self.view.linux.resources.memory.limit.unwrap_or(0);
        let for_limit = match u64::try_from(limit) {
            Ok(bytes) if bytes > 0 => bytes.div_ceil(1 << 20).saturating_add(OVERHEAD_MIB),
            _ => 0,
        };
        Ok(Size {
            vcpus: self.number(VCPUS)?.unwrap_or(config.vcpus),
            memory_mib: base.max(for_limit.min(host_mib).min(config::MEMORY_MAX_MIB)),
        })
    }

    /// The program that the container runs.
    pub fn program(&self) -> &str {
        let process = self.view.process.as_ref();
        process.and_then(|p| p.args.first()).map_or("", |arg| arg)
    }

    /// The JSON for the agent.
    pub fn to_json(&self) -> Vec<u8> {
        self.value.to_string().into_bytes()
    }
}

/// The pod that a container belongs to, when it is not a pod of its own. `config.json` is in `bundle`.
pub fn sandbox_of(bundle: &Path, id: &str) -> Result<Option<String>, Error> {
    #[derive(Default, Deserialize)]
    #[serde(default)]
    struct Annotated {
        annotations: Option<std::collections::BTreeMap<String, String>>,
    }
    let path = bundle.join("config.json");
    let text = read(&path)?;
    let spec: Annotated =
        serde_json::from_slice(&text).map_err(|source| Error::Json { path, source })?;
    Ok(spec
        .annotations
        .unwrap_or_default()
        .remove(SANDBOX_ID)
        .filter(|sandbox| sandbox != id))
}

/// Checks the OCI process of an exec.
pub fn check_process(json: &[u8]) -> Result<(), Error> {
    if json.len() > SPEC_MAX {
        return Err(field("process", "is larger than the limit"));
    }
    let mut value: Value = serde_json::from_slice(json)
        .map_err(|e| field("process", &format!("is not valid JSON: {e}")))?;
    drop_nulls(&mut value);
    let process = ProcessView::deserialize(&value)
        .map_err(|e| field("process", &format!("is not an OCI process: {e}")))?;
    if process.args.is_empty() {
        return Err(field("process.args", "is empty: name the program to run"));
    }
    Ok(())
}

/// Memory of this host in MiB.
pub fn host_memory_mib() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    text.lines()
        .find_map(|line| line.strip_prefix("MemTotal:")?.split_whitespace().next())
        .and_then(|kib| kib.parse::<u64>().ok())
        .map_or(config::MEMORY_MAX_MIB, |kib| kib / 1024)
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

fn field(field: &str, why: &str) -> Error {
    Error::Field {
        field: field.into(),
        why: why.into(),
    }
}

fn annotation(key: &str, why: &str) -> Error {
    field(&format!("annotations[{key}]"), why)
}

fn unsupported(field: &str, why: &str) -> Error {
    Error::Unsupported {
        field: field.into(),
        why: why.into(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn good() -> Value {
        json!({
            "process": { "args": ["sh"], "env": null },
            "root": { "path": "rootfs", "readonly": true },
            "annotations": null,
            "linux": { "namespaces": [
                { "type": "pid" }, { "type": "network", "path": "/var/run/netns/x" }
            ], "unknownField": { "kept": true } }
        })
    }

    fn parse(value: &Value) -> Result<Spec, Error> {
        Spec::parse(
            value.to_string().as_bytes(),
            Path::new("/b/config.json"),
            Path::new("/b"),
        )
    }

    fn refusal(pointer: &str, value: Value) -> String {
        let mut spec = good();
        let (parent, key) = pointer.rsplit_once('/').unwrap();
        spec.pointer_mut(parent).unwrap()[key] = value;
        parse(&spec).unwrap_err().to_string()
    }

    #[test]
    fn fields_nobody_here_knows_reach_the_agent_and_the_network_path_does_not() {
        let spec = parse(&good()).unwrap();
        assert_eq!(spec.root, Path::new("/b/rootfs"));
        assert!(spec.root_readonly);
        let sent: Value = serde_json::from_slice(&spec.to_json()).unwrap();
        assert_eq!(sent["linux"]["unknownField"]["kept"], true);
        assert!(sent["linux"]["namespaces"][1].get("path").is_none());
    }

    #[test]
    fn refusals_name_the_field() {
        for (pointer, value, names) in [
            ("/process", Value::Null, "process: is missing"),
            ("/process/args", json!([]), "process.args: is empty"),
            ("/root/path", json!(""), "root.path: is missing or empty"),
            (
                "/linux/namespaces",
                json!([{"type":"pid"}]),
                "linux.namespaces: joining the host's",
            ),
            (
                "/linux/namespaces",
                json!([{"type":"network"},{"type":"pid","path":"/proc/1/ns/pid"}]),
                "linux.namespaces[pid].path",
            ),
            (
                "/hooks",
                json!({"prestart":[{"path":"/x"}]}),
                "hooks.prestart",
            ),
            (
                "/annotations",
                json!({"io.bulkhead.cpus":"2"}),
                "annotations[io.bulkhead.cpus]: is unknown; there are io.bulkhead.vcpus, io.bulkhead.memory_mib",
            ),
            (
                "/annotations",
                json!({"io.bulkhead.memory_mib":"95"}),
                "below the minimum of 96 MiB",
            ),
            (
                "/annotations",
                json!({"io.bulkhead.vcpus":"33"}),
                "annotations[io.bulkhead.vcpus]: 33",
            ),
            (
                "/annotations",
                json!({"io.bulkhead.vcpus":"two"}),
                "not a number",
            ),
            (
                "/linux/namespaces",
                json!("net"),
                "/b/config.json is not a valid OCI spec",
            ),
        ] {
            let text = refusal(pointer, value);
            assert!(text.contains(names), "{pointer}: {text}");
        }
    }

    #[test]
    fn a_spec_that_is_too_large_or_no_json_names_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("config.json");
        fs::write(&file, vec![b' '; SPEC_MAX + 1]).unwrap();
        let text = Spec::load(dir.path()).unwrap_err().to_string();
        assert!(text.contains("config.json is larger"), "{text}");
        fs::write(&file, "{").unwrap();
        let text = Spec::load(dir.path()).unwrap_err().to_string();
        assert!(text.contains("config.json is not a valid"), "{text}");
    }

    #[test]
    fn a_machine_holds_the_containers_memory_limit_but_not_more_than_the_host() {
        let config = Config::parse("", Path::new("/c"), Path::new("/o")).unwrap();
        let size = |spec: Value| parse(&spec).unwrap().size(&config, 8192).unwrap();
        let mut spec = good();
        assert_eq!(
            (size(spec.clone()).memory_mib, size(spec.clone()).vcpus),
            (512, 1)
        );
        spec["linux"]["resources"] = json!({"memory":{"limit": 1_u64 << 30}});
        assert_eq!(size(spec.clone()).memory_mib, 1024 + 128);
        spec["linux"]["resources"] = json!({"memory":{"limit": i64::MAX}});
        assert_eq!(size(spec.clone()).memory_mib, 8192);
        spec["linux"]["resources"] = json!({"memory":{"limit": -1}});
        spec["annotations"] = json!({"io.bulkhead.memory_mib":"128","io.bulkhead.vcpus":"4"});
        assert_eq!((size(spec.clone()).memory_mib, size(spec).vcpus), (128, 4));
    }

    #[test]
    fn a_container_of_another_pod_names_its_sandbox() {
        let dir = tempfile::tempdir().unwrap();
        let spec = json!({"annotations":{"io.kubernetes.cri.sandbox-id":"pod1"}});
        fs::write(dir.path().join("config.json"), spec.to_string()).unwrap();
        assert_eq!(
            sandbox_of(dir.path(), "c1").unwrap().as_deref(),
            Some("pod1")
        );
        assert_eq!(sandbox_of(dir.path(), "pod1").unwrap(), None);
    }

    #[test]
    fn an_exec_needs_arguments() {
        assert!(check_process(b"{\"args\":[\"sh\"],\"env\":null}").is_ok());
        assert!(check_process(b"{\"args\":[]}").is_err());
        assert!(check_process(b"{").is_err());
    }
}
