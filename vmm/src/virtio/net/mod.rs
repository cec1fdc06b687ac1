//! Network devices (virtio 1.3 section 5.1): slots that a tap is put into and taken out of while the machine runs.
//!
//! ```text
//!   guest  -- transmit queue -->  copy, check, rate  -->  tap   -- tc redirect -->  the pod's interface
//!   guest  <-- receive queue --   rate, copy         <--  tap
//! ```
//!
//! A machine has its slots from boot, since virtio-mmio cannot be plugged in later. The shim fills one by
//! [`Slot::attach`] and empties it by [`Slot::detach`]; the driver's activations and resets come and go independently
//! of that. Whatever state both are in, one of three serves a pair of queues:
//!
//! - a thread with a queue of the tap ([`pair`]): our own path, with the check of addresses and headers and the rates;
//! - `vhost-net` in the kernel ([`vhost`]), where the shim gave descriptors for it. The shim's filter on the tap does the
//!   check of addresses then;
//! - with an empty slot, a thread that gives back what the guest sends, unread.
//!
//! The tap carries the same header as the queues (`IFF_VNET_HDR`, 12 bytes), so checksums and segmentation are left to
//! who can do them. In our own path a frame is copied once each way: what is checked is what is sent.

pub(in crate::virtio) mod bucket;
mod device;
mod header;
mod link;
mod pair;
mod slot;
mod tap;
#[cfg(test)]
mod tests;
mod vhost;

pub use bucket::Rate;
pub use device::Net;
pub use slot::{Attachment, NetError, Slot};
pub use tap::{Tap, TapError};
pub use vhost::VhostError;

/// Bytes before each frame: `struct virtio_net_hdr` with `num_buffers` (section 5.1.6).
const HEADER: usize = 12;

/// Destination and source address, and a type.
const ETHERNET: usize = 14;

/// An Ethernet address.
pub type Mac = [u8; 6];

/// Features of section 5.1.3 that this device offers. An MTU is not among them: the interface's, which is set later, holds.
mod feature {
    pub const CSUM: u64 = 1 << 0;
    pub const GUEST_CSUM: u64 = 1 << 1;
    pub const MAC: u64 = 1 << 5;
    pub const GUEST_TSO4: u64 = 1 << 7;
    pub const GUEST_TSO6: u64 = 1 << 8;
    pub const HOST_TSO4: u64 = 1 << 11;
    pub const HOST_TSO6: u64 = 1 << 12;
    pub const MRG_RXBUF: u64 = 1 << 15;
    pub const STATUS: u64 = 1 << 16;
    pub const CTRL_VQ: u64 = 1 << 17;
    pub const MQ: u64 = 1 << 22;
}

/// Parses the address of one device, written as six pairs of hexadecimal digits.
pub fn mac<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Mac, D::Error> {
    let text = <String as serde::Deserialize>::deserialize(from)?;
    let mut parts = text.split(':');
    let mut mac = Mac::default();
    let whole = mac.iter_mut().all(|byte| {
        let part = parts
            .next()
            .filter(|part| part.len() == 2 && part.bytes().all(|digit| digit.is_ascii_hexdigit()));
        let value = part.and_then(|part| u8::from_str_radix(part, 16).ok());
        *byte = value.unwrap_or_default();
        value.is_some()
    });
    // The lowest bit of the first byte is that of a group.
    if whole && parts.next().is_none() && mac[0] & 1 == 0 && mac != Mac::default() {
        return Ok(mac);
    }
    Err(serde::de::Error::custom(format!(
        "mac is {text:?}: must be the address of one device, like 02:00:00:00:00:01"
    )))
}
