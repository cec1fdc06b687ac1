//! A pod's logs: the guest's console (kernel and agent), the VMM's and the file server's.

use std::{
    fs,
    io::{self, Read, Seek, SeekFrom, Write},
    path::PathBuf,
    thread,
    time::Duration,
};

use serde_json::{Value, json};

use super::{
    pods::{Error, Pod},
    shown,
};
use crate::sandbox::control::Client;

/// Pieces of one source that are written in one turn: more than the VMM keeps of its console.
const PIECES_MAX: usize = 32;
/// Longest line; a longer one is broken.
const LINE_MAX: usize = 4096;

/// How often what is new is looked for.
const PACE: Duration = Duration::from_millis(300);
/// Bytes read of a log at once.
const CHUNK: u64 = 64 * 1024;

/// One of the logs.
enum Source {
    /// The VMM keeps the console's last 64 KiB.
    Console { client: Client, next: u64 },
    /// A file, capped by who writes it.
    File { path: PathBuf, next: u64 },
}

/// The logs of a pod, and how far they were read.
pub struct Logs {
    sources: Vec<(&'static str, Source)>,
    /// An unfinished line of each.
    rests: Vec<String>,
}

impl Logs {
    /// From their beginnings.
    pub fn of(pod: &Pod) -> Self {
        let file = |name: &str| Source::File {
            path: pod.dir.join(name),
            next: 0,
        };
        let mut sources = vec![("vmm", file("vmm.log")), ("fs", file("fs.log"))];
        if pod.is_running() {
            let client = Client::new(pod.dir.join("control.sock"));
            sources.push(("guest", Source::Console { client, next: 0 }));
        }
        Self {
            rests: vec![String::new(); sources.len()],
            sources,
        }
    }

    /// Writes what is new, each line with its source before it; false if there was nothing.
    pub fn write_new(&mut self, out: &mut impl Write) -> io::Result<bool> {
        let mut any = false;
        for ((name, source), rest) in self.sources.iter_mut().zip(&mut self.rests) {
            // A source that is gone has nothing more to say; one that never ends has the next turn.
            for _ in 0..PIECES_MAX {
                let Some(text) = source.next().filter(|text| !text.is_empty()) else {
                    break;
                };
                any = true;
                rest.push_str(&shown(&text));
                while let Some((line, more)) = rest.split_once('\n') {
                    writeln!(out, "{name:<5} | {line}")?;
                    *rest = more.to_owned();
                }
                if rest.len() > LINE_MAX {
                    writeln!(out, "{name:<5} | {rest}")?;
                    rest.clear();
                }
            }
        }
        out.flush()?;
        Ok(any)
    }

    /// Writes lines that have no end yet.
    pub fn write_rest(&mut self, out: &mut impl Write) -> io::Result<()> {
        for ((name, _), rest) in self.sources.iter().zip(&mut self.rests) {
            if !rest.is_empty() {
                writeln!(out, "{name:<5} | {rest}")?;
                rest.clear();
            }
        }
        out.flush()
    }

    /// Goes on writing until the pod is gone.
    pub fn follow(&mut self, pod: &Pod, out: &mut impl Write) -> Result<(), Error> {
        let failed = |source| Error::Read {
            path: pod.dir.clone(),
            source,
        };
        while pod.dir.is_dir() {
            if !self.write_new(out).map_err(failed)? {
                thread::sleep(PACE);
            }
        }
        self.write_rest(out).map_err(failed)
    }
}

impl Source {
    fn next(&mut self) -> Option<String> {
        match self {
            Self::Console { client, next } => {
                let request = json!({ "op": "console", "from": *next });
                let piece = client.request_blocking(&request, &[]).ok()?;
                *next = piece.get("next").and_then(Value::as_u64)?;
                piece.get("text")?.as_str().map(str::to_owned)
            }
            Self::File { path, next } => {
                let mut file = fs::File::open(path).ok()?;
                file.seek(SeekFrom::Start(*next)).ok()?;
                let mut bytes = Vec::new();
                file.take(CHUNK).read_to_end(&mut bytes).ok()?;
                *next = next.saturating_add(bytes.len() as u64);
                Some(String::from_utf8_lossy(&bytes).into_owned())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_come_once_with_their_source_and_without_control_characters() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("vmm.log"), "one\ntw").unwrap();
        fs::write(dir.path().join("fs.log"), "\u{1b}[31mred\n").unwrap();
        let pod = Pod::read(dir.path()).unwrap();
        let mut logs = Logs::of(&pod);
        let mut out = Vec::new();
        assert!(logs.write_new(&mut out).unwrap());
        assert_eq!(out, b"vmm   | one\nfs    | ?[31mred\n");
        assert!(!logs.write_new(&mut out).unwrap());
        let mut log = fs::OpenOptions::new()
            .append(true)
            .open(dir.path().join("vmm.log"))
            .unwrap();
        log.write_all(b"o\nthree").unwrap();
        out.clear();
        logs.write_new(&mut out).unwrap();
        logs.write_rest(&mut out).unwrap();
        assert_eq!(out, b"vmm   | two\nvmm   | three\n");
    }
}
