//! The virtio-mmio transport, version 2 (virtio 1.3 section 4.2).
//!
//! One page of registers a device. The guest reads and writes them in any order, width and number; what the
//! table does not allow is ignored, and a few such accesses are logged. Status (section 3.1.1):
//!
//! ```text
//!            write ACKNOWLEDGE      write DRIVER       write FEATURES_OK        write DRIVER_OK
//!   reset ---------------------> 1 ------------> 1|2 ------------------> ..|8 ---------------> ..|4  queues served
//!     ^                                           |   features not ours:  |    bad queue, or      |
//!     |                                           |   the bit stays off   |    device fails       | device broken
//!     |  write 0, from anywhere                   |                       v                       v
//!     +-------------------------------------------+------------ DEVICE_NEEDS_RESET (64) <---------+
//! ```
//!
//! Features freeze at FEATURES_OK, queues at DRIVER_OK: later writes change nothing (their registers belong to the next
//! life, after a reset). FAILED may be set at any time and only a reset clears any bit.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestAddressSpace};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::bus::BusDevice;
use crate::limits;
use crate::virtio::queue::VirtQueue;
use crate::virtio::{
    Activation, COMMON_FEATURES, F_EVENT_IDX, F_VERSION_1, GrowingMemory, Interrupt, VirtioDevice,
};

const ACKNOWLEDGE: u32 = 1;
const DRIVER: u32 = 2;
const DRIVER_OK: u32 = 4;
const FEATURES_OK: u32 = 8;
const DEVICE_NEEDS_RESET: u32 = 64;
const FAILED: u32 = 128;

/// "virt"
const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
/// "BLKH"
const VENDOR: u32 = 0x484b_4c42;

const INTERRUPT_USED: u32 = 1;
const INTERRUPT_CONFIG: u32 = 2;

/// Register offsets of section 4.2.2.
mod register {
    pub const MAGIC_VALUE: u64 = 0x000;
    pub const VERSION: u64 = 0x004;
    pub const DEVICE_ID: u64 = 0x008;
    pub const VENDOR_ID: u64 = 0x00c;
    pub const DEVICE_FEATURES: u64 = 0x010;
    pub const DEVICE_FEATURES_SEL: u64 = 0x014;
    pub const DRIVER_FEATURES: u64 = 0x020;
    pub const DRIVER_FEATURES_SEL: u64 = 0x024;
    pub const QUEUE_SEL: u64 = 0x030;
    pub const QUEUE_SIZE_MAX: u64 = 0x034;
    pub const QUEUE_SIZE: u64 = 0x038;
    pub const QUEUE_READY: u64 = 0x044;
    pub const QUEUE_NOTIFY: u64 = 0x050;
    pub const INTERRUPT_STATUS: u64 = 0x060;
    pub const INTERRUPT_ACK: u64 = 0x064;
    pub const STATUS: u64 = 0x070;
    pub const QUEUE_DESC_LOW: u64 = 0x080;
    pub const QUEUE_DESC_HIGH: u64 = 0x084;
    pub const QUEUE_DRIVER_LOW: u64 = 0x090;
    pub const QUEUE_DRIVER_HIGH: u64 = 0x094;
    pub const QUEUE_DEVICE_LOW: u64 = 0x0a0;
    pub const QUEUE_DEVICE_HIGH: u64 = 0x0a4;
    pub const SHM_FIRST: u64 = 0x0b0;
    pub const SHM_LAST: u64 = 0x0bc;
    pub const CONFIG_GENERATION: u64 = 0x0fc;
    pub const CONFIG: u64 = 0x100;
}

/// The device's side of its interrupt line.
struct MmioInterrupt {
    irq: EventFd,
    status: AtomicU32,
    generation: AtomicU32,
    /// `irq` is signalled by the kernel too, which does not write `status`.
    direct: AtomicBool,
}

impl MmioInterrupt {
    /// A driver that looks for used buffers in vain has lost nothing.
    fn status(&self) -> u32 {
        let direct = self.direct.load(Ordering::SeqCst);
        self.status.load(Ordering::SeqCst) | if direct { INTERRUPT_USED } else { 0 }
    }

    fn raise(&self, reason: u32) {
        self.status.fetch_or(reason, Ordering::SeqCst);
        // Fails only when the counter is full: then an interrupt is pending already.
        let _ = self.irq.write(1);
    }
}

impl Interrupt for MmioInterrupt {
    fn queue_used(&self, _index: u16) {
        self.raise(INTERRUPT_USED);
    }

    fn config_changed(&self) {
        self.generation.fetch_add(1, Ordering::SeqCst);
        self.raise(INTERRUPT_CONFIG);
    }

    fn call_event(&self, _index: u16) -> Option<io::Result<EventFd>> {
        self.direct.store(true, Ordering::SeqCst);
        Some(self.irq.try_clone())
    }
}

/// What the driver wrote about one queue: an allegation until [`MmioTransport::activate`] checked it.
#[derive(Clone, Copy, Default)]
struct QueueSetup {
    size: u32,
    ready: bool,
    descriptors: u64,
    driver: u64,
    device: u64,
}

/// One device's page of registers.
pub struct MmioTransport {
    device: Box<dyn VirtioDevice>,
    memory: GrowingMemory,
    interrupt: Arc<MmioInterrupt>,
    kicks: Vec<EventFd>,
    offered: u64,
    accepted: u64,
    status: u32,
    features_sel: u32,
    driver_features_sel: u32,
    queue_sel: u32,
    queues: Vec<QueueSetup>,
    /// The device has its queues and must be reset before it gets others.
    active: bool,
    warnings: u32,
}

impl MmioTransport {
    /// Where a driver writes a queue's index to kick it; taken by ioeventfds before it comes here.
    pub const QUEUE_NOTIFY: u64 = register::QUEUE_NOTIFY;

    /// Carries `device`.
    pub fn new(device: Box<dyn VirtioDevice>, memory: GrowingMemory) -> io::Result<Self> {
        let event = || EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC);
        let count = device.queue_sizes().len();
        Ok(Self {
            memory,
            interrupt: Arc::new(MmioInterrupt {
                irq: event()?,
                status: AtomicU32::new(0),
                generation: AtomicU32::new(0),
                direct: AtomicBool::new(false),
            }),
            kicks: (0..count).map(|_| event()).collect::<io::Result<_>>()?,
            offered: device.features() | COMMON_FEATURES,
            accepted: 0,
            status: 0,
            features_sel: 0,
            driver_features_sel: 0,
            queue_sel: 0,
            queues: vec![QueueSetup::default(); count],
            active: false,
            warnings: 0,
            device,
        })
    }

    /// Signalled for each interrupt.
    pub fn irq(&self) -> &EventFd {
        &self.interrupt.irq
    }

    /// One a queue, to be signalled by writes of the queue's index to [`Self::QUEUE_NOTIFY`].
    pub fn kicks(&self) -> &[EventFd] {
        &self.kicks
    }

    fn read_register(&self, offset: u64) -> u32 {
        use register::*;
        match offset {
            MAGIC_VALUE => MAGIC,
            VERSION => self::VERSION,
            DEVICE_ID => self.device.device_type(),
            VENDOR_ID => VENDOR,
            DEVICE_FEATURES => match self.features_sel {
                0 => self.offered as u32,
                1 => (self.offered >> 32) as u32,
                _ => 0,
            },
            QUEUE_SIZE_MAX => self.selected_max(),
            QUEUE_READY => self.selected().map_or(0, |queue| queue.ready.into()),
            INTERRUPT_STATUS => self.interrupt.status(),
            STATUS => self.status,
            // No shared memory regions: length and base are all ones (section 4.2.2).
            SHM_FIRST..=SHM_LAST => u32::MAX,
            CONFIG_GENERATION => self.interrupt.generation.load(Ordering::SeqCst),
            _ => 0,
        }
    }

    fn write_register(&mut self, offset: u64, value: u32) {
        use register::*;
        match offset {
            DEVICE_FEATURES_SEL => self.features_sel = value,
            DRIVER_FEATURES_SEL => self.driver_features_sel = value,
            DRIVER_FEATURES => self.set_driver_features(value),
            QUEUE_SEL => self.queue_sel = value,
            QUEUE_SIZE | QUEUE_READY | QUEUE_DESC_LOW | QUEUE_DESC_HIGH | QUEUE_DRIVER_LOW
            | QUEUE_DRIVER_HIGH | QUEUE_DEVICE_LOW | QUEUE_DEVICE_HIGH => {
                self.set_queue(offset, value);
            }
            // Comes here only for an index without an ioeventfd, or when there are none (tests).
            QUEUE_NOTIFY => {
                let kick = usize::try_from(value)
                    .ok()
                    .and_then(|index| self.kicks.get(index));
                if let (true, Some(kick)) = (self.active, kick) {
                    let _ = kick.write(1);
                }
            }
            INTERRUPT_ACK => {
                self.interrupt.status.fetch_and(!value, Ordering::SeqCst);
            }
            STATUS => self.set_status(value),
            _ => self.warn("write to a register that takes none", offset, value),
        }
    }

    fn selected(&self) -> Option<&QueueSetup> {
        self.queues.get(usize::try_from(self.queue_sel).ok()?)
    }

    fn selected_max(&self) -> u32 {
        usize::try_from(self.queue_sel)
            .ok()
            .and_then(|index| self.device.queue_sizes().get(index))
            .map_or(0, |max| u32::from(*max))
    }

    fn set_driver_features(&mut self, value: u32) {
        if self.status & (DRIVER | FEATURES_OK) != DRIVER {
            return self.warn(
                "features written out of turn",
                register::DRIVER_FEATURES,
                value,
            );
        }
        let value = u64::from(value);
        match self.driver_features_sel {
            0 => self.accepted = self.accepted & !0xffff_ffff | value,
            1 => self.accepted = self.accepted & 0xffff_ffff | value << 32,
            // More than 64 bits: a bit there is none that we offer.
            _ if value == 0 => {}
            _ => self.warn(
                "unknown feature written",
                register::DRIVER_FEATURES,
                value as u32,
            ),
        }
    }

    fn set_queue(&mut self, offset: u64, value: u32) {
        use register::*;
        let frozen = self.status & FEATURES_OK == 0
            || self.status & (DRIVER_OK | DEVICE_NEEDS_RESET | FAILED) != 0;
        let index = usize::try_from(self.queue_sel).unwrap_or(usize::MAX);
        let queue = match self.queues.get_mut(index) {
            Some(queue) if !frozen => queue,
            _ => return self.warn("queue written out of turn", offset, value),
        };
        // Only un-readying is left for a queue that is ready.
        if queue.ready && offset != QUEUE_READY {
            return self.warn("ready queue written", offset, value);
        }
        let low = |old: u64| old & !0xffff_ffff | u64::from(value);
        let high = |old: u64| old & 0xffff_ffff | u64::from(value) << 32;
        match offset {
            QUEUE_SIZE => queue.size = value,
            QUEUE_READY => queue.ready = value == 1,
            QUEUE_DESC_LOW => queue.descriptors = low(queue.descriptors),
            QUEUE_DESC_HIGH => queue.descriptors = high(queue.descriptors),
            QUEUE_DRIVER_LOW => queue.driver = low(queue.driver),
            QUEUE_DRIVER_HIGH => queue.driver = high(queue.driver),
            QUEUE_DEVICE_LOW => queue.device = low(queue.device),
            _ => queue.device = high(queue.device),
        }
    }

    fn set_status(&mut self, value: u32) {
        if value == 0 {
            return self.reset();
        }
        let added = value & !self.status;
        if self.status & !value & !DEVICE_NEEDS_RESET != 0 {
            return self.warn(
                "status bit cleared without a reset",
                register::STATUS,
                value,
            );
        }
        if added & FAILED != 0 {
            self.status |= FAILED;
            return;
        }
        if self.status & (FAILED | DEVICE_NEEDS_RESET) != 0 {
            return self.warn("status of a broken device written", register::STATUS, value);
        }
        // Several at once are taken in their order; each needs the one before.
        for (bit, before) in [
            (ACKNOWLEDGE, 0),
            (DRIVER, ACKNOWLEDGE),
            (FEATURES_OK, DRIVER),
            (DRIVER_OK, FEATURES_OK),
        ] {
            if added & bit == 0 {
                continue;
            }
            if self.status & before != before {
                return self.warn("status bit out of order", register::STATUS, value);
            }
            match bit {
                FEATURES_OK if !self.features_are_ours() => {
                    if self.may_warn() {
                        let features = self.accepted;
                        tracing::warn!(device = self.device.name(), features, "features refused");
                    }
                    return;
                }
                DRIVER_OK => self.activate(),
                bit => self.status |= bit,
            }
        }
    }

    /// Nothing beyond the offer, and no driver from before virtio 1.0.
    fn features_are_ours(&self) -> bool {
        self.accepted & !self.offered == 0 && self.accepted & F_VERSION_1 != 0
    }

    fn activate(&mut self) {
        let queues = match self.checked_queues() {
            Ok(queues) => queues,
            Err(index) => {
                if self.may_warn() {
                    tracing::warn!(device = self.device.name(), index, "bad queue refused");
                }
                return self.needs_reset();
            }
        };
        let activation = Activation {
            features: self.accepted,
            queues,
            interrupt: self.interrupt.clone(),
        };
        self.active = true;
        match self.device.activate(activation) {
            Ok(()) => self.status |= DRIVER_OK,
            Err(error) => {
                if self.may_warn() {
                    tracing::warn!(device = self.device.name(), %error, "device cannot start");
                }
                self.needs_reset();
            }
        }
    }

    /// Every ready queue, checked whole: size, alignment, and rings that lie in memory. An error is a queue's index.
    fn checked_queues(&self) -> Result<Vec<Option<VirtQueue>>, u16> {
        let maxima = self.device.queue_sizes().iter();
        let setups = self.queues.iter().zip(maxima).zip(&self.kicks);
        (0u16..)
            .zip(setups)
            .map(|(index, ((setup, max), kick))| {
                if !setup.ready {
                    return Ok(None);
                }
                let queue = self.checked_queue(setup, *max).ok_or(index)?;
                let kick = kick.try_clone().map_err(|_| index)?;
                let interrupt = self.interrupt.clone();
                let memory = self.memory.clone();
                Ok(Some(VirtQueue::new(index, queue, memory, kick, interrupt)))
            })
            .collect()
    }

    fn checked_queue(&self, setup: &QueueSetup, max: u16) -> Option<Queue> {
        let size = u16::try_from(setup.size).ok()?;
        if size == 0 || size > max || !size.is_power_of_two() {
            return None;
        }
        let mut queue = Queue::new(max).ok()?;
        queue.set_size(size);
        queue
            .try_set_desc_table_address(GuestAddress(setup.descriptors))
            .ok()?;
        queue
            .try_set_avail_ring_address(GuestAddress(setup.driver))
            .ok()?;
        queue
            .try_set_used_ring_address(GuestAddress(setup.device))
            .ok()?;
        queue.set_event_idx(self.accepted & F_EVENT_IDX != 0);
        queue.set_ready(true);
        queue.is_valid(&*self.memory.memory()).then_some(queue)
    }

    fn needs_reset(&mut self) {
        self.status |= DEVICE_NEEDS_RESET;
        self.interrupt.config_changed();
    }

    fn reset(&mut self) {
        if self.active {
            self.device.reset();
            self.active = false;
        }
        for kick in &self.kicks {
            // A kick of the former life is nobody's; none pending is an error of no consequence.
            let _ = kick.read();
        }
        self.queues.fill(QueueSetup::default());
        self.accepted = 0;
        self.status = 0;
        self.features_sel = 0;
        self.driver_features_sel = 0;
        self.queue_sel = 0;
        self.interrupt.status.store(0, Ordering::SeqCst);
        self.interrupt.direct.store(false, Ordering::SeqCst);
    }

    fn warn(&mut self, what: &'static str, offset: u64, value: u32) {
        if self.may_warn() {
            tracing::warn!(device = self.device.name(), offset, value, "{what}");
        }
    }

    /// Counts: the guest can bring each of these about for ever.
    fn may_warn(&mut self) -> bool {
        let may = self.warnings < limits::REGISTER_WARNINGS;
        self.warnings += u32::from(may);
        may
    }
}

impl BusDevice for MmioTransport {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let Some(at) = offset.checked_sub(register::CONFIG) {
            data.fill(0);
            self.device.read_config(at, data);
        } else if let Ok(data) = <&mut [u8; 4]>::try_from(data)
            && offset.is_multiple_of(4)
        {
            // All other registers are 32 bits wide and aligned (section 4.2.2.2); else the read stays all ones.
            *data = self.read_register(offset).to_le_bytes();
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some(at) = offset.checked_sub(register::CONFIG) {
            if self.status & DRIVER != 0 && self.status & (DEVICE_NEEDS_RESET | FAILED) == 0 {
                self.device.write_config(at, data);
            }
        } else if let Ok(data) = <[u8; 4]>::try_from(data)
            && offset.is_multiple_of(4)
        {
            self.write_register(offset, u32::from_le_bytes(data));
        } else {
            self.warn("register written in pieces", offset, data.len() as u32);
        }
    }
}

#[cfg(test)]
#[path = "mmio_tests.rs"]
mod tests;
