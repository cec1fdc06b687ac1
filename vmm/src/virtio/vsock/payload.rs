//! Moves a packet's bytes between guest memory and a host socket without a copy in between.
//!
//! The only unsafe code of the device. Lengths were checked before; the guest can change the bytes at any time, which
//! harms nobody but itself.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use super::packet::HEADER_LEN;
use crate::virtio::chain::Chain;

/// Bytes that the guest sent.
pub trait Source {
    /// Bytes left.
    fn remaining(&self) -> usize;
    /// Sends what the socket takes without blocking and moves past it.
    fn send(&mut self, stream: &UnixStream) -> io::Result<usize>;
    /// Copies all that is left to the end of `buffer`.
    fn copy_to(&mut self, buffer: &mut VecDeque<u8>) -> io::Result<()>;
}

/// Room for bytes to the guest.
pub trait Sink {
    /// Receives at most `max` bytes without blocking; 0 is end of file.
    fn receive(&mut self, stream: &UnixStream, max: usize) -> io::Result<usize>;
}

/// The data of a packet in a chain of the transmit queue.
pub struct TxData<'a> {
    chain: &'a Chain,
    skip: usize,
    len: usize,
}

impl<'a> TxData<'a> {
    /// `None` if the chain holds fewer than `len` bytes after the header.
    pub fn new(chain: &'a Chain, len: usize) -> Option<Self> {
        let room = chain.readable_len().checked_sub(HEADER_LEN)?;
        (len <= room).then_some(Self {
            chain,
            skip: HEADER_LEN,
            len,
        })
    }
}

impl Source for TxData<'_> {
    fn remaining(&self) -> usize {
        self.len
    }

    fn send(&mut self, stream: &UnixStream) -> io::Result<usize> {
        let mut vectors = self.chain.readable_iovecs(self.skip, self.len);
        let message = message(&mut vectors);
        // SAFETY: the vectors lie in guest memory, which `self.chain` keeps mapped; sendmsg only reads them.
        let sent = unsafe {
            libc::sendmsg(
                stream.as_raw_fd(),
                &message,
                libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL,
            )
        };
        let sent = usize::try_from(sent).map_err(|_| io::Error::last_os_error())?;
        self.skip += sent;
        self.len -= sent;
        Ok(sent)
    }

    fn copy_to(&mut self, buffer: &mut VecDeque<u8>) -> io::Result<()> {
        let mut reader = self.chain.reader();
        io::copy(&mut (&mut reader).take(self.skip as u64), &mut io::sink())?;
        let copied = io::copy(&mut reader.take(self.len as u64), buffer)?;
        debug_assert_eq!(copied, self.len as u64);
        self.skip += self.len;
        self.len = 0;
        Ok(())
    }
}

/// The room after the header in a chain of the receive queue.
pub struct RxRoom<'a> {
    chain: &'a Chain,
}

impl<'a> RxRoom<'a> {
    /// `None` if not even a header fits.
    pub fn new(chain: &'a Chain) -> Option<Self> {
        (chain.writable_len() >= HEADER_LEN).then_some(Self { chain })
    }

    /// Writes the header before the data.
    pub fn write_header(&self, header: &[u8; HEADER_LEN]) -> io::Result<()> {
        self.chain.writer().write_all(header)
    }
}

impl Sink for RxRoom<'_> {
    fn receive(&mut self, stream: &UnixStream, max: usize) -> io::Result<usize> {
        let mut vectors = self.chain.writable_iovecs(HEADER_LEN, max);
        if vectors.is_empty() {
            // Would look like end of file.
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let mut message = message(&mut vectors);
        // SAFETY: the vectors lie in guest memory, which `self.chain` keeps mapped, and no Rust reference to
        // that memory exists.
        let received =
            unsafe { libc::recvmsg(stream.as_raw_fd(), &mut message, libc::MSG_DONTWAIT) };
        usize::try_from(received).map_err(|_| io::Error::last_os_error())
    }
}

fn message(vectors: &mut [libc::iovec]) -> libc::msghdr {
    // SAFETY: msghdr is plain data; all zeroes is an empty message.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = vectors.as_mut_ptr();
    message.msg_iovlen = vectors.len();
    message
}

#[cfg(test)]
impl Source for &[u8] {
    fn remaining(&self) -> usize {
        self.len()
    }

    fn send(&mut self, mut stream: &UnixStream) -> io::Result<usize> {
        let sent = stream.write(self)?;
        *self = self.get(sent..).unwrap_or_default();
        Ok(sent)
    }

    fn copy_to(&mut self, buffer: &mut VecDeque<u8>) -> io::Result<()> {
        buffer.extend(*self);
        *self = &[];
        Ok(())
    }
}

#[cfg(test)]
impl Sink for Vec<u8> {
    /// Appends, as if the guest's buffer held 4096 bytes.
    fn receive(&mut self, stream: &UnixStream, max: usize) -> io::Result<usize> {
        let mut buffer = vec![0; max.min(4096)];
        let n = (&mut &*stream).read(&mut buffer)?;
        self.extend_from_slice(&buffer[..n]);
        Ok(n)
    }
}
