//! The vhost-user transport: carries a device to the emulator that runs the guest.
//!
//! One thread a device answers the emulator's requests (the `vhost` crate parses them) until the emulator hangs up.
//! What mmio reads from registers arrives here as messages: features, memory, rings, descriptors for kicks and calls. Once
//! every ring that got a kick is enabled, the device gets the same [`Activation`] as from mmio. The emulator is a
//! child of ours and trusted as far as the guest: ring addresses are checked against the memory that it shared.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{FromRawFd, IntoRawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{
    BackendReqHandler, Error, GpuBackend, Result, VhostUserBackendReqHandlerMut,
    VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, GuestRegionMmap};
use vmm_sys_util::eventfd::EventFd;

use crate::jail::seccomp::Kind;
use crate::jail::threads;
use crate::machine::end::{End, EndReason, EndSender};
use crate::virtio::queue::VirtQueue;
use crate::virtio::{
    Activation, COMMON_FEATURES, F_EVENT_IDX, F_VERSION_1, Interrupt, SharedMemory, VirtioDevice,
};

/// Offset of `idx` in a used ring (virtio 1.3 section 2.7.8).
const USED_INDEX: u64 = 2;

/// VIRTIO_F_ACCESS_PLATFORM (virtio 1.3 section 6).
const F_ACCESS_PLATFORM: u64 = 1 << 33;

/// The answer "done" to VHOST_USER_SET_VRING_ENABLE: request, version and reply flag, size, value.
const ENABLED: [u8; 20] = [18, 0, 0, 0, 5, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

/// VIRTQUEUE_MAX_SIZE of the emulator.
const LARGEST_RING: u16 = 1024;

/// Serves `device` on `socket` from a thread of its own, which ends once the emulator hangs up. The machine cannot do
/// without a device: if it cannot be served any more, `end` hears of it.
pub fn serve(
    device: Box<dyn VirtioDevice>,
    socket: UnixStream,
    end: EndSender,
) -> io::Result<JoinHandle<()>> {
    threads::spawn(Kind::VhostUser, thread(&*device), move || {
        run(device, socket, &end)
    })
}

/// The same for the first who connects.
pub fn serve_listener(
    device: Box<dyn VirtioDevice>,
    listener: UnixListener,
    end: EndSender,
) -> io::Result<JoinHandle<()>> {
    threads::spawn(Kind::VhostUser, thread(&*device), move || {
        match listener.accept() {
            Ok((socket, _)) => {
                // Nobody else is expected.
                drop(listener);
                run(device, socket, &end);
            }
            Err(error) => {
                tracing::warn!(device = device.name(), %error, "no vhost-user connection")
            }
        }
    })
}

fn thread(device: &dyn VirtioDevice) -> std::thread::Builder {
    std::thread::Builder::new().name(format!("vhost-{}", device.name()))
}

fn run(device: Box<dyn VirtioDevice>, socket: UnixStream, end: &EndSender) {
    let name = device.name();
    let answers = match socket.try_clone() {
        Ok(socket) => socket,
        Err(error) => {
            tracing::error!(device = name, %error, "cannot share a vhost-user socket");
            return;
        }
    };
    let backend = Arc::new(Mutex::new(Backend::new(device)));
    let mut handler = BackendReqHandler::from_stream(socket, backend.clone());
    loop {
        match handler.handle_request() {
            Ok(()) => {}
            Err(Error::Disconnected) => break,
            Err(Error::SocketRetry(_)) => {}
            // The frontend for networks enables its rings before it has set the features that the crate asks for, and
            // waits for the answer.
            Err(Error::InactiveFeature(_)) => {
                lock(&backend).enable_early();
                if let Err(error) = (&answers).write_all(&ENABLED) {
                    tracing::warn!(device = name, %error, "vhost-user connection ended");
                    break;
                }
            }
            Err(error) => {
                let detail = format!("the {name} device cannot go on: {error}");
                end.send(End::new(EndReason::EngineFailed, detail));
                break;
            }
        }
    }
    lock(&backend).stop();
}

fn lock(backend: &Mutex<Backend>) -> MutexGuard<'_, Backend> {
    backend.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What the emulator told about one ring.
#[derive(Default)]
struct Ring {
    size: u16,
    descriptors: u64,
    available: u64,
    used: u64,
    next_available: u16,
    kick: Option<EventFd>,
    enabled: bool,
}

/// A range of guest memory as the emulator names it.
struct Region {
    user: u64,
    guest: u64,
    size: u64,
}

/// Signals the emulator, through descriptors that it may exchange at any time.
struct Calls(Vec<Mutex<Option<EventFd>>>);

impl Interrupt for Calls {
    fn queue_used(&self, index: u16) {
        let Some(call) = self.0.get(usize::from(index)) else {
            return;
        };
        if let Some(event) = &*call.lock().unwrap_or_else(PoisonError::into_inner) {
            // Fails only if the counter is full: then the guest is being called already.
            let _ = event.write(1);
        }
    }

    fn config_changed(&self) {
        tracing::warn!("the emulator cannot tell the guest of a changed configuration");
    }
}

struct Backend {
    device: Box<dyn VirtioDevice>,
    rings: Vec<Ring>,
    calls: Arc<Calls>,
    features: u64,
    regions: Vec<Region>,
    memory: Option<SharedMemory>,
    active: bool,
    /// Rings are enabled before they have kicks: the device starts when all have kicks and calls.
    early: bool,
}

impl Backend {
    fn new(device: Box<dyn VirtioDevice>) -> Self {
        let count = device.queue_sizes().len();
        Self {
            device,
            rings: (0..count).map(|_| Ring::default()).collect(),
            calls: Arc::new(Calls((0..count).map(|_| Mutex::new(None)).collect())),
            features: 0,
            regions: Vec::new(),
            memory: None,
            active: false,
            early: false,
        }
    }

    fn enable_early(&mut self) {
        self.early = true;
        self.rings.iter_mut().for_each(|ring| ring.enabled = true);
    }

    fn ring(&mut self, index: u32) -> Result<&mut Ring> {
        // Rings do not change under a running device.
        if self.active {
            return Err(Error::InvalidOperation("the device is running"));
        }
        usize::try_from(index)
            .ok()
            .and_then(|index| self.rings.get_mut(index))
            .ok_or(Error::InvalidParam)
    }

    fn guest_address(&self, user: u64) -> Result<u64> {
        self.regions
            .iter()
            .find_map(|region| {
                let offset = user.checked_sub(region.user)?;
                (offset < region.size).then(|| region.guest.checked_add(offset))?
            })
            .ok_or(Error::InvalidOperation("address outside the shared memory"))
    }

    fn start_when_ready(&mut self) -> Result<()> {
        let kicked = || self.rings.iter().filter(|ring| ring.kick.is_some());
        if self.active || kicked().next().is_none() || !kicked().all(|ring| ring.enabled) {
            return Ok(());
        }
        let memory = self
            .memory
            .clone()
            .ok_or(Error::InvalidOperation("no memory yet"))?;
        let interrupt: Arc<dyn Interrupt> = self.calls.clone();
        let mut queues = Vec::new();
        for (index, ring) in self.rings.iter().enumerate() {
            let index =
                u16::try_from(index).map_err(|_| Error::InvalidOperation("too many rings"))?;
            queues.push(match &ring.kick {
                Some(kick) => {
                    let kick = kick.try_clone().map_err(Error::ReqHandlerError)?;
                    let queue = self.queue(ring, &memory)?;
                    Some(VirtQueue::new(
                        index,
                        queue,
                        memory.clone().into(),
                        kick,
                        interrupt.clone(),
                    ))
                }
                None => None,
            });
        }
        let activation = Activation {
            features: self.features,
            queues,
            interrupt,
        };
        if let Err(error) = self.device.activate(activation) {
            tracing::error!(device = self.device.name(), %error, "device cannot start");
            // A part of its threads may run.
            self.device.reset();
            return Err(Error::BackendInternalError);
        }
        self.active = true;
        Ok(())
    }

    fn queue(&self, ring: &Ring, memory: &SharedMemory) -> Result<Queue> {
        let bad = |_| Error::InvalidOperation("ring misplaced");
        let mut queue = Queue::new(ring.size).map_err(bad)?;
        let address = |user| self.guest_address(user).map(GuestAddress);
        queue
            .try_set_desc_table_address(address(ring.descriptors)?)
            .map_err(bad)?;
        queue
            .try_set_avail_ring_address(address(ring.available)?)
            .map_err(bad)?;
        queue
            .try_set_used_ring_address(address(ring.used)?)
            .map_err(bad)?;
        queue.set_event_idx(self.features & F_EVENT_IDX != 0);
        queue.set_next_avail(ring.next_available);
        queue.set_next_used(self.used_index(ring, memory)?);
        queue.set_ready(true);
        if queue.is_valid(&**memory) {
            Ok(queue)
        } else {
            Err(Error::InvalidOperation(
                "ring does not fit into guest memory",
            ))
        }
    }

    fn used_index(&self, ring: &Ring, memory: &SharedMemory) -> Result<u16> {
        let at = self
            .guest_address(ring.used)?
            .checked_add(USED_INDEX)
            .ok_or(Error::InvalidOperation("used ring misplaced"))?;
        let index: u16 = memory
            .read_obj(GuestAddress(at))
            .map_err(|_| Error::InvalidOperation("used ring outside guest memory"))?;
        Ok(u16::from_le(index))
    }

    fn stop(&mut self) {
        if self.active {
            self.device.reset();
            self.active = false;
        }
    }
}

fn event(file: Option<File>) -> Option<EventFd> {
    // SAFETY: the descriptor is owned by `file`, which gives it up.
    file.map(|file| unsafe { EventFd::from_raw_fd(file.into_raw_fd()) })
}

impl VhostUserBackendReqHandlerMut for Backend {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        self.stop();
        Ok(())
    }

    fn reset_device(&mut self) -> Result<()> {
        self.stop();
        for ring in &mut self.rings {
            *ring = Ring::default();
        }
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64> {
        let protocol = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        Ok(self.device.features() | COMMON_FEATURES | protocol)
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        // The frontend offers this one itself (`iommu_platform=on`); addresses stay guest-physical.
        let allowed = self.get_features()? | F_ACCESS_PLATFORM;
        if features & !allowed != 0 {
            return Err(Error::FeatureMismatch);
        }
        self.features = features & !VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        table: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> Result<Option<Vec<VhostUserMemoryRegionBase>>> {
        let mut mapped = Vec::new();
        let mut regions = Vec::new();
        for (entry, file) in table.iter().zip(files) {
            let region = Region {
                user: entry.user_addr,
                guest: entry.guest_phys_addr,
                size: entry.memory_size,
            };
            let mapping = entry.mmap_region(file)?;
            let guest = GuestAddress(region.guest);
            mapped.push(
                GuestRegionMmap::new(mapping, guest)
                    .ok_or(Error::InvalidOperation("memory region too high"))?,
            );
            regions.push(region);
        }
        mapped.sort_by_key(|region| vm_memory::GuestMemoryRegion::start_addr(region).0);
        let memory = GuestMemoryMmap::from_regions(mapped)
            .map_err(|_| Error::InvalidOperation("memory regions overlap"))?;
        if self.active {
            // The firmware moves memory about before there is a driver, never after.
            return Err(Error::InvalidOperation("the device is running"));
        }
        self.memory = Some(Arc::new(memory));
        self.regions = regions;
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        // Its frontends have sizes of their own, not those of `queue_sizes`.
        let size = u16::try_from(num).unwrap_or_default();
        if size > LARGEST_RING || !size.is_power_of_two() {
            tracing::warn!(
                device = self.device.name(),
                index,
                num,
                "refused the size of a ring"
            );
            return Err(Error::InvalidOperation("bad ring size"));
        }
        self.ring(index)?.size = size;
        Ok(())
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        let ring = self.ring(index)?;
        ring.descriptors = descriptor;
        ring.used = used;
        ring.available = available;
        Ok(())
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        self.ring(index)?.next_available =
            u16::try_from(base).map_err(|_| Error::InvalidOperation("bad ring base"))?;
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        self.stop();
        let ring = std::mem::take(self.ring(index)?);
        // A stopped device has answered all that it took: what it will take next is what it will use next.
        let base = match &self.memory {
            Some(memory) if ring.kick.is_some() => self.used_index(&ring, memory)?,
            _ => ring.next_available,
        };
        Ok(VhostUserVringState::new(index, u32::from(base)))
    }

    fn set_vring_kick(&mut self, index: u8, file: Option<File>) -> Result<()> {
        self.ring(u32::from(index))?.kick = event(file);
        Ok(())
    }

    fn set_vring_call(&mut self, index: u8, file: Option<File>) -> Result<()> {
        let call = self
            .calls
            .0
            .get(usize::from(index))
            .ok_or(Error::InvalidParam)?;
        *call.lock().unwrap_or_else(PoisonError::into_inner) = event(file);
        if self.early && self.rings.iter().all(|ring| ring.kick.is_some()) {
            return self.start_when_ready();
        }
        Ok(())
    }

    fn set_vring_err(&mut self, _index: u8, _file: Option<File>) -> Result<()> {
        Ok(())
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK)
    }

    fn set_protocol_features(&mut self, _features: u64) -> Result<()> {
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(self.rings.len() as u64)
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        if !enable {
            self.stop();
        }
        let ring = usize::try_from(index)
            .ok()
            .and_then(|index| self.rings.get_mut(index));
        ring.ok_or(Error::InvalidParam)?.enabled = enable;
        if enable {
            if self.features & F_VERSION_1 == 0 {
                return Err(Error::FeatureMismatch);
            }
            self.start_when_ready()?;
        }
        Ok(())
    }

    fn get_config(
        &mut self,
        offset: u32,
        size: u32,
        _flags: VhostUserConfigFlags,
    ) -> Result<Vec<u8>> {
        // The crate limits a message to 4 KiB.
        let mut data = vec![0; size as usize];
        self.device.read_config(u64::from(offset), &mut data);
        Ok(data)
    }

    fn set_config(&mut self, offset: u32, data: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        self.device.write_config(u64::from(offset), data);
        Ok(())
    }

    fn set_gpu_socket(&mut self, _gpu_backend: GpuBackend) -> Result<()> {
        Err(UNSUPPORTED)
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File> {
        Err(UNSUPPORTED)
    }

    fn get_inflight_fd(&mut self, _: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        Err(UNSUPPORTED)
    }

    fn set_inflight_fd(&mut self, _: &VhostUserInflight, _: File) -> Result<()> {
        Err(UNSUPPORTED)
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Err(UNSUPPORTED)
    }

    fn add_mem_region(
        &mut self,
        _region: &VhostUserSingleMemoryRegion,
        _file: File,
        _postcopy: Option<bool>,
    ) -> Result<Option<VhostUserMemoryRegionBase>> {
        Err(UNSUPPORTED)
    }

    fn remove_mem_region(&mut self, _region: &VhostUserSingleMemoryRegion) -> Result<()> {
        Err(UNSUPPORTED)
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _file: File,
    ) -> Result<Option<File>> {
        Err(UNSUPPORTED)
    }

    fn check_device_state(&mut self) -> Result<()> {
        Err(UNSUPPORTED)
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        Err(UNSUPPORTED)
    }

    fn set_log_base(&mut self, _log: &VhostUserLog, _file: File) -> Result<()> {
        Err(UNSUPPORTED)
    }
}

/// Of features that were not offered.
const UNSUPPORTED: Error = Error::InvalidOperation("not offered");

#[cfg(test)]
#[path = "vhost_user_tests.rs"]
mod tests;
