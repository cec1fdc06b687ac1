//! All connections of one guest: between the guest's packets and the host's sockets.
//!
//! Owned by the device's one thread, which waits on [`Muxer::epoll`] and calls in. Sockets are watched edge by edge: a
//! connection remembers that its socket was readable until a read says otherwise.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::client::{Client, Line};
use super::connection::{Connection, Outcome};
use super::packet::{HEADER_LEN, Operation, Packet, PacketError, Ports};
use super::payload::{Sink, Source};
use super::uplink::Uplink;
use crate::limits;
use crate::virtio::net::bucket::Tokens;

/// Called at the guest's first connection to the host.
pub type FirstConnection = Box<dyn Fn() + Send>;

/// Tokens below this one belong to the device's own events.
pub const FIRST_TOKEN: u64 = 16;
const LISTENER: u64 = FIRST_TOKEN;
/// Host ports of connections that the host asked for, out of the way of those that it listens on.
const FIRST_HOST_PORT: u32 = 1 << 30;

/// Why the host side of vsock could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum MuxerError {
    /// The socket in the state folder.
    #[error("cannot listen on {path}")]
    Listen {
        /// Its path.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// The epoll instance.
    #[error("cannot watch the vsock sockets")]
    Epoll(#[source] io::Error),
}

/// The multiplexer.
pub struct Muxer {
    guest_cid: u64,
    uplink: Arc<Uplink>,
    listener: UnixListener,
    epoll: Epoll,
    next_token: u64,
    next_host_port: u32,
    clients: HashMap<u64, Client>,
    connections: HashMap<u64, Watched>,
    /// How many of them the guest asked for.
    from_guest: usize,
    /// How many more the guest may ask for now. A reset does not renew them.
    connects: Tokens,
    /// Connections that the guest knows, by name.
    names: HashMap<Ports, u64>,
    /// Connections that may have a packet for the guest, in turn.
    ready: VecDeque<u64>,
    resets: VecDeque<Ports>,
    on_first_guest_connection: Option<FirstConnection>,
}

/// A packet for the guest.
pub struct Outgoing {
    /// Its header.
    pub header: [u8; HEADER_LEN],
    /// Bytes of data behind it.
    pub len: u32,
}

struct Watched {
    connection: Connection,
    from_guest: bool,
    /// Is in `ready`.
    queued: bool,
    /// The epoll instance reports room for writing.
    watches_writable: bool,
}

impl Muxer {
    /// Listens on `path`; the guest's connections go to `uplink`.
    pub fn new(
        guest_cid: u64,
        path: &Path,
        uplink: Arc<Uplink>,
        on_first_guest_connection: FirstConnection,
    ) -> Result<Self, MuxerError> {
        let listen = |source| MuxerError::Listen {
            path: path.to_owned(),
            source,
        };
        let listener = UnixListener::bind(path).map_err(listen)?;
        listener.set_nonblocking(true).map_err(listen)?;
        let epoll = Epoll::new().map_err(MuxerError::Epoll)?;
        let events = EventSet::IN | EventSet::EDGE_TRIGGERED;
        epoll
            .ctl(
                ControlOperation::Add,
                listener.as_raw_fd(),
                EpollEvent::new(events, LISTENER),
            )
            .map_err(MuxerError::Epoll)?;
        Ok(Self {
            guest_cid,
            uplink,
            listener,
            epoll,
            next_token: LISTENER + 1,
            next_host_port: FIRST_HOST_PORT,
            clients: HashMap::new(),
            connections: HashMap::new(),
            from_guest: 0,
            connects: Tokens::new(
                limits::VSOCK_CONNECTS_PER_SECOND,
                limits::VSOCK_CONNECTS_AT_ONCE - limits::VSOCK_CONNECTS_PER_SECOND / 10,
                Instant::now(),
            ),
            names: HashMap::new(),
            ready: VecDeque::new(),
            resets: VecDeque::new(),
            on_first_guest_connection: Some(on_first_guest_connection),
        })
    }

    /// Reports the sockets' events, with tokens for [`Self::host_event`].
    pub fn epoll(&self) -> &Epoll {
        &self.epoll
    }

    /// Drops all connections: the driver was reset.
    pub fn reset(&mut self) {
        self.connections.clear();
        self.from_guest = 0;
        self.names.clear();
        self.ready.clear();
        self.resets.clear();
    }

    /// Whether [`Self::next_packet`] may have something.
    pub fn has_packets(&self) -> bool {
        !self.ready.is_empty() || !self.resets.is_empty()
    }

    /// Takes a packet of the guest; `source` gives the data once the header announced how much.
    pub fn take_packet<S: Source>(
        &mut self,
        header: &[u8; HEADER_LEN],
        source: impl FnOnce(usize) -> Option<S>,
    ) {
        let packet = match Packet::from_guest(header, self.guest_cid) {
            Ok(packet) => packet,
            Err(PacketError::Unsupported(ports)) => return self.reset_ports(ports),
            Err(error @ PacketError::ForeignCid { .. }) => {
                tracing::debug!(%error, "dropped a vsock packet");
                return;
            }
        };
        let len = match packet.operation {
            Operation::Data => packet.len as usize,
            _ => 0,
        };
        // A header that lies about its data ends the connection, not the device.
        let data = if len <= limits::VSOCK_PACKET {
            source(len)
        } else {
            None
        };
        let Some(mut data) = data else {
            return self.abort(packet.ports);
        };

        match self.names.get(&packet.ports) {
            Some(&token) => {
                let Some(watched) = self.connections.get_mut(&token) else {
                    return;
                };
                let outcome = watched.connection.packet(&packet, &mut data);
                self.settle(token, outcome);
            }
            None => match packet.operation {
                Operation::Request => self.connect_host(&packet),
                Operation::Reset => {}
                _ => self.reset_ports(packet.ports),
            },
        }
    }

    /// The next packet for the guest, its data put into `room`.
    pub fn next_packet(&mut self, room: &mut impl Sink) -> Option<Outgoing> {
        if let Some(ports) = self.resets.pop_front() {
            let header = Packet::new(ports, Operation::Reset).to_guest(self.guest_cid);
            return Some(Outgoing { header, len: 0 });
        }
        while let Some(token) = self.ready.pop_front() {
            let Some(watched) = self.connections.get_mut(&token) else {
                continue;
            };
            watched.queued = false;
            let packet = watched.connection.next_packet(room);
            self.settle(token, Outcome::Continue);
            if let Some(packet) = packet {
                let header = packet.to_guest(self.guest_cid);
                return Some(Outgoing {
                    header,
                    len: packet.len,
                });
            }
        }
        None
    }

    /// Something happened on the socket that `token` names.
    pub fn host_event(&mut self, token: u64, events: EventSet) {
        if token == LISTENER {
            self.accept();
        } else if self.clients.contains_key(&token) {
            self.client_event(token);
        } else if let Some(watched) = self.connections.get_mut(&token) {
            let readable = EventSet::IN | EventSet::READ_HANG_UP;
            let hung_up = EventSet::HANG_UP | EventSet::ERROR;
            let outcome = watched.connection.host_event(
                events.intersects(readable),
                events.intersects(EventSet::OUT),
                events.intersects(hung_up),
            );
            self.settle(token, outcome);
        }
    }

    /// Until when the device's thread may sleep at most.
    pub fn timeout(&self) -> Option<Duration> {
        let first = self.clients.values().map(|client| client.deadline).min()?;
        Some(first.saturating_duration_since(Instant::now()))
    }

    /// Drops clients that took too long for their line.
    pub fn expire(&mut self) {
        if !self.clients.is_empty() {
            let now = Instant::now();
            self.clients.retain(|_, client| client.deadline > now);
        }
    }

    /// Brings the books in line with what a connection has become.
    fn settle(&mut self, token: u64, outcome: Outcome) {
        let Some(watched) = self.connections.get_mut(&token) else {
            return;
        };
        let ports = watched.connection.ports();
        if outcome != Outcome::Continue {
            // Only if the name is still this connection's: it may drain while the guest uses the ports anew.
            if self.names.get(&ports) == Some(&token) {
                self.names.remove(&ports);
            }
            if outcome == Outcome::Reset {
                self.reset_ports(ports);
            }
        }
        let Some(watched) = self.connections.get_mut(&token) else {
            return;
        };
        if watched.connection.is_done() {
            return self.remove(token);
        }
        let waits = watched.connection.waits_for_host();
        if waits != watched.watches_writable {
            watched.watches_writable = waits;
            let fd = watched.connection.stream().as_raw_fd();
            let event = EpollEvent::new(interest(waits), token);
            if self.epoll.ctl(ControlOperation::Modify, fd, event).is_err() {
                return self.abort(ports);
            }
        }
        if !watched.queued && watched.connection.has_packet() {
            watched.queued = true;
            self.ready.push_back(token);
        }
    }

    /// Ends a connection at once, on both sides.
    fn abort(&mut self, ports: Ports) {
        if let Some(token) = self.names.remove(&ports) {
            self.remove(token);
        }
        self.reset_ports(ports);
    }

    fn remove(&mut self, token: u64) {
        let Some(gone) = self.connections.remove(&token) else {
            return;
        };
        if gone.from_guest {
            self.from_guest = self.from_guest.saturating_sub(1);
        }
        // A guest that takes no packets and makes connections for ever would fill it.
        if gone.queued {
            self.ready.retain(|waiting| *waiting != token);
        }
    }

    fn reset_ports(&mut self, ports: Ports) {
        if self.resets.len() < limits::VSOCK_PENDING_RESETS {
            self.resets.push_back(ports);
        }
    }

    /// The guest asks for a connection to a port of the host.
    fn connect_host(&mut self, request: &Packet) {
        let ports = request.ports;
        if self.connections.len() >= limits::VSOCK_CONNECTIONS
            || self.from_guest >= limits::VSOCK_GUEST_CONNECTIONS
        {
            tracing::debug!(?ports, "refused a vsock connection: too many");
            return self.reset_ports(ports);
        }
        if !self.connects.wait(Instant::now()).is_zero() {
            tracing::debug!(?ports, "refused a vsock connection: too many a second");
            return self.reset_ports(ports);
        }
        match self.uplink.connect(ports.host) {
            Ok(stream) => {
                self.connects.spend(1);
                if let Some(first) = self.on_first_guest_connection.take() {
                    first();
                }
                self.add(Connection::accepted(stream, request));
            }
            Err(error) => {
                tracing::debug!(?ports, %error, "refused a vsock connection");
                self.reset_ports(ports);
            }
        }
    }

    /// A connection that the guest asked for.
    fn add(&mut self, connection: Connection) {
        let token = self.new_token();
        let ports = connection.ports();
        let event = EpollEvent::new(interest(false), token);
        let fd = connection.stream().as_raw_fd();
        if self.epoll.ctl(ControlOperation::Add, fd, event).is_err() {
            return self.reset_ports(ports);
        }
        self.from_guest += 1;
        self.insert(token, connection, true);
    }

    fn insert(&mut self, token: u64, connection: Connection, from_guest: bool) {
        self.names.insert(connection.ports(), token);
        let watched = Watched {
            connection,
            from_guest,
            queued: false,
            watches_writable: false,
        };
        self.connections.insert(token, watched);
        self.settle(token, Outcome::Continue);
    }

    fn accept(&mut self) {
        loop {
            let stream = match self.listener.accept() {
                Ok((stream, _)) => stream,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a vsock client");
                    return;
                }
            };
            if self.clients.len() >= limits::VSOCK_PENDING_CONNECTS
                || self.connections.len() >= limits::VSOCK_CONNECTIONS
                || stream.set_nonblocking(true).is_err()
            {
                continue;
            }
            let token = self.new_token();
            let event = EpollEvent::new(interest(false), token);
            if self
                .epoll
                .ctl(ControlOperation::Add, stream.as_raw_fd(), event)
                .is_ok()
            {
                self.clients.insert(token, Client::new(stream));
            }
        }
    }

    fn client_event(&mut self, token: u64) {
        let Some(client) = self.clients.get_mut(&token) else {
            return;
        };
        let line = client.read_line();
        if line == Line::Partial {
            return;
        }
        let Some(client) = self.clients.remove(&token) else {
            return;
        };
        let Line::Connect(port) = line else { return };
        if self.connections.len() >= limits::VSOCK_CONNECTIONS {
            return;
        }
        let ports = Ports {
            guest: port,
            host: self.new_host_port(port),
        };
        // Looks again at what the socket holds already: the edge for it is past.
        let event = EpollEvent::new(interest(false), token);
        if self
            .epoll
            .ctl(ControlOperation::Modify, client.stream.as_raw_fd(), event)
            .is_ok()
        {
            self.insert(token, Connection::requested(client.stream, ports), false);
        }
    }

    fn new_token(&mut self) -> u64 {
        self.next_token += 1;
        self.next_token
    }

    /// Ends: there are far more ports than connections.
    fn new_host_port(&mut self, guest: u32) -> u32 {
        loop {
            let host = self.next_host_port;
            self.next_host_port = host.checked_add(1).unwrap_or(FIRST_HOST_PORT);
            // u32::MAX is VMADDR_PORT_ANY.
            if host != u32::MAX && !self.names.contains_key(&Ports { guest, host }) {
                return host;
            }
        }
    }
}

fn interest(writable: bool) -> EventSet {
    let base = EventSet::IN | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
    if writable { base | EventSet::OUT } else { base }
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;

    use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, recv, socketpair};

    use super::super::packet::SHUTDOWN_BOTH;
    use super::*;

    /// One whose guest reaches port 7, the host's end of its uplink, and the folder of its socket.
    fn muxer() -> (Muxer, OwnedFd, tempfile::TempDir) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vsock.sock");
        let flags = SocketFlags::CLOEXEC;
        let (ours, host) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        let uplink = Uplink::new(vec![7], Some(ours));
        let muxer = Muxer::new(3, &path, uplink, Box::new(|| ())).unwrap();
        (muxer, host, folder)
    }

    #[test]
    fn connections_that_come_and_go_have_a_rate() {
        let (mut muxer, host, _folder) = muxer();
        let start = Instant::now();
        let mut tried = 0;
        let mut reached = |muxer: &mut Muxer| {
            tried += 1;
            let ports = Ports {
                guest: tried,
                host: 7,
            };
            for operation in [Operation::Request, Operation::Reset] {
                let header = Packet::new(ports, operation).as_sent_by_guest(3);
                muxer.take_packet(&header, |_| Some(&b""[..]));
            }
            let refused = muxer.next_packet(&mut Vec::new());
            // The socket that comes with it is closed, as nobody asks for it.
            let got = recv(&host, &mut [0; 4], RecvFlags::DONTWAIT);
            assert_eq!(got.is_ok(), refused.is_none());
            if let Some(reset) = refused {
                let reset = Packet::seen_by_guest(&reset.header, 3);
                assert_eq!((reset.ports, reset.operation), (ports, Operation::Reset));
            }
            u64::from(got.is_ok())
        };
        let mut count = 0;
        for _ in 0..10 * limits::VSOCK_CONNECTS_AT_ONCE {
            count += reached(&mut muxer);
        }
        muxer.reset();
        for _ in 0..10 {
            count += reached(&mut muxer);
        }
        let passed = start.elapsed().as_millis() as u64 + 1;
        let most =
            limits::VSOCK_CONNECTS_AT_ONCE + limits::VSOCK_CONNECTS_PER_SECOND * passed / 1000 + 1;
        assert!((limits::VSOCK_CONNECTS_AT_ONCE..=most).contains(&count));
        std::thread::sleep(Duration::from_millis(100));
        assert_eq!(reached(&mut muxer), 1);
    }

    #[test]
    fn connections_that_end_before_the_guest_takes_a_packet_leave_nothing_waiting() {
        let (mut muxer, _host, _folder) = muxer();
        for guest in 0..100 {
            let ports = Ports { guest, host: 7 };
            for operation in [Operation::Request, Operation::Reset] {
                let header = Packet::new(ports, operation).as_sent_by_guest(3);
                muxer.take_packet(&header, |_| Some(&b""[..]));
            }
        }
        assert_eq!((muxer.connections.len(), muxer.ready.len()), (0, 0));
        // Those that live still have their turn.
        let ports = Ports { guest: 1, host: 7 };
        for operation in [Operation::Request, Operation::Shutdown] {
            let packet = Packet {
                flags: SHUTDOWN_BOTH,
                ..Packet::new(ports, operation)
            };
            muxer.take_packet(&packet.as_sent_by_guest(3), |_| Some(&b""[..]));
        }
        let reset = muxer.next_packet(&mut Vec::new()).unwrap();
        let reset = Packet::seen_by_guest(&reset.header, 3);
        assert_eq!((reset.ports, reset.operation), (ports, Operation::Reset));
        assert!(!muxer.has_packets());
    }
}
