//! Names of folders: UNLINK, RMDIR, RENAME, LINK.

use rustix::fs::{AtFlags, CWD, RenameFlags, linkat, renameat_with, unlinkat};
use rustix::io::Errno;

use super::reply::Reply;
use super::request::Name;
use super::server::{Server, fd_path};

impl Server {
    pub(super) fn unlink(&self, node: u64, name: Name<'_>, folder: bool) -> Result<(), Errno> {
        let flags = if folder {
            AtFlags::REMOVEDIR
        } else {
            AtFlags::empty()
        };
        unlinkat(self.inodes.get(node)?, name.as_c_str(), flags)
    }

    pub(super) fn rename(
        &self,
        node: u64,
        name: Name<'_>,
        new_dir: u64,
        new_name: Name<'_>,
        flags: u32,
    ) -> Result<(), Errno> {
        // WHITEOUT and EXCHANGE are what an overlay's upper layer cannot do without.
        let known = RenameFlags::NOREPLACE | RenameFlags::EXCHANGE | RenameFlags::WHITEOUT;
        let flags = RenameFlags::from_bits_retain(flags);
        if !known.contains(flags) {
            return Err(Errno::INVAL);
        }
        let (from, to) = (self.inodes.get(node)?, self.inodes.get(new_dir)?);
        renameat_with(from, name.as_c_str(), to, new_name.as_c_str(), flags)
    }

    pub(super) fn link(
        &self,
        source: u64,
        node: u64,
        name: Name<'_>,
        reply: &mut Reply<'_>,
    ) -> Result<(), Errno> {
        let (source, dir) = (self.inodes.get(source)?, self.inodes.get(node)?);
        // Only the link in /fd is followed, to the very inode that is held.
        linkat(
            CWD,
            fd_path(&source),
            &dir,
            name.as_c_str(),
            AtFlags::SYMLINK_FOLLOW,
        )?;
        let (inode, stat) = self.child(&dir, name)?;
        self.or_forget(&inode, || self.entry(&inode, &stat, reply))
    }
}
