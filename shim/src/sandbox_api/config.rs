//! From what a sandbox is asked for (the pod's configuration of CRI) to the spec of the process that keeps its namespaces: the same
//! that containerd makes for a pause container where it makes one.

use containerd_shim_protos::sandbox_api::CreateSandboxRequest;
use protobuf::{Message, well_known_types::any::Any};
use serde_json::{Map, Value, json};

use crate::refusal::{Refusal, unsupported, wrong};

#[allow(
    missing_docs,
    nonstandard_style,
    unused,
    clippy::all,
    clippy::undocumented_unsafe_blocks
)]
pub(super) mod cri {
    include!(concat!(env!("OUT_DIR"), "/cri.rs"));
}

use cri::{IDMapping, LinuxContainerResources, NamespaceOption, PodSandboxConfig};

/// The message's name in `options`, with or without a host before it.
const CONFIG: &str = "runtime.v1.PodSandboxConfig";
/// `NamespaceMode` of CRI: that of the pod.
const POD: i32 = 0;
/// And that of the node.
const NODE: i32 = 2;
/// Who the pause of Kubernetes is.
const PAUSE_USER: u32 = 65535;
/// The kernel's OOM killer takes a pause last.
const PAUSE_OOM_SCORE: i32 = -998;

/// The pod's configuration; `None` if the sandbox was made by another client than CRI.
pub fn parse(options: Option<&Any>) -> Result<Option<PodSandboxConfig>, Refusal> {
    let Some(any) = options.filter(|any| !any.type_url.is_empty()) else {
        return Ok(None);
    };
    if any.type_url.rsplit('/').next() != Some(CONFIG) {
        let why = format!("are of type {:?}, not {CONFIG}", any.type_url);
        return Err(unsupported("options", why));
    }
    let config = PodSandboxConfig::parse_from_bytes(&any.value);
    config
        .map(Some)
        .map_err(|error| wrong("options", format!("are no {CONFIG}: {error}")))
}

/// The spec of the pod's pause.
pub fn spec(request: &CreateSandboxRequest, config: &PodSandboxConfig) -> Value {
    let linux = &config.linux;
    let options = &linux.security_context.namespace_options;
    let mut spec = json!({
        "ociVersion": "1.1.0",
        "process": {
            "user": { "uid": PAUSE_USER, "gid": PAUSE_USER },
            "args": ["/pause"],
            "cwd": "/",
            "noNewPrivileges": true,
            "oomScoreAdj": PAUSE_OOM_SCORE,
        },
        "root": { "path": "rootfs", "readonly": true },
        "mounts": [{
            "destination": "/proc", "type": "proc", "source": "proc",
            "options": ["nosuid", "noexec", "nodev"],
        }],
        "annotations": annotations(request, config),
        "linux": {
            "cgroupsPath": cgroup(&linux.cgroup_parent, &request.sandbox_id),
            "namespaces": namespaces(options, &request.netns_path),
            "resources": { "cpu": { "shares": 2 } },
            "sysctl": linux.sysctls,
        },
    });
    if options.network != NODE {
        spec["hostname"] = config.hostname.as_str().into();
    }
    let user = &options.userns_options;
    if user.is_some() && user.mode == POD {
        spec["linux"]["uidMappings"] = mappings(&user.uids);
        spec["linux"]["gidMappings"] = mappings(&user.gids);
    }
    spec
}

/// As containerd's CRI plugin names a container's: below a slice it is a scope.
fn cgroup(parent: &str, id: &str) -> Value {
    match parent.rsplit('/').next() {
        None | Some("") => Value::Null,
        Some(slice) if slice.ends_with(".slice") => format!("{slice}:cri-containerd:{id}").into(),
        Some(_) => format!("{parent}/{id}").into(),
    }
}

fn namespaces(options: &NamespaceOption, network: &str) -> Value {
    let mut list = vec![json!({ "type": "mount" })];
    for (kind, mode) in [
        ("pid", options.pid),
        ("ipc", options.ipc),
        // A node's name goes with its network.
        ("uts", options.network),
    ] {
        if mode != NODE {
            list.push(json!({ "type": kind }));
        }
    }
    if options.network != NODE {
        list.push(json!({ "type": "network", "path": network }));
    }
    if options.userns_options.is_some() && options.userns_options.mode == POD {
        list.push(json!({ "type": "user" }));
    }
    list.into()
}

fn mappings(list: &[IDMapping]) -> Value {
    let mapping = |one: &IDMapping| json!({ "hostID": one.host_id, "containerID": one.container_id, "size": one.length });
    list.iter().map(mapping).collect()
}

/// Those that containerd gives a pause container. Of the pod's own only what the client passes: which of them a runtime may see is
/// the node's configuration.
fn annotations(request: &CreateSandboxRequest, config: &PodSandboxConfig) -> Map<String, Value> {
    let mut map: Map<String, Value> = request
        .annotations
        .iter()
        .map(|(key, value)| (key.clone(), value.as_str().into()))
        .collect();
    let mut add = |key: &str, value: String| {
        map.insert(format!("io.kubernetes.cri.{key}"), value.into());
    };
    add("container-type", "sandbox".into());
    add("sandbox-id", request.sandbox_id.clone());
    add("sandbox-name", config.metadata.name.clone());
    add("sandbox-namespace", config.metadata.namespace.clone());
    add("sandbox-uid", config.metadata.uid.clone());
    let resources: Option<&LinuxContainerResources> = config.linux.resources.as_ref();
    if let Some(resources) = resources {
        add("sandbox-cpu-period", resources.cpu_period.to_string());
        add("sandbox-cpu-quota", resources.cpu_quota.to_string());
        add("sandbox-cpu-shares", resources.cpu_shares.to_string());
        add(
            "sandbox-memory",
            resources.memory_limit_in_bytes.to_string(),
        );
    }
    map
}

#[cfg(test)]
mod tests {
    use protobuf::MessageField;

    use super::*;

    fn request() -> CreateSandboxRequest {
        let mut request = CreateSandboxRequest::new();
        request.sandbox_id = "pod".into();
        request.netns_path = "/run/netns/x".into();
        request
    }

    fn any(type_url: &str, value: Vec<u8>) -> Any {
        Any {
            type_url: type_url.into(),
            value,
            ..Any::default()
        }
    }

    #[test]
    fn a_configuration_of_cri_is_parsed_and_nothing_else() {
        let mut config = PodSandboxConfig::new();
        config.hostname = "web".into();
        let bytes = config.write_to_bytes().unwrap();
        for name in [CONFIG, "type.googleapis.com/runtime.v1.PodSandboxConfig"] {
            let parsed = parse(Some(&any(name, bytes.clone()))).unwrap().unwrap();
            assert_eq!(parsed.hostname, "web");
        }
        assert!(parse(None).unwrap().is_none());
        assert!(parse(Some(&any("", Vec::new()))).unwrap().is_none());
        assert!(parse(Some(&any("google.protobuf.Empty", Vec::new()))).is_err());
        assert!(parse(Some(&any(CONFIG, vec![0xff]))).is_err());
    }

    #[test]
    fn the_pods_namespaces_name_and_size_are_in_its_spec() {
        let mut config = PodSandboxConfig::new();
        config.hostname = "web".into();
        let linux = config.linux.mut_or_insert_default();
        linux.cgroup_parent = "/pods".into();
        linux
            .resources
            .mut_or_insert_default()
            .memory_limit_in_bytes = 1 << 28;
        linux.sysctls.insert("kernel.shmmax".into(), "1".into());
        let spec = spec(&request(), &config);
        assert_eq!(spec["hostname"], "web");
        assert_eq!(spec["linux"]["cgroupsPath"], "/pods/pod");
        assert_eq!(spec["linux"]["sysctl"]["kernel.shmmax"], "1");
        let kinds = spec["linux"]["namespaces"].as_array().unwrap();
        let kinds: Vec<_> = kinds.iter().map(|n| n["type"].as_str().unwrap()).collect();
        assert_eq!(kinds, ["mount", "pid", "ipc", "uts", "network"]);
        assert_eq!(spec["linux"]["namespaces"][4]["path"], "/run/netns/x");
        let annotations = &spec["annotations"];
        assert_eq!(annotations["io.kubernetes.cri.sandbox-memory"], "268435456");
        assert_eq!(annotations["io.kubernetes.cri.container-type"], "sandbox");
    }

    #[test]
    fn a_pod_without_a_cgroup_parent_names_none_and_below_a_slice_a_scope() {
        assert_eq!(cgroup("", "a"), Value::Null);
        assert_eq!(
            cgroup("/kubepods.slice/kubepods-pod1.slice", "a"),
            "kubepods-pod1.slice:cri-containerd:a"
        );
    }

    #[test]
    fn what_is_the_nodes_is_not_made_anew_and_a_user_namespace_is() {
        let mut config = PodSandboxConfig::new();
        let context = &mut config.linux.mut_or_insert_default().security_context;
        let options = &mut context.mut_or_insert_default().namespace_options;
        let mut user = cri::UserNamespace::new();
        user.uids.push(IDMapping {
            host_id: 100_000,
            length: 65536,
            ..IDMapping::default()
        });
        *options = MessageField::some(NamespaceOption {
            network: NODE,
            ipc: NODE,
            userns_options: MessageField::some(user),
            ..NamespaceOption::default()
        });
        let spec = spec(&request(), &config);
        let kinds = spec["linux"]["namespaces"].as_array().unwrap();
        let kinds: Vec<_> = kinds.iter().map(|n| n["type"].as_str().unwrap()).collect();
        assert_eq!(kinds, ["mount", "pid", "user"]);
        assert_eq!(spec["linux"]["uidMappings"][0]["hostID"], 100_000);
        assert!(spec.get("hostname").is_none());
    }
}
