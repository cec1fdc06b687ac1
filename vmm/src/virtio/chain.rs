//! The one checker of descriptor chains (virtio 1.3 section 2.7.5).
//!
//! A [`Chain`] exists only if all of this holds: it is not empty and ends by itself (no loop, no index outside the
//! table, no nested indirect table), it has at most [`limits::CHAIN_BUFFERS`] buffers, every buffer lies whole within one
//! region of guest memory, and the buffers that the device may write come after those that it may read. Buffers are
//! addresses that were checked against the map of guest memory that the chain keeps; their contents can change at any
//! time, so what is read from them is copied out once and checked on the copy.

use std::io::{self, Read, Write};

use virtio_queue::DescriptorChain;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use super::SharedMemory;
use crate::limits;

/// Why a chain was refused.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// No descriptor, a loop, a bad index, a bad or nested indirect table, or more than 4 GiB.
    #[error("descriptor chain is empty or does not end")]
    Unterminated,
    /// More buffers than [`limits::CHAIN_BUFFERS`].
    #[error("descriptor chain has more than {} buffers", limits::CHAIN_BUFFERS)]
    TooManyBuffers,
    /// A buffer that is not whole within one region of guest memory.
    #[error("descriptor at {address:#x} of {len} bytes lies outside guest memory")]
    OutsideMemory {
        /// Guest-physical address.
        address: u64,
        /// Length in bytes.
        len: u32,
    },
    /// A readable buffer after a writable one (section 2.7.4.2).
    #[error("device-readable descriptor after a device-writable one")]
    Order,
}

/// A piece of guest memory that was checked to exist.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    address: GuestAddress,
    len: usize,
}

/// A checked descriptor chain.
pub struct Chain {
    head: u16,
    memory: SharedMemory,
    readable: Vec<Buffer>,
    writable: Vec<Buffer>,
}

impl Chain {
    /// Checks a raw chain whole.
    pub(super) fn check(
        memory: &SharedMemory,
        raw: DescriptorChain<&GuestMemoryMmap>,
    ) -> Result<Self, ChainError> {
        let mut chain = Self {
            head: raw.head_index(),
            memory: memory.clone(),
            readable: Vec::new(),
            writable: Vec::new(),
        };
        let mut ended = false;
        for descriptor in raw {
            ended = !descriptor.has_next();
            if chain.readable.len() + chain.writable.len() == limits::CHAIN_BUFFERS {
                return Err(ChainError::TooManyBuffers);
            }
            let buffer = Buffer {
                address: descriptor.addr(),
                len: descriptor.len() as usize,
            };
            // An empty buffer needs no memory and gives none.
            if buffer.len != 0 && memory.get_slice(buffer.address, buffer.len).is_err() {
                return Err(ChainError::OutsideMemory {
                    address: descriptor.addr().0,
                    len: descriptor.len(),
                });
            }
            if descriptor.is_write_only() {
                chain.writable.push(buffer);
            } else if chain.writable.is_empty() {
                chain.readable.push(buffer);
            } else {
                return Err(ChainError::Order);
            }
        }
        if ended {
            Ok(chain)
        } else {
            Err(ChainError::Unterminated)
        }
    }

    /// Index of the first descriptor: what goes into the used ring.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// Bytes that the device may read.
    pub fn readable_len(&self) -> usize {
        self.readable.iter().map(|buffer| buffer.len).sum()
    }

    /// Bytes that the device may write.
    pub fn writable_len(&self) -> usize {
        self.writable.iter().map(|buffer| buffer.len).sum()
    }

    /// Reads the device-readable bytes in order.
    pub fn reader(&self) -> ChainReader<'_> {
        ChainReader(Cursor {
            memory: &self.memory,
            buffers: &self.readable,
            offset: 0,
        })
    }

    /// Writes the device-writable bytes in order.
    pub fn writer(&self) -> ChainWriter<'_> {
        ChainWriter(Cursor {
            memory: &self.memory,
            buffers: &self.writable,
            offset: 0,
        })
    }

    /// The device-readable bytes from `skip` on, at most `max`, as addresses for `writev` and its kind.
    ///
    /// The addresses stay valid while the chain lives; the guest can change what they hold at any time.
    pub fn readable_iovecs(&self, skip: usize, max: usize) -> Vec<libc::iovec> {
        iovecs(&self.memory, &self.readable, skip, max)
    }

    /// The device-writable bytes from `skip` on, at most `max`, as addresses for `readv` and its kind.
    pub fn writable_iovecs(&self, skip: usize, max: usize) -> Vec<libc::iovec> {
        iovecs(&self.memory, &self.writable, skip, max)
    }
}

fn iovecs(
    memory: &GuestMemoryMmap,
    buffers: &[Buffer],
    mut skip: usize,
    mut max: usize,
) -> Vec<libc::iovec> {
    let mut vectors = Vec::with_capacity(buffers.len());
    for buffer in buffers {
        if skip >= buffer.len {
            skip -= buffer.len;
            continue;
        }
        let len = (buffer.len - skip).min(max);
        if len == 0 {
            break;
        }
        let start = GuestAddress(buffer.address.0.wrapping_add(skip as u64));
        // Checked when the chain was made, against this map.
        let Ok(slice) = memory.get_slice(start, len) else {
            break;
        };
        vectors.push(libc::iovec {
            iov_base: slice.ptr_guard_mut().as_ptr().cast(),
            iov_len: len,
        });
        skip = 0;
        max -= len;
    }
    vectors
}

struct Cursor<'a> {
    memory: &'a GuestMemoryMmap,
    buffers: &'a [Buffer],
    /// Into the first of `buffers`.
    offset: usize,
}

impl Cursor<'_> {
    fn remaining(&self) -> usize {
        self.buffers.iter().map(|buffer| buffer.len).sum::<usize>() - self.offset
    }

    /// The next contiguous piece, at most `max` bytes; moves past it.
    fn take(&mut self, max: usize) -> Option<(GuestAddress, usize)> {
        while let Some((first, rest)) = self.buffers.split_first() {
            let left = first.len - self.offset;
            if left == 0 {
                self.buffers = rest;
                self.offset = 0;
                continue;
            }
            let len = left.min(max);
            let address = GuestAddress(first.address.0.wrapping_add(self.offset as u64));
            self.offset += len;
            return Some((address, len));
        }
        None
    }
}

/// Copies out of a chain's readable buffers.
pub struct ChainReader<'a>(Cursor<'a>);

impl ChainReader<'_> {
    /// Bytes not read yet.
    pub fn remaining(&self) -> usize {
        self.0.remaining()
    }
}

impl Read for ChainReader<'_> {
    fn read(&mut self, data: &mut [u8]) -> io::Result<usize> {
        if data.is_empty() {
            return Ok(0);
        }
        let Some((address, len)) = self.0.take(data.len()) else {
            return Ok(0);
        };
        self.0
            .memory
            .read_slice(&mut data[..len], address)
            .map_err(io::Error::other)?;
        Ok(len)
    }
}

/// Copies into a chain's writable buffers.
pub struct ChainWriter<'a>(Cursor<'a>);

impl ChainWriter<'_> {
    /// Bytes that still fit.
    pub fn remaining(&self) -> usize {
        self.0.remaining()
    }
}

impl ChainWriter<'_> {
    /// Leaves the next `count` bytes as they are.
    pub fn skip(&mut self, mut count: usize) {
        while count > 0 {
            let Some((_, len)) = self.0.take(count) else {
                return;
            };
            count -= len;
        }
    }
}

impl Write for ChainWriter<'_> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        if data.is_empty() {
            return Ok(0);
        }
        let Some((address, len)) = self.0.take(data.len()) else {
            return Ok(0);
        };
        self.0
            .memory
            .write_slice(&data[..len], address)
            .map_err(io::Error::other)?;
        Ok(len)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
