//! The device: features, configuration space, and the queues' way to [`Running`] and back.

use std::sync::Arc;

use super::feature;
use super::link::{Rings, Running};
use super::slot::{Slot, State};
use crate::virtio::{ActivateError, Activation, VirtioDevice};

const DEVICE_TYPE: u32 = 1;
const QUEUE_SIZE: u16 = 256;
const CONTROL_SIZE: u16 = 64;
/// VIRTIO_NET_S_LINK_UP. So it stays when the slot is empty: the agent sets the guest's interface up and down.
const LINK_UP: u16 = 1;

/// The device of one slot.
pub struct Net {
    slot: Arc<Slot>,
    sizes: Vec<u16>,
}

impl Net {
    /// The device of `slot`.
    pub fn new(slot: Arc<Slot>) -> Self {
        let mut sizes = vec![QUEUE_SIZE; slot.pairs() * 2];
        if slot.pairs() > 1 {
            sizes.push(CONTROL_SIZE);
        }
        Self { slot, sizes }
    }

    /// The first fields of section 5.1.4: address, status, most pairs of queues.
    fn config(&self) -> [u8; 10] {
        let mut config = [0; 10];
        let pairs = u16::try_from(self.slot.pairs()).unwrap_or(1);
        config[..6].copy_from_slice(&self.slot.mac());
        config[6..8].copy_from_slice(&LINK_UP.to_le_bytes());
        config[8..].copy_from_slice(&pairs.to_le_bytes());
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
        let several = self.slot.pairs() > 1;
        CSUM | GUEST_CSUM
            | MAC
            | GUEST_TSO4
            | GUEST_TSO6
            | HOST_TSO4
            | HOST_TSO6
            | MRG_RXBUF
            | STATUS
            | if several { CTRL_VQ | MQ } else { 0 }
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
        let features = activation.features;
        let mut queues = activation.queues.into_iter();
        // Without MQ the control queue comes after the first pair (section 5.1.2).
        let count = match features & feature::MQ {
            0 => 1,
            _ => self.slot.pairs(),
        };
        let mut pairs = Vec::with_capacity(count);
        for index in 0..count {
            pairs.push(match (queues.next().flatten(), queues.next().flatten()) {
                (Some(receive), Some(transmit)) => Some(Rings { receive, transmit }),
                // A driver need not take all pairs.
                _ if index > 0 => None,
                (None, _) => return Err(ActivateError::MissingQueue(0)),
                (_, None) => return Err(ActivateError::MissingQueue(1)),
            });
        }
        let control = queues.next().flatten();
        let control = control.filter(|_| features & feature::CTRL_VQ != 0);
        let mut state = self.slot.state();
        let State { link, running } = &mut *state;
        let mut new = Running::new(features, pairs, control)?;
        if let Err(error) = new.start(self.slot.id(), link.as_mut()) {
            new.stop(link.as_mut());
            return Err(ActivateError::Io {
                what: "serve its queues",
                source: std::io::Error::other(error),
            });
        }
        *running = Some(new);
        Ok(())
    }

    fn reset(&mut self) {
        let mut state = self.slot.state();
        let State { link, running } = &mut *state;
        if let Some(mut running) = running.take() {
            running.stop(link.as_mut());
        }
    }
}
