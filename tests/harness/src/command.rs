//! Commands with a time limit, a stdin and captured output.

use std::{
    ffi::{OsStr, OsString},
    io::{Read, Write},
    os::unix::process::{CommandExt, ExitStatusExt},
    path::PathBuf,
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    sync::{Arc, Condvar, Mutex},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process_group};
use sha2::{Digest, Sha256};

use crate::failure::{Context, Failure, Outcome, read};

/// Most that is kept of one stream.
const CAPTURE_MAX: usize = 64 << 20;

/// What happens to a command's stdout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// It is kept, up to 64 MiB.
    All,
    /// Its length and SHA-256 are.
    Hash,
    /// Nobody reads; the caller may take the pipe.
    Unread,
}

/// What a command's stdin is.
#[derive(Clone, Debug)]
pub enum Input {
    /// `/dev/null`.
    Null,
    /// These bytes, then the end.
    Bytes(Vec<u8>),
    /// A pipe that the caller writes and closes.
    Open,
}

/// A command that is not started yet.
#[derive(Clone, Debug)]
pub struct Invocation {
    program: OsString,
    args: Vec<OsString>,
    env: Vec<(OsString, OsString)>,
    folder: Option<PathBuf>,
    input: Input,
    keep: Keep,
    limit: Duration,
}

/// How a command ended.
#[derive(Clone, Debug)]
pub struct Output {
    /// The command line.
    pub line: String,
    /// Exit code, or 128 + signal.
    pub status: i32,
    /// Captured stdout (`Keep::All`).
    pub stdout: Vec<u8>,
    /// Captured stderr.
    pub stderr: Vec<u8>,
    /// Length of stdout.
    pub stdout_len: u64,
    /// SHA-256 of stdout (`Keep::Hash`).
    pub stdout_hash: String,
    /// From start to end.
    pub took: Duration,
}

/// A command that runs.
#[derive(Debug)]
pub struct Running {
    line: String,
    child: Child,
    stdin: Option<ChildStdin>,
    /// The pipe of `Keep::Unread`.
    pub unread: Option<ChildStdout>,
    stdout: Arc<Capture>,
    stderr: Arc<Capture>,
    readers: Vec<JoinHandle<()>>,
    started: Instant,
    limit: Duration,
}

#[derive(Debug, Default)]
struct Capture {
    state: Mutex<Captured>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Captured {
    bytes: Vec<u8>,
    len: u64,
    hash: String,
    ended: bool,
}

impl Invocation {
    /// `program`, looked up in `PATH`.
    pub fn new(program: impl AsRef<OsStr>) -> Self {
        Self {
            program: program.as_ref().to_owned(),
            args: Vec::new(),
            env: Vec::new(),
            folder: None,
            input: Input::Null,
            keep: Keep::All,
            limit: Duration::from_secs(60),
        }
    }

    /// Adds an argument.
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.args.push(arg.as_ref().to_owned());
        self
    }

    /// Adds arguments.
    pub fn args(mut self, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Self {
        self.args
            .extend(args.into_iter().map(|a| a.as_ref().to_owned()));
        self
    }

    /// Sets a variable of the environment.
    pub fn env(mut self, name: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.env
            .push((name.as_ref().to_owned(), value.as_ref().to_owned()));
        self
    }

    /// The command's working folder.
    pub fn folder(mut self, folder: impl Into<PathBuf>) -> Self {
        self.folder = Some(folder.into());
        self
    }

    /// The command's stdin.
    pub fn input(mut self, input: Input) -> Self {
        self.input = input;
        self
    }

    /// What happens to stdout.
    pub fn keep(mut self, keep: Keep) -> Self {
        self.keep = keep;
        self
    }

    /// The time limit; past it the command is killed and the case fails.
    pub fn limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// Its words, for a command that runs it.
    pub fn words(&self) -> Vec<String> {
        std::iter::once(&self.program)
            .chain(&self.args)
            .map(|word| word.to_string_lossy().into_owned())
            .collect()
    }

    /// The command line as a person would type it; long words are cut.
    pub fn line(&self) -> String {
        let words = std::iter::once(&self.program)
            .chain(&self.args)
            .map(|word| {
                let word = word.to_string_lossy();
                match word.char_indices().nth(120) {
                    Some((cut, _)) => format!("'{}…'", word.get(..cut).unwrap_or_default()),
                    None if word.is_empty() || word.contains([' ', '\n', '"', '$', ';']) => {
                        format!("'{word}'")
                    }
                    None => word.into_owned(),
                }
            });
        words.collect::<Vec<_>>().join(" ")
    }

    /// The same command under `script`, which gives it a terminal of `rows` × `columns`.
    pub fn in_terminal(self, rows: u16, columns: u16) -> Self {
        let quoted: Vec<String> = std::iter::once(&self.program)
            .chain(&self.args)
            .map(|word| format!("'{}'", word.to_string_lossy().replace('\'', "'\\''")))
            .collect();
        let shell = format!("stty rows {rows} cols {columns}; exec {}", quoted.join(" "));
        Self {
            program: "script".into(),
            args: ["-qefc", &shell, "/dev/null"].map(OsString::from).to_vec(),
            ..self
        }
    }

    /// Starts the command.
    pub fn spawn(self) -> Outcome<Running> {
        let line = self.line();
        let mut command = Command::new(&self.program);
        command
            .args(&self.args)
            .envs(self.env.iter().map(|(name, value)| (name, value)))
            .stdin(match self.input {
                Input::Null => Stdio::null(),
                _ => Stdio::piped(),
            })
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0);
        if let Some(folder) = &self.folder {
            command.current_dir(folder);
        }
        let mut child = command.spawn().context(format_args!("start {line}"))?;
        let (stdout, stderr) = (Arc::<Capture>::default(), Arc::<Capture>::default());
        let mut readers = Vec::new();
        let mut unread = None;
        match (child.stdout.take(), self.keep) {
            (Some(pipe), Keep::Unread) => unread = Some(pipe),
            (Some(pipe), keep) => readers.push(read_into(pipe, &stdout, keep)),
            (None, _) => {}
        }
        if let Some(pipe) = child.stderr.take() {
            readers.push(read_into(pipe, &stderr, Keep::All));
        }
        let mut stdin = child.stdin.take();
        if let Input::Bytes(bytes) = self.input
            && let Some(mut pipe) = stdin.take()
        {
            // A command that ends early breaks the pipe: its status tells, not ours.
            std::thread::spawn(move || drop(pipe.write_all(&bytes)));
        }
        Ok(Running {
            line,
            child,
            stdin,
            unread,
            stdout,
            stderr,
            readers,
            started: Instant::now(),
            limit: self.limit,
        })
    }

    /// Runs the command to its end.
    pub fn output(self) -> Outcome<Output> {
        self.spawn()?.wait()
    }
}

impl Running {
    /// The process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Writes to stdin (`Input::Open`).
    pub fn write(&mut self, bytes: &[u8]) -> Outcome {
        let line = &self.line;
        let pipe = self.stdin.as_mut().context("stdin is closed")?;
        pipe.write_all(bytes)
            .and_then(|()| pipe.flush())
            .context(format_args!("write to stdin of {line}"))
    }

    /// Takes stdin, for a writer of its own.
    pub fn take_stdin(&mut self) -> Outcome<ChildStdin> {
        self.stdin.take().context("stdin is closed")
    }

    /// Ends stdin.
    pub fn close_stdin(&mut self) {
        self.stdin = None;
    }

    /// Stdout so far.
    pub fn stdout(&self) -> String {
        text(&lock(&self.stdout).bytes)
    }

    /// Stderr so far.
    pub fn stderr(&self) -> String {
        text(&lock(&self.stderr).bytes)
    }

    /// Bytes of stdout so far.
    pub fn stdout_len(&self) -> u64 {
        lock(&self.stdout).len
    }

    /// Waits until stdout holds `needle`.
    pub fn wait_for(&self, needle: &str, limit: Duration) -> Outcome {
        let end = Instant::now() + limit;
        let mut state = lock(&self.stdout);
        loop {
            if text(&state.bytes).contains(needle) {
                return Ok(());
            }
            let left = end.saturating_duration_since(Instant::now());
            if state.ended || left.is_zero() {
                let seen = text(&state.bytes);
                drop(state);
                return Err(Failure::Failed(format!(
                    "no `{needle}` from {} within {limit:?}; stdout: {seen:?}, stderr: {:?}",
                    self.line,
                    self.stderr()
                )));
            }
            state = match self.stdout.changed.wait_timeout(state, left) {
                Ok((state, _)) => state,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
    }

    /// Gives the terminal of [`Invocation::in_terminal`] another size, as a person does who drags the window's corner.
    pub fn resize_terminal(&self, rows: u16, columns: u16) -> Outcome {
        let script = self.child.id();
        let children = read(format!("/proc/{script}/task/{script}/children"))?;
        let client = children.split_whitespace().next();
        let client = client.context("script has no child")?;
        let terminal =
            std::fs::read_link(format!("/proc/{client}/fd/0")).context("the client's terminal")?;
        Invocation::new("stty")
            .arg("-F")
            .arg(&terminal)
            .args(["rows", &rows.to_string(), "cols", &columns.to_string()])
            .output()?
            .ok()
            .map(drop)
    }

    /// Whether it has ended.
    pub fn has_ended(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(Some(_)))
    }

    /// Sends a signal to the command and what it started.
    pub fn signal(&self, signal: Signal) {
        if let Some(group) = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw) {
            let _ = kill_process_group(group, signal);
        }
    }

    /// Waits for the end, at most the time limit counted from the start.
    pub fn wait(mut self) -> Outcome<Output> {
        let end = self.started + self.limit;
        let status = loop {
            match self.child.try_wait() {
                Ok(Some(status)) => break status,
                Ok(None) if Instant::now() < end => std::thread::sleep(Duration::from_millis(5)),
                Ok(None) => {
                    self.signal(Signal::KILL);
                    let _ = self.child.wait();
                    return Err(Failure::Failed(format!(
                        "no end of {} within {:?}; stdout: {:?}, stderr: {:?}",
                        self.line,
                        self.limit,
                        tail(&self.stdout(), 2000),
                        tail(&self.stderr(), 2000)
                    )));
                }
                Err(error) => return Err(error).context(format_args!("wait for {}", self.line)),
            }
        };
        self.unread = None;
        // Whoever inherited the pipes may outlive the command; its output up to here is what counts.
        let drained = Instant::now() + Duration::from_secs(2);
        while self.readers.iter().any(|r| !r.is_finished()) && Instant::now() < drained {
            std::thread::sleep(Duration::from_millis(2));
        }
        let stdout = lock(&self.stdout);
        let stderr = lock(&self.stderr);
        Ok(Output {
            line: self.line.clone(),
            status: status
                .code()
                .or(status.signal().map(|signal| 128 + signal))
                .unwrap_or(-1),
            stdout: stdout.bytes.clone(),
            stderr: stderr.bytes.clone(),
            stdout_len: stdout.len,
            stdout_hash: stdout.hash.clone(),
            took: self.started.elapsed(),
        })
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !self.has_ended() {
            self.signal(Signal::KILL);
            let _ = self.child.wait();
        }
    }
}

impl Output {
    /// Stdout as text, without the end's white space and without a terminal's carriage returns.
    pub fn text(&self) -> String {
        text(&self.stdout).replace('\r', "").trim_end().to_owned()
    }

    /// Stderr as text, without the end's white space.
    pub fn errors(&self) -> String {
        text(&self.stderr).trim_end().to_owned()
    }

    /// Fails unless the status is `status`.
    pub fn expect(self, status: i32) -> Outcome<Self> {
        if self.status == status {
            return Ok(self);
        }
        Err(Failure::Failed(format!(
            "{} ended with {}, expected {status}; stdout: {:?}, stderr: {:?}",
            self.line,
            self.status,
            tail(&self.text(), 2000),
            tail(&self.errors(), 2000)
        )))
    }

    /// Fails unless the status is 0.
    pub fn ok(self) -> Outcome<Self> {
        self.expect(0)
    }

    /// Fails unless the command failed and its stderr holds each of `needles`.
    pub fn refused(self, needles: &[&str]) -> Outcome<Self> {
        let errors = self.errors();
        if self.status == 0 {
            return Err(Failure::Failed(format!(
                "{} should have failed; stdout: {:?}",
                self.line,
                tail(&self.text(), 500)
            )));
        }
        match needles.iter().find(|needle| !errors.contains(*needle)) {
            None => Ok(self),
            Some(needle) => Err(Failure::Failed(format!(
                "the error of {} does not say `{needle}`: {errors}",
                self.line
            ))),
        }
    }
}

/// The last `max` bytes or so.
pub fn tail(text: &str, max: usize) -> &str {
    let mut start = text.len().saturating_sub(max);
    while !text.is_char_boundary(start) {
        start += 1;
    }
    &text[start..]
}

/// SHA-256 as hexadecimal digits.
pub fn hex(digest: impl AsRef<[u8]>) -> String {
    digest.as_ref().iter().map(|b| format!("{b:02x}")).collect()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn lock(capture: &Capture) -> std::sync::MutexGuard<'_, Captured> {
    capture
        .state
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn read_into(
    mut pipe: impl Read + Send + 'static,
    capture: &Arc<Capture>,
    keep: Keep,
) -> JoinHandle<()> {
    let capture = Arc::clone(capture);
    std::thread::spawn(move || {
        let mut buffer = vec![0; 64 << 10];
        let mut hash = Sha256::new();
        loop {
            let bytes = match pipe.read(&mut buffer) {
                Ok(0) => break,
                Ok(count) => &buffer[..count],
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(_) => break,
            };
            if keep == Keep::Hash {
                hash.update(bytes);
            }
            let mut state = lock(&capture);
            state.len += bytes.len() as u64;
            if keep == Keep::All && state.bytes.len() < CAPTURE_MAX {
                state.bytes.extend_from_slice(bytes);
            }
            capture.changed.notify_all();
        }
        let mut state = lock(&capture);
        if keep == Keep::Hash {
            state.hash = hex(hash.finalize());
        }
        state.ended = true;
        capture.changed.notify_all();
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_and_both_streams_are_captured() {
        let output = Invocation::new("sh")
            .args(["-c", "cat; echo err >&2; exit 3"])
            .input(Input::Bytes(b"in".to_vec()))
            .output()
            .unwrap();
        assert_eq!(
            (output.status, output.text(), output.errors()),
            (3, "in".into(), "err".into())
        );
    }

    #[test]
    fn a_command_past_its_limit_is_killed() {
        let limit = Duration::from_millis(200);
        let result = Invocation::new("sleep").arg("60").limit(limit).output();
        assert!(matches!(result, Err(Failure::Failed(text)) if text.contains("no end of sleep")));
    }

    #[test]
    fn a_terminal_has_the_size_that_was_asked_for() {
        let output = Invocation::new("stty")
            .arg("size")
            .in_terminal(33, 77)
            .output()
            .unwrap();
        assert_eq!(output.text(), "33 77");
    }
}
