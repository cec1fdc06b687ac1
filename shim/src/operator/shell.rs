//! The host's side of the debugging shell: gives the guest a program to run, then carries a terminal or pipes to it
//! (`bulkhead_protocol::debug`).
//!
//! The initramfs has no shell. A static busybox of the host goes to the guest as a read-only tree of the file server, when it is
//! needed: so a normal initramfs is as small as ever, and a pod costs nothing more.

use std::{
    fs,
    io::{self, IsTerminal},
    os::fd::{AsFd, BorrowedFd},
    path::{Path, PathBuf},
    time::Duration,
};

use bulkhead_protocol::{
    debug::{self, DebugError, DebugHeader, HEAD, KERNEL_PARAMETER, Kind, TREE},
    forward::{ForwardError, parse_answer},
    limits::{DEBUG_FRAME_MAX, DEBUG_PORT, FORWARD_LINE_MAX},
};
use rustix::{
    fs::CWD,
    io::dup,
    mount::{OpenTreeFlags, open_tree},
    termios::{OptionalActions, Termios, isatty, tcgetattr, tcgetwinsize, tcsetattr},
};
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    signal::unix::{SignalKind, signal},
    sync::mpsc,
    time::timeout,
};

use super::{
    pods::{self, Pod},
    shown,
};
use crate::{
    check::host,
    sandbox::{
        control::{self, Client},
        vsock,
    },
};

/// How long the guest may take to answer.
const PATIENCE: Duration = Duration::from_secs(30);

/// Why there is no shell.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The pod.
    #[error(transparent)]
    Pod(#[from] pods::Error),
    /// The machine was started without it.
    #[error(
        "pod {0} has no debugging shell: set debug_shell = true in the configuration; it holds for pods that are \
         started then"
    )]
    NotAllowed(String),
    /// Its vCPUs stand still.
    #[error("pod {0} is paused: resume it first")]
    Paused(String),
    /// No program for the guest.
    #[error(
        "no static busybox on this host: install one (Debian: busybox-static), or name one with --busybox"
    )]
    NoBusybox,
    /// A program that the guest could not start.
    #[error("{path}: {why}")]
    Busybox {
        /// Which one.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// The file server does not take it.
    #[error("giving {path} to the guest: {source}")]
    Give {
        /// Which one.
        path: PathBuf,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The command.
    #[error("the command: {0}")]
    Command(#[from] DebugError),
    /// The way to the agent.
    #[error("connecting to the guest's agent: {0}")]
    Connect(#[source] io::Error),
    /// The agent says no.
    #[error("the agent: {0}")]
    Agent(String),
    /// Terminal, pipes or the connection.
    #[error("the session: {0}")]
    Io(#[from] io::Error),
    /// The machine or the agent is gone, or talks nonsense.
    #[error("the session broke off: {0}")]
    Broken(String),
}

/// Runs `args` in the pod's guest with our standard streams; the answer is its exit status.
pub fn run(pod: &Pod, args: Vec<String>, busybox: Option<&Path>) -> Result<u32, Error> {
    pod.must_run()?;
    // What the machine was started with counts, not what the configuration says now.
    if !machine_allows(&pod.dir) {
        return Err(Error::NotAllowed(pod.name()));
    }
    if pod.report()?.get("state").is_some_and(|s| s == "paused") {
        return Err(Error::Paused(pod.name()));
    }
    give(pod, &find_busybox(busybox)?)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let ended = runtime.block_on(session(pod, args));
    // A thread may still wait in read(0).
    runtime.shutdown_background();
    ended
}

fn machine_allows(dir: &Path) -> bool {
    let text = fs::read_to_string(dir.join("machine.json")).unwrap_or_default();
    let machine: Value = serde_json::from_str(&text).unwrap_or_default();
    machine.get("debug_shell").and_then(Value::as_bool) == Some(true)
}

fn find_busybox(named: Option<&Path>) -> Result<PathBuf, Error> {
    if let Some(path) = named {
        return match host::check_static(path) {
            Ok(()) => Ok(path.to_owned()),
            Err(why) => Err(Error::Busybox {
                path: path.to_owned(),
                why,
            }),
        };
    }
    let found = host::in_path("busybox").filter(|path| host::check_static(path).is_ok());
    found.ok_or(Error::NoBusybox)
}

/// Makes the program the tree that the agent looks for; it may be there from the last time.
fn give(pod: &Pod, program: &Path) -> Result<(), Error> {
    let failed = |source: Box<dyn std::error::Error + Send + Sync>| Error::Give {
        path: program.to_owned(),
        source,
    };
    // Not a symbolic link: the mount would be the link itself.
    let program = program.canonicalize().map_err(|e| failed(e.into()))?;
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let tree = open_tree(CWD, &program, flags).map_err(|e| failed(io::Error::from(e).into()))?;
    let client = Client::new(pod.dir.join("fs.sock"));
    match client.request_blocking(&control::add_tree(TREE, true, false), &[tree]) {
        Err(control::Error::Refused { message, .. }) if message.contains("is there already") => {
            Ok(())
        }
        Err(error) => Err(failed(error.into())),
        Ok(_) => Ok(()),
    }
}

async fn session(pod: &Pod, args: Vec<String>) -> Result<u32, Error> {
    let (stdin, stdout) = (io::stdin(), io::stdout());
    let terminal = stdin.is_terminal() && stdout.is_terminal();
    let header = DebugHeader {
        args,
        terminal: terminal.then(|| {
            let term = std::env::var("TERM").unwrap_or_else(|_| "linux".into());
            let (width, height) = size(stdin.as_fd());
            (term, width, height)
        }),
    };
    let mut stream = vsock::connect(&pod.dir.join("vsock.sock"), DEBUG_PORT)
        .await
        .map_err(Error::Connect)?;
    stream.write_all(&header.encode()?).await?;
    let answer = timeout(PATIENCE, vsock::read_line(&mut stream, FORWARD_LINE_MAX));
    let answer = answer
        .await
        .map_err(|_| Error::Connect(io::ErrorKind::TimedOut.into()))?
        .map_err(Error::Connect)?;
    parse_answer(answer.as_bytes()).map_err(|error| match error {
        ForwardError::Refused(text) => Error::Agent(shown(&text)),
        error => Error::Broken(error.to_string()),
    })?;
    let raw = terminal.then(|| Raw::set(stdin.as_fd())).transpose()?;
    let status = carry(stream, terminal).await;
    drop(raw);
    status
}

/// Our terminal in raw mode, until it is dropped.
struct Raw<'a> {
    terminal: BorrowedFd<'a>,
    before: Termios,
}

impl<'a> Raw<'a> {
    fn set(terminal: BorrowedFd<'a>) -> io::Result<Self> {
        let before = tcgetattr(terminal)?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(terminal, OptionalActions::Now, &raw)?;
        Ok(Self { terminal, before })
    }
}

impl Drop for Raw<'_> {
    /// What the terminal has answered to the guest's questions is no input for the operator's own shell.
    fn drop(&mut self) {
        let _ = tcsetattr(self.terminal, OptionalActions::Flush, &self.before);
    }
}

fn size(terminal: BorrowedFd<'_>) -> (u16, u16) {
    if !isatty(terminal) {
        return (80, 24);
    }
    tcgetwinsize(terminal).map_or((80, 24), |size| (size.ws_col, size.ws_row))
}

async fn carry(stream: UnixStream, terminal: bool) -> Result<u32, Error> {
    let (from_guest, mut to_guest) = stream.into_split();
    let (frames, mut queue) = mpsc::channel::<Vec<u8>>(4);
    read_stdin(frames.clone())?;
    if terminal {
        let mut resized = signal(SignalKind::window_change())?;
        tokio::spawn(async move {
            while resized.recv().await.is_some() {
                let (width, height) = size(io::stdin().as_fd());
                if frames
                    .send(debug::encode_size(width, height))
                    .await
                    .is_err()
                {
                    return;
                }
            }
        });
    } else {
        drop(frames);
    }
    tokio::spawn(async move {
        while let Some(frame) = queue.recv().await {
            if to_guest.write_all(&frame).await.is_err() {
                return;
            }
        }
        // Not closed: that would end the session.
        std::future::pending::<()>().await;
    });
    read_frames(from_guest, &mut io::stdout(), &mut io::stderr()).await
}

/// What the program writes, raw: it is this terminal's owner who asked for it, as with any shell.
async fn read_frames(
    mut guest: impl tokio::io::AsyncRead + Unpin,
    out: &mut impl io::Write,
    err: &mut impl io::Write,
) -> Result<u32, Error> {
    let broken = |error: io::Error| match error.kind() {
        io::ErrorKind::UnexpectedEof => Error::Broken("the guest is gone".into()),
        _ => Error::Broken(error.to_string()),
    };
    let mut payload = Vec::new();
    loop {
        let mut head = [0; HEAD];
        guest.read_exact(&mut head).await.map_err(broken)?;
        let (kind, length) =
            debug::parse_head(head).map_err(|error| Error::Broken(error.to_string()))?;
        payload.resize(length, 0);
        guest.read_exact(&mut payload).await.map_err(broken)?;
        match kind {
            Kind::Data => {
                out.write_all(&payload)?;
                out.flush()?;
            }
            Kind::Error => {
                err.write_all(&payload)?;
                err.flush()?;
            }
            Kind::Exit => {
                let status = payload.as_slice().try_into().map_or(0, u32::from_be_bytes);
                return Ok(status);
            }
            Kind::Close | Kind::Size => {}
        }
    }
}

/// A thread of its own reads: a terminal cannot be watched without changing it for others.
fn read_stdin(frames: mpsc::Sender<Vec<u8>>) -> io::Result<()> {
    let stdin = dup(io::stdin())?;
    std::thread::Builder::new()
        .name("stdin".into())
        .spawn(move || {
            let mut buffer = vec![0; DEBUG_FRAME_MAX];
            loop {
                let length = rustix::io::read(&stdin, &mut *buffer).unwrap_or(0);
                let bytes = buffer.get(..length).unwrap_or_default();
                let kind = if bytes.is_empty() {
                    Kind::Close
                } else {
                    Kind::Data
                };
                let sent = frames.blocking_send(debug::encode(kind, bytes));
                if sent.is_err() || kind == Kind::Close {
                    return;
                }
            }
        })
        .map(drop)
}

/// What the configuration's key means, for `bulkhead check`.
pub fn weakening() -> String {
    format!(
        "debug_shell = true: guests started now get the kernel parameter {KERNEL_PARAMETER}, and root of this host can \
         open a shell inside, beside the containers (bulkhead exec)"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn frames_become_output_and_the_last_one_is_the_status() {
        let mut bytes = debug::encode(Kind::Data, b"out");
        bytes.extend(debug::encode(Kind::Error, b"err"));
        bytes.extend(debug::encode(Kind::Exit, &7u32.to_be_bytes()));
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let status = read_frames(bytes.as_slice(), &mut out, &mut err).await;
        assert_eq!(status.unwrap(), 7);
        assert_eq!((out.as_slice(), err.as_slice()), (&b"out"[..], &b"err"[..]));
        // A guest that breaks off, and one that talks nonsense.
        for bad in [&bytes[..10], &[9, 0, 0, 0, 0]] {
            let ended = read_frames(bad, &mut io::sink(), &mut io::sink()).await;
            assert!(matches!(ended, Err(Error::Broken(_))));
        }
    }

    #[test]
    fn a_machine_without_the_key_allows_nothing() {
        let dir = tempfile::tempdir().unwrap();
        assert!(!machine_allows(dir.path()));
        for (text, allows) in [
            ("{}", false),
            (r#"{"debug_shell":"true"}"#, false),
            (r#"{"debug_shell":true}"#, true),
        ] {
            fs::write(dir.path().join("machine.json"), text).unwrap();
            assert_eq!(machine_allows(dir.path()), allows, "{text}");
        }
    }
}
