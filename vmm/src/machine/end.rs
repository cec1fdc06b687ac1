//! Why a machine ended, and the one place that every part reports it to.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use serde::Serialize;

use super::readiness::{Readiness, Times};
use crate::limits;
use crate::serial::ConsoleRing;

/// The reasons of `exit.json`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum EndReason {
    /// The shim asked for it.
    Stopped,
    /// The guest restarted or powered off on purpose.
    GuestShutdown,
    /// The guest's kernel panicked.
    GuestPanic,
    /// A vCPU could not go on and the guest had announced nothing.
    GuestTripleFault,
    /// The engine could not start or go on.
    EngineFailed,
    /// The file server closed its sockets.
    FileServerDied,
    /// `machine.json` was refused.
    ConfigInvalid,
}

impl EndReason {
    /// The process's exit code.
    pub fn exit_code(self) -> i32 {
        match self {
            Self::Stopped | Self::GuestShutdown => 0,
            _ => 1,
        }
    }
}

/// What part of a machine saw it end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct End {
    /// Why.
    pub reason: EndReason,
    /// One line for a person. Some of it may be the guest's words.
    pub detail: String,
}

impl End {
    /// An end with its detail.
    pub fn new(reason: EndReason, detail: impl Into<String>) -> Self {
        Self {
            reason,
            detail: one_line(&detail.into()),
        }
    }

    /// The guest reset the machine: a panic if the console holds its line, else a shutdown.
    pub fn guest_reset(console: &ConsoleRing) -> Self {
        match console.panic_line() {
            Some(line) => Self::new(EndReason::GuestPanic, line),
            None => Self::new(EndReason::GuestShutdown, "the guest reset the machine"),
        }
    }

    /// A triple fault: Linux uses one to restart as well, and announces that on the console.
    pub fn triple_fault(console: &ConsoleRing) -> Self {
        if console.panic_line().is_some() || console.restart_announced() {
            return Self::guest_reset(console);
        }
        Self::new(
            EndReason::GuestTripleFault,
            "a vCPU met a triple fault; the console's tail may tell more",
        )
    }

    /// Writes `exit.json`.
    pub fn record(
        &self,
        file: &ExitFile,
        console: &ConsoleRing,
        readiness: &Readiness,
    ) -> io::Result<()> {
        #[derive(Serialize)]
        struct Record<'a> {
            reason: EndReason,
            detail: &'a str,
            console: String,
            #[serde(flatten)]
            times: Times,
        }
        let record = Record {
            reason: self.reason,
            detail: &self.detail,
            console: console.tail(limits::CONSOLE_TAIL_BYTES),
            times: readiness.times(),
        };
        file.write(&serde_json::to_vec(&record)?)
    }
}

/// Without what would end the line where it is read, move about in it or turn it around: a guest must not forge one.
fn one_line(text: &str) -> String {
    text.replace(
        |letter: char| {
            letter.is_control()
                || matches!(
                    letter,
                    '\u{61c}' | '\u{200e}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}'
                )
        },
        " ",
    )
}

/// `exit.json`, opened while the state folder could be reached. Empty until the end; who reads it waits for the process's end.
#[derive(Clone)]
pub struct ExitFile(Arc<File>);

impl ExitFile {
    /// Makes it in a state folder.
    pub fn create(state_dir: &Path) -> io::Result<Self> {
        let file = File::options()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW)
            .open(state_dir.join("exit.json"))?;
        Ok(Self(Arc::new(file)))
    }

    fn write(&self, text: &[u8]) -> io::Result<()> {
        self.0.write_all_at(text, 0)?;
        self.0.set_len(text.len() as u64)
    }
}

/// Where the parts of a machine report its end; the first report wins.
#[derive(Clone)]
pub struct EndSender(Sender<End>);

impl EndSender {
    /// The machine is over. Later reports change nothing.
    pub fn send(&self, end: End) {
        // Nobody listens any more: the process is exiting already.
        let _ = self.0.send(end);
    }
}

/// A sender for the parts and the receiver for the one who waits.
pub fn end_channel() -> (EndSender, Receiver<End>) {
    let (sender, receiver) = channel();
    (EndSender(sender), receiver)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reset_is_a_panic_only_with_the_panic_line() {
        let console = ConsoleRing::new();
        assert_eq!(End::guest_reset(&console).reason, EndReason::GuestShutdown);
        console.push(b"Kernel panic - not syncing: x\n");
        let end = End::guest_reset(&console);
        assert_eq!(end.reason, EndReason::GuestPanic);
        assert_eq!(end.detail, "Kernel panic - not syncing: x");
        assert_eq!(End::triple_fault(&console).reason, EndReason::GuestPanic);
    }

    #[test]
    fn a_triple_fault_is_a_shutdown_only_if_announced() {
        let console = ConsoleRing::new();
        assert_eq!(
            End::triple_fault(&console).reason,
            EndReason::GuestTripleFault
        );
        console.push(b"[    1.0] reboot: Restarting system\n");
        assert_eq!(End::triple_fault(&console).reason, EndReason::GuestShutdown);
    }

    #[test]
    fn a_guests_words_stay_in_their_line() {
        let console = ConsoleRing::new();
        let panic = "Kernel panic - not syncing: a\rINFO b\u{b}c\x1b[2J\u{85}d\u{202e}e\u{2067}f\u{200f}g\u{2028}h ü\n";
        console.push(panic.as_bytes());
        assert_eq!(
            End::guest_reset(&console).detail,
            "Kernel panic - not syncing: a INFO b c [2J d e f g h ü"
        );
    }

    #[test]
    fn the_record_is_one_json_object_in_place() {
        let dir = tempfile::tempdir().unwrap();
        let console = ConsoleRing::new();
        console.push(b"tail");
        let readiness = Readiness::new(std::time::Instant::now());
        let file = ExitFile::create(dir.path()).unwrap();
        // Of two ends the last is whole.
        let long = End::new(EndReason::GuestPanic, "x".repeat(1000));
        long.record(&file, &console, &readiness).unwrap();
        End::new(EndReason::EngineFailed, "a\nb")
            .record(&file, &console, &readiness)
            .unwrap();
        let text = std::fs::read_to_string(dir.path().join("exit.json")).unwrap();
        let value: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(value["reason"], "engine-failed");
        assert_eq!(value["detail"], "a b");
        assert_eq!(value["console"], "tail");
        assert!(value["started_us"].is_null() && value["uptime_us"].is_u64());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
