//! Standard streams: between containerd's fifos (or log files) on the host and vsock streams of the guest.
//!
//! One task a stream, one buffer a task: a reader that is stuck stops the pump, the vsock credit runs out and the
//! process waits. Ends: stdin by CloseIO, after what is in the fifo; outputs by the guest's end of file.

use std::{
    fs, future, io,
    os::unix::fs::FileTypeExt,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bulkhead_protocol::{agent, limits::STREAM_BUFFER, stream::StreamKind};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::unix::pipe,
    sync::Notify,
    task::JoinHandle,
    time::{Instant, sleep, sleep_until},
};

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
#[derive(Clone, Debug, Default, PartialEq, Eq)]
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

enum Sink {
    Fifo(pipe::Sender),
    File(tokio::fs::File),
}

/// A fifo to read. It is opened when the process starts, not before: a client sends CloseIO at the end of its input only
/// once it knows the process, and until the fifo is open its first write, and so that end, wait (containerd issue 4489).
struct Stdin(PathBuf);

impl Stdin {
    /// The fifo, and our own writer that keeps it from ending before CloseIO.
    fn open(&self) -> io::Result<(pipe::Receiver, pipe::Sender)> {
        let options = pipe::OpenOptions::new();
        Ok((
            options.open_receiver(&self.0)?,
            options.open_sender(&self.0)?,
        ))
    }
}

/// The host's ends of a process's streams, open.
#[derive(Default)]
pub struct Io {
    stdin: Option<Stdin>,
    stdout: Option<Sink>,
    stderr: Option<Sink>,
    terminal: bool,
}

impl Io {
    /// Opens the host's ends; never waits for a peer.
    pub fn open(paths: &Paths) -> Result<Self, Error> {
        let stderr = if paths.terminal { "" } else { &paths.stderr };
        Ok(Self {
            stdin: open_stdin(&paths.stdin)?,
            stdout: open_sink("stdout", &paths.stdout)?,
            stderr: open_sink("stderr", stderr)?,
            terminal: paths.terminal,
        })
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

    /// Connects the guest's ends and starts pumping.
    pub async fn start<S, F>(self, connect: impl Fn(StreamKind) -> F) -> io::Result<Pumps>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
        F: Future<Output = io::Result<S>>,
    {
        let mut pumps = Pumps::default();
        for (sink, kind) in [
            (self.stdout, StreamKind::Stdout),
            (self.stderr, StreamKind::Stderr),
        ] {
            if let Some(sink) = sink {
                let stream = connect(kind).await?;
                let progress = pumps.progress.clone();
                let task = tokio::spawn(async move {
                    let result = match sink {
                        Sink::Fifo(fifo) => pump_output(stream, fifo, &progress).await,
                        Sink::File(file) => pump_output(stream, file, &progress).await,
                    };
                    if let Err(error) = result {
                        tracing::debug!(?kind, %error, "output ended early");
                    }
                });
                pumps.outputs.push(task);
            }
        }
        if let Some(stdin) = self.stdin {
            let stream = connect(StreamKind::Stdin).await?;
            let close = pumps.close.clone();
            let begin = pumps.begin.clone();
            pumps.stdin = Some(tokio::spawn(async move {
                begin.notified().await;
                if let Err(error) = pump_stdin(stdin, stream, &close).await {
                    tracing::debug!(%error, "stdin ended early");
                }
            }));
        }
        Ok(pumps)
    }
}

/// The running pumps of a process; dropping them cuts them off.
#[derive(Default)]
pub struct Pumps {
    stdin: Option<JoinHandle<()>>,
    begin: Arc<Notify>,
    close: Arc<Notify>,
    outputs: Vec<JoinHandle<()>>,
    progress: Arc<AtomicU64>,
}

impl Pumps {
    /// A handle that ends stdin when notified.
    pub fn closer(&self) -> Arc<Notify> {
        self.close.clone()
    }

    /// Opens stdin: the process is about to start.
    pub fn begin_stdin(&self) {
        self.begin.notify_one();
    }

    /// Ends stdin at once: the process is gone.
    pub fn drop_stdin(&mut self) {
        if let Some(task) = self.stdin.take() {
            task.abort();
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
    }
}

fn open_sink(stream: &'static str, uri: &str) -> Result<Option<Sink>, Error> {
    if uri.is_empty() {
        return Ok(None);
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
        let fifo = pipe::OpenOptions::new()
            .read_write(true)
            .open_sender(&path)
            .map_err(open)?;
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
    Ok(Some(Stdin(path)))
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

async fn pump_output(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    progress: &AtomicU64,
) -> io::Result<()> {
    let mut buffer = vec![0; STREAM_BUFFER];
    loop {
        let n = from.read(&mut buffer).await?;
        if n == 0 {
            return to.flush().await;
        }
        let mut rest = buffer.get(..n).unwrap_or_default();
        while !rest.is_empty() {
            let written = to.write(rest).await?;
            if written == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            rest = rest.get(written..).unwrap_or_default();
            progress.fetch_add(1, Ordering::Relaxed);
        }
    }
}

async fn pump_stdin(
    stdin: Stdin,
    mut to: impl AsyncWrite + Unpin,
    close: &Notify,
) -> io::Result<()> {
    let (mut fifo, keep) = stdin.open()?;
    let mut keep = Some(keep);
    let mut buffer = vec![0; STREAM_BUFFER];
    let mut silence_ends = Instant::now();
    loop {
        let n = tokio::select! {
            biased;
            n = fifo.read(&mut buffer) => n?,
            () = close.notified(), if keep.is_some() => {
                keep = None;
                silence_ends = Instant::now() + STDIN_LINGER;
                continue;
            }
            () = sleep_until(silence_ends), if keep.is_none() => 0,
        };
        if n == 0 {
            return to.shutdown().await;
        }
        to.write_all(buffer.get(..n).unwrap_or_default()).await?;
        silence_ends = Instant::now() + STDIN_LINGER;
    }
}

#[cfg(test)]
#[path = "stdio_tests.rs"]
mod tests;
