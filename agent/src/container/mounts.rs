//! Step: the mounts of the spec, and the paths that are masked or read-only. All are made detached, get their attributes and are
//! then moved onto a descriptor that was resolved inside the rootfs: no path is resolved twice.

use std::{
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
};

use oci_spec::runtime::Mount;
use rustix::{
    fs::{CWD, OFlags},
    io::Errno,
    mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags},
};

use super::{
    options::Options,
    path::{PointKind, kind_of, make_in_root, open_in_root},
    rootfs::fs_error,
};
use crate::{
    error::{Context, Error, Result},
    sys::{MountAttr, attr, mount_setattr},
};

/// Checks what can be checked without mounting.
pub fn check(mounts: &[Mount]) -> Result<()> {
    for (index, mount) in mounts.iter().enumerate() {
        let field = format!("mounts[{index}]");
        if !mount.destination().is_absolute() {
            return Err(Error::field(
                format!("{field}.destination"),
                "is not absolute",
            ));
        }
        if mount.uid_mappings().as_ref().is_some_and(|m| !m.is_empty())
            || mount.gid_mappings().as_ref().is_some_and(|m| !m.is_empty())
        {
            return Err(Error::refused(format!("{field}.uidMappings")));
        }
        let options = parse_options(&field, mount)?;
        if options.bind.is_some() {
            if !mount.source().as_deref().is_some_and(Path::is_absolute) {
                return Err(Error::field(format!("{field}.source"), "is not absolute"));
            }
        } else {
            fs_type(&field, mount)?;
        }
    }
    Ok(())
}

fn parse_options(field: &str, mount: &Mount) -> Result<Options> {
    let none = Vec::new();
    let options = mount.options().as_ref().unwrap_or(&none);
    Options::parse(field, mount.typ().as_deref() == Some("bind"), options)
}

/// The kernel's name of the file system; a closed list.
fn fs_type(field: &str, mount: &Mount) -> Result<&'static str> {
    Ok(match mount.typ().as_deref() {
        Some("proc") => "proc",
        Some("sysfs") => "sysfs",
        Some("tmpfs") => "tmpfs",
        Some("devpts") => "devpts",
        Some("mqueue") => "mqueue",
        Some("cgroup" | "cgroup2") => "cgroup2",
        other => {
            let name = other.unwrap_or("");
            return Err(Error::refused(format!("{field}.type \"{name}\"")));
        }
    })
}

/// Makes the spec's mounts in their order.
pub fn mount_all(root: BorrowedFd<'_>, mounts: &[Mount]) -> Result<()> {
    for (index, mount) in mounts.iter().enumerate() {
        let field = format!("mounts[{index}]");
        let options = parse_options(&field, mount)?;
        let at = mount.destination().display();
        let what = |step: &str| format!("{field} ({at}): {step}");
        let (tree, point) = match options.bind {
            Some(recursive) => {
                let source = mount.source().as_deref().unwrap_or(Path::new("/"));
                let tree = clone_tree(CWD, source, recursive)
                    .step(|| what(&format!("bind {}", source.display())))?;
                let kind = kind_of(&tree).step(|| what("stat"))?;
                let point = make_in_root(root, mount.destination(), kind, 0o755)
                    .step(|| what("make the mount point"))?;
                (tree, point)
            }
            None => {
                let existed = open_in_root(root, mount.destination(), OFlags::PATH).ok();
                let point = make_in_root(root, mount.destination(), PointKind::Folder, 0o755)
                    .step(|| what("make the mount point"))?;
                let tree = new_fs(fs_type(&field, mount)?, &options, existed.as_ref(), &what)?;
                (tree, point)
            }
        };
        if options.bind.is_some() {
            mount_setattr(tree.as_fd(), false, options.own).step(|| what("set attributes"))?;
        }
        mount_setattr(tree.as_fd(), true, options.recursive)
            .step(|| what("set recursive attributes"))?;
        attach(&tree, &point).step(|| what("attach"))?;
        // A mount takes its propagation where it was attached, so this comes last.
        if let Some((propagation, recursive)) = options.propagation {
            let change = MountAttr {
                propagation,
                ..MountAttr::default()
            };
            mount_setattr(tree.as_fd(), recursive, change).step(|| what("set propagation"))?;
        }
    }
    Ok(())
}

fn new_fs(
    name: &str,
    options: &Options,
    existed: Option<&OwnedFd>,
    what: &dyn Fn(&str) -> String,
) -> Result<OwnedFd> {
    let context = rustix::mount::fsopen(name, FsOpenFlags::FSOPEN_CLOEXEC)
        .step(|| what(&format!("open {name}")))?;
    let failed = |step: String| {
        let text = what(&step);
        |error| fs_error(&context, text, error)
    };
    rustix::mount::fsconfig_set_string(&context, "source", name)
        .map_err(failed("set the source".into()))?;
    for flag in &options.flags {
        rustix::mount::fsconfig_set_flag(&context, flag)
            .map_err(failed(format!("option {flag}")))?;
    }
    for (key, value) in &options.data {
        match value {
            Some(value) => rustix::mount::fsconfig_set_string(&context, key, value),
            None => rustix::mount::fsconfig_set_flag(&context, key),
        }
        .map_err(failed(format!("option {key}")))?;
    }
    // Like runc: a tmpfs without a mode takes that of the folder it covers.
    if let ("tmpfs", false, Some(folder)) = (name, options.has_data("mode"), existed) {
        let mode = rustix::fs::fstat(folder).step(|| what("stat"))?.st_mode & 0o7777;
        rustix::mount::fsconfig_set_string(&context, "mode", format!("{mode:o}"))
            .map_err(failed("option mode".into()))?;
    }
    rustix::mount::fsconfig_create(&context).map_err(failed(format!("mount {name}")))?;
    rustix::mount::fsmount(
        &context,
        FsMountFlags::FSMOUNT_CLOEXEC,
        options.fsmount_attr(),
    )
    .map_err(failed(format!("mount {name}")))
}

/// A detached copy of the mount at `path`.
pub fn clone_tree(
    at: impl AsFd,
    path: &Path,
    recursive: bool,
) -> std::result::Result<OwnedFd, Errno> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    if recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    if path.as_os_str().is_empty() {
        flags |= OpenTreeFlags::AT_EMPTY_PATH;
    }
    rustix::mount::open_tree(at, path, flags)
}

/// Attaches a detached mount on a resolved mount point.
pub fn attach(tree: &OwnedFd, point: &OwnedFd) -> std::result::Result<(), Errno> {
    rustix::mount::move_mount(
        tree,
        "",
        point,
        "",
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH,
    )
}

const READONLY: MountAttr = MountAttr {
    set: attr::RDONLY,
    clear: 0,
    propagation: 0,
};

/// `linux.readonlyPaths`: each is bound onto itself, read-only. A path that does not exist is passed over, as the spec wants.
pub fn make_readonly(root: BorrowedFd<'_>, paths: &[String]) -> Result<()> {
    for path in paths {
        let what = |step: &str| format!("linux.readonlyPaths ({path}): {step}");
        let point = match open_in_root(root, Path::new(path), OFlags::PATH) {
            Ok(point) => point,
            Err(Errno::NOENT) => continue,
            Err(error) => return Err(Error::step(what("open"), error)),
        };
        let tree = clone_tree(&point, Path::new(""), true).step(|| what("bind"))?;
        mount_setattr(tree.as_fd(), false, READONLY).step(|| what("set read-only"))?;
        attach(&tree, &point).step(|| what("attach"))?;
    }
    Ok(())
}

/// `linux.maskedPaths`: an empty read-only folder over folders, the null device over files. What does not exist
/// is passed over.
pub fn mask(root: BorrowedFd<'_>, paths: &[String]) -> Result<()> {
    let mut folder: Option<OwnedFd> = None;
    for path in paths {
        let what = |step: &str| format!("linux.maskedPaths ({path}): {step}");
        let point = match open_in_root(root, Path::new(path), OFlags::PATH) {
            Ok(point) => point,
            Err(Errno::NOENT | Errno::NOTDIR) => continue,
            Err(error) => return Err(Error::step(what("open"), error)),
        };
        let tree = match (kind_of(&point).step(|| what("stat"))?, &folder) {
            (PointKind::File, _) => {
                let null = clone_tree(CWD, Path::new("/dev/null"), false)
                    .step(|| what("bind /dev/null"))?;
                mount_setattr(null.as_fd(), false, READONLY).step(|| what("set read-only"))?;
                null
            }
            (PointKind::Folder, Some(first)) => {
                clone_tree(first, Path::new(""), false).step(|| what("copy tmpfs"))?
            }
            (PointKind::Folder, None) => {
                let first = empty_folder().step(|| what("mount tmpfs"))?;
                attach(&first, &point).step(|| what("attach"))?;
                folder = Some(first);
                continue;
            }
        };
        attach(&tree, &point).step(|| what("attach"))?;
    }
    Ok(())
}

fn empty_folder() -> std::result::Result<OwnedFd, Errno> {
    let context = rustix::mount::fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    rustix::mount::fsconfig_set_string(&context, "source", "tmpfs")?;
    rustix::mount::fsconfig_set_flag(&context, "ro")?;
    rustix::mount::fsconfig_create(&context)?;
    rustix::mount::fsmount(
        &context,
        FsMountFlags::FSMOUNT_CLOEXEC,
        MountAttrFlags::MOUNT_ATTR_RDONLY
            | MountAttrFlags::MOUNT_ATTR_NOSUID
            | MountAttrFlags::MOUNT_ATTR_NODEV
            | MountAttrFlags::MOUNT_ATTR_NOEXEC,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mounts(json: &str) -> Vec<Mount> {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn containerds_default_mounts_pass() {
        let list = mounts(
            r#"[{"destination":"/proc","type":"proc","source":"proc","options":["nosuid","noexec","nodev"]},
            {"destination":"/dev","type":"tmpfs","source":"tmpfs","options":["nosuid","strictatime","mode=755","size=65536k"]},
            {"destination":"/dev/pts","type":"devpts","source":"devpts","options":["nosuid","noexec","newinstance","ptmxmode=0666","mode=0620","gid=5"]},
            {"destination":"/dev/shm","type":"tmpfs","source":"shm","options":["nosuid","noexec","nodev","mode=1777","size=65536k"]},
            {"destination":"/dev/mqueue","type":"mqueue","source":"mqueue","options":["nosuid","noexec","nodev"]},
            {"destination":"/sys","type":"sysfs","source":"sysfs","options":["nosuid","noexec","nodev","ro"]},
            {"destination":"/run","type":"tmpfs","source":"tmpfs","options":["nosuid","strictatime","mode=755","size=65536k"]},
            {"destination":"/sys/fs/cgroup","type":"cgroup","source":"cgroup","options":["ro","nosuid","noexec","nodev"]},
            {"destination":"/etc/hosts","type":"bind","source":"/run/bulkhead/trees/t2","options":["rbind","rprivate","ro"]}]"#,
        );
        check(&list).unwrap();
    }

    #[test]
    fn bad_mounts_are_refused_by_field() {
        for (json, field) in [
            (
                r#"[{"destination":"proc","type":"proc"}]"#,
                "mounts[0].destination",
            ),
            (r#"[{"destination":"/a","type":"ext4"}]"#, "mounts[0].type"),
            (r#"[{"destination":"/a"}]"#, "mounts[0].type"),
            (
                r#"[{"destination":"/a","type":"bind","source":"x"}]"#,
                "mounts[0].source",
            ),
            (
                r#"[{"destination":"/a","type":"bind"}]"#,
                "mounts[0].source",
            ),
        ] {
            let error = check(&mounts(json)).unwrap_err().text();
            assert!(error.contains(field), "{error}");
        }
    }
}
