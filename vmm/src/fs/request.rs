//! What a guest's FUSE message becomes once [`super::parse`] has checked it.
//!
//! Lengths, names and sizes in these types are right; node ids and handles stay numbers that the tables must still
//! know.

use std::ffi::CStr;

use rustix::io::Errno;

use crate::limits;

/// Who asks, as the guest's kernel says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caller {
    pub uid: u32,
    pub gid: u32,
}

/// The checked `fuse_in_header`.
#[derive(Clone, Copy, Debug)]
pub struct Header {
    pub opcode: u32,
    pub unique: u64,
    pub node: u64,
    pub caller: Caller,
}

/// One name of a folder: not empty, not `.` or `..`, no `/`, at most 255 bytes.
#[derive(Clone, Copy, Debug)]
pub struct Name<'a>(&'a CStr);

impl<'a> Name<'a> {
    /// Checks `name`.
    pub fn new(name: &'a CStr) -> Result<Self, Errno> {
        let bytes = name.to_bytes();
        if bytes.len() > limits::FS_NAME {
            return Err(Errno::NAMETOOLONG);
        }
        if bytes.is_empty() || bytes == b"." || bytes == b".." || bytes.contains(&b'/') {
            return Err(Errno::INVAL);
        }
        Ok(Self(name))
    }

    /// The name for a system call.
    pub fn as_c_str(self) -> &'a CStr {
        self.0
    }
}

/// What FUSE_SETATTR changes.
#[derive(Clone, Copy, Debug, Default)]
pub struct SetAttr {
    pub valid: u32,
    pub fh: u64,
    pub size: u64,
    pub atime: (i64, u32),
    pub mtime: (i64, u32),
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
}

/// Mode and umask of a node to be made.
#[derive(Clone, Copy, Debug)]
pub struct NewMode {
    pub mode: u32,
    pub umask: u32,
}

/// A page of a folder or a stretch of a file.
#[derive(Clone, Copy, Debug)]
pub struct Span {
    pub fh: u64,
    pub offset: u64,
    pub size: usize,
}

/// Both ends of FUSE_COPY_FILE_RANGE.
#[derive(Clone, Copy, Debug)]
pub struct Copy {
    pub fh_in: u64,
    pub offset_in: u64,
    pub node_out: u64,
    pub fh_out: u64,
    pub offset_out: u64,
    pub len: u64,
    pub flags: u64,
}

/// The nodes of FUSE_FORGET and FUSE_BATCH_FORGET: pairs of node id and count, 16 bytes each.
#[derive(Clone, Copy, Debug)]
pub struct Forgets<'a>(pub &'a [u8]);

impl Forgets<'_> {
    /// Node id and number of lookups to forget.
    pub fn iter(self) -> impl Iterator<Item = (u64, u64)> {
        self.0.chunks_exact(16).filter_map(|pair| {
            let (node, count) = pair.split_first_chunk::<8>()?;
            Some((
                u64::from_ne_bytes(*node),
                u64::from_ne_bytes(*count.first_chunk()?),
            ))
        })
    }
}

/// A checked operation.
#[derive(Clone, Copy, Debug)]
pub enum Operation<'a> {
    Init {
        major: u32,
        minor: u32,
        max_readahead: u32,
        flags: u64,
    },
    Destroy,
    Lookup {
        name: Name<'a>,
    },
    Forget {
        count: u64,
    },
    BatchForget {
        nodes: Forgets<'a>,
    },
    GetAttr,
    SetAttr(SetAttr),
    ReadLink,
    Symlink {
        name: Name<'a>,
        target: &'a CStr,
    },
    Mknod {
        name: Name<'a>,
        mode: NewMode,
        rdev: u32,
    },
    Mkdir {
        name: Name<'a>,
        mode: NewMode,
    },
    Unlink {
        name: Name<'a>,
    },
    Rmdir {
        name: Name<'a>,
    },
    Rename {
        name: Name<'a>,
        new_dir: u64,
        new_name: Name<'a>,
        flags: u32,
    },
    Link {
        node: u64,
        name: Name<'a>,
    },
    Open {
        flags: u32,
    },
    Create {
        name: Name<'a>,
        flags: u32,
        mode: NewMode,
        open_flags: u32,
    },
    TmpFile {
        flags: u32,
        mode: NewMode,
    },
    Read(Span),
    Write {
        fh: u64,
        offset: u64,
        write_flags: u32,
        flags: u32,
        data: &'a [u8],
    },
    Release {
        fh: u64,
    },
    Fsync {
        fh: u64,
        data_only: bool,
    },
    FsyncDir {
        fh: u64,
        data_only: bool,
    },
    StatFs,
    SetXattr {
        name: &'a CStr,
        value: &'a [u8],
        flags: u32,
        ext_flags: u32,
    },
    GetXattr {
        name: &'a CStr,
        size: usize,
    },
    ListXattr {
        size: usize,
    },
    RemoveXattr {
        name: &'a CStr,
    },
    OpenDir,
    ReadDir {
        span: Span,
        plus: bool,
    },
    ReleaseDir {
        fh: u64,
    },
    Fallocate {
        fh: u64,
        offset: u64,
        length: u64,
        mode: u32,
    },
    Lseek {
        fh: u64,
        offset: u64,
        whence: u32,
    },
    CopyFileRange(Copy),
    SyncFs,
    /// Nothing to do and nothing to answer.
    Ignored,
}
