//! A host client that has connected to `vsock.sock` and still has to say which port of the guest it wants.

use std::io;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use rustix::net::{RecvFlags, recv};

use crate::limits;

/// What a look at the client's bytes gave.
#[derive(Debug, PartialEq, Eq)]
pub enum Line {
    /// Not whole yet.
    Partial,
    /// `CONNECT <port>`.
    Connect(u32),
    /// Anything else, too long, or end of file.
    Bad,
}

/// A client before its `CONNECT` line.
#[derive(Debug)]
pub struct Client {
    /// Its socket.
    pub stream: UnixStream,
    /// When it is too late.
    pub deadline: Instant,
    line: Vec<u8>,
}

impl Client {
    /// A client that has just connected.
    pub fn new(stream: UnixStream) -> Self {
        let deadline = Instant::now() + limits::VSOCK_CONNECT_TIMEOUT;
        Self {
            stream,
            deadline,
            line: Vec::new(),
        }
    }

    /// Reads what has come, but nothing past the line: that belongs to the guest.
    pub fn read_line(&mut self) -> Line {
        loop {
            let mut bytes = [0; limits::VSOCK_CONNECT_LINE];
            let room = limits::VSOCK_CONNECT_LINE.saturating_sub(self.line.len());
            let seen = match self.receive(&mut bytes[..room], RecvFlags::PEEK) {
                Ok(0) => return Line::Bad,
                Ok(n) => n,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Line::Partial,
                Err(_) => return Line::Bad,
            };
            let newline = bytes[..seen].iter().position(|&byte| byte == b'\n');
            let take = newline.map_or(seen, |at| at + 1);
            match self.receive(&mut bytes[..take], RecvFlags::empty()) {
                Ok(n) if n == take => self.line.extend_from_slice(&bytes[..take]),
                _ => return Line::Bad,
            }
            if newline.is_some() {
                return self.port().map_or(Line::Bad, Line::Connect);
            }
        }
    }

    fn port(&self) -> Option<u32> {
        let line = std::str::from_utf8(&self.line).ok()?.strip_suffix('\n')?;
        line.strip_prefix("CONNECT ")?.parse().ok()
    }

    fn receive(&self, bytes: &mut [u8], flags: RecvFlags) -> io::Result<usize> {
        Ok(recv(&self.stream, bytes, flags | RecvFlags::DONTWAIT)?.0)
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    fn client() -> (UnixStream, Client) {
        let (far, near) = UnixStream::pair().unwrap();
        (far, Client::new(near))
    }

    #[test]
    fn a_line_may_come_in_pieces_and_bytes_after_it_stay() {
        let (mut far, mut client) = client();
        far.write_all(b"CONN").unwrap();
        assert_eq!(client.read_line(), Line::Partial);
        far.write_all(b"ECT 1024\nhello").unwrap();
        assert_eq!(client.read_line(), Line::Connect(1024));
        drop(far);
        let mut rest = String::new();
        client.stream.read_to_string(&mut rest).unwrap();
        assert_eq!(rest, "hello");
    }

    #[test]
    fn garbage_long_lines_and_end_of_file_are_refused() {
        for bytes in [
            &b"GET / HTTP/1.1\n"[..],
            b"CONNECT -1\n",
            b"CONNECT 4294967296\n",
            b"CONNECT 1 2\n",
            b"CONNECT 00000000000000000000000000000001\n",
            b"\xff\n",
        ] {
            let (mut far, mut client) = client();
            far.write_all(bytes).unwrap();
            assert_eq!(client.read_line(), Line::Bad, "{bytes:?}");
        }
        let (far, mut client) = client();
        drop(far);
        assert_eq!(client.read_line(), Line::Bad);
    }
}
