//! `linux.maskedPaths` and `linux.readonlyPaths`.

use serde_json::json;

use crate::case::{Case, Fixture, case};

/// The group.
// A table: one case a line where it fits.
#[rustfmt::skip]
pub fn all() -> Vec<Case> {
    let masked = |path: &str| json!({ "linux": { "maskedPaths": [path] } });
    let readonly = |path: &str| json!({ "linux": { "readonlyPaths": [path] } });
    vec![
        case("paths::masked_file_is_empty", masked("/etc/passwd")).sees("mounts /etc/passwd")
            .both(json!({ "paths": { "/etc/passwd": { "kind": "character device", "device": "1:3" } } })),
        case("paths::masked_folder_is_empty_and_readonly", masked("/etc")).sees("mounts /etc")
            .both(json!({ "paths": { "/etc": { "count": 0, "write": "EROFS" } } })),
        case("paths::masked_path_that_is_missing", masked("/nothing/there")).sees("mounts"),
        case("paths::masked_file_of_proc", masked("/proc/version")).sees("mounts /proc/version"),
        case("paths::masked_folder_of_proc", masked("/proc/sys")).sees("mounts /proc/sys")
            .both(json!({ "paths": { "/proc/sys": { "count": 0 } } })),
        case("paths::masked_through_a_link", masked("/link")).with(&[Fixture::Link("$ROOT/link", "/etc/passwd")]).sees("mounts /etc/passwd"),
        case("paths::masked_relative", masked("etc/passwd")).sees("mounts /etc/passwd").survives(),
        case("paths::readonly_folder", readonly("/tmp")).sees("mounts /tmp").both(json!({ "paths": { "/tmp": { "write": "EROFS" } } })),
        case("paths::readonly_file", readonly("/etc/passwd")).sees("mounts /etc/passwd")
            .both(json!({ "paths": { "/etc/passwd": { "write": "EROFS" } } })),
        case("paths::readonly_path_that_is_missing", readonly("/nothing/there")).sees("mounts"),
        case("paths::readonly_sys_of_proc", readonly("/proc/sys")).sees("mounts /proc/sys/kernel/hostname")
            .both(json!({ "paths": { "/proc/sys/kernel/hostname": { "write": "EROFS" } } })),
        case("paths::writable_sys_of_proc", json!({ "linux": { "readonlyPaths": [] } })).sees("mounts /proc/sys/kernel/hostname")
            .both(json!({ "paths": { "/proc/sys/kernel/hostname": { "write": "ok" } } })),
        case("paths::readonly_keeps_other_flags", json!({ "linux": { "readonlyPaths": ["/m"] }, "mounts+": [
            { "type": "tmpfs", "source": "tmpfs", "destination": "/m", "options": ["nosuid", "nodev", "noexec"] }] })).sees("mounts /m"),
        case("paths::both_masked_and_readonly", json!({ "linux": { "maskedPaths": ["/etc"], "readonlyPaths": ["/etc"] } })).sees("mounts /etc"),
    ]
}
