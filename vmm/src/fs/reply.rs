//! The answer to one request, built in a worker's buffer: `fuse_out_header` and a body.

use rustix::io::Errno;

use super::abi::OUT_HEADER;

/// A reply under construction. The header's place is left free until [`Reply::finish`].
pub struct Reply<'b> {
    buffer: &'b mut [u8],
    len: usize,
}

impl<'b> Reply<'b> {
    /// An empty reply; `buffer` must hold a header at least.
    pub fn new(buffer: &'b mut [u8]) -> Self {
        Self {
            buffer,
            len: OUT_HEADER,
        }
    }

    /// Bytes of the body so far.
    pub fn body_len(&self) -> usize {
        self.len.saturating_sub(OUT_HEADER)
    }

    /// Appends bytes.
    pub fn bytes(&mut self, bytes: &[u8]) -> Result<(), Errno> {
        self.room(bytes.len())?.copy_from_slice(bytes);
        self.advance(bytes.len());
        Ok(())
    }

    /// Appends numbers of 32 bits.
    pub fn u32s(&mut self, values: &[u32]) -> Result<(), Errno> {
        values
            .iter()
            .try_for_each(|value| self.bytes(&value.to_ne_bytes()))
    }

    /// Appends numbers of 64 bits.
    pub fn u64s(&mut self, values: &[u64]) -> Result<(), Errno> {
        values
            .iter()
            .try_for_each(|value| self.bytes(&value.to_ne_bytes()))
    }

    /// Sets bits in the number of 32 bits that ends where the body ended when it was `end` bytes long.
    pub fn set_bits(&mut self, end: usize, bits: u32) {
        let end = end.saturating_add(OUT_HEADER).min(self.len);
        let number = self.buffer.get_mut(..end).and_then(|b| b.last_chunk_mut());
        if let Some(number) = number {
            *number = (u32::from_ne_bytes(*number) | bits).to_ne_bytes();
        }
    }

    /// Appends zeros.
    pub fn zeros(&mut self, count: usize) -> Result<(), Errno> {
        self.room(count)?.fill(0);
        self.advance(count);
        Ok(())
    }

    /// The next `count` bytes, to be filled in place and then counted with [`Reply::advance`].
    pub fn room(&mut self, count: usize) -> Result<&mut [u8], Errno> {
        let end = self.len.checked_add(count).ok_or(Errno::OVERFLOW)?;
        self.buffer.get_mut(self.len..end).ok_or(Errno::OVERFLOW)
    }

    /// Counts bytes filled in through [`Reply::room`].
    pub fn advance(&mut self, count: usize) {
        self.len = self.len.saturating_add(count).min(self.buffer.len());
    }

    /// Drops the body.
    pub fn clear(&mut self) {
        self.len = OUT_HEADER;
    }

    /// Writes the header. An error has no body.
    pub fn finish(mut self, unique: u64, result: Result<(), Errno>) -> &'b [u8] {
        if result.is_err() {
            self.clear();
        }
        let error = result
            .err()
            .map_or(0, |errno| errno.raw_os_error().wrapping_neg());
        // The buffer is at most FS_MESSAGE bytes, far below 4 GiB.
        let len = u32::try_from(self.len).unwrap_or(u32::MAX);
        if let Some(header) = self.buffer.first_chunk_mut::<OUT_HEADER>() {
            header[..4].copy_from_slice(&len.to_ne_bytes());
            header[4..8].copy_from_slice(&error.to_ne_bytes());
            header[8..].copy_from_slice(&unique.to_ne_bytes());
        }
        self.buffer.get(..self.len).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_has_no_body() {
        let mut buffer = [0; 64];
        let mut reply = Reply::new(&mut buffer);
        reply.u64s(&[1, 2]).unwrap();
        let bytes = reply.finish(7, Err(Errno::NOENT));
        assert_eq!(bytes.len(), OUT_HEADER);
        assert_eq!(bytes[4..8], (-2i32).to_ne_bytes());
        assert_eq!(bytes[8..16], 7u64.to_ne_bytes());
    }

    #[test]
    fn a_body_beyond_the_buffer_is_refused() {
        let mut buffer = [0; 20];
        let mut reply = Reply::new(&mut buffer);
        assert_eq!(reply.u64s(&[1]), Err(Errno::OVERFLOW));
        assert_eq!(reply.u32s(&[1]), Ok(()));
    }
}
