//! What Bulkhead advertises: the features document of the OCI specification, containerd's runtime info, and the table of fields as
//! text for a terminal and for `docs/oci-spec.md`.

pub mod text;

use bulkhead_protocol::features as known;
use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeRequest, RuntimeVersion};
use protobuf::{Message, MessageField, well_known_types::any::Any};
use serde_json::{Value, json};

/// The name containerd knows the runtime by.
pub const RUNTIME: &str = "io.containerd.bulkhead.v1";
/// The type of the features document in containerd's messages; its value is JSON.
const FEATURES_TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";

/// The features document (runtime-spec, features.md).
pub fn document() -> Value {
    let mut options = [known::MOUNT_OPTIONS, known::PROPAGATIONS].concat();
    options.sort_unstable();
    json!({
        "ociVersionMin": known::OCI_VERSION_MIN,
        "ociVersionMax": known::OCI_VERSION_MAX,
        "hooks": known::HOOKS,
        "mountOptions": options,
        "linux": {
            "namespaces": known::NAMESPACES,
            "capabilities": known::CAPABILITIES,
            "cgroup": { "v1": false, "v2": true, "systemd": false, "systemdUser": false, "rdma": false },
            "seccomp": {
                "enabled": true,
                "actions": known::SECCOMP_ACTIONS,
                "operators": known::SECCOMP_OPERATORS,
                "archs": known::SECCOMP_ARCHS,
                "knownFlags": known::SECCOMP_FLAGS,
                "supportedFlags": known::SECCOMP_FLAGS
            },
            "apparmor": { "enabled": false },
            "selinux": { "enabled": false },
            "intelRdt": { "enabled": false, "schemata": false, "monitoring": false },
            "memoryPolicy": { "modes": [], "flags": [] },
            // Kernels refuse to map the ids of virtio-fs, which volumes come by.
            "mountExtensions": { "idmap": { "enabled": false } },
            "netDevices": { "enabled": false }
        },
        "annotations": { "io.bulkhead.version": env!("CARGO_PKG_VERSION") },
        // They size the pod's machine.
        "potentiallyUnsafeConfigAnnotations": ["io.bulkhead."]
    })
}

/// containerd's `RuntimeInfo`, the answer to `-info`. `request` is a `RuntimeRequest`; containerd before 1.7 sends nothing.
pub fn runtime_info(request: &[u8]) -> protobuf::Result<RuntimeInfo> {
    let request = RuntimeRequest::parse_from_bytes(request)?;
    let mut version = RuntimeVersion::new();
    version.version = env!("CARGO_PKG_VERSION").into();
    let mut features = Any::new();
    features.type_url = FEATURES_TYPE.into();
    features.value = document().to_string().into_bytes();
    let mut info = RuntimeInfo::new();
    info.name = RUNTIME.into();
    info.version = MessageField::some(version);
    info.options = request.options;
    info.features = MessageField::some(features);
    Ok(info)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_document_is_one_of_the_specification() {
        let features: oci_spec::runtime::Features = serde_json::from_value(document()).unwrap();
        let again = serde_json::to_value(&features).unwrap();
        assert_eq!(
            again,
            document(),
            "a name that the specification does not have"
        );
    }

    #[test]
    fn runtime_info_repeats_the_options_and_holds_the_document() {
        let mut options = Any::new();
        options.type_url = "x".into();
        let mut request = RuntimeRequest::new();
        request.options = MessageField::some(options.clone());
        let info = runtime_info(&request.write_to_bytes().unwrap()).unwrap();
        assert_eq!(info.options.as_ref(), Some(&options));
        assert_eq!(
            serde_json::from_slice::<Value>(&info.features.value).unwrap(),
            document()
        );
        assert!(runtime_info(&[]).unwrap().options.is_none());
    }
}
