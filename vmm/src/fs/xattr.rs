//! Extended attributes. All name spaces pass: `trusted.overlay.*` makes an overlay's upper layer, and
//! `security.capability` comes with images; both are the steward's to change. On the host the mounts are nosuid.

use std::ffi::CStr;
use std::os::fd::AsFd;

use rustix::fs::{XattrFlags, getxattr, removexattr, setxattr};
use rustix::io::Errno;

use super::abi::SETXATTR_ACL_KILL_SGID;
use super::reply::Reply;
use super::server::{Context, Server, fd_path};
use super::steward::needs_steward;
use crate::limits;

impl Server {
    // An O_PATH descriptor has no attributes of its own to the f*xattr calls; the path in /fd names the inode, and
    // a symbolic link there is not followed further.
    fn xattr_path(&self, node: u64) -> Result<(super::inodes::Node, String), Errno> {
        let inode = self.inodes.get(node)?;
        let path = fd_path(&inode);
        Ok((inode, path))
    }

    pub(super) fn set_xattr(
        &self,
        context: &Context<'_>,
        name: &CStr,
        value: &[u8],
        flags: u32,
        ext_flags: u32,
    ) -> Result<(), Errno> {
        let known = XattrFlags::CREATE | XattrFlags::REPLACE;
        let flags = XattrFlags::from_bits_retain(flags);
        if !known.contains(flags) {
            return Err(Errno::INVAL);
        }
        let (held, path) = self.xattr_path(context.header.node)?;
        if needs_steward(name) {
            return self.steward.set_xattr(held.as_fd(), name, value, flags);
        }
        context
            .identity
            .without_fsetid(ext_flags & SETXATTR_ACL_KILL_SGID != 0, || {
                setxattr(path, name, value, flags)
            })
    }

    pub(super) fn get_xattr(
        &self,
        node: u64,
        name: &CStr,
        size: usize,
        reply: &mut Reply<'_>,
    ) -> Result<(), Errno> {
        let (held, path) = self.xattr_path(node)?;
        sized(size, reply, |buffer| {
            // Others can be read without the host's capabilities.
            match name.to_bytes().starts_with(b"trusted.") {
                true => self.steward.get_xattr(held.as_fd(), name, buffer),
                false => getxattr(&path, name, buffer),
            }
        })
    }

    pub(super) fn list_xattr(
        &self,
        node: u64,
        size: usize,
        reply: &mut Reply<'_>,
    ) -> Result<(), Errno> {
        let held = self.inodes.get(node)?;
        sized(size, reply, |buffer| {
            self.steward.list_xattr(held.as_fd(), buffer)
        })
    }

    pub(super) fn remove_xattr(&self, node: u64, name: &CStr) -> Result<(), Errno> {
        let (held, path) = self.xattr_path(node)?;
        match needs_steward(name) {
            true => self.steward.remove_xattr(held.as_fd(), name),
            false => removexattr(path, name),
        }
    }
}

/// A question for the size (`size` 0) is answered with a number, others with the bytes.
fn sized(
    size: usize,
    reply: &mut Reply<'_>,
    read: impl FnOnce(&mut [u8]) -> Result<usize, Errno>,
) -> Result<(), Errno> {
    if size == 0 {
        let count = read(&mut vec![0; limits::FS_XATTR])?;
        return reply.u32s(&[u32::try_from(count).map_err(|_| Errno::OVERFLOW)?, 0]);
    }
    let count = read(reply.room(size)?)?;
    reply.advance(count);
    Ok(())
}
