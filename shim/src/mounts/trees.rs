//! Trees: what of the host the file server serves, and who of the pod uses it.

use std::{
    collections::HashMap,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use rustix::mount::{OpenTreeFlags, open_tree};
use serde::{Deserialize, Serialize};

use super::Error;

/// Something of the host that the file server serves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tree {
    /// Its id, unique in the pod.
    pub id: String,
    /// The folder or file.
    pub path: PathBuf,
    /// Enforced by the file server.
    pub readonly: bool,
    /// With the mounts below it.
    pub recursive: bool,
    /// Others may change it meanwhile, so that nothing of it is kept in caches.
    pub shared: bool,
    /// Not served yet; false if another mount of the pod has the same source.
    pub fresh: bool,
}

impl Tree {
    /// Clones the mount.
    pub fn open(&self) -> Result<OwnedFd, Error> {
        let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        if self.recursive {
            flags |= OpenTreeFlags::AT_RECURSIVE;
        }
        open_tree(rustix::fs::CWD, &self.path, flags).map_err(|e| Error::Open {
            path: self.path.clone(),
            source: e.into(),
        })
    }
}

/// More numbers than all containers of a pod could take at once.
const SKIP: u64 = 1 << 20;

/// The trees of a pod: numbers, and who uses what. A source that is mounted twice is one tree, so that both see one
/// set of inodes and locks.
#[derive(Debug, Default)]
pub struct Table {
    next: u64,
    shared: HashMap<Key, Use>,
}

/// Source, read-only, recursive.
type Key = (PathBuf, bool, bool);

#[derive(Debug)]
struct Use {
    id: String,
    count: usize,
}

impl Table {
    /// Takes note of trees that a shim before has given out.
    pub fn restore(&mut self, trees: &[Tree]) {
        for tree in trees {
            let number = tree
                .id
                .strip_prefix('t')
                .and_then(|n| n.parse::<u64>().ok());
            self.next = self.next.max(number.map_or(0, |n| n.saturating_add(1)));
            if tree.shared {
                let key = key(&tree.path, tree.readonly, tree.recursive);
                let used = self.shared.entry(key).or_insert_with(|| Use {
                    id: tree.id.clone(),
                    count: 0,
                });
                used.count = used.count.saturating_add(1);
            }
        }
    }

    /// Leaves out numbers that it may have given out without a note.
    pub fn skip(&mut self) {
        self.next = self.next.saturating_add(SKIP);
    }

    pub(super) fn number(&mut self) -> String {
        let id = format!("t{}", self.next);
        self.next = self.next.saturating_add(1);
        id
    }

    /// The id for a source that others may use, and whether it is new.
    pub(super) fn acquire(
        &mut self,
        path: &Path,
        readonly: bool,
        recursive: bool,
    ) -> (String, bool) {
        let key = key(path, readonly, recursive);
        if let Some(tree) = self.shared.get_mut(&key) {
            tree.count = tree.count.saturating_add(1);
            return (tree.id.clone(), false);
        }
        let id = self.number();
        let tree = Use {
            id: id.clone(),
            count: 1,
        };
        self.shared.insert(key, tree);
        (id, true)
    }

    /// Gives trees back: those that nobody uses any more are answered.
    pub fn release(&mut self, trees: &[Tree]) -> Vec<Tree> {
        let mut unused = Vec::new();
        for tree in trees {
            if tree.shared {
                let key = key(&tree.path, tree.readonly, tree.recursive);
                let Some(used) = self.shared.get_mut(&key).filter(|u| u.id == tree.id) else {
                    continue;
                };
                used.count = used.count.saturating_sub(1);
                if used.count > 0 {
                    continue;
                }
                self.shared.remove(&key);
            }
            unused.push(tree.clone());
        }
        unused
    }
}

fn key(path: &Path, readonly: bool, recursive: bool) -> Key {
    (path.to_owned(), readonly, recursive)
}
