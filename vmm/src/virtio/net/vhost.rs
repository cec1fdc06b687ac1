//! The kernel's data path: `vhost-net` serves a pair of queues between guest memory and a tap.
//!
//! The shim opened the device; we own it (it works on our memory), and give it the negotiated features, where guest
//! memory and the rings are, the events for kicks and calls, and at last the tap. From then to [`Vhost::stop`]
//! nobody else touches the rings. Kicks and calls pass by ioeventfd and irqfd: no frame comes to this process.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use vhost::vhost_kern::VhostKernBackend;
use vhost::vhost_kern::vhost_binding::{VHOST_NET_SET_BACKEND, vhost_vring_file};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};
use vmm_sys_util::ioctl::ioctl_with_ref;

use super::link::Rings;
use super::{Tap, feature};
use crate::virtio::queue::VirtQueue;
use crate::virtio::{COMMON_FEATURES, SharedMemory};

/// What concerns the rings; the rest is between guest and tap.
const FEATURES: u64 = COMMON_FEATURES | feature::MRG_RXBUF;

/// Why the kernel does not serve the queues.
#[derive(Debug, thiserror::Error)]
pub enum VhostError {
    /// A step that it refused.
    #[error("vhost-net cannot {what}")]
    Step {
        /// What was tried.
        what: &'static str,
        /// The answer.
        #[source]
        source: vhost::Error,
    },
    /// It lacks something that the driver was promised.
    #[error("vhost-net of this host lacks features {0:#x}")]
    Features(u64),
    /// The guest cannot be called by an event.
    #[error("vhost-net cannot call the guest")]
    Call(#[source] io::Error),
}

fn step(what: &'static str) -> impl FnOnce(vhost::Error) -> VhostError {
    move |source| VhostError::Step { what, source }
}

/// An open `/dev/vhost-net`: one pair of queues.
pub struct Vhost {
    file: File,
    /// Of the machine, once it was told.
    memory: SharedMemory,
    /// How many rings have their index from us, and must give it back.
    given: usize,
}

impl Vhost {
    /// Makes `fd` work on this process's memory.
    pub fn new(fd: OwnedFd) -> Result<Self, VhostError> {
        let vhost = Self {
            file: fd.into(),
            memory: Arc::new(GuestMemoryMmap::new()),
            given: 0,
        };
        vhost
            .set_owner()
            .map_err(step("take this process's memory"))?;
        let lacks = FEATURES & !vhost.get_features().map_err(step("tell its features"))?;
        if lacks != 0 {
            return Err(VhostError::Features(lacks));
        }
        Ok(vhost)
    }

    /// Serves the rings with `tap` from now on.
    pub fn start(&mut self, rings: &Rings, tap: &Tap, features: u64) -> Result<(), VhostError> {
        self.set_features(features & FEATURES)
            .map_err(step("take the features"))?;
        self.set_memory(rings.receive.memory())?;
        let queues = [&rings.receive, &rings.transmit];
        for (index, queue) in queues.iter().enumerate() {
            self.give(index, queue)?;
        }
        for index in 0..queues.len() {
            self.set_backend(index, tap.as_raw_fd())
                .map_err(step("take the tap"))?;
        }
        // A kick that we have read may have been for it.
        queues.iter().for_each(|queue| queue.serve_again());
        Ok(())
    }

    /// Works on this map from now on, also while it serves: what is under way ends on the map before.
    pub fn set_memory(&mut self, memory: SharedMemory) -> Result<(), VhostError> {
        self.set_mem_table(&table(&memory))
            .map_err(step("take guest memory"))?;
        self.memory = memory;
        Ok(())
    }

    fn give(&mut self, index: usize, queue: &VirtQueue) -> Result<(), VhostError> {
        let layout = queue.layout();
        let no_event = || io::Error::other("the transport has no event for it");
        let call = queue.call_event().ok_or_else(no_event).flatten();
        let call = call.map_err(VhostError::Call)?;
        self.set_vring_num(index, layout.size)
            .map_err(step("take a ring's size"))?;
        self.set_vring_base(index, layout.next_available)
            .map_err(step("take a ring's index"))?;
        self.given = index + 1;
        let config = VringConfigData {
            queue_max_size: layout.size,
            queue_size: layout.size,
            flags: 0,
            desc_table_addr: layout.descriptors,
            used_ring_addr: layout.used,
            avail_ring_addr: layout.available,
            log_addr: None,
        };
        self.set_vring_addr(index, &config)
            .map_err(step("take a ring"))?;
        self.set_vring_kick(index, queue.kick())
            .map_err(step("take a ring's kick"))?;
        self.set_vring_call(index, &call)
            .map_err(step("take a ring's call"))
    }

    /// Takes the rings back: the kernel has answered all that it took. Right at any moment.
    pub fn stop(&mut self, rings: &mut Rings) {
        let queues = [&mut rings.receive, &mut rings.transmit].into_iter();
        for (index, queue) in queues.enumerate().take(std::mem::take(&mut self.given)) {
            let stopped = self
                .set_backend(index, -1)
                .map_err(step("let go of the tap"));
            let base = stopped.and_then(|()| {
                self.get_vring_base(index)
                    .map_err(step("give a ring's index"))
            });
            let resumed = base.map(|base| {
                // 16 bits of a split ring's index.
                queue.resume_at(base as u16)
            });
            match resumed {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::warn!(%error, "cannot go on with a ring of vhost-net"),
                Err(error) => tracing::warn!(%error, "cannot take a ring back"),
            }
        }
    }

    /// -1: none.
    fn set_backend(&self, index: usize, tap: RawFd) -> Result<(), vhost::Error> {
        let file = vhost_vring_file {
            index: index as u32,
            fd: tap,
        };
        // SAFETY: the request reads one `vhost_vring_file`, which is ours.
        let set = unsafe { ioctl_with_ref(&self.file, VHOST_NET_SET_BACKEND(), &file) };
        if set < 0 {
            return Err(vhost::Error::IoctlError(io::Error::last_os_error()));
        }
        Ok(())
    }
}

/// What the kernel is told of guest memory.
fn table(memory: &GuestMemoryMmap) -> Vec<VhostUserMemoryRegionInfo> {
    memory
        .iter()
        .map(|region| VhostUserMemoryRegionInfo {
            guest_phys_addr: region.start_addr().raw_value(),
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
            ..Default::default()
        })
        .collect()
}

impl AsRawFd for Vhost {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

impl VhostKernBackend for Vhost {
    type AS = SharedMemory;

    fn mem(&self) -> &SharedMemory {
        &self.memory
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestAddress;

    use super::*;

    #[test]
    fn the_table_names_every_region_of_the_map() {
        let ranges = [(GuestAddress(0), 0x10000), (GuestAddress(4 << 30), 0x20000)];
        let memory = GuestMemoryMmap::from_ranges(&ranges).unwrap();
        let table = table(&memory);
        let plain: Vec<_> = table
            .iter()
            .map(|region| (region.guest_phys_addr, region.memory_size))
            .collect();
        assert_eq!(plain, [(0, 0x10000), (4 << 30, 0x20000)]);
        for (region, mapped) in table.iter().zip(memory.iter()) {
            assert_eq!(region.userspace_addr, mapped.as_ptr() as u64);
        }
    }
}
