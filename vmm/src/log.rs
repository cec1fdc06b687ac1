//! The log of both programs: their stderr, which is a file in the pod's state folder. A guest that causes lines must not
//! fill the host's disk, so past [`limits::LOG_BYTES`] lines are dropped. Nor must it end a process by a disk that is full:
//! what cannot be written is dropped too, as whoever were told of it would say so on this same stderr.

use std::io::{self, Write};
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::limits;

/// How much this process has logged.
static LOGGED: AtomicUsize = AtomicUsize::new(0);

/// Stderr, capped.
pub fn stderr() -> impl Write {
    Capped {
        to: io::stderr(),
        written: &LOGGED,
    }
}

struct Capped<'a, W> {
    to: W,
    written: &'a AtomicUsize,
}

impl<W: Write> Write for Capped<'_, W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let before = self.written.fetch_add(bytes.len(), Ordering::Relaxed);
        if before.saturating_add(bytes.len()) <= limits::LOG_BYTES {
            let _ = self.to.write_all(bytes);
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        let _ = self.to.flush();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_of_lines_ends_at_the_cap() {
        let (mut file, written) = (Vec::new(), AtomicUsize::new(0));
        // Each line has a writer of its own, as tracing makes them.
        for _ in 0..limits::LOG_BYTES / 10 {
            let mut log = Capped {
                to: &mut file,
                written: &written,
            };
            log.write_all(b"INFO session begins client=7.38\n").unwrap();
        }
        assert!(file.ends_with(b"\n") && file.len() <= limits::LOG_BYTES);
        assert!(file.len() > limits::LOG_BYTES - 40);
    }

    /// A disk with room for so many bytes more.
    struct Disk(usize);

    impl Write for Disk {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let len = bytes.len().min(self.0);
            self.0 -= len;
            match len {
                0 => Err(io::ErrorKind::StorageFull.into()),
                len => Ok(len),
            }
        }

        fn flush(&mut self) -> io::Result<()> {
            Err(io::ErrorKind::StorageFull.into())
        }
    }

    #[test]
    fn a_full_disk_is_no_error() {
        let written = AtomicUsize::new(0);
        let mut log = Capped {
            to: Disk(10),
            written: &written,
        };
        for _ in 0..3 {
            assert_eq!(log.write(b"WARN line\n+").unwrap(), 11);
        }
        log.flush().unwrap();
        assert_eq!(log.to.0, 0, "what can be written is");
    }
}
