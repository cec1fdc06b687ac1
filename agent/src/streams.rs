//! Standard streams of a process: a pipe or the pty on one side, a vsock connection of the host on the other.
//!
//! A pump a stream. It holds at most one buffer, reads only while a connection is there (else the pipe fills and the
//! process waits), and outlives its connection: data that was not taken goes to the next one. It ends at the end of the pipe, or when
//! the process is deleted: what is in the pipe then is still delivered to a connection that is there.
//!
//! The pumps of a container have a thread of their own. A process can keep whoever reads, writes or closes the other end of its pipe
//! waiting in the kernel, also without blocking mode: splice(2) holds the pipe's lock while it waits for its other side. The agent must
//! not wait for it, nor another container.

use std::{
    io,
    os::fd::OwnedFd,
    sync::{Arc, Mutex, PoisonError},
    thread,
};

use bulkhead_protocol::{limits::STREAM_BUFFER, stream::StreamKind};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWriteExt, Interest, unix::AsyncFd},
    runtime::{Builder, Handle},
    sync::{mpsc, oneshot, watch},
};
use tokio_vsock::VsockStream;

use crate::{
    container::launch::ChildStdio,
    error::{Context, Result},
    sys,
};

/// Most that a pipe holds: what is still delivered of a deleted process.
const PIPE_MAX: usize = 64 * 1024;

/// The agent's end of a pipe or pty.
type Pipe = Arc<AsyncFd<OwnedFd>>;

/// Which streams a process has.
#[derive(Clone, Copy, Debug)]
pub struct Flags {
    /// stdin is connected.
    pub stdin: bool,
    /// stdout is connected.
    pub stdout: bool,
    /// stderr is connected; never with a terminal.
    pub stderr: bool,
    /// stdin and stdout are a pty.
    pub terminal: bool,
}

/// The thread of a container's pumps. It ends with the last of them, and the last copy of this.
#[derive(Clone)]
pub struct Pumps {
    runtime: Handle,
    needed: mpsc::Sender<()>,
}

impl Pumps {
    /// Bytes of the thread's stack.
    const STACK: usize = 128 * 1024;

    /// Starts the thread.
    pub fn start() -> Result<Self> {
        let what = || "start the pumps of standard streams".to_string();
        let runtime = Builder::new_current_thread();
        let runtime = { runtime }.enable_io().build().step(what)?;
        let handle = runtime.handle().clone();
        let (needed, mut unneeded) = mpsc::channel(1);
        thread::Builder::new()
            .name("pumps".into())
            .stack_size(Self::STACK)
            .spawn(move || runtime.block_on(unneeded.recv()))
            .step(what)?;
        Ok(Self {
            runtime: handle,
            needed,
        })
    }

    fn spawn(&self, pump: impl Future<Output = ()> + Send + 'static) {
        let needed = self.needed.clone();
        self.runtime.spawn(async move {
            pump.await;
            drop(needed);
        });
    }

    /// An end of a pipe or pty for a pump.
    fn watch(&self, fd: OwnedFd, interest: Interest) -> Result<Pipe> {
        let _within = self.runtime.enter();
        rustix::io::ioctl_fionbio(&fd, true).step(|| "set up a standard stream".into())?;
        sys::watch(fd, interest)
            .map(Arc::new)
            .step(|| "watch a standard stream".into())
    }
}

struct Stream {
    connections: mpsc::Sender<VsockStream>,
    pipe: Mutex<Option<oneshot::Sender<Pipe>>>,
    /// True asks the pump to end; so does dropping it.
    end: watch::Sender<bool>,
}

/// All streams of a process. Dropping it ends the pumps.
pub struct Streams {
    flags: Flags,
    /// None without streams.
    pumps: Option<Pumps>,
    stdin: Option<Stream>,
    stdout: Option<Stream>,
    stderr: Option<Stream>,
}

impl Streams {
    /// Makes the pumps, in the container's thread for them, which is made for the first; connections can come from now on.
    pub fn new(flags: Flags, pumps: &mut Option<Pumps>) -> Result<Self> {
        let terminal = flags.terminal;
        let wanted = flags.stdin || flags.stdout || flags.stderr && !terminal;
        if wanted && pumps.is_none() {
            *pumps = Some(Pumps::start()?);
        }
        let pumps = pumps.as_ref().filter(|_| wanted);
        let output = |wanted: bool| Some(Stream::spawn(pumps.filter(|_| wanted)?, pump_output));
        let input = |pump| pump_input(pump, terminal);
        Ok(Self {
            flags,
            pumps: pumps.cloned(),
            stdin: (pumps.filter(|_| flags.stdin)).map(|pumps| Stream::spawn(pumps, input)),
            stdout: output(flags.stdout),
            stderr: output(flags.stderr && !terminal),
        })
    }

    /// Makes the pipes: the agent's ends go to the pumps, the others are returned for the process.
    pub fn open_pipes(&self) -> Result<ChildStdio> {
        let mut child = ChildStdio::default();
        let (Some(pumps), false) = (&self.pumps, self.flags.terminal) else {
            return Ok(child);
        };
        for (stream, slot, ours_writes) in [
            (&self.stdin, &mut child.stdin, true),
            (&self.stdout, &mut child.stdout, false),
            (&self.stderr, &mut child.stderr, false),
        ] {
            let Some(stream) = stream else { continue };
            let (reader, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)
                .step(|| "make a pipe".into())?;
            let (ours, theirs) = if ours_writes {
                (writer, reader)
            } else {
                (reader, writer)
            };
            *slot = Some(theirs);
            let interest = if ours_writes {
                Interest::WRITABLE
            } else {
                Interest::READABLE
            };
            stream.give(pumps.watch(ours, interest)?);
        }
        Ok(child)
    }

    /// Gives the pty's master to the pumps; answers it for resizing.
    pub fn set_pty(&self, master: OwnedFd) -> Result<Pipe> {
        let interest = Interest::READABLE | Interest::WRITABLE;
        let master = match &self.pumps {
            Some(pumps) => pumps.watch(master, interest),
            // Nobody reads or writes it.
            None => Pumps::start()?.watch(master, interest),
        }?;
        for stream in [&self.stdin, &self.stdout].into_iter().flatten() {
            stream.give(Arc::clone(&master));
        }
        Ok(master)
    }

    /// Hands a connection to a stream; false if the process does not have it.
    pub fn connect(&self, kind: StreamKind, connection: VsockStream) -> bool {
        let stream = match kind {
            StreamKind::Stdin => &self.stdin,
            StreamKind::Stdout => &self.stdout,
            StreamKind::Stderr => &self.stderr,
        };
        stream
            .as_ref()
            .is_some_and(|stream| stream.connections.try_send(connection).is_ok())
    }

    /// Ends stdin, after what its connection still brings. A terminal has no such end.
    pub fn close_stdin(&self) {
        if let (Some(stdin), false) = (&self.stdin, self.flags.terminal) {
            stdin.end.send_replace(true);
        }
    }
}

/// What a pump works with.
struct Pump {
    connections: mpsc::Receiver<VsockStream>,
    pipe: oneshot::Receiver<Pipe>,
    end: watch::Receiver<bool>,
}

impl Stream {
    fn spawn<F>(pumps: &Pumps, pump: impl FnOnce(Pump) -> F) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let (connections, from_connections) = mpsc::channel(4);
        let (pipe, from_pipe) = oneshot::channel();
        let (end, from_end) = watch::channel(false);
        pumps.spawn(pump(Pump {
            connections: from_connections,
            pipe: from_pipe,
            end: from_end,
        }));
        Self {
            connections,
            pipe: Mutex::new(Some(pipe)),
            end,
        }
    }

    fn give(&self, pipe: Pipe) {
        let slot = self
            .pipe
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(slot) = slot {
            let _ = slot.send(pipe);
        }
    }
}

async fn read(pipe: &Pipe, buffer: &mut [u8]) -> io::Result<usize> {
    pipe.async_io(Interest::READABLE, |fd| {
        Ok(rustix::io::read(fd, &mut *buffer)?)
    })
    .await
}

/// Reads a header line byte by byte, since what follows it belongs to somebody else; `max` bytes at most with its end, which is left out.
pub async fn read_line(host: &mut (impl AsyncRead + Unpin), max: usize) -> Option<Vec<u8>> {
    let mut line = Vec::new();
    while line.len() < max {
        match host.read_u8().await.ok()? {
            b'\n' => return Some(line),
            byte => line.push(byte),
        }
    }
    None
}

/// Process to host.
async fn pump_output(mut pump: Pump) {
    let Ok(pipe) = pump.pipe.await else { return };
    // Without a connection nothing is read: the pipe keeps the data and the process waits.
    let Some(mut connection) = next_connection(&mut pump.connections, &mut pump.end).await else {
        return;
    };
    let mut buffer = vec![0; STREAM_BUFFER];
    let mut deleted = false;
    let mut budget = PIPE_MAX;
    loop {
        let length = if deleted {
            // Others may hold the pipe open, or write on and on; only what is there now counts.
            if budget == 0 {
                break;
            }
            let length = rustix::io::read(pipe.get_ref(), &mut buffer).unwrap_or(0);
            budget = budget.saturating_sub(length);
            length
        } else {
            tokio::select! {
                read = read(&pipe, &mut buffer) => read.unwrap_or(0), // EIO: the pty's last slave is closed
                newer = pump.connections.recv() => {
                    match newer {
                        Some(newer) => connection = newer,
                        None => deleted = true,
                    }
                    continue;
                }
            }
        };
        if length == 0 {
            break;
        }
        let mut rest = buffer.get(..length).unwrap_or_default();
        while !rest.is_empty() {
            tokio::select! {
                written = connection.write(rest) => match written {
                    Ok(written @ 1..) => rest = rest.get(written..).unwrap_or_default(),
                    // The host's side is gone; the next connection gets the rest.
                    _ => match next_connection(&mut pump.connections, &mut pump.end).await {
                        Some(newer) => connection = newer,
                        None => return,
                    },
                },
                newer = pump.connections.recv(), if !deleted => match newer {
                    Some(newer) => connection = newer,
                    None => deleted = true,
                },
            }
        }
    }
    drop(pipe);
    drop(buffer);
    // The host closes once it has read everything; closing first could cut a slow reader off.
    if connection.shutdown(std::net::Shutdown::Write).is_ok() {
        let mut ignored = [0; 64];
        while connection.read(&mut ignored).await.is_ok_and(|n| n > 0) {}
    }
}

/// The next connection, or `None` if the process was deleted.
async fn next_connection(
    connections: &mut mpsc::Receiver<VsockStream>,
    end: &mut watch::Receiver<bool>,
) -> Option<VsockStream> {
    tokio::select! {
        connection = connections.recv() => connection,
        _ = end.wait_for(|end| *end) => connections.try_recv().ok(),
    }
}

/// Host to process.
async fn pump_input(mut pump: Pump, terminal: bool) {
    let Ok(pipe) = pump.pipe.await else { return };
    let mut buffer = vec![0; STREAM_BUFFER];
    'connections: loop {
        let Some(mut connection) = next_connection(&mut pump.connections, &mut pump.end).await
        else {
            return;
        };
        loop {
            let received = tokio::select! {
                received = connection.read(&mut buffer) => received,
                newer = pump.connections.recv() => match newer {
                    Some(newer) => { connection = newer; continue; }
                    None => return,
                },
            };
            let length = match received {
                // A terminal stays open: another client may attach to it.
                Ok(0) if terminal => continue 'connections,
                Ok(0) => return,
                Ok(length) => length,
                Err(_) => continue 'connections,
            };
            let mut rest = buffer.get(..length).unwrap_or_default();
            while !rest.is_empty() {
                let written = tokio::select! {
                    written = pipe.async_io(Interest::WRITABLE, |fd| Ok(rustix::io::write(fd, rest)?)) => written,
                    () = end_of_process(&mut pump.end) => return,
                };
                match written {
                    Ok(written) => rest = rest.get(written..).unwrap_or_default(),
                    // The process has closed its stdin.
                    Err(_) => return,
                }
            }
        }
    }
}

/// Resolves when the process is deleted (not when its stdin is only to be closed).
async fn end_of_process(end: &mut watch::Receiver<bool>) {
    while end.changed().await.is_ok() {}
}
