//! Requests to rtnetlink and its answers (rtnetlink(7), netlink(7)): blocking, one at a time.
//!
//! A socket belongs for ever to the namespace it was opened in, whoever uses it. The kernel is trusted; a message that the library
//! cannot read is left out, with a line in the log.

use std::io;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkBuffer, NetlinkMessage,
    NetlinkPayload,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use rustix::net::sockopt;

/// How often a dump is repeated that changed while it was read.
const DUMPS: usize = 8;
/// Bytes of a header (netlink(7)).
const HEADER: usize = 16;

/// A socket for requests.
pub struct Netlink {
    socket: Socket,
    sequence: u32,
}

impl Netlink {
    /// A socket in the namespace of the calling thread.
    pub fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        // The kernel answers at once; nothing of ours may hang on it all the same.
        let limit = Some(std::time::Duration::from_secs(5));
        sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, limit)?;
        Ok(Self {
            socket,
            sequence: 0,
        })
    }

    /// Asks for a change; `flags` besides those of every request.
    pub fn change(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        self.send(message, NLM_F_REQUEST | NLM_F_ACK | flags)?;
        self.answers(|_| {}).map(drop)
    }

    /// Everything of a kind.
    pub fn dump(&mut self, message: &RouteNetlinkMessage) -> io::Result<Vec<RouteNetlinkMessage>> {
        for _ in 0..DUMPS {
            self.send(message.clone(), NLM_F_REQUEST | NLM_F_DUMP)?;
            let mut found = Vec::new();
            let whole = self.answers(|message| found.push(message))?;
            if whole {
                return Ok(found);
            }
        }
        Err(io::Error::other("the namespace changes all the time"))
    }

    fn send(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut message = NetlinkMessage::from(message);
        message.header.flags = flags;
        message.header.sequence_number = self.sequence;
        message.finalize();
        let mut buffer = vec![0; message.buffer_len()];
        message.serialize(&mut buffer);
        self.socket.send(&buffer, 0).map(drop)
    }

    /// Reads to the end of an answer; false if what was dumped changed meanwhile.
    fn answers(&mut self, mut each: impl FnMut(RouteNetlinkMessage)) -> io::Result<bool> {
        let mut whole = true;
        loop {
            let (buffer, _) = self.socket.recv_from_full()?;
            let mut rest = buffer.as_slice();
            while rest.len() >= HEADER {
                let length = NetlinkBuffer::new(&rest).length() as usize;
                let Some(bytes) = rest.get(..length.max(HEADER)) else {
                    break;
                };
                // netlink(7): messages are aligned to 4 bytes.
                let next = length.max(HEADER).next_multiple_of(4);
                rest = rest.get(next..).unwrap_or_default();
                let message = match NetlinkMessage::<RouteNetlinkMessage>::deserialize(bytes) {
                    Ok(message) => message,
                    Err(error) => {
                        tracing::warn!(%error, "a netlink message that is not understood");
                        continue;
                    }
                };
                if message.header.sequence_number != self.sequence {
                    continue; // Of a request that was given up.
                }
                whole &= message.header.flags & NLM_F_DUMP_INTR == 0;
                match message.payload {
                    NetlinkPayload::Error(error) => {
                        return match error.code {
                            None => Ok(whole),
                            Some(code) => Err(io::Error::from_raw_os_error(code.get().abs())),
                        };
                    }
                    NetlinkPayload::Done(_) => return Ok(whole),
                    NetlinkPayload::InnerMessage(message) => each(message),
                    _ => {}
                }
            }
        }
    }
}
