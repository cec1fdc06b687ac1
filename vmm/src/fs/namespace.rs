//! The file server's world: a mount namespace whose root is an empty tmpfs.
//!
//! ```text
//! /          tmpfs, 0700
//! /trees     a folder with the trees' names, mounted once more, read-only: the root the guest sees
//! /fd        a bind mount of /proc/<pid>/fd and nothing else of proc: to open what is held as O_PATH
//! ```

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::fs::{CWD, Mode, OFlags, mkdirat, open};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags,
    OpenTreeFlags, UnmountFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen,
    mount_change, move_mount, open_tree, unmount,
};
use rustix::process::{chdir, pivot_root};
use rustix::thread::UnshareFlags;

use super::sys;
use crate::limits;

/// A step towards the namespace failed.
#[derive(Debug, thiserror::Error)]
#[error("{step}")]
pub struct Error {
    step: &'static str,
    source: std::io::Error,
}

fn at<E: Into<std::io::Error>>(step: &'static str) -> impl FnOnce(E) -> Error {
    move |source| Error {
        step,
        source: source.into(),
    }
}

/// What the server needs of its namespace.
pub struct Namespace {
    /// `/trees` as the guest sees it, read-only. O_PATH.
    pub root: OwnedFd,
    /// The same folder where names can be made. O_PATH.
    pub names: OwnedFd,
}

impl Namespace {
    /// Takes the calling thread, and those it starts later, into a namespace of its own. `scratch` is any folder:
    /// it is covered for the moment in which the new root is made.
    pub fn enter(scratch: &Path) -> Result<Self, Error> {
        // Only this thread's view of the file system is parted: nothing else relies on it being shared.
        sys::unshare(UnshareFlags::NEWNS).map_err(at("unsharing the mount namespace"))?;
        mount_change(
            "/",
            MountPropagationFlags::REC | MountPropagationFlags::PRIVATE,
        )
        .map_err(at("making all mounts private"))?;
        let descriptors = open_tree(
            CWD,
            "/proc/self/fd",
            OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC,
        )
        .map_err(at("cloning the mount of /proc/self/fd"))?;
        let tmpfs = tmpfs().map_err(at("making a tmpfs"))?;
        attach(&tmpfs, CWD, scratch).map_err(at("mounting the tmpfs"))?;
        chdir(scratch).map_err(at("entering the tmpfs"))?;
        for folder in ["trees", "fd"] {
            mkdirat(CWD, folder, Mode::RWXU).map_err(at("making the folders of the root"))?;
        }
        // The old root ends up mounted on top of the new one, pivot_root(2), and is taken away from there.
        pivot_root(".", ".").map_err(at("changing the root"))?;
        unmount(".", UnmountFlags::DETACH).map_err(at("detaching the old root"))?;
        chdir("/").map_err(at("entering the new root"))?;
        attach(&descriptors, CWD, "/fd").map_err(at("mounting /fd"))?;

        let names = open_folder("/trees").map_err(at("opening /trees"))?;
        let view = open_tree(
            CWD,
            "/trees",
            OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC,
        )
        .map_err(at("cloning the mount of /trees"))?;
        sys::set_mount_attributes(&view, READ_ONLY | CONFINED)
            .map_err(at("making the guest's root read-only"))?;
        attach(&view, CWD, "/trees").map_err(at("mounting the guest's root"))?;
        let root = open_folder("/trees").map_err(at("opening the guest's root"))?;
        Ok(Self { root, names })
    }
}

/// Attributes of every mount the guest can reach: no device or set-id program in it works on the host and no
/// link is followed.
pub const CONFINED: u64 = libc::MOUNT_ATTR_NOSUID
    | libc::MOUNT_ATTR_NODEV
    | libc::MOUNT_ATTR_NOEXEC
    | libc::MOUNT_ATTR_NOSYMFOLLOW;
/// A read-only mount.
pub const READ_ONLY: u64 = libc::MOUNT_ATTR_RDONLY;

/// Attaches the detached mount `mount`.
fn attach<P: rustix::path::Arg>(mount: impl AsFd, dir: impl AsFd, path: P) -> Result<(), Errno> {
    move_mount(
        mount,
        c"",
        dir,
        path,
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
    )
}

fn open_folder(path: &str) -> Result<OwnedFd, Errno> {
    open(
        path,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC,
        Mode::empty(),
    )
}

fn tmpfs() -> Result<OwnedFd, Errno> {
    let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    // It only ever holds names.
    fsconfig_set_string(
        context.as_fd(),
        "nr_inodes",
        (limits::FS_TREES + 16).to_string(),
    )?;
    fsconfig_set_string(context.as_fd(), "size", "64k")?;
    fsconfig_set_string(context.as_fd(), "mode", "0700")?;
    fsconfig_create(context.as_fd())?;
    fsmount(
        context.as_fd(),
        FsMountFlags::FSMOUNT_CLOEXEC,
        MountAttrFlags::empty(),
    )
}
