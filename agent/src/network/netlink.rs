//! A socket to the kernel's rtnetlink (rtnetlink(7)), which answers within the call. Used by `apply`; trusts the kernel to send what it
//! announces, and takes nothing out of bounds.

use std::{io, os::fd::OwnedFd};

use netlink_packet_core::{
    Emitable, NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NlasIterator,
};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink::SocketAddrNetlink,
};

/// Largest message that the kernel sends in a dump.
const MESSAGE_MAX: usize = 32 * 1024;
const HEADER: usize = 16;

/// An interface, as far as the agent wants to know it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Link {
    /// Its index.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Its MAC, if it has one.
    pub mac: Vec<u8>,
    /// The MAC it was born with.
    pub permanent_mac: Vec<u8>,
    /// Its MTU.
    pub mtu: u32,
}

/// The socket; it stays in the network namespace it was opened in.
pub struct Netlink {
    socket: OwnedFd,
    sequence: u32,
}

impl Netlink {
    /// Opens it in the caller's network namespace.
    pub fn open() -> io::Result<Self> {
        let socket = rustix::net::socket_with(
            AddressFamily::NETLINK,
            SocketType::RAW,
            SocketFlags::CLOEXEC,
            None, // NETLINK_ROUTE is 0
        )?;
        // Connected to the kernel: what others send to its port is not taken.
        rustix::net::connect(&socket, &SocketAddrNetlink::new(0, 0))?;
        Ok(Self {
            socket,
            sequence: 0,
        })
    }

    /// Sends a request and waits for the kernel's verdict.
    pub fn request(&mut self, kind: u16, flags: u16, message: &impl Emitable) -> io::Result<()> {
        self.send(kind, flags | NLM_F_ACK, message)?;
        self.receive(|_, _| ())
    }

    /// All interfaces.
    pub fn links(&mut self) -> io::Result<Vec<Link>> {
        self.send(
            libc::RTM_GETLINK,
            NLM_F_DUMP,
            &netlink_packet_route::link::LinkMessage::default(),
        )?;
        let mut links = Vec::new();
        self.receive(|kind, body| {
            if kind == libc::RTM_NEWLINK {
                links.extend(link(body));
            }
        })?;
        Ok(links)
    }

    fn send(&mut self, kind: u16, flags: u16, message: &impl Emitable) -> io::Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        let length = HEADER.saturating_add(message.buffer_len());
        let mut header = NetlinkHeader::default();
        header.length = length as u32;
        header.message_type = kind;
        header.flags = flags | NLM_F_REQUEST;
        header.sequence_number = self.sequence;
        let mut bytes = vec![0; length];
        let (head, body) = bytes.split_at_mut(HEADER);
        header.emit(head);
        message.emit(body);
        rustix::net::send(&self.socket, &bytes, SendFlags::empty())?;
        Ok(())
    }

    /// Takes messages until the last one of the answer to the last request. The kernel has answered when the request is sent, so
    /// there is nothing to wait for: the agent's one thread must not block.
    fn receive(&mut self, mut take: impl FnMut(u16, &[u8])) -> io::Result<()> {
        let mut buffer = vec![0u8; MESSAGE_MAX];
        loop {
            let (length, _) =
                rustix::net::recv(&self.socket, buffer.as_mut_slice(), RecvFlags::DONTWAIT)?;
            let mut rest = buffer.get(..length).unwrap_or_default();
            while let Some((kind, sequence, body, next)) = split(rest) {
                rest = next;
                if sequence != self.sequence {
                    continue;
                }
                match i32::from(kind) {
                    libc::NLMSG_DONE => return Ok(()),
                    libc::NLMSG_ERROR => {
                        let code = body.first_chunk().map_or(0, |b| i32::from_ne_bytes(*b));
                        return match code {
                            0 => Ok(()),
                            code => Err(io::Error::from_raw_os_error(code.saturating_neg())),
                        };
                    }
                    _ => take(kind, body),
                }
            }
        }
    }
}

/// The first message of a datagram: its type, sequence number and body; and the rest.
fn split(bytes: &[u8]) -> Option<(u16, u32, &[u8], &[u8])> {
    let length = u32::from_ne_bytes(*bytes.first_chunk()?) as usize;
    let kind = u16::from_ne_bytes(*bytes.get(4..)?.first_chunk()?);
    let sequence = u32::from_ne_bytes(*bytes.get(8..)?.first_chunk()?);
    let body = bytes.get(HEADER..length)?;
    let next = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    Some((kind, sequence, body, next))
}

/// An `ifinfomsg` and its attributes.
fn link(body: &[u8]) -> Option<Link> {
    let mut link = Link {
        index: u32::from_ne_bytes(*body.get(4..)?.first_chunk()?),
        ..Link::default()
    };
    for attribute in NlasIterator::new(body.get(16..)?).flatten() {
        let value = attribute.value();
        match attribute.kind() {
            libc::IFLA_IFNAME => {
                let name = value.split(|&b| b == 0).next().unwrap_or_default();
                link.name = String::from_utf8_lossy(name).into_owned();
            }
            libc::IFLA_ADDRESS => link.mac = value.to_vec(),
            libc::IFLA_PERM_ADDRESS => link.permanent_mac = value.to_vec(),
            libc::IFLA_MTU => link.mtu = value.first_chunk().map_or(0, |b| u32::from_ne_bytes(*b)),
            _ => {}
        }
    }
    Some(link)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_has_not_answered_is_not_waited_for() {
        let mut socket = Netlink::open().unwrap();
        let error = socket.receive(|_, _| ()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        assert!(socket.links().unwrap().iter().any(|link| link.name == "lo"));
    }

    #[test]
    fn a_message_of_another_process_does_not_arrive() {
        let ours = Netlink::open().unwrap();
        let address = rustix::net::getsockname(&ours.socket).unwrap();
        let address = SocketAddrNetlink::try_from(address).unwrap();
        let other = Netlink::open().unwrap();
        let sent = rustix::net::sendto(&other.socket, &[0; HEADER], SendFlags::empty(), &address);
        assert!(sent.is_err());
    }
}
