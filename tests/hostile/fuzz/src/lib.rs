//! What the fuzz targets share: a driver over plain memory that is honest where it helps to get deep, and hostile
//! everywhere else. One target a device; see `run`.

pub mod files;
mod peers;

use std::sync::Arc;
use std::time::{Duration, Instant};

use arbitrary::Arbitrary;
use bulkhead_vmm::bus::BusDevice;
use bulkhead_vmm::virtio::transport::mmio::MmioTransport;
use bulkhead_vmm::virtio::{GrowingMemory, SharedMemory};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// Devices that are driven.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Entropy.
    Rng,
    /// Reports of free memory.
    Balloon,
    /// A disk.
    Block,
    /// A network interface on a tap.
    Net,
    /// Sockets, with peers on the host.
    Vsock,
    /// Files, with a peer that answers anything.
    FsDevice,
}

/// What the fuzzer does with a device.
#[derive(Debug, Arbitrary)]
pub enum Step {
    /// Writes a register.
    Write(u16, u8, u32),
    /// Reads a register.
    Read(u16, u8),
    /// Resets and sets all queues up as a good driver would; sizes are powers of two.
    SetUp(u8),
    /// Offers a chain of buffers: bytes for the device to read, then lengths for it to write.
    Chain(u8, Vec<Vec<u8>>, Vec<u16>),
    /// Writes a descriptor of a queue.
    Descriptor(u8, u8, Place, u32, u16, u8),
    /// Writes a descriptor of the table that `Place::Table` is.
    Indirect(u8, Place, u32, u16, u8),
    /// Sends a request as the device's protocol has it: operation, two numbers, data, room for the answer.
    Request(u8, u32, u32, Vec<u8>, Vec<u16>),
    /// Gives the device buffers for what it receives.
    Receive(u8),
    /// Offers a head, whatever it is.
    Offer(u8, u16),
    /// Writes anywhere.
    Poke(Place, Vec<u8>),
    /// Sets the driver's index in the available ring.
    Index(u8, u16),
    /// Kicks a queue.
    Kick(u8),
    /// Something happens on the host's side.
    Host(u8),
    /// Resets the device.
    Reset,
}

/// An address in guest memory, or not.
#[derive(Clone, Copy, Debug, Arbitrary)]
pub enum Place {
    /// Among the buffers.
    Data(u16),
    /// A table for indirect descriptors.
    Table,
    /// The queues themselves.
    Ring(u8, u16),
    /// The last bytes of a region.
    Edge(u8),
    /// Anywhere.
    Any(u64),
}

/// The first region ends here; the second begins a page further.
const REGION: u64 = 1 << 20;
const SECOND: u64 = REGION + 4096;
const RING: u64 = 0x4000;
const DATA: u64 = 0x8_0000;
const TABLE: u64 = 0x7_0000;
/// The largest queue of all devices.
const QUEUE: u16 = 1024;
const QUEUES: u8 = 4;

/// Two regions with a gap, as above the hole of a large machine.
pub fn machine() -> (SharedMemory, GrowingMemory) {
    let regions = [
        (GuestAddress(0), REGION as usize),
        (GuestAddress(SECOND), REGION as usize),
    ];
    let memory = Arc::new(GuestMemoryMmap::from_ranges(&regions).expect("2 MiB"));
    let growing = GrowingMemory::from(memory.clone());
    (memory, growing)
}

struct Driver {
    kind: Kind,
    memory: SharedMemory,
    transport: MmioTransport,
    sizes: [u16; QUEUES as usize],
    avail: [u16; QUEUES as usize],
    next: u16,
}

/// Does the steps with a new device.
pub fn drive(kind: Kind, steps: &[Step]) {
    let (memory, growing) = machine();
    let (device, mut host) = peers::device(kind);
    let transport = MmioTransport::new(device, growing).expect("a transport");
    let mut driver = Driver {
        kind,
        memory,
        transport,
        sizes: [QUEUE; QUEUES as usize],
        avail: [0; QUEUES as usize],
        next: 0,
    };
    driver.set_up(255);
    for step in steps.iter().take(256) {
        match step {
            Step::Host(what) => host.act(*what),
            step => driver.step(step),
        }
    }
    driver.settle();
    drop(driver);
    host.check();
}

impl Driver {
    fn register(&mut self, offset: u64, value: u32) {
        self.transport.write(offset, &value.to_le_bytes());
    }

    fn read(&mut self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.transport.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn poke(&self, address: u64, bytes: &[u8]) {
        // A guest, too, cannot write where there is no memory.
        let _ = self.memory.write_slice(bytes, GuestAddress(address));
    }

    fn place(&self, place: Place) -> u64 {
        match place {
            Place::Data(at) => DATA + u64::from(at),
            Place::Table => TABLE,
            Place::Ring(queue, at) => ring(queue) + u64::from(at) % (3 * RING),
            Place::Edge(before) => REGION - u64::from(before),
            Place::Any(address) => address,
        }
    }

    fn set_up(&mut self, shift: u8) {
        for status in [0, 1, 3] {
            self.register(0x70, status);
        }
        for half in 0..2 {
            self.register(0x14, half);
            let offered = self.read(0x10);
            self.register(0x24, half);
            self.register(0x20, offered);
        }
        self.register(0x70, 11);
        for queue in 0..QUEUES {
            self.register(0x30, queue.into());
            let most = self.read(0x34) as u16;
            if most == 0 {
                break;
            }
            let size = (most >> (shift & 7)).max(2);
            let size = if shift == 255 { most } else { size };
            self.sizes[usize::from(queue)] = size;
            self.avail[usize::from(queue)] = 0;
            self.register(0x38, size.into());
            for (part, register) in [(0, 0x80), (1, 0x90), (2, 0xa0)] {
                self.register(register, (ring(queue) + part * RING) as u32);
                self.register(register + 4, 0);
            }
            // Both rings' flags and indices.
            self.poke(ring(queue) + RING, &[0; 4]);
            self.poke(ring(queue) + 2 * RING, &[0; 4]);
            self.register(0x44, 1);
        }
        self.register(0x70, 15);
    }

    fn descriptor(&self, at: u64, address: u64, len: u32, flags: u16, next: u16) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&address.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        self.poke(at, &bytes);
    }

    fn offer(&mut self, queue: u8, head: u16) {
        let index = usize::from(queue);
        let slot = self.avail[index] % self.sizes[index];
        self.poke(
            ring(queue) + RING + 4 + u64::from(slot) * 2,
            &head.to_le_bytes(),
        );
        self.avail[index] = self.avail[index].wrapping_add(1);
        self.poke(ring(queue) + RING + 2, &self.avail[index].to_le_bytes());
    }

    fn chain(&mut self, queue: u8, readable: &[Vec<u8>], writable: &[u16]) {
        let size = self.sizes[usize::from(queue)];
        let count = (readable.len() + writable.len())
            .min(usize::from(size))
            .min(32);
        let head = self.next % size;
        let mut data = DATA + u64::from(self.next % 32) * 0x2000;
        self.next = self.next.wrapping_add(count as u16);
        for (position, index) in (0..count).zip(0u16..) {
            let at = (head + index) % size;
            let (len, mut flags) = match readable.get(position) {
                Some(bytes) => {
                    self.poke(data, bytes);
                    (bytes.len() as u32, 0)
                }
                None => (writable[position - readable.len()].into(), 2),
            };
            if position + 1 < count {
                flags |= 1;
            }
            let next = (at + 1) % size;
            self.descriptor(ring(queue) + u64::from(at) * 16, data, len, flags, next);
            data += u64::from(len.min(0x2000));
        }
        if count > 0 {
            self.offer(queue, head);
            self.register(0x50, queue.into());
        }
    }

    fn step(&mut self, step: &Step) {
        match step {
            Step::Write(offset, width, value) => {
                let width = usize::from(*width).min(4);
                let offset = u64::from(*offset & 0xfff);
                self.transport.write(offset, &value.to_le_bytes()[..width]);
            }
            Step::Read(offset, width) => {
                let mut data = vec![0; usize::from(*width)];
                self.transport.read(u64::from(*offset & 0xfff), &mut data);
            }
            Step::SetUp(shift) => self.set_up(*shift),
            Step::Chain(queue, readable, writable) => {
                self.chain(queue % QUEUES, readable, writable);
            }
            Step::Descriptor(queue, index, place, len, flags, next) => {
                let at = ring(queue % QUEUES) + u64::from(*index) * 16;
                self.descriptor(at, self.place(*place), *len, flags & 7, (*next).into());
            }
            Step::Indirect(index, place, len, flags, next) => {
                let at = TABLE + u64::from(*index) * 16;
                self.descriptor(at, self.place(*place), *len, flags & 7, (*next).into());
            }
            Step::Request(operation, one, two, data, room) => {
                let mut message = peers::request(self.kind, *operation, *one, *two, data);
                // The header in a buffer of its own, or everything in one.
                let body = message.split_off(message.len().min(16 + usize::from(*operation >> 4)));
                let parts = if body.is_empty() {
                    vec![message]
                } else {
                    vec![message, body]
                };
                self.chain(peers::request_queue(self.kind), &parts, room);
                self.settle();
            }
            Step::Receive(count) => {
                for _ in 0..count % 16 {
                    self.chain(0, &[], &[4096]);
                }
            }
            Step::Offer(queue, head) => self.offer(queue % QUEUES, *head),
            Step::Poke(place, bytes) => self.poke(self.place(*place), bytes),
            Step::Index(queue, index) => {
                self.avail[usize::from(queue % QUEUES)] = *index;
                self.poke(ring(queue % QUEUES) + RING + 2, &index.to_le_bytes());
            }
            Step::Kick(queue) => {
                self.register(0x50, (*queue).into());
                self.settle();
            }
            Step::Reset => self.register(0x70, 0),
            Step::Host(_) => {}
        }
    }

    /// Gives the device's thread a moment with what was offered.
    fn settle(&mut self) {
        let end = Instant::now() + Duration::from_micros(300);
        while Instant::now() < end {
            let idle = (0..QUEUES).all(|queue| {
                let mut used = [0; 2];
                let at = GuestAddress(ring(queue) + 2 * RING + 2);
                let _ = self.memory.read_slice(&mut used, at);
                u16::from_le_bytes(used) == self.avail[usize::from(queue)]
            });
            if idle {
                return;
            }
            std::thread::yield_now();
        }
    }
}

fn ring(queue: u8) -> u64 {
    0x1_0000 + u64::from(queue % QUEUES) * 3 * RING
}
