//! Our own data path: the two queues of a pair, a queue of the tap, and the rates, served by one thread.

use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

use super::bucket::Rates;
use super::link::Rings;
use super::{ETHERNET, HEADER, Mac, Tap, feature, header};
use crate::limits;
use crate::virtio::chain::Chain;
use crate::virtio::queue::{QueueError, VirtQueue};

/// Offset of `num_buffers` in the header.
const NUM_BUFFERS: usize = 10;

/// See the module.
pub struct Pair {
    tap: Arc<Tap>,
    mac: Mac,
    /// Those accepted.
    features: u64,
    rates: Option<Arc<Rates>>,
    /// Frames of the tap go to this pair.
    receives: bool,
    timer: OwnedFd,
    /// Of the direction to the guest.
    frame: Vec<u8>,
    /// Bytes of `frame` that wait for buffers of the guest.
    waiting: Option<usize>,
    /// Of the direction from the guest.
    sent: Vec<u8>,
    dropped: u64,
}

impl Pair {
    /// `features` are those accepted; without `receives` the pair only sends.
    pub fn new(
        tap: Arc<Tap>,
        mac: Mac,
        features: u64,
        rates: Option<Arc<Rates>>,
        receives: bool,
    ) -> io::Result<Self> {
        Ok(Self {
            tap,
            mac,
            features,
            rates,
            receives,
            timer: timerfd_create(
                TimerfdClockId::Monotonic,
                TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC,
            )?,
            frame: vec![0; limits::NET_FRAME],
            waiting: None,
            sent: vec![0; limits::NET_FRAME],
            dropped: 0,
        })
    }

    /// Descriptors whose readiness means work, beside the kicks: the tap and the timer of the rates.
    pub fn sources(&self) -> io::Result<Vec<OwnedFd>> {
        let mut sources = vec![self.timer.try_clone()?];
        if self.receives {
            sources.push(self.tap.try_clone()?);
        }
        Ok(sources)
    }

    /// Serves both directions until there is nothing to do or others had to wait long enough. Nothing is in flight after.
    pub fn serve(&mut self, rings: &mut Rings) -> Result<(), QueueError> {
        self.serve_transmit(&mut rings.transmit)?;
        if self.receives {
            self.serve_receive(&mut rings.receive)?;
        }
        Ok(())
    }

    fn serve_transmit(&mut self, queue: &mut VirtQueue) -> Result<(), QueueError> {
        let mut done = 0;
        queue.disable_kicks()?;
        while done < limits::NET_FRAMES_AT_ONCE {
            let wait = match &self.rates {
                Some(rates) => rates.outward().wait(Instant::now()),
                None => Duration::ZERO,
            };
            if !wait.is_zero() {
                self.call_after(wait);
                break;
            }
            let Some(chain) = queue.pop()? else {
                if queue.enable_kicks()? {
                    continue;
                }
                break;
            };
            done += 1;
            self.send(&chain);
            queue.push(chain, 0)?;
        }
        if done == limits::NET_FRAMES_AT_ONCE {
            queue.serve_again();
        }
        if done > 0 {
            queue.notify()?;
        }
        Ok(())
    }

    /// One frame of the guest; what cannot be sent is dropped, as on any network.
    fn send(&mut self, chain: &Chain) {
        let len = chain.readable_len();
        let fits = len >= HEADER + ETHERNET;
        let Some(frame) = self.sent.get_mut(..len).filter(|_| fits) else {
            return self.drop_frame(&"too short or too long");
        };
        if let Err(error) = chain.reader().read_exact(frame) {
            return self.drop_frame(&error);
        }
        if frame.get(HEADER + 6..HEADER + 12) != Some(&self.mac) {
            return self.drop_frame(&"its source is not the device's address");
        }
        if let Err(error) = header::check(frame, self.features) {
            return self.drop_frame(&error);
        }
        if let Some(rates) = &self.rates {
            rates.outward().spend(len - HEADER);
        }
        if let Err(error) = self.tap.send(frame) {
            self.drop_frame(&error);
        }
    }

    fn serve_receive(&mut self, queue: &mut VirtQueue) -> Result<(), QueueError> {
        let mut done = 0;
        queue.disable_kicks()?;
        while done < limits::NET_FRAMES_AT_ONCE {
            let len = match self.waiting {
                Some(len) => len,
                None => match self.next_frame() {
                    Some(len) => len,
                    None => break,
                },
            };
            self.waiting = Some(len);
            if !self.deliver(len, queue)? {
                break;
            }
            self.waiting = None;
            if let Some(rates) = &self.rates {
                rates.inward().spend(len.saturating_sub(HEADER));
            }
            done += 1;
        }
        if done == limits::NET_FRAMES_AT_ONCE {
            queue.serve_again();
        }
        if done > 0 {
            queue.notify()?;
        }
        Ok(())
    }

    /// Reads into `frame`, if there is a frame and it may go now.
    fn next_frame(&mut self) -> Option<usize> {
        if let Some(rates) = &self.rates {
            let wait = rates.inward().wait(Instant::now());
            if !wait.is_zero() {
                self.call_after(wait);
                return None;
            }
        }
        self.tap.receive(&mut self.frame).unwrap_or_else(|error| {
            // The interface is down or gone; the next frame wakes us if it comes back.
            tracing::debug!(%error, "no frame from the tap");
            None
        })
    }

    /// Puts the frame into the guest's buffers (section 5.1.6.4): one chain, or several where the driver merges them.
    /// `false` if there are too few yet; then the guest calls when it has more.
    fn deliver(&mut self, len: usize, queue: &mut VirtQueue) -> Result<bool, QueueError> {
        let most = if self.features & feature::MRG_RXBUF != 0 {
            limits::NET_BUFFERS
        } else {
            1
        };
        let mut chains: Vec<Chain> = Vec::new();
        let mut room = 0usize;
        while room < len && chains.len() < most {
            let Some(chain) = queue.pop()? else {
                // Before those popped go back: the guest is to call for one more than them.
                if queue.enable_kicks()? {
                    continue;
                }
                break;
            };
            room = room.saturating_add(chain.writable_len());
            chains.push(chain);
        }
        if room < len {
            let too_large = chains.len() == most;
            if too_large {
                self.drop_frame(&"larger than the guest's buffers");
            }
            while let Some(chain) = chains.pop() {
                queue.unpop(chain);
            }
            return Ok(too_large);
        }
        let count = u16::try_from(chains.len()).unwrap_or(u16::MAX);
        if let Some(field) = self.frame.get_mut(NUM_BUFFERS..HEADER) {
            field.copy_from_slice(&count.to_le_bytes());
        }
        let mut rest = self.frame.get(..len).unwrap_or_default();
        let mut filled = Vec::with_capacity(chains.len());
        for chain in chains {
            let (part, after) = rest.split_at(rest.len().min(chain.writable_len()));
            rest = after;
            // Checked when popped: it fails for no reason of the guest's.
            if chain.writer().write_all(part).is_err() {
                tracing::warn!("cannot write a frame into guest memory");
            }
            filled.push((chain, part.len() as u32));
        }
        queue.push_all(filled)?;
        Ok(true)
    }

    fn drop_frame(&mut self, why: &dyn std::fmt::Display) {
        self.dropped = self.dropped.saturating_add(1);
        if self.dropped <= limits::NET_WARNINGS {
            tracing::debug!(%why, "dropped a frame");
        }
    }

    fn call_after(&self, wait: Duration) {
        let none = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let once = Itimerspec {
            it_interval: none,
            it_value: Timespec {
                tv_sec: i64::try_from(wait.as_secs()).unwrap_or(i64::MAX),
                // Zero would disarm the timer.
                tv_nsec: i64::from(wait.subsec_nanos()).max(1),
            },
        };
        if let Err(error) = timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &once) {
            tracing::warn!(%error, "cannot wait for the rate of a direction");
        }
    }
}
