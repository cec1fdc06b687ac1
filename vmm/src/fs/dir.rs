//! Folders: OPENDIR, READDIR, READDIRPLUS.

use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;

use rustix::fs::{FileType, OFlags, RawDir, RawDirEntry, SeekFrom, seek};
use rustix::io::Errno;

use super::abi::{DIRENT, ENTRY_OUT, FOPEN_CACHE_DIR, FOPEN_KEEP_CACHE, dirent_type};
use super::inodes::Node;
use super::reply::Reply;
use super::request::{Name, Span};
use super::server::Server;
use crate::limits;

impl Server {
    pub(super) fn open_dir(&self, node: u64, reply: &mut Reply<'_>) -> Result<(), Errno> {
        let inode = self.inodes.get(node)?;
        let dir = self.reopen_dir(&inode)?;
        let flags = if inode.tree.shared {
            0
        } else {
            FOPEN_CACHE_DIR | FOPEN_KEEP_CACHE
        };
        self.open_out(&inode, dir, flags, reply)
    }

    pub(super) fn reopen_dir(&self, inode: &Node) -> Result<OwnedFd, Errno> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY;
        self.reopen(inode, flags, FileType::Directory)
    }

    pub(super) fn read_dir(
        &self,
        node: u64,
        span: Span,
        plus: bool,
        reply: &mut Reply<'_>,
    ) -> Result<(), Errno> {
        let inode = self.inodes.get(node)?;
        let handle = self.opened(node, span.fh)?;
        // The host's entries are smaller than the guest's: read about as many as fit.
        let wanted = if plus { span.size / 4 } else { span.size };
        let mut buffer = vec![MaybeUninit::uninit(); wanted.clamp(1024, limits::FS_DIR_BUFFER)];
        let _position = handle.lock_position();
        seek(&*handle, SeekFrom::Start(span.offset))?;
        let mut entries = RawDir::new(&*handle, &mut buffer);
        let mut found = Vec::new();
        while let Some(entry) = entries.next() {
            let mut add =
                |entry| self.dir_entry(&inode, &entry, span.size, plus, reply, &mut found);
            match entry.and_then(&mut add) {
                Ok(true) => {}
                Ok(false) => break,
                // What is in the answer already stands; the error comes back with the next page.
                Err(_) if reply.body_len() > 0 => break,
                Err(errno) => return Err(errno),
            }
            if found.len() == limits::FS_ASKED {
                self.mark_bare(&found, reply);
                found.clear();
            }
        }
        self.mark_bare(&found, reply);
        Ok(())
    }

    /// Appends one entry, and what it found with where its attributes end; `false` if it does not fit.
    fn dir_entry(
        &self,
        dir: &Node,
        entry: &RawDirEntry<'_>,
        size: usize,
        plus: bool,
        reply: &mut Reply<'_>,
        found: &mut Vec<(Node, usize)>,
    ) -> Result<bool, Errno> {
        let name = entry.file_name().to_bytes();
        let padded = DIRENT.saturating_add(name.len()).next_multiple_of(8);
        let needed = padded.saturating_add(if plus { ENTRY_OUT } else { 0 });
        if reply.body_len().saturating_add(needed) > size {
            return if reply.body_len() == 0 {
                Err(Errno::INVAL)
            } else {
                Ok(false)
            };
        }
        reply.room(needed)?;
        if plus {
            // Node 0 is "look it up yourself": for `.` and `..`, and where there is no room to hold more.
            match Name::new(entry.file_name()).and_then(|name| self.child(dir, name)) {
                Ok((inode, stat)) => {
                    self.or_forget(&inode, || self.entry(&inode, &stat, reply))?;
                    found.push((inode, reply.body_len()));
                }
                Err(_) => reply.zeros(ENTRY_OUT)?,
            }
        }
        let len = u32::try_from(name.len()).map_err(|_| Errno::NAMETOOLONG)?;
        reply.u64s(&[
            self.number(dir.device(), entry.ino()),
            entry.next_entry_cookie(),
        ])?;
        reply.u32s(&[len, dirent_type(entry.file_type())])?;
        reply.bytes(name)?;
        reply.zeros(padded.saturating_sub(DIRENT).saturating_sub(name.len()))?;
        Ok(true)
    }
}
