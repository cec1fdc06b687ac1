//! Step: device nodes and the links of `/dev`.

use std::{
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use oci_spec::runtime::{LinuxDevice, LinuxDeviceType, Mount};
use rustix::{
    fs::{AtFlags, FileType, Gid, Mode, Uid, makedev},
    io::Errno,
};

use super::{
    mounts::attach,
    path::{PointKind, make_in_root},
};
use crate::error::{Context, Error, Result};

/// The devices every container gets (runtime-spec, config-linux, "Default Devices").
const DEFAULT: [(&str, u32, u32); 6] = [
    ("/dev/null", 1, 3),
    ("/dev/zero", 1, 5),
    ("/dev/full", 1, 7),
    ("/dev/random", 1, 8),
    ("/dev/urandom", 1, 9),
    ("/dev/tty", 5, 0),
];

const LINKS: [(&str, &str); 5] = [
    ("/dev/fd", "/proc/self/fd"),
    ("/dev/stdin", "/proc/self/fd/0"),
    ("/dev/stdout", "/proc/self/fd/1"),
    ("/dev/stderr", "/proc/self/fd/2"),
    ("/dev/ptmx", "pts/ptmx"),
];

/// A device node to make.
pub struct Node {
    /// Field of the spec it comes from.
    pub field: String,
    /// Its owner: user and group in the container.
    pub owner: (u32, u32),
    path: PathBuf,
    kind: FileType,
    major: u32,
    minor: u32,
    mode: u32,
}

impl Node {
    /// What is tried, for errors.
    pub fn what(&self) -> String {
        format!("{} ({}): make the node", self.field, self.path.display())
    }

    /// Makes it as `name` in a folder.
    pub fn make(
        &self,
        folder: impl AsFd,
        name: &Path,
        owner: (u32, u32),
    ) -> std::result::Result<(), Errno> {
        let device = makedev(self.major, self.minor);
        let mode = Mode::from_raw_mode(self.mode);
        rustix::fs::mknodat(&folder, name, self.kind, mode, device)?;
        rustix::fs::chownat(
            &folder,
            name,
            Some(Uid::from_raw(owner.0)),
            Some(Gid::from_raw(owner.1)),
            AtFlags::SYMLINK_NOFOLLOW,
        )
    }
}

/// Checks `linux.devices`.
pub fn check(devices: &[LinuxDevice]) -> Result<()> {
    for (index, device) in devices.iter().enumerate() {
        node(index, device)?;
    }
    Ok(())
}

fn node(index: usize, device: &LinuxDevice) -> Result<Node> {
    let field = format!("linux.devices[{index}]");
    if !device.path().is_absolute() {
        return Err(Error::field(format!("{field}.path"), "is not absolute"));
    }
    let kind = match device.typ() {
        LinuxDeviceType::C | LinuxDeviceType::U => FileType::CharacterDevice,
        LinuxDeviceType::B => FileType::BlockDevice,
        LinuxDeviceType::P => FileType::Fifo,
        LinuxDeviceType::A => return Err(Error::field(format!("{field}.type"), "is not a type")),
    };
    let number = |name: &str, value: i64| {
        u32::try_from(value).map_err(|_| Error::field(format!("{field}.{name}"), "is out of range"))
    };
    let (major, minor) = if kind == FileType::Fifo {
        (0, 0)
    } else {
        (
            number("major", device.major())?,
            number("minor", device.minor())?,
        )
    };
    Ok(Node {
        path: device.path().clone(),
        kind,
        major,
        minor,
        mode: device.file_mode().unwrap_or(0o666) & 0o7777,
        owner: (device.uid().unwrap_or(0), device.gid().unwrap_or(0)),
        field,
    })
}

/// The nodes of a container: those of the spec and the default ones; none if the spec binds a `/dev` of its own.
pub fn nodes(mounts: &[Mount], devices: &[LinuxDevice]) -> Result<Vec<Node>> {
    let mut nodes = Vec::new();
    if has_own_dev(mounts) {
        return Ok(nodes);
    }
    for (index, device) in devices.iter().enumerate() {
        nodes.push(node(index, device)?);
    }
    for (path, major, minor) in DEFAULT {
        if !nodes.iter().any(|node| node.path == Path::new(path)) {
            nodes.push(Node {
                field: "default devices".into(),
                path: path.into(),
                kind: FileType::CharacterDevice,
                major,
                minor,
                mode: 0o666,
                owner: (0, 0),
            });
        }
    }
    Ok(nodes)
}

fn has_own_dev(mounts: &[Mount]) -> bool {
    mounts.iter().any(|mount| {
        mount.destination() == Path::new("/dev") && mount.typ().as_deref() == Some("bind")
    })
}

/// Makes nodes and links, or takes the nodes that were made outside of the container's user namespace.
pub fn make_all(
    root: BorrowedFd<'_>,
    mounts: &[Mount],
    devices: &[LinuxDevice],
    made: Option<Vec<(Node, OwnedFd)>>,
) -> Result<()> {
    if has_own_dev(mounts) {
        return Ok(());
    }
    match made {
        Some(made) => {
            for (node, tree) in made {
                make_in_root(root, &node.path, PointKind::File, 0o644)
                    .and_then(|point| attach(&tree, &point))
                    .step(|| node.what())?;
            }
        }
        None => {
            for node in nodes(mounts, devices)? {
                make_node(root, &node).step(|| node.what())?;
            }
        }
    }
    for (path, target) in LINKS {
        make_link(root, path, target).step(|| format!("make link {path}"))?;
    }
    Ok(())
}

fn make_node(root: BorrowedFd<'_>, node: &Node) -> std::result::Result<(), Errno> {
    let (Some(folder), Some(name)) = (node.path.parent(), node.path.file_name()) else {
        return Err(Errno::INVAL);
    };
    let folder = make_in_root(root, folder, PointKind::Folder, 0o755)?;
    match node.make(&folder, Path::new(name), node.owner) {
        // The image or a bind brought it: fine if it is the same device.
        Err(Errno::EXIST) => {
            let stat = rustix::fs::statat(&folder, name, AtFlags::SYMLINK_NOFOLLOW)?;
            let device = makedev(node.major, node.minor);
            let same = FileType::from_raw_mode(stat.st_mode) == node.kind
                && (node.kind == FileType::Fifo || stat.st_rdev == device);
            if same { Ok(()) } else { Err(Errno::EXIST) }
        }
        other => other,
    }
}

fn make_link(root: BorrowedFd<'_>, path: &str, target: &str) -> std::result::Result<(), Errno> {
    let (Some(folder), Some(name)) = (Path::new(path).parent(), Path::new(path).file_name()) else {
        return Err(Errno::INVAL);
    };
    let folder = make_in_root(root, folder, PointKind::Folder, 0o755)?;
    if path == "/dev/ptmx" {
        // A ptmx node of the image would belong to another devpts than the container's.
        let _ = rustix::fs::unlinkat(&folder, name, AtFlags::empty());
    }
    match rustix::fs::symlinkat(target, &folder, name) {
        Err(Errno::EXIST) => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn devices(json: &str) -> Vec<LinuxDevice> {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn fuse_and_fifos_pass() {
        check(&devices(
            r#"[{"path":"/dev/fuse","type":"c","major":10,"minor":229,"fileMode":438,"uid":0,"gid":0},
            {"path":"/dev/pipe","type":"p","major":0,"minor":0}]"#,
        ))
        .unwrap();
    }

    #[test]
    fn relative_paths_and_negative_numbers_are_refused_by_field() {
        let error = check(&devices(r#"[{"path":"x","type":"c","major":1,"minor":1}]"#));
        assert!(error.unwrap_err().text().contains("linux.devices[0].path"));
        let error = check(&devices(
            r#"[{"path":"/x","type":"c","major":-1,"minor":1}]"#,
        ));
        assert!(error.unwrap_err().text().contains("linux.devices[0].major"));
    }
}
