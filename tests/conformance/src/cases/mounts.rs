//! `root` and `mounts`: types, options, order, propagation, targets.

use serde_json::{Value, json};

use crate::case::{Case, Fixture, case};
use crate::host::When;

fn mounts(list: Value) -> Value {
    json!({ "mounts+": list })
}

fn tmpfs(to: &str, options: &[&str]) -> Value {
    mounts(json!([{ "type": "tmpfs", "source": "tmpfs", "destination": to, "options": options }]))
}

fn bind(from: &str, to: &str, options: &[&str]) -> Value {
    mounts(json!([{ "type": "bind", "source": from, "destination": to, "options": options }]))
}

const VOLUME: &[Fixture] = &[
    Fixture::Folder("$DIR/volume/inner"),
    Fixture::File("$DIR/volume/file", "text"),
    Fixture::File("$DIR/single", "one"),
];

/// The group.
// A table: one case a line where it fits.
#[rustfmt::skip]
pub fn all() -> Vec<Case> {
    let look = "mounts /m";
    let at = |point: &str, what: Value| json!({ "mounts": { "at": { point: what } } });
    let mut cases = vec![
        // root
        case("mounts::root_writable", json!({})).sees("mounts / /etc/passwd").both(json!({ "paths": { "/": { "write": "ok" } } })),
        case("mounts::root_readonly", json!({ "root": { "readonly": true } }))
            .sees("mounts / /etc/passwd /tmp").both(json!({ "paths": { "/": { "write": "EROFS" }, "/etc/passwd": { "write": "EROFS" } } })),
        case("mounts::root_readonly_with_a_writable_mount", json!({ "root": { "readonly": true },
            "mounts+": [{ "type": "tmpfs", "source": "tmpfs", "destination": "/tmp" }] }))
            .sees("mounts / /tmp").both(json!({ "paths": { "/": { "write": "EROFS" }, "/tmp": { "write": "ok" } } })),
        case("mounts::root_missing", json!({ "root": { "path": "/no/such/rootfs" } })).sees("mounts").refused(&["/no/such/rootfs"]),
        case("mounts::root_that_is_a_file", json!({ "root": { "path": "$ROOT/etc/passwd" } })).sees("mounts").refused(&["root"]),
        case("mounts::root_left_out", json!({ "root": null })).sees("mounts").refused(&["root"]),
        // tmpfs
        case("mounts::tmpfs_of_a_size", tmpfs("/m", &["size=1m", "mode=700", "nosuid"])).sees(look)
            .both(json!({ "paths": { "/m": { "mode": "700" } } })),
        case("mounts::tmpfs_of_an_owner", tmpfs("/m", &["uid=1000", "gid=1001", "mode=0751"])).sees(look)
            .both(json!({ "paths": { "/m": { "mode": "751", "owner": "1000:1001" } } })),
        case("mounts::tmpfs_with_inodes", tmpfs("/m", &["nr_inodes=100"])).sees(look),
        case("mounts::tmpfs_without_options", tmpfs("/m", &[])).sees(look),
        case("mounts::tmpfs_over_a_folder_keeps_its_mode", tmpfs("/tmp", &[])).sees("mounts /tmp"),
        case("mounts::tmpfs_readonly", tmpfs("/m", &["ro"])).sees(look).both(json!({ "paths": { "/m": { "write": "EROFS" } } })),
        case("mounts::tmpfs_noexec", mounts(json!([{ "type": "tmpfs", "source": "tmpfs", "destination": "/m", "options": ["noexec", "nodev", "nosuid", "noatime"] }]))).sees(look)
            .both(at("/m", json!({ "options": ["noatime", "nodev", "noexec", "nosuid", "rw"] }))),
        case("mounts::tmpfs_with_copy_up", tmpfs("/etc", &["tmpcopyup"])).sees("mounts /etc /etc/passwd")
            .both(json!({ "paths": { "/etc": { "names": ["passwd"] } } })),
        case("mounts::tmpfs_with_a_bad_option", tmpfs("/m", &["sizes=1m"])).sees(look).refused(&["mounts"]),
        case("mounts::tmpfs_with_a_bad_value", tmpfs("/m", &["size=big"])).sees(look).refused(&["mounts"]),
        case("mounts::last_of_two_options_wins", tmpfs("/m", &["ro", "rw", "noexec", "exec"])).sees(look)
            .both(json!({ "paths": { "/m": { "write": "ok" } } })),
        // bind
        case("mounts::bind_of_a_folder", bind("$DIR/volume", "/m", &["bind"])).with(VOLUME).sees("mounts /m /m/file /m/inner")
            .both(json!({ "paths": { "/m/file": { "text": "text", "write": "ok" } } })),
        case("mounts::bind_of_a_file", bind("$DIR/single", "/m", &["bind"])).with(VOLUME).sees(look)
            .both(json!({ "paths": { "/m": { "text": "one" } } })),
        case("mounts::bind_of_a_file_over_a_file", bind("$DIR/single", "/etc/passwd", &["bind", "ro"])).with(VOLUME).sees("mounts /etc/passwd")
            .both(json!({ "paths": { "/etc/passwd": { "text": "one", "write": "EROFS" } } })),
        case("mounts::bind_readonly", bind("$DIR/volume", "/m", &["rbind", "ro"])).with(VOLUME).sees("mounts /m /m/file")
            .both(json!({ "paths": { "/m": { "write": "EROFS" }, "/m/file": { "write": "EROFS" } } })),
        case("mounts::bind_recursively_readonly", bind("$DIR/volume", "/m", &["rbind", "rro"])).with(VOLUME).sees("mounts /m")
            .both(json!({ "paths": { "/m": { "write": "EROFS" } } })),
        case("mounts::bind_with_flags", bind("$DIR/volume", "/m", &["bind", "nosuid", "nodev", "noexec", "noatime", "nodiratime"])).with(VOLUME).sees(look)
            .both(at("/m", json!({ "options": ["noatime", "nodev", "nodiratime", "noexec", "nosuid", "rw"] }))),
        case("mounts::bind_with_recursive_flags", bind("$DIR/volume", "/m", &["rbind", "rnosuid", "rnodev", "rnoexec", "rnoatime"])).with(VOLUME).sees(look)
            .both(at("/m", json!({ "options": ["noatime", "nodev", "noexec", "nosuid", "rw"] }))),
        case("mounts::bind_by_option_alone", mounts(json!([{ "source": "$DIR/volume", "destination": "/m", "options": ["rbind"] }]))).with(VOLUME).sees(look),
        case("mounts::bind_with_type_none", mounts(json!([{ "type": "none", "source": "$DIR/volume", "destination": "/m", "options": ["rbind"] }]))).with(VOLUME).sees(look),
        case("mounts::bind_with_type_bind_alone", mounts(json!([{ "type": "bind", "source": "$DIR/volume", "destination": "/m" }]))).with(VOLUME).sees(look)
            .runc_refuses("runc wants the option bind beside the type bind; the type says enough"),
        case("mounts::bind_of_what_is_missing", bind("$DIR/nothing", "/m", &["bind"])).sees(look).refused(&["nothing"]),
        case("mounts::bind_with_a_relative_source", bind("volume", "/m", &["bind"])).sees(look).survives(),
        case("mounts::bind_of_a_file_over_a_folder", bind("$DIR/single", "/tmp", &["bind"])).with(VOLUME).sees("mounts /tmp").refused(&["/tmp"]),
        case("mounts::bind_of_a_folder_over_a_file", bind("$DIR/volume", "/etc/passwd", &["bind"])).with(VOLUME).sees("mounts").refused(&["/etc/passwd"]),
        case("mounts::the_same_source_twice", mounts(json!([
            { "type": "bind", "source": "$DIR/volume", "destination": "/a", "options": ["bind"] },
            { "type": "bind", "source": "$DIR/volume", "destination": "/b", "options": ["bind", "ro"] }]))).with(VOLUME)
            .sees("mounts /a /b").both(json!({ "paths": { "/a": { "write": "ok" }, "/b": { "write": "EROFS" } } })),
        case("mounts::a_bind_with_propagation", bind("$DIR/volume", "/m", &["rbind", "rslave"])).with(VOLUME).sees(look),
        case("mounts::a_private_bind", bind("$DIR/volume", "/m", &["bind", "private"])).with(VOLUME).sees(look),
        case("mounts::a_shared_bind", bind("$DIR/volume", "/m", &["bind", "shared"])).with(VOLUME).sees(look),
        case("mounts::an_unbindable_bind", bind("$DIR/volume", "/m", &["bind", "unbindable"])).with(VOLUME).sees(look),
        case("mounts::a_bind_with_data", bind("$DIR/volume", "/m", &["bind", "size=1m"])).with(VOLUME).sees(look)
            .ours_refuses("mounts", "a bind takes no data; runc passes it to mount(2), which drops it"),
        // other types
        case("mounts::proc_with_hidepid", json!({ "mounts+": [{ "type": "proc", "source": "proc", "destination": "/p", "options": ["hidepid=2"] }] }))
            .sees("mounts").survives(),
        case("mounts::a_second_proc", mounts(json!([{ "type": "proc", "source": "proc", "destination": "/p" }]))).sees("mounts").survives(),
        case("mounts::sysfs_readonly", json!({})).sees("mounts /sys").both(json!({ "paths": { "/sys": { "write": "EROFS" } } })),
        case("mounts::a_writable_sysfs", mounts(json!([{ "type": "sysfs", "source": "sysfs", "destination": "/s", "options": ["rw"] }]))).sees("mounts"),
        case("mounts::a_second_mqueue", mounts(json!([{ "type": "mqueue", "source": "mqueue", "destination": "/q" }]))).sees("mounts /q"),
        case("mounts::a_devpts_with_other_modes", mounts(json!([{ "type": "devpts", "source": "devpts", "destination": "/d",
            "options": ["newinstance", "ptmxmode=0600", "mode=0600", "uid=5"] }]))).sees("mounts /d/ptmx"),
        case("mounts::cgroup_writable", json!({ "mounts": [
            { "type": "proc", "source": "proc", "destination": "/proc" },
            { "type": "tmpfs", "source": "tmpfs", "destination": "/dev" },
            { "type": "sysfs", "source": "sysfs", "destination": "/sys", "options": ["ro"] },
            { "type": "cgroup", "source": "cgroup", "destination": "/sys/fs/cgroup", "options": ["rw"] }] }))
            .cgroup(json!({ "write": "ok" })),
        case("mounts::cgroup_readonly", json!({})).cgroup(json!({ "write": "EROFS", "version": 2, "path": "/" })),
        case("mounts::type_that_is_unknown", mounts(json!([{ "type": "nonsensefs", "source": "x", "destination": "/m" }]))).sees(look).refused(&["nonsensefs"]),
        case("mounts::overlay", mounts(json!([{ "type": "overlay", "source": "overlay", "destination": "/m",
            "options": ["lowerdir=$DIR/volume:$DIR/volume/inner"] }]))).with(VOLUME).sees("mounts /m").survives(),
        case("mounts::idmapped_bind", mounts(json!([{ "type": "bind", "source": "$DIR/volume", "destination": "/m", "options": ["bind", "idmap"],
            "uidMappings": [{ "containerID": 0, "hostID": 1000, "size": 1000 }], "gidMappings": [{ "containerID": 0, "hostID": 1000, "size": 1000 }] }])))
            .with(VOLUME).sees(look).beyond(When::OldRunc).survives(),
        case("mounts::remount_of_what_is_there", mounts(json!([{ "type": "bind", "source": "none", "destination": "/tmp", "options": ["bind", "remount", "ro"] }])))
            .sees("mounts /tmp").survives(),
        // targets
        case("mounts::order_is_kept", mounts(json!([
            { "type": "tmpfs", "source": "tmpfs", "destination": "/a" }, { "type": "tmpfs", "source": "tmpfs", "destination": "/a/b" },
            { "type": "tmpfs", "source": "tmpfs", "destination": "/a/b/c" }, { "type": "tmpfs", "source": "tmpfs", "destination": "/z" }]))).sees("mounts /a"),
        case("mounts::a_later_mount_covers_an_earlier", mounts(json!([
            { "type": "tmpfs", "source": "tmpfs", "destination": "/a", "options": ["mode=700"] },
            { "type": "tmpfs", "source": "tmpfs", "destination": "/a", "options": ["mode=711"] }]))).sees("mounts /a").ours(json!({ "paths": { "/a": { "mode": "711" } } })),
        case("mounts::a_parent_after_its_child", mounts(json!([
            { "type": "tmpfs", "source": "tmpfs", "destination": "/a/b" }, { "type": "tmpfs", "source": "tmpfs", "destination": "/a" }]))).sees("mounts /a"),
        case("mounts::target_is_made_with_parents", tmpfs("/deep/er/than/there", &[])).sees("mounts /deep"),
        case("mounts::target_with_dots", tmpfs("/tmp/../m/./x", &[])).sees("mounts"),
        case("mounts::target_above_the_root", tmpfs("/../../../m", &[])).sees("mounts /m"),
        case("mounts::target_through_a_link", tmpfs("/link/x", &[])).with(&[Fixture::Link("$ROOT/link", "/tmp")]).sees("mounts /tmp")
            .both(json!({ "paths": { "/tmp": { "names": ["x"] } } })),
        case("mounts::target_through_a_link_that_leaves", tmpfs("/link/x", &[])).with(&[Fixture::Link("$ROOT/link", "../../../../../../tmp")])
            .sees("mounts /tmp").both(json!({ "paths": { "/tmp": { "names": ["x"] } } })),
        case("mounts::target_through_a_dangling_link", tmpfs("/link/x", &[])).with(&[Fixture::Link("$ROOT/link", "/not/there")]).sees("mounts /not"),
        case("mounts::target_that_is_relative", tmpfs("m", &[])).sees("mounts /m").survives(),
        case("mounts::target_that_is_the_root", tmpfs("/", &[])).sees("mounts /").survives(),
        case("mounts::target_with_odd_names", tmpfs("/a b\tc\\d", &[])).sees("mounts"),
    ];
    for (name, options) in [("relatime", "relatime"), ("strictatime", "strictatime"), ("noatime", "noatime"), ("sync", "sync"), ("lazytime", "lazytime"),
        ("dirsync", "dirsync"), ("nosymfollow", "nosymfollow")] {
        cases.push(case(&format!("mounts::tmpfs_{name}"), tmpfs("/m", &[options])).sees("mounts"));
    }
    cases.push(case("mounts::tmpfs_mand", tmpfs("/m", &["mand"])).sees("mounts").ours_refuses("mand", "kernels from 5.15 on have no mandatory locks; runc passes the flag, and the kernel drops it"));
    for kind in ["private", "rprivate", "slave", "rslave", "shared", "rshared"] {
        cases.push(case(&format!("mounts::rootfs_propagation_{kind}"), json!({ "linux": { "rootfsPropagation": kind } })).sees("mounts"));
    }
    cases.push(case("mounts::rootfs_propagation_unbindable", json!({ "linux": { "rootfsPropagation": "unbindable" } })).sees("mounts")
        .runc_refuses("runc 1.1 makes the host's side unbindable first, and cannot bind the rootfs then"));
    cases.push(case("mounts::rootfs_propagation_unknown", json!({ "linux": { "rootfsPropagation": "wild" } })).sees("mounts").refused(&["rootfsPropagation"]));
    cases.push(case("mounts::the_default_ones", json!({})).sees("mounts").both(at("/dev/shm", json!({ "type": "tmpfs", "propagation": ["private"] }))));
    cases
}
