//! A virtio-mmio device, its queues at fixed places, and honest requests that show whether it lives.

use crate::machine::{clear, put, read, ticks, write, zeros};

/// A network interface.
pub const NET: u32 = 1;
/// Entropy.
pub const RNG: u32 = 4;
/// Sockets.
pub const VSOCK: u32 = 19;
/// Files.
pub const FS: u32 = 26;

/// VIRTQ_DESC_F_NEXT.
pub const NEXT: u16 = 1;
/// VIRTQ_DESC_F_WRITE.
pub const WRITE: u16 = 2;
/// VIRTQ_DESC_F_INDIRECT.
pub const INDIRECT: u16 = 4;

/// Size that queues are given; those that are attacked offer at least as much.
pub const SIZE: u16 = 64;
/// Buffers begin here: requests, then room for answers.
pub const DATA: u64 = 0x180_0000;
/// Room for answers.
pub const ROOM: u64 = DATA + 0x20_0000;
/// No memory is here on either engine.
pub const HOLE: u64 = 0xc800_0000;

const DRIVER_OK: u32 = 15;
const PATIENCE: u64 = 2_000_000_000;

/// See the module.
pub struct Device {
    /// Its registers.
    pub base: u64,
    /// Its type.
    pub kind: u32,
    /// The registers are our VMM's, not the emulator's.
    pub ours: bool,
}

/// Where the queue's descriptors are; the available ring and the used ring follow.
pub fn ring(queue: u32) -> u64 {
    0x100_0000 + u64::from(queue) * 0x1_0000
}

/// The available ring.
pub fn avail(queue: u32) -> u64 {
    ring(queue) + 0x4000
}

/// The used ring.
pub fn used(queue: u32) -> u64 {
    ring(queue) + 0x8000
}

/// The first device of each kind: where our VMM has them, and where the emulator has.
pub fn all() -> impl Iterator<Item = Device> {
    let ours = (0..16).map(|n| (0xd000_0000 + n * 0x1000, true));
    let emulators = (0..24).map(|n| (0xfeb0_0000 + n * 0x200, false));
    let mut seen = 0u64;
    ours.chain(emulators).filter_map(move |(base, ours)| {
        let kind = read::<u32>(base + 8);
        let there = read::<u32>(base) == 0x7472_6976 && kind != 0 && seen >> (kind & 63) & 1 == 0;
        if there {
            seen |= 1 << (kind & 63);
        }
        there.then_some(Device { base, kind, ours })
    })
}

impl Device {
    /// Reads a register.
    pub fn get(&self, register: u64) -> u32 {
        read(self.base + register)
    }

    /// Writes a register.
    pub fn set(&self, register: u64, value: u32) {
        write(self.base + register, value);
    }

    /// Resets the device and negotiates up to FEATURES_OK.
    pub fn begin(&self) {
        self.set(0x70, 0);
        let end = ticks() + PATIENCE;
        while self.get(0x70) != 0 && ticks() < end {}
        self.set(0x70, 1);
        self.set(0x70, 3);
        for (half, wanted) in [(0, 1 << 28), (1, 1)] {
            self.set(0x14, half);
            let offered = self.get(0x10);
            self.set(0x24, half);
            self.set(0x20, offered & wanted);
        }
        self.set(0x70, 11);
    }

    /// Sets one queue up at three addresses.
    pub fn queue(&self, queue: u32, size: u32, places: [u64; 3]) {
        self.set(0x30, queue);
        self.set(0x38, size);
        let [descriptors, avail, used] = places;
        self.set_place(0x80, descriptors);
        self.set_place(0x90, avail);
        self.set_place(0xa0, used);
        self.set(0x44, 1);
    }

    fn set_place(&self, register: u64, place: u64) {
        self.set(register, place as u32);
        self.set(register + 4, (place >> 32) as u32);
    }

    /// How many queues there are.
    pub fn queues(&self) -> u32 {
        let has = |queue: &u32| {
            self.set(0x30, *queue);
            self.get(0x34) != 0
        };
        (0..4).take_while(has).count() as u32
    }

    /// An honest driver's beginning.
    pub fn start(&self) {
        self.begin();
        for queue in 0..self.queues() {
            clear(ring(queue), u64::from(SIZE) * 16);
            clear(avail(queue), u64::from(SIZE) * 2 + 8);
            clear(used(queue), u64::from(SIZE) * 8 + 8);
            self.queue(queue, SIZE.into(), [ring(queue), avail(queue), used(queue)]);
        }
        self.set(0x70, DRIVER_OK);
    }

    /// Writes a descriptor of a queue.
    pub fn descriptor(
        &self,
        queue: u32,
        index: u16,
        address: u64,
        len: u32,
        flags: u16,
        next: u16,
    ) {
        descriptor(
            ring(queue) + u64::from(index) * 16,
            address,
            len,
            flags,
            next,
        );
    }

    /// Makes a head available and kicks.
    pub fn offer(&self, queue: u32, head: u16) {
        let index: u16 = read(avail(queue) + 2);
        write(avail(queue) + 4 + u64::from(index % SIZE) * 2, head);
        write(avail(queue) + 2, index.wrapping_add(1));
        self.set(0x50, queue);
    }

    /// Waits until the used ring is at `index`.
    pub fn wait(&self, queue: u32, index: u16) -> bool {
        let end = ticks() + PATIENCE;
        while ticks() < end {
            if read::<u16>(used(queue) + 2) == index {
                return true;
            }
        }
        false
    }

    /// Sends bytes and gives room for an answer, as an honest driver does; whether the device gave them back.
    pub fn request(&self, queue: u32, bytes: &[u8], room: u32) -> bool {
        put(DATA, bytes);
        self.request_at(queue, DATA, bytes.len() as u32, room)
    }

    /// The same with what is in memory already.
    pub fn request_at(&self, queue: u32, at: u64, len: u32, room: u32) -> bool {
        let before: u16 = read(used(queue) + 2);
        match (len, room) {
            (0, room) => self.descriptor(queue, 0, ROOM, room, WRITE, 0),
            (len, 0) => self.descriptor(queue, 0, at, len, 0, 0),
            (len, room) => {
                self.descriptor(queue, 0, at, len, NEXT, 1);
                self.descriptor(queue, 1, ROOM, room, WRITE, 0);
            }
        }
        self.offer(queue, 0);
        self.wait(queue, before.wrapping_add(1))
    }

    /// After a reset, an honest request is answered.
    pub fn lives(&self) -> bool {
        self.start();
        match self.kind {
            RNG => self.request(0, &[], 16),
            // A packet to a port where nobody listens.
            VSOCK => self.request(1, &crate::sockets::packet(3, 9, 3, 0, 0), 0),
            FS => crate::files::begin(self),
            NET => self.request(1, &zeros::<72>(), 0),
            _ => true,
        }
    }
}

/// Writes a descriptor anywhere.
pub fn descriptor(at: u64, address: u64, len: u32, flags: u16, next: u16) {
    write(at, address);
    write(at + 8, len);
    write(at + 12, flags);
    write(at + 14, next);
}
