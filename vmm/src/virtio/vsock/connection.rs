//! One connection: what the guest's packets do to the host's socket and the other way round.
//!
//! See the module above for the states. No step blocks, and all memory that a connection can hold is `outbound`,
//! capped at [`limits::VSOCK_BUFFER`] by the credit that the guest was given.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::num::Wrapping;
use std::os::unix::net::UnixStream;

use super::packet::{Operation, Packet, Ports, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};
use super::payload::{Sink, Source};
use crate::limits;

/// Where a connection stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// The host asked; the guest has not answered.
    Requested,
    /// Bytes flow.
    Open,
    /// Over for the guest; bytes it sent before still go to the host's reader.
    Draining,
    /// Over.
    Done,
}

/// What the multiplexer must do after a packet of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Outcome {
    /// The connection lives on.
    Continue,
    /// The guest's end is gone: free the ports, keep the connection while [`Connection::is_done`] says no.
    Ended,
    /// As `Ended`, and the guest gets a RST.
    Reset,
}

/// Packets without data that wait for a receive buffer.
#[derive(Debug, Default)]
struct Due {
    request: bool,
    response: bool,
    credit_update: bool,
}

/// One connection between a port of the guest and a unix socket of the host.
#[derive(Debug)]
pub struct Connection {
    ports: Ports,
    phase: Phase,
    stream: UnixStream,
    due: Due,

    /// From the guest, not yet taken by the host's socket.
    outbound: VecDeque<u8>,
    /// Bytes that left `outbound`, or never had to enter it.
    fwd_cnt: Wrapping<u32>,
    /// `fwd_cnt` as the guest knows it.
    told_fwd_cnt: Wrapping<u32>,
    /// Bytes received from the guest.
    rx_cnt: Wrapping<u32>,

    /// Bytes sent to the guest.
    tx_cnt: Wrapping<u32>,
    guest_buf_alloc: u32,
    guest_fwd_cnt: Wrapping<u32>,
    /// A CREDIT_REQUEST is out and the guest's credit has not changed since.
    credit_requested: bool,

    /// SHUTDOWN_* that the guest sent.
    guest_shutdown: u32,
    /// SHUTDOWN_* that the host's socket is worth, and those that the guest was told.
    host_shutdown: u32,
    told_shutdown: u32,
    /// The socket may have bytes or an end of file.
    readable: bool,
    /// The peer closed its socket, it did not only shut its sending side.
    hung_up: bool,
}

impl Connection {
    /// The guest asked with `request`, and `stream` is the host's listener's answer.
    pub fn accepted(stream: UnixStream, request: &Packet) -> Self {
        let mut connection = Self::new(stream, request.ports, Phase::Open);
        connection.due.response = true;
        connection.take_credit(request);
        connection
    }

    /// The host asks the guest.
    pub fn requested(stream: UnixStream, ports: Ports) -> Self {
        let mut connection = Self::new(stream, ports, Phase::Requested);
        connection.due.request = true;
        connection
    }

    fn new(stream: UnixStream, ports: Ports, phase: Phase) -> Self {
        Self {
            ports,
            phase,
            stream,
            due: Due::default(),
            outbound: VecDeque::new(),
            fwd_cnt: Wrapping(0),
            told_fwd_cnt: Wrapping(0),
            rx_cnt: Wrapping(0),
            tx_cnt: Wrapping(0),
            guest_buf_alloc: 0,
            guest_fwd_cnt: Wrapping(0),
            credit_requested: false,
            guest_shutdown: 0,
            host_shutdown: 0,
            told_shutdown: 0,
            readable: false,
            hung_up: false,
        }
    }

    /// The connection's name.
    pub fn ports(&self) -> Ports {
        self.ports
    }

    /// The host's socket.
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Nothing is left to do; drop it.
    pub fn is_done(&self) -> bool {
        self.phase == Phase::Done
    }

    /// Bytes wait until the host's socket takes them.
    pub fn waits_for_host(&self) -> bool {
        !self.outbound.is_empty()
    }

    /// Something may have to go to the guest: call [`Self::next_packet`] once it has room.
    pub fn has_packet(&self) -> bool {
        let due = &self.due;
        match self.phase {
            Phase::Requested => due.request,
            Phase::Open => {
                due.response
                    || due.credit_update
                    || self.host_shutdown & !self.told_shutdown != 0
                    || (self.may_read() && (self.credit() > 0 || !self.credit_requested))
            }
            Phase::Draining | Phase::Done => false,
        }
    }

    /// A packet of the guest for this connection; `data` holds the bytes that its header announced.
    pub fn packet(&mut self, packet: &Packet, data: &mut impl Source) -> Outcome {
        self.take_credit(packet);
        match (self.phase, packet.operation) {
            (Phase::Requested, Operation::Response) => self.established(),
            (Phase::Requested, Operation::Reset) => self.finish(Outcome::Ended),
            (Phase::Open, Operation::Data) => self.data(data),
            (Phase::Open, Operation::Shutdown) => self.shutdown_by_guest(packet.flags),
            (Phase::Open, Operation::CreditUpdate) => Outcome::Continue,
            (Phase::Open, Operation::CreditRequest) => {
                self.due.credit_update = true;
                Outcome::Continue
            }
            // What the guest sent before is in order and may still be read.
            (Phase::Open, Operation::Reset) => self.drain(Outcome::Ended),
            (Phase::Requested | Phase::Open, _) => self.finish(Outcome::Reset),
            (Phase::Draining | Phase::Done, _) => Outcome::Ended,
        }
    }

    fn take_credit(&mut self, packet: &Packet) {
        self.guest_buf_alloc = packet.buf_alloc;
        self.guest_fwd_cnt = Wrapping(packet.fwd_cnt);
        if self.credit() > 0 {
            self.credit_requested = false;
        }
    }

    /// Bytes that the guest has room for (section 5.10.6.3).
    fn credit(&self) -> u32 {
        let in_flight = self.tx_cnt - self.guest_fwd_cnt;
        self.guest_buf_alloc.saturating_sub(in_flight.0)
    }

    fn established(&mut self) -> Outcome {
        self.phase = Phase::Open;
        let line = format!("OK {}\n", self.ports.host);
        // The first bytes on this socket: they fit, or the peer is gone.
        match (&self.stream).write(line.as_bytes()) {
            Ok(n) if n == line.len() => Outcome::Continue,
            _ => self.finish(Outcome::Reset),
        }
    }

    fn data(&mut self, data: &mut impl Source) -> Outcome {
        let Ok(len) = u32::try_from(data.remaining()) else {
            return self.finish(Outcome::Reset);
        };
        // By what the guest was told; so `outbound`, which is never more, has its cap as well.
        if self.guest_shutdown & SHUTDOWN_SEND != 0 || len > self.granted() {
            return self.finish(Outcome::Reset);
        }
        self.rx_cnt += len;
        // In order: past what waits already.
        if self.outbound.is_empty() && !self.host_refuses() {
            while data.remaining() > 0 {
                match data.send(&self.stream) {
                    Ok(n) => self.forwarded(n),
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    Err(_) => {
                        self.host_shutdown |= SHUTDOWN_RECEIVE;
                        break;
                    }
                }
            }
        }
        if self.host_refuses() {
            // Nobody will read it; the guest learns by SHUTDOWN, not by a stuck connection.
            self.forwarded(data.remaining());
        } else if data.copy_to(&mut self.outbound).is_err() {
            return self.finish(Outcome::Reset);
        }
        Outcome::Continue
    }

    /// Bytes that the guest may still send, as far as it knows.
    fn granted(&self) -> u32 {
        let in_flight = self.rx_cnt - self.told_fwd_cnt;
        (limits::VSOCK_BUFFER as u32).saturating_sub(in_flight.0)
    }

    fn host_refuses(&self) -> bool {
        self.host_shutdown & SHUTDOWN_RECEIVE != 0
    }

    fn forwarded(&mut self, n: usize) {
        // Never more than VSOCK_BUFFER at once.
        self.fwd_cnt += n as u32;
        // News in good time, not each time.
        let news = self.fwd_cnt != self.told_fwd_cnt;
        if news && self.granted() < limits::VSOCK_BUFFER as u32 / 2 {
            self.due.credit_update = true;
        }
    }

    fn shutdown_by_guest(&mut self, flags: u32) -> Outcome {
        self.guest_shutdown |= flags & SHUTDOWN_BOTH;
        if self.guest_shutdown == SHUTDOWN_BOTH {
            // Section 5.10.6.5: a clean end is acknowledged by RST.
            return self.drain(Outcome::Reset);
        }
        // Errors mean that the peer is gone already.
        if self.guest_shutdown & SHUTDOWN_RECEIVE != 0 {
            let _ = self.stream.shutdown(Shutdown::Read);
            self.readable = false;
        }
        if self.guest_shutdown & SHUTDOWN_SEND != 0 && self.outbound.is_empty() {
            let _ = self.stream.shutdown(Shutdown::Write);
        }
        Outcome::Continue
    }

    fn drain(&mut self, outcome: Outcome) -> Outcome {
        self.phase = Phase::Draining;
        let _ = self.stream.shutdown(Shutdown::Read);
        if self.outbound.is_empty() {
            self.finish(outcome)
        } else {
            outcome
        }
    }

    fn finish(&mut self, outcome: Outcome) -> Outcome {
        self.phase = Phase::Done;
        self.outbound = VecDeque::new();
        let _ = self.stream.shutdown(Shutdown::Both);
        // Closing with unread bytes would turn the peer's end of file into ECONNRESET. Bounded by the socket's buffer,
        // which nobody can fill any more.
        let mut unread = [0; 4096];
        while matches!((&self.stream).read(&mut unread), Ok(n) if n > 0) {}
        outcome
    }

    /// The host's socket changed.
    pub fn host_event(&mut self, readable: bool, writable: bool, hung_up: bool) -> Outcome {
        self.readable |= readable || hung_up;
        self.hung_up |= hung_up;
        match self.phase {
            Phase::Requested if hung_up => return self.finish(Outcome::Reset),
            Phase::Requested | Phase::Done => return Outcome::Continue,
            Phase::Open | Phase::Draining => {}
        }
        if hung_up {
            self.host_shutdown |= SHUTDOWN_RECEIVE;
        }
        if writable || hung_up {
            self.flush();
        }
        if self.outbound.is_empty() {
            if self.phase == Phase::Draining {
                return self.finish(Outcome::Ended);
            }
            if self.guest_shutdown & SHUTDOWN_SEND != 0 {
                let _ = self.stream.shutdown(Shutdown::Write);
            }
        }
        Outcome::Continue
    }

    fn flush(&mut self) {
        while !self.outbound.is_empty() {
            if self.host_refuses() {
                let lost = self.outbound.len();
                self.outbound = VecDeque::new();
                self.forwarded(lost);
                return;
            }
            match (&self.stream).write(self.outbound.as_slices().0) {
                Ok(n) => {
                    self.outbound.drain(..n);
                    self.forwarded(n);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => self.host_shutdown |= SHUTDOWN_RECEIVE,
            }
        }
        // A quiet connection holds no memory.
        self.outbound = VecDeque::new();
    }

    fn may_read(&self) -> bool {
        self.readable
            && self.guest_shutdown & SHUTDOWN_RECEIVE == 0
            && self.host_shutdown & SHUTDOWN_SEND == 0
    }

    /// The next packet for the guest, its data put into `room`.
    pub fn next_packet(&mut self, room: &mut impl Sink) -> Option<Packet> {
        if !matches!(self.phase, Phase::Requested | Phase::Open) {
            return None;
        }
        if std::mem::take(&mut self.due.request) {
            return Some(self.packet_of(Operation::Request));
        }
        if self.phase == Phase::Requested {
            return None;
        }
        if std::mem::take(&mut self.due.response) {
            return Some(self.packet_of(Operation::Response));
        }
        if self.may_read() {
            if self.credit() == 0 {
                if !std::mem::replace(&mut self.credit_requested, true) {
                    return Some(self.packet_of(Operation::CreditRequest));
                }
            } else if let Some(packet) = self.read_host(room) {
                return Some(packet);
            }
        }
        let untold = self.host_shutdown & !self.told_shutdown;
        if untold != 0 {
            self.told_shutdown |= untold;
            let packet = self.packet_of(Operation::Shutdown);
            return Some(Packet {
                flags: untold,
                ..packet
            });
        }
        self.due
            .credit_update
            .then(|| self.packet_of(Operation::CreditUpdate))
    }

    fn read_host(&mut self, room: &mut impl Sink) -> Option<Packet> {
        let max = (self.credit() as usize).min(limits::VSOCK_PACKET);
        loop {
            match room.receive(&self.stream, max) {
                Ok(0) => break self.host_shutdown |= SHUTDOWN_SEND,
                Ok(n) => {
                    // At most VSOCK_PACKET.
                    let len = n as u32;
                    self.tx_cnt += len;
                    let packet = self.packet_of(Operation::Data);
                    return Some(Packet { len, ..packet });
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    break self.readable = false;
                }
                // The peer closed without reading everything: an end like any other.
                Err(_) => break self.host_shutdown |= SHUTDOWN_BOTH,
            }
        }
        if self.hung_up && self.host_shutdown & SHUTDOWN_SEND != 0 {
            self.host_shutdown = SHUTDOWN_BOTH;
        }
        None
    }

    fn packet_of(&mut self, operation: Operation) -> Packet {
        self.told_fwd_cnt = self.fwd_cnt;
        self.due.credit_update = false;
        Packet {
            buf_alloc: limits::VSOCK_BUFFER as u32,
            fwd_cnt: self.fwd_cnt.0,
            ..Packet::new(self.ports, operation)
        }
    }
}
