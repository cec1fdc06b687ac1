//! Block device (virtio 1.3 section 5.2) over a file or a descriptor.
//!
//! A machine's slots are made at boot, since hot-plugging is slow; an empty one gets its backing by
//! [`Slot::attach`] and tells the guest of its new capacity. Whether a slot is read-only is decided at boot and enforced
//! here, not in the guest.

mod device;
mod request;

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

pub use device::Block;

use super::Interrupt;
use crate::config::BlockConfig;

const SECTOR: u64 = 512;

/// Why a slot has no backing.
#[derive(Debug, thiserror::Error)]
pub enum BlockError {
    /// The file of the configuration cannot be opened.
    #[error("cannot open {} for block slot {id}", path.display())]
    Open {
        /// Name of the slot.
        id: String,
        /// Which file.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// The descriptor cannot be measured.
    #[error("cannot read the size of the file for block slot {id}")]
    Size {
        /// Name of the slot.
        id: String,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// A directory, socket, pipe or the like.
    #[error("the file for block slot {id} is neither a regular file nor a block device")]
    Kind {
        /// Name of the slot.
        id: String,
    },
    /// The slot is writable and the descriptor is not.
    #[error("the file for block slot {id} is not open for writing")]
    NotWritable {
        /// Name of the slot.
        id: String,
    },
    /// The slot has its backing already.
    #[error("block slot {id} is taken")]
    Taken {
        /// Name of the slot.
        id: String,
    },
}

/// An open backing.
struct Disk {
    file: File,
    sectors: u64,
}

/// What the device's thread, its configuration space and the control socket share of one slot.
pub struct Slot {
    id: String,
    readonly: bool,
    state: Mutex<SlotState>,
}

#[derive(Default)]
struct SlotState {
    disk: Option<Arc<Disk>>,
    /// Of the running device.
    interrupt: Option<Arc<dyn Interrupt>>,
}

impl Slot {
    /// The slot of a configuration, with its file opened if it names one.
    pub fn new(config: &BlockConfig) -> Result<Arc<Self>, BlockError> {
        let slot = Self {
            id: config.id.clone(),
            readonly: config.readonly,
            state: Mutex::default(),
        };
        if let Some(path) = &config.path {
            let file = OpenOptions::new()
                .read(true)
                .write(!config.readonly)
                // A pipe must not block us; O_NONBLOCK means nothing for what we take.
                .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
                .open(path)
                .map_err(|source| BlockError::Open {
                    id: config.id.clone(),
                    path: path.clone(),
                    source,
                })?;
            slot.attach(file)?;
        }
        Ok(Arc::new(slot))
    }

    /// The slot's name.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Makes `file` the backing of an empty slot and tells a running guest.
    pub fn attach(&self, mut file: File) -> Result<(), BlockError> {
        let id = || self.id.clone();
        let size = |source| BlockError::Size { id: id(), source };
        let kind = file.metadata().map_err(size)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(BlockError::Kind { id: id() });
        }
        // SAFETY: F_GETFL on a descriptor that `file` owns changes nothing.
        let flags = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) };
        if !self.readonly && flags & libc::O_ACCMODE != libc::O_RDWR {
            return Err(BlockError::NotWritable { id: id() });
        }
        let sectors = file.seek(SeekFrom::End(0)).map_err(size)? / SECTOR;
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.disk.is_some() {
            return Err(BlockError::Taken { id: id() });
        }
        state.disk = Some(Arc::new(Disk { file, sectors }));
        if let Some(interrupt) = &state.interrupt {
            interrupt.config_changed();
        }
        Ok(())
    }

    fn disk(&self) -> Option<Arc<Disk>> {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.disk.clone()
    }

    fn set_interrupt(&self, interrupt: Option<Arc<dyn Interrupt>>) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.interrupt = interrupt;
    }
}
