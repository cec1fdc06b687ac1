//! The shim's log: lines into the bundle's `log` fifo, which containerd reads (runtime v2, "Debugging and Shim Logs").

use std::{
    fs::{File, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    sync::{Arc, Mutex, PoisonError},
    time::Instant,
};

use tracing_subscriber::{EnvFilter, fmt::MakeWriter};

use crate::{
    args::Args,
    limits::{LOG_BURST, LOG_LINE, LOG_LINES_PER_SECOND},
};

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
        rate: Mutex::new(LineRate::new(Instant::now())),
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
    rate: Mutex<LineRate>,
}

struct Line<'a> {
    log: &'a LogFifo,
    text: Vec<u8>,
}

/// How many lines may go out: some of them tell what the guest does, and a guest must not fill containerd's log.
struct LineRate {
    left: f64,
    filled: Instant,
    /// Lines that were left out since the last one.
    lost: u64,
}

impl LineRate {
    fn new(now: Instant) -> Self {
        Self {
            left: LOG_BURST.into(),
            filled: now,
            lost: 0,
        }
    }

    /// Whether a line goes out now, and how many before it did not.
    fn take(&mut self, now: Instant) -> Option<u64> {
        let since = now.saturating_duration_since(self.filled).as_secs_f64();
        self.filled = now;
        self.left = (self.left + since * f64::from(LOG_LINES_PER_SECOND)).min(LOG_BURST.into());
        if self.left < 1.0 {
            self.lost = self.lost.saturating_add(1);
            return None;
        }
        self.left -= 1.0;
        Some(std::mem::take(&mut self.lost))
    }
}

impl<'a> MakeWriter<'a> for LogFifo {
    type Writer = Line<'a>;

    fn make_writer(&'a self) -> Line<'a> {
        Line {
            log: self,
            text: self.prefix.clone().into_bytes(),
        }
    }
}

impl Write for Line<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let room = LOG_LINE.saturating_sub(self.text.len());
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
        let mut rate = self.log.rate.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(lost) = rate.take(Instant::now()) else {
            return;
        };
        drop(rate);
        let mut fifo: &File = &self.log.fifo;
        if lost > 0 {
            let prefix = &self.log.prefix;
            let _ =
                fifo.write_all(format!("{prefix} WARN {lost} lines were left out\n").as_bytes());
        }
        // One line an event: an error may have several.
        let text = String::from_utf8_lossy(&self.text);
        let mut line = text.trim_end().replace('\n', " | ").into_bytes();
        line.truncate(LOG_LINE.saturating_sub(1));
        line.push(b'\n');
        let _ = fifo.write_all(&line);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_flood_of_lines_is_cut_and_counted() {
        let start = Instant::now();
        let mut rate = LineRate::new(start);
        let burst = (0..10_000).filter_map(|_| rate.take(start)).count();
        assert_eq!(burst, LOG_BURST as usize);
        let later = start + Duration::from_secs(1);
        let lost = 10_000 - u64::from(LOG_BURST);
        assert_eq!(rate.take(later), Some(lost));
        let second = 1 + (0..10_000).filter_map(|_| rate.take(later)).count();
        assert_eq!(second, LOG_LINES_PER_SECOND as usize);
    }

    #[test]
    fn a_line_goes_out_in_one_piece_and_never_longer_than_a_pipe_takes() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let log = LogFifo {
            fifo: Arc::new(file.reopen().unwrap()),
            prefix: "pod=a ".into(),
            rate: Mutex::new(LineRate::new(Instant::now())),
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
        assert_eq!(lines[2].len(), LOG_LINE - 1);
    }
}
