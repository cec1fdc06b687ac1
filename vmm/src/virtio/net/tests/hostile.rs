//! A guest that means harm: what it sends reaches nobody, the next honest frame goes, and no thread works in vain.

use super::*;
use crate::virtio::testing::write_descriptor;

/// Frames that the tap took from the guest.
fn frames_of_the_guest() -> u64 {
    let table = std::fs::read_to_string("/proc/thread-self/net/dev").unwrap();
    let line = table.lines().find(|line| line.trim().starts_with("tap0:"));
    let mut fields = line.unwrap().split_whitespace();
    fields.nth(2).unwrap().parse().unwrap()
}

/// Clock ticks (10 ms) that the threads of slot `id` work within half a second in which nobody wakes them.
fn ticks_at_rest(id: &str) -> u64 {
    let ticks = || {
        let mut sum = 0;
        for task in std::fs::read_dir("/proc/self/task").unwrap().flatten() {
            let read = |file| std::fs::read_to_string(task.path().join(file)).unwrap_or_default();
            if read("comm").trim_end().starts_with(id) {
                let stat = read("stat");
                let fields = stat.rsplit(')').next().unwrap().split_whitespace();
                let times = fields.skip(11).take(2);
                sum += times.map(|n| n.parse::<u64>().unwrap()).sum::<u64>();
            }
        }
        sum
    };
    std::thread::sleep(Duration::from_millis(200));
    let before = ticks();
    std::thread::sleep(Duration::from_millis(500));
    ticks() - before
}

#[test]
fn malformed_frames_reach_nobody_and_the_next_one_goes() {
    let all = feature::CSUM | feature::HOST_TSO4 | feature::HOST_TSO6 | feature::MRG_RXBUF;
    let Some(mut rig) = Rig::start(all, Rate::default()) else {
        return;
    };
    rig.offer_buffers(200, 2048);
    let honest = arp(2, GUEST);
    let before = frames_of_the_guest();
    let mut count = 0;
    // Truncated: from nothing to a byte less than an Ethernet header.
    for len in 0..(HEADER + ETHERNET) as u32 {
        rig.transmit
            .offer_chain(0, &[(TRANSMIT_BUFFERS, len, false)]);
        count += 1;
    }
    // Giant: one byte more than the limit, and as much as a chain can hold.
    let most = limits::NET_FRAME as u32;
    rig.transmit
        .offer_chain(0, &[(TRANSMIT_BUFFERS, most + 1, false)]);
    let indirect = 0xc0_0000;
    for index in 0..1000u16 {
        let (at, last) = (indirect + u64::from(index) * 16, index == 999);
        let next = if last { 0 } else { 1 };
        write_descriptor(&rig.memory, at, TRANSMIT_BUFFERS, 1 << 22, next, index + 1);
    }
    rig.transmit.descriptor(0, indirect, 16000, 4, 0);
    rig.transmit.offer(0);
    // Nothing to read at all.
    rig.transmit.offer_chain(0, &[(TRANSMIT_BUFFERS, 64, true)]);
    count += 3;
    rig.transmit.kick();
    rig.sent(count);
    // Headers that lie, sources that are another's.
    let headers: [[u8; HEADER]; 6] = [
        [1, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0],
        [1, 0, 0, 0, 0, 0, 34, 0, 16, 0, 0, 0],
        [1, 1, 0xff, 0xff, 1, 0, 14, 0, 0, 0, 0, 0],
        [1, 3, 20, 0, 1, 0, 14, 0, 0, 0, 0, 0],
        [0, 0xff, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        [1, 4, 20, 0, 0, 0, 14, 0, 0, 0, 0, 0],
    ];
    for header in headers {
        rig.send_with(header, 1, &honest);
    }
    for last in 0..=255 {
        if last != GUEST[5] {
            rig.send(2, &arp(2, [2, 0, 0, 0, 0, last]));
            rig.sent(1);
        }
    }
    rig.sent(headers.len());
    assert_eq!(frames_of_the_guest(), before);
    assert!(rig.is_answered(3));
    assert_eq!(frames_of_the_guest(), before + 1);
}

#[test]
fn a_frame_of_the_largest_size_passes_with_its_segments_still_to_be_cut() {
    let features = feature::CSUM | feature::HOST_TSO4 | feature::MRG_RXBUF;
    let Some(mut rig) = Rig::start(features, Rate::default()) else {
        return;
    };
    let before = frames_of_the_guest();
    let mut frame = [&[0xff; 6][..], &GUEST, &[8, 0, 0x45, 0]].concat();
    frame.extend(65535u16.to_be_bytes());
    frame.extend([0, 0, 0, 0, 64, 6, 0, 0, 10, 9, 8, 2, 10, 9, 8, 1]);
    // A TCP header, and data up to the 65535 bytes of an IP packet.
    frame.extend([0, 7, 0, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0x50, 0x10, 0xff, 0xff]);
    frame.resize(14 + 65535, 0);
    let mut header = [1, 1, 54, 0, 0, 0, 34, 0, 16, 0, 0, 0];
    header[4..6].copy_from_slice(&1460u16.to_le_bytes());
    rig.send_with(header, 0, &frame);
    rig.sent(1);
    assert_eq!(frames_of_the_guest(), before + 1);
}

#[test]
fn a_guest_without_receive_buffers_costs_no_work_and_still_sends() {
    let id = "idle-receive";
    let Some(mut rig) = Rig::start_named(id, feature::MRG_RXBUF, Rate::default()) else {
        return;
    };
    // The host learns the guest's address, then has more for it than the tap's queue holds.
    rig.send(0, &arp(2, GUEST));
    rig.send(1, &arp(1, GUEST));
    rig.sent(2);
    let socket = UdpSocket::bind("10.9.8.1:0").unwrap();
    for _ in 0..3000 {
        let _ = socket.send_to(&[7; 1000], "10.9.8.2:7");
    }
    assert!(ticks_at_rest(id) <= 5);
    rig.send(2, &arp(2, GUEST));
    rig.sent(1);
    rig.offer_buffers(200, 2048);
    assert!(rig.received(Duration::from_secs(10), |frame| frame[..6] == GUEST));
}

#[test]
fn buffers_too_small_for_a_frame_cost_no_work_until_more_come() {
    let id = "small-buffers";
    let Some(mut rig) = Rig::start_named(id, feature::MRG_RXBUF, Rate::default()) else {
        return;
    };
    rig.offer_buffers(4, 2048);
    assert!(rig.is_answered(0));
    // A device without its driver's buffers but for a few, of 100 bytes each.
    rig.reset(feature::MRG_RXBUF);
    rig.offer_buffers(3, 100);
    let socket = UdpSocket::bind("10.9.8.1:0").unwrap();
    let payload = [7; 1000];
    socket.send_to(&payload, "10.9.8.2:7").unwrap();
    assert!(ticks_at_rest(id) <= 5);
    for index in 3..20 {
        let at = RECEIVE_BUFFERS + u64::from(index) * 0x1000;
        rig.receive.offer_chain(index, &[(at, 100, true)]);
    }
    rig.receive.kick();
    assert!(rig.received(Duration::from_secs(10), |frame| frame.ends_with(&payload)));
}

#[test]
fn resets_without_end_leave_the_hosts_network_alone_in_between() {
    let Some(mut rig) = Rig::start(0, Rate::default()) else {
        return;
    };
    // What stays as it is needs no setting; the first was the attachment's.
    let mut took = |features: [u64; 2]| {
        let start = Instant::now();
        for index in 0..6 {
            rig.reset(features[index % 2]);
        }
        start.elapsed()
    };
    let csum = feature::CSUM;
    assert!(took([csum, 0]) >= limits::NET_PAIRS_REST * 5);
    assert!(took([0, 0]) < limits::NET_PAIRS_REST * 5);
}

#[test]
fn a_guest_over_its_rate_costs_no_work() {
    let id = "idle-rate";
    let rate = Rate {
        frames: 10,
        ..Rate::default()
    };
    let Some(mut rig) = Rig::start_named(id, 0, rate) else {
        return;
    };
    for head in 0..200 {
        rig.send(head, &arp(2, GUEST));
    }
    assert!(ticks_at_rest(id) <= 5);
}

#[test]
fn a_tap_that_is_deleted_under_the_device_costs_no_work_and_can_be_replaced() {
    let id = "deleted-tap";
    let Some(mut rig) = Rig::start_named(id, feature::MRG_RXBUF, Rate::default()) else {
        return;
    };
    let mut delete = std::process::Command::new("ip");
    match delete.args(["link", "delete", "tap0"]).status() {
        Ok(status) => assert!(status.success()),
        Err(error) => return eprintln!("skipped: ip: {error}"),
    }
    rig.send(0, &arp(2, GUEST));
    rig.sent(1);
    assert!(ticks_at_rest(id) <= 5);
    rig.slot.detach().unwrap();
    let taps = tap(1).unwrap();
    rig.slot.attach(attachment(taps, Rate::default())).unwrap();
    rig.offer_buffers(100, 2048);
    assert!(rig.is_answered(1));
}

#[test]
fn receive_buffers_that_hold_nothing_lose_the_frame_and_end_nothing() {
    let Some(mut rig) = Rig::start(feature::MRG_RXBUF, Rate::default()) else {
        return;
    };
    // Empty, not for writing, and of a byte each: none of them holds a frame.
    for head in 0..limits::NET_BUFFERS as u16 {
        let (len, write) = [(0, true), (64, false), (1, true)][usize::from(head % 3)];
        rig.receive
            .offer_chain(head, &[(RECEIVE_BUFFERS, len, write)]);
    }
    rig.receive.kick();
    rig.send(0, &arp(2, GUEST));
    rig.send(1, &arp(1, GUEST));
    rig.sent(2);
    assert!(!rig.received(Duration::from_millis(200), |_| true));
    rig.reset(feature::MRG_RXBUF);
    rig.offer_buffers(100, 2048);
    assert!(rig.is_answered(0));
}

#[test]
fn a_broken_ring_stops_its_device_until_the_driver_resets_it() {
    for fill_first in [true, false] {
        let id = if fill_first { "broken-1" } else { "broken-2" };
        let mut rig = Rig::named(id, 0);
        if fill_first {
            let Some(taps) = tap(1) else {
                return;
            };
            rig.slot.attach(attachment(taps, Rate::default())).unwrap();
        }
        // More available than the ring holds.
        rig.memory
            .write_obj(40_000u16, GuestAddress(0x38002))
            .unwrap();
        rig.transmit.kick();
        assert!(ticks_at_rest(id) <= 5);
        if fill_first {
            rig.slot.detach().unwrap();
        }
        let Some(taps) = tap(1) else {
            return;
        };
        rig.slot.attach(attachment(taps, Rate::default())).unwrap();
        rig.reset(0);
        rig.offer_buffers(100, 2048);
        assert!(rig.is_answered(0));
    }
}

#[test]
fn nonsense_on_the_control_queue_is_answered_with_an_error_and_changes_nothing() {
    let slot = Slot::new("n0", GUEST, 2, false);
    let mut device = Net::new(slot);
    let memory = memory();
    let interrupt = CountingInterrupt::new();
    let (mut control, queue) = DriverQueue::new(&memory, 4, 0x50000, 64, interrupt.clone());
    let pair = |index: u16| {
        let at = 0x10000 + u64::from(index) * 0x10000;
        let queue = DriverQueue::new(&memory, index, at, 256, interrupt.clone()).1;
        Some(queue)
    };
    let queues = vec![pair(0), pair(1), pair(2), pair(3), Some(queue)];
    let features = feature::CTRL_VQ | feature::MQ;
    let activation = Activation {
        features,
        queues,
        interrupt,
    };
    device.activate(activation).unwrap();
    let at = 0x60_0000;
    let mut ask = |buffers: &[(u64, u32, bool)], message: &[u8]| {
        memory.write_slice(message, GuestAddress(at)).unwrap();
        memory.write_obj(0xeeu8, GuestAddress(at + 64)).unwrap();
        control.offer_chain(0, buffers);
        control.kick();
        let end = Instant::now() + Duration::from_secs(10);
        let written = loop {
            match control.used() {
                Some((_, written)) => break written,
                None => assert!(Instant::now() < end, "no answer"),
            }
        };
        let answer: u8 = memory.read_obj(GuestAddress(at + 64)).unwrap();
        (written, answer)
    };
    let answered = [(at, 4, false), (at + 64, 1, true)];
    for class in 0..=255u8 {
        let commands = if class == 4 { 1..=255u8 } else { 0..=255 };
        for command in commands.step_by(17) {
            assert_eq!(ask(&answered, &[class, command, 1, 0]), (1, 1), "{class}");
        }
    }
    assert_eq!(ask(&answered, &[4, 0, 0xff, 0xff]), (1, 1));
    // Too short, no room for an answer, nothing at all, far too long.
    assert_eq!(ask(&[(at, 3, false), answered[1]], &[4, 0, 1]), (1, 1));
    assert_eq!(ask(&[(at, 4, false)], &[4, 0, 1, 0]), (0, 0xee));
    assert_eq!(ask(&[(at, 0, false)], &[]), (0, 0xee));
    assert_eq!(ask(&[(at + 64, 1, true)], &[]), (1, 1));
    let long = [(at, 1 << 20, false), (at + (2 << 20), 1, true)];
    assert_eq!(ask(&long, &[9; 8]), (1, 0xee));
    assert_eq!(ask(&answered, &[4, 0, 2, 0]), (1, 0));
    device.reset();
}
