//! The server's side of the steward.

use std::ffi::CStr;
use std::fmt;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::XattrFlags;
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};

use super::message::{FILES, HEAD, MESSAGE, Op, Request, parse_answer};
use crate::limits;

/// `count` pairs of sockets: the server's ends and the steward's.
pub fn channels(count: usize) -> Result<(Vec<OwnedFd>, Vec<OwnedFd>), Errno> {
    let pair = |_| {
        let flags = SocketFlags::CLOEXEC;
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
    };
    let pairs: Vec<_> = (0..count).map(pair).collect::<Result<_, _>>()?;
    Ok(pairs.into_iter().unzip())
}

/// The steward, as the server's threads share it.
pub struct Steward {
    channels: Vec<Mutex<OwnedFd>>,
    turn: AtomicUsize,
}

/// A file that the steward keeps a handle of; it lets go of it with this.
pub struct Kept {
    steward: Arc<Steward>,
    number: u64,
}

/// A mount that the steward opens handles of; it lets go of it with this.
pub struct Mount {
    steward: Arc<Steward>,
    number: u64,
}

impl Steward {
    /// Over the server's ends of [`channels`], at least one.
    pub fn new(channels: Vec<OwnedFd>) -> Arc<Self> {
        Arc::new(Self {
            channels: channels.into_iter().map(Mutex::new).collect(),
            turn: AtomicUsize::new(0),
        })
    }

    /// A channel that nobody uses now, or the next in turn.
    fn channel(&self) -> Result<MutexGuard<'_, OwnedFd>, Errno> {
        if let Some(free) = self.channels.iter().find_map(|c| c.try_lock().ok()) {
            return Ok(free);
        }
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        let turn = turn.checked_rem(self.channels.len()).ok_or(Errno::IO)?;
        let channel = self.channels.get(turn).ok_or(Errno::IO)?;
        Ok(channel.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Asks and waits for the answer: its number, data (into `data`, its length) and descriptor.
    fn call(
        &self,
        request: &Request<'_>,
        files: &[BorrowedFd<'_>],
        data: &mut [u8],
    ) -> Result<(u64, usize, Option<OwnedFd>), Errno> {
        let mut space = [MaybeUninit::uninit(); FILES];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !files.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(files)) {
            return Err(Errno::INVAL);
        }
        let bytes = request.encode();
        if bytes.len() > MESSAGE {
            return Err(Errno::RANGE);
        }
        let channel = self.channel()?;
        let sent = retry(|| {
            let parts = [IoSlice::new(&bytes)];
            sendmsg(&*channel, &parts, &mut ancillary, SendFlags::NOSIGNAL)
        });
        if sent.is_err() {
            gone();
        }
        let mut head = [0; HEAD];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let received = retry(|| {
            let mut parts = [IoSliceMut::new(&mut head), IoSliceMut::new(data)];
            recvmsg(
                &*channel,
                &mut parts,
                &mut ancillary,
                RecvFlags::CMSG_CLOEXEC,
            )
        });
        let Ok(count) = received.map(|r| r.bytes) else {
            gone()
        };
        if count == 0 {
            gone();
        }
        let mut file = None;
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(mut descriptors) = message {
                file = descriptors.next();
            }
        }
        let (number, _) = parse_answer(&head)?;
        Ok((number, count.saturating_sub(HEAD), file))
    }

    fn xattr(
        &self,
        op: Op,
        file: BorrowedFd<'_>,
        name: &CStr,
        (value, flags): (&[u8], XattrFlags),
        data: &mut [u8],
    ) -> Result<usize, Errno> {
        let request = Request {
            op,
            flags: flags.bits(),
            number: data.len() as u64,
            rest: &[name.to_bytes_with_nul(), value].concat(),
        };
        let (_, count, _) = self.call(&request, &[file], data)?;
        Ok(count)
    }

    /// setxattr of what `file` (O_PATH or not) is.
    pub fn set_xattr(
        &self,
        file: BorrowedFd<'_>,
        name: &CStr,
        value: &[u8],
        flags: XattrFlags,
    ) -> Result<(), Errno> {
        let value = (value, flags);
        self.xattr(Op::SetXattr, file, name, value, &mut [])
            .map(drop)
    }

    /// getxattr.
    pub fn get_xattr(
        &self,
        file: BorrowedFd<'_>,
        name: &CStr,
        data: &mut [u8],
    ) -> Result<usize, Errno> {
        let none = (&[][..], XattrFlags::empty());
        self.xattr(Op::GetXattr, file, name, none, data)
    }

    /// listxattr, with `trusted.*`.
    pub fn list_xattr(&self, file: BorrowedFd<'_>, data: &mut [u8]) -> Result<usize, Errno> {
        let none = (&[][..], XattrFlags::empty());
        self.xattr(Op::ListXattr, file, c"", none, data)
    }

    /// removexattr.
    pub fn remove_xattr(&self, file: BorrowedFd<'_>, name: &CStr) -> Result<(), Errno> {
        let none = (&[][..], XattrFlags::empty());
        self.xattr(Op::RemoveXattr, file, name, none, &mut [])
            .map(drop)
    }

    /// Which of the files, at most [`limits::FS_ASKED`], have no extended attributes, in their order.
    pub fn bare(
        &self,
        files: &[BorrowedFd<'_>],
    ) -> Result<impl Iterator<Item = bool> + use<>, Errno> {
        let request = Request {
            op: Op::Bare,
            flags: 0,
            number: 0,
            rest: &[],
        };
        let mut data = [0; limits::FS_ASKED];
        let (_, count, _) = self.call(&request, files, &mut data)?;
        Ok(data.into_iter().take(count).map(|bare| bare == 1))
    }

    fn ask(
        &self,
        op: Op,
        number: u64,
        flags: u32,
        file: Option<BorrowedFd<'_>>,
    ) -> Result<(u64, Option<OwnedFd>), Errno> {
        let request = Request {
            op,
            flags,
            number,
            rest: &[],
        };
        let (number, _, file) = self.call(&request, file.as_slice(), &mut [])?;
        Ok((number, file))
    }

    /// Confines the detached mount `mount` and keeps it to open handles of; `None` if its file system has none.
    pub fn add_mount(
        self: &Arc<Self>,
        mount: BorrowedFd<'_>,
        readonly: bool,
    ) -> Result<Option<Mount>, Errno> {
        let (number, _) = self.ask(Op::AddMount, 0, u32::from(readonly), Some(mount))?;
        Ok((number != 0).then(|| Mount {
            steward: Arc::clone(self),
            number,
        }))
    }
}

impl Mount {
    /// Keeps the file `file` of this mount by its handle.
    pub fn keep(&self, file: BorrowedFd<'_>) -> Result<Kept, Errno> {
        let (number, _) = self.steward.ask(Op::Keep, self.number, 0, Some(file))?;
        Ok(Kept {
            steward: Arc::clone(&self.steward),
            number,
        })
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = self.steward.ask(Op::RemoveMount, self.number, 0, None);
    }
}

impl Kept {
    /// Opens it as O_PATH.
    pub fn open(&self) -> Result<OwnedFd, Errno> {
        let (_, file) = self.steward.ask(Op::Open, self.number, 0, None)?;
        file.ok_or(Errno::STALE)
    }

    /// Whether `file` is this file.
    pub fn is(&self, file: impl AsFd) -> bool {
        let answer = self.steward.ask(Op::Is, self.number, 0, Some(file.as_fd()));
        answer.is_ok_and(|(same, _)| same == 1)
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        let _ = self.steward.ask(Op::Forget, self.number, 0, None);
    }
}

impl fmt::Debug for Mount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Mount({})", self.number)
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

/// Without its steward the server cannot answer rightly.
fn gone() -> ! {
    tracing::error!("the steward is gone: the file server ends");
    std::process::exit(1)
}
