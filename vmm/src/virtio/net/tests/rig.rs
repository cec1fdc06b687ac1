//! A driver over plain memory on one side, a real tap in a namespace of the test's own thread on the other.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};

use super::super::*;
use crate::virtio::testing::{CountingInterrupt, DriverQueue, memory};
use crate::virtio::{Activation, SharedMemory, VirtioDevice};

pub const GUEST: Mac = [2, 0, 0, 0, 0, 2];
const BOOT: Mac = [2, 0x62, 0x6b, 0, 0, 0];
const GUEST_IP: [u8; 4] = [10, 9, 8, 2];
const HOST_IP: [u8; 4] = [10, 9, 8, 1];

/// A tap named `tap0` with `queues` queues, up and with an address, in a namespace that goes with the thread. `None`
/// where the test lacks the right to make it.
pub fn tap(queues: usize) -> Option<Vec<OwnedFd>> {
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

/// A slot and its device with one pair of queues, and the driver's side of it.
pub struct Rig {
    pub slot: Arc<Slot>,
    pub device: Net,
    pub memory: SharedMemory,
    pub receive: DriverQueue,
    pub transmit: DriverQueue,
    pub interrupt: Arc<CountingInterrupt>,
}

pub const RECEIVE_BUFFERS: u64 = 0x40_0000;
pub const TRANSMIT_BUFFERS: u64 = 0x80_0000;

/// What fills a slot.
pub fn attachment(taps: Vec<OwnedFd>, rate: Rate) -> Attachment {
    Attachment {
        mac: GUEST,
        rate,
        taps,
        vhosts: Vec::new(),
    }
}

impl Rig {
    /// A running device of an empty slot.
    pub fn empty(features: u64) -> Self {
        Self::named("n0", features)
    }

    /// The same; the threads have the slot's name.
    pub fn named(id: &str, features: u64) -> Self {
        let slot = Slot::new(id, BOOT, 1, true);
        let mut device = Net::new(slot.clone());
        let memory = memory();
        let interrupt = CountingInterrupt::new();
        let (receive, transmit) = activate(&mut device, &memory, &interrupt, features);
        Self {
            slot,
            device,
            memory,
            receive,
            transmit,
            interrupt,
        }
    }

    /// With a tap in it; `None` where the test lacks the right to make one.
    pub fn start(features: u64, rate: Rate) -> Option<Self> {
        Self::start_named("n0", features, rate)
    }

    /// The same; the threads have the slot's name.
    pub fn start_named(id: &str, features: u64, rate: Rate) -> Option<Self> {
        let taps = tap(1)?;
        let rig = Self::named(id, features);
        rig.slot.attach(attachment(taps, rate)).unwrap();
        Some(rig)
    }

    /// As the driver does it: rings begin anew.
    pub fn reset(&mut self, features: u64) {
        self.device.reset();
        (self.receive, self.transmit) =
            activate(&mut self.device, &self.memory, &self.interrupt, features);
    }

    pub fn offer_buffers(&mut self, count: u16, len: u32) {
        for index in 0..count {
            let at = RECEIVE_BUFFERS + u64::from(index) * 0x1000;
            self.receive.offer_chain(index, &[(at, len, true)]);
        }
        self.receive.kick();
    }

    pub fn send(&mut self, head: u16, frame: &[u8]) {
        self.send_with([0; HEADER], head, frame);
    }

    pub fn send_with(&mut self, header: [u8; HEADER], head: u16, frame: &[u8]) {
        let at = TRANSMIT_BUFFERS + u64::from(head) * 0x1000;
        self.memory.write_slice(&header, GuestAddress(at)).unwrap();
        let body = GuestAddress(at + HEADER as u64);
        self.memory.write_slice(frame, body).unwrap();
        let len = (HEADER + frame.len()) as u32;
        self.transmit.offer_chain(head, &[(at, len, false)]);
        self.transmit.kick();
    }

    /// Waits until `count` frames of the guest were given back.
    pub fn sent(&mut self, count: usize) {
        let end = Instant::now() + Duration::from_secs(20);
        let mut done = 0;
        while done < count {
            assert!(Instant::now() < end, "{done} of {count} frames came back");
            match self.transmit.used() {
                Some(_) => done += 1,
                None => std::thread::sleep(Duration::from_millis(1)),
            }
        }
    }

    /// Whole frames that came to the guest within `limit`, without headers, until `enough` says so.
    pub fn received(&mut self, limit: Duration, mut enough: impl FnMut(&[u8]) -> bool) -> bool {
        let end = Instant::now() + limit;
        while Instant::now() < end {
            let Some((head, len)) = self.receive.used() else {
                std::thread::sleep(Duration::from_millis(1));
                continue;
            };
            let bytes = self.buffer(head, len);
            let buffers = u16::from_le_bytes([bytes[10], bytes[11]]);
            let mut frame = bytes[HEADER..].to_vec();
            for _ in 1..buffers {
                let (head, len) = self.receive.used().expect("the rest of a merged frame");
                frame.extend(self.buffer(head, len));
            }
            if enough(&frame) {
                return true;
            }
        }
        false
    }

    fn buffer(&self, head: u16, len: u32) -> Vec<u8> {
        let mut bytes = vec![0; len as usize];
        let at = RECEIVE_BUFFERS + u64::from(head) * 0x1000;
        self.memory
            .read_slice(&mut bytes, GuestAddress(at))
            .unwrap();
        bytes
    }

    /// The host answers an ARP request that is sent with descriptor `head`.
    pub fn is_answered(&mut self, head: u16) -> bool {
        self.send(head, &arp(1, GUEST));
        self.received(Duration::from_secs(10), |frame| {
            frame.len() >= 42 && frame[..6] == GUEST && frame[12..14] == [8, 6] && frame[21] == 2
        })
    }
}

fn activate(
    device: &mut Net,
    memory: &SharedMemory,
    interrupt: &Arc<CountingInterrupt>,
    features: u64,
) -> (DriverQueue, DriverQueue) {
    // The driver clears its rings.
    memory
        .write_slice(&[0; 0x40000], GuestAddress(0x10000))
        .unwrap();
    let (receive, r) = DriverQueue::new(memory, 0, 0x10000, 256, interrupt.clone());
    let (transmit, t) = DriverQueue::new(memory, 1, 0x30000, 256, interrupt.clone());
    device
        .activate(Activation {
            features,
            queues: vec![Some(r), Some(t)],
            interrupt: interrupt.clone(),
        })
        .unwrap();
    (receive, transmit)
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.device.reset();
    }
}

/// An ARP packet of the guest: 1 asks for the host's address, 2 tells the guest's own.
pub fn arp(operation: u8, source: Mac) -> Vec<u8> {
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
