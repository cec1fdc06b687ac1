//! The inodes the guest knows: node id to O_PATH descriptor, counted by the guest's lookups.
//!
//! A node id is never used twice, so a forged or stale one finds nothing (ESTALE). An inode is known by mount,
//! device and number: one file seen through a read-only and a writable tree is two nodes.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use rustix::fs::{FileType, Statx};
use rustix::io::Errno;

use super::abi::{self, ROOT_ID};
use super::trees::Tree;

/// An inode the guest holds.
pub struct Inode {
    /// The guest's number for it.
    pub id: u64,
    /// The type; it never changes for an inode.
    pub kind: FileType,
    /// The tree it was found in.
    pub tree: Arc<Tree>,
    fd: OwnedFd,
    key: Key,
}

impl Inode {
    /// Major and minor number of its file system's device.
    pub fn device(&self) -> (u32, u32) {
        self.key.device
    }
}

impl AsFd for Inode {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    mount: u64,
    device: (u32, u32),
    number: u64,
}

impl Key {
    fn of(stat: &Statx) -> Self {
        Self {
            mount: stat.stx_mnt_id,
            device: (stat.stx_dev_major, stat.stx_dev_minor),
            number: stat.stx_ino,
        }
    }
}

struct Held {
    inode: Arc<Inode>,
    lookups: u64,
}

struct Table {
    by_id: HashMap<u64, Held>,
    by_key: HashMap<Key, u64>,
    last_id: u64,
}

/// The table of inodes.
pub struct Inodes {
    table: RwLock<Table>,
    root: Arc<Inode>,
    limit: usize,
}

impl Inodes {
    /// A table with the root in it; at most `limit` others.
    pub fn new(root: OwnedFd, stat: &Statx, tree: Arc<Tree>, limit: usize) -> Self {
        let root = Arc::new(Inode {
            id: ROOT_ID,
            kind: FileType::Directory,
            tree,
            fd: root,
            key: Key::of(stat),
        });
        let table = Table {
            by_id: HashMap::new(),
            by_key: HashMap::new(),
            last_id: ROOT_ID,
        };
        Self {
            table: RwLock::new(table),
            root,
            limit,
        }
    }

    fn read(&self) -> RwLockReadGuard<'_, Table> {
        self.table.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Table> {
        self.table.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// The inode with the guest's number `id`.
    pub fn get(&self, id: u64) -> Result<Arc<Inode>, Errno> {
        if id == ROOT_ID {
            return Ok(Arc::clone(&self.root));
        }
        self.read()
            .by_id
            .get(&id)
            .map(|held| Arc::clone(&held.inode))
            .ok_or(Errno::STALE)
    }

    /// Whether another inode may be held.
    pub fn has_room(&self) -> bool {
        self.read().by_id.len() < self.limit
    }

    /// Counts one lookup of the inode behind `fd` and returns it; a new one gets a new id.
    pub fn look_up(
        &self,
        fd: OwnedFd,
        stat: &Statx,
        tree: &Arc<Tree>,
    ) -> Result<Arc<Inode>, Errno> {
        let key = Key::of(stat);
        let mut table = self.write();
        // Looked at under the lock: no inode of a tree appears after its removal.
        if tree.is_removed() {
            return Err(Errno::NOENT);
        }
        if let Some(id) = table.by_key.get(&key).copied()
            && let Some(held) = table.by_id.get_mut(&id)
        {
            held.lookups = held.lookups.checked_add(1).ok_or(Errno::OVERFLOW)?;
            return Ok(Arc::clone(&held.inode));
        }
        if table.by_id.len() >= self.limit {
            return Err(Errno::NFILE);
        }
        let id = table.last_id.checked_add(1).ok_or(Errno::NFILE)?;
        table.last_id = id;
        let inode = Arc::new(Inode {
            id,
            kind: abi::file_type(stat),
            tree: Arc::clone(tree),
            fd,
            key,
        });
        table.by_id.insert(
            id,
            Held {
                inode: Arc::clone(&inode),
                lookups: 1,
            },
        );
        table.by_key.insert(key, id);
        Ok(inode)
    }

    /// Takes back `count` lookups; at none the inode is let go.
    pub fn forget(&self, id: u64, count: u64) {
        let mut table = self.write();
        let Some(held) = table.by_id.get_mut(&id) else {
            return;
        };
        held.lookups = held.lookups.saturating_sub(count);
        if held.lookups == 0
            && let Some(held) = table.by_id.remove(&id)
        {
            table.by_key.remove(&held.inode.key);
            // The descriptor is closed after the lock is.
            drop(table);
        }
    }

    /// Lets go of the inodes `gone` picks, in one step with what it does to the trees.
    pub fn retain(&self, gone: impl Fn(&Inode) -> bool) {
        let mut dropped = Vec::new();
        let mut table = self.write();
        let Table { by_id, by_key, .. } = &mut *table;
        by_id.retain(|_, held| {
            let keep = !gone(&held.inode);
            if !keep {
                by_key.remove(&held.inode.key);
                dropped.push(Arc::clone(&held.inode));
            }
            keep
        });
        drop(table);
    }

    /// Lets go of all inodes but the root.
    pub fn clear(&self) {
        self.retain(|_| true);
    }

    /// How many inodes are held.
    pub fn len(&self) -> usize {
        self.read().by_id.len()
    }
}
