//! Open files and folders: handle number to descriptor.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use rustix::io::Errno;

use super::inodes::Inode;
use super::trees::Tree;

/// An open file or folder. It does not hold its inode: the guest may forget that, and has its descriptor counted no more.
pub struct Handle {
    node: u64,
    tree: Arc<Tree>,
    fd: OwnedFd,
    position: Mutex<()>,
}

impl Handle {
    /// `fd`, opened from `inode`, in no table.
    pub fn new(inode: &Inode, fd: OwnedFd) -> Self {
        Self {
            node: inode.id,
            tree: Arc::clone(&inode.tree),
            fd,
            position: Mutex::new(()),
        }
    }

    /// Keeps others from moving the descriptor's position.
    pub fn lock_position(&self) -> MutexGuard<'_, ()> {
        self.position.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl AsFd for Handle {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[derive(Default)]
struct Table {
    open: HashMap<u64, Arc<Handle>>,
    last: u64,
}

/// The table of open files and folders.
pub struct Handles {
    table: RwLock<Table>,
    limit: usize,
}

impl Handles {
    /// An empty table for at most `limit` handles.
    pub fn new(limit: usize) -> Self {
        Self {
            table: RwLock::default(),
            limit,
        }
    }

    /// Holds `fd`, opened from `inode`, and returns its number, which is never 0.
    pub fn insert(&self, inode: &Inode, fd: OwnedFd) -> Result<u64, Errno> {
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        // Looked at under the lock: no handle of a tree appears after its removal.
        if inode.tree.is_removed() {
            return Err(Errno::STALE);
        }
        if table.open.len() >= self.limit {
            return Err(Errno::NFILE);
        }
        let number = table.last.checked_add(1).ok_or(Errno::NFILE)?;
        table.last = number;
        table.open.insert(number, Arc::new(Handle::new(inode, fd)));
        Ok(number)
    }

    /// The handle `number` if it was opened from the inode `node`.
    pub fn get(&self, number: u64, node: u64) -> Result<Arc<Handle>, Errno> {
        let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
        match table.open.get(&number) {
            Some(handle) if handle.node == node => Ok(Arc::clone(handle)),
            _ => Err(Errno::BADF),
        }
    }

    /// Closes the handle `number` of the inode `node`.
    pub fn remove(&self, number: u64, node: u64) -> Result<(), Errno> {
        self.get(number, node)?;
        let closed = self
            .table
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .open
            .remove(&number);
        closed.map(drop).ok_or(Errno::BADF)
    }

    /// Closes the handles of trees that `gone` picks.
    pub fn remove_all(&self, gone: impl Fn(&Arc<Tree>) -> bool) {
        let mut closed = Vec::new();
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        table.open.retain(|_, handle| {
            let keep = !gone(&handle.tree);
            if !keep {
                closed.push(Arc::clone(handle));
            }
            keep
        });
        drop(table);
    }

    /// How many handles are open.
    pub fn len(&self) -> usize {
        self.table
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .open
            .len()
    }
}
