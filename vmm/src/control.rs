//! The shim's requests: one JSON object a line on `control.sock`, one line of answer each.
//!
//! One thread serves all connections. The socket stands in the pod's private folder, so who reaches it may ask; what is
//! asked is parsed and bounded all the same: [`limits::CONTROL_LINE_BYTES`] a line and [`limits::CONTROL_CONNECTIONS`]
//! at once. A descriptor comes with the bytes of its `attach` (SCM_RIGHTS).

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::limits;
use crate::machine::end::{End, EndReason, EndSender};
use crate::machine::{Machine, MachineError};

/// Why the socket cannot be served.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {}", path.display())]
pub struct ControlError {
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// Why a request failed; the words go into the answer.
#[derive(Debug, thiserror::Error)]
enum RequestError {
    #[error("not a request: {0}")]
    Parse(serde_json::Error),
    #[error("attach needs a descriptor sent along")]
    NoDescriptor,
    #[error(transparent)]
    Machine(#[from] MachineError),
}

#[derive(Deserialize)]
#[serde(tag = "op", rename_all = "lowercase", deny_unknown_fields)]
enum Request {
    Report {},
    Pause {},
    Resume {},
    Stop {},
    Attach { slot: String },
}

#[derive(Serialize)]
#[serde(rename_all = "lowercase")]
enum Answer {
    Ok(Value),
    Error(String),
}

/// The bound socket. Connections wait in its backlog until [`Control::serve`].
pub struct Control(UnixListener);

impl Control {
    /// Binds `control.sock` in a state folder.
    pub fn bind(state_dir: &Path) -> Result<Self, ControlError> {
        let path = state_dir.join("control.sock");
        let bound = UnixListener::bind(&path).and_then(|listener| {
            listener.set_nonblocking(true)?;
            Ok(listener)
        });
        match bound {
            Ok(listener) => Ok(Self(listener)),
            Err(source) => Err(ControlError { path, source }),
        }
    }

    /// Starts the thread that answers.
    pub fn serve(self, machine: Arc<Machine>, end: EndSender) -> io::Result<()> {
        std::thread::Builder::new()
            .name("control".into())
            .spawn(move || run(&self.0, &machine, &end))
            .map(drop)
    }
}

fn run(listener: &UnixListener, machine: &Machine, end: &EndSender) {
    let mut clients: Vec<Client> = Vec::new();
    loop {
        let full = clients.len() >= limits::CONTROL_CONNECTIONS;
        let mut fds: Vec<libc::pollfd> = clients.iter().map(|c| poll_in(&c.stream)).collect();
        if !full {
            fds.push(poll_in(listener));
        }
        // SAFETY: the pointer and count are those of a live vector.
        let ready = unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, -1) };
        if ready < 0 {
            continue;
        }
        let mut events = fds.iter().map(|fd| fd.revents != 0);
        clients.retain_mut(|client| {
            !events.next().unwrap_or(false) || client.serve(machine, end).is_ok()
        });
        if !full
            && events.next().unwrap_or(false)
            && let Ok((stream, _)) = listener.accept()
            && let Ok(client) = Client::new(stream)
        {
            clients.push(client);
        }
    }
}

fn poll_in(socket: &impl AsRawFd) -> libc::pollfd {
    libc::pollfd {
        fd: socket.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    }
}

struct Client {
    stream: UnixStream,
    line: Vec<u8>,
    descriptor: Option<File>,
}

impl Client {
    fn new(stream: UnixStream) -> io::Result<Self> {
        // A client that does not read its answer must not hold up the others.
        stream.set_write_timeout(Some(Duration::from_secs(1)))?;
        stream.set_nonblocking(false)?;
        Ok(Self {
            stream,
            line: Vec::new(),
            descriptor: None,
        })
    }

    /// Takes what came; an error means that the connection is over.
    fn serve(&mut self, machine: &Machine, end: &EndSender) -> io::Result<()> {
        let mut buffer = [0; 1024];
        let (len, descriptor) = self
            .stream
            .recv_with_fd(&mut buffer)
            .map_err(io::Error::from)?;
        if len == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        // The newest counts, and one that no request took is closed.
        self.descriptor = descriptor.or(self.descriptor.take());
        for &byte in buffer.iter().take(len) {
            if byte != b'\n' {
                self.line.push(byte);
                if self.line.len() > limits::CONTROL_LINE_BYTES {
                    self.answer(&Answer::Error("request line too long".into()))?;
                    return Err(io::ErrorKind::InvalidData.into());
                }
                continue;
            }
            let line = std::mem::take(&mut self.line);
            let (answer, last) = match self.request(&line, machine) {
                Ok(Some(value)) => (Answer::Ok(value), false),
                Ok(None) => (Answer::Ok(json!({})), true),
                Err(error) => {
                    let text = format!("{:#}", anyhow::Error::from(error));
                    (Answer::Error(text), false)
                }
            };
            self.answer(&answer)?;
            if last {
                end.send(End::new(EndReason::Stopped, "the shim asked for it"));
            }
        }
        Ok(())
    }

    /// `None` means: stop.
    fn request(&mut self, line: &[u8], machine: &Machine) -> Result<Option<Value>, RequestError> {
        match serde_json::from_slice(line).map_err(RequestError::Parse)? {
            Request::Report {} => Ok(Some(
                serde_json::to_value(machine.report()).unwrap_or_default(),
            )),
            Request::Pause {} => machine
                .pause()
                .map(|()| Some(json!({})))
                .map_err(Into::into),
            Request::Resume {} => machine
                .resume()
                .map(|()| Some(json!({})))
                .map_err(Into::into),
            Request::Stop {} => Ok(None),
            Request::Attach { slot } => {
                let file = self.descriptor.take().ok_or(RequestError::NoDescriptor)?;
                machine.attach(&slot, file)?;
                Ok(Some(json!({})))
            }
        }
    }

    fn answer(&mut self, answer: &Answer) -> io::Result<()> {
        let mut line = serde_json::to_vec(answer)?;
        line.push(b'\n');
        self.stream.write_all(&line)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_known_requests_are_parsed() {
        let parse = |text: &str| serde_json::from_str::<Request>(text);
        for good in [
            r#"{"op":"report"}"#,
            r#"{"op":"pause"}"#,
            r#"{"op":"resume"}"#,
            r#"{"op":"stop"}"#,
            r#"{"op":"attach","slot":"b0"}"#,
        ] {
            assert!(parse(good).is_ok(), "{good}");
        }
        for bad in [
            "",
            "{}",
            "[]",
            r#"{"op":"halt"}"#,
            r#"{"op":"attach"}"#,
            r#"{"op":"stop","now":true}"#,
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn answers_are_ok_or_error() {
        let text = |answer| serde_json::to_string(&answer).unwrap();
        assert_eq!(text(Answer::Ok(json!({}))), r#"{"ok":{}}"#);
        assert_eq!(text(Answer::Error("x".into())), r#"{"error":"x"}"#);
    }
}
