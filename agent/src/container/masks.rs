//! Step: the paths that are masked or read-only (`linux.maskedPaths`, `linux.readonlyPaths`).

use std::{
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
};

use rustix::{
    fs::{CWD, OFlags},
    io::Errno,
    mount::{FsMountFlags, FsOpenFlags, MountAttrFlags},
};

use super::{
    mounts::{attach, clone_tree},
    path::{PointKind, kind_of, open_in_root},
};
use crate::{
    error::{Context, Error, Result},
    sys::{MountAttr, attr, mount_setattr},
};

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
            Err(Errno::NOENT | Errno::NOTDIR) => continue,
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
                let first = empty_folder(true).step(|| what("mount tmpfs"))?;
                attach(&first, &point).step(|| what("attach"))?;
                folder = Some(first);
                continue;
            }
        };
        attach(&tree, &point).step(|| what("attach"))?;
    }
    Ok(())
}

/// An empty tmpfs as a detached mount, for masks or for making device nodes in it.
pub fn empty_folder(masks: bool) -> std::result::Result<OwnedFd, Errno> {
    let context = rustix::mount::fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    rustix::mount::fsconfig_set_string(&context, "source", "tmpfs")?;
    let mut attributes = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    if masks {
        rustix::mount::fsconfig_set_flag(&context, "ro")?;
        attributes |= MountAttrFlags::MOUNT_ATTR_RDONLY | MountAttrFlags::MOUNT_ATTR_NODEV;
    }
    rustix::mount::fsconfig_create(&context)?;
    rustix::mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
}
