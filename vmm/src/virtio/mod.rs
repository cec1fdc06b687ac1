//! Virtio (virtio 1.3): what a device is, apart from how the guest reaches it.
//!
//! A device is a [`VirtioDevice`]: one folder each below this one. A transport ([`transport`]) carries it to the
//! guest: `mmio` for our own VMM, `vhost_user` for the emulator. The transport negotiates features and
//! sets the queues up, then hands everything over in one [`Activation`]; from then on the device's own threads
//! serve the queues until [`VirtioDevice::reset`].
//!
//! Guest bytes enter in two places only: a transport's registers, and [`queue::VirtQueue::pop`], which
//! checks every descriptor before a device sees it. With vhost-net the host's kernel reads a network device's queues in its place.

pub mod balloon;
pub mod block;
pub mod chain;
pub mod fs;
pub mod net;
pub mod queue;
pub mod rng;
#[cfg(test)]
pub mod testing;
pub mod transport;
pub mod vsock;
pub mod worker;

use std::io;
use std::sync::Arc;

use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use self::queue::VirtQueue;

/// VIRTIO_F_VERSION_1: the transports offer it for every device and insist on it.
pub const F_VERSION_1: u64 = 1 << 32;
/// VIRTIO_F_RING_EVENT_IDX, handled by [`VirtQueue`].
pub const F_EVENT_IDX: u64 = 1 << 29;
/// VIRTIO_F_RING_INDIRECT_DESC, handled by [`chain`].
pub const F_INDIRECT_DESC: u64 = 1 << 28;
/// What every queue of ours can do; the transports add these to [`VirtioDevice::features`].
pub const COMMON_FEATURES: u64 = F_VERSION_1 | F_EVENT_IDX | F_INDIRECT_DESC;

/// One map of guest memory. It never changes: a machine that grows gets another, which holds all of this one.
pub type SharedMemory = Arc<GuestMemoryMmap>;
/// Guest memory as the devices share it: the map of the moment.
pub type GrowingMemory = GuestMemoryAtomic<GuestMemoryMmap>;

/// How a device calls the guest. Implemented by each transport.
pub trait Interrupt: Send + Sync {
    /// Buffers of queue `index` were used.
    fn queue_used(&self, index: u16);
    /// The device's configuration space changed.
    fn config_changed(&self);
    /// Signalled by others than us (vhost in the kernel), it does what `queue_used` does; `None` if this transport has none.
    fn call_event(&self, _index: u16) -> Option<io::Result<EventFd>> {
        None
    }
}

/// Everything a device needs to run, handed over at DRIVER_OK.
pub struct Activation {
    /// The features that the driver accepted.
    pub features: u64,
    /// One for each of [`VirtioDevice::queue_sizes`]; `None` where the driver did not make the queue ready.
    pub queues: Vec<Option<VirtQueue>>,
    /// For configuration changes; queues have theirs.
    pub interrupt: Arc<dyn Interrupt>,
}

/// Why a device could not start.
#[derive(Debug, thiserror::Error)]
pub enum ActivateError {
    /// The driver left out a queue that the device cannot do without.
    #[error("driver did not set up queue {0}")]
    MissingQueue(u16),
    /// A thread, event or descriptor could not be made.
    #[error("cannot {what}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// The system's answer.
        #[source]
        source: std::io::Error,
    },
}

/// One virtio device, independent of its transport.
pub trait VirtioDevice: Send {
    /// Device ID of virtio 1.3 section 5.
    fn device_type(&self) -> u32;

    /// For logs: `vsock`, `fs`, `block`, `net`, `rng`, `balloon`.
    fn name(&self) -> &'static str;

    /// The largest size of each queue, a power of two each; its length is the number of queues.
    fn queue_sizes(&self) -> &[u16];

    /// Features of this type of device; the transport adds [`COMMON_FEATURES`].
    fn features(&self) -> u64 {
        0
    }

    /// Reads from the configuration space; `data` is zeroed before, and what lies past the end stays zero.
    fn read_config(&self, _offset: u64, _data: &mut [u8]) {}

    /// Writes to the configuration space. Most devices have nothing that a driver may write.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    /// The driver is ready: start serving the queues.
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError>;

    /// Stops serving and drops the queues; returns once no thread of the device touches guest memory.
    /// The device can be activated again.
    fn reset(&mut self);
}
