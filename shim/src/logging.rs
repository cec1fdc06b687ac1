//! The shim's log: lines into the bundle's `log` fifo, which containerd reads (runtime v2, "Debugging and Shim Logs").

use std::{
    fs::{File, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    sync::Arc,
};

use tracing_subscriber::{EnvFilter, fmt::MakeWriter};

use crate::args::Args;

/// Longest line: what a pipe takes in one piece.
const LINE_MAX: usize = 4096;

/// Starts logging for the pod of `args`, as far as the fifo is there: the bundle is the working folder. Once started, it goes on.
pub fn start(args: &Args) {
    // Not blocking: without a reader or with a full fifo a line is lost, and nothing waits.
    let fifo = OpenOptions::new()
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("log");
    let Ok(fifo) = fifo else { return };
    let filter = EnvFilter::new(if args.debug {
        "debug,ttrpc=info"
    } else {
        "info"
    });
    let writer = LogFifo {
        fifo: Arc::new(fifo),
        prefix: format!("bulkhead pod={}/{} ", args.namespace, args.id),
    };
    let _ = tracing_subscriber::fmt()
        .with_ansi(false)
        .with_env_filter(filter)
        .with_target(false)
        .without_time()
        .with_writer(writer)
        .try_init();
}

struct LogFifo {
    fifo: Arc<File>,
    prefix: String,
}

struct Line<'a> {
    fifo: &'a File,
    text: Vec<u8>,
}

impl<'a> MakeWriter<'a> for LogFifo {
    type Writer = Line<'a>;

    fn make_writer(&'a self) -> Line<'a> {
        Line {
            fifo: &self.fifo,
            text: self.prefix.clone().into_bytes(),
        }
    }
}

impl Write for Line<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let room = LINE_MAX.saturating_sub(self.text.len());
        self.text
            .extend_from_slice(bytes.get(..room).unwrap_or(bytes));
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Line<'_> {
    fn drop(&mut self) {
        // One line an event: an error may have several.
        let text = String::from_utf8_lossy(&self.text);
        let mut line = text.trim_end().replace('\n', " | ").into_bytes();
        line.truncate(LINE_MAX.saturating_sub(1));
        line.push(b'\n');
        let _ = self.fifo.write_all(&line);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_goes_out_in_one_piece_and_never_longer_than_a_pipe_takes() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let log = LogFifo {
            fifo: Arc::new(file.reopen().unwrap()),
            prefix: "pod=a ".into(),
        };
        let mut line = log.make_writer();
        line.write_all(b"hello\n").unwrap();
        drop(line);
        let mut line = log.make_writer();
        line.write_all(b"first\n  second\n").unwrap();
        drop(line);
        let mut line = log.make_writer();
        line.write_all(&[b'x'; 10_000]).unwrap();
        drop(line);
        let text = std::fs::read_to_string(file.path()).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], "pod=a hello");
        assert_eq!(lines[1], "pod=a first |   second");
        assert_eq!(lines[2].len(), LINE_MAX - 1);
    }
}
