//! A driver over plain memory for the devices' unit tests: lays out rings and makes chains available, honest or not.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::queue::VirtQueue;
use super::{Interrupt, SharedMemory};

/// Size of the fake guest's memory in bytes.
pub const MEMORY_SIZE: usize = 16 << 20;
/// VIRTQ_DESC_F_NEXT.
pub const F_NEXT: u16 = 1;
/// VIRTQ_DESC_F_WRITE.
pub const F_WRITE: u16 = 2;
/// VIRTQ_DESC_F_INDIRECT.
pub const F_INDIRECT: u16 = 4;

/// Memory of a fake guest: one region from address 0.
pub fn memory() -> SharedMemory {
    Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY_SIZE)]).unwrap())
}

/// Counts what a device signals; `event` is written with every signal so that a test can wait.
pub struct CountingInterrupt {
    /// Calls of `queue_used`.
    pub used: AtomicU32,
    /// Calls of `config_changed`.
    pub config: AtomicU32,
    /// Signalled by both.
    pub event: EventFd,
}

impl CountingInterrupt {
    /// Nothing signalled yet.
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            used: AtomicU32::new(0),
            config: AtomicU32::new(0),
            event: EventFd::new(0).unwrap(),
        })
    }
}

impl Interrupt for CountingInterrupt {
    fn queue_used(&self, _index: u16) {
        self.used.fetch_add(1, Ordering::SeqCst);
        self.event.write(1).unwrap();
    }

    fn config_changed(&self) {
        self.config.fetch_add(1, Ordering::SeqCst);
        self.event.write(1).unwrap();
    }

    fn call_event(&self, _index: u16) -> Option<io::Result<EventFd>> {
        Some(self.event.try_clone())
    }
}

/// The driver's side of one queue: descriptor table, available and used ring from `base` on.
pub struct DriverQueue {
    memory: SharedMemory,
    base: u64,
    size: u16,
    next_avail: u16,
    next_used: u16,
    kick: EventFd,
}

impl DriverQueue {
    /// Lays a ring of `size` out at `base` (needs 64 KiB there) and gives both sides of it.
    pub fn new(
        memory: &SharedMemory,
        index: u16,
        base: u64,
        size: u16,
        interrupt: Arc<dyn Interrupt>,
    ) -> (Self, VirtQueue) {
        let mut queue = Queue::new(size).unwrap();
        queue.set_size(size);
        queue.set_desc_table_address(Some(base as u32), Some(0));
        queue.set_avail_ring_address(Some(base as u32 + 0x8000), Some(0));
        queue.set_used_ring_address(Some(base as u32 + 0xc000), Some(0));
        queue.set_ready(true);
        assert!(queue.is_valid(&**memory));
        let kick = EventFd::new(EFD_NONBLOCK).unwrap();
        let device = VirtQueue::new(
            index,
            queue,
            memory.clone().into(),
            kick.try_clone().unwrap(),
            interrupt,
        );
        let driver = Self {
            memory: memory.clone(),
            base,
            size,
            next_avail: 0,
            next_used: 0,
            kick,
        };
        (driver, device)
    }

    /// Writes one descriptor of the table.
    pub fn descriptor(&self, index: u16, address: u64, len: u32, flags: u16, next: u16) {
        write_descriptor(
            &self.memory,
            self.base + u64::from(index) * 16,
            address,
            len,
            flags,
            next,
        );
    }

    /// Makes `head` available without a kick.
    pub fn offer(&mut self, head: u16) {
        let slot = self.base + 0x8000 + 4 + u64::from(self.next_avail % self.size) * 2;
        self.memory.write_obj(head, GuestAddress(slot)).unwrap();
        self.next_avail = self.next_avail.wrapping_add(1);
        self.memory
            .write_obj(self.next_avail, GuestAddress(self.base + 0x8002))
            .unwrap();
    }

    /// Writes descriptors from `first` on for the buffers `(address, length, device may write)` and offers the chain.
    pub fn offer_chain(&mut self, first: u16, buffers: &[(u64, u32, bool)]) {
        for (position, (address, len, write)) in buffers.iter().enumerate() {
            let index = first + position as u16;
            let last = position + 1 == buffers.len();
            let flags = if *write { F_WRITE } else { 0 } | if last { 0 } else { F_NEXT };
            self.descriptor(index, *address, *len, flags, index + 1);
        }
        self.offer(first);
    }

    /// Notifies the device.
    pub fn kick(&self) {
        self.kick.write(1).unwrap();
    }

    /// The next used element, head and length.
    pub fn used(&mut self) -> Option<(u16, u32)> {
        let index: u16 = self
            .memory
            .read_obj(GuestAddress(self.base + 0xc002))
            .unwrap();
        if index == self.next_used {
            return None;
        }
        let slot = self.base + 0xc000 + 4 + u64::from(self.next_used % self.size) * 8;
        self.next_used = self.next_used.wrapping_add(1);
        let head: u32 = self.memory.read_obj(GuestAddress(slot)).unwrap();
        let len: u32 = self.memory.read_obj(GuestAddress(slot + 4)).unwrap();
        Some((head as u16, len))
    }
}

/// Writes a descriptor anywhere, for indirect tables.
pub fn write_descriptor(
    memory: &GuestMemoryMmap,
    at: u64,
    address: u64,
    len: u32,
    flags: u16,
    next: u16,
) {
    memory.write_obj(address, GuestAddress(at)).unwrap();
    memory.write_obj(len, GuestAddress(at + 8)).unwrap();
    memory.write_obj(flags, GuestAddress(at + 12)).unwrap();
    memory.write_obj(next, GuestAddress(at + 14)).unwrap();
}
