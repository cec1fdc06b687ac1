//! A split virtqueue (virtio 1.3 section 2.7) as the devices use it: pop checked chains, push them back, notify once.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering, fence};

use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Address, Bytes, GuestAddress, GuestAddressSpace};
use vmm_sys_util::eventfd::EventFd;

use super::chain::{Chain, ChainError};
use super::{GrowingMemory, Interrupt, SharedMemory};
use crate::limits;

/// The ring itself is broken; the device stops serving this queue until it is reset.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// A ring outside guest memory, or an index that claims more than the ring holds.
    #[error("queue {index}: broken ring")]
    Ring {
        /// Which queue.
        index: u16,
        /// What the ring said.
        #[source]
        source: virtio_queue::Error,
    },
    /// A head that the device still works on was made available again.
    #[error("queue {index}: descriptor {head} made available while in flight")]
    HeadInFlight {
        /// Which queue.
        index: u16,
        /// Index of the descriptor.
        head: u16,
    },
    /// The available index went back: a device that polls would look again for ever.
    #[error("queue {index}: what was available was withdrawn")]
    Withdrawn {
        /// Which queue.
        index: u16,
    },
    /// As many malformed chains one after another as the ring holds: the driver is broken or means harm.
    #[error("queue {index}: nothing but malformed descriptor chains")]
    Malformed {
        /// Which queue.
        index: u16,
    },
}

/// Logs that a device serves a queue no more. A guest can bring that about for ever, by resets in between, and must not use up
/// the log: past a number of lines there are no more.
pub fn log_broken(device: &str, error: &QueueError) {
    static LINES: AtomicU64 = AtomicU64::new(0);
    if may_log(&LINES) {
        tracing::warn!(device, %error, "a queue is served no more");
    }
}

fn may_log(lines: &AtomicU64) -> bool {
    lines.fetch_add(1, Ordering::Relaxed) < limits::BROKEN_QUEUE_WARNINGS
}

/// A ring in guest memory; addresses are guest-physical.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Descriptors.
    pub size: u16,
    /// Descriptor table.
    pub descriptors: u64,
    /// Available ring.
    pub available: u64,
    /// Used ring.
    pub used: u64,
    /// Index of the next available chain to take.
    pub next_available: u16,
}

/// One virtqueue, owned by the device while it is active.
pub struct VirtQueue {
    index: u16,
    queue: Queue,
    /// What chains may point into.
    memory: GrowingMemory,
    /// The map in which the rings were found valid. They stay where they are.
    rings: SharedMemory,
    kick: EventFd,
    interrupt: Arc<dyn Interrupt>,
    in_flight: Box<[bool]>,
    /// The used index when the guest was last called, or did not want to be.
    notified: u16,
    /// [`Self::enable_kicks`] saw more, which was not popped yet.
    more: bool,
}

impl VirtQueue {
    /// `queue` was set up and validated by the transport (`QueueT::is_valid`); `kick` is signalled by the driver's notifications.
    pub fn new(
        index: u16,
        queue: Queue,
        memory: GrowingMemory,
        kick: EventFd,
        interrupt: Arc<dyn Interrupt>,
    ) -> Self {
        let in_flight = vec![false; usize::from(queue.size())].into_boxed_slice();
        Self {
            index,
            notified: queue.next_used(),
            queue,
            rings: memory.memory().into_inner(),
            memory,
            kick,
            interrupt,
            in_flight,
            more: false,
        }
    }

    /// Signalled when the driver made buffers available. Read it before popping.
    pub fn kick(&self) -> &EventFd {
        &self.kick
    }

    /// Signals the kick: there may be more, and the device's thread has other events to look at first.
    pub fn serve_again(&self) {
        // Fails only when the counter is full: then it is signalled already.
        let _ = self.kick.write(1);
    }

    /// The memory that the chains of this queue point into.
    pub fn memory(&self) -> SharedMemory {
        self.memory.memory().into_inner()
    }

    /// The next available chain, checked. A chain that is malformed is given back with length 0 and logged: the
    /// driver's request fails, the device goes on. A ring full of them is an error.
    pub fn pop(&mut self) -> Result<Option<Chain>, QueueError> {
        let index = self.index;
        for _ in 0..self.queue.size() {
            let memory = self.memory();
            let ring = |source| QueueError::Ring { index, source };
            let Some(raw) = self.queue.iter(&*memory).map_err(ring)?.next() else {
                // An honest driver only adds. Else a device whose rings overlap would poll for ever.
                if self.more {
                    return Err(QueueError::Withdrawn { index });
                }
                return Ok(None);
            };
            self.more = false;
            let head = raw.head_index();
            match self.in_flight.get_mut(usize::from(head)) {
                Some(busy) if !*busy => *busy = true,
                Some(_) => return Err(QueueError::HeadInFlight { index, head }),
                None => {
                    return Err(ring(virtio_queue::Error::InvalidDescriptorIndex));
                }
            }
            match Chain::check(&memory, raw) {
                Ok(chain) => return Ok(Some(chain)),
                Err(error) => self.refuse(head, &error)?,
            }
        }
        Err(QueueError::Malformed { index })
    }

    fn refuse(&mut self, head: u16, error: &ChainError) -> Result<(), QueueError> {
        tracing::debug!(queue = self.index, head, %error, "refused a descriptor chain");
        self.finish(head, 0)
    }

    /// Gives a chain back to the driver, `written` bytes of it filled. The driver hears of it at [`Self::notify`].
    pub fn push(&mut self, chain: Chain, written: u32) -> Result<(), QueueError> {
        self.finish(chain.head(), written)
    }

    fn finish(&mut self, head: u16, written: u32) -> Result<(), QueueError> {
        let index = self.index;
        if let Some(busy) = self.in_flight.get_mut(usize::from(head)) {
            *busy = false;
        }
        self.queue
            .add_used(&*self.rings, head, written)
            .map_err(|source| QueueError::Ring { index, source })
    }

    /// Gives several chains back in their order, and the driver sees all or none: buffers that hold one frame.
    pub fn push_all(&mut self, mut chains: Vec<(Chain, u32)>) -> Result<(), QueueError> {
        let index = self.index;
        let Some((last, last_written)) = chains.pop() else {
            return Ok(());
        };
        let mut next = self.queue.next_used();
        for (chain, written) in chains {
            if let Some(busy) = self.in_flight.get_mut(usize::from(chain.head())) {
                *busy = false;
            }
            let slot = u64::from(next.checked_rem(self.queue.size()).unwrap_or(0));
            let at = GuestAddress(self.queue.used_ring()).checked_add(4 + 8 * slot);
            let element = [u32::from(chain.head()).to_le(), written.to_le()];
            at.ok_or(virtio_queue::Error::AddressOverflow)
                .and_then(|at| {
                    let written = self.rings.write_obj(element, at);
                    written.map_err(virtio_queue::Error::GuestMemory)
                })
                .map_err(|source| QueueError::Ring { index, source })?;
            next = next.wrapping_add(1);
        }
        self.queue.set_next_used(next);
        self.finish(last.head(), last_written)
    }

    /// Undoes the last [`Self::pop`]: the chain will be popped again. Only right when nothing was popped since.
    pub fn unpop(&mut self, chain: Chain) {
        if let Some(busy) = self.in_flight.get_mut(usize::from(chain.head())) {
            *busy = false;
        }
        self.queue
            .set_next_avail(self.queue.next_avail().wrapping_sub(1));
    }

    /// Calls the guest if it wants to hear of what was pushed (section 2.7.7). Once a batch.
    pub fn notify(&mut self) -> Result<(), QueueError> {
        // What was pushed is seen before the guest's wish is read.
        fence(Ordering::SeqCst);
        let new = self.queue.next_used();
        let pushed = new.wrapping_sub(std::mem::replace(&mut self.notified, new));
        if self.queue.event_idx_enabled() {
            // The wish stands behind the available ring (section 2.7.10): call for the element with that index.
            let ring = GuestAddress(self.queue.avail_ring());
            let at = ring.checked_add(4 + 2 * u64::from(self.queue.size()));
            let index = self.index;
            let wish: u16 = at
                .ok_or(virtio_queue::Error::AddressOverflow)
                .and_then(|at| {
                    let read = self.rings.read_obj(at);
                    read.map_err(virtio_queue::Error::GuestMemory)
                })
                .map_err(|source| QueueError::Ring { index, source })?;
            let since = new.wrapping_sub(u16::from_le(wish)).wrapping_sub(1);
            if since >= pushed {
                return Ok(());
            }
        }
        self.interrupt.queue_used(self.index);
        Ok(())
    }

    /// Asks the driver not to kick while the device polls anyway (section 2.7.10).
    pub fn disable_kicks(&mut self) -> Result<(), QueueError> {
        let index = self.index;
        self.queue
            .disable_notification(&*self.rings)
            .map_err(|source| QueueError::Ring { index, source })
    }

    /// Asks for kicks again; `true` if buffers came meanwhile and must be popped first.
    pub fn enable_kicks(&mut self) -> Result<bool, QueueError> {
        let index = self.index;
        self.more = self
            .queue
            .enable_notification(&*self.rings)
            .map_err(|source| QueueError::Ring { index, source })?;
        Ok(self.more)
    }

    /// Where the ring lies and how far it was served, for a kernel that is to go on with it. Nothing may be in flight.
    pub fn layout(&self) -> Layout {
        Layout {
            size: self.queue.size(),
            descriptors: self.queue.desc_table(),
            available: self.queue.avail_ring(),
            used: self.queue.used_ring(),
            next_available: self.queue.next_avail(),
        }
    }

    /// Goes on where another has stopped to serve the ring: `next_available` is the next that it would have taken, and
    /// all that it took is in the used ring.
    pub fn resume_at(&mut self, next_available: u16) -> Result<(), QueueError> {
        let index = self.index;
        let used = self
            .queue
            .used_idx(&*self.rings, Ordering::Acquire)
            .map_err(|source| QueueError::Ring { index, source })?;
        self.queue.set_next_avail(next_available);
        self.queue.set_next_used(used.0);
        self.notified = used.0;
        self.more = false;
        Ok(())
    }

    /// Calls the guest for this queue when it is signalled; `None` where the transport cannot.
    pub fn call_event(&self) -> Option<io::Result<EventFd>> {
        self.interrupt.call_event(self.index)
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::super::testing::*;
    use super::*;

    fn queue() -> (SharedMemory, DriverQueue, VirtQueue, Arc<CountingInterrupt>) {
        let memory = memory();
        let interrupt = CountingInterrupt::new();
        let (driver, device) = DriverQueue::new(&memory, 0, 0x10000, 16, interrupt.clone());
        (memory, driver, device, interrupt)
    }

    #[test]
    fn a_chain_is_read_written_and_given_back_once() {
        let (memory, mut driver, mut device, interrupt) = queue();
        memory
            .write_slice(b"hello world", GuestAddress(0x20_0000))
            .unwrap();
        driver.offer_chain(
            0,
            &[
                (0x20_0000, 5, false),
                (0x20_0005, 6, false),
                (0x30_0000, 4, true),
                (0x30_1000, 4, true),
            ],
        );
        let chain = device.pop().unwrap().unwrap();
        let mut text = String::new();
        chain.reader().read_to_string(&mut text).unwrap();
        assert_eq!(text, "hello world");
        chain.writer().write_all(b"12345678").unwrap();
        assert!(chain.writer().write_all(b"123456789").is_err());
        assert_eq!(chain.readable_iovecs(6, 100).len(), 1);
        assert_eq!(
            chain
                .writable_iovecs(2, 3)
                .iter()
                .map(|v| v.iov_len)
                .sum::<usize>(),
            3
        );
        device.push(chain, 8).unwrap();
        device.notify().unwrap();
        assert_eq!(driver.used(), Some((0, 8)));
        assert_eq!(driver.used(), None);
        assert_eq!(interrupt.used.load(Ordering::SeqCst), 1);
        assert!(device.pop().unwrap().is_none());
    }

    #[test]
    fn chains_pushed_together_appear_together_and_in_order() {
        let (memory, mut driver, mut device, interrupt) = queue();
        // From an index where the ring wraps.
        for round in 0..14 {
            driver.offer_chain(0, &[(0x20_0000, 1, true)]);
            let chain = device.pop().unwrap().unwrap();
            device.push(chain, round).unwrap();
            assert_eq!(driver.used(), Some((0, round)));
        }
        for head in [5, 9, 2] {
            driver.offer_chain(head, &[(0x20_0000, 8, true)]);
        }
        let chains: Vec<_> = (1..4)
            .map(|n| (device.pop().unwrap().unwrap(), n))
            .collect();
        device.push_all(chains).unwrap();
        let index: u16 = memory.read_obj(GuestAddress(0x1c002)).unwrap();
        assert_eq!(index, 17);
        let used: Vec<_> = std::iter::from_fn(|| driver.used()).collect();
        assert_eq!(used, [(5, 1), (9, 2), (2, 3)]);
        device.push_all(Vec::new()).unwrap();
        assert_eq!(driver.used(), None);
        device.notify().unwrap();
        assert_eq!(interrupt.used.load(Ordering::SeqCst), 1);
        driver.offer(5);
        assert_eq!(device.pop().unwrap().unwrap().head(), 5);
    }

    #[test]
    fn with_event_idx_the_guest_is_called_once_for_the_element_that_it_names() {
        let (memory, mut driver, mut device, interrupt) = queue();
        device.queue.set_event_idx(true);
        let used_event = GuestAddress(0x18000 + 4 + 2 * 16);
        for (wish, pushes, calls) in [(0u16, 1, 1), (0, 1, 0), (3, 1, 0), (3, 3, 1), (100, 4, 0)] {
            memory.write_obj(wish, used_event).unwrap();
            interrupt.used.store(0, Ordering::SeqCst);
            for _ in 0..pushes {
                driver.offer_chain(0, &[(0x20_0000, 1, true)]);
                let chain = device.pop().unwrap().unwrap();
                device.push_all(vec![(chain, 0)]).unwrap();
            }
            device.notify().unwrap();
            device.notify().unwrap();
            assert_eq!(interrupt.used.load(Ordering::SeqCst), calls, "{wish}");
        }
    }

    /// Each case is a chain that must come back with length 0 while the queue goes on.
    #[test]
    fn malformed_chains_are_refused_and_the_queue_goes_on() {
        type Case = fn(&mut DriverQueue, &SharedMemory);
        let cases: [(&str, Case); 9] = [
            ("loops", |driver, _| {
                driver.descriptor(0, 0x20_0000, 1, F_NEXT, 1);
                driver.descriptor(1, 0x20_0000, 1, F_NEXT, 0);
            }),
            ("next index outside the table", |driver, _| {
                driver.descriptor(0, 0x20_0000, 1, F_NEXT, 16);
            }),
            ("past the end of memory", |driver, _| {
                driver.descriptor(0, MEMORY_SIZE as u64 - 1, 2, 0, 0);
            }),
            ("address wraps", |driver, _| {
                driver.descriptor(0, u64::MAX - 1, 4, F_WRITE, 0)
            }),
            ("readable after writable", |driver, _| {
                driver.descriptor(0, 0x20_0000, 1, F_WRITE | F_NEXT, 1);
                driver.descriptor(1, 0x20_0000, 1, 0, 0);
            }),
            ("nested indirect", |driver, memory| {
                driver.descriptor(0, 0x20_0000, 16, F_INDIRECT, 0);
                write_descriptor(memory, 0x20_0000, 0x20_1000, 16, F_INDIRECT, 0);
            }),
            ("indirect table of odd length", |driver, _| {
                driver.descriptor(0, 0x20_0000, 17, F_INDIRECT, 0);
            }),
            ("empty indirect table", |driver, _| {
                driver.descriptor(0, 0x20_0000, 0, F_INDIRECT, 0)
            }),
            ("too many buffers", |driver, memory| {
                driver.descriptor(0, 0x20_0000, 16 * 2000, F_INDIRECT, 0);
                for index in 0..2000u16 {
                    let at = 0x20_0000 + u64::from(index) * 16;
                    let flags = if index == 1999 { 0 } else { F_NEXT };
                    write_descriptor(memory, at, 0x30_0000, 1, flags, index + 1);
                }
            }),
        ];
        for (name, case) in cases {
            let (memory, mut driver, mut device, _) = queue();
            case(&mut driver, &memory);
            driver.offer(0);
            driver.offer_chain(8, &[(0x40_0000, 1, false)]);
            let chain = device
                .pop()
                .unwrap()
                .unwrap_or_else(|| panic!("{name}: queue stopped"));
            assert_eq!(chain.head(), 8, "{name}");
            assert_eq!(driver.used(), Some((0, 0)), "{name}");
        }
    }

    #[test]
    fn an_indirect_chain_is_followed() {
        let (memory, mut driver, mut device, _) = queue();
        write_descriptor(&memory, 0x20_0000, 0x30_0000, 10, F_NEXT, 1);
        write_descriptor(&memory, 0x20_0010, 0x31_0000, 20, F_WRITE, 0);
        driver.descriptor(3, 0x20_0000, 32, F_INDIRECT, 0);
        driver.offer(3);
        let chain = device.pop().unwrap().unwrap();
        assert_eq!((chain.readable_len(), chain.writable_len()), (10, 20));
    }

    #[test]
    fn a_head_in_flight_cannot_be_made_available_again() {
        let (_, mut driver, mut device, _) = queue();
        driver.offer_chain(2, &[(0x20_0000, 1, false)]);
        let _held = device.pop().unwrap().unwrap();
        driver.offer(2);
        assert!(matches!(
            device.pop(),
            Err(QueueError::HeadInFlight { head: 2, .. })
        ));
    }

    #[test]
    fn an_available_index_that_lies_breaks_the_ring() {
        let (memory, _, mut device, _) = queue();
        memory.write_obj(1000u16, GuestAddress(0x18002)).unwrap();
        assert!(matches!(device.pop(), Err(QueueError::Ring { .. })));
    }

    #[test]
    fn what_is_available_and_then_is_not_breaks_the_ring() {
        let (memory, mut driver, mut device, _) = queue();
        driver.offer_chain(0, &[(0x20_0000, 1, false)]);
        assert!(device.enable_kicks().unwrap());
        memory.write_obj(0u16, GuestAddress(0x18002)).unwrap();
        assert!(matches!(device.pop(), Err(QueueError::Withdrawn { .. })));
        // One that is there is no promise for the next, malformed or not.
        let (_, mut driver, mut device, _) = queue();
        for address in [0x20_0000, u64::MAX] {
            driver.offer_chain(0, &[(address, 1, false)]);
            assert!(device.enable_kicks().unwrap());
            while let Some(chain) = device.pop().unwrap() {
                device.push(chain, 0).unwrap();
            }
            assert!(!device.enable_kicks().unwrap());
        }
    }

    #[test]
    fn lines_about_broken_queues_end() {
        let lines = AtomicU64::new(0);
        let logged = (0..1000).filter(|_| may_log(&lines)).count();
        assert_eq!(logged as u64, limits::BROKEN_QUEUE_WARNINGS);
    }

    #[test]
    fn a_ring_full_of_malformed_chains_breaks_it() {
        let (_, mut driver, mut device, _) = queue();
        for head in 0..16 {
            driver.offer_chain(head, &[(u64::MAX, 1, false)]);
        }
        assert!(matches!(device.pop(), Err(QueueError::Malformed { .. })));
    }

    #[test]
    fn a_head_outside_the_table_breaks_the_ring() {
        let (_, mut driver, mut device, _) = queue();
        driver.offer(16);
        assert!(matches!(device.pop(), Err(QueueError::Ring { .. })));
    }

    #[test]
    fn an_unpopped_chain_comes_again() {
        let (_, mut driver, mut device, _) = queue();
        driver.offer_chain(2, &[(0x20_0000, 1, false)]);
        let chain = device.pop().unwrap().unwrap();
        device.unpop(chain);
        assert_eq!(device.pop().unwrap().unwrap().head(), 2);
    }

    #[test]
    fn a_chain_in_memory_that_came_later_is_taken_after_the_growth() {
        let (small, mut driver, _, interrupt) = queue();
        let memory = GrowingMemory::from(small.clone());
        let mut ring = Queue::new(16).unwrap();
        ring.set_desc_table_address(Some(0x10000), Some(0));
        ring.set_avail_ring_address(Some(0x10000 + 0x8000), Some(0));
        ring.set_used_ring_address(Some(0x10000 + 0xc000), Some(0));
        ring.set_ready(true);
        let kick = EventFd::new(0).unwrap();
        let mut device = VirtQueue::new(0, ring, memory.clone(), kick, interrupt);
        let beyond = MEMORY_SIZE as u64;
        driver.offer_chain(0, &[(beyond, 8, false)]);
        assert!(device.pop().unwrap().is_none());
        assert_eq!(driver.used(), Some((0, 0)));
        let more = vm_memory::GuestRegionMmap::from_range(GuestAddress(beyond), 4096, None);
        let large = small.insert_region(Arc::new(more.unwrap())).unwrap();
        large.write_slice(b"ungrown", GuestAddress(beyond)).unwrap();
        memory.lock().unwrap().replace(large);
        driver.offer_chain(1, &[(beyond, 7, false), (0x2000, 8, true)]);
        let chain = device.pop().unwrap().unwrap();
        let mut text = String::new();
        chain.reader().read_to_string(&mut text).unwrap();
        assert_eq!(text, "ungrown");
        device.push(chain, 0).unwrap();
        assert_eq!(driver.used(), Some((1, 0)));
    }
}
