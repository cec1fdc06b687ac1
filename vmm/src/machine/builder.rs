//! From a configuration to a running machine.

use std::sync::Arc;
use std::time::Instant;

use super::end::EndSender;
use super::{Engine, Machine, Readiness};
use crate::config::{EngineKind, MachineConfig};
use crate::engine::emulated::{EmulatedError, Emulator};
use crate::engine::kvm::{KvmEngine, KvmError};
use crate::fs::{inherited, inherited_sockets};
use crate::serial::ConsoleRing;
use crate::virtio::VirtioDevice;
use crate::virtio::block::{Block, BlockError, Slot};
use crate::virtio::fs::{Fs, FsError};
use crate::virtio::net::{Net, Tap, TapError};
use crate::virtio::rng::Rng;
use crate::virtio::vsock::{MuxerError, Vsock};

/// Why a machine could not be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// A file for a block slot.
    #[error(transparent)]
    Block(#[from] BlockError),
    /// The vsock device.
    #[error("cannot make the vsock device")]
    Vsock(#[source] MuxerError),
    /// A number in `fs.worker_fds` is no socket that we inherited.
    #[error("fs.worker_fds does not name inherited sockets")]
    WorkerFds(#[source] std::io::Error),
    /// The file system device.
    #[error("cannot make the file system device")]
    Fs(#[source] FsError),
    /// A number in `net[].tap_fds` is no descriptor that we inherited.
    #[error("net.tap_fds does not name inherited descriptors")]
    TapFds(#[source] std::io::Error),
    /// A descriptor in `net[].tap_fds` is no tap for us.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// Engine `kvm`.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// Engine `emulated`.
    #[error(transparent)]
    Emulated(#[from] EmulatedError),
}

/// Builds and starts a machine. `started` is when this process was; `end` hears when the machine is over.
pub fn build(
    config: &MachineConfig,
    console: Arc<ConsoleRing>,
    end: EndSender,
    started: Instant,
) -> Result<Machine, BuildError> {
    let readiness = Readiness::new(started);
    let slots: Vec<Arc<Slot>> = config
        .blocks
        .iter()
        .map(Slot::new)
        .collect::<Result<_, _>>()?;
    let devices = devices(config, &slots, &readiness, &end)?;
    let engine = match config.engine {
        EngineKind::Kvm => Engine::Kvm(KvmEngine::start(
            config,
            devices,
            console.clone(),
            readiness.exits.clone(),
            end,
        )?),
        EngineKind::Emulated => {
            Engine::Emulated(Emulator::start(config, devices, console.clone(), end)?)
        }
    };
    Ok(Machine {
        engine,
        slots,
        console,
        readiness,
        paused: false.into(),
    })
}

/// One device model for both engines.
fn devices(
    config: &MachineConfig,
    slots: &[Arc<Slot>],
    readiness: &Readiness,
    end: &EndSender,
) -> Result<Vec<Box<dyn VirtioDevice>>, BuildError> {
    let mut devices: Vec<Box<dyn VirtioDevice>> = vec![Box::new(Rng::default())];
    if let Some(vsock) = &config.vsock {
        let socket = config.state_dir.join("vsock.sock");
        let readiness = readiness.clone();
        let ready = Box::new(move || readiness.mark());
        let device = Vsock::new(u64::from(vsock.cid), &socket, ready).map_err(BuildError::Vsock)?;
        devices.push(Box::new(device));
    }
    if let Some(fs) = &config.fs {
        let sockets = inherited_sockets(&fs.worker_fds).map_err(BuildError::WorkerFds)?;
        let device = Fs::new(&fs.tag, sockets, end.clone()).map_err(BuildError::Fs)?;
        devices.push(Box::new(device));
    }
    for net in &config.net {
        let taps = inherited(&net.tap_fds).map_err(BuildError::TapFds)?;
        let taps = taps.into_iter().map(Tap::new).collect::<Result<_, _>>()?;
        devices.push(Box::new(Net::new(net.mac, net.mtu, net.rate, taps)));
    }
    for slot in slots {
        devices.push(Box::new(Block::new(slot.clone())));
    }
    Ok(devices)
}
