//! Device nodes of `/dev`, and which devices the cgroup lets the container use.

use std::{
    fs,
    os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt},
};

use serde_json::{Map, Value, json};

use crate::sys;

/// The entries of `/dev`, with what opening them says.
pub fn nodes() -> Value {
    let mut all = Map::new();
    for entry in fs::read_dir("/dev").into_iter().flatten().flatten() {
        let path = entry.path();
        let Ok(meta) = fs::symlink_metadata(&path) else {
            continue;
        };
        let kind = meta.file_type();
        let path = path.to_string_lossy().into_owned();
        let mode = format!("{:o}", meta.permissions().mode() & 0o7777);
        let about = if kind.is_symlink() {
            let target = fs::read_link(&path).unwrap_or_default();
            json!({ "link": target.to_string_lossy() })
        } else if kind.is_dir() {
            json!({ "folder": mode })
        } else {
            let letter = if kind.is_char_device() {
                'c'
            } else if kind.is_block_device() {
                'b'
            } else {
                'p'
            };
            let (major, minor) = (libc::major(meta.rdev()), libc::minor(meta.rdev()));
            let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
            json!({
                "is": format!("{letter} {major}:{minor}"), "mode": mode, "owner": format!("{}:{}", meta.uid(), meta.gid()),
                "read": sys::open(&path, libc::O_RDONLY | flags), "write": sys::open(&path, libc::O_WRONLY | flags),
            })
        };
        all.insert(entry.file_name().to_string_lossy().into_owned(), about);
    }
    all.into()
}

/// Devices that most machines have, and some that none has: a node is made for each and opened. `denied` is EPERM,
/// what the cgroup says; whether the device is there is the machine's matter.
pub fn access() -> Value {
    let mut all = Map::new();
    for (letter, major, minor) in [
        ('c', 1, 3),
        ('c', 1, 5),
        ('c', 1, 8),
        ('c', 1, 1),
        ('c', 1, 11),
        ('c', 4, 1),
        ('c', 5, 1),
        ('c', 5, 2),
        ('c', 10, 200),
        ('c', 10, 229),
        ('c', 10, 232),
        ('c', 136, 250),
        ('c', 250, 7),
        ('b', 7, 0),
        ('b', 8, 0),
        ('b', 8, 1),
        ('b', 240, 0),
        ('b', 240, 1),
    ] {
        let path = format!("/dev/.probe-{letter}-{major}-{minor}");
        let mode = if letter == 'c' {
            libc::S_IFCHR
        } else {
            libc::S_IFBLK
        };
        let made = sys::mknod(&path, mode | 0o600, major, minor);
        let allowed =
            |flags| match sys::open(&path, flags | libc::O_NONBLOCK | libc::O_NOCTTY).as_str() {
                "EPERM" => "denied",
                "ENOENT" => "no node",
                _ => "allowed",
            };
        let seen = json!([
            made,
            allowed(libc::O_RDONLY),
            allowed(libc::O_WRONLY),
            allowed(libc::O_RDWR)
        ]);
        let _ = fs::remove_file(&path);
        all.insert(format!("{letter} {major}:{minor}"), seen);
    }
    all.into()
}
