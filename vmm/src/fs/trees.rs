//! The trees: mounts handed in by the shim, attached below the guest's root.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, fstat, openat, unlinkat};
use rustix::io::Errno;
use rustix::mount::{UnmountFlags, unmount};

use super::inodes::Inode;
use super::namespace::{CONFINED, Namespace, READ_ONLY, attach, make_mount_point};
use super::server::{fd_path, stat};
use super::sys::{self, FileHandle};
use crate::limits;

/// For how long a guest may believe what nobody but itself changes.
const OWN: Duration = Duration::from_secs(24 * 60 * 60);

/// A tree.
#[derive(Debug)]
pub struct Tree {
    /// No write goes through; the mount enforces it.
    pub readonly: bool,
    /// The host or another view of the same files may change it.
    pub shared: bool,
    root: Option<OwnedFd>,
    /// The root once more, not O_PATH, and its mount's id: what opening a file handle takes.
    mount: Option<(OwnedFd, u64)>,
    removed: AtomicBool,
}

impl Tree {
    /// The guest's root, which holds the mount points.
    pub fn root() -> Self {
        Self {
            readonly: true,
            shared: true,
            root: None,
            mount: None,
            removed: AtomicBool::new(false),
        }
    }

    /// For how long the guest may keep names and attributes.
    pub fn timeout(&self) -> Duration {
        if self.shared { Duration::ZERO } else { OWN }
    }

    /// Whether the tree was taken away.
    pub fn is_removed(&self) -> bool {
        self.removed.load(Ordering::Acquire)
    }

    /// Whether `inode` was found in this tree.
    pub fn holds(self: &Arc<Self>, inode: &Inode) -> bool {
        Arc::ptr_eq(self, &inode.tree)
    }

    /// Whether inodes of the mount `mount` can be held by file handles: only those of the tree's topmost mount.
    pub fn opens_handles_of(&self, mount: u64) -> bool {
        self.mount.as_ref().is_some_and(|(_, own)| *own == mount)
    }

    /// Opens a file handle of the tree's topmost mount as O_PATH.
    pub fn open_handle(&self, handle: &FileHandle) -> Result<OwnedFd, Errno> {
        let (mount, _) = self.mount.as_ref().ok_or(Errno::STALE)?;
        sys::open_file_handle(mount, handle)
            .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))
    }

    /// The mount's root. O_PATH; none for the guest's root.
    pub fn mount_root(&self) -> Option<&OwnedFd> {
        self.root.as_ref()
    }
}

/// Why a tree was not added or removed. The text begins with the field it is about.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("id: 1 to 64 characters of A-Z a-z 0-9 . _ - and neither `.` nor `..`")]
    Id,
    #[error("id: a tree `{0}` is there already")]
    Present(String),
    #[error("id: there is no tree `{0}`")]
    Absent(String),
    #[error("id: {} trees are there, no more fit", limits::FS_TREES)]
    Full,
    #[error("descriptor: its mount's root is neither a folder nor a regular file")]
    Kind,
    #[error("descriptor: {step}: {source}")]
    Mount {
        step: &'static str,
        source: std::io::Error,
    },
}

fn mount_error<E: Into<std::io::Error>>(step: &'static str) -> impl FnOnce(E) -> Error {
    move |source| Error::Mount {
        step,
        source: source.into(),
    }
}

/// All trees of the pod.
pub struct Trees {
    namespace_points: OwnedFd,
    view: OwnedFd,
    trees: RwLock<HashMap<String, Arc<Tree>>>,
    changes: Mutex<()>,
}

impl Trees {
    /// No trees yet. `namespace` must be that of the calling thread and of all that call later.
    pub fn new(namespace: Namespace) -> Self {
        Self {
            namespace_points: namespace.mount_points,
            view: namespace.root,
            trees: RwLock::default(),
            changes: Mutex::new(()),
        }
    }

    /// The tree named `id`.
    pub fn get(&self, id: &str) -> Option<Arc<Tree>> {
        self.trees
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .get(id)
            .cloned()
    }

    /// Every tree.
    pub fn all(&self) -> Vec<Arc<Tree>> {
        self.trees
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .values()
            .cloned()
            .collect()
    }

    fn change(&self) -> MutexGuard<'_, ()> {
        self.changes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Attaches the detached mount `mount` as the tree `id`.
    pub fn add(&self, id: &str, mount: OwnedFd, readonly: bool, shared: bool) -> Result<(), Error> {
        check_id(id)?;
        let _one_at_a_time = self.change();
        if self.get(id).is_some() {
            return Err(Error::Present(id.to_owned()));
        }
        if self.all().len() >= limits::FS_TREES {
            return Err(Error::Full);
        }
        let stat = fstat(&mount).map_err(mount_error("looking at it"))?;
        let folder = match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => true,
            FileType::RegularFile => false,
            _ => return Err(Error::Kind),
        };
        let attributes = if readonly {
            CONFINED | READ_ONLY
        } else {
            CONFINED
        };
        sys::set_mount_attributes(&mount, attributes)
            .map_err(mount_error("setting the mount's attributes"))?;
        make_mount_point(&self.namespace_points, id, folder)
            .map_err(mount_error("making the mount point"))?;
        let attached = attach(&mount, &self.view, id).and_then(|()| open_root(&self.view, id));
        let root = match attached {
            Ok(root) => root,
            Err(error) => {
                self.take_away(id, folder);
                return Err(mount_error("attaching it; is it a detached mount?")(error));
            }
        };
        let mount = handle_mount(&root).ok();
        let tree = Tree {
            readonly,
            shared,
            root: Some(root),
            mount,
            removed: AtomicBool::new(false),
        };
        self.trees
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(id.to_owned(), Arc::new(tree));
        Ok(())
    }

    /// Detaches the tree `id` and calls `forget` with it, to let go of all descriptors into it.
    pub fn remove(&self, id: &str, forget: impl FnOnce(&Arc<Tree>)) -> Result<(), Error> {
        check_id(id)?;
        let _one_at_a_time = self.change();
        let removed = self
            .trees
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(id);
        let tree = removed.ok_or_else(|| Error::Absent(id.to_owned()))?;
        tree.removed.store(true, Ordering::Release);
        forget(&tree);
        let folder = tree
            .root
            .as_ref()
            .and_then(|root| fstat(root).ok())
            .is_some_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Directory);
        self.take_away(id, folder);
        Ok(())
    }

    fn take_away(&self, id: &str, folder: bool) {
        let path = format!("/trees/{id}");
        if let Err(error) = unmount(path.as_str(), UnmountFlags::DETACH | UnmountFlags::NOFOLLOW)
            && error != Errno::INVAL
        {
            tracing::warn!(tree = id, %error, "unmounting");
        }
        let flags = if folder {
            AtFlags::REMOVEDIR
        } else {
            AtFlags::empty()
        };
        if let Err(error) = unlinkat(&self.namespace_points, id, flags) {
            tracing::warn!(tree = id, %error, "removing the mount point");
        }
    }
}

fn open_root(view: impl AsFd, id: &str) -> Result<OwnedFd, Errno> {
    openat(
        view,
        id,
        OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
        Mode::empty(),
    )
}

fn handle_mount(root: &OwnedFd) -> Result<(OwnedFd, u64), Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let folder = openat(CWD, fd_path(root), flags, Mode::empty())?;
    let stat = stat(&folder)?;
    // Not every file system has handles: told now rather than when descriptors run out.
    sys::file_handle(&folder).map_err(|_| Errno::OPNOTSUPP)?;
    Ok((folder, stat.stx_mnt_id))
}

fn check_id(id: &str) -> Result<(), Error> {
    let good = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
    let fits = (1..=limits::FS_TREE_ID).contains(&id.len());
    if fits && id.bytes().all(good) && id != "." && id != ".." {
        Ok(())
    } else {
        Err(Error::Id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_one_plain_name() {
        for id in [
            "",
            ".",
            "..",
            "a/b",
            "a b",
            "a\0",
            "\u{e9}",
            &"x".repeat(65),
        ] {
            assert!(check_id(id).is_err(), "{id:?}");
        }
        for id in ["t1", "a.b_c-D", "...", &"x".repeat(64)] {
            assert!(check_id(id).is_ok(), "{id:?}");
        }
    }
}
