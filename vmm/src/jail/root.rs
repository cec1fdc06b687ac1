//! Namespaces, and a root in which there is nothing.

use std::path::Path;

use rustix::fs::CWD;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags, UnmountFlags,
    fsconfig_create, fsconfig_set_string, fsmount, fsopen, mount_change, move_mount, unmount,
};
use rustix::process::{chdir, pivot_root};
use rustix::thread::{UnshareFlags, unshare_unsafe};

use super::{Missing, missing};

/// Mounts nothing that the host sees: `mount_point` is covered in the new mount namespace only.
pub fn enter(mount_point: &Path) -> Result<(), Missing> {
    let flags = UnshareFlags::NEWNS | UnshareFlags::NEWIPC | UnshareFlags::NEWUTS;
    // SAFETY: the only unsoundness of unshare is with CLONE_FILES, which is not passed.
    unsafe { unshare_unsafe(flags) }.map_err(missing("make mount, ipc and uts namespaces"))?;
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    mount_change("/", private).map_err(missing("make mounts private"))?;

    let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC).map_err(missing("open a tmpfs"))?;
    for (key, value) in [("size", "4096"), ("nr_inodes", "2"), ("mode", "0555")] {
        fsconfig_set_string(&context, key, value).map_err(missing("configure a tmpfs"))?;
    }
    fsconfig_create(&context).map_err(missing("make a tmpfs"))?;
    let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY
        | MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let root = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
        .map_err(missing("mount a tmpfs"))?;
    let empty = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    move_mount(&root, "", CWD, mount_point, empty).map_err(missing("place the root"))?;

    chdir(mount_point).map_err(missing("enter the root"))?;
    // The old root comes to lie on the new one and is taken off.
    pivot_root(".", ".").map_err(missing("change the root"))?;
    unmount(".", UnmountFlags::DETACH).map_err(missing("let go of the old root"))?;
    chdir("/").map_err(missing("enter the root"))
}
