//! One machine: how it is built, what it is doing, and why it ended.

pub mod builder;
pub mod end;
pub mod growth;
pub mod readiness;

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::Serialize;

use self::growth::{BeyondReserve, Size};
use self::readiness::{Readiness, Times};
use crate::config::EngineKind;
use crate::engine::emulated::Emulator;
use crate::engine::kvm::{KvmEngine, KvmError, NotStopping};
use crate::limits;
use crate::serial::{ConsoleRing, Piece};
use crate::virtio::block::{BlockError, Slot};
use crate::virtio::net::{self, Attachment, NetError};
use crate::virtio::vsock::Uplink;

/// What runs the vCPUs of a machine.
pub enum Engine {
    /// Our own.
    Kvm(KvmEngine),
    /// QEMU.
    Emulated(Emulator),
}

/// A request that a running machine cannot follow.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// No block slot of that name.
    #[error("there is no block slot {0}")]
    NoSlot(String),
    /// No network slot of that name.
    #[error("there is no network slot {0}")]
    NoNetSlot(String),
    /// No vsock device.
    #[error("this machine has no vsock device")]
    NoVsock,
    /// The network slot refused.
    #[error(transparent)]
    Net(#[from] NetError),
    /// The slot refused the file.
    #[error(transparent)]
    Block(#[from] BlockError),
    /// The machine is as before.
    #[error(transparent)]
    NotStopping(#[from] NotStopping),
    /// It cannot become so large.
    #[error(transparent)]
    Beyond(#[from] BeyondReserve),
    /// The host does not give what is in the reserve.
    #[error(transparent)]
    Growth(#[from] KvmError),
    /// The emulator could not be signalled.
    #[error("cannot signal the emulator")]
    Emulator(#[source] std::io::Error),
}

/// A machine that was started. It ends with the process.
pub struct Machine {
    engine: Engine,
    slots: Vec<Arc<Slot>>,
    nets: Vec<Arc<net::Slot>>,
    uplink: Option<Arc<Uplink>>,
    console: Arc<ConsoleRing>,
    readiness: Readiness,
    paused: Mutex<bool>,
    size: Mutex<Size>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What the shim can ask to know.
#[derive(Debug, Serialize)]
pub struct Report {
    engine: &'static str,
    state: &'static str,
    vcpus: u8,
    memory_mib: u64,
    #[serde(flatten)]
    times: Times,
    exits: BTreeMap<&'static str, u64>,
    exits_until_ready: Option<u64>,
    vmm_pid: u32,
    emulator_pid: Option<u32>,
    console: String,
}

impl Machine {
    /// Stops the vCPUs; devices finish what they have. Pausing twice is pausing once.
    pub fn pause(&self) -> Result<(), MachineError> {
        let mut paused = lock(&self.paused);
        match &self.engine {
            Engine::Kvm(engine) => engine.pause()?,
            Engine::Emulated(emulator) => emulator.pause().map_err(MachineError::Emulator)?,
        }
        *paused = true;
        Ok(())
    }

    /// Lets the vCPUs go on.
    pub fn resume(&self) -> Result<(), MachineError> {
        let mut paused = lock(&self.paused);
        match &self.engine {
            Engine::Kvm(engine) => engine.resume(),
            Engine::Emulated(emulator) => emulator.resume().map_err(MachineError::Emulator)?,
        }
        *paused = false;
        Ok(())
    }

    /// The guest's connections to the host go by `socket` from now on.
    pub fn uplink(&self, socket: OwnedFd) -> Result<(), MachineError> {
        let uplink = self.uplink.as_ref().ok_or(MachineError::NoVsock)?;
        uplink.replace(socket);
        Ok(())
    }

    /// Makes `file` the backing of an empty block slot.
    pub fn attach(&self, slot: &str, file: File) -> Result<(), MachineError> {
        let found = self.slots.iter().find(|known| known.id() == slot);
        let slot = found.ok_or_else(|| MachineError::NoSlot(slot.to_owned()))?;
        Ok(slot.attach(file)?)
    }

    /// Fills a network slot.
    pub fn attach_net(&self, slot: &str, attachment: Attachment) -> Result<(), MachineError> {
        Ok(self.net(slot)?.attach(attachment)?)
    }

    /// Empties a network slot; all its descriptors are closed by then.
    pub fn detach_net(&self, slot: &str) -> Result<(), MachineError> {
        Ok(self.net(slot)?.detach()?)
    }

    fn net(&self, slot: &str) -> Result<&net::Slot, MachineError> {
        let found = self.nets.iter().find(|known| known.id() == slot);
        let found = found.ok_or_else(|| MachineError::NoNetSlot(slot.to_owned()))?;
        Ok(found)
    }

    /// Counters and state.
    pub fn report(&self) -> Report {
        let paused = *lock(&self.paused);
        let size = lock(&self.size);
        let (kind, emulator_pid) = match &self.engine {
            Engine::Kvm(_) => (EngineKind::Kvm, None),
            Engine::Emulated(emulator) => (EngineKind::Emulated, Some(emulator.pid())),
        };
        // The emulator's exits are its own; ours are none.
        let counted = emulator_pid.is_none();
        Report {
            engine: kind.name(),
            state: if paused { "paused" } else { "running" },
            vcpus: size.vcpus(),
            memory_mib: size.memory_mib(),
            times: self.readiness.times(),
            exits: if counted {
                self.exits()
            } else {
                BTreeMap::new()
            },
            exits_until_ready: self.readiness.exits_until_ready().filter(|_| counted),
            vmm_pid: std::process::id(),
            emulator_pid,
            console: self.console.tail(limits::CONSOLE_TAIL_BYTES),
        }
    }

    /// Console output from byte `from` on, as far as it is kept, in pieces.
    pub fn console(&self, from: u64) -> Piece {
        self.console.piece(from, limits::CONSOLE_TAIL_BYTES)
    }

    /// VM exits so far, by kind.
    pub fn exits(&self) -> BTreeMap<&'static str, u64> {
        self.readiness.exits.by_name()
    }

    /// Ends what is not a part of this process.
    pub fn kill(&self) {
        // It may have ended by itself: then that is the end we heard of.
        if let Engine::Emulated(emulator) = &self.engine
            && let Err(error) = emulator.kill()
        {
            tracing::debug!(%error, "cannot kill the emulator");
        }
    }
}
