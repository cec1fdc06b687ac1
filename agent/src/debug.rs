//! The debugging shell of the operator: a program of the host's choice among the agent's own namespaces, with a terminal or pipes
//! (`bulkhead_protocol::debug`). Offered only if the machine was started with the kernel parameter for it.
//!
//! The program is in the tree `debug`, which the host adds when it wants a shell: the initramfs has none. A session ends with its
//! first process; if the host goes away before, its process group is killed.

use std::{
    ffi::CString,
    fs, io,
    os::{fd::OwnedFd, unix::ffi::OsStrExt},
    path::Path,
    process::{Command, Stdio},
    sync::Arc,
    time::Duration,
};

use bulkhead_protocol::{
    debug::{self, DebugHeader, HEAD, KERNEL_PARAMETER, Kind, TREE},
    forward::encode_answer,
    limits::{DEBUG_FRAME_MAX, DEBUG_HEADER_MAX, DEBUG_SESSIONS_MAX},
};
use rustix::process::{Pid, Signal, kill_process_group};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, Interest, unix::AsyncFd},
    sync::{Semaphore, mpsc, watch},
    time::timeout,
};

use crate::{
    boot::TREES,
    container::tty::{Pty, own_root, winsize},
    error::{Context, Error, Result},
    reaper::{Reaped, Reaper},
    streams::read_line,
    sys,
};

/// First argument of the copy of the agent that becomes the program.
pub const COPY_ARG: &str = "debug-shell";
/// How long a connection may take to send its header.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long output is waited for that others than the first process may still write.
const DRAIN: Duration = Duration::from_millis(300);
/// Exit status of a program that cannot be executed, as shells have it.
const NOT_EXECUTED: i32 = 127;

type Pipe = Arc<AsyncFd<OwnedFd>>;

/// Whether this machine was started with a debugging shell allowed.
pub fn is_allowed() -> bool {
    let line = fs::read_to_string("/proc/cmdline").unwrap_or_default();
    line.split_whitespace().any(|word| word == KERNEL_PARAMETER)
}

/// Serves sessions.
pub struct Shell {
    reaper: Arc<Reaper>,
    slots: Semaphore,
    program: String,
}

/// A session's first process.
struct Session {
    pid: u32,
    ended: watch::Receiver<Option<Reaped>>,
    /// The same as `outputs` with a terminal.
    input: Option<Pipe>,
    outputs: Vec<(Kind, Pipe)>,
    terminal: bool,
}

impl Shell {
    /// Sessions whose ends come from `reaper`.
    pub fn new(reaper: Arc<Reaper>) -> Self {
        Self {
            reaper,
            slots: Semaphore::new(DEBUG_SESSIONS_MAX),
            program: format!("{TREES}/{TREE}"),
        }
    }

    /// Serves one connection of the host to its end.
    pub async fn serve(&self, mut host: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) {
        let started = match self.slots.try_acquire() {
            Ok(slot) => match timeout(PATIENCE, read_header(&mut host)).await {
                Ok(Some(header)) => self.start(&header).map(|session| (session, slot)),
                _ => return,
            },
            Err(_) => Err(Error::Limit(format!(
                "there are {DEBUG_SESSIONS_MAX} debugging shells"
            ))),
        };
        let answer = match &started {
            Ok(_) => encode_answer(Ok(())),
            Err(error) => encode_answer(Err(&error.text())),
        };
        let answered = host.write_all(answer.as_bytes()).await;
        let Ok((session, _slot)) = started else {
            return;
        };
        let killer = Killer(session.pid, session.ended.clone());
        if answered.is_ok() {
            carry(session, host).await;
        }
        drop(killer);
    }

    fn start(&self, header: &DebugHeader) -> Result<Session> {
        let name = header.args.first().map_or("", String::as_str);
        let program = if name.contains('/') {
            name
        } else {
            &self.program
        };
        if !Path::new(program).exists() {
            return Err(Error::NotFound(format!("program {program}")));
        }
        let mut command = Command::new("/proc/self/exe");
        command
            .arg(COPY_ARG)
            .arg(program)
            .args(&header.args)
            .env_clear()
            .env("HOME", "/")
            .env("PATH", "/bin:/usr/bin:/sbin:/usr/sbin")
            .current_dir("/");
        let launch = self.reaper.launch();
        let mut ours = None;
        if let Some((term, width, height)) = &header.terminal {
            let size = Some((u64::from(*width), u64::from(*height)));
            let root = own_root()?;
            let (master, slave) = Pty::open(std::os::fd::AsFd::as_fd(&root), size)?.into_parts();
            let stream = || slave.try_clone().map(Stdio::from);
            let what = || "hand over the terminal".to_string();
            command
                .env("TERM", term)
                .stdin(stream().step(what)?)
                .stdout(stream().step(what)?)
                .stderr(slave);
            ours = Some(watched(master, Interest::READABLE | Interest::WRITABLE)?);
        } else {
            command
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped());
        }
        let mut child = command.spawn().step(|| "start the shell".into())?;
        let pid = child.id();
        let ended = launch.claim(pid);
        // From here on a failure must not leave the process behind.
        let killer = Killer(pid, ended.clone());
        let session = match ours {
            Some(master) => Session {
                pid,
                ended,
                input: Some(master.clone()),
                outputs: vec![(Kind::Data, master)],
                terminal: true,
            },
            None => {
                let input = child.stdin.take().map(OwnedFd::from);
                let input = input
                    .map(|fd| watched(fd, Interest::WRITABLE))
                    .transpose()?;
                let data = child.stdout.take().map(OwnedFd::from);
                let error = child.stderr.take().map(OwnedFd::from);
                let mut outputs = Vec::new();
                for (kind, fd) in [(Kind::Data, data), (Kind::Error, error)] {
                    if let Some(fd) = fd {
                        outputs.push((kind, watched(fd, Interest::READABLE)?));
                    }
                }
                Session {
                    pid,
                    ended,
                    input,
                    outputs,
                    terminal: false,
                }
            }
        };
        std::mem::forget(killer);
        Ok(session)
    }
}

/// Kills a session's process group when it is dropped, unless its leader has been reaped: then the number may be another's.
struct Killer(u32, watch::Receiver<Option<Reaped>>);

impl Drop for Killer {
    fn drop(&mut self) {
        let pid = i32::try_from(self.0).ok().and_then(Pid::from_raw);
        if let Some(pid) = pid.filter(|_| self.1.borrow().is_none()) {
            let _ = kill_process_group(pid, Signal::KILL);
        }
    }
}

fn watched(fd: OwnedFd, interest: Interest) -> Result<Pipe> {
    rustix::io::ioctl_fionbio(&fd, true).step(|| "set up a stream of the shell".into())?;
    sys::watch(fd, interest)
        .map(Arc::new)
        .step(|| "watch a stream of the shell".into())
}

/// Carries frames until the process has ended and its output is out, or the host is gone.
async fn carry(session: Session, host: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) {
    let (from_host, mut to_host) = tokio::io::split(host);
    let (frames, mut queue) = mpsc::channel::<Vec<u8>>(4);
    let mut readers = tokio::task::JoinSet::new();
    for (kind, pipe) in session.outputs {
        let frames = frames.clone();
        readers.spawn(async move { read_output(kind, &pipe, &frames).await });
    }
    let mut ended = session.ended;
    let end = async move {
        let status = match ended.wait_for(Option::is_some).await {
            Ok(reaped) => reaped.map_or(0, |reaped| reaped.status),
            Err(_) => 0,
        };
        let _ = timeout(DRAIN, async {
            while readers.join_next().await.is_some() {}
        })
        .await;
        readers.shutdown().await;
        let _ = frames
            .send(debug::encode(Kind::Exit, &status.to_be_bytes()))
            .await;
    };
    let write = async move {
        while let Some(frame) = queue.recv().await {
            if to_host.write_all(&frame).await.is_err() {
                return;
            }
        }
        let _ = to_host.shutdown().await;
    };
    let input = read_input(from_host, session.input, session.terminal);
    tokio::select! {
        // The writer ends after the last frame.
        ((), ()) = async { tokio::join!(end, write) } => {}
        () = input => {}
    }
}

/// Frames of the host; answers when it is gone.
async fn read_input(mut host: impl AsyncRead + Unpin, mut input: Option<Pipe>, terminal: bool) {
    let mut payload = Vec::new();
    loop {
        let mut head = [0; HEAD];
        if host.read_exact(&mut head).await.is_err() {
            return;
        }
        let Ok((kind, length)) = debug::parse_head(head) else {
            return;
        };
        payload.resize(length, 0);
        if host.read_exact(&mut payload).await.is_err() {
            return;
        }
        match (kind, &input) {
            (Kind::Data, Some(pipe)) => {
                let taken = write_all(pipe, &payload).await;
                if taken.is_err() {
                    input = None; // It reads no more; the session goes on.
                }
            }
            (Kind::Close, _) if !terminal => input = None,
            (Kind::Size, Some(pty)) if terminal => {
                if let Some((width, height)) = debug::size(&payload) {
                    let size = winsize(width.into(), height.into());
                    let _ = rustix::termios::tcsetwinsize(pty.get_ref(), size);
                }
            }
            _ => {}
        }
    }
}

async fn write_all(pipe: &Pipe, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        let written = pipe
            .async_io(Interest::WRITABLE, |fd| Ok(rustix::io::write(fd, bytes)?))
            .await?;
        bytes = bytes.get(written..).unwrap_or_default();
    }
    Ok(())
}

async fn read_output(kind: Kind, pipe: &Pipe, frames: &mpsc::Sender<Vec<u8>>) {
    let mut buffer = vec![0; DEBUG_FRAME_MAX];
    loop {
        let read = pipe
            .async_io(Interest::READABLE, |fd| {
                Ok(rustix::io::read(fd, &mut *buffer)?)
            })
            .await;
        // A pty whose last user is gone says EIO.
        let length = read.unwrap_or(0);
        let bytes = buffer.get(..length).unwrap_or_default();
        if bytes.is_empty() || frames.send(debug::encode(kind, bytes)).await.is_err() {
            return;
        }
    }
}

/// Reads the header; frames follow it.
async fn read_header(host: &mut (impl AsyncRead + Unpin)) -> Option<DebugHeader> {
    DebugHeader::parse(&read_line(host, DEBUG_HEADER_MAX).await?).ok()
}

/// The copy: leads a session of its own, takes the terminal if it has one, and becomes the program (first argument; the rest are its
/// arguments, with its name).
pub fn become_program(args: &[String]) -> ! {
    let error = execute(args);
    eprintln!("bulkhead-agent: {}", error.text());
    std::process::exit(NOT_EXECUTED)
}

fn execute(args: &[String]) -> Error {
    let prepared = || -> Result<()> {
        rustix::process::setsid().step(|| "make a session".into())?;
        let stdin = rustix::stdio::stdin();
        if rustix::termios::isatty(stdin) {
            rustix::process::ioctl_tiocsctty(stdin).step(|| "take the terminal".into())?;
        }
        sys::close_on_exec_from(3).step(|| "close descriptors".into())
    };
    if let Err(error) = prepared() {
        return error;
    }
    sys::default_signals();
    let strings = args.iter().map(|arg| CString::new(arg.as_str()));
    let env = std::env::vars_os()
        .map(|(name, value)| CString::new([name.as_bytes(), b"=", value.as_bytes()].concat()));
    let all = strings.collect::<std::result::Result<Vec<_>, _>>();
    let env = env.collect::<std::result::Result<Vec<_>, _>>();
    match (all.as_deref(), env) {
        (Ok([program, args @ ..]), Ok(env)) => {
            let error = sys::execve(program, args, &env);
            Error::step(format!("execute {}", program.to_string_lossy()), error)
        }
        _ => Error::State("the arguments hold a zero byte".into()),
    }
}

#[cfg(test)]
mod tests {
    use bulkhead_protocol::forward::parse_answer;
    use tokio::io::DuplexStream;

    use super::*;

    /// `/proc/self/exe` is the test's own program here, so that only what needs no process is tested beside the code.
    fn run<F: Future>(test: F) -> F::Output {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(test)
    }

    async fn answer(host: &mut DuplexStream) -> std::result::Result<(), String> {
        let mut line = Vec::new();
        loop {
            match host.read_u8().await.map_err(|error| error.to_string())? {
                b'\n' => break,
                byte => line.push(byte),
            }
        }
        parse_answer(&line).map_err(|error| error.to_string())
    }

    fn dial(shell: &Arc<Shell>) -> DuplexStream {
        let (ours, theirs) = tokio::io::duplex(1024);
        let shell = Arc::clone(shell);
        tokio::spawn(async move { shell.serve(theirs).await });
        ours
    }

    #[test]
    fn a_program_that_is_not_there_and_a_header_that_is_none_are_refused() {
        run(async {
            let shell = Arc::new(Shell::new(Arc::default()));
            let mut host = dial(&shell);
            let header = DebugHeader {
                args: vec!["/no/such".into()],
                terminal: None,
            };
            host.write_all(&header.encode().unwrap()).await.unwrap();
            let error = answer(&mut host).await.unwrap_err();
            assert_eq!(error, "program /no/such does not exist");
            let mut host = dial(&shell);
            host.write_all(b"{}\n").await.unwrap();
            assert!(answer(&mut host).await.is_err());
        });
    }

    #[test]
    fn shells_above_the_cap_are_refused() {
        run(async {
            let shell = Arc::new(Shell::new(Arc::default()));
            let waiting: Vec<_> = (0..DEBUG_SESSIONS_MAX).map(|_| dial(&shell)).collect();
            tokio::task::yield_now().await;
            let error = answer(&mut dial(&shell)).await.unwrap_err();
            assert!(error.contains("debugging shells"), "{error}");
            drop(waiting);
        });
    }

    #[test]
    fn input_goes_into_the_pipe_and_output_comes_as_frames() {
        run(async {
            let (reader, writer) = rustix::pipe::pipe().unwrap();
            let input = watched(writer, Interest::WRITABLE).unwrap();
            let output = watched(reader, Interest::READABLE).unwrap();
            let (mut host, agent) = tokio::io::duplex(1024);
            tokio::spawn(read_input(agent, Some(input), false));
            let (frames, mut queue) = mpsc::channel(4);
            tokio::spawn(async move { read_output(Kind::Error, &output, &frames).await });
            host.write_all(&debug::encode(Kind::Data, b"hello"))
                .await
                .unwrap();
            assert_eq!(
                queue.recv().await.unwrap(),
                debug::encode(Kind::Error, b"hello")
            );
            host.write_all(&debug::encode(Kind::Close, b""))
                .await
                .unwrap();
            assert_eq!(queue.recv().await, None);
        });
    }
}
