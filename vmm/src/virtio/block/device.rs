//! The device: configuration space and queue.

use std::sync::Arc;

use super::{Slot, request};
use crate::limits;
use crate::virtio::queue::{QueueError, VirtQueue, log_broken};
use crate::virtio::worker::Worker;
use crate::virtio::{ActivateError, Activation, VirtioDevice};

const DEVICE_TYPE: u32 = 2;
const QUEUE_SIZES: [u16; 1] = [128];
/// Data buffers of a request: the queue less header and status.
const SEGMENTS_MAX: u32 = 126;

const F_SEG_MAX: u64 = 1 << 2;
const F_RO: u64 = 1 << 5;
const F_FLUSH: u64 = 1 << 9;

/// The device of one slot.
pub struct Block {
    slot: Arc<Slot>,
    worker: Option<Worker>,
}

impl Block {
    /// The device of `slot`.
    pub fn new(slot: Arc<Slot>) -> Self {
        Self { slot, worker: None }
    }
}

impl VirtioDevice for Block {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn name(&self) -> &'static str {
        "block"
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        F_SEG_MAX | F_FLUSH | if self.slot.readonly { F_RO } else { 0 }
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        // capacity, size_max, seg_max (section 5.2.4)
        let mut space = [0; 16];
        let sectors = self.slot.disk().map_or(0, |disk| disk.sectors);
        let (capacity, rest) = space.split_at_mut(8);
        capacity.copy_from_slice(&sectors.to_le_bytes());
        for (to, from) in rest.iter_mut().skip(4).zip(SEGMENTS_MAX.to_le_bytes()) {
            *to = from;
        }
        let skip = usize::try_from(offset).unwrap_or(usize::MAX);
        for (to, from) in data.iter_mut().zip(space.iter().skip(skip)) {
            *to = *from;
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let queue = activation.queues.into_iter().next().flatten();
        let mut queue = queue.ok_or(ActivateError::MissingQueue(0))?;
        let kick = queue
            .kick()
            .try_clone()
            .map_err(|source| ActivateError::Io {
                what: "share an event",
                source,
            })?;
        let slot = self.slot.clone();
        self.worker = Some(Worker::start(
            self.slot.id(),
            vec![kick],
            move || match serve(&mut queue, &slot) {
                Ok(()) => true,
                Err(error) => {
                    log_broken(slot.id(), &error);
                    false
                }
            },
        )?);
        self.slot.set_interrupt(Some(activation.interrupt));
        Ok(())
    }

    fn reset(&mut self) {
        self.slot.set_interrupt(None);
        self.worker = None;
    }
}

fn serve(queue: &mut VirtQueue, slot: &Slot) -> Result<(), QueueError> {
    let mut done = 0;
    loop {
        queue.disable_kicks()?;
        while let Some(chain) = queue.pop()? {
            let written = request::serve(&chain, slot);
            queue.push(chain, written)?;
            queue.notify()?;
            done += 1;
            if done == limits::REQUESTS_AT_ONCE {
                queue.serve_again();
                return Ok(());
            }
        }
        if !queue.enable_kicks()? {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write;
    use std::path::Path;
    use std::sync::atomic::Ordering;

    use virtio_queue::{Queue, QueueT};
    use vm_memory::{Bytes, GuestAddress};
    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

    use super::super::BlockError;
    use super::*;
    use crate::config::BlockConfig;
    use crate::virtio::SharedMemory;
    use crate::virtio::testing::{CountingInterrupt, DriverQueue, memory};

    const HEADER: u64 = 0x10_0000;
    const DATA: u64 = 0x20_0000;
    const STATUS: u64 = 0x30_0000;

    struct Rig {
        memory: SharedMemory,
        driver: DriverQueue,
        interrupt: Arc<CountingInterrupt>,
        slot: Arc<Slot>,
        device: Block,
        _dir: tempfile::TempDir,
        path: std::path::PathBuf,
    }

    impl Rig {
        fn new(readonly: bool, backing: bool) -> Self {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("disk");
            let mut file = File::create(&path).unwrap();
            for byte in 0..4u8 {
                file.write_all(&[byte; 512]).unwrap();
            }
            let slot = Slot::new(&BlockConfig {
                id: "b0".into(),
                path: backing.then(|| path.clone()),
                readonly,
            })
            .unwrap();
            let memory = memory();
            let interrupt = CountingInterrupt::new();
            let (driver, queue) = DriverQueue::new(&memory, 0, 0x1_0000, 16, interrupt.clone());
            let mut device = Block::new(slot.clone());
            device
                .activate(Activation {
                    features: 0,
                    queues: vec![Some(queue)],
                    interrupt: interrupt.clone(),
                })
                .unwrap();
            Self {
                memory,
                driver,
                interrupt,
                slot,
                device,
                _dir: dir,
                path,
            }
        }

        /// Status byte and used length of a request.
        fn request(&mut self, kind: u32, sector: u64, len: u32, to_guest: bool) -> (u8, u32) {
            let mut header = [0; 16];
            header[..4].copy_from_slice(&kind.to_le_bytes());
            header[8..].copy_from_slice(&sector.to_le_bytes());
            self.memory
                .write_slice(&header, GuestAddress(HEADER))
                .unwrap();
            self.memory.write_obj(0xffu8, GuestAddress(STATUS)).unwrap();
            let mut buffers = vec![(HEADER, 16, false), (STATUS, 1, true)];
            if len > 0 {
                buffers.insert(1, (DATA, len, to_guest));
            }
            self.driver.offer_chain(0, &buffers);
            self.driver.kick();
            let used = loop {
                match self.driver.used() {
                    Some((_, len)) => break len,
                    None => drop(self.interrupt.event.read()),
                }
            };
            (self.memory.read_obj(GuestAddress(STATUS)).unwrap(), used)
        }

        fn data(&self, at: u64) -> u8 {
            self.memory.read_obj(GuestAddress(DATA + at)).unwrap()
        }
    }

    #[test]
    fn sectors_are_read_and_written_in_their_places() {
        let mut rig = Rig::new(false, true);
        assert_eq!(rig.request(0, 1, 1024, true), (0, 1025));
        assert_eq!((rig.data(0), rig.data(1023)), (1, 2));
        rig.memory
            .write_slice(&[9; 512], GuestAddress(DATA))
            .unwrap();
        assert_eq!(rig.request(1, 3, 512, false), (0, 1));
        assert_eq!(rig.request(4, 0, 0, false), (0, 1));
        let bytes = std::fs::read(&rig.path).unwrap();
        assert_eq!((bytes[3 * 512 - 1], bytes[3 * 512]), (2, 9));
        assert_eq!(rig.request(8, 0, 20, true), (0, 21));
        assert_eq!((rig.data(0), rig.data(1), rig.data(2)), (b'b', b'0', 0));
        rig.device.reset();
    }

    #[test]
    fn requests_beyond_the_disk_fail_and_touch_nothing() {
        let mut rig = Rig::new(false, true);
        for (sector, len) in [
            (4, 512),
            (3, 1024),
            (0, 511),
            (u64::MAX, 512),
            (u64::MAX / 512, 512),
            (0, 5 << 20),
        ] {
            assert_eq!(rig.request(0, sector, len, true).0, 1, "{sector} {len}");
            assert_eq!(rig.request(1, sector, len, false).0, 1, "{sector} {len}");
        }
        assert_eq!(std::fs::metadata(&rig.path).unwrap().len(), 2048);
        assert_eq!(rig.request(77, 0, 512, true).0, 2);
    }

    #[test]
    fn room_for_more_than_the_largest_request_is_not_filled() {
        let mut rig = Rig::new(false, true);
        let fill = |rig: &Rig| {
            rig.memory
                .write_slice(&[7; 512], GuestAddress(DATA))
                .unwrap();
        };
        let largest = limits::BLOCK_REQUEST_BYTES as u32;
        for kind in [0, 1, 4, 8, 77] {
            fill(&rig);
            assert_eq!(rig.request(kind, 0, largest + 1, true), (1, 0), "{kind}");
            assert_eq!((rig.data(0), rig.data(511)), (7, 7), "{kind}");
        }
        fill(&rig);
        assert_eq!(rig.request(77, 0, largest, true), (2, largest + 1));
        assert_eq!(rig.data(0), 0);
    }

    #[test]
    fn rings_that_overlap_are_not_looked_at_for_ever() {
        let rig = Rig::new(false, true);
        let mut queue = Queue::new(16).unwrap();
        queue.set_size(16);
        queue.set_desc_table_address(Some(0x2_0000), Some(0));
        // The flags that the device writes are the index that it reads.
        queue.set_avail_ring_address(Some(0x2_bffe), Some(0));
        queue.set_used_ring_address(Some(0x2_c000), Some(0));
        queue.set_ready(true);
        assert!(queue.is_valid(&*rig.memory));
        let kick = EventFd::new(EFD_NONBLOCK).unwrap();
        let memory = rig.memory.clone().into();
        let mut queue = VirtQueue::new(0, queue, memory, kick, rig.interrupt.clone());
        assert!(matches!(
            serve(&mut queue, &rig.slot),
            Err(QueueError::Withdrawn { .. })
        ));
    }

    #[test]
    fn a_read_only_slot_cannot_be_written() {
        let mut rig = Rig::new(true, true);
        assert_ne!(rig.device.features() & F_RO, 0);
        assert_eq!(rig.request(1, 0, 512, false).0, 1);
        assert_eq!(rig.request(4, 0, 0, false).0, 0);
        assert_eq!(std::fs::read(&rig.path).unwrap()[0], 0);
    }

    #[test]
    fn an_empty_slot_gets_its_backing_once() {
        let mut rig = Rig::new(true, false);
        assert_eq!(rig.request(0, 0, 512, true).0, 1);
        let capacity = |rig: &Rig| {
            let mut bytes = [0; 8];
            rig.device.read_config(0, &mut bytes);
            u64::from_le_bytes(bytes)
        };
        assert_eq!(capacity(&rig), 0);
        rig.slot.attach(File::open(&rig.path).unwrap()).unwrap();
        assert_eq!(rig.interrupt.config.load(Ordering::SeqCst), 1);
        assert_eq!(capacity(&rig), 4);
        assert_eq!(rig.request(0, 3, 512, true).0, 0);
        assert!(matches!(
            rig.slot.attach(File::open(&rig.path).unwrap()),
            Err(BlockError::Taken { .. })
        ));
    }

    #[test]
    fn only_disks_and_files_open_for_writing_become_backings() {
        let rig = Rig::new(false, false);
        let open = |path: &Path| File::open(path).unwrap();
        assert!(matches!(
            rig.slot.attach(open(&rig.path)),
            Err(BlockError::NotWritable { .. })
        ));
        assert!(matches!(
            rig.slot.attach(open(Path::new("/dev/null"))),
            Err(BlockError::Kind { .. })
        ));
    }
}
