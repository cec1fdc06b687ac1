//! Step: what the container's mounts are made of, opened before its namespaces exist: the rootfs, binds, overlays, and the device
//! nodes of a container in a user namespace. All are detached mounts. The copy of the agent may still do here what the container
//! may not: a user namespace can neither map owners nor use an overlay's privileged attributes nor make nodes.

use std::{
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use oci_spec::runtime::{Mount, Spec};
use rustix::{
    fs::{CWD, Mode, OFlags},
    mount::{MountPropagationFlags, UnmountFlags},
    thread::UnshareFlags,
};

use super::{
    devices::{self, Node},
    ids::Ids,
    masks::empty_folder,
    mounts::{Kind, attach, below_trees, clone_tree, parse},
    options::Options,
    rootfs::{self, Rootfs},
};
use crate::{
    boot::{ROOTFS, TREES},
    error::{Context, Error, Result},
    sys::{self, mount_idmap, mount_setattr},
};

/// Detached mounts.
pub struct Sources {
    /// The rootfs.
    pub rootfs: OwnedFd,
    /// One a mount of the spec; `None` for what is made inside.
    pub mounts: Vec<Option<OwnedFd>>,
    /// Device nodes with their mounts; `None` if the container makes its nodes itself.
    pub nodes: Option<Vec<(Node, OwnedFd)>>,
}

impl Sources {
    /// Opens all of a container. `ids` are those of its user namespace, if it has one.
    pub fn open(spec: &Spec, rootfs: &Rootfs, ids: &Ids) -> Result<Self> {
        let trees = rustix::fs::open(
            TREES,
            OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .step(|| format!("open {TREES}"))?;
        let rootfs = rootfs.open(trees.as_fd())?;
        let list = spec.mounts().as_deref().unwrap_or_default();
        let mut mounts = Vec::new();
        for (index, mount) in list.iter().enumerate() {
            mounts.push(source(trees.as_fd(), index, mount, ids)?);
        }
        // Last, since it leaves the mount namespace that the trees are in.
        let nodes = match ids.is_empty() {
            true => None,
            false => Some(nodes(spec, list, ids)?),
        };
        Ok(Self {
            rootfs,
            mounts,
            nodes,
        })
    }
}

fn source(
    trees: BorrowedFd<'_>,
    index: usize,
    mount: &Mount,
    ids: &Ids,
) -> Result<Option<OwnedFd>> {
    let field = format!("mounts[{index}]");
    let at = mount.destination().display();
    let what = |step: &str| format!("{field} ({at}): {step}");
    let (kind, options) = parse(&field, mount)?;
    let tree = match kind {
        Kind::New(_) | Kind::Remount => return Ok(None),
        Kind::Overlay => overlay(trees, &field, &options)?,
        Kind::Bind => {
            let source = mount.source().as_deref().unwrap_or(Path::new("/"));
            let recursive = options.bind == Some(true);
            let tree = clone_tree(CWD, source, recursive)
                .step(|| what(&format!("bind {}", source.display())))?;
            if let Some(recursive) = idmap(mount, &options) {
                let own = Ids {
                    uid: mount.uid_mappings().clone().unwrap_or_default(),
                    gid: mount.gid_mappings().clone().unwrap_or_default(),
                };
                let namespace = match own.is_empty() {
                    true => ids.namespace()?,
                    false => own.namespace()?,
                };
                match mount_idmap(tree.as_fd(), recursive, namespace.as_fd()) {
                    Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                        let reason =
                            "owners cannot be mapped: the files are of the host's file server";
                        return Err(Error::field(format!("{field}.uidMappings"), reason));
                    }
                    other => other.step(|| what("map the owners (uidMappings, gidMappings)"))?,
                }
            }
            tree
        }
    };
    mount_setattr(tree.as_fd(), false, options.own).step(|| what("set attributes"))?;
    mount_setattr(tree.as_fd(), true, options.recursive)
        .step(|| what("set recursive attributes"))?;
    Ok(Some(tree))
}

/// Whether owners are mapped, and for the mounts below as well.
fn idmap(mount: &Mount, options: &Options) -> Option<bool> {
    let mapped = mount.uid_mappings().as_ref().is_some_and(|m| !m.is_empty());
    options.idmap.or(mapped.then_some(false))
}

fn overlay(trees: BorrowedFd<'_>, field: &str, options: &Options) -> Result<OwnedFd> {
    let (mut lower, mut upper, mut work, mut others) = (Vec::new(), None, None, Vec::new());
    for (key, value) in &options.data {
        match (key.as_str(), value) {
            ("lowerdir", Some(value)) => {
                for path in split(value) {
                    lower.push(tree(field, key, &path)?);
                }
            }
            ("upperdir", Some(value)) => upper = Some(tree(field, key, Path::new(value))?),
            ("workdir", Some(value)) => work = Some(tree(field, key, Path::new(value))?),
            (_, Some(value)) => others.push(format!("{key}={value}")),
            (_, None) => others.push(key.clone()),
        }
    }
    let name = format!("{field}.options");
    if lower.is_empty() {
        return Err(Error::field(name, "has no lowerdir"));
    }
    let upper = match (upper, work) {
        (None, None) => None,
        (Some(upper), Some(work)) => Some((upper, work)),
        _ => return Err(Error::field(name, "has only one of upperdir and workdir")),
    };
    let others = rootfs::overlay_options(&name, &others)?;
    rootfs::overlay(trees, &lower, upper.as_ref(), &others)
}

fn tree(field: &str, key: &str, path: &Path) -> Result<String> {
    below_trees(path)
        .and_then(|path| path.to_str().map(String::from))
        .ok_or_else(|| {
            let reason = format!("{key} {} is not one of the host's trees", path.display());
            Error::field(format!("{field}.options"), reason)
        })
}

/// overlayfs's own rule: colons separate, a backslash makes the next character ordinary.
fn split(list: &str) -> Vec<PathBuf> {
    let mut paths = vec![String::new()];
    let mut letters = list.chars();
    while let Some(letter) = letters.next() {
        let letter = match letter {
            ':' => {
                paths.push(String::new());
                continue;
            }
            '\\' => letters.next(),
            other => Some(other),
        };
        if let Some(last) = paths.last_mut() {
            last.extend(letter);
        }
    }
    paths.into_iter().map(PathBuf::from).collect()
}

/// Makes the nodes on a file system of their own, which only this process sees, and takes each as a mount.
fn nodes(spec: &Spec, mounts: &[Mount], ids: &Ids) -> Result<Vec<(Node, OwnedFd)>> {
    let linux = spec.linux().as_ref();
    let devices = linux.and_then(|linux| linux.devices().as_deref());
    let nodes = devices::nodes(mounts, devices.unwrap_or_default())?;
    let what = || "make device nodes".to_string();
    sys::unshare(UnshareFlags::NEWNS).step(what)?;
    rustix::mount::mount_change(
        "/",
        MountPropagationFlags::PRIVATE | MountPropagationFlags::REC,
    )
    .step(what)?;
    let folder = empty_folder(false).step(what)?;
    let point = rustix::fs::open(
        ROOTFS,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .step(what)?;
    attach(&folder, &point).step(what)?;
    let mut made = Vec::new();
    for (index, node) in nodes.into_iter().enumerate() {
        let name = PathBuf::from(index.to_string());
        let outer = (ids.outer_uid(node.owner.0), ids.outer_gid(node.owner.1));
        let (Some(uid), Some(gid)) = outer else {
            return Err(Error::field(
                &node.field,
                "has an owner that is not mapped into the user namespace",
            ));
        };
        let tree = node
            .make(&folder, &name, (uid, gid))
            .and_then(|()| clone_tree(&folder, &name, false))
            .step(|| node.what())?;
        made.push((node, tree));
    }
    rustix::mount::unmount(ROOTFS, UnmountFlags::DETACH).step(what)?;
    Ok(made)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lower_layers_are_split_as_overlayfs_does() {
        let paths = |text: &str| split(text);
        assert_eq!(paths("/a:/b"), [PathBuf::from("/a"), PathBuf::from("/b")]);
        assert_eq!(paths("/a\\:b\\\\"), [PathBuf::from("/a:b\\")]);
        assert_eq!(paths("/a\\"), [PathBuf::from("/a")]);
    }
}
