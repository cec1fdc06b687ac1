//! The device and its queues.

use vmm_sys_util::eventfd::EventFd;

use crate::limits;
use crate::virtio::chain::Chain;
use crate::virtio::queue::{QueueError, VirtQueue, log_broken};
use crate::virtio::worker::Worker;
use crate::virtio::{ActivateError, Activation, VirtioDevice};

const DEVICE_TYPE: u32 = 5;
/// VIRTIO_BALLOON_F_PAGE_REPORTING.
const F_PAGE_REPORTING: u64 = 1 << 5;
/// Inflate, deflate, reports. Section 5.5.2 numbers the last 4; drivers count the queues that there are. Linux reports
/// only if the queue has room for a whole report.
const QUEUE_SIZES: [u16; 3] = [16, 16, 64];
const REPORTS: usize = 2;
/// What the host can take back: memory is mapped in pages of this size.
const PAGE: usize = 4096;

/// The balloon device.
#[derive(Default)]
pub struct Balloon {
    worker: Option<Worker>,
}

impl VirtioDevice for Balloon {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn name(&self) -> &'static str {
        "balloon"
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        F_PAGE_REPORTING
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let mut queues = Vec::new();
        for (index, queue) in (0..).zip(activation.queues) {
            match queue {
                Some(queue) => queues.push(queue),
                // Without reports there is nothing to do; they come only if the driver accepts them.
                None if usize::from(index) == REPORTS => {}
                None => return Err(ActivateError::MissingQueue(index)),
            }
        }
        let share = |queue: &VirtQueue| queue.kick().try_clone();
        let kicks: Result<Vec<EventFd>, _> = queues.iter().map(share).collect();
        let kicks = kicks.map_err(|source| ActivateError::Io {
            what: "share an event",
            source,
        })?;
        self.worker = Some(Worker::start("balloon", kicks, move || {
            let mut served = queues.iter_mut().enumerate();
            served
                .try_for_each(|(index, queue)| serve(queue, index == REPORTS))
                .inspect_err(|error| log_broken("balloon", error))
                .is_ok()
        })?);
        Ok(())
    }

    fn reset(&mut self) {
        self.worker = None;
    }
}

/// Pages that the guest puts into the balloon though nobody asks, or takes out, are its business.
fn serve(queue: &mut VirtQueue, reports: bool) -> Result<(), QueueError> {
    for _ in 0..limits::REQUESTS_AT_ONCE {
        let Some(chain) = queue.pop()? else {
            if queue.enable_kicks()? {
                continue;
            }
            return Ok(());
        };
        if reports {
            take_back(&chain);
        }
        queue.push(chain, 0)?;
        queue.notify()?;
    }
    queue.serve_again();
    Ok(())
}

/// The host's pages behind a report are gone; the guest reads zeros where they were. A page of which only a part was
/// reported stays, and so does what is beyond the cap: a report is an offer.
fn take_back(chain: &Chain) {
    let buffers = chain.writable_iovecs(0, usize::MAX);
    for buffer in buffers.iter().take(limits::BALLOON_REPORT_BUFFERS) {
        let start = buffer.iov_base.cast::<u8>();
        let before = start.align_offset(PAGE);
        let len = buffer.iov_len.saturating_sub(before) / PAGE * PAGE;
        if len == 0 {
            continue;
        }
        // SAFETY: the range lies within a buffer of the chain, which was checked to be guest memory and stays mapped
        // while the chain lives. No reference to guest memory exists: all access is by copies that expect any content.
        let taken = unsafe { libc::madvise(start.add(before).cast(), len, libc::MADV_DONTNEED) };
        if taken < 0 {
            // What stays costs memory and nothing else.
            tracing::debug!(error = %std::io::Error::last_os_error(), len, "reported memory stays");
        }
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::virtio::SharedMemory;
    use crate::virtio::testing::{CountingInterrupt, DriverQueue, memory};

    const DATA: u64 = 0x40_0000;

    struct Rig {
        memory: SharedMemory,
        balloon: Balloon,
        drivers: Vec<DriverQueue>,
    }

    fn rig() -> Rig {
        let memory = memory();
        let interrupt = CountingInterrupt::new();
        let (mut drivers, mut queues) = (Vec::new(), Vec::new());
        for (index, size) in (0..).zip(QUEUE_SIZES) {
            let base = 0x10000 * (u64::from(index) + 1);
            let (driver, queue) = DriverQueue::new(&memory, index, base, size, interrupt.clone());
            drivers.push(driver);
            queues.push(Some(queue));
        }
        let mut balloon = Balloon::default();
        let activation = Activation {
            features: F_PAGE_REPORTING,
            queues,
            interrupt,
        };
        balloon.activate(activation).unwrap();
        let ones = vec![1; 0x40_0000];
        memory.write_slice(&ones, GuestAddress(DATA)).unwrap();
        Rig {
            memory,
            balloon,
            drivers,
        }
    }

    impl Rig {
        /// Offers a chain of `(address, length, device may write)` and waits until it comes back.
        fn offer(&mut self, queue: usize, buffers: &[(u64, u32, bool)]) {
            let driver = &mut self.drivers[queue];
            driver.offer_chain(0, buffers);
            driver.kick();
            loop {
                match driver.used() {
                    Some(used) => break assert_eq!(used, (0, 0)),
                    // Of a chain that is refused the guest is not told.
                    None => std::thread::yield_now(),
                }
            }
        }

        /// Whether the page that holds the address reads as zeros.
        fn is_gone(&self, address: u64) -> bool {
            let mut page = [0; PAGE];
            let start = GuestAddress(address & !(PAGE as u64 - 1));
            self.memory.read_slice(&mut page, start).unwrap();
            page == [0; PAGE]
        }
    }

    #[test]
    fn reported_pages_are_gone_and_their_neighbours_stay() {
        let mut rig = rig();
        rig.offer(
            REPORTS,
            &[(DATA + 4096, 8192, true), (DATA + 0x20_0000, 4096, true)],
        );
        let gone: Vec<u64> = (0..0x400)
            .filter(|page| rig.is_gone(DATA + page * 4096))
            .collect();
        assert_eq!(gone, [1, 2, 0x200]);
        rig.memory
            .write_slice(&[7; 4096], GuestAddress(DATA + 4096))
            .unwrap();
        assert!(!rig.is_gone(DATA + 4096), "the guest has it back");
    }

    #[test]
    fn a_page_that_is_not_reported_whole_stays() {
        let mut rig = rig();
        rig.offer(
            REPORTS,
            &[(DATA + 1, 8191, true), (DATA + 0x5000, 4095, true)],
        );
        assert!(!rig.is_gone(DATA), "its first byte is in use");
        assert!(rig.is_gone(DATA + 0x1000));
        assert!(!rig.is_gone(DATA + 0x2000));
        assert!(!rig.is_gone(DATA + 0x5000));
    }

    #[test]
    fn what_the_device_may_only_read_and_what_is_outside_memory_stays() {
        let mut rig = rig();
        rig.offer(REPORTS, &[(DATA, 4096, false)]);
        rig.offer(REPORTS, &[(DATA, 4096, true), (1 << 40, 4096, true)]);
        assert!(!rig.is_gone(DATA));
    }

    #[test]
    fn of_a_report_no_more_than_the_cap_is_taken() {
        let mut rig = rig();
        let cap = limits::BALLOON_REPORT_BUFFERS as u64;
        let pages = (0..cap + 2).map(|page| (DATA + page * 8192, 4096, true));
        rig.offer(REPORTS, &pages.collect::<Vec<_>>());
        assert!(rig.is_gone(DATA + (cap - 1) * 8192));
        assert!(!rig.is_gone(DATA + cap * 8192));
    }

    #[test]
    fn pages_put_into_the_balloon_come_back_at_once_and_nothing_happens_to_them() {
        let mut rig = rig();
        for queue in 0..REPORTS {
            rig.offer(queue, &[(DATA, 4096, false)]);
        }
        assert!(!rig.is_gone(DATA));
        rig.balloon.reset();
    }
}
