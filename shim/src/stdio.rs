//! Standard streams: between containerd's fifos (or log files) on the host and vsock streams of the guest.
//!
//! One task a stream: a reader that is stuck stops the pump, the vsock credit runs out and the process waits. Ends: stdin by
//! CloseIO, after what is in the fifo; outputs by the guest's end of file.
//!
//! Between fifo and socket bytes move by splice(2): they are in the one or in the other, never in this process. The keeper holds
//! both, so a shim that dies loses nothing and repeats nothing. What goes to a file is read from the socket only after it was written: of a
//! shim that dies in between, one piece can be there twice.

mod moving;

use std::{
    collections::HashMap,
    fs, future, io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::FileTypeExt,
    },
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bulkhead_protocol::{agent, stream::StreamKind};
use serde::{Deserialize, Serialize};
use tokio::{
    io::Interest,
    net::UnixStream,
    sync::Notify,
    task::JoinHandle,
    time::{Instant, sleep, sleep_until},
};

use self::moving::{output_to_fifo, output_to_file, splice_some, watched};
use crate::keeper::{End, Kept};

/// After CloseIO, how long other writers of the stdin fifo may stay silent.
const STDIN_LINGER: Duration = Duration::from_secs(1);
/// After a process has ended, how long its outputs may stay silent before they are cut off (a background child may
/// hold them open, or nobody reads).
const DRAIN_SILENCE: Duration = Duration::from_secs(2);
/// And how long in all: what the process itself wrote fits in the buffers on the way, so more is a child's.
const DRAIN_LIMIT: Duration = Duration::from_secs(20);

/// Why a stream cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A scheme there is not.
    #[error("{stream}: {uri:?} is not supported: use the path of a fifo, or file:///path")]
    Scheme {
        /// Which stream.
        stream: &'static str,
        /// What was asked for.
        uri: String,
    },
    /// The fifo or file.
    #[error("{stream}: opening {path}: {source}")]
    Open {
        /// Which stream.
        stream: &'static str,
        /// Which path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// What containerd asks for; empty means none.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Paths {
    /// A fifo.
    pub stdin: String,
    /// A fifo, or `file://`.
    pub stdout: String,
    /// A fifo, or `file://`; not used with a terminal.
    pub stderr: String,
    /// stdin and stdout are a terminal.
    pub terminal: bool,
}

impl Paths {
    /// With a terminal there is none.
    fn stderr(&self) -> &str {
        if self.terminal { "" } else { &self.stderr }
    }
}

enum Sink {
    Fifo(OwnedFd),
    File(OwnedFd),
}

/// A fifo to read. It is opened when the process starts, not before: a client sends CloseIO at the end of its input only
/// once it knows the process, and until the fifo is open its first write, and so that end, wait (containerd issue 4489).
struct Stdin {
    path: PathBuf,
    /// Open since before this shim: its reader, and our own writer unless CloseIO came.
    restored: Option<(OwnedFd, Option<OwnedFd>)>,
}

/// Where the descriptors of a process are kept.
#[derive(Clone)]
pub struct Keep {
    kept: Kept,
    process: String,
}

/// Roles under which descriptors are kept: the guest's end, the host's end, and our own writer of stdin.
mod role {
    pub const STDIN: &str = "stdin";
    pub const STDIN_FIFO: &str = "stdin-fifo";
    pub const STDIN_WRITER: &str = "stdin-writer";
    pub const STDOUT: &str = "stdout";
    pub const STDOUT_SINK: &str = "stdout-sink";
    pub const STDERR: &str = "stderr";
    pub const STDERR_SINK: &str = "stderr-sink";
}

impl Keep {
    /// Of an exec, or of a container's init (`exec` is empty).
    pub fn new(kept: &Kept, container: &str, exec: &str) -> Self {
        Self {
            kept: kept.clone(),
            process: format!("{container}/{exec}"),
        }
    }

    /// The end of the stream is the end of the process's stdin, and without a reader a writer of the fifo hears of it: nobody else
    /// holds them.
    fn forget_stdin(&self) {
        for role in [role::STDIN, role::STDIN_FIFO, role::STDIN_WRITER] {
            self.kept.forget(&self.process, Some(role));
        }
    }

    fn store(&self, role: &str, fd: &impl AsFd) {
        self.kept.store(&self.process, role, fd.as_fd());
    }

    /// Opens a fifo, kept from the first moment.
    async fn open<const N: usize>(&self, path: &Path, ends: [End; N]) -> io::Result<[OwnedFd; N]> {
        let fds = self.kept.open(&self.process, path, &ends).await?;
        fds.try_into()
            .map_err(|_| io::Error::other("not all ends of it were opened"))
    }
}

/// The host's ends of a process's streams, open.
pub struct Io {
    stdin: Option<Stdin>,
    stdout: Option<Sink>,
    stderr: Option<Sink>,
    terminal: bool,
    keep: Keep,
    /// The guest's ends, from a shim before.
    guests: HashMap<String, OwnedFd>,
    restored: bool,
    started: bool,
}

/// What was opened for a process that did not come to be is kept for nobody.
impl Drop for Io {
    fn drop(&mut self) {
        if !self.started {
            self.keep.kept.forget(&self.keep.process, None);
        }
    }
}

impl Io {
    /// Opens the host's ends; never waits for a peer. A fifo that a shim before has opened for the same call is still open: without a
    /// writer for a moment its reader would see the end.
    pub async fn open(paths: &Paths, keep: Keep) -> Result<Self, Error> {
        let mut kept = keep.kept.take(&keep.process);
        let mut io = Self {
            stdin: open_stdin(&paths.stdin)?,
            stdout: None,
            stderr: None,
            terminal: paths.terminal,
            keep,
            guests: HashMap::new(),
            restored: false,
            started: false,
        };
        let (out, err) = (role::STDOUT_SINK, role::STDERR_SINK);
        io.stdout = open_sink("stdout", &paths.stdout, out, &io.keep, &mut kept).await?;
        io.stderr = open_sink("stderr", paths.stderr(), err, &io.keep, &mut kept).await?;
        Ok(io)
    }

    /// The ends that a shim before has left; what it has not is opened.
    pub async fn restore(paths: &Paths, keep: Keep) -> Self {
        let mut kept = keep.kept.take(&keep.process);
        let restored = !kept.is_empty();
        let (out, err) = (role::STDOUT_SINK, role::STDERR_SINK);
        let stdout = open_sink("stdout", &paths.stdout, out, &keep, &mut kept).await;
        let stderr = open_sink("stderr", paths.stderr(), err, &keep, &mut kept).await;
        let (stdout, stderr) = (stdout.unwrap_or_default(), stderr.unwrap_or_default());
        let stdin_fifo = kept
            .remove(role::STDIN_FIFO)
            .map(|fifo| (fifo, kept.remove(role::STDIN_WRITER)));
        let stdin = open_stdin(&paths.stdin).unwrap_or_default();
        Self {
            stdin: stdin.map(|stdin| Stdin {
                restored: stdin_fifo,
                ..stdin
            }),
            stdout,
            stderr,
            terminal: paths.terminal,
            keep,
            guests: kept,
            restored,
            started: false,
        }
    }

    /// Whether a shim before has left anything of it.
    pub fn is_restored(&self) -> bool {
        self.restored
    }

    /// What the agent must provide.
    pub fn request(&self) -> agent::Stdio {
        let mut stdio = agent::Stdio::new();
        stdio.stdin = self.stdin.is_some();
        stdio.stdout = self.stdout.is_some();
        stdio.stderr = self.stderr.is_some();
        stdio.terminal = self.terminal;
        stdio
    }

    /// Connects the guest's ends, where that is not done yet, and starts pumping.
    pub async fn start<F>(mut self, connect: impl Fn(StreamKind) -> F) -> io::Result<Pumps>
    where
        F: Future<Output = io::Result<UnixStream>>,
    {
        // From here on the pumps let go.
        self.started = true;
        let mut pumps = Pumps::new(self.keep.clone());
        let outputs = [
            (
                self.stdout.take(),
                StreamKind::Stdout,
                [role::STDOUT, role::STDOUT_SINK],
            ),
            (
                self.stderr.take(),
                StreamKind::Stderr,
                [role::STDERR, role::STDERR_SINK],
            ),
        ];
        for (sink, kind, roles) in outputs {
            if let Some(sink) = sink {
                let stream = self.guest(&connect, kind, roles[0]).await?;
                let progress = pumps.progress.clone();
                let keep = self.keep.clone();
                let task = tokio::spawn(async move {
                    let result = match sink {
                        Sink::Fifo(fifo) => output_to_fifo(stream, fifo, &progress).await,
                        Sink::File(file) => output_to_file(stream, file, &progress).await,
                    };
                    if let Err(error) = result {
                        tracing::debug!(?kind, %error, "output ended early");
                    }
                    // The reader sees the end of the fifo once nobody holds it.
                    for role in roles {
                        keep.kept.forget(&keep.process, Some(role));
                    }
                });
                pumps.outputs.push(task);
            }
        }
        if let Some(stdin) = self.stdin.take() {
            let stream = self.guest(&connect, StreamKind::Stdin, role::STDIN).await?;
            let close = pumps.close.clone();
            let begin = pumps.begin.clone();
            let keep = self.keep.clone();
            pumps.stdin = Some(tokio::spawn(async move {
                if stdin.restored.is_none() {
                    begin.notified().await;
                }
                if let Err(error) = pump_stdin(stdin, stream, &close, &keep).await {
                    tracing::debug!(%error, "stdin ended early");
                }
                keep.forget_stdin();
            }));
        }
        Ok(pumps)
    }

    async fn guest<F>(
        &mut self,
        connect: impl Fn(StreamKind) -> F,
        kind: StreamKind,
        role: &str,
    ) -> io::Result<OwnedFd>
    where
        F: Future<Output = io::Result<UnixStream>>,
    {
        if let Some(stream) = self.guests.remove(role) {
            return Ok(stream);
        }
        let stream = OwnedFd::from(connect(kind).await?.into_std()?);
        self.keep.store(role, &stream);
        Ok(stream)
    }
}

/// The running pumps of a process; dropping them cuts them off.
pub struct Pumps {
    keep: Keep,
    stdin: Option<JoinHandle<()>>,
    begin: Arc<Notify>,
    close: Arc<Notify>,
    outputs: Vec<JoinHandle<()>>,
    progress: Arc<AtomicU64>,
}

impl Pumps {
    fn new(keep: Keep) -> Self {
        Self {
            keep,
            stdin: None,
            begin: Arc::default(),
            close: Arc::default(),
            outputs: Vec::new(),
            progress: Arc::default(),
        }
    }

    /// Ends stdin, after what is in the fifo.
    pub fn close_stdin(&self) {
        // First: should the shim die now, the next one sees that it was closed.
        let keep = &self.keep;
        keep.kept.forget(&keep.process, Some(role::STDIN_WRITER));
        self.close.notify_one();
    }

    /// Opens stdin: the process is about to start.
    pub fn begin_stdin(&self) {
        self.begin.notify_one();
    }

    /// Ends stdin at once: the process is gone.
    pub fn drop_stdin(&mut self) {
        if let Some(task) = self.stdin.take() {
            task.abort();
            self.keep.forget_stdin();
        }
    }

    /// Waits until everything was delivered, nothing moves any more, or a process left behind writes on and on.
    pub async fn drain(mut self) {
        self.drop_stdin();
        let end = Instant::now();
        let mut last = (self.progress.load(Ordering::Relaxed), Instant::now());
        while self.outputs.iter().any(|task| !task.is_finished()) {
            let now = self.progress.load(Ordering::Relaxed);
            if end.elapsed() > DRAIN_LIMIT {
                tracing::warn!("outputs still grow long after the process's end: cut off");
                return;
            }
            if now != last.0 {
                last = (now, Instant::now());
            } else if last.1.elapsed() > DRAIN_SILENCE {
                tracing::warn!("outputs are still open after the process's end: cut off");
                return;
            }
            let first = self.outputs.iter_mut().find(|task| !task.is_finished());
            tokio::select! {
                () = async { match first { Some(task) => drop(task.await), None => future::pending().await } } => {}
                () = sleep(Duration::from_millis(100)) => {}
            }
        }
    }
}

impl Drop for Pumps {
    fn drop(&mut self) {
        self.drop_stdin();
        for task in &self.outputs {
            task.abort();
        }
        self.keep.kept.forget(&self.keep.process, None);
    }
}

/// An output: what a shim before has left of it in `kept`, or else opened.
async fn open_sink(
    stream: &'static str,
    uri: &str,
    role: &str,
    keep: &Keep,
    kept: &mut HashMap<String, OwnedFd>,
) -> Result<Option<Sink>, Error> {
    if uri.is_empty() {
        return Ok(None);
    }
    if let Some(fifo) = kept.remove(role) {
        return Ok(Some(Sink::Fifo(fifo)));
    }
    let path = path_of(stream, uri)?;
    let open = |source| Error::Open {
        stream,
        path: path.clone(),
        source,
    };
    let is_fifo = fs::metadata(&path).is_ok_and(|m| m.file_type().is_fifo());
    if is_fifo {
        // Both ends: a reader may come late, go and come again.
        let [fifo] = keep.open(&path, [End::both(role)]).await.map_err(open)?;
        return Ok(Some(Sink::Fifo(fifo)));
    }
    let create = uri.starts_with("file://");
    let file = fs::OpenOptions::new()
        .append(true)
        .create(create)
        .open(&path)
        .map_err(open)?;
    Ok(Some(Sink::File(file.into())))
}

fn open_stdin(uri: &str) -> Result<Option<Stdin>, Error> {
    if uri.is_empty() {
        return Ok(None);
    }
    let path = path_of("stdin", uri)?;
    let open = |source| Error::Open {
        stream: "stdin",
        path: path.clone(),
        source,
    };
    let kind = fs::metadata(&path).map_err(open)?.file_type();
    if !kind.is_fifo() {
        return Err(open(io::Error::other("is no fifo")));
    }
    Ok(Some(Stdin {
        path,
        restored: None,
    }))
}

fn path_of(stream: &'static str, uri: &str) -> Result<PathBuf, Error> {
    let path = match uri.split_once("://") {
        None => uri,
        Some(("fifo", path)) => path,
        Some(("file", path)) if stream != "stdin" => path,
        Some(_) => "",
    };
    if path.starts_with('/') {
        return Ok(path.into());
    }
    Err(Error::Scheme {
        stream,
        uri: uri.into(),
    })
}

async fn pump_stdin(stdin: Stdin, to: OwnedFd, close: &Notify, keep: &Keep) -> io::Result<()> {
    let (fifo, mut writer) = match stdin.restored {
        Some(restored) => restored,
        None => {
            // Our own writer keeps it from ending before CloseIO. Both at once: a reader alone would mean that it was closed.
            let ends = [
                End::reader(role::STDIN_FIFO),
                End::writer(role::STDIN_WRITER),
            ];
            let [fifo, writer] = keep.open(&stdin.path, ends).await?;
            (fifo, Some(writer))
        }
    };
    let from = watched(fifo, Interest::READABLE)?;
    let to = watched(to, Interest::WRITABLE)?;
    let mut silence_ends = Instant::now() + STDIN_LINGER;
    loop {
        let moved = tokio::select! {
            biased;
            moved = splice_some(&from, &to) => moved?,
            () = close.notified(), if writer.is_some() => {
                writer = None;
                keep.kept.forget(&keep.process, Some(role::STDIN_WRITER));
                silence_ends = Instant::now() + STDIN_LINGER;
                continue;
            }
            () = sleep_until(silence_ends), if writer.is_none() => 0,
        };
        if moved == 0 {
            // Also for the keeper's copy of it.
            return Ok(rustix::net::shutdown(&to, rustix::net::Shutdown::Write)?);
        }
        silence_ends = Instant::now() + STDIN_LINGER;
    }
}

#[cfg(test)]
#[path = "stdio_tests.rs"]
mod tests;
