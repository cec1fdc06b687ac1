//! The device: features, configuration space, control queue, and a thread for each pair of queues.

use std::io::Read;
use std::sync::Arc;

use super::pair::Pair;
use super::{Mac, Rate, Tap, TapError, feature};
use crate::virtio::queue::{QueueError, VirtQueue};
use crate::virtio::worker::Worker;
use crate::virtio::{ActivateError, Activation, VirtioDevice};

const DEVICE_TYPE: u32 = 1;
const QUEUE_SIZE: u16 = 256;
const CONTROL_SIZE: u16 = 64;
/// VIRTIO_NET_S_LINK_UP.
const LINK_UP: u16 = 1;

/// Control messages (section 5.1.6.5): class and command of VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, and the answers.
const PAIRS_SET: [u8; 2] = [4, 0];
const OK: u8 = 0;
const ERR: u8 = 1;

/// A network device.
pub struct Net {
    mac: Mac,
    mtu: u16,
    rate: Rate,
    taps: Vec<Arc<Tap>>,
    sizes: Vec<u16>,
    workers: Vec<Worker>,
}

impl Net {
    /// One pair of queues for each of `taps`, which are the queues of one tap; there must be one or more. The rate is
    /// shared out among them.
    pub fn new(mac: Mac, mtu: u16, rate: Rate, taps: Vec<Tap>) -> Self {
        let mut sizes = vec![QUEUE_SIZE; taps.len() * 2];
        if taps.len() > 1 {
            sizes.push(CONTROL_SIZE);
        }
        let pairs = taps.len().max(1) as u64;
        let share = |total: u64| match total {
            0 => 0,
            total => (total / pairs).max(1),
        };
        Self {
            mac,
            mtu,
            rate: Rate {
                bytes: share(rate.bytes),
                frames: share(rate.frames),
                burst_bytes: share(rate.burst_bytes),
                burst_frames: share(rate.burst_frames),
            },
            taps: taps.into_iter().map(Arc::new).collect(),
            sizes,
            workers: Vec::new(),
        }
    }

    fn config(&self) -> [u8; 12] {
        let mut config = [0; 12];
        let pairs = u16::try_from(self.taps.len()).unwrap_or(1);
        config[..6].copy_from_slice(&self.mac);
        config[6..8].copy_from_slice(&LINK_UP.to_le_bytes());
        config[8..10].copy_from_slice(&pairs.to_le_bytes());
        config[10..].copy_from_slice(&self.mtu.to_le_bytes());
        config
    }
}

impl VirtioDevice for Net {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn name(&self) -> &'static str {
        "net"
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.sizes
    }

    fn features(&self) -> u64 {
        use feature::*;
        let several = if self.taps.len() > 1 { CTRL_VQ | MQ } else { 0 };
        CSUM | GUEST_CSUM
            | MTU
            | MAC
            | GUEST_TSO4
            | GUEST_TSO6
            | HOST_TSO4
            | HOST_TSO6
            | MRG_RXBUF
            | STATUS
            | several
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = self.config();
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        let rest = config.get(from..).unwrap_or_default();
        for (to, byte) in data.iter_mut().zip(rest) {
            *to = *byte;
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let io = |what| move |source| ActivateError::Io { what, source };
        let features = activation.features;
        let mut queues = activation.queues.into_iter();
        for (index, tap) in self.taps.iter().enumerate() {
            // The guest turns the others on.
            set_up(tap, features, index == 0).map_err(|error| ActivateError::Io {
                what: "set the tap up",
                source: std::io::Error::other(error),
            })?;
            let (receive, transmit) = (queues.next().flatten(), queues.next().flatten());
            let (receive, transmit) = match (receive, transmit) {
                (Some(receive), Some(transmit)) => (receive, transmit),
                // A driver need not take all pairs.
                _ if index > 0 => continue,
                (None, _) => return Err(ActivateError::MissingQueue(0)),
                (_, None) => return Err(ActivateError::MissingQueue(1)),
            };
            let kicks = [&receive, &transmit].map(|queue| queue.kick().try_clone());
            let kicks = kicks
                .into_iter()
                .collect::<Result<_, _>>()
                .map_err(io("share an event"))?;
            let mergeable = features & feature::MRG_RXBUF != 0;
            let both = [receive, transmit];
            let mut pair = Pair::new(tap.clone(), self.mac, both, mergeable, self.rate)
                .map_err(io("make a timer"))?;
            let sources = pair.sources().map_err(io("share a descriptor"))?;
            let serve = move || going(pair.serve());
            self.workers.push(Worker::start_with(
                &format!("net{index}"),
                kicks,
                sources,
                serve,
            )?);
        }
        if features & feature::CTRL_VQ != 0
            && let Some(mut control) = queues.next().flatten()
        {
            let kick = control.kick().try_clone().map_err(io("share an event"))?;
            let taps = self.taps.clone();
            let serve = move || going(serve_control(&mut control, &taps));
            self.workers
                .push(Worker::start("net-control", vec![kick], serve)?);
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.workers.clear();
    }
}

fn set_up(tap: &Tap, features: u64, on: bool) -> Result<(), TapError> {
    tap.enable(true)?;
    tap.set_offload(features)?;
    tap.enable(on)
}

fn going(served: Result<(), QueueError>) -> bool {
    if let Err(error) = &served {
        tracing::warn!(%error, "net stops");
    }
    served.is_ok()
}

/// A handful of messages in a guest's life.
fn serve_control(queue: &mut VirtQueue, taps: &[Arc<Tap>]) -> Result<(), QueueError> {
    let memory = queue.memory().clone();
    for _ in 0..CONTROL_SIZE {
        let Some(chain) = queue.pop()? else {
            if queue.enable_kicks()? {
                continue;
            }
            return queue.notify();
        };
        let mut message = [0; 4];
        let got = chain.reader(&memory).read_exact(&mut message);
        let answer = match (got, message) {
            (Ok(()), [class, command, low, high]) if [class, command] == PAIRS_SET => {
                enable_pairs(taps, u16::from_le_bytes([low, high]))
            }
            _ => ERR,
        };
        let written = std::io::Write::write_all(&mut chain.writer(&memory), &[answer]);
        queue.push(chain, u32::from(written.is_ok()))?;
    }
    queue.notify()?;
    queue.serve_again();
    Ok(())
}

fn enable_pairs(taps: &[Arc<Tap>], wanted: u16) -> u8 {
    let wanted = usize::from(wanted);
    if !(1..=taps.len()).contains(&wanted) {
        return ERR;
    }
    for (index, tap) in taps.iter().enumerate() {
        if let Err(error) = tap.enable(index < wanted) {
            tracing::warn!(%error, "cannot change the number of the tap's queues");
            return ERR;
        }
    }
    OK
}
