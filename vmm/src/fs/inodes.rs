//! The inodes the guest knows: node id to the host's inode, counted by the guest's lookups.
//!
//! A node id is never used twice, so a forged or stale one finds nothing (ESTALE). An inode is known by mount,
//! device and number: one file seen through a read-only and a writable tree is two nodes.
//!
//! An inode is held by an O_PATH descriptor. When the descriptors of the budget are used up, further ones are held
//! by file handles, so that a guest that walks a large tree does not take the server's descriptors away.

use std::collections::HashMap;
use std::ops::Deref;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use rustix::fs::{FileType, Statx};
use rustix::io::Errno;

use super::abi::{self, ROOT_ID};
use super::steward::Kept;
use super::trees::Tree;

/// An inode the guest knows.
pub struct Inode {
    /// The guest's number for it.
    pub id: u64,
    /// The type; it never changes for an inode.
    pub kind: FileType,
    /// The tree it was found in.
    pub tree: Arc<Tree>,
    held: Held,
    key: Key,
}

enum Held {
    Descriptor(OwnedFd),
    Handle(Kept),
}

impl Inode {
    /// Major and minor number of its file system's device.
    pub fn device(&self) -> (u32, u32) {
        self.key.device
    }
}

/// An inode for the time of one operation, with a descriptor. O_PATH.
pub struct Node {
    inode: Arc<Inode>,
    opened: Option<OwnedFd>,
}

impl Node {
    fn open(inode: Arc<Inode>) -> Result<Self, Errno> {
        let opened = match &inode.held {
            Held::Descriptor(_) => None,
            Held::Handle(handle) => Some(handle.open()?),
        };
        Ok(Self { inode, opened })
    }
}

impl Deref for Node {
    type Target = Inode;

    fn deref(&self) -> &Inode {
        &self.inode
    }
}

impl AsFd for Node {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match (&self.opened, &self.inode.held) {
            (Some(fd), _) | (None, Held::Descriptor(fd)) => fd.as_fd(),
            // `open` leaves no handle without a descriptor; the current folder is the empty root.
            (None, Held::Handle(_)) => rustix::fs::CWD,
        }
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

struct Entry {
    inode: Arc<Inode>,
    lookups: u64,
}

#[derive(Default)]
struct Table {
    by_id: HashMap<u64, Entry>,
    by_key: HashMap<Key, u64>,
    last_id: u64,
    descriptors: usize,
}

impl Table {
    fn unlink(&mut self, inode: &Inode) {
        // The number may have gone to another file since.
        if self.by_key.get(&inode.key) == Some(&inode.id) {
            self.by_key.remove(&inode.key);
        }
        if matches!(inode.held, Held::Descriptor(_)) {
            self.descriptors = self.descriptors.saturating_sub(1);
        }
    }
}

/// How many inodes may be held.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// All.
    pub inodes: usize,
    /// Those with a descriptor.
    pub descriptors: usize,
}

/// The table of inodes.
pub struct Inodes {
    table: RwLock<Table>,
    root: Arc<Inode>,
    limits: Limits,
}

impl Inodes {
    /// A table with the root in it.
    pub fn new(root: OwnedFd, stat: &Statx, tree: Arc<Tree>, limits: Limits) -> Self {
        let root = Arc::new(Inode {
            id: ROOT_ID,
            kind: FileType::Directory,
            tree,
            held: Held::Descriptor(root),
            key: Key::of(stat),
        });
        Self {
            table: RwLock::new(Table {
                last_id: ROOT_ID,
                ..Table::default()
            }),
            root,
            limits,
        }
    }

    fn read(&self) -> RwLockReadGuard<'_, Table> {
        self.table.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Table> {
        self.table.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// The inode with the guest's number `id`.
    pub fn get(&self, id: u64) -> Result<Node, Errno> {
        if id == ROOT_ID {
            return Node::open(Arc::clone(&self.root));
        }
        let inode = self
            .read()
            .by_id
            .get(&id)
            .map(|entry| Arc::clone(&entry.inode));
        Node::open(inode.ok_or(Errno::STALE)?)
    }

    /// Whether another inode may be held.
    pub fn has_room(&self) -> bool {
        self.read().by_id.len() < self.limits.inodes
    }

    /// Counts one lookup of the inode behind `fd` and returns it; a new one gets a new id.
    pub fn look_up(&self, fd: OwnedFd, stat: &Statx, tree: &Arc<Tree>) -> Result<Node, Errno> {
        let key = Key::of(stat);
        let mut table = self.write();
        // Looked at under the lock: no inode of a tree appears after its removal.
        if tree.is_removed() {
            return Err(Errno::NOENT);
        }
        if let Some(id) = table.by_key.get(&key).copied()
            && let Some(entry) = table.by_id.get_mut(&id)
            && is_same(&entry.inode, &fd)
        {
            entry.lookups = entry.lookups.checked_add(1).ok_or(Errno::OVERFLOW)?;
            return Ok(Node {
                inode: Arc::clone(&entry.inode),
                opened: Some(fd),
            });
        }
        if table.by_id.len() >= self.limits.inodes {
            return Err(Errno::NFILE);
        }
        let id = table.last_id.checked_add(1).ok_or(Errno::NFILE)?;
        let (held, opened) = if table.descriptors < self.limits.descriptors {
            table.descriptors = table.descriptors.saturating_add(1);
            (Held::Descriptor(fd), None)
        } else {
            let kept = tree.keep(key.mount, &fd).map_err(|_| Errno::NFILE)?;
            (Held::Handle(kept), Some(fd))
        };
        table.last_id = id;
        let inode = Arc::new(Inode {
            id,
            kind: abi::file_type(stat),
            tree: Arc::clone(tree),
            held,
            key,
        });
        table.by_id.insert(
            id,
            Entry {
                inode: Arc::clone(&inode),
                lookups: 1,
            },
        );
        table.by_key.insert(key, id);
        Ok(Node { inode, opened })
    }

    /// Takes back `count` lookups; at none the inode is let go.
    pub fn forget(&self, id: u64, count: u64) {
        let mut table = self.write();
        let Some(entry) = table.by_id.get_mut(&id) else {
            return;
        };
        entry.lookups = entry.lookups.saturating_sub(count);
        if entry.lookups == 0
            && let Some(entry) = table.by_id.remove(&id)
        {
            table.unlink(&entry.inode);
            // The descriptor is closed after the lock is let go.
            drop(table);
        }
    }

    /// Lets go of the inodes `gone` picks.
    pub fn remove(&self, gone: impl Fn(&Inode) -> bool) {
        let mut dropped = Vec::new();
        let mut table = self.write();
        table.by_id.retain(|_, entry| {
            let leaves = gone(&entry.inode);
            if leaves {
                dropped.push(Arc::clone(&entry.inode));
            }
            !leaves
        });
        dropped.iter().for_each(|inode| table.unlink(inode));
        drop(table);
    }

    /// How many inodes are held.
    pub fn len(&self) -> usize {
        self.read().by_id.len()
    }
}

/// Whether `fd`, with the number of `inode`, is that inode. A descriptor keeps the number from being used again; a
/// handle does not, but tells generations apart.
fn is_same(inode: &Inode, fd: &OwnedFd) -> bool {
    match &inode.held {
        Held::Descriptor(_) => true,
        Held::Handle(handle) => handle.is(fd),
    }
}
