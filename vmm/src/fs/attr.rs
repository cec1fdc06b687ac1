//! Attributes: GETATTR, SETATTR and the entry every lookup answers with.

use std::os::fd::AsFd;

use rustix::fs::{
    AtFlags, CWD, FileType, Gid, Mode, OFlags, Statx, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT,
    Uid, chmodat, chownat, ftruncate, readlinkat, utimensat,
};
use rustix::io::Errno;

use super::abi::{ATTR_NO_XATTR, ATTR_STATELESS, encode_device, fattr};
use super::inodes::{Inode, Node};
use super::reply::Reply;
use super::request::SetAttr;
use super::server::{Context, Server, fd_path, stat};

impl Server {
    /// `struct fuse_attr`.
    fn attributes(&self, inode: &Inode, stat: &Statx, reply: &mut Reply<'_>) -> Result<(), Errno> {
        let number = self.number((stat.stx_dev_major, stat.stx_dev_minor), stat.stx_ino);
        let seconds = |time: &rustix::fs::StatxTimestamp| time.tv_sec.cast_unsigned();
        reply.u64s(&[
            number,
            stat.stx_size,
            stat.stx_blocks,
            seconds(&stat.stx_atime),
            seconds(&stat.stx_mtime),
            seconds(&stat.stx_ctime),
        ])?;
        reply.u32s(&[
            stat.stx_atime.tv_nsec,
            stat.stx_mtime.tv_nsec,
            stat.stx_ctime.tv_nsec,
            u32::from(stat.stx_mode),
            stat.stx_nlink,
            stat.stx_uid,
            stat.stx_gid,
            encode_device(stat.stx_rdev_major, stat.stx_rdev_minor),
            stat.stx_blksize,
            if inode.tree.is_constant() {
                ATTR_STATELESS
            } else {
                0
            },
        ])
    }

    /// `struct fuse_entry_out`: the guest holds `inode` once more.
    pub(super) fn entry(
        &self,
        inode: &Inode,
        stat: &Statx,
        reply: &mut Reply<'_>,
    ) -> Result<(), Errno> {
        let seconds = inode.tree.timeout().as_secs();
        reply.u64s(&[inode.id, 0, seconds, seconds])?;
        reply.u32s(&[0, 0])?;
        self.attributes(inode, stat, reply)
    }

    /// Says of entries of trees that nobody changes which have no extended attributes; each with where its attributes end in the body. What
    /// cannot be told the guest asks for.
    pub(super) fn mark_bare(&self, entries: &[(Node, usize)], reply: &mut Reply<'_>) {
        let constant = |(inode, _): &&(Node, usize)| inode.tree.is_constant();
        let entries: Vec<_> = entries.iter().filter(constant).collect();
        let files: Vec<_> = entries.iter().map(|(inode, _)| inode.as_fd()).collect();
        if files.is_empty() {
            return;
        }
        let Ok(bare) = self.steward.bare(&files) else {
            return;
        };
        for ((_, end), _) in entries.iter().zip(bare).filter(|(_, bare)| *bare) {
            reply.set_bits(*end, ATTR_NO_XATTR);
        }
    }

    fn attr_out(&self, inode: &Node, reply: &mut Reply<'_>) -> Result<(), Errno> {
        reply.u64s(&[inode.tree.timeout().as_secs()])?;
        reply.u32s(&[0, 0])?;
        self.attributes(inode, &stat(inode)?, reply)
    }

    pub(super) fn get_attr(&self, node: u64, reply: &mut Reply<'_>) -> Result<(), Errno> {
        self.attr_out(&self.inodes.get(node)?, reply)
    }

    pub(super) fn set_attr(
        &self,
        context: &Context<'_>,
        change: &SetAttr,
        reply: &mut Reply<'_>,
    ) -> Result<(), Errno> {
        let node = context.header.node;
        let inode = self.inodes.get(node)?;
        let has = |bit: u32| change.valid & bit != 0;
        // The owner first: the host's chown takes set-id bits away, which a new mode may bring.
        if has(fattr::UID | fattr::GID) {
            let id = |bit: u32, id: u32| match (has(bit), id) {
                (false, _) => Ok(None),
                (true, u32::MAX) => Err(Errno::INVAL),
                (true, id) => Ok(Some(id)),
            };
            let owner = id(fattr::UID, change.uid)?.map(Uid::from_raw);
            let group = id(fattr::GID, change.gid)?.map(Gid::from_raw);
            chownat(
                &inode,
                c"",
                owner,
                group,
                AtFlags::EMPTY_PATH | AtFlags::SYMLINK_NOFOLLOW,
            )?;
        }
        if has(fattr::MODE) {
            chmodat(
                CWD,
                fd_path(&inode),
                Mode::from_raw_mode(change.mode & 0o7777),
                AtFlags::empty(),
            )?;
        }
        if has(fattr::SIZE) {
            context
                .identity
                .without_fsetid(has(fattr::KILL_SUIDGID), || {
                    if has(fattr::FH) {
                        return ftruncate(self.handles.get(change.fh, node)?, change.size);
                    }
                    ftruncate(
                        self.reopen(&inode, OFlags::WRONLY, FileType::RegularFile)?,
                        change.size,
                    )
                })?;
        }
        if has(fattr::ATIME | fattr::MTIME) {
            let time = |set: u32, now: u32, (tv_sec, nsec): (i64, u32)| match (has(set), has(now)) {
                (false, _) => Ok(Timespec {
                    tv_sec: 0,
                    tv_nsec: UTIME_OMIT,
                }),
                (true, true) => Ok(Timespec {
                    tv_sec: 0,
                    tv_nsec: UTIME_NOW,
                }),
                (true, false) if nsec >= 1_000_000_000 => Err(Errno::INVAL),
                (true, false) => Ok(Timespec {
                    tv_sec,
                    tv_nsec: nsec.into(),
                }),
            };
            let times = Timestamps {
                last_access: time(fattr::ATIME, fattr::ATIME_NOW, change.atime)?,
                last_modification: time(fattr::MTIME, fattr::MTIME_NOW, change.mtime)?,
            };
            utimensat(
                &inode,
                c"",
                &times,
                AtFlags::EMPTY_PATH | AtFlags::SYMLINK_NOFOLLOW,
            )?;
        }
        self.attr_out(&inode, reply)
    }

    pub(super) fn read_link(&self, node: u64, reply: &mut Reply<'_>) -> Result<(), Errno> {
        let inode = self.inodes.get(node)?;
        if inode.kind != FileType::Symlink {
            return Err(Errno::INVAL);
        }
        reply.bytes(readlinkat(&inode, c"", Vec::new())?.to_bytes())
    }
}
