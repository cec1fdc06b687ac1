//! New nodes: MKNOD, MKDIR, SYMLINK, CREATE, TMPFILE. They belong to the guest's caller.

use std::ffi::CStr;
use std::os::fd::OwnedFd;

use rustix::fs::{CWD, FileType, Mode, OFlags, mkdirat, mknodat, openat, symlinkat};
use rustix::io::Errno;

use super::abi::{FOPEN_KEEP_CACHE, OPEN_KILL_SUIDGID, decode_device};
use super::file::open_flags;
use super::inodes::{Inode, Node};
use super::reply::Reply;
use super::request::{Name, NewMode};
use super::server::{Context, Server, fd_path};

fn permissions(mode: NewMode) -> Mode {
    Mode::from_raw_mode(mode.mode & 0o7777)
}

impl Server {
    /// The folder for a new node. Refused before the node is made if there would be no room to hold it.
    fn folder(&self, context: &Context<'_>) -> Result<Node, Errno> {
        if !self.inodes.has_room() {
            return Err(Errno::NFILE);
        }
        self.inodes.get(context.header.node)
    }

    fn new_entry(&self, dir: &Node, name: Name<'_>, reply: &mut Reply<'_>) -> Result<(), Errno> {
        let (inode, stat) = self.child(dir, name)?;
        self.or_forget(&inode, || self.entry(&inode, &stat, reply))
    }

    pub(super) fn symlink(
        &self,
        context: &Context<'_>,
        name: Name<'_>,
        target: &CStr,
        reply: &mut Reply<'_>,
    ) -> Result<(), Errno> {
        let dir = self.folder(context)?;
        context.identity.create(context.header.caller, 0, || {
            symlinkat(target, &dir, name.as_c_str())
        })?;
        self.new_entry(&dir, name, reply)
    }

    pub(super) fn mkdir(
        &self,
        context: &Context<'_>,
        name: Name<'_>,
        mode: NewMode,
        reply: &mut Reply<'_>,
    ) -> Result<(), Errno> {
        let dir = self.folder(context)?;
        context
            .identity
            .create(context.header.caller, mode.umask, || {
                mkdirat(&dir, name.as_c_str(), permissions(mode))
            })?;
        self.new_entry(&dir, name, reply)
    }

    pub(super) fn mknod(
        &self,
        context: &Context<'_>,
        name: Name<'_>,
        mode: NewMode,
        rdev: u32,
        reply: &mut Reply<'_>,
    ) -> Result<(), Errno> {
        let kind = FileType::from_raw_mode(mode.mode);
        let (major, minor) = decode_device(rdev);
        match kind {
            FileType::RegularFile | FileType::Fifo | FileType::Socket => {}
            // An overlay's whiteout. A real device node would be one on the host as well, where the folder is not
            // mounted nodev.
            FileType::CharacterDevice if (major, minor) == (0, 0) => {}
            FileType::CharacterDevice | FileType::BlockDevice => return Err(Errno::PERM),
            _ => return Err(Errno::INVAL),
        }
        let dir = self.folder(context)?;
        context
            .identity
            .create(context.header.caller, mode.umask, || {
                mknodat(&dir, name.as_c_str(), kind, permissions(mode), 0)
            })?;
        self.new_entry(&dir, name, reply)
    }

    pub(super) fn create(
        &self,
        context: &Context<'_>,
        name: Name<'_>,
        flags: u32,
        mode: NewMode,
        kill: u32,
        reply: &mut Reply<'_>,
    ) -> Result<(), Errno> {
        let dir = self.folder(context)?;
        let wanted = open_flags(flags)?;
        let make = wanted | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let made = context
            .identity
            .create(context.header.caller, mode.umask, || {
                openat(&dir, name.as_c_str(), make, permissions(mode))
            });
        match made {
            Ok(file) => self.new_file(&dir, file, reply),
            Err(Errno::EXIST) if !guest_flags(flags).contains(OFlags::EXCL) => {
                let (inode, stat) = self.child(&dir, name)?;
                self.or_forget(&inode, || {
                    let truncate = guest_flags(flags) & OFlags::TRUNC;
                    let kill = kill & OPEN_KILL_SUIDGID != 0;
                    let file = context.identity.without_fsetid(kill, || {
                        self.reopen(&inode, wanted | truncate, FileType::RegularFile)
                    })?;
                    let stat = if truncate.is_empty() {
                        stat
                    } else {
                        super::server::stat(&inode)?
                    };
                    self.entry(&inode, &stat, reply)?;
                    self.open_out(&inode, file, keep_cache(&inode), reply)
                })
            }
            Err(errno) => Err(errno),
        }
    }

    pub(super) fn tmp_file(
        &self,
        context: &Context<'_>,
        flags: u32,
        mode: NewMode,
        reply: &mut Reply<'_>,
    ) -> Result<(), Errno> {
        let dir = self.folder(context)?;
        let exclusive = guest_flags(flags) & OFlags::EXCL;
        let make = open_flags(flags)? | exclusive | OFlags::TMPFILE | OFlags::CLOEXEC;
        let file = context
            .identity
            .create(context.header.caller, mode.umask, || {
                openat(&dir, c".", make, permissions(mode))
            })?;
        self.new_file(&dir, file, reply)
    }

    fn new_file(&self, dir: &Node, file: OwnedFd, reply: &mut Reply<'_>) -> Result<(), Errno> {
        // By the descriptor, not the name: a name may have changed since.
        let fd = openat(
            CWD,
            fd_path(&file),
            OFlags::PATH | OFlags::CLOEXEC,
            Mode::empty(),
        )?;
        let (inode, stat) = self.found(fd, &dir.tree)?;
        self.or_forget(&inode, || {
            self.entry(&inode, &stat, reply)?;
            self.open_out(&inode, file, keep_cache(&inode), reply)
        })
    }
}

fn guest_flags(flags: u32) -> OFlags {
    OFlags::from_bits_retain(flags)
}

/// The guest's page cache stays right over opens where nobody else writes.
pub(super) fn keep_cache(inode: &Inode) -> u32 {
    if inode.tree.shared {
        0
    } else {
        FOPEN_KEEP_CACHE
    }
}
