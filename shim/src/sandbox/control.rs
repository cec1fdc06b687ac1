//! Requests to the VMM (`control.sock`) and to the file server (`fs.sock`): one JSON line each, answered by one.

use std::{
    io::{self, IoSlice, Read},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use bulkhead_failpoint::{patience, reach};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::{Value, json};

use crate::limits;

/// How long an answer may take.
const ANSWER: Duration = Duration::from_secs(10);
/// How long the peer may take to listen after its start.
const LISTEN: Duration = Duration::from_secs(10);

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The socket.
    #[error("asking {peer}: {source}")]
    Io {
        /// The socket's file name.
        peer: String,
        /// Why.
        source: io::Error,
    },
    /// The peer says no.
    #[error("{peer} refused {op}: {message}")]
    Refused {
        /// The socket's file name.
        peer: String,
        /// The request's name.
        op: String,
        /// The peer's words.
        message: String,
    },
    /// Not an answer.
    #[error("{peer} gave no valid answer to {op}")]
    Answer {
        /// The socket's file name.
        peer: String,
        /// The request's name.
        op: String,
    },
}

impl Error {
    /// An answer that lacks what it must have.
    pub fn no_answer(peer: &str, op: &str) -> Self {
        Self::Answer {
            peer: peer.into(),
            op: op.into(),
        }
    }
}

/// A client; requests go one after another over one connection. Cheap to clone.
#[derive(Clone)]
pub struct Client {
    path: PathBuf,
    connection: Arc<Mutex<Option<UnixStream>>>,
    over: Arc<AtomicBool>,
}

impl Client {
    /// A client of the socket; it connects with the first request.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            connection: Arc::default(),
            over: Arc::default(),
        }
    }

    /// The peer is gone: nobody waits for it any more.
    pub fn end(&self) {
        self.over.store(true, Ordering::Relaxed);
    }

    /// Sends `request` with descriptors, and gives back what is `ok` in the answer.
    pub async fn request(&self, request: Value, fds: Vec<OwnedFd>) -> Result<Value, Error> {
        let this = self.clone();
        tokio::task::spawn_blocking(move || this.request_blocking(&request, &fds))
            .await
            .map_err(|e| self.io(io::Error::other(e)))?
    }

    /// The same, for callers that have no runtime.
    pub fn request_blocking(&self, request: &Value, fds: &[OwnedFd]) -> Result<Value, Error> {
        let mut slot = self
            .connection
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let result = self.exchange(&mut slot, request, fds);
        if matches!(result, Err(Error::Io { .. } | Error::Answer { .. })) {
            *slot = None; // What is in flight on a broken connection belongs to nobody.
        }
        result
    }

    fn exchange(
        &self,
        slot: &mut Option<UnixStream>,
        request: &Value,
        fds: &[OwnedFd],
    ) -> Result<Value, Error> {
        let op = request.get("op").and_then(Value::as_str).unwrap_or("?");
        let point = match op {
            "add" => Some("create.trees"),
            "add-pid" => Some("create.pid"),
            "remove" => Some("delete.trees"),
            "remove-pid" => Some("delete.pid"),
            _ => None,
        };
        point.map_or(Ok(()), reach).map_err(|e| self.io(e))?;
        let stream = match slot {
            Some(stream) => stream,
            None => slot.insert(connect(&self.path, &self.over).map_err(|e| self.io(e))?),
        };
        send(stream, &format!("{request}\n"), fds).map_err(|e| self.io(e))?;
        let line = read_line(stream).map_err(|e| self.io(e))?;
        parse_answer(&line).map_err(|message| match message {
            Some(message) => Error::Refused {
                peer: self.peer(),
                op: op.into(),
                message,
            },
            None => Error::Answer {
                peer: self.peer(),
                op: op.into(),
            },
        })
    }

    fn peer(&self) -> String {
        let name = self.path.file_name().unwrap_or_default();
        name.to_string_lossy().into_owned()
    }

    fn io(&self, source: io::Error) -> Error {
        Error::Io {
            peer: self.peer(),
            source,
        }
    }
}

/// `{"op":"add",…}`.
pub fn add_tree(id: &str, readonly: bool, shared: bool) -> Value {
    json!({ "op": "add", "id": id, "readonly": readonly, "shared": shared })
}

/// `{"op":"remove",…}`.
pub fn remove_tree(id: &str) -> Value {
    json!({ "op": "remove", "id": id })
}

/// `{"op":"remove-pid",…}`.
pub fn remove_pid(pid: u32) -> Value {
    json!({ "op": "remove-pid", "pid": pid })
}

/// A request without arguments.
pub fn op(name: &str) -> Value {
    json!({ "op": name })
}

fn parse_answer(line: &[u8]) -> Result<Value, Option<String>> {
    let value: Value = serde_json::from_slice(line).map_err(|_| None)?;
    if let Some(ok) = value.get("ok") {
        return Ok(ok.clone());
    }
    match value.get("error").and_then(Value::as_str) {
        Some(message) => Err(Some(message.chars().take(500).collect())),
        None => Err(None),
    }
}

/// Connects; the peer was started a moment ago, and has no way to tell when its socket listens.
fn connect(path: &Path, over: &AtomicBool) -> io::Result<UnixStream> {
    let end = Instant::now() + patience(LISTEN);
    let mut pause = Duration::from_micros(500);
    loop {
        match UnixStream::connect(path) {
            Ok(stream) => {
                stream.set_read_timeout(Some(patience(ANSWER)))?;
                stream.set_write_timeout(Some(patience(ANSWER)))?;
                return Ok(stream);
            }
            Err(e)
                if matches!(
                    e.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
                ) && Instant::now() < end
                    && !over.load(Ordering::Relaxed)
                    // The folder is gone when the pod is.
                    && path.parent().is_some_and(Path::exists) =>
            {
                std::thread::sleep(pause);
                pause = (pause * 2).min(Duration::from_millis(20));
            }
            Err(e) => return Err(e),
        }
    }
}

fn send(stream: &mut UnixStream, line: &str, fds: &[OwnedFd]) -> io::Result<()> {
    let mut rest = line.as_bytes();
    let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    let mut space =
        [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(limits::CONTROL_DESCRIPTORS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&fds)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let sent = sendmsg(
        &*stream,
        &[IoSlice::new(rest)],
        &mut control,
        SendFlags::NOSIGNAL,
    )?;
    rest = rest.get(sent..).unwrap_or_default();
    io::Write::write_all(stream, rest)
}

fn read_line(stream: &mut UnixStream) -> io::Result<Vec<u8>> {
    let mut line = Vec::new();
    let mut chunk = [0; 4096];
    while line.last() != Some(&b'\n') {
        let n = stream.read(&mut chunk)?;
        if n == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        line.extend_from_slice(chunk.get(..n).unwrap_or_default());
        if line.len() > limits::CONTROL_ANSWER {
            return Err(io::Error::other("answer is too long"));
        }
    }
    Ok(line)
}

#[cfg(test)]
mod tests {
    use std::{
        fs::File,
        io::{BufRead, BufReader, Write},
        os::unix::net::UnixListener,
        thread,
    };

    use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

    use super::*;

    /// Answers each line with the next of `answers`.
    fn peer(listener: UnixListener, answers: Vec<&'static str>) -> thread::JoinHandle<Vec<String>> {
        thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            let mut lines = BufReader::new(stream.try_clone().unwrap());
            let mut seen = Vec::new();
            for answer in answers {
                let mut line = String::new();
                lines.read_line(&mut line).unwrap();
                seen.push(line);
                writeln!(&stream, "{answer}").unwrap();
            }
            seen
        })
    }

    #[test]
    fn requests_are_lines_and_answers_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let answers = vec![
            r#"{"ok":{"state":"running"}}"#,
            r#"{"error":"no such tree"}"#,
        ];
        let peer = peer(listener, answers);
        let client = Client::new(&path);
        let report = client.request_blocking(&op("report"), &[]).unwrap();
        assert_eq!(report["state"], "running");
        let error = client
            .request_blocking(&remove_tree("t9"), &[])
            .unwrap_err();
        assert_eq!(
            error.to_string(),
            "control.sock refused remove: no such tree"
        );
        let seen = peer.join().unwrap();
        assert_eq!(seen[0], "{\"op\":\"report\"}\n");
        assert_eq!(seen[1], "{\"id\":\"t9\",\"op\":\"remove\"}\n");
    }

    #[test]
    fn a_descriptor_travels_with_its_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fs.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let peer = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let mut buffer = [0; 200];
            let mut iov = [io::IoSliceMut::new(&mut buffer)];
            recvmsg(&stream, &mut iov, &mut control, RecvFlags::empty()).unwrap();
            let fds = control
                .drain()
                .map(|m| match m {
                    RecvAncillaryMessage::ScmRights(fds) => fds.count(),
                    _ => 0,
                })
                .sum::<usize>();
            writeln!(stream, "{{\"ok\":{{}}}}").unwrap();
            fds
        });
        let file = File::open("/dev/null").unwrap().into();
        let client = Client::new(&path);
        client
            .request_blocking(&add_tree("t1", true, false), &[file])
            .unwrap();
        assert_eq!(peer.join().unwrap(), 1);
    }

    #[test]
    fn an_answer_without_end_is_refused() {
        let (mut ours, mut theirs) = UnixStream::pair().unwrap();
        let flood = vec![b'x'; 2 * limits::CONTROL_ANSWER];
        let writer = std::thread::spawn(move || theirs.write_all(&flood));
        assert!(read_line(&mut ours).is_err());
        drop(ours);
        let _ = writer.join();
    }

    #[test]
    fn nonsense_is_no_answer() {
        assert_eq!(parse_answer(b"{}\n"), Err(None));
        assert_eq!(parse_answer(b"ok\n"), Err(None));
    }
}
