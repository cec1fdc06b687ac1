//! A receive and a transmit queue, the tap's queue between them and the host, and their rates: what one thread serves.

use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

use super::bucket::{Bucket, Rate};
use super::{HEADER, Mac, Tap};
use crate::limits;
use crate::virtio::chain::Chain;
use crate::virtio::queue::{QueueError, VirtQueue};

/// Offset of `num_buffers` in the header.
const NUM_BUFFERS: usize = 10;
/// Destination and source address, and a type.
const ETHERNET: usize = 14;

/// See the module.
pub struct Pair {
    tap: Arc<Tap>,
    mac: Mac,
    receive: VirtQueue,
    transmit: VirtQueue,
    mergeable: bool,
    inward: Bucket,
    outward: Bucket,
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
    /// `features` are those accepted.
    pub fn new(
        tap: Arc<Tap>,
        mac: Mac,
        [receive, transmit]: [VirtQueue; 2],
        mergeable: bool,
        rate: Rate,
    ) -> io::Result<Self> {
        let now = Instant::now();
        Ok(Self {
            tap,
            mac,
            receive,
            transmit,
            mergeable,
            inward: Bucket::new(rate, now),
            outward: Bucket::new(rate, now),
            timer: timerfd_create(
                TimerfdClockId::Monotonic,
                TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC,
            )?,
            frame: vec![0; limits::NET_FRAME],
            waiting: None,
            sent: Vec::with_capacity(limits::NET_FRAME),
            dropped: 0,
        })
    }

    /// Descriptors whose readiness means work, beside the kicks: the tap and the timer of the rates.
    pub fn sources(&self) -> io::Result<Vec<OwnedFd>> {
        Ok(vec![self.tap.try_clone()?, self.timer.try_clone()?])
    }

    /// Serves both directions until there is nothing to do or others had to wait long enough.
    pub fn serve(&mut self) -> Result<(), QueueError> {
        self.serve_transmit()?;
        self.serve_receive()
    }

    fn serve_transmit(&mut self) -> Result<(), QueueError> {
        let mut done = 0;
        let ended = loop {
            if done == limits::NET_FRAMES_AT_ONCE {
                break true;
            }
            let wait = self.outward.wait(Instant::now());
            if !wait.is_zero() {
                self.call_after(wait);
                break false;
            }
            let Some(chain) = self.transmit.pop()? else {
                if self.transmit.enable_kicks()? {
                    continue;
                }
                break false;
            };
            done += 1;
            self.send(&chain);
            self.transmit.push(chain, 0)?;
        };
        if done > 0 {
            self.transmit.notify()?;
        }
        if ended {
            self.transmit.serve_again();
        }
        Ok(())
    }

    /// One frame of the guest; what cannot be sent is dropped, as on any network.
    fn send(&mut self, chain: &Chain) {
        let len = chain.readable_len();
        self.sent.clear();
        let memory = self.transmit.memory().clone();
        let whole = (HEADER + ETHERNET..=limits::NET_FRAME).contains(&len)
            && chain.reader(&memory).read_to_end(&mut self.sent).is_ok();
        let source = self.sent.get(HEADER + 6..HEADER + 12);
        if !whole || source != Some(&self.mac) {
            return self.drop_frame("malformed, or its source is not the device's address");
        }
        self.outward.spend(len - HEADER);
        if let Err(error) = self.tap.send(&self.sent) {
            self.drop_frame(&error.to_string());
        }
    }

    fn serve_receive(&mut self) -> Result<(), QueueError> {
        let mut done = 0;
        let ended = loop {
            if done == limits::NET_FRAMES_AT_ONCE {
                break true;
            }
            let len = match self.waiting {
                Some(len) => len,
                None => {
                    let wait = self.inward.wait(Instant::now());
                    if !wait.is_zero() {
                        self.call_after(wait);
                        break false;
                    }
                    match self.tap.receive(&mut self.frame) {
                        Ok(Some(len)) => len,
                        Ok(None) => break false,
                        Err(error) => {
                            // The interface is down or gone; the next frame wakes us if it comes back.
                            tracing::debug!(%error, "no frame from the tap");
                            break false;
                        }
                    }
                }
            };
            self.waiting = Some(len);
            if !self.deliver(len)? {
                if self.receive.enable_kicks()? {
                    continue;
                }
                break false;
            }
            self.waiting = None;
            self.inward.spend(len.saturating_sub(HEADER));
            done += 1;
        };
        if done > 0 {
            self.receive.notify()?;
        }
        if ended {
            self.receive.serve_again();
        }
        Ok(())
    }

    /// Puts the frame into the guest's buffers (section 5.1.6.4): one chain, or several where the driver merges them.
    /// `false` if there are too few yet.
    fn deliver(&mut self, len: usize) -> Result<bool, QueueError> {
        let most = if self.mergeable {
            limits::NET_BUFFERS
        } else {
            1
        };
        let mut chains: Vec<Chain> = Vec::new();
        let mut room = 0usize;
        while room < len && chains.len() < most {
            let Some(chain) = self.receive.pop()? else {
                break;
            };
            room = room.saturating_add(chain.writable_len());
            chains.push(chain);
        }
        if room < len {
            let too_large = chains.len() == most;
            if too_large {
                self.drop_frame("larger than the guest's buffers");
            }
            while let Some(chain) = chains.pop() {
                self.receive.unpop(chain);
            }
            return Ok(too_large);
        }
        let count = u16::try_from(chains.len()).unwrap_or(u16::MAX);
        if let Some(field) = self.frame.get_mut(NUM_BUFFERS..HEADER) {
            field.copy_from_slice(&count.to_le_bytes());
        }
        let memory = self.receive.memory().clone();
        let mut rest = self.frame.get(..len).unwrap_or_default();
        for chain in chains {
            let (part, after) = rest.split_at(rest.len().min(chain.writable_len()));
            rest = after;
            // Checked when popped: it fails for no reason of the guest's.
            if chain.writer(&memory).write_all(part).is_err() {
                tracing::warn!("cannot write a frame into guest memory");
            }
            self.receive.push(chain, part.len() as u32)?;
        }
        Ok(true)
    }

    fn drop_frame(&mut self, why: &str) {
        self.dropped = self.dropped.saturating_add(1);
        if self.dropped <= limits::NET_WARNINGS {
            tracing::debug!(why, "dropped a frame");
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
