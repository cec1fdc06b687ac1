//! `linux.devices` and `linux.resources.devices`.

use serde_json::{Value, json};

use crate::case::{Case, Fixture, case};

/// The group.
// A table: one case a line where it fits.
#[rustfmt::skip]
pub fn all() -> Vec<Case> {
    let device = |value: Value| json!({ "linux": { "devices": [value] } });
    let rules = |value: Value| json!({ "linux": { "resources": { "devices": value } } });
    let is = |path: &str, what: &str| json!({ "devices": { path: { "is": what } } });
    let open = |key: &str, value: Value| json!({ "access": { key: value } });
    vec![
        case("devices::default_nodes_and_links", json!({})).sees("devices").both(json!({ "devices": {
            "null": { "is": "c 1:3", "mode": "666", "read": "ok", "write": "ok" }, "fd": { "link": "/proc/self/fd" }, "ptmx": { "link": "pts/ptmx" } } })),
        case("devices::a_node_more", device(json!({ "path": "/dev/fuse", "type": "c", "major": 10, "minor": 229, "fileMode": 0o640, "uid": 5, "gid": 6 })))
            .sees("devices").both(json!({ "devices": { "fuse": { "is": "c 10:229", "mode": "640", "owner": "5:6", "read": "EPERM" } } })),
        case("devices::a_node_without_mode", device(json!({ "path": "/dev/x", "type": "c", "major": 10, "minor": 229 }))).sees("devices"),
        case("devices::a_block_node", device(json!({ "path": "/dev/b", "type": "b", "major": 7, "minor": 77 }))).sees("devices")
            .ours_refuses("linux.devices", "a block device of the host is not in the machine"),
        case("devices::a_fifo", device(json!({ "path": "/dev/p", "type": "p", "fileMode": 0o600 }))).sees("devices"),
        case("devices::an_unbuffered_node", device(json!({ "path": "/dev/u", "type": "u", "major": 1, "minor": 7 }))).sees("devices").both(is("u", "c 1:7")),
        case("devices::a_node_in_a_new_folder", device(json!({ "path": "/dev/net/tun", "type": "c", "major": 10, "minor": 200, "fileMode": 0o666 })))
            .sees("devices /dev/net/tun"),
        case("devices::a_node_of_the_default_set", device(json!({ "path": "/dev/null", "type": "c", "major": 1, "minor": 3, "fileMode": 0o600 }))).sees("devices")
            .runc_refuses("runc takes a node of the spec out of its default rules, and cannot open it then"),
        case("devices::a_node_outside_of_dev", json!({ "linux": { "devices": [{ "path": "/tmp/null", "type": "c", "major": 1, "minor": 3, "fileMode": 0o666 }] },
            "mounts+": [{ "type": "tmpfs", "source": "tmpfs", "destination": "/tmp" }] })).sees("devices /tmp/null"),
        case("devices::a_node_with_an_unknown_type", device(json!({ "path": "/dev/x", "type": "z", "major": 1, "minor": 1 }))).sees("devices").refused(&["`z`"]),
        case("devices::a_node_with_a_relative_path", device(json!({ "path": "x", "type": "c", "major": 1, "minor": 3 }))).sees("devices").survives(),
        case("devices::a_node_over_a_link", device(json!({ "path": "/dev/fd", "type": "c", "major": 1, "minor": 3 }))).sees("devices").survives(),
        case("devices::dev_bound_from_the_host", json!({ "mounts": [
            { "type": "proc", "source": "proc", "destination": "/proc" },
            { "type": "bind", "source": "$DIR/dev", "destination": "/dev", "options": ["rbind"] }] }))
            .with(&[Fixture::Folder("$DIR/dev")]).sees("devices")
            .runc_refuses("runc needs a /dev/null in it"),
        // the cgroup's rules
        case("devices::deny_all_but_the_default", json!({})).sees("access").both(json!({ "access": {
            "c 1:3": ["ok", "allowed", "allowed", "allowed"], "b 8:0": ["ok", "denied", "denied", "denied"] } })),
        case("devices::no_rules", rules(json!([]))).sees("access"),
        case("devices::allow_all", rules(json!([{ "allow": true, "access": "rwm" }]))).sees("access")
            .both(open("b 8:0", json!(["ok", "allowed", "allowed", "allowed"]))),
        case("devices::allow_one", rules(json!([{ "allow": false, "access": "rwm" }, { "allow": true, "type": "c", "major": 10, "minor": 229, "access": "rwm" }])))
            .sees("access").both(open("c 10:229", json!(["ok", "allowed", "allowed", "allowed"]))),
        case("devices::allow_reading_one", rules(json!([{ "allow": false, "access": "rwm" }, { "allow": true, "type": "b", "major": 8, "minor": 0, "access": "r" }])))
            .sees("access").both(open("b 8:0", json!(["ok", "allowed", "denied", "denied"]))),
        case("devices::allow_a_major", rules(json!([{ "allow": false, "access": "rwm" }, { "allow": true, "type": "b", "major": 8, "access": "rw" }])))
            .sees("access").both(open("b 8:1", json!(["ok", "allowed", "allowed", "allowed"]))),
        case("devices::allow_a_minor_of_any_major", rules(json!([{ "allow": false, "access": "rwm" }, { "allow": true, "type": "b", "minor": 1, "access": "rw" }])))
            .sees("access"),
        case("devices::deny_one_of_all", rules(json!([{ "allow": true, "access": "rwm" }, { "allow": false, "type": "b", "major": 8, "minor": 0, "access": "rwm" }])))
            .sees("access").ours(open("b 8:0", json!(["ok", "denied", "denied", "denied"]))),
        case("devices::deny_writing_one_of_all", rules(json!([{ "allow": true, "access": "rwm" }, { "allow": false, "type": "b", "major": 8, "minor": 0, "access": "w" }])))
            .sees("access").both(open("b 8:0", json!(["ok", "allowed", "denied", "denied"]))),
        case("devices::allow_then_deny", rules(json!([{ "allow": false, "access": "rwm" }, { "allow": true, "type": "b", "major": 8, "minor": 0, "access": "rwm" },
            { "allow": false, "type": "b", "major": 8, "minor": 0, "access": "w" }]))).sees("access"),
        case("devices::deny_all_at_last", rules(json!([{ "allow": true, "type": "b", "major": 8, "minor": 0, "access": "rwm" }, { "allow": false, "access": "rwm" }])))
            .sees("access"),
        case("devices::a_hole_in_a_range", rules(json!([{ "allow": false, "access": "rwm" }, { "allow": true, "type": "b", "major": 8, "access": "rwm" },
            { "allow": false, "type": "b", "major": 8, "minor": 1, "access": "rwm" }]))).sees("access").survives(),
        case("devices::wildcards_as_minus_one", rules(json!([{ "allow": false, "access": "rwm" }, { "allow": true, "type": "c", "major": -1, "minor": -1, "access": "r" }])))
            .sees("access"),
        case("devices::unknown_access", rules(json!([{ "allow": true, "type": "c", "major": 1, "minor": 1, "access": "rx" }]))).sees("access").ours_refuses("linux.resources.devices", "runc drops letters that it does not know"),
        case("devices::default_devices_cannot_be_denied", rules(json!([{ "allow": true, "access": "rwm" }, { "allow": false, "type": "c", "major": 1, "minor": 3, "access": "rwm" }])))
            .sees("access"),
    ]
}
