//! Fields that a container of a machine cannot have, and specs that are none.

use serde_json::{Value, json};

use crate::case::{Case, case};

/// The group.
// A table: one case a line where it fits.
#[rustfmt::skip]
pub fn all() -> Vec<Case> {
    let linux = |key: &str, value: Value| json!({ "linux": { key: value } });
    vec![
        case("refused::intel_rdt", linux("intelRdt", json!({ "closID": "x", "l3CacheSchema": "L3:0=ff" })))
            .sees("identity").ours_refuses("linux.intelRdt", "the machine has no resource control of its CPU"),
        case("refused::mount_label", linux("mountLabel", json!("system_u:object_r:svirt_sandbox_file_t:s0")))
            .sees("identity").ours_refuses("linux.mountLabel", "the guest has no SELinux"),
        case("refused::memory_policy", linux("memoryPolicy", json!({ "mode": "MPOL_BIND", "nodes": "0" })))
            .sees("identity").ours_refuses("linux.memoryPolicy", "the machine has one memory node"),
        case("refused::net_devices", linux("netDevices", json!({ "eth0": { "name": "net0" } })))
            .sees("identity").ours_refuses("linux.netDevices", "a link of the host does not come into the machine"),
        case("refused::a_linux_field_that_no_spec_knows", linux("antigravity", json!({ "on": true }))).sees("identity"),
        case("refused::a_field_that_no_spec_knows", json!({ "antigravity": true })).sees("identity"),
        case("refused::no_process", json!({ "process": null })).refused(&["process"]),
        case("refused::no_linux", json!({ "linux": null })).sees("identity")
            .ours_refuses("linux", "without namespaces the container would run in the machine's"),
        case("refused::annotation_of_ours_that_is_unknown", json!({ "annotations": { "io.bulkhead.nonsense": "1" } }))
            .sees("identity").ours_refuses("io.bulkhead.nonsense", "a misspelt setting of Bulkhead is an error"),
        case("refused::annotations_of_others", json!({ "annotations": { "org.example.key": "value" } })).sees("identity"),
        case("refused::no_json", json!({})).sees("identity").raw(|_| "this is no JSON".into()).refused(&["config.json"]),
        case("refused::json_of_another_kind", json!({})).sees("identity").raw(|_| "[1, 2]".into()).refused(&["config.json"]),
        case("refused::half_a_spec", json!({})).sees("identity").raw(|spec| {
            let text = spec.to_string();
            text.get(..text.len() / 2).unwrap_or_default().into()
        })
        .refused(&["config.json"]),
        case("refused::uid_that_is_no_number", json!({})).sees("identity").raw(|spec| spec.to_string().replace("\"uid\":0", "\"uid\":\"root\"")).refused(&["\"root\""]),
        case("refused::uid_below_0", json!({})).sees("identity").raw(|spec| spec.to_string().replace("\"uid\":0", "\"uid\":-1")).refused(&["-1"]),
        case("refused::uid_above_32_bits", json!({})).sees("identity").raw(|spec| spec.to_string().replace("\"uid\":0", "\"uid\":4294967296")).refused(&["4294967296"]),
        case("refused::a_zero_byte_in_an_argument", json!({ "process": { "args": ["/probe", "a\u{0}b"] } })).refused(&["process.args"]),
        case("refused::a_zero_byte_in_the_environment", json!({ "process": { "env": ["A=\u{0}b"] } })).sees("identity").refused(&["process.env"]),
        case("refused::nulls_everywhere", json!({})).sees("identity").raw(|spec| {
            let mut spec = spec.clone();
            for place in ["hooks", "annotations_", "domainname"] {
                spec[place] = Value::Null;
            }
            for place in ["sysctl", "seccomp", "devices", "uidMappings", "gidMappings", "rootfsPropagation"] {
                spec["linux"][place] = Value::Null;
            }
            for place in ["apparmorProfile", "oomScoreAdj", "selinuxLabel"] {
                spec["process"][place] = Value::Null;
            }
            spec.to_string()
        }),
        case("refused::empty_lists_everywhere", json!({ "hooks": { "prestart": [], "poststop": [], "createContainer": [] },
            "linux": { "devices": [], "sysctl": {}, "uidMappings": [], "gidMappings": [], "maskedPaths": [], "readonlyPaths": [] },
            "process": { "apparmorProfile": "", "selinuxLabel": "" } })).sees("identity,mounts"),
    ]
}
