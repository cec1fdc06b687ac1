//! The control socket: the shim adds and removes trees, one JSON line a request and one an answer.

use std::collections::VecDeque;
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::time::Duration;

use rustix::cmsg_space;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendFlags, SocketFlags,
    accept_with, recvmsg, send,
};
use serde::Deserialize;

use super::server::Server;
use super::trees;
use crate::limits;

/// How long nobody is served after a connection could not be accepted.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

#[derive(Debug, Deserialize)]
#[serde(tag = "op", rename_all = "lowercase", deny_unknown_fields)]
enum Request {
    Add {
        id: String,
        #[serde(default)]
        readonly: bool,
        #[serde(default)]
        shared: bool,
    },
    Remove {
        id: String,
    },
}

#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("request: {0}")]
    Request(#[from] serde_json::Error),
    #[error("descriptor: `add` comes with one descriptor, {0} came")]
    Descriptors(usize),
    #[error(transparent)]
    Tree(#[from] trees::Error),
}

/// A connection of the shim.
struct Connection {
    socket: OwnedFd,
    line: Vec<u8>,
    descriptors: VecDeque<OwnedFd>,
}

/// Serves requests until `workers` has no other end any more.
pub fn serve(server: &Server, listener: &UnixListener, workers: &OwnedFd) -> Result<(), Errno> {
    let mut connections: Vec<Connection> = Vec::new();
    loop {
        let accepting = connections.len() < limits::CONTROL_CONNECTIONS;
        let mut polled = vec![
            PollFd::new(workers, PollFlags::empty()),
            PollFd::new(
                listener,
                if accepting {
                    PollFlags::IN
                } else {
                    PollFlags::empty()
                },
            ),
        ];
        polled.extend(
            connections
                .iter()
                .map(|connection| PollFd::new(&connection.socket, PollFlags::IN)),
        );
        match poll(&mut polled, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
        let events: Vec<bool> = polled.iter().map(|fd| !fd.revents().is_empty()).collect();
        let [finished, arriving, ready @ ..] = events.as_slice() else {
            return Err(Errno::INVAL);
        };
        if *finished {
            return Ok(());
        }
        let mut ready = ready.iter().copied();
        connections
            .retain_mut(|connection| !ready.next().unwrap_or(false) || connection.receive(server));
        if !*arriving {
            continue;
        }
        match accept_with(listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
            Ok(socket) => connections.push(Connection {
                socket,
                line: Vec::new(),
                descriptors: VecDeque::new(),
            }),
            // Without descriptors it stays ready, and others are to be let go of meanwhile.
            Err(_) => std::thread::sleep(ACCEPT_AGAIN),
        }
    }
}

impl Connection {
    /// Takes what is there and answers whole lines; `false` ends the connection.
    fn receive(&mut self, server: &Server) -> bool {
        let mut bytes = [0; 1024];
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(8))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut parts = [IoSliceMut::new(&mut bytes)];
        let received = match recvmsg(
            &self.socket,
            &mut parts,
            &mut ancillary,
            RecvFlags::CMSG_CLOEXEC,
        ) {
            Ok(received) => received,
            Err(Errno::AGAIN | Errno::INTR) => return true,
            Err(_) => return false,
        };
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(descriptors) = message {
                self.descriptors.extend(descriptors);
            }
        }
        if received.bytes == 0
            || received.flags.contains(ReturnFlags::CTRUNC)
            || self.descriptors.len() > 8
        {
            return false;
        }
        self.line
            .extend_from_slice(bytes.get(..received.bytes).unwrap_or_default());
        while let Some(end) = self.line.iter().position(|byte| *byte == b'\n') {
            let rest = self.line.split_off(end.saturating_add(1));
            let line = std::mem::replace(&mut self.line, rest);
            // A descriptor arrives with the line it belongs to: requests are not sent ahead of answers.
            let descriptors = std::mem::take(&mut self.descriptors);
            let answer = match answer(server, &line, descriptors) {
                Ok(()) => serde_json::json!({ "ok": {} }),
                Err(error) => {
                    tracing::warn!(%error, "request refused");
                    serde_json::json!({ "error": error.to_string() })
                }
            };
            if send(
                &self.socket,
                format!("{answer}\n").as_bytes(),
                SendFlags::NOSIGNAL,
            )
            .is_err()
            {
                return false;
            }
        }
        self.line.len() < limits::CONTROL_LINE_BYTES
    }
}

fn answer(server: &Server, line: &[u8], mut descriptors: VecDeque<OwnedFd>) -> Result<(), Error> {
    match serde_json::from_slice(line)? {
        Request::Add {
            id,
            readonly,
            shared,
        } => {
            let count = descriptors.len();
            let (Some(mount), 1) = (descriptors.pop_front(), count) else {
                return Err(Error::Descriptors(count));
            };
            server.trees().add(&id, mount, readonly, shared)?;
            tracing::info!(tree = id, readonly, shared, "tree added");
        }
        Request::Remove { id } => {
            server
                .trees()
                .remove(&id, |tree| server.forget_tree(tree))?;
            let (inodes, handles) = server.held();
            tracing::info!(tree = id, inodes, handles, "tree removed");
        }
    }
    Ok(())
}
