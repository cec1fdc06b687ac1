//! The steward's own side: answers the server until that has closed every channel.

use std::collections::HashMap;
use std::ffi::CStr;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{
    CWD, Mode, OFlags, XattrFlags, getxattr, listxattr, openat, removexattr, setxattr,
};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

use super::message::{FILES, HEAD, MESSAGE, Op, Request, answer_head};
use crate::fs::namespace::{CONFINED, READ_ONLY};
use crate::fs::server::fd_path;
use crate::fs::sys::{self, FileHandle};
use crate::limits;

struct Mount {
    folder: OwnedFd,
    id: i32,
}

#[derive(Default)]
struct State {
    mounts: HashMap<u64, Mount>,
    kept: HashMap<u64, (u64, FileHandle)>,
    last: u64,
}

/// What an answer holds.
#[derive(Default)]
struct Answer {
    number: u64,
    data: usize,
    file: Option<OwnedFd>,
}

impl Answer {
    fn number(number: u64) -> Self {
        Self {
            number,
            ..Self::default()
        }
    }

    fn data(data: usize) -> Self {
        Self {
            data,
            ..Self::default()
        }
    }
}

/// Serves until all channels are closed. `/fd` of the calling thread's mount namespace must lead to this process's descriptors.
pub fn serve(mut channels: Vec<OwnedFd>) -> Result<(), Errno> {
    let mut state = State::default();
    let mut request = vec![0; MESSAGE];
    let mut data = vec![0; limits::FS_XATTR];
    while !channels.is_empty() {
        let mut polled: Vec<PollFd<'_>> = channels
            .iter()
            .map(|channel| PollFd::new(channel, PollFlags::IN))
            .collect();
        match poll(&mut polled, None) {
            Ok(_) => {}
            Err(Errno::INTR) => continue,
            Err(errno) => return Err(errno),
        }
        let mut ready = polled
            .iter()
            .map(|fd| !fd.revents().is_empty())
            .collect::<Vec<_>>()
            .into_iter();
        channels.retain(|channel| {
            !ready.next().unwrap_or(false) || state.answer(channel, &mut request, &mut data)
        });
    }
    Ok(())
}

impl State {
    /// Takes one request and answers it; false if the channel has come to its end.
    fn answer(&mut self, channel: &OwnedFd, request: &mut [u8], data: &mut [u8]) -> bool {
        let mut space = [MaybeUninit::uninit(); FILES];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut parts = [IoSliceMut::new(request)];
        let received = recvmsg(channel, &mut parts, &mut ancillary, RecvFlags::CMSG_CLOEXEC);
        let (count, whole) = match received {
            Ok(received) => {
                let cut = ReturnFlags::TRUNC | ReturnFlags::CTRUNC;
                (received.bytes, !received.flags.intersects(cut))
            }
            Err(Errno::INTR) => return true,
            Err(_) => return false,
        };
        let mut files = Vec::new();
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(descriptors) = message {
                files.extend(descriptors);
            }
        }
        if count == 0 {
            return false;
        }
        let bytes = request.get(..count).unwrap_or_default();
        let result = match whole {
            true => Request::decode(bytes).and_then(|request| self.act(&request, &files, data)),
            false => Err(Errno::INVAL),
        };
        let (error, answer) = match result {
            Ok(answer) => (Ok(()), answer),
            Err(errno) => (Err(errno), Answer::default()),
        };
        let head: [u8; HEAD] = answer_head(error, answer.number);
        let parts = [
            IoSlice::new(&head),
            IoSlice::new(data.get(..answer.data).unwrap_or_default()),
        ];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let files: Vec<_> = answer.file.iter().map(AsFd::as_fd).collect();
        if !files.is_empty() {
            ancillary.push(SendAncillaryMessage::ScmRights(&files));
        }
        sendmsg(channel, &parts, &mut ancillary, SendFlags::NOSIGNAL).is_ok()
    }

    fn act(
        &mut self,
        request: &Request<'_>,
        files: &[OwnedFd],
        data: &mut [u8],
    ) -> Result<Answer, Errno> {
        let file = || files.first().ok_or(Errno::BADF);
        match request.op {
            Op::SetXattr => {
                let (name, value) = name_and_value(request.rest)?;
                changes(name)?;
                let flags = XattrFlags::from_bits_retain(request.flags);
                setxattr(fd_path(file()?), name, value, flags)?;
                Ok(Answer::default())
            }
            Op::GetXattr => {
                let (name, _) = name_and_value(request.rest)?;
                let room = room(data, request.number)?;
                Ok(Answer::data(getxattr(fd_path(file()?), name, room)?))
            }
            Op::ListXattr => {
                let room = room(data, request.number)?;
                Ok(Answer::data(listxattr(fd_path(file()?), room)?))
            }
            Op::RemoveXattr => {
                let (name, _) = name_and_value(request.rest)?;
                changes(name)?;
                removexattr(fd_path(file()?), name)?;
                Ok(Answer::default())
            }
            Op::Bare => {
                if files.len() > limits::FS_ASKED {
                    return Err(Errno::INVAL);
                }
                for (file, bare) in files.iter().zip(&mut *data) {
                    // A list with a name in it does not fit.
                    *bare = (listxattr(fd_path(file), &mut [0; 1]) == Ok(0)).into();
                }
                Ok(Answer::data(files.len()))
            }
            Op::AddMount => self.add_mount(file()?, request.flags != 0),
            Op::RemoveMount => {
                self.mounts.remove(&request.number);
                Ok(Answer::default())
            }
            Op::Keep => {
                let mount = self.mounts.get(&request.number).ok_or(Errno::STALE)?;
                if self.kept.len() >= limits::FS_INODES {
                    return Err(Errno::NFILE);
                }
                let (handle, id) = sys::file_handle(file()?).map_err(errno)?;
                // A handle of one file system opens anything in another.
                if id != mount.id {
                    return Err(Errno::XDEV);
                }
                let number = self.number()?;
                self.kept.insert(number, (request.number, handle));
                Ok(Answer::number(number))
            }
            Op::Open => {
                let (mount, handle) = self.kept.get(&request.number).ok_or(Errno::STALE)?;
                let mount = self.mounts.get(mount).ok_or(Errno::STALE)?;
                let opened = sys::open_file_handle(&mount.folder, handle).map_err(errno)?;
                Ok(Answer {
                    file: Some(opened),
                    ..Answer::default()
                })
            }
            Op::Is => {
                let (_, handle) = self.kept.get(&request.number).ok_or(Errno::STALE)?;
                let (found, _) = sys::file_handle(file()?).map_err(errno)?;
                Ok(Answer::number((found == *handle).into()))
            }
            Op::Forget => {
                self.kept.remove(&request.number);
                Ok(Answer::default())
            }
        }
    }

    fn add_mount(&mut self, mount: &OwnedFd, readonly: bool) -> Result<Answer, Errno> {
        let attributes = if readonly {
            CONFINED | READ_ONLY
        } else {
            CONFINED
        };
        sys::set_mount_attributes(mount, attributes).map_err(errno)?;
        if self.mounts.len() >= limits::FS_TREES {
            return Err(Errno::NFILE);
        }
        // A mount of a single file, or of a file system without handles: told now rather than when descriptors run out.
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let Ok(folder) = openat(CWD, fd_path(mount), flags, Mode::empty()) else {
            return Ok(Answer::number(0));
        };
        let Ok((_, id)) = sys::file_handle(&folder) else {
            return Ok(Answer::number(0));
        };
        let number = self.number()?;
        self.mounts.insert(number, Mount { folder, id });
        Ok(Answer::number(number))
    }

    fn number(&mut self) -> Result<u64, Errno> {
        self.last = self.last.checked_add(1).ok_or(Errno::NFILE)?;
        Ok(self.last)
    }
}

fn errno(error: std::io::Error) -> Errno {
    Errno::from_io_error(&error).unwrap_or(Errno::IO)
}

fn name_and_value(bytes: &[u8]) -> Result<(&CStr, &[u8]), Errno> {
    let name = CStr::from_bytes_until_nul(bytes).map_err(|_| Errno::INVAL)?;
    let value = bytes.get(name.count_bytes().saturating_add(1)..);
    Ok((name, value.unwrap_or_default()))
}

/// Only what the server cannot change itself.
fn changes(name: &CStr) -> Result<(), Errno> {
    match needs_steward(name) {
        true => Ok(()),
        false => Err(Errno::PERM),
    }
}

/// Whether changing the attribute takes capabilities of the host's.
pub fn needs_steward(name: &CStr) -> bool {
    let name = name.to_bytes();
    name.starts_with(b"trusted.") || name.starts_with(b"security.")
}

fn room(data: &mut [u8], size: u64) -> Result<&mut [u8], Errno> {
    let size = usize::try_from(size).map_err(|_| Errno::RANGE)?;
    // Without room Linux tells the size instead.
    let room = data.get_mut(..size.min(limits::FS_XATTR));
    room.filter(|room| !room.is_empty()).ok_or(Errno::RANGE)
}
