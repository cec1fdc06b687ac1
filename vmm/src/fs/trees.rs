//! The trees: detached mounts handed in by the shim, served as they are. Nothing is mounted for them; the guest's root is a folder with
//! their names, and looking one up leads to the mount's root.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

use bulkhead_failpoint::reach;
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, fstat, mkdirat, openat, unlinkat};
use rustix::io::Errno;

use super::inodes::Inode;
use super::server::fd_path;
use super::steward::{Kept, Mount, Steward};
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
    /// The detached mount, O_PATH on its root; with the last copy of this descriptor the mount goes.
    mount: Option<OwnedFd>,
    /// The steward's, and the mount's id: of its files handles can be kept.
    handles: Option<(Mount, u64)>,
    removed: AtomicBool,
}

impl Tree {
    /// The guest's root, which holds the mount points.
    pub fn root() -> Self {
        Self {
            readonly: true,
            shared: true,
            mount: None,
            handles: None,
            removed: AtomicBool::new(false),
        }
    }

    /// For how long the guest may keep names and attributes.
    pub fn timeout(&self) -> Duration {
        if self.shared { Duration::ZERO } else { OWN }
    }

    /// Whether nobody changes it, host and guest, as long as it is here: layers of images.
    pub fn is_constant(&self) -> bool {
        self.readonly && !self.shared
    }

    /// Whether the tree was taken away.
    pub fn is_removed(&self) -> bool {
        self.removed.load(Ordering::Acquire)
    }

    /// Whether `inode` was found in this tree.
    pub fn holds(self: &Arc<Self>, inode: &Inode) -> bool {
        Arc::ptr_eq(self, &inode.tree)
    }

    /// Keeps `file`, found in the mount `mount`, by a handle: only those of the tree's topmost mount.
    pub fn keep(&self, mount: u64, file: impl AsFd) -> Result<Kept, Errno> {
        let handles = self.handles.as_ref().filter(|(_, own)| *own == mount);
        let (mount, _) = handles.ok_or(Errno::NFILE)?;
        mount.keep(file.as_fd())
    }

    /// Another descriptor of the mount's root, which does not keep the mount. O_PATH.
    pub fn open_root(&self) -> Result<OwnedFd, Errno> {
        let mount = self.mount.as_ref().ok_or(Errno::NOENT)?;
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        openat(CWD, fd_path(mount), flags, Mode::empty())
    }

    /// The mount's root. O_PATH; none for the guest's root.
    pub fn mount_root(&self) -> Option<&OwnedFd> {
        self.mount.as_ref()
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
    names: OwnedFd,
    steward: Arc<Steward>,
    trees: RwLock<HashMap<String, Arc<Tree>>>,
    changes: Mutex<()>,
}

impl Trees {
    /// No trees yet; in the folder `names` there is an empty folder or file for each, so that the guest's root can be listed.
    pub fn new(names: OwnedFd, steward: Arc<Steward>) -> Self {
        Self {
            names,
            steward,
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

    /// Serves the detached mount `mount` as the tree `id`.
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
        let handles = self.steward.add_mount(mount.as_fd(), readonly);
        let handles = handles.map_err(mount_error("confining it; is it a detached mount?"))?;
        let root = super::server::stat(&mount).map_err(mount_error("looking at its root"))?;
        make_name(&self.names, id, folder).map_err(mount_error("making its name"))?;
        reach("fs.add-tree").map_err(mount_error("adding it"))?;
        let tree = Tree {
            readonly,
            shared,
            handles: handles.map(|of_steward| (of_steward, root.stx_mnt_id)),
            mount: Some(mount),
            removed: AtomicBool::new(false),
        };
        self.trees
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(id.to_owned(), Arc::new(tree));
        Ok(())
    }

    /// Takes the tree `id` away and calls `forget` with it, to let go of all descriptors into it.
    pub fn remove(&self, id: &str, forget: impl FnOnce(&Arc<Tree>)) -> Result<(), Error> {
        check_id(id)?;
        reach("fs.remove-tree").map_err(mount_error("removing it"))?;
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
            .mount
            .as_ref()
            .and_then(|mount| fstat(mount).ok())
            .is_some_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Directory);
        self.take_away(id, folder);
        Ok(())
    }

    fn take_away(&self, id: &str, folder: bool) {
        let flags = if folder {
            AtFlags::REMOVEDIR
        } else {
            AtFlags::empty()
        };
        if let Err(error) = unlinkat(&self.names, id, flags) {
            tracing::warn!(tree = id, %error, "removing the tree's name");
        }
    }
}

/// An empty folder or file below `dir`.
fn make_name(dir: impl AsFd, name: &str, folder: bool) -> Result<(), Errno> {
    if folder {
        return mkdirat(dir, name, Mode::empty());
    }
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    openat(dir, name, flags, Mode::empty()).map(drop)
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
    use std::fs::File;

    use super::*;
    use crate::fs::abi::ROOT_ID;
    use crate::fs::handles::Handles;
    use crate::fs::inodes::{Inodes, Limits};
    use crate::fs::server::stat;

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

    #[test]
    fn what_is_opened_while_its_tree_is_removed_is_not_kept() {
        let tree = Arc::new(Tree::root());
        let folder = || OwnedFd::from(File::open("/").unwrap());
        let limits = Limits {
            inodes: 1,
            descriptors: 1,
        };
        let inodes = Inodes::new(
            folder(),
            &stat(folder()).unwrap(),
            Arc::clone(&tree),
            limits,
        );
        let node = inodes.get(ROOT_ID).unwrap();
        let handles = Handles::new(2);
        assert_eq!(handles.insert(&node, folder()), Ok(1));
        tree.removed.store(true, Ordering::Release);
        handles.remove_all(|of| Arc::ptr_eq(of, &tree));
        assert_eq!(handles.insert(&node, folder()), Err(Errno::STALE));
        assert_eq!(handles.len(), 0);
    }
}
