//! Open files: OPEN, READ, WRITE, FSYNC, FALLOCATE, LSEEK, COPY_FILE_RANGE.

use std::io::IoSlice;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::fs::{
    FallocateFlags, FileType, OFlags, SeekFrom, copy_file_range, fallocate, fdatasync, fsync, seek,
};
use rustix::io::{Errno, ReadWriteFlags, pread, pwritev2};

use super::abi::{WRITE_CACHE, WRITE_KILL_SUIDGID};
use super::create::keep_cache;
use super::handles::Handle;
use super::inodes::Node;
use super::reply::Reply;
use super::request::{Copy, Span};
use super::server::{Context, Server};
use crate::limits;

/// The flags of a guest's open that the host's open gets. O_APPEND is not among them: the guest gives the offset
/// of every write, and pages written back late would land at the end. O_DIRECT concerns the guest's cache only.
pub(super) fn open_flags(flags: u32) -> Result<OFlags, Errno> {
    let flags = OFlags::from_bits_retain(flags);
    let access = flags & OFlags::RWMODE;
    if access != OFlags::RDONLY && access != OFlags::WRONLY && access != OFlags::RDWR {
        return Err(Errno::INVAL);
    }
    Ok(access | (flags & (OFlags::SYNC | OFlags::DSYNC)))
}

impl Server {
    /// `struct fuse_open_out` for a new handle of `file`.
    pub(super) fn open_out(
        &self,
        inode: &Node,
        file: OwnedFd,
        flags: u32,
        reply: &mut Reply<'_>,
    ) -> Result<(), Errno> {
        // The answer fits or nothing is held.
        reply.room(16)?;
        let handle = self.handles.insert(inode, file)?;
        reply.u64s(&[handle])?;
        reply.u32s(&[flags, 0])
    }

    pub(super) fn open(&self, node: u64, flags: u32, reply: &mut Reply<'_>) -> Result<(), Errno> {
        let inode = self.inodes.get(node)?;
        let file = self.reopen(&inode, open_flags(flags)?, FileType::RegularFile)?;
        self.open_out(&inode, file, keep_cache(&inode), reply)
    }

    /// What a request that reads is about: the guest's handle `fh`, or, if that is 0, what `node` is of a tree that nobody
    /// changes, opened for this request.
    pub(super) fn opened(&self, node: u64, fh: u64) -> Result<Arc<Handle>, Errno> {
        if fh != 0 {
            return self.handles.get(fh, node);
        }
        let inode = self.inodes.get(node)?;
        if !inode.tree.is_constant() {
            return Err(Errno::BADF);
        }
        let file = match inode.kind {
            FileType::Directory => self.reopen_dir(&inode),
            _ => self.reopen(&inode, OFlags::RDONLY, FileType::RegularFile),
        }?;
        Ok(Arc::new(Handle::new(&inode, file)))
    }

    pub(super) fn read(&self, node: u64, span: Span, reply: &mut Reply<'_>) -> Result<(), Errno> {
        let handle = self.opened(node, span.fh)?;
        let buffer = reply.room(span.size)?;
        let mut done = 0;
        // A short answer means the end of the file to the guest: read on until there is nothing more.
        while let Some(rest) = buffer.get_mut(done..).filter(|rest| !rest.is_empty()) {
            let offset = span.offset.checked_add(done as u64).ok_or(Errno::INVAL)?;
            match pread(&handle, rest, offset) {
                Ok(0) => break,
                Ok(count) => done = done.saturating_add(count),
                Err(Errno::INTR) => {}
                Err(_) if done > 0 => break,
                Err(errno) => return Err(errno),
            }
        }
        reply.advance(done);
        Ok(())
    }

    pub(super) fn write(
        &self,
        context: &Context<'_>,
        fh: u64,
        offset: u64,
        (write_flags, file_flags): (u32, u32),
        data: &[u8],
        reply: &mut Reply<'_>,
    ) -> Result<(), Errno> {
        let node = context.header.node;
        let handle = self.handles.get(fh, node)?;
        // Somebody else may have made a shared file longer than the guest knows: append at its real end.
        let append = OFlags::from_bits_retain(file_flags).contains(OFlags::APPEND)
            && write_flags & WRITE_CACHE == 0
            && self.inodes.get(node)?.tree.shared;
        let mode = if append {
            ReadWriteFlags::APPEND
        } else {
            ReadWriteFlags::empty()
        };
        if i64::try_from(offset).is_err() {
            return Err(Errno::INVAL);
        }
        let count = context
            .identity
            .without_fsetid(write_flags & WRITE_KILL_SUIDGID != 0, || {
                retry(|| pwritev2(&handle, &[IoSlice::new(data)], offset, mode))
            })?;
        reply.u32s(&[u32::try_from(count).map_err(|_| Errno::OVERFLOW)?, 0])
    }

    pub(super) fn fsync(&self, node: u64, fh: u64, data_only: bool) -> Result<(), Errno> {
        let handle = self.opened(node, fh)?;
        if data_only {
            fdatasync(&*handle)
        } else {
            fsync(&*handle)
        }
    }

    pub(super) fn fallocate(
        &self,
        context: &Context<'_>,
        fh: u64,
        offset: u64,
        length: u64,
        mode: u32,
    ) -> Result<(), Errno> {
        let known =
            FallocateFlags::KEEP_SIZE | FallocateFlags::PUNCH_HOLE | FallocateFlags::ZERO_RANGE;
        let mode = FallocateFlags::from_bits_retain(mode);
        if !known.contains(mode) {
            return Err(Errno::OPNOTSUPP);
        }
        let handle = self.handles.get(fh, context.header.node)?;
        // The protocol has no flag for it: set-id bits always go.
        context
            .identity
            .without_fsetid(true, || fallocate(&handle, mode, offset, length))
    }

    pub(super) fn lseek(
        &self,
        node: u64,
        fh: u64,
        offset: u64,
        whence: u32,
        reply: &mut Reply<'_>,
    ) -> Result<(), Errno> {
        let handle = self.opened(node, fh)?;
        if i64::try_from(offset).is_err() {
            return Err(Errno::NXIO);
        }
        let from = match libc::c_int::try_from(whence) {
            Ok(libc::SEEK_DATA) => SeekFrom::Data(offset),
            Ok(libc::SEEK_HOLE) => SeekFrom::Hole(offset),
            // The others the guest's kernel answers itself.
            _ => return Err(Errno::INVAL),
        };
        let _position = handle.lock_position();
        reply.u64s(&[seek(&*handle, from)?])
    }

    pub(super) fn copy_file_range(
        &self,
        context: &Context<'_>,
        copy: &Copy,
        reply: &mut Reply<'_>,
    ) -> Result<(), Errno> {
        if copy.flags != 0 {
            return Err(Errno::INVAL);
        }
        let from = self.opened(context.header.node, copy.fh_in)?;
        let to = self.handles.get(copy.fh_out, copy.node_out)?;
        let len = usize::try_from(copy.len)
            .unwrap_or(usize::MAX)
            .min(limits::FS_COPY);
        let (mut offset_in, mut offset_out) = (copy.offset_in, copy.offset_out);
        let count = context.identity.without_fsetid(true, || {
            copy_file_range(&from, Some(&mut offset_in), &to, Some(&mut offset_out), len)
        })?;
        reply.u32s(&[u32::try_from(count).map_err(|_| Errno::OVERFLOW)?, 0])
    }
}

fn retry<T>(mut call: impl FnMut() -> Result<T, Errno>) -> Result<T, Errno> {
    loop {
        match call() {
            Err(Errno::INTR) => {}
            result => return result,
        }
    }
}
