//! The device on a real tap.

mod hostile;
mod rig;
mod slots;
mod vhost;

use std::net::UdpSocket;
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};

use self::rig::*;
use super::*;
use crate::limits;
use crate::virtio::testing::{CountingInterrupt, DriverQueue, memory};
use crate::virtio::{Activation, VirtioDevice};

#[test]
fn the_host_answers_the_guest_and_frames_in_small_buffers_are_merged() {
    let Some(mut rig) = Rig::start(feature::MRG_RXBUF, Rate::default()) else {
        return;
    };
    rig.offer_buffers(200, 64);
    assert!(rig.is_answered(0), "no ARP answer came");
    assert_eq!(rig.transmit.used(), Some((0, 0)));

    // The host knows the guest's address by now: a datagram of 1000 bytes spans 17 buffers.
    let socket = UdpSocket::bind("10.9.8.1:0").unwrap();
    let payload: Vec<u8> = (0..1000u32).map(|n| n as u8).collect();
    socket.send_to(&payload, "10.9.8.2:7").unwrap();
    let whole = rig.received(Duration::from_secs(10), |frame| frame.ends_with(&payload));
    assert!(whole, "the datagram did not come");
    assert!(rig.interrupt.used.load(std::sync::atomic::Ordering::SeqCst) > 0);
}

#[test]
fn a_frame_with_another_source_or_without_a_header_is_dropped_and_the_next_one_goes() {
    let Some(mut rig) = Rig::start(0, Rate::default()) else {
        return;
    };
    rig.offer_buffers(100, 2048);
    rig.send(0, &arp(1, [2, 0, 0, 0, 0, 3]));
    let stranger = [2, 0, 0, 0, 0, 3];
    let answered = rig.received(Duration::from_millis(300), |frame| frame[..6] == stranger);
    assert!(!answered, "the host saw a forged source");
    rig.transmit.offer_chain(1, &[(TRANSMIT_BUFFERS, 5, false)]);
    rig.transmit.offer_chain(2, &[(TRANSMIT_BUFFERS, 64, true)]);
    rig.transmit
        .offer_chain(3, &[(TRANSMIT_BUFFERS, 1 << 20, false)]);
    rig.send(4, &arp(1, GUEST));
    assert!(rig.received(Duration::from_secs(10), |frame| frame[..6] == GUEST));
    let used: Vec<_> = std::iter::from_fn(|| rig.transmit.used()).collect();
    assert_eq!(used, [(0, 0), (1, 0), (2, 0), (3, 0), (4, 0)]);
}

#[test]
fn a_frame_waits_for_buffers_and_a_too_large_one_is_dropped() {
    let Some(mut rig) = Rig::start(0, Rate::default()) else {
        return;
    };
    rig.send(0, &arp(2, GUEST));
    rig.send(1, &arp(1, GUEST));
    std::thread::sleep(Duration::from_millis(200));
    rig.offer_buffers(50, 128);
    assert!(rig.received(Duration::from_secs(10), |frame| frame[..6] == GUEST));
    let socket = UdpSocket::bind("10.9.8.1:0").unwrap();
    socket.send_to(&[7; 1000], "10.9.8.2:7").unwrap();
    socket.send_to(b"small", "10.9.8.2:7").unwrap();
    let mut large = false;
    let small = rig.received(Duration::from_secs(10), |frame| {
        large |= frame.len() > 500;
        frame.ends_with(b"small")
    });
    assert!(small && !large);
}

#[test]
fn a_rate_holds_the_guest_back_and_nothing_is_lost() {
    let rate = Rate {
        frames: 100,
        ..Rate::default()
    };
    let Some(mut rig) = Rig::start(0, rate) else {
        return;
    };
    let start = Instant::now();
    for head in 0..60 {
        rig.send(head, &arp(2, GUEST));
    }
    rig.sent(60);
    // Ten at once, then a hundred a second.
    assert!(
        start.elapsed() >= Duration::from_millis(480),
        "{:?}",
        start.elapsed()
    );
}

#[test]
fn a_rate_holds_what_comes_for_the_guest_back_and_nothing_is_lost() {
    let rate = Rate {
        bytes: 100_000,
        ..Rate::default()
    };
    let Some(mut rig) = Rig::start(0, rate) else {
        return;
    };
    rig.offer_buffers(200, 2048);
    assert!(rig.is_answered(0));
    let socket = UdpSocket::bind("10.9.8.1:0").unwrap();
    let start = Instant::now();
    for number in 0..60u8 {
        socket.send_to(&[number; 958], "10.9.8.2:7").unwrap();
    }
    let mut next = 0;
    let all = rig.received(Duration::from_secs(20), |frame| {
        next += u8::from(frame.ends_with(&[next; 958]));
        next == 60
    });
    assert!(all, "{next} came");
    // 60,000 bytes with their headers: ten thousand at once, then a hundred thousand a second.
    let took = start.elapsed();
    assert!(took >= Duration::from_millis(480), "{took:?}");
}

#[test]
fn pairs_of_queues_are_turned_on_by_the_control_queue() {
    let Some(taps) = tap(2) else {
        return;
    };
    let slot = Slot::new("n0", GUEST, 2, false);
    let mut device = Net::new(slot.clone());
    assert_eq!(device.queue_sizes(), [256, 256, 256, 256, 64]);
    let memory = memory();
    let interrupt = CountingInterrupt::new();
    let mut drivers = Vec::new();
    let mut queues = Vec::new();
    for index in 0..5 {
        let at = 0x10000 + u64::from(index) * 0x10000;
        let size = if index == 4 { 64 } else { 256 };
        let (driver, queue) = DriverQueue::new(&memory, index, at, size, interrupt.clone());
        drivers.push(driver);
        queues.push(Some(queue));
    }
    device
        .activate(Activation {
            features: feature::CTRL_VQ | feature::MQ,
            queues,
            interrupt,
        })
        .unwrap();
    slot.attach(attachment(taps, Rate::default())).unwrap();
    let control = drivers.last_mut().unwrap();
    for (head, (pairs, answer)) in [(2u8, 0u8), (2, 0), (1, 0), (3, 1), (0, 1)]
        .iter()
        .enumerate()
    {
        let (head, at) = (head as u16 * 2, 0x60_0000);
        memory
            .write_slice(&[4, 0, *pairs, 0, 0xee], GuestAddress(at))
            .unwrap();
        control.offer_chain(head, &[(at, 4, false), (at + 4, 1, true)]);
        control.kick();
        let end = Instant::now() + Duration::from_secs(10);
        while control.used().is_none() {
            assert!(Instant::now() < end, "no answer");
            std::thread::sleep(Duration::from_millis(1));
        }
        let got: u8 = memory.read_obj(GuestAddress(at + 4)).unwrap();
        assert_eq!(got, *answer, "{pairs} pairs");
    }
    device.reset();
}

#[test]
fn only_a_tap_with_the_header_is_taken() {
    let null = std::fs::File::open("/dev/null").unwrap();
    assert!(matches!(Tap::new(null.into()), Err(TapError::NoTap(..))));
}
