//! The device and its queue.

use std::io::{self, Write};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::limits;
use crate::virtio::queue::{QueueError, VirtQueue, log_broken};
use crate::virtio::worker::Worker;
use crate::virtio::{ActivateError, Activation, VirtioDevice};

const DEVICE_TYPE: u32 = 4;
/// The driver asks for one buffer at a time.
const QUEUE_SIZES: [u16; 1] = [64];

/// The entropy device.
#[derive(Default)]
pub struct Rng {
    worker: Option<Worker>,
    /// Not the worker's own: a driver that resets the device has no more for it.
    budget: Arc<Mutex<Budget>>,
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn name(&self) -> &'static str {
        "rng"
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let queue = activation.queues.into_iter().next().flatten();
        let mut queue = queue.ok_or(ActivateError::MissingQueue(0))?;
        let kick = queue
            .kick()
            .try_clone()
            .map_err(|source| ActivateError::Io {
                what: "share an event",
                source,
            })?;
        let budget = self.budget.clone();
        self.worker = Some(Worker::start("rng", vec![kick], move || {
            let mut budget = budget.lock().unwrap_or_else(PoisonError::into_inner);
            match serve(&mut queue, &mut budget) {
                Ok(()) => true,
                Err(error) => {
                    log_broken("rng", &error);
                    false
                }
            }
        })?);
        Ok(())
    }

    fn reset(&mut self) {
        self.worker = None;
    }
}

fn serve(queue: &mut VirtQueue, budget: &mut Budget) -> Result<(), QueueError> {
    let mut done = 0;
    while done < limits::REQUESTS_AT_ONCE {
        let Some(chain) = queue.pop()? else {
            if queue.enable_kicks()? {
                continue;
            }
            return Ok(());
        };
        done += 1;
        let wanted = chain.writable_len().min(limits::RNG_REQUEST_BYTES);
        let mut bytes = vec![0; wanted];
        // One for nothing costs a system call and a call of the guest too.
        budget.spend(wanted.max(limits::RNG_REQUEST_COST));
        let written = match random(&mut bytes).and_then(|()| chain.writer().write_all(&bytes)) {
            Ok(()) => wanted as u32,
            Err(error) => {
                tracing::warn!(%error, "no random bytes for the guest");
                0
            }
        };
        queue.push(chain, written)?;
        queue.notify()?;
    }
    queue.serve_again();
    Ok(())
}

fn random(mut bytes: &mut [u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        // SAFETY: the pointer and length are those of a slice that is ours to write.
        let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
        match usize::try_from(got) {
            Ok(got) => bytes = bytes.get_mut(got..).unwrap_or_default(),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
    Ok(())
}

/// A guest that only asks for random bytes waits, rather than keeping a host processor busy.
struct Budget {
    left: usize,
    renewed: Instant,
}

impl Default for Budget {
    fn default() -> Self {
        Self {
            left: limits::RNG_BYTES_PER_SECOND,
            renewed: Instant::now(),
        }
    }
}

impl Budget {
    fn spend(&mut self, bytes: usize) {
        let second = Duration::from_secs(1);
        if self.renewed.elapsed() >= second {
            *self = Self::default();
        }
        match self.left.checked_sub(bytes) {
            Some(left) => self.left = left,
            // Short enough that a reset, which waits for this thread, hardly notices.
            None => std::thread::sleep(Duration::from_millis(10)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::virtio::testing::{CountingInterrupt, DriverQueue, memory};

    #[test]
    fn a_reset_does_not_wait_for_a_queue_full_of_requests() {
        let memory = memory();
        let interrupt = CountingInterrupt::new();
        let (mut driver, queue) = DriverQueue::new(&memory, 0, 0x10000, 1024, interrupt.clone());
        for head in 0..1024 {
            driver.offer_chain(head, &[(0x20_0000, 4096, true)]);
        }
        let mut rng = Rng::default();
        rng.activate(Activation {
            features: 0,
            queues: vec![Some(queue)],
            interrupt,
        })
        .unwrap();
        // By now the second's bytes are used up.
        std::thread::sleep(Duration::from_millis(300));
        let start = Instant::now();
        rng.reset();
        assert!(start.elapsed() < Duration::from_millis(500));
    }

    #[test]
    fn a_seconds_bytes_are_used_up_and_come_back() {
        let mut budget = Budget::default();
        let requests = limits::RNG_BYTES_PER_SECOND / limits::RNG_REQUEST_BYTES;
        for _ in 0..requests {
            budget.spend(limits::RNG_REQUEST_BYTES);
        }
        assert_eq!(budget.left, 0);
        let start = Instant::now();
        budget.spend(limits::RNG_REQUEST_BYTES);
        assert!(
            start.elapsed() >= Duration::from_millis(10),
            "nobody waited"
        );
        budget.renewed -= Duration::from_secs(1);
        budget.spend(limits::RNG_REQUEST_BYTES);
        assert!(budget.left > 0);
    }

    #[test]
    fn requests_for_nothing_are_no_gift_and_a_reset_renews_no_budget() {
        let memory = memory();
        let mut rng = Rng::default();
        // Longer than the test takes.
        rng.budget.lock().unwrap().renewed += Duration::from_secs(60);
        for life in 1..4 {
            let interrupt = CountingInterrupt::new();
            let (mut driver, queue) = DriverQueue::new(&memory, 0, 0x10000, 16, interrupt.clone());
            memory.write_obj(0u32, GuestAddress(0x18000)).unwrap();
            memory.write_obj(0u32, GuestAddress(0x1c000)).unwrap();
            for head in 0..2 {
                driver.offer_chain(head, &[(0x20_0000, 64, false)]);
            }
            rng.activate(Activation {
                features: 0,
                queues: vec![Some(queue)],
                interrupt: interrupt.clone(),
            })
            .unwrap();
            let mut answered = 0;
            while answered < 2 {
                match driver.used() {
                    Some(entry) => {
                        assert_eq!(entry.1, 0);
                        answered += 1;
                    }
                    None => drop(interrupt.event.read()),
                }
            }
            rng.reset();
            let left = rng.budget.lock().unwrap().left;
            let spent = 2 * life * limits::RNG_REQUEST_COST;
            assert_eq!(left, limits::RNG_BYTES_PER_SECOND - spent);
        }
    }

    #[test]
    fn a_buffer_is_filled_up_to_the_cap() {
        let memory = memory();
        let interrupt = CountingInterrupt::new();
        let (mut driver, queue) = DriverQueue::new(&memory, 0, 0x10000, 16, interrupt.clone());
        driver.offer_chain(0, &[(0x20_0000, 64, true)]);
        driver.offer_chain(1, &[(0x30_0000, 1 << 20, true)]);
        driver.offer_chain(2, &[(0x40_0000, 64, false)]);
        let mut rng = Rng::default();
        rng.activate(Activation {
            features: 0,
            queues: vec![Some(queue)],
            interrupt: interrupt.clone(),
        })
        .unwrap();
        let mut used = Vec::new();
        while used.len() < 3 {
            match driver.used() {
                Some(entry) => used.push(entry),
                None => drop(interrupt.event.read()),
            }
        }
        rng.reset();
        assert_eq!(used, [(0, 64), (1, 4096), (2, 0)]);
        let mut bytes = [0; 64];
        memory
            .read_slice(&mut bytes, GuestAddress(0x20_0000))
            .unwrap();
        assert_ne!(bytes, [0; 64]);
    }
}
