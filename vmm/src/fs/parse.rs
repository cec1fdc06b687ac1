//! The one place where a guest's FUSE message becomes a checked [`Operation`].
//!
//! Nothing here touches the file system.

use std::ffi::CStr;

use rustix::io::Errno;

use super::abi::{self, IN_HEADER, opcode};
use super::request::{Caller, Copy, Forgets, Header, Name, NewMode, Operation, SetAttr, Span};
use crate::limits;

/// A cursor over a message's body.
struct Body<'a>(&'a [u8]);

impl<'a> Body<'a> {
    fn take(&mut self, len: usize) -> Result<&'a [u8], Errno> {
        let (head, tail) = self.0.split_at_checked(len).ok_or(Errno::INVAL)?;
        self.0 = tail;
        Ok(head)
    }

    fn u32(&mut self) -> Result<u32, Errno> {
        let bytes = self.take(4)?.try_into().map_err(|_| Errno::INVAL)?;
        Ok(u32::from_ne_bytes(bytes))
    }

    fn u64(&mut self) -> Result<u64, Errno> {
        let bytes = self.take(8)?.try_into().map_err(|_| Errno::INVAL)?;
        Ok(u64::from_ne_bytes(bytes))
    }

    fn skip(&mut self, len: usize) -> Result<(), Errno> {
        self.take(len).map(drop)
    }

    fn string(&mut self) -> Result<&'a CStr, Errno> {
        let string = CStr::from_bytes_until_nul(self.0).map_err(|_| Errno::INVAL)?;
        self.skip(string.to_bytes_with_nul().len())?;
        Ok(string)
    }

    fn name(&mut self) -> Result<Name<'a>, Errno> {
        Name::new(self.string()?)
    }

    fn xattr_name(&mut self) -> Result<&'a CStr, Errno> {
        let name = self.string()?;
        if name.is_empty() || name.to_bytes().len() > limits::FS_NAME {
            return Err(Errno::RANGE);
        }
        Ok(name)
    }

    /// A message with bytes left over is not the message it claims to be: this also refuses a NUL inside a name.
    fn end(&self) -> Result<(), Errno> {
        if self.0.is_empty() {
            Ok(())
        } else {
            Err(Errno::INVAL)
        }
    }

    fn ended<T>(&self, value: T) -> Result<T, Errno> {
        self.end().map(|()| value)
    }

    fn span(&mut self) -> Result<Span, Errno> {
        let (fh, offset, size) = (self.u64()?, self.u64()?, self.u32()?);
        // read_flags, lock_owner, flags, padding
        self.skip(20)?;
        let size = usize::try_from(size)
            .map_err(|_| Errno::INVAL)?
            .min(limits::FS_MESSAGE_DATA);
        self.ended(Span { fh, offset, size })
    }

    fn fh_and_data_only(&mut self) -> Result<(u64, bool), Errno> {
        let (fh, flags) = (self.u64()?, self.u32()?);
        self.skip(4)?;
        self.ended((fh, flags & abi::FSYNC_FDATASYNC != 0))
    }

    fn release(&mut self) -> Result<u64, Errno> {
        let fh = self.u64()?;
        self.skip(16)?;
        self.ended(fh)
    }
}

/// Reads the header; `None` if there is none to answer to.
pub fn header(message: &[u8]) -> Option<Header> {
    let mut body = Body(message.get(..IN_HEADER)?);
    body.skip(4).ok()?;
    let (opcode, unique, node) = (body.u32().ok()?, body.u64().ok()?, body.u64().ok()?);
    let caller = Caller {
        uid: body.u32().ok()?,
        gid: body.u32().ok()?,
    };
    Some(Header {
        opcode,
        unique,
        node,
        caller,
    })
}

/// Parses the whole message. `ENOSYS` is an operation this server does not have.
pub fn operation(message: &[u8]) -> Result<Operation<'_>, Errno> {
    let mut body = Body(message);
    let len = body.u32()?;
    if usize::try_from(len) != Ok(message.len()) {
        return Err(Errno::INVAL);
    }
    let code = body.u32()?;
    body.skip(IN_HEADER.saturating_sub(8))?;
    parse(code, &mut body)
}

fn parse<'a>(code: u32, body: &mut Body<'a>) -> Result<Operation<'a>, Errno> {
    use Operation as Op;
    match code {
        opcode::INIT => parse_init(body),
        opcode::DESTROY => Ok(Op::Destroy),
        opcode::LOOKUP => named(body, |name| Op::Lookup { name }),
        opcode::FORGET => {
            let count = body.u64()?;
            body.ended(Op::Forget { count })
        }
        opcode::BATCH_FORGET => {
            let count = body.u32()?;
            body.skip(4)?;
            let bytes = usize::try_from(count)
                .ok()
                .and_then(|count| count.checked_mul(16))
                .ok_or(Errno::INVAL)?;
            let nodes = Forgets(body.take(bytes)?);
            body.ended(Op::BatchForget { nodes })
        }
        opcode::GETATTR => {
            // Flags and a handle, which tell nothing that the node does not.
            body.skip(16)?;
            body.ended(Op::GetAttr)
        }
        opcode::SETATTR => parse_setattr(body),
        opcode::READLINK => body.ended(Op::ReadLink),
        opcode::SYMLINK => {
            let (name, target) = (body.name()?, body.string()?);
            if target.is_empty() {
                return Err(Errno::NOENT);
            }
            body.ended(Op::Symlink { name, target })
        }
        opcode::MKNOD => {
            let (mode, rdev, umask) = (body.u32()?, body.u32()?, body.u32()?);
            body.skip(4)?;
            let name = body.name()?;
            body.ended(Op::Mknod {
                name,
                mode: NewMode { mode, umask },
                rdev,
            })
        }
        opcode::MKDIR => {
            let mode = NewMode {
                mode: body.u32()?,
                umask: body.u32()?,
            };
            named(body, |name| Op::Mkdir { name, mode })
        }
        opcode::UNLINK => named(body, |name| Op::Unlink { name }),
        opcode::RMDIR => named(body, |name| Op::Rmdir { name }),
        opcode::RENAME | opcode::RENAME2 => {
            let new_dir = body.u64()?;
            let mut flags = 0;
            if code == opcode::RENAME2 {
                flags = body.u32()?;
                body.skip(4)?;
            }
            let (name, new_name) = (body.name()?, body.name()?);
            body.ended(Op::Rename {
                name,
                new_dir,
                new_name,
                flags,
            })
        }
        opcode::LINK => {
            let node = body.u64()?;
            named(body, |name| Op::Link { node, name })
        }
        opcode::CREATE | opcode::TMPFILE => {
            let flags = body.u32()?;
            let mode = NewMode {
                mode: body.u32()?,
                umask: body.u32()?,
            };
            let open_flags = body.u32()?;
            if code == opcode::TMPFILE {
                // The kernel sends the name of an anonymous dentry; it means nothing.
                body.string()?;
                return body.ended(Op::TmpFile { flags, mode });
            }
            named(body, |name| Op::Create {
                name,
                flags,
                mode,
                open_flags,
            })
        }
        _ => parse_opened(code, body),
    }
}

fn parse_opened<'a>(code: u32, body: &mut Body<'a>) -> Result<Operation<'a>, Errno> {
    use Operation as Op;
    match code {
        opcode::OPEN => {
            let flags = body.u32()?;
            // Set-id bits go with a truncation, which comes as a SETATTR of its own.
            body.skip(4)?;
            body.ended(Op::Open { flags })
        }
        opcode::READ => body.span().map(Op::Read),
        opcode::WRITE => parse_write(body),
        opcode::STATFS => body.ended(Op::StatFs),
        opcode::RELEASE => body.release().map(|fh| Op::Release { fh }),
        opcode::FSYNC => body
            .fh_and_data_only()
            .map(|(fh, data_only)| Op::Fsync { fh, data_only }),
        opcode::FSYNCDIR => body
            .fh_and_data_only()
            .map(|(fh, data_only)| Op::FsyncDir { fh, data_only }),
        opcode::SETXATTR => {
            let (size, flags, ext_flags) = (body.u32()?, body.u32()?, body.u32()?);
            body.skip(4)?;
            let name = body.xattr_name()?;
            let size = usize::try_from(size).map_err(|_| Errno::INVAL)?;
            if size > limits::FS_XATTR {
                return Err(Errno::TOOBIG);
            }
            let value = body.take(size)?;
            body.ended(Op::SetXattr {
                name,
                value,
                flags,
                ext_flags,
            })
        }
        opcode::GETXATTR | opcode::LISTXATTR => {
            let size = usize::try_from(body.u32()?)
                .map_err(|_| Errno::INVAL)?
                .min(limits::FS_XATTR);
            body.skip(4)?;
            if code == opcode::LISTXATTR {
                return body.ended(Op::ListXattr { size });
            }
            let name = body.xattr_name()?;
            body.ended(Op::GetXattr { name, size })
        }
        opcode::REMOVEXATTR => {
            let name = body.xattr_name()?;
            body.ended(Op::RemoveXattr { name })
        }
        opcode::OPENDIR => {
            body.skip(8)?;
            body.ended(Op::OpenDir)
        }
        opcode::READDIR | opcode::READDIRPLUS => body.span().map(|span| Op::ReadDir {
            span,
            plus: code == opcode::READDIRPLUS,
        }),
        opcode::RELEASEDIR => body.release().map(|fh| Op::ReleaseDir { fh }),
        opcode::FALLOCATE => {
            let (fh, offset, length, mode) = (body.u64()?, body.u64()?, body.u64()?, body.u32()?);
            body.skip(4)?;
            body.ended(Op::Fallocate {
                fh,
                offset,
                length,
                mode,
            })
        }
        opcode::LSEEK => {
            let (fh, offset, whence) = (body.u64()?, body.u64()?, body.u32()?);
            body.skip(4)?;
            body.ended(Op::Lseek { fh, offset, whence })
        }
        opcode::COPY_FILE_RANGE => {
            let copy = Copy {
                fh_in: body.u64()?,
                offset_in: body.u64()?,
                node_out: body.u64()?,
                fh_out: body.u64()?,
                offset_out: body.u64()?,
                len: body.u64()?,
                flags: body.u64()?,
            };
            body.ended(Op::CopyFileRange(copy))
        }
        opcode::SYNCFS => {
            body.skip(8)?;
            body.ended(Op::SyncFs)
        }
        opcode::INTERRUPT | opcode::NOTIFY_REPLY => Ok(Op::Ignored),
        _ => Err(Errno::NOSYS),
    }
}

fn named<'a>(
    body: &mut Body<'a>,
    make: impl FnOnce(Name<'a>) -> Operation<'a>,
) -> Result<Operation<'a>, Errno> {
    let name = body.name()?;
    body.ended(make(name))
}

fn parse_init<'a>(body: &mut Body<'a>) -> Result<Operation<'a>, Errno> {
    let (major, minor, max_readahead, low) = (body.u32()?, body.u32()?, body.u32()?, body.u32()?);
    // `flags2` exists since 7.36; older clients end here. What follows it is reserved.
    let high = if low & (abi::init::INIT_EXT as u32) != 0 {
        body.u32()?
    } else {
        0
    };
    let flags = u64::from(low) | (u64::from(high) << 32);
    Ok(Operation::Init {
        major,
        minor,
        max_readahead,
        flags,
    })
}

fn parse_setattr<'a>(body: &mut Body<'a>) -> Result<Operation<'a>, Errno> {
    let valid = body.u32()?;
    body.skip(4)?;
    let (fh, size) = (body.u64()?, body.u64()?);
    body.skip(8)?;
    let (atime, mtime) = (body.u64()?, body.u64()?);
    body.skip(8)?;
    let (atime_nsec, mtime_nsec) = (body.u32()?, body.u32()?);
    body.skip(4)?;
    let mode = body.u32()?;
    body.skip(4)?;
    let (uid, gid) = (body.u32()?, body.u32()?);
    body.skip(4)?;
    body.ended(Operation::SetAttr(SetAttr {
        valid,
        fh,
        size,
        atime: (atime.cast_signed(), atime_nsec),
        mtime: (mtime.cast_signed(), mtime_nsec),
        mode,
        uid,
        gid,
    }))
}

fn parse_write<'a>(body: &mut Body<'a>) -> Result<Operation<'a>, Errno> {
    let (fh, offset, size, write_flags) = (body.u64()?, body.u64()?, body.u32()?, body.u32()?);
    body.skip(8)?;
    let flags = body.u32()?;
    body.skip(4)?;
    let size = usize::try_from(size).map_err(|_| Errno::INVAL)?;
    if size > limits::FS_MESSAGE_DATA {
        return Err(Errno::INVAL);
    }
    let data = body.take(size)?;
    body.ended(Operation::Write {
        fh,
        offset,
        write_flags,
        flags,
        data,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(code: u32, body: &[u8]) -> Vec<u8> {
        let mut message = vec![0; IN_HEADER];
        message.extend_from_slice(body);
        let len = u32::try_from(message.len()).unwrap();
        message[..4].copy_from_slice(&len.to_ne_bytes());
        message[4..8].copy_from_slice(&code.to_ne_bytes());
        message
    }

    #[test]
    fn names_of_more_than_one_component_are_refused() {
        for name in [
            &b"..\0"[..],
            b".\0",
            b"a/b\0",
            b"/\0",
            b"\0",
            b"a\0b\0",
            b"no-end",
            b"",
        ] {
            assert!(
                operation(&message(opcode::LOOKUP, name)).is_err(),
                "{name:?}"
            );
        }
        assert!(matches!(
            operation(&message(opcode::LOOKUP, b"a\0")),
            Ok(Operation::Lookup { .. })
        ));
    }

    #[test]
    fn a_name_of_256_bytes_is_too_long() {
        let mut long = vec![b'x'; 256];
        long.push(0);
        assert_eq!(
            operation(&message(opcode::LOOKUP, &long)).unwrap_err(),
            Errno::NAMETOOLONG
        );
    }

    #[test]
    fn a_length_that_is_not_the_datagrams_is_refused() {
        let mut wrong = message(opcode::LOOKUP, b"a\0");
        wrong[0] += 1;
        assert_eq!(operation(&wrong).unwrap_err(), Errno::INVAL);
    }

    #[test]
    fn every_truncation_of_every_operation_is_an_error_or_a_shorter_message_and_never_a_panic() {
        let body = [1u8; 200];
        for code in 0..70 {
            for len in 0..body.len() {
                let _ = operation(&message(code, &body[..len]));
            }
        }
        for len in 0..IN_HEADER {
            assert!(header(&vec![0; len]).is_none());
            assert!(operation(&vec![0; len]).is_err());
        }
    }

    #[test]
    fn a_forget_count_beyond_the_message_is_refused() {
        let mut body = u32::MAX.to_ne_bytes().to_vec();
        body.extend_from_slice(&[0; 4 + 16]);
        assert!(operation(&message(opcode::BATCH_FORGET, &body)).is_err());
    }

    #[test]
    fn a_write_whose_size_is_not_its_data_is_refused() {
        let mut body = vec![0; 40];
        body[16..20].copy_from_slice(&10u32.to_ne_bytes());
        body.extend_from_slice(&[0; 9]);
        assert!(operation(&message(opcode::WRITE, &body)).is_err());
        body.push(0);
        assert!(operation(&message(opcode::WRITE, &body)).is_ok());
    }
}
