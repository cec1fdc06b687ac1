//! Vsock packets: forged names, credit that was not given, storms, and buffers that are never taken.

use crate::device::{Device, VSOCK, WRITE};
use crate::machine::{Random, zeros};
use crate::{breach, done};

const RECEIVE: u32 = 0;
const TRANSMIT: u32 = 1;
const REQUEST: u16 = 1;
const RESPONSE: u16 = 2;
const RESET: u16 = 3;
const SHUTDOWN: u16 = 4;
const DATA: u16 = 5;
/// Where the shim listens until it was told that the guest is ready, and where the resolver is.
const PORTS: [u32; 2] = [1026, 1028];
const HEADER: usize = 44;

/// A header from this guest to a port of the host.
pub fn packet(cid: u64, host: u32, operation: u16, guest: u32, len: u32) -> [u8; HEADER] {
    let mut bytes = zeros::<HEADER>();
    bytes[..8].copy_from_slice(&cid.to_le_bytes());
    bytes[8] = 2;
    bytes[16..20].copy_from_slice(&guest.to_le_bytes());
    bytes[20..24].copy_from_slice(&host.to_le_bytes());
    bytes[24..28].copy_from_slice(&len.to_le_bytes());
    bytes[28] = 1;
    bytes[30..32].copy_from_slice(&operation.to_le_bytes());
    bytes[36..40].copy_from_slice(&(256u32 << 10).to_le_bytes());
    bytes
}

fn send(device: &Device, packet: &[u8; HEADER]) {
    if !device.request(TRANSMIT, packet, 0) {
        breach("a packet was not taken", packet[30].into());
    }
}

/// All of them.
pub fn attack(device: &Device) {
    let ended = |name| done(VSOCK, name, device.lives());
    for cid in [0, 1, 2, 4, u64::from(u32::MAX), u64::MAX] {
        device.start();
        send(device, &packet(cid, PORTS[0], REQUEST, 1, 0));
        ended("a forged address");
    }
    device.start();
    for operation in 0..24 {
        for port in PORTS {
            send(device, &packet(3, port, operation, operation.into(), 0));
            let mut other = packet(3, port, operation, operation.into(), 0);
            other[28] = 2;
            send(device, &other);
        }
    }
    ended("every operation and type");

    // No buffer to receive: answers can only wait.
    device.start();
    for guest in 0..400 {
        send(device, &packet(3, PORTS[0], REQUEST, guest, 0));
        send(device, &packet(3, PORTS[0], RESET, guest, 0));
    }
    ended("connections that come and go, and no answer is taken");
    device.start();
    for guest in 0..300 {
        send(device, &packet(3, PORTS[1], REQUEST, guest, 0));
    }
    ended("a storm of connections");
    device.start();
    for port in 0..300 {
        send(device, &packet(3, port, REQUEST, 7, 0));
        send(device, &packet(3, port, DATA, 7, 0));
    }
    ended("every port");

    device.start();
    send(device, &packet(3, PORTS[0], REQUEST, 5, 0));
    for len in [1, 45, 0x1_0000, 0x1_0001, 0x7fff_ffff, u32::MAX] {
        send(device, &packet(3, PORTS[0], DATA, 5, len));
        send(device, &packet(3, PORTS[0], REQUEST, 5, 0));
    }
    ended("data that is not there");
    overrun(device);
    ended("more data than credit");
    device.start();
    for flags in [1u8, 2, 3, 0xff] {
        send(device, &packet(3, PORTS[0], REQUEST, flags.into(), 0));
        send(device, &packet(3, PORTS[0], REQUEST, flags.into(), 0));
        send(device, &packet(3, PORTS[0], RESPONSE, flags.into(), 0));
        let mut shut = packet(3, PORTS[0], SHUTDOWN, flags.into(), 0);
        shut[32] = flags;
        send(device, &shut);
        send(device, &packet(3, PORTS[0], DATA, flags.into(), 0));
    }
    ended("half-closes and names used twice");
    // Room for no header, and for a header alone.
    for room in [1, 43, 44] {
        device.start();
        for index in 0..32 {
            device.descriptor(RECEIVE, index, crate::device::ROOM, room, WRITE, 0);
            device.offer(RECEIVE, index);
        }
        send(device, &packet(3, 9, REQUEST, 1, 0));
        ended("receive buffers too short");
    }
    let mut random = Random(0x2545_f491_4f6c_dd1d);
    device.start();
    for _ in 0..300 {
        let mut any = packet(
            3,
            PORTS[(random.next() & 1) as usize],
            (random.next() % 9) as u16,
            1,
            0,
        );
        any[16] = random.next() as u8 & 3;
        any[24..28].copy_from_slice(&(random.next() as u32 % 70_000).to_le_bytes());
        any[32] = random.next() as u8 & 3;
        any[36..40].copy_from_slice(&(random.next() as u32).to_le_bytes());
        any[40..44].copy_from_slice(&(random.next() as u32).to_le_bytes());
        send(device, &any);
    }
    ended("packets at random");
}

/// Sixteen times what the device's buffer holds, each with data, whether it is taken or not.
fn overrun(device: &Device) {
    device.start();
    send(device, &packet(3, PORTS[1], REQUEST, 6, 0));
    let len = 0xf000u32;
    for _ in 0..64 {
        crate::machine::put(crate::device::DATA, &packet(3, PORTS[1], DATA, 6, len));
        if !device.request_at(TRANSMIT, crate::device::DATA, HEADER as u32 + len, 0) {
            breach("data was not taken", 0);
        }
    }
}
