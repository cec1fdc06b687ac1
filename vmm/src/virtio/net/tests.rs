//! The device on a real tap, in a network namespace of the test's own thread.

use std::net::UdpSocket;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::virtio::testing::{CountingInterrupt, DriverQueue, memory};
use crate::virtio::{Activation, SharedMemory, VirtioDevice};

const GUEST: Mac = [2, 0, 0, 0, 0, 2];
const GUEST_IP: [u8; 4] = [10, 9, 8, 2];
const HOST_IP: [u8; 4] = [10, 9, 8, 1];

/// A tap named `tap0` with `queues` queues, up and with an address, in a namespace that goes with the thread. `None`
/// where the test lacks the right to make it.
fn tap(queues: usize) -> Option<Vec<OwnedFd>> {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: needs root for a tap");
        return None;
    }
    // SAFETY: CLONE_NEWNET does not part descriptors.
    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) }.unwrap();
    let fds: Vec<OwnedFd> = (0..queues)
        .map(|_| {
            let file = std::fs::OpenOptions::new();
            let file = file
                .clone()
                .read(true)
                .write(true)
                .open("/dev/net/tun")
                .unwrap();
            // SAFETY: plain bytes.
            let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
            for (to, from) in request.ifr_name.iter_mut().zip(b"tap0") {
                *to = *from as libc::c_char;
            }
            let several = if queues > 1 { libc::IFF_MULTI_QUEUE } else { 0 };
            let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | several;
            request.ifr_ifru.ifru_flags = flags as libc::c_short;
            // SAFETY: TUNSETIFF reads and writes one `ifreq`.
            let made = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
            assert_eq!(made, 0, "{}", std::io::Error::last_os_error());
            file.into()
        })
        .collect();
    let set = |request: libc::c_ulong, value: libc::__c_anonymous_ifr_ifru| {
        // SAFETY: a socket of our own, and an `ifreq` that is filled for the request.
        unsafe {
            let socket = OwnedFd::from_raw_fd(libc::socket(libc::AF_INET, libc::SOCK_DGRAM, 0));
            let mut ifreq: libc::ifreq = std::mem::zeroed();
            for (to, from) in ifreq.ifr_name.iter_mut().zip(b"tap0") {
                *to = *from as libc::c_char;
            }
            ifreq.ifr_ifru = value;
            assert_eq!(
                libc::ioctl(socket.as_raw_fd(), request, &raw const ifreq),
                0
            );
        }
    };
    let address = |ip: [u8; 4]| {
        let mut address = libc::sockaddr {
            sa_family: libc::AF_INET as u16,
            sa_data: [0; 14],
        };
        for (to, from) in address.sa_data[2..].iter_mut().zip(ip) {
            *to = from as libc::c_char;
        }
        libc::__c_anonymous_ifr_ifru { ifru_addr: address }
    };
    set(libc::SIOCSIFADDR, address(HOST_IP));
    set(libc::SIOCSIFNETMASK, address([255, 255, 255, 0]));
    let flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    set(
        libc::SIOCSIFFLAGS,
        libc::__c_anonymous_ifr_ifru { ifru_flags: flags },
    );
    Some(fds)
}

/// A running device with one pair of queues, and the driver's side of it.
struct Rig {
    device: Net,
    memory: SharedMemory,
    receive: DriverQueue,
    transmit: DriverQueue,
    interrupt: Arc<CountingInterrupt>,
}

const RECEIVE_BUFFERS: u64 = 0x40_0000;
const TRANSMIT_BUFFERS: u64 = 0x80_0000;

impl Rig {
    fn start(features: u64, rate: Rate) -> Option<Self> {
        let taps = tap(1)?
            .into_iter()
            .map(|fd| Tap::new(fd).unwrap())
            .collect();
        let mut device = Net::new(GUEST, 1500, rate, taps);
        let memory = memory();
        let interrupt = CountingInterrupt::new();
        let (receive, r) = DriverQueue::new(&memory, 0, 0x10000, 256, interrupt.clone());
        let (transmit, t) = DriverQueue::new(&memory, 1, 0x30000, 256, interrupt.clone());
        device
            .activate(Activation {
                memory: memory.clone(),
                features,
                queues: vec![Some(r), Some(t)],
                interrupt: interrupt.clone(),
            })
            .unwrap();
        Some(Self {
            device,
            memory,
            receive,
            transmit,
            interrupt,
        })
    }

    fn offer_buffers(&mut self, count: u16, len: u32) {
        for index in 0..count {
            let at = RECEIVE_BUFFERS + u64::from(index) * 0x1000;
            self.receive.offer_chain(index, &[(at, len, true)]);
        }
        self.receive.kick();
    }

    fn send(&mut self, head: u16, frame: &[u8]) {
        let at = TRANSMIT_BUFFERS + u64::from(head) * 0x1000;
        self.memory
            .write_slice(&[0; HEADER], GuestAddress(at))
            .unwrap();
        let body = GuestAddress(at + HEADER as u64);
        self.memory.write_slice(frame, body).unwrap();
        let len = (HEADER + frame.len()) as u32;
        self.transmit.offer_chain(head, &[(at, len, false)]);
        self.transmit.kick();
    }

    /// Whole frames that came to the guest within `limit`, without headers, until `enough` says so.
    fn received(&mut self, limit: Duration, mut enough: impl FnMut(&[u8]) -> bool) -> bool {
        let end = Instant::now() + limit;
        while Instant::now() < end {
            let Some((head, len)) = self.receive.used() else {
                std::thread::sleep(Duration::from_millis(1));
                continue;
            };
            let mut bytes = vec![0; len as usize];
            let at = RECEIVE_BUFFERS + u64::from(head) * 0x1000;
            self.memory
                .read_slice(&mut bytes, GuestAddress(at))
                .unwrap();
            let mut buffers = [bytes[10], bytes[11]].map(u16::from)[0];
            let mut frame = bytes.split_off(HEADER);
            while buffers > 1 {
                let (head, len) = self.receive.used().expect("the rest of a merged frame");
                let mut more = vec![0; len as usize];
                let at = RECEIVE_BUFFERS + u64::from(head) * 0x1000;
                self.memory.read_slice(&mut more, GuestAddress(at)).unwrap();
                frame.extend(more);
                buffers -= 1;
            }
            if enough(&frame) {
                return true;
            }
        }
        false
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.device.reset();
    }
}

/// An ARP packet of the guest: 1 asks for the host's address, 2 tells the guest's own.
fn arp(operation: u8, source: Mac) -> Vec<u8> {
    let mut frame = [
        &[0xff; 6][..],
        &source,
        &[8, 6, 0, 1, 8, 0, 6, 4, 0, operation],
    ]
    .concat();
    frame.extend(source);
    frame.extend(GUEST_IP);
    frame.extend([0xff; 6]);
    frame.extend(HOST_IP);
    frame
}

#[test]
fn the_host_answers_the_guest_and_frames_in_small_buffers_are_merged() {
    let Some(mut rig) = Rig::start(feature::MRG_RXBUF, Rate::default()) else {
        return;
    };
    rig.offer_buffers(200, 64);
    rig.send(0, &arp(1, GUEST));
    let answered = rig.received(Duration::from_secs(10), |frame| {
        frame.len() >= 42 && frame[..6] == GUEST && frame[12..14] == [8, 6] && frame[21] == 2
    });
    assert!(answered, "no ARP answer came");
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
    let mut done = 0;
    while done < 60 {
        assert!(
            start.elapsed() < Duration::from_secs(20),
            "{done} frames went"
        );
        match rig.transmit.used() {
            Some(_) => done += 1,
            None => std::thread::sleep(Duration::from_millis(1)),
        }
    }
    // Ten at once, then a hundred a second.
    assert!(
        start.elapsed() >= Duration::from_millis(480),
        "{:?}",
        start.elapsed()
    );
}

#[test]
fn pairs_of_queues_are_turned_on_by_the_control_queue() {
    let Some(fds) = tap(2) else {
        return;
    };
    let taps = fds.into_iter().map(|fd| Tap::new(fd).unwrap()).collect();
    let mut device = Net::new(GUEST, 1500, Rate::default(), taps);
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
            memory: memory.clone(),
            features: feature::CTRL_VQ | feature::MQ,
            queues,
            interrupt,
        })
        .unwrap();
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
