//! Network device (virtio 1.3 section 5.1) over the queues of a tap.
//!
//! ```text
//!   guest  -- transmit queue -->  copy, check, rate  -->  tap   -- tc redirect -->  the pod's interface
//!   guest  <-- receive queue --   rate, copy         <--  tap
//! ```
//!
//! A pair of queues, a descriptor of the tap and a thread belong together ([`pair`]). The tap carries the same header as
//! the queues (`IFF_VNET_HDR`, 12 bytes), so checksums and segmentation are left to who can do them. A frame is copied
//! once each way: what is checked is what is sent. Frames from the guest must carry the device's own source address.

mod bucket;
mod device;
mod pair;
mod tap;
#[cfg(test)]
mod tests;

pub use bucket::Rate;
pub use device::Net;
pub use tap::{Tap, TapError};

/// Bytes before each frame: `struct virtio_net_hdr` with `num_buffers` (section 5.1.6).
const HEADER: usize = 12;

/// An Ethernet address.
pub type Mac = [u8; 6];

/// Features of section 5.1.3 that this device offers.
mod feature {
    pub const CSUM: u64 = 1 << 0;
    pub const GUEST_CSUM: u64 = 1 << 1;
    pub const MTU: u64 = 1 << 3;
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
