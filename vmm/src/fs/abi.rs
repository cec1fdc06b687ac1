//! Numbers of the FUSE protocol (`include/uapi/linux/fuse.h`, version 7.38) and the encodings both sides share.

use rustix::fs::{FileType, Statx};

/// Protocol version answered to FUSE_INIT.
pub const MAJOR: u32 = 7;
/// Minor version answered to FUSE_INIT.
pub const MINOR: u32 = 38;
/// `sizeof(struct fuse_in_header)`.
pub const IN_HEADER: usize = 40;
/// `sizeof(struct fuse_out_header)`.
pub const OUT_HEADER: usize = 16;
/// `sizeof(struct fuse_entry_out)`.
pub const ENTRY_OUT: usize = 128;
/// `sizeof(struct fuse_dirent)` without the name.
pub const DIRENT: usize = 24;
/// The node every session begins with.
pub const ROOT_ID: u64 = 1;

/// Operation codes, `enum fuse_opcode`.
pub mod opcode {
    pub const LOOKUP: u32 = 1;
    pub const FORGET: u32 = 2;
    pub const GETATTR: u32 = 3;
    pub const SETATTR: u32 = 4;
    pub const READLINK: u32 = 5;
    pub const SYMLINK: u32 = 6;
    pub const MKNOD: u32 = 8;
    pub const MKDIR: u32 = 9;
    pub const UNLINK: u32 = 10;
    pub const RMDIR: u32 = 11;
    pub const RENAME: u32 = 12;
    pub const LINK: u32 = 13;
    pub const OPEN: u32 = 14;
    pub const READ: u32 = 15;
    pub const WRITE: u32 = 16;
    pub const STATFS: u32 = 17;
    pub const RELEASE: u32 = 18;
    pub const FSYNC: u32 = 20;
    pub const SETXATTR: u32 = 21;
    pub const GETXATTR: u32 = 22;
    pub const LISTXATTR: u32 = 23;
    pub const REMOVEXATTR: u32 = 24;
    pub const INIT: u32 = 26;
    pub const OPENDIR: u32 = 27;
    pub const READDIR: u32 = 28;
    pub const RELEASEDIR: u32 = 29;
    pub const FSYNCDIR: u32 = 30;
    pub const CREATE: u32 = 35;
    pub const INTERRUPT: u32 = 36;
    pub const DESTROY: u32 = 38;
    pub const NOTIFY_REPLY: u32 = 41;
    pub const BATCH_FORGET: u32 = 42;
    pub const FALLOCATE: u32 = 43;
    pub const READDIRPLUS: u32 = 44;
    pub const RENAME2: u32 = 45;
    pub const LSEEK: u32 = 46;
    pub const COPY_FILE_RANGE: u32 = 47;
    pub const SYNCFS: u32 = 50;
    pub const TMPFILE: u32 = 51;
}

/// Flags of FUSE_INIT; bits above 31 travel in `flags2`.
pub mod init {
    pub const ASYNC_READ: u64 = 1 << 0;
    pub const BIG_WRITES: u64 = 1 << 5;
    pub const DONT_MASK: u64 = 1 << 6;
    pub const AUTO_INVAL_DATA: u64 = 1 << 12;
    pub const DO_READDIRPLUS: u64 = 1 << 13;
    pub const READDIRPLUS_AUTO: u64 = 1 << 14;
    pub const ASYNC_DIO: u64 = 1 << 15;
    pub const PARALLEL_DIROPS: u64 = 1 << 18;
    pub const POSIX_ACL: u64 = 1 << 20;
    pub const MAX_PAGES: u64 = 1 << 22;
    pub const CACHE_SYMLINKS: u64 = 1 << 23;
    pub const HANDLE_KILLPRIV_V2: u64 = 1 << 28;
    pub const SETXATTR_EXT: u64 = 1 << 29;
    pub const INIT_EXT: u64 = 1 << 30;
    /// The guest may map owners mount by mount. Callers are then told with requests that make something, and are -1 elsewhere.
    pub const ALLOW_IDMAP: u64 = 1 << 40;

    /// All this server can do; the session gets what the client offers of it.
    pub const SUPPORTED: u64 = ASYNC_READ
        | BIG_WRITES
        | DONT_MASK
        | AUTO_INVAL_DATA
        | DO_READDIRPLUS
        | READDIRPLUS_AUTO
        | ASYNC_DIO
        | PARALLEL_DIROPS
        | POSIX_ACL
        | MAX_PAGES
        | CACHE_SYMLINKS
        | HANDLE_KILLPRIV_V2
        | SETXATTR_EXT
        | INIT_EXT
        | ALLOW_IDMAP;
}

/// `valid` bits of FUSE_SETATTR.
pub mod fattr {
    pub const MODE: u32 = 1 << 0;
    pub const UID: u32 = 1 << 1;
    pub const GID: u32 = 1 << 2;
    pub const SIZE: u32 = 1 << 3;
    pub const ATIME: u32 = 1 << 4;
    pub const MTIME: u32 = 1 << 5;
    pub const FH: u32 = 1 << 6;
    pub const ATIME_NOW: u32 = 1 << 7;
    pub const MTIME_NOW: u32 = 1 << 8;
    pub const KILL_SUIDGID: u32 = 1 << 11;
}

/// `flags` of attributes: there are no extended attributes, and there will be none. A patch of the guest's kernel knows this one and
/// the next (`guest-kernel/patches/fuse-layers.patch`), other kernels overlook them and ask.
pub const ATTR_NO_XATTR: u32 = 1 << 30;
/// The guest opens such a file or folder for reading without a request, and reads with handle 0.
pub const ATTR_STATELESS: u32 = 1 << 31;
/// Answer to FUSE_OPEN: keep the page cache of earlier opens.
pub const FOPEN_KEEP_CACHE: u32 = 1 << 1;
/// Answer to FUSE_OPENDIR: the folder's entries may be cached.
pub const FOPEN_CACHE_DIR: u32 = 1 << 3;
/// FUSE_CREATE of a file that is there: remove the set-id bits.
pub const OPEN_KILL_SUIDGID: u32 = 1 << 0;
/// FUSE_WRITE: delayed write from the page cache.
pub const WRITE_CACHE: u32 = 1 << 0;
/// FUSE_WRITE: remove the set-id bits.
pub const WRITE_KILL_SUIDGID: u32 = 1 << 2;
/// FUSE_FSYNC: data only.
pub const FSYNC_FDATASYNC: u32 = 1 << 0;
/// FUSE_SETXATTR: an ACL is set by a caller outside the file's group.
pub const SETXATTR_ACL_KILL_SGID: u32 = 1 << 0;

/// The protocol's device number: the kernel's `new_encode_dev`.
pub fn encode_device(major: u32, minor: u32) -> u32 {
    (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
}

/// Major and minor of a device number of the protocol: the kernel's `new_decode_dev`.
pub fn decode_device(dev: u32) -> (u32, u32) {
    ((dev & 0xfff00) >> 8, (dev & 0xff) | ((dev >> 12) & 0xfff00))
}

/// The type bits of a mode as `d_type`.
pub fn dirent_type(kind: FileType) -> u32 {
    match kind {
        FileType::Unknown => 0,
        other => (other.as_raw_mode() & libc::S_IFMT) >> 12,
    }
}

/// The file type of a `statx` answer.
pub fn file_type(stat: &Statx) -> FileType {
    FileType::from_raw_mode(u32::from(stat.stx_mode))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_numbers_survive_encoding() {
        for (major, minor) in [
            (0, 0),
            (1, 3),
            (8, 255),
            (8, 256),
            (259, 0xfffff),
            (0xfff, 1),
        ] {
            assert_eq!(decode_device(encode_device(major, minor)), (major, minor));
        }
    }

    #[test]
    fn folder_and_whiteout_types_are_those_of_readdir() {
        assert_eq!(dirent_type(FileType::Directory), u32::from(libc::DT_DIR));
        assert_eq!(
            dirent_type(FileType::CharacterDevice),
            u32::from(libc::DT_CHR)
        );
        assert_eq!(dirent_type(FileType::Unknown), u32::from(libc::DT_UNKNOWN));
    }
}
