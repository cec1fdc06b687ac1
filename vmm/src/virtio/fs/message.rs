//! One FUSE request and its reply, between a descriptor chain and a worker's socket.
//!
//! Both headers pass through copies of ours, so neither side can change them after the check; the bodies go
//! straight between guest memory and the socket.

use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};

use crate::limits;
use crate::virtio::chain::Chain;

/// A header of ours and all buffers of a chain make one message.
const _: () = assert!(limits::CHAIN_BUFFERS < libc::UIO_MAXIOV as usize);

/// Bytes of `struct fuse_in_header`.
pub const IN_HEADER: usize = 40;
/// Bytes of `struct fuse_out_header`.
pub const OUT_HEADER: usize = 16;

const FORGET: u32 = 2;
const INTERRUPT: u32 = 36;
const NOTIFY_REPLY: u32 = 41;
const BATCH_FORGET: u32 = 42;

/// What a request asks of this device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Send it and wait for the reply.
    Answered,
    /// Send it; there is no reply.
    Unanswered,
    /// Not sent: what INTERRUPT means is answered soon anyway, and NOTIFY_REPLY answers what nobody asked. Neither
    /// has a reply, so to wait for one would hold the thread for good.
    Dropped,
}

/// A request whose header was checked.
pub struct Request<'a> {
    chain: &'a Chain,
    header: [u8; IN_HEADER],
}

impl<'a> Request<'a> {
    /// `None` if the chain is no FUSE request of a size that the file server takes.
    pub fn parse(chain: &'a Chain) -> Option<Self> {
        let len = chain.readable_len();
        let mut header = [0; IN_HEADER];
        chain.reader().read_exact(&mut header).ok()?;
        let request = Self { chain, header };
        let whole = u32::try_from(len).ok() == Some(request.u32_at(0));
        let room = match request.kind() {
            Kind::Answered => chain.writable_len() >= OUT_HEADER,
            Kind::Unanswered | Kind::Dropped => true,
        };
        (whole && room && len <= limits::FS_MESSAGE).then_some(request)
    }

    fn u32_at(&self, at: usize) -> u32 {
        let mut bytes = [0; 4];
        bytes.copy_from_slice(&self.header[at..at + 4]);
        u32::from_le_bytes(bytes)
    }

    fn unique(&self) -> &[u8] {
        &self.header[8..16]
    }

    /// By its opcode.
    pub fn kind(&self) -> Kind {
        match self.u32_at(4) {
            FORGET | BATCH_FORGET => Kind::Unanswered,
            INTERRUPT | NOTIFY_REPLY => Kind::Dropped,
            _ => Kind::Answered,
        }
    }

    /// Sends the request as one datagram. Waits while the file server has not taken the one before.
    pub fn send(&self, socket: &OwnedFd) -> io::Result<()> {
        let mut header = self.header;
        let mut vectors = vec![libc::iovec {
            iov_base: header.as_mut_ptr().cast(),
            iov_len: header.len(),
        }];
        vectors.extend(self.chain.readable_iovecs(IN_HEADER, limits::FS_MESSAGE));
        let message = message(&mut vectors);
        let sent = retry(|| {
            // SAFETY: the vectors are `header` and guest memory, which `self.chain` keeps mapped; only read.
            unsafe { libc::sendmsg(socket.as_raw_fd(), &message, libc::MSG_NOSIGNAL) }
        })?;
        // A datagram goes whole or not at all.
        debug_assert_eq!(sent, self.chain.readable_len());
        Ok(())
    }

    /// Receives the reply into the chain; gives its length. Errors of kind `InvalidData` are the file server's
    /// mistakes. A reply for which the guest left no room is the guest's: it gets EIO.
    pub fn receive(&self, socket: &OwnedFd) -> io::Result<u32> {
        let mut header = [0; OUT_HEADER];
        let mut vectors = vec![libc::iovec {
            iov_base: header.as_mut_ptr().cast(),
            iov_len: header.len(),
        }];
        vectors.extend(self.chain.writable_iovecs(OUT_HEADER, limits::FS_MESSAGE));
        let mut message = message(&mut vectors);
        let received = retry(|| {
            // SAFETY: the vectors are `header` and guest memory, which `self.chain` keeps mapped; no Rust
            // reference to either is alive during the call.
            // MSG_TRUNC: the length of the datagram, also if it is longer than the vectors.
            unsafe { libc::recvmsg(socket.as_raw_fd(), &mut message, libc::MSG_TRUNC) }
        })?;
        if received == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let len = u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
        let whole = received >= OUT_HEADER && u32::try_from(received).ok() == Some(len);
        if !whole || header[8..16] != *self.unique() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "malformed FUSE reply",
            ));
        }
        if message.msg_flags & libc::MSG_TRUNC != 0 {
            return Ok(refuse(self.chain, libc::EIO));
        }
        self.chain.writer().write_all(&header)?;
        Ok(len)
    }
}

/// Answers `-errno` to whatever the chain holds; gives the length of the answer, 0 if nothing fits.
pub fn refuse(chain: &Chain, errno: i32) -> u32 {
    let mut request = [0; 16];
    if chain.reader().read_exact(&mut request).is_err() {
        return 0;
    }
    let mut header = [0; OUT_HEADER];
    header[0..4].copy_from_slice(&(OUT_HEADER as u32).to_le_bytes());
    header[4..8].copy_from_slice(&errno.wrapping_neg().to_le_bytes());
    header[8..16].copy_from_slice(&request[8..16]);
    if chain.writable_len() < OUT_HEADER || chain.writer().write_all(&header).is_err() {
        return 0;
    }
    OUT_HEADER as u32
}

fn message(vectors: &mut [libc::iovec]) -> libc::msghdr {
    // SAFETY: msghdr is plain data; all zeroes is an empty message.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = vectors.as_mut_ptr();
    message.msg_iovlen = vectors.len();
    message
}

fn retry(mut call: impl FnMut() -> isize) -> io::Result<usize> {
    loop {
        match usize::try_from(call()) {
            Ok(n) => return Ok(n),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}
