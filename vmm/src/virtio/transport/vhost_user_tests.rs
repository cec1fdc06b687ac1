//! The transport against the `vhost` crate's frontend, with a device that only remembers.

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vhost::vhost_user::message::VhostUserConfigFlags;
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::FileOffset;
use vmm_sys_util::eventfd::EFD_NONBLOCK;

use super::*;
use crate::machine::end::end_channel;
use crate::virtio::ActivateError;
use crate::virtio::testing::{CountingInterrupt, DriverQueue, MEMORY_SIZE};

const USER: u64 = 0x7000_0000_0000;
const RING: u64 = 0x1_0000;

enum Seen {
    Activated(Box<Activation>),
    Reset,
}

struct Recorder(Sender<Seen>);

impl VirtioDevice for Recorder {
    fn device_type(&self) -> u32 {
        26
    }
    fn name(&self) -> &'static str {
        "recorder"
    }
    fn queue_sizes(&self) -> &[u16] {
        &[64, 64]
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        for (to, from) in data.iter_mut().zip([7, 8].iter().skip(offset as usize)) {
            *to = *from;
        }
    }
    fn activate(&mut self, activation: Activation) -> std::result::Result<(), ActivateError> {
        self.0.send(Seen::Activated(Box::new(activation))).unwrap();
        Ok(())
    }
    fn reset(&mut self) {
        self.0.send(Seen::Reset).unwrap();
    }
}

struct Bench {
    frontend: Frontend,
    memfd: OwnedFd,
    call: EventFd,
    kick: EventFd,
    seen: Receiver<Seen>,
    ended: Receiver<End>,
}

impl Bench {
    /// As far as an emulator gets before there is a driver.
    fn new() -> Self {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (sender, seen) = channel();
        let (end, ended) = end_channel();
        serve(Box::new(Recorder(sender)), ours, end).unwrap();
        let mut frontend = Frontend::from_stream(theirs, 2);
        frontend.set_owner().unwrap();
        let features = frontend.get_features().unwrap();
        assert_eq!(features & COMMON_FEATURES, COMMON_FEATURES);
        let protocol = frontend.get_protocol_features().unwrap();
        frontend.set_protocol_features(protocol).unwrap();
        frontend.set_features(features).unwrap();
        frontend.set_hdr_flags(vhost::vhost_user::message::VhostUserHeaderFlag::NEED_REPLY);
        let memfd = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&memfd, MEMORY_SIZE as u64).unwrap();
        let call = EventFd::new(EFD_NONBLOCK).unwrap();
        let kick = EventFd::new(EFD_NONBLOCK).unwrap();
        Self {
            frontend,
            memfd,
            call,
            kick,
            seen,
            ended,
        }
    }

    fn share_memory(&self) -> SharedMemory {
        let region = VhostUserMemoryRegionInfo {
            guest_phys_addr: 0,
            memory_size: MEMORY_SIZE as u64,
            userspace_addr: USER,
            mmap_offset: 0,
            mmap_handle: self.memfd.as_raw_fd(),
        };
        self.frontend.set_mem_table(&[region]).unwrap();
        let file = FileOffset::new(File::from(self.memfd.try_clone().unwrap()), 0);
        let range = (GuestAddress(0), MEMORY_SIZE, Some(file));
        Arc::new(GuestMemoryMmap::from_ranges_with_files([range]).unwrap())
    }

    fn set_ring(&self, index: usize, at: u64) -> Result<()> {
        let bad = |_| Error::InvalidParam;
        self.frontend.set_vring_num(index, 64).map_err(bad)?;
        self.frontend.set_vring_base(index, 0).map_err(bad)?;
        let config = VringConfigData {
            queue_max_size: 64,
            queue_size: 64,
            flags: 0,
            desc_table_addr: USER + at,
            avail_ring_addr: USER + at + 0x8000,
            used_ring_addr: USER + at + 0xc000,
            log_addr: None,
        };
        self.frontend.set_vring_addr(index, &config).map_err(bad)?;
        self.frontend
            .set_vring_call(index, &self.call)
            .map_err(bad)?;
        self.frontend.set_vring_kick(index, &self.kick).map_err(bad)
    }

    fn seen(&self) -> Seen {
        self.seen.recv_timeout(Duration::from_secs(10)).unwrap()
    }
}

#[test]
fn a_device_runs_once_every_kicked_ring_is_enabled_and_stops_with_its_base() {
    let mut bench = Bench::new();
    let memory = bench.share_memory();
    let (mut driver, _) = DriverQueue::new(&memory, 0, RING, 64, CountingInterrupt::new());
    bench.set_ring(0, RING).unwrap();
    bench.set_ring(1, RING * 2).unwrap();
    bench.frontend.set_vring_enable(0, true).unwrap();
    assert!(bench.seen.try_recv().is_err());
    bench.frontend.set_vring_enable(1, true).unwrap();
    let Seen::Activated(mut activation) = bench.seen() else {
        panic!("not activated")
    };

    // A chain of the driver reaches the device, and its call the driver.
    driver.offer_chain(0, &[(0x10_0000, 16, true)]);
    let queue = activation.queues[0].as_mut().unwrap();
    let chain = queue.pop().unwrap().unwrap();
    queue.push(chain, 16).unwrap();
    activation.interrupt.queue_used(0);
    assert_eq!(bench.call.read().unwrap(), 1);
    assert_eq!(driver.used(), Some((0, 16)));

    assert_eq!(bench.frontend.get_vring_base(0).unwrap(), 1);
    assert!(matches!(bench.seen(), Seen::Reset));
    assert_eq!(bench.frontend.get_vring_base(1).unwrap(), 0);
}

#[test]
fn rings_outside_memory_and_bad_sizes_are_refused() {
    let mut bench = Bench::new();
    bench.share_memory();
    bench.set_ring(0, MEMORY_SIZE as u64 - 0x9000).unwrap();
    assert!(bench.frontend.set_vring_enable(0, true).is_err());
    // The machine has lost the device.
    let end = bench.ended.recv_timeout(Duration::from_secs(10)).unwrap();
    assert_eq!(end.reason, EndReason::EngineFailed);
    for size in [0, 3, 2048] {
        let bench = Bench::new();
        assert!(bench.frontend.set_vring_num(0, size).is_err());
    }
    let bench = Bench::new();
    assert!(bench.set_ring(2, RING).is_err());
    assert!(bench.seen.try_recv().is_err());
}

#[test]
fn the_configuration_is_read_at_any_offset_and_zero_past_its_end() {
    let mut bench = Bench::new();
    let flags = VhostUserConfigFlags::empty();
    let (_, config) = bench.frontend.get_config(1, 4, flags, &[0; 4]).unwrap();
    assert_eq!(config, [8, 0, 0, 0]);
}

#[test]
fn a_device_stops_when_the_emulator_hangs_up() {
    let mut bench = Bench::new();
    bench.share_memory();
    bench.set_ring(0, RING).unwrap();
    bench.frontend.set_vring_enable(0, true).unwrap();
    assert!(matches!(bench.seen(), Seen::Activated(_)));
    drop(bench.frontend);
    assert!(matches!(
        bench.seen.recv_timeout(Duration::from_secs(10)),
        Ok(Seen::Reset)
    ));
    assert!(bench.ended.recv().is_err(), "hanging up is no failure");
}
