//! The shim's requests: one JSON object a line on `control.sock`, one line of answer each.
//!
//! One thread serves all connections. The socket stands in the pod's private folder, so who reaches it may ask; what is
//! asked is parsed and bounded all the same: [`limits::CONTROL_LINE_BYTES`] a line and [`limits::CONTROL_CONNECTIONS`]
//! at once. Descriptors come with the bytes of their request (SCM_RIGHTS), [`limits::CONTROL_DESCRIPTORS`] at most.

use std::io::{self, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, recvmsg};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::jail::seccomp::Kind;
use crate::jail::threads;
use crate::limits;
use crate::machine::end::{End, EndReason, EndSender};
use crate::machine::{Machine, MachineError};
use crate::pids::{PidError, Pids};
use crate::virtio::net::{Attachment, Mac, Rate};

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
    #[error("attach and uplink need one descriptor sent along, not {0}")]
    OneDescriptor(usize),
    #[error(
        "attach-net needs {vhosts} vhost descriptors after those of the tap, and {sent} were sent along"
    )]
    Vhosts { vhosts: usize, sent: usize },
    #[error(transparent)]
    Machine(#[from] MachineError),
    #[error(transparent)]
    Pid(#[from] PidError),
}

#[derive(Deserialize)]
#[serde(tag = "op", rename_all = "kebab-case", deny_unknown_fields)]
enum Request {
    Report {},
    Console {
        #[serde(default)]
        from: u64,
    },
    Pause {},
    Resume {},
    Stop {},
    Attach {
        slot: String,
    },
    AttachNet {
        slot: String,
        #[serde(deserialize_with = "crate::virtio::net::mac")]
        mac: Mac,
        #[serde(default)]
        vhost: usize,
        #[serde(default)]
        rate: Rate,
    },
    DetachNet {
        slot: String,
    },
    Uplink {},
    Grow {
        vcpus: u32,
        memory_mib: u32,
    },
    AddPid {},
    RemovePid {
        pid: u32,
    },
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
        let builder = std::thread::Builder::new().name("control".into());
        let body = move || run(&self.0, &machine, &end);
        threads::spawn(Kind::Control, builder, body).map(drop)
    }
}

fn run(listener: &UnixListener, machine: &Machine, end: &EndSender) {
    let mut clients: Vec<Client> = Vec::new();
    let mut pids = Pids::default();
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
            !events.next().unwrap_or(false) || client.serve(machine, &mut pids, end).is_ok()
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
    descriptors: Vec<OwnedFd>,
}

impl Client {
    fn new(stream: UnixStream) -> io::Result<Self> {
        // A client that does not read its answer must not hold up the others.
        stream.set_write_timeout(Some(Duration::from_secs(1)))?;
        stream.set_nonblocking(false)?;
        Ok(Self {
            stream,
            line: Vec::new(),
            descriptors: Vec::new(),
        })
    }

    /// Takes what came; an error means that the connection is over.
    fn serve(&mut self, machine: &Machine, pids: &mut Pids, end: &EndSender) -> io::Result<()> {
        let mut buffer = [0; 1024];
        let (len, descriptors) = self.receive(&mut buffer)?;
        if len == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        // The newest count, and those that no request took are closed.
        if !descriptors.is_empty() {
            self.descriptors = descriptors;
        }
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
            let descriptors = std::mem::take(&mut self.descriptors);
            let (answer, last) = match request(&line, descriptors, machine, pids) {
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

    fn receive(&self, buffer: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
        let mut space =
            [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(limits::CONTROL_DESCRIPTORS))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let message = recvmsg(
            &self.stream,
            &mut [IoSliceMut::new(buffer)],
            &mut ancillary,
            RecvFlags::CMSG_CLOEXEC,
        )?;
        let mut descriptors = Vec::new();
        for part in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = part {
                descriptors.extend(fds);
            }
        }
        let more = message.flags.contains(ReturnFlags::CTRUNC);
        if more || descriptors.len() > limits::CONTROL_DESCRIPTORS {
            return Err(io::Error::other("too many descriptors"));
        }
        Ok((message.bytes, descriptors))
    }

    fn answer(&mut self, answer: &Answer) -> io::Result<()> {
        let mut line = serde_json::to_vec(answer)?;
        line.push(b'\n');
        self.stream.write_all(&line)
    }
}

/// `None` means: stop. Descriptors that it does not take are closed.
fn request(
    line: &[u8],
    mut descriptors: Vec<OwnedFd>,
    machine: &Machine,
    pids: &mut Pids,
) -> Result<Option<Value>, RequestError> {
    let sent = descriptors.len();
    match serde_json::from_slice(line).map_err(RequestError::Parse)? {
        Request::Report {} => {
            let report = serde_json::to_value(machine.report()).unwrap_or_default();
            return Ok(Some(report));
        }
        Request::Console { from } => {
            let piece = serde_json::to_value(machine.console(from)).unwrap_or_default();
            return Ok(Some(piece));
        }
        Request::Stop {} => return Ok(None),
        Request::Pause {} => machine.pause()?,
        Request::Resume {} => machine.resume()?,
        Request::Attach { slot } => {
            let file = descriptors.pop().filter(|_| sent == 1);
            let file = file.ok_or(RequestError::OneDescriptor(sent))?;
            machine.attach(&slot, file.into())?;
        }
        Request::AttachNet {
            slot,
            mac,
            vhost: vhosts,
            rate,
        } => {
            let taps = sent.checked_sub(vhosts);
            let taps = taps.ok_or(RequestError::Vhosts { vhosts, sent })?;
            let vhosts = descriptors.split_off(taps);
            let attachment = Attachment {
                mac,
                rate,
                taps: descriptors,
                vhosts,
            };
            machine.attach_net(&slot, attachment)?;
        }
        Request::DetachNet { slot } => machine.detach_net(&slot)?,
        Request::Uplink {} => {
            let socket = descriptors.pop().filter(|_| sent == 1);
            machine.uplink(socket.ok_or(RequestError::OneDescriptor(sent))?)?;
        }
        Request::Grow { vcpus, memory_mib } => {
            let grown = machine.grow(vcpus, memory_mib)?;
            return Ok(Some(serde_json::to_value(grown).unwrap_or_default()));
        }
        Request::AddPid {} => return Ok(Some(json!({ "pid": pids.add()? }))),
        Request::RemovePid { pid } => pids.remove(pid)?,
    }
    Ok(Some(json!({})))
}

#[cfg(test)]
mod tests {
    use std::io::IoSlice;

    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

    use super::*;

    #[test]
    fn only_the_known_requests_are_parsed() {
        let parse = |text: &str| serde_json::from_str::<Request>(text);
        for good in [
            r#"{"op":"report"}"#,
            r#"{"op":"console","from":4096}"#,
            r#"{"op":"pause"}"#,
            r#"{"op":"resume"}"#,
            r#"{"op":"stop"}"#,
            r#"{"op":"attach","slot":"b0"}"#,
            r#"{"op":"attach-net","slot":"n0","mac":"02:00:00:00:00:01"}"#,
            r#"{"op":"attach-net","slot":"n0","mac":"02:00:00:00:00:01","vhost":8,"rate":{"frames":1}}"#,
            r#"{"op":"detach-net","slot":"n0"}"#,
            r#"{"op":"grow","vcpus":2,"memory_mib":1024}"#,
            r#"{"op":"uplink"}"#,
            r#"{"op":"add-pid"}"#,
            r#"{"op":"remove-pid","pid":7}"#,
        ] {
            assert!(parse(good).is_ok(), "{good}");
        }
        for bad in [
            "",
            "{}",
            "[]",
            r#"{"op":"halt"}"#,
            r#"{"op":"attach"}"#,
            r#"{"op":"attach-net","slot":"n0"}"#,
            r#"{"op":"remove-pid","pid":-1}"#,
            r#"{"op":"attach-net","slot":"n0","mac":"03:00:00:00:00:01"}"#,
            r#"{"op":"attach-net","slot":"n0","mac":"02:00:00:00:00:01","vhost":-1}"#,
            r#"{"op":"attach-net","slot":"n0","mac":"02:00:00:00:00:01","rate":{"bits":1}}"#,
            r#"{"op":"grow","vcpus":2}"#,
            r#"{"op":"grow","vcpus":-1,"memory_mib":1024}"#,
            r#"{"op":"stop","now":true}"#,
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn descriptors_come_whole_and_too_many_end_the_connection() {
        let most = limits::CONTROL_DESCRIPTORS;
        for count in [0, 1, most, most + 1] {
            let (ours, theirs) = UnixStream::pair().unwrap();
            let client = Client::new(ours).unwrap();
            let fds: Vec<_> = (0..count).map(|_| std::io::stdin()).collect();
            let fds: Vec<_> = fds.iter().map(std::os::fd::AsFd::as_fd).collect();
            let mut space = vec![MaybeUninit::uninit(); 1024];
            let mut ancillary = SendAncillaryBuffer::new(&mut space);
            assert!(ancillary.push(SendAncillaryMessage::ScmRights(&fds)));
            let bytes = [IoSlice::new(b"line")];
            sendmsg(&theirs, &bytes, &mut ancillary, SendFlags::empty()).unwrap();
            let got = client.receive(&mut [0; 1024]);
            if count > most {
                assert!(got.is_err());
                continue;
            }
            let (len, descriptors) = got.unwrap();
            assert_eq!((len, descriptors.len()), (4, count));
        }
    }

    #[test]
    fn answers_are_ok_or_error() {
        let text = |answer| serde_json::to_string(&answer).unwrap();
        assert_eq!(text(Answer::Ok(json!({}))), r#"{"ok":{}}"#);
        assert_eq!(text(Answer::Error("x".into())), r#"{"error":"x"}"#);
    }
}
