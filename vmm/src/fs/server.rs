//! The FUSE server: from a checked request to the host's file system and back.
//!
//! One [`Server`] is shared by all workers. Operations live in the sibling modules, each an `impl Server`.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use rustix::fs::{
    AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags, Statx, StatxFlags, fstatvfs, openat,
    openat2, statx,
};
use rustix::io::Errno;

use super::abi::{self, MAJOR, MINOR, ROOT_ID, init};
use super::creds::Identity;
use super::handles::Handles;
use super::inodes::{Inode, Inodes, Limits, Node};
use super::namespace::Namespace;
use super::parse::{header, operation};
use super::reply::Reply;
use super::request::{Header, Name, Operation};
use super::steward::Steward;
use super::trees::{Tree, Trees};
use crate::limits;

/// How many inodes and open files the process's descriptors allow.
#[derive(Clone, Copy, Debug)]
pub struct Budget {
    pub inodes: Limits,
    pub handles: usize,
}

/// The file server's state.
pub struct Server {
    pub(super) inodes: Inodes,
    pub(super) handles: Handles,
    pub(super) trees: Trees,
    pub(super) steward: Arc<Steward>,
    devices: RwLock<Vec<(u32, u32)>>,
    ready: AtomicBool,
    warnings: AtomicU32,
}

/// One request in the works.
pub(super) struct Context<'a> {
    pub header: Header,
    pub identity: &'a Identity,
}

impl Server {
    /// A server without trees in a namespace that its threads are in.
    pub fn new(namespace: Namespace, steward: Arc<Steward>, budget: Budget) -> Result<Self, Errno> {
        let Namespace { root, names } = namespace;
        let trees = Trees::new(names, Arc::clone(&steward));
        let stat = stat(&root)?;
        let inodes = Inodes::new(root, &stat, Arc::new(Tree::root()), budget.inodes);
        Ok(Self {
            inodes,
            handles: Handles::new(budget.handles),
            trees,
            steward,
            devices: RwLock::default(),
            ready: AtomicBool::new(false),
            warnings: AtomicU32::new(0),
        })
    }

    /// Answers one message. `length` is what the sender sent; more than `message` holds was cut off.
    pub fn handle<'b>(
        &self,
        identity: &Identity,
        message: &[u8],
        length: usize,
        buffer: &'b mut [u8],
    ) -> Option<&'b [u8]> {
        let Some(header) = header(message) else {
            self.warn(format_args!("a message of {length} bytes has no header"));
            return None;
        };
        let parsed = if length > message.len() {
            Err(Errno::INVAL)
        } else {
            operation(message)
        };
        let silent = matches!(
            header.opcode,
            abi::opcode::FORGET
                | abi::opcode::BATCH_FORGET
                | abi::opcode::INTERRUPT
                | abi::opcode::NOTIFY_REPLY
        );
        let mut reply = Reply::new(buffer);
        let context = Context { header, identity };
        let result = match parsed {
            Ok(operation) => self.dispatch(&context, operation, &mut reply),
            Err(errno) => {
                if errno == Errno::INVAL {
                    self.warn(format_args!(
                        "a malformed message of opcode {} and {length} bytes",
                        header.opcode
                    ));
                }
                Err(errno)
            }
        };
        if let Err(errno) = result {
            tracing::trace!(opcode = header.opcode, node = header.node, %errno, "refused");
        }
        (!silent).then(|| reply.finish(header.unique, result))
    }

    fn warn(&self, what: std::fmt::Arguments<'_>) {
        // The guest must not fill the log.
        if self.warnings.fetch_add(1, Ordering::Relaxed) < limits::FS_WARNINGS {
            tracing::warn!("{what}");
        }
    }

    fn dispatch(
        &self,
        context: &Context<'_>,
        op: Operation<'_>,
        reply: &mut Reply<'_>,
    ) -> Result<(), Errno> {
        use Operation as Op;
        let node = context.header.node;
        match op {
            Op::Init {
                major,
                minor,
                max_readahead,
                flags,
            } => {
                return self.init(major, minor, max_readahead, flags, reply);
            }
            Op::Ignored => return Ok(()),
            _ if !self.ready.load(Ordering::Acquire) => return Err(Errno::IO),
            _ => {}
        }
        match op {
            Op::Init { .. } | Op::Ignored => Ok(()),
            Op::Destroy => {
                self.reset();
                Ok(())
            }
            Op::Lookup { name } => self.lookup(node, name, reply),
            Op::Forget { count } => {
                self.inodes.forget(node, count);
                Ok(())
            }
            Op::BatchForget { nodes } => {
                nodes
                    .iter()
                    .for_each(|(node, count)| self.inodes.forget(node, count));
                Ok(())
            }
            Op::GetAttr => self.get_attr(node, reply),
            Op::SetAttr(change) => self.set_attr(context, &change, reply),
            Op::ReadLink => self.read_link(node, reply),
            Op::Symlink { name, target } => self.symlink(context, name, target, reply),
            Op::Mknod { name, mode, rdev } => self.mknod(context, name, mode, rdev, reply),
            Op::Mkdir { name, mode } => self.mkdir(context, name, mode, reply),
            Op::Unlink { name } => self.unlink(node, name, false),
            Op::Rmdir { name } => self.unlink(node, name, true),
            Op::Rename {
                name,
                new_dir,
                new_name,
                flags,
            } => self.rename(node, name, new_dir, new_name, flags),
            Op::Link { node: source, name } => self.link(source, node, name, reply),
            Op::Open { flags } => self.open(node, flags, reply),
            Op::Create {
                name,
                flags,
                mode,
                open_flags,
            } => self.create(context, name, flags, mode, open_flags, reply),
            Op::TmpFile { flags, mode } => self.tmp_file(context, flags, mode, reply),
            Op::Read(span) => self.read(node, span, reply),
            Op::Write {
                fh,
                offset,
                write_flags,
                flags,
                data,
            } => self.write(context, fh, offset, (write_flags, flags), data, reply),
            Op::Release { fh } | Op::ReleaseDir { fh } => self.handles.remove(fh, node),
            Op::Fsync { fh, data_only } | Op::FsyncDir { fh, data_only } => {
                self.fsync(node, fh, data_only)
            }
            Op::StatFs => self.stat_fs(node, reply),
            Op::SetXattr {
                name,
                value,
                flags,
                ext_flags,
            } => self.set_xattr(context, name, value, flags, ext_flags),
            Op::GetXattr { name, size } => self.get_xattr(node, name, size, reply),
            Op::ListXattr { size } => self.list_xattr(node, size, reply),
            Op::RemoveXattr { name } => self.remove_xattr(node, name),
            Op::OpenDir => self.open_dir(node, reply),
            Op::ReadDir { span, plus } => self.read_dir(node, span, plus, reply),
            Op::Fallocate {
                fh,
                offset,
                length,
                mode,
            } => self.fallocate(context, fh, offset, length, mode),
            Op::Lseek { fh, offset, whence } => self.lseek(node, fh, offset, whence, reply),
            Op::CopyFileRange(copy) => self.copy_file_range(context, &copy, reply),
            Op::SyncFs => self.sync_fs(),
        }
    }

    fn init(
        &self,
        major: u32,
        minor: u32,
        max_readahead: u32,
        flags: u64,
        reply: &mut Reply<'_>,
    ) -> Result<(), Errno> {
        if major > MAJOR {
            // The client tries again with our major version.
            reply.u32s(&[MAJOR, MINOR])?;
            return reply.zeros(56);
        }
        // 7.31 (Linux 5.4) is the first that a virtio-fs guest can have.
        if major < MAJOR || minor < 31 {
            return Err(Errno::PROTO);
        }
        // A new session: the guest mounted again and knows nothing of the old one.
        self.reset();
        let agreed = flags & init::SUPPORTED;
        let data = u32::try_from(limits::FS_MESSAGE_DATA).unwrap_or(u32::MAX);
        // max_pages counts pages of 4 KiB.
        let max_pages = data / 4096;
        let (max_background, congestion) = (64u32, 48u32);
        // The low half goes into the 32-bit field on purpose; `flags2` has the high one.
        reply.u32s(&[MAJOR, MINOR, max_readahead, agreed as u32])?;
        reply.bytes(&(max_background as u16).to_ne_bytes())?;
        reply.bytes(&(congestion as u16).to_ne_bytes())?;
        reply.u32s(&[data, 1])?;
        reply.bytes(&(max_pages as u16).to_ne_bytes())?;
        reply.zeros(2)?;
        reply.u32s(&[(agreed >> 32) as u32])?;
        reply.zeros(28)?;
        self.ready.store(true, Ordering::Release);
        tracing::info!(client = format_args!("{major}.{minor}"), "session begins");
        Ok(())
    }

    fn reset(&self) {
        self.handles.remove_all(|_| true);
        self.inodes.remove(|_| true);
    }

    /// Opens the entry `name` of `dir` as O_PATH and counts a lookup of it.
    pub(super) fn child(&self, dir: &Node, name: Name<'_>) -> Result<(Node, Statx), Errno> {
        if dir.id == ROOT_ID {
            let id = name.as_c_str().to_str().map_err(|_| Errno::NOENT)?;
            let tree = self.trees.get(id).ok_or(Errno::NOENT)?;
            return self.found(tree.open_root()?, &tree);
        }
        let fd = openat2(
            dir,
            name.as_c_str(),
            OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
            Mode::empty(),
            ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS,
        )?;
        self.found(fd, &dir.tree)
    }

    /// Counts a lookup of the inode behind `fd`.
    pub(super) fn found(&self, fd: OwnedFd, tree: &Arc<Tree>) -> Result<(Node, Statx), Errno> {
        let stat = stat(&fd)?;
        Ok((self.inodes.look_up(fd, &stat, tree)?, stat))
    }

    /// Runs `answer` and takes the lookup of `inode` back if it fails: the guest never learned of it.
    pub(super) fn or_forget(
        &self,
        inode: &Inode,
        answer: impl FnOnce() -> Result<(), Errno>,
    ) -> Result<(), Errno> {
        answer().inspect_err(|_| self.inodes.forget(inode.id, 1))
    }

    fn lookup(&self, node: u64, name: Name<'_>, reply: &mut Reply<'_>) -> Result<(), Errno> {
        let dir = self.inodes.get(node)?;
        match self.child(&dir, name) {
            Ok((inode, stat)) => {
                self.or_forget(&inode, || self.entry(&inode, &stat, reply))?;
                self.mark_bare(&[(inode, reply.body_len())], reply);
                Ok(())
            }
            // Node 0 is "there is none", to be remembered for as long as the timeout says.
            Err(Errno::NOENT) if !dir.tree.shared && !dir.tree.is_removed() => {
                reply.u64s(&[0, 0, dir.tree.timeout().as_secs(), 0])?;
                reply.zeros(abi::ENTRY_OUT.saturating_sub(32))
            }
            Err(errno) => Err(errno),
        }
    }

    fn stat_fs(&self, node: u64, reply: &mut Reply<'_>) -> Result<(), Errno> {
        let stat = fstatvfs(self.inodes.get(node)?)?;
        reply.u64s(&[
            stat.f_blocks,
            stat.f_bfree,
            stat.f_bavail,
            stat.f_files,
            stat.f_ffree,
        ])?;
        let small = |value: u64| u32::try_from(value).unwrap_or(u32::MAX);
        reply.u32s(&[
            small(stat.f_bsize),
            small(stat.f_namemax),
            small(stat.f_frsize),
        ])?;
        reply.zeros(28)
    }

    fn sync_fs(&self) -> Result<(), Errno> {
        for tree in self.trees.all() {
            if let (false, Some(root)) = (tree.readonly, tree.mount_root()) {
                rustix::fs::syncfs(openat(
                    CWD,
                    fd_path(root),
                    OFlags::RDONLY | OFlags::CLOEXEC,
                    Mode::empty(),
                )?)?;
            }
        }
        Ok(())
    }

    /// Opens what `inode` holds as O_PATH. Devices, pipes and sockets are never opened: that could block, or act
    /// on the host (CVE-2020-35517).
    pub(super) fn reopen(
        &self,
        inode: &Node,
        flags: OFlags,
        kind: FileType,
    ) -> Result<OwnedFd, Errno> {
        if inode.kind != kind {
            return Err(match inode.kind {
                FileType::Directory => Errno::ISDIR,
                _ if kind == FileType::Directory => Errno::NOTDIR,
                FileType::Symlink => Errno::LOOP,
                _ => Errno::NXIO,
            });
        }
        openat(
            CWD,
            fd_path(inode),
            flags | OFlags::CLOEXEC | OFlags::NOCTTY,
            Mode::empty(),
        )
    }

    /// Inode numbers of two file systems may be the same; the guest sees one. The first file system's numbers
    /// stay as they are.
    pub(super) fn number(&self, device: (u32, u32), number: u64) -> u64 {
        let index_of = |devices: &[(u32, u32)]| devices.iter().position(|known| *known == device);
        let known = index_of(&self.devices.read().unwrap_or_else(PoisonError::into_inner));
        let index = known.unwrap_or_else(|| {
            let mut devices = self.devices.write().unwrap_or_else(PoisonError::into_inner);
            index_of(&devices).unwrap_or_else(|| {
                if devices.len() < limits::FS_DEVICES {
                    devices.push(device);
                }
                devices.len().saturating_sub(1)
            })
        });
        number ^ ((index as u64) << 48)
    }

    /// Forgets all that was found in `tree`.
    pub fn forget_tree(&self, tree: &Arc<Tree>) {
        self.handles.remove_all(|of| Arc::ptr_eq(of, tree));
        self.inodes.remove(|inode| tree.holds(inode));
    }

    /// The trees, for the control socket.
    pub fn trees(&self) -> &Trees {
        &self.trees
    }

    /// Inodes and handles held.
    pub fn held(&self) -> (usize, usize) {
        (self.inodes.len(), self.handles.len())
    }
}

/// The path under which a held descriptor can be opened or named.
pub(super) fn fd_path(fd: impl AsFd) -> String {
    format!("/fd/{}", fd.as_fd().as_raw_fd())
}

/// What `fd` is, O_PATH or not.
pub(super) fn stat(fd: impl AsFd) -> Result<Statx, Errno> {
    let mask = StatxFlags::BASIC_STATS | StatxFlags::MNT_ID;
    statx(
        fd,
        c"",
        AtFlags::EMPTY_PATH | AtFlags::SYMLINK_NOFOLLOW,
        mask,
    )
}
