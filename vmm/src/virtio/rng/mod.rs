//! Entropy device (virtio 1.3 section 5.4): fills the guest's buffers from the host's random source, with a rate cap.

mod device;

pub use device::Rng;
