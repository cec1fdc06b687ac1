//! The device over plain memory, driven by a fake driver.

use std::collections::HashSet;
use std::io::IoSliceMut;
use std::io::{Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketFlags, SocketType,
    recvmsg, socketpair,
};
use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress};

use super::packet::{
    HEADER_LEN, Operation, Packet, Ports, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND,
};
use super::*;
use crate::limits;
use crate::virtio::SharedMemory;
use crate::virtio::testing::{self, CountingInterrupt, DriverQueue};

const CID: u64 = 3;
const QUEUE: u16 = 64;
const RX_BUFFER: u32 = 4096;
const RX_DATA: u64 = 0x20_0000;
const TX_DATA: u64 = 0x80_0000;
const TX_SLOT: u64 = 128 << 10;
const BUF_ALLOC: u32 = 128 << 10;

/// A guest with a vsock driver and a host with a state folder.
struct Bench {
    device: Vsock,
    memory: SharedMemory,
    rx: DriverQueue,
    tx: DriverQueue,
    tx_next: u16,
    tx_busy: HashSet<u16>,
    folder: TempDir,
    first: Arc<AtomicU32>,
    uplink: Arc<Uplink>,
    host: Arc<OwnedFd>,
}

/// The host's end of the uplink.
struct Listener {
    host: Arc<OwnedFd>,
    port: u32,
}

impl Listener {
    fn accept(&self) -> UnixStream {
        self.receive(RecvFlags::empty()).unwrap()
    }

    /// One that has come already.
    fn try_accept(&self) -> Option<UnixStream> {
        self.receive(RecvFlags::DONTWAIT)
    }

    fn receive(&self, flags: RecvFlags) -> Option<UnixStream> {
        let mut port = [0; 4];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut parts = [IoSliceMut::new(&mut port)];
        let flags = flags | RecvFlags::CMSG_CLOEXEC;
        recvmsg(&*self.host, &mut parts, &mut ancillary, flags).ok()?;
        assert_eq!(u32::from_le_bytes(port), self.port);
        let Some(RecvAncillaryMessage::ScmRights(mut sockets)) = ancillary.drain().next() else {
            panic!("no socket came");
        };
        let stream = UnixStream::from(sockets.next().unwrap());
        stream.set_nonblocking(false).unwrap();
        Some(stream)
    }
}

impl Bench {
    fn new() -> Self {
        Self::with_rx_buffers(QUEUE)
    }

    fn with_rx_buffers(count: u16) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let first = Arc::new(AtomicU32::new(0));
        let counter = first.clone();
        let on_first = Box::new(move || {
            counter.fetch_add(1, Ordering::SeqCst);
        });
        let flags = SocketFlags::CLOEXEC;
        let (ours, host) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        let uplink = Uplink::new(vec![PORTS.host], Some(ours));
        let path = folder.path().join("vsock.sock");
        let mut device = Vsock::new(CID, &path, uplink.clone(), on_first).unwrap();
        let memory = testing::memory();
        let interrupt = CountingInterrupt::new();
        let (mut rx, rx_device) = DriverQueue::new(&memory, 0, 0x1_0000, QUEUE, interrupt.clone());
        let (tx, tx_device) = DriverQueue::new(&memory, 1, 0x2_0000, QUEUE, interrupt.clone());
        for head in 0..count {
            rx.offer_chain(head, &[(rx_address(head), RX_BUFFER, true)]);
        }
        let queues = vec![Some(rx_device), Some(tx_device), None];
        device
            .activate(Activation {
                features: 0,
                queues,
                interrupt,
            })
            .unwrap();
        let (tx_next, tx_busy) = (0, HashSet::new());
        Self {
            device,
            memory,
            rx,
            tx,
            tx_next,
            tx_busy,
            folder,
            first,
            uplink,
            host: Arc::new(host),
        }
    }

    fn listen(&self, port: u32) -> Listener {
        let host = self.host.clone();
        Listener { host, port }
    }

    fn dial(&self, port: u32) -> UnixStream {
        let mut stream = UnixStream::connect(self.folder.path().join("vsock.sock")).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(10)))
            .unwrap();
        writeln!(stream, "CONNECT {port}").unwrap();
        stream
    }

    fn send_raw(&mut self, header: &[u8; HEADER_LEN], data: &[u8]) {
        while self.tx_busy.contains(&self.tx_next) {
            let (head, _) = wait(|| self.tx.used());
            self.tx_busy.remove(&(head / 2));
        }
        let slot = self.tx_next;
        self.tx_next = (slot + 1) % (QUEUE / 2);
        self.tx_busy.insert(slot);
        let at = TX_DATA + u64::from(slot) * TX_SLOT;
        self.memory.write_slice(header, GuestAddress(at)).unwrap();
        self.memory
            .write_slice(data, GuestAddress(at + 0x1000))
            .unwrap();
        let mut buffers = vec![(at, HEADER_LEN as u32, false)];
        if !data.is_empty() {
            buffers.push((at + 0x1000, data.len() as u32, false));
        }
        self.tx.offer_chain(slot * 2, &buffers);
        self.tx.kick();
    }

    fn send(&mut self, packet: Packet) {
        self.send_raw(&packet.as_sent_by_guest(CID), &[]);
    }

    fn send_data(&mut self, ports: Ports, data: &[u8], fwd_cnt: u32) {
        let len = data.len() as u32;
        let packet = Packet {
            len,
            fwd_cnt,
            ..guest_packet(ports, Operation::Data)
        };
        self.send_raw(&packet.as_sent_by_guest(CID), data);
    }

    fn try_receive(&mut self) -> Option<(Packet, Vec<u8>)> {
        let (head, written) = self.rx.used()?;
        let mut header = [0; HEADER_LEN];
        self.memory
            .read_slice(&mut header, GuestAddress(rx_address(head)))
            .unwrap();
        let packet = Packet::seen_by_guest(&header, CID);
        let mut data = vec![0; packet.len as usize];
        assert_eq!(written as usize, HEADER_LEN + data.len());
        let at = GuestAddress(rx_address(head) + HEADER_LEN as u64);
        self.memory.read_slice(&mut data, at).unwrap();
        self.rx
            .offer_chain(head, &[(rx_address(head), RX_BUFFER, true)]);
        self.rx.kick();
        Some((packet, data))
    }

    fn receive(&mut self) -> (Packet, Vec<u8>) {
        wait(|| self.try_receive())
    }

    fn expect(&mut self, ports: Ports, operation: Operation) -> Packet {
        let (packet, _) = self.receive();
        assert_eq!((packet.ports, packet.operation), (ports, operation));
        packet
    }

    /// The guest connects to `port` of the host.
    fn connect(&mut self, listener: &Listener, ports: Ports) -> UnixStream {
        self.send(guest_packet(ports, Operation::Request));
        self.expect(ports, Operation::Response);
        let stream = listener.accept();
        stream
            .set_read_timeout(Some(Duration::from_secs(10)))
            .unwrap();
        stream
    }

    /// Nothing comes for a moment.
    fn expect_silence(&mut self) {
        std::thread::sleep(Duration::from_millis(50));
        assert!(self.try_receive().is_none());
    }
}

fn rx_address(head: u16) -> u64 {
    RX_DATA + u64::from(head) * u64::from(RX_BUFFER)
}

fn guest_packet(ports: Ports, operation: Operation) -> Packet {
    Packet {
        buf_alloc: BUF_ALLOC,
        ..Packet::new(ports, operation)
    }
}

fn shutdown(ports: Ports, flags: u32) -> Packet {
    Packet {
        flags,
        ..guest_packet(ports, Operation::Shutdown)
    }
}

fn wait<T>(mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "waited in vain");
        std::thread::sleep(Duration::from_micros(100));
    }
}

const PORTS: Ports = Ports {
    guest: 50_000,
    host: 1026,
};

#[test]
fn the_guest_reaches_a_listener_and_the_first_time_is_told() {
    let mut bench = Bench::new();
    let listener = bench.listen(PORTS.host);
    assert_eq!(bench.first.load(Ordering::SeqCst), 0);
    let mut host = bench.connect(&listener, PORTS);
    bench.send_data(PORTS, b"ready", 0);
    let mut data = [0; 5];
    host.read_exact(&mut data).unwrap();
    assert_eq!(&data, b"ready");
    let other = Ports {
        guest: 50_001,
        ..PORTS
    };
    let _other = bench.connect(&listener, other);
    assert_eq!(bench.first.load(Ordering::SeqCst), 1);
}

#[test]
fn a_port_that_is_not_configured_is_refused() {
    let mut bench = Bench::new();
    let other = Ports {
        host: PORTS.host + 1,
        ..PORTS
    };
    bench.send(guest_packet(other, Operation::Request));
    bench.expect(other, Operation::Reset);
    assert_eq!(bench.first.load(Ordering::SeqCst), 0);
}

#[test]
fn without_a_shim_the_guest_is_refused_and_another_shim_is_reached() {
    let mut bench = Bench::new();
    bench.host = Arc::new(UnixStream::pair().unwrap().0.into());
    bench.send(guest_packet(PORTS, Operation::Request));
    bench.expect(PORTS, Operation::Reset);
    let flags = SocketFlags::CLOEXEC;
    let (ours, host) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
    bench.uplink.replace(ours);
    bench.host = Arc::new(host);
    let listener = bench.listen(PORTS.host);
    bench.connect(&listener, PORTS);
}

#[test]
fn a_host_client_is_answered_once_the_guest_accepted() {
    let mut bench = Bench::new();
    let mut client = bench.dial(1024);
    let (request, _) = bench.receive();
    assert_eq!(
        (request.operation, request.ports.guest),
        (Operation::Request, 1024)
    );
    assert_eq!(request.buf_alloc as usize, limits::VSOCK_BUFFER);
    bench.send(guest_packet(request.ports, Operation::Response));
    let mut line = vec![0; format!("OK {}\n", request.ports.host).len()];
    client.read_exact(&mut line).unwrap();
    assert_eq!(line, format!("OK {}\n", request.ports.host).into_bytes());
    client.write_all(b"hello").unwrap();
    let (packet, data) = bench.receive();
    assert_eq!(
        (packet.operation, data.as_slice()),
        (Operation::Data, &b"hello"[..])
    );
}

#[test]
fn a_host_client_is_closed_if_the_guest_refused() {
    let mut bench = Bench::new();
    let mut client = bench.dial(1024);
    let (request, _) = bench.receive();
    bench.send(guest_packet(request.ports, Operation::Reset));
    let mut rest = Vec::new();
    client.read_to_end(&mut rest).unwrap();
    assert!(rest.is_empty());
}

#[test]
fn a_client_that_leaves_before_the_answer_is_forgotten() {
    let mut bench = Bench::new();
    drop(bench.dial(1024));
    let (request, _) = bench.receive();
    assert_eq!(request.operation, Operation::Request);
    bench.expect(request.ports, Operation::Reset);
}

#[test]
fn more_data_than_credit_resets_the_connection() {
    let mut bench = Bench::new();
    let listener = bench.listen(PORTS.host);
    let _host = bench.connect(&listener, PORTS);
    let block = vec![7; limits::VSOCK_PACKET];
    let packet = loop {
        bench.send_data(PORTS, &block, 0);
        std::thread::sleep(Duration::from_millis(5));
        match bench.try_receive() {
            Some((packet, _)) if packet.operation == Operation::Reset => break packet,
            _ => {}
        }
    };
    assert_eq!(packet.ports, PORTS);
}

#[test]
fn a_packet_that_announces_more_than_it_holds_resets_the_connection() {
    let mut bench = Bench::new();
    let listener = bench.listen(PORTS.host);
    let _host = bench.connect(&listener, PORTS);
    for len in [6, u32::MAX] {
        let packet = Packet {
            len,
            ..guest_packet(PORTS, Operation::Data)
        };
        bench.send_raw(&packet.as_sent_by_guest(CID), b"hello");
        bench.expect(PORTS, Operation::Reset);
    }
}

#[test]
fn forged_addresses_are_dropped_and_unknown_types_reset() {
    let mut bench = Bench::new();
    let _listener = bench.listen(PORTS.host);
    let request = guest_packet(PORTS, Operation::Request);
    bench.send_raw(&request.as_sent_by_guest(CID + 1), &[]);
    let mut elsewhere = request.as_sent_by_guest(CID);
    elsewhere[8] = 1;
    bench.send_raw(&elsewhere, &[]);
    bench.expect_silence();
    let mut seqpacket = request.as_sent_by_guest(CID);
    seqpacket[28] = 2;
    bench.send_raw(&seqpacket, &[]);
    bench.expect(PORTS, Operation::Reset);
}

#[test]
fn packets_for_no_connection_are_reset_but_a_reset_is_not() {
    let mut bench = Bench::new();
    bench.send(guest_packet(PORTS, Operation::Reset));
    bench.send(guest_packet(PORTS, Operation::CreditUpdate));
    bench.expect(PORTS, Operation::Reset);
    bench.expect_silence();
}

#[test]
fn a_half_close_of_the_guest_reaches_the_host_after_the_data() {
    let mut bench = Bench::new();
    let listener = bench.listen(PORTS.host);
    let mut host = bench.connect(&listener, PORTS);
    bench.send_data(PORTS, b"last words", 0);
    bench.send(shutdown(PORTS, SHUTDOWN_SEND));
    let mut data = Vec::new();
    host.read_to_end(&mut data).unwrap();
    assert_eq!(data, b"last words");
    // The other direction lives.
    host.write_all(b"answer").unwrap();
    let (packet, data) = bench.receive();
    assert_eq!(
        (packet.operation, data.as_slice()),
        (Operation::Data, &b"answer"[..])
    );
    bench.send(shutdown(PORTS, SHUTDOWN_RECEIVE));
    bench.expect(PORTS, Operation::Reset);
}

#[test]
fn a_half_close_of_the_host_reaches_the_guest_after_the_data() {
    let mut bench = Bench::new();
    let listener = bench.listen(PORTS.host);
    let mut host = bench.connect(&listener, PORTS);
    host.write_all(b"stdin").unwrap();
    host.shutdown(std::net::Shutdown::Write).unwrap();
    let (_, data) = bench.receive();
    assert_eq!(data, b"stdin");
    assert_eq!(
        bench.expect(PORTS, Operation::Shutdown).flags,
        SHUTDOWN_SEND
    );
    bench.send_data(PORTS, b"stdout", 5);
    bench.send(shutdown(PORTS, SHUTDOWN_BOTH));
    bench.expect(PORTS, Operation::Reset);
    let mut data = Vec::new();
    host.read_to_end(&mut data).unwrap();
    assert_eq!(data, b"stdout");
}

#[test]
fn a_host_that_closes_is_delivered_and_then_shut_down_both_ways() {
    let mut bench = Bench::new();
    let listener = bench.listen(PORTS.host);
    let mut host = bench.connect(&listener, PORTS);
    host.write_all(b"bye").unwrap();
    drop(host);
    let (mut data, mut flags) = (Vec::new(), 0);
    while flags != SHUTDOWN_BOTH {
        let (packet, bytes) = bench.receive();
        assert!(
            flags & SHUTDOWN_SEND == 0 || bytes.is_empty(),
            "data after the end"
        );
        data.extend(bytes);
        flags |= packet.flags;
    }
    assert_eq!(data, b"bye");
    // What the guest still sends goes nowhere, without harm.
    bench.send_data(PORTS, b"too late", 3);
    bench.send(guest_packet(PORTS, Operation::Reset));
    bench.expect_silence();
}

#[test]
fn a_connection_storm_is_capped() {
    let mut bench = Bench::new();
    let listener = bench.listen(PORTS.host);
    let mut hosts = Vec::new();
    let mut refused = 0;
    for guest in 0..limits::VSOCK_GUEST_CONNECTIONS as u32 + 100 {
        let ports = Ports { guest, ..PORTS };
        bench.send(guest_packet(ports, Operation::Request));
        let (packet, _) = bench.receive();
        assert_eq!(packet.ports, ports);
        match packet.operation {
            Operation::Response => hosts.push(listener.accept()),
            _ => refused += 1,
        }
    }
    assert_eq!(
        (hosts.len(), refused),
        (limits::VSOCK_GUEST_CONNECTIONS, 100)
    );
    // One that ended, by either side, makes room for another.
    for guest in 0..2 {
        let ports = Ports { guest, ..PORTS };
        bench.send(guest_packet(ports, Operation::Reset));
        bench.send(guest_packet(ports, Operation::Request));
        assert_eq!(bench.receive().0.operation, Operation::Response);
    }
}

/// A connection that the device closed.
fn is_closed(stream: &mut UnixStream) -> bool {
    matches!(stream.read(&mut [0; 64]), Ok(0) | Err(_))
}

#[test]
fn clients_that_do_not_say_connect_have_a_cap() {
    let bench = Bench::new();
    let path = bench.folder.path().join("vsock.sock");
    let dial = |_| {
        let stream = UnixStream::connect(&path).unwrap();
        let patience = Some(Duration::from_secs(10));
        stream.set_read_timeout(patience).unwrap();
        stream
    };
    let _waiting: Vec<_> = (0..limits::VSOCK_PENDING_CONNECTS).map(dial).collect();
    assert!(is_closed(&mut dial(0)), "one above the cap was kept");
}

#[test]
fn a_client_that_never_says_connect_is_closed() {
    let bench = Bench::new();
    let mut stream = UnixStream::connect(bench.folder.path().join("vsock.sock")).unwrap();
    let patience = limits::VSOCK_CONNECT_TIMEOUT + Duration::from_secs(10);
    stream.set_read_timeout(Some(patience)).unwrap();
    let start = Instant::now();
    assert_eq!(stream.read(&mut [0; 64]).unwrap(), 0);
    assert!(start.elapsed() >= limits::VSOCK_CONNECT_TIMEOUT - Duration::from_millis(100));
}

#[test]
fn connections_of_the_host_have_a_cap() {
    let wanted = Some(4 * limits::VSOCK_CONNECTIONS as u64);
    let both = rustix::process::Rlimit {
        current: wanted,
        maximum: wanted,
    };
    // Both ends of each connection are this process's; who is not root has fewer and cannot see the cap.
    if rustix::process::setrlimit(rustix::process::Resource::Nofile, both).is_err() {
        return;
    }
    let mut bench = Bench::new();
    let mut clients = Vec::new();
    for _ in 0..limits::VSOCK_CONNECTIONS {
        clients.push(bench.dial(1024));
        let (request, _) = bench.receive();
        assert_eq!(request.operation, Operation::Request);
    }
    // Without a line: it may be closed before that could be written.
    let mut above = UnixStream::connect(bench.folder.path().join("vsock.sock")).unwrap();
    let patience = Some(Duration::from_secs(10));
    above.set_read_timeout(patience).unwrap();
    assert!(is_closed(&mut above), "one above the cap was kept");
}

#[test]
fn resets_for_a_guest_that_takes_none_have_a_cap() {
    let mut bench = Bench::with_rx_buffers(0);
    let sent = limits::VSOCK_PENDING_RESETS as u32 + 100;
    for guest in 0..sent {
        let ports = Ports { guest, ..PORTS };
        bench.send_data(ports, b"x", 0);
    }
    // All were taken once the last one's slot is free again.
    while !bench.tx_busy.is_empty() {
        let (head, _) = wait(|| bench.tx.used());
        bench.tx_busy.remove(&(head / 2));
    }
    for head in 0..QUEUE {
        let buffer = (rx_address(head), RX_BUFFER, true);
        bench.rx.offer_chain(head, &[buffer]);
    }
    bench.rx.kick();
    for guest in 0..limits::VSOCK_PENDING_RESETS as u32 {
        bench.expect(Ports { guest, ..PORTS }, Operation::Reset);
    }
    bench.expect_silence();
}

#[test]
fn a_stuck_reader_stops_neither_others_nor_loses_bytes() {
    let mut bench = Bench::new();
    let listener = bench.listen(PORTS.host);
    let mut stuck = bench.connect(&listener, PORTS);
    let other = Ports {
        guest: 50_001,
        ..PORTS
    };
    let mut lively = bench.connect(&listener, other);

    // Fill the socket and the buffer, as far as credit goes.
    let block = vec![1; 16 << 10];
    let (mut sent, mut fwd_cnt) = (0_u32, 0_u32);
    for _ in 0..1000 {
        while let Some((packet, _)) = bench.try_receive() {
            assert_ne!(packet.operation, Operation::Reset);
            fwd_cnt = packet.fwd_cnt;
        }
        if sent - fwd_cnt + block.len() as u32 > limits::VSOCK_BUFFER as u32 {
            std::thread::sleep(Duration::from_millis(1));
            continue;
        }
        bench.send_data(PORTS, &block, 0);
        sent += block.len() as u32;
    }
    assert!(sent as usize >= limits::VSOCK_BUFFER);

    bench.send_data(other, b"lively", 0);
    let mut data = [0; 6];
    lively.read_exact(&mut data).unwrap();

    // The guest closes, and even forgets the connection; the reader still gets everything.
    bench.send(shutdown(PORTS, SHUTDOWN_BOTH));
    bench.expect(PORTS, Operation::Reset);
    let mut data = Vec::new();
    stuck.read_to_end(&mut data).unwrap();
    assert_eq!(data.len(), sent as usize);
}

#[test]
fn ten_megabytes_come_back_intact() {
    let mut bench = Bench::with_rx_buffers(16);
    let listener = bench.listen(PORTS.host);
    let host = bench.connect(&listener, PORTS);
    let sent: Vec<u8> = (0..10 << 20_u32)
        .map(|i: u32| (i.wrapping_mul(2654435761) >> 24) as u8)
        .collect();
    let (mut writer, expected) = (host.try_clone().unwrap(), sent.clone());
    let feeder = std::thread::spawn(move || writer.write_all(&expected).unwrap());
    let total = sent.len();
    let reader = std::thread::spawn(move || {
        let mut back = vec![0; total];
        (&host).read_exact(&mut back).unwrap();
        (back, host)
    });

    let (mut received, mut returned) = (Vec::with_capacity(total), 0);
    let (mut fwd_cnt, mut told, mut device_fwd_cnt) = (0_u32, 0_u32, 0_u32);
    while received.len() < total || returned < total {
        if let Some((packet, data)) = bench.try_receive() {
            assert_eq!(packet.ports, PORTS);
            assert_ne!(packet.operation, Operation::Reset);
            device_fwd_cnt = packet.fwd_cnt;
            fwd_cnt += data.len() as u32;
            received.extend(data);
            assert!(fwd_cnt - told <= BUF_ALLOC, "more than the guest's credit");
            if fwd_cnt - told > BUF_ALLOC / 2 || packet.operation == Operation::CreditRequest {
                told = fwd_cnt;
                let update = guest_packet(PORTS, Operation::CreditUpdate);
                bench.send(Packet { fwd_cnt, ..update });
            }
        }
        let free = limits::VSOCK_BUFFER as u32 - (returned as u32 - device_fwd_cnt);
        let len = (received.len() - returned)
            .min(free as usize)
            .min(limits::VSOCK_PACKET);
        if len > 0 {
            let block = received[returned..returned + len].to_vec();
            told = fwd_cnt;
            bench.send_data(PORTS, &block, fwd_cnt);
            returned += len;
        }
    }
    assert!(received == sent);
    feeder.join().unwrap();
    assert!(reader.join().unwrap().0 == sent);
}

/// xorshift: the same packets at each run.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u32) -> u32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 32) as u32 % limit
    }

    fn any(&mut self) -> u32 {
        let whole = self.below(u32::MAX);
        [0, 1, 4096, 65_536, 262_144, u32::MAX, whole][self.below(7) as usize]
    }
}

#[test]
fn random_packets_do_no_harm() {
    let mut bench = Bench::new();
    let listener = bench.listen(PORTS.host);
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let mut hosts = Vec::new();
    for round in 0..20_000 {
        let ports = Ports {
            guest: random.below(4),
            host: PORTS.host + random.below(2),
        };
        let packet = Packet {
            ports,
            flags: random.below(5),
            ..data_of(&mut random)
        };
        let mut header = packet.as_sent_by_guest(CID);
        header[30] = random.below(9) as u8;
        let data = vec![0; random.below(300) as usize];
        bench.send_raw(&header, &data);
        while bench.try_receive().is_some() {}
        hosts.extend(listener.try_accept());
        match random.below(8) {
            0 => drop(hosts.pop()),
            1 => hosts
                .iter()
                .for_each(|host| drop((&*host).write(b"from the host"))),
            2 if round % 16 == 0 => drop(bench.dial(1)),
            _ => {}
        }
        hosts.truncate(8);
    }
    while bench.try_receive().is_some() {}
    // The requests among them may have used up the rate.
    std::thread::sleep(Duration::from_millis(100));
    let fresh = Ports {
        guest: 60_000,
        ..PORTS
    };
    bench.send(guest_packet(fresh, Operation::Request));
    while bench.receive().0.ports != fresh {}
    bench.send_data(fresh, b"alive", 0);
    let mut connections = std::iter::from_fn(|| listener.try_accept());
    let alive = connections.any(|mut host| {
        let mut data = Vec::new();
        host.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
        let _ = host.read_to_end(&mut data);
        data == b"alive"
    });
    assert!(alive);
}

fn data_of(random: &mut Random) -> Packet {
    let (len, buf_alloc, fwd_cnt) = (random.any(), random.any(), random.any());
    Packet {
        len,
        buf_alloc,
        fwd_cnt,
        ..Packet::new(PORTS, Operation::Data)
    }
}

#[test]
fn a_reset_device_drops_its_connections_and_can_run_again() {
    let mut bench = Bench::new();
    let listener = bench.listen(PORTS.host);
    let mut host = bench.connect(&listener, PORTS);
    bench.device.reset();
    assert_eq!(host.read(&mut [0; 1]).unwrap(), 0);
    assert!(matches!(bench.device.state, State::Idle(_)));
}

#[test]
fn the_configuration_space_holds_the_cid() {
    let bench = Bench::new();
    let mut whole = [0; 8];
    bench.device.read_config(0, &mut whole);
    assert_eq!(u64::from_le_bytes(whole), CID);
    let mut past = [0xff; 4];
    past.fill(0);
    bench.device.read_config(6, &mut past);
    bench.device.read_config(u64::MAX, &mut past);
    assert_eq!(past, [0; 4]);
}
