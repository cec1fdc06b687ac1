//! From a configuration to a running machine: [`build`] before the jail, [`Built::start`] in it.

use std::sync::Arc;

use super::end::EndSender;
use super::growth::Size;
use super::readiness::Readiness;
use super::{Engine, Machine};
use crate::config::{EngineKind, MachineConfig};
use crate::engine::emulated::{EmulatedError, Emulator, Spawned};
use crate::engine::kvm::{self, KvmEngine, KvmError};
use crate::fs::inherited_sockets;
use crate::limits;
use crate::serial::ConsoleRing;
use crate::virtio::VirtioDevice;
use crate::virtio::balloon::Balloon;
use crate::virtio::block::{Block, BlockError, Slot};
use crate::virtio::fs::{Fs, FsError};
use crate::virtio::net::{self, Net};
use crate::virtio::rng::Rng;
use crate::virtio::vsock::{MuxerError, Uplink, Vsock};

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
    /// The same for `vsock.uplink_fd`.
    #[error("vsock.uplink_fd does not name an inherited socket of packets")]
    UplinkFd(#[source] std::io::Error),
    /// The file system device.
    #[error("cannot make the file system device")]
    Fs(#[source] FsError),
    /// Engine `kvm`.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// Engine `emulated`.
    #[error(transparent)]
    Emulated(#[from] EmulatedError),
}

/// A machine that is built and does not run: all that takes rights is done, and there is no thread yet.
pub struct Built {
    engine: BuiltEngine,
    devices: Devices,
    size: Size,
}

enum BuiltEngine {
    Kvm(kvm::Built),
    Emulated(Spawned),
}

/// What the machine keeps of its devices.
struct Devices {
    slots: Vec<Arc<Slot>>,
    nets: Vec<Arc<net::Slot>>,
    uplink: Option<Arc<Uplink>>,
}

/// Builds a machine. `readiness` takes note of how its start goes; `end` hears when the machine is over.
pub fn build(
    config: &MachineConfig,
    console: &Arc<ConsoleRing>,
    end: &EndSender,
    readiness: &Readiness,
) -> Result<Built, BuildError> {
    let slots = config.blocks.iter().map(Slot::new);
    let slots: Vec<Arc<Slot>> = slots.collect::<Result<_, _>>()?;
    let kept = Devices {
        slots,
        nets: net_slots(config),
        uplink: uplink(config)?,
    };
    let devices = devices(config, &kept, readiness, end)?;
    let engine = match config.engine {
        EngineKind::Kvm => BuiltEngine::Kvm(KvmEngine::build(
            config,
            devices,
            console.clone(),
            readiness.exits.clone(),
            end.clone(),
        )?),
        EngineKind::Emulated => BuiltEngine::Emulated(Emulator::spawn(config, devices)?),
    };
    Ok(Built {
        engine,
        devices: kept,
        size: Size::new(config),
    })
}

impl Built {
    /// Lets it run.
    pub fn start(
        self,
        console: Arc<ConsoleRing>,
        end: EndSender,
        readiness: Readiness,
    ) -> Result<Machine, BuildError> {
        let engine = match self.engine {
            BuiltEngine::Kvm(built) => Engine::Kvm(built.start()?),
            BuiltEngine::Emulated(spawned) => {
                Engine::Emulated(spawned.start(console.clone(), end)?)
            }
        };
        readiness.started();
        let Devices {
            slots,
            nets,
            uplink,
        } = self.devices;
        Ok(Machine {
            engine,
            slots,
            nets,
            uplink,
            console,
            readiness,
            paused: false.into(),
            size: self.size.into(),
        })
    }
}

fn uplink(config: &MachineConfig) -> Result<Option<Arc<Uplink>>, BuildError> {
    let Some(vsock) = &config.vsock else {
        return Ok(None);
    };
    let inherited = match vsock.uplink_fd {
        Some(fd) => inherited_sockets(&[fd]).map_err(BuildError::UplinkFd)?,
        None => Vec::new(),
    };
    let uplink = Uplink::new(vsock.ports.clone(), inherited.into_iter().next());
    Ok(Some(uplink))
}

/// One pair of queues is enough for a software CPU, whose emulator keeps the events that vhost would need.
fn net_slots(config: &MachineConfig) -> Vec<Arc<net::Slot>> {
    let (pairs, vhost) = match config.engine {
        EngineKind::Kvm => (usize::from(config.vcpus).min(limits::NET_PAIRS), true),
        EngineKind::Emulated => (1, false),
    };
    let slots = config.net.iter();
    slots
        .map(|slot| net::Slot::new(&slot.id, slot.mac, pairs, vhost))
        .collect()
}

/// One device model for both engines, but for the balloon: the emulator has its memory shared, and no frontend for ours.
fn devices(
    config: &MachineConfig,
    kept: &Devices,
    readiness: &Readiness,
    end: &EndSender,
) -> Result<Vec<Box<dyn VirtioDevice>>, BuildError> {
    let mut devices: Vec<Box<dyn VirtioDevice>> = vec![Box::new(Rng::default())];
    if config.engine == EngineKind::Kvm {
        devices.push(Box::new(Balloon::default()));
    }
    if let (Some(vsock), Some(uplink)) = (&config.vsock, &kept.uplink) {
        let socket = config.state_dir.join("vsock.sock");
        let readiness = readiness.clone();
        let ready = Box::new(move || readiness.mark());
        let device = Vsock::new(u64::from(vsock.cid), &socket, uplink.clone(), ready);
        let device = device.map_err(BuildError::Vsock)?;
        devices.push(Box::new(device));
    }
    if let Some(fs) = &config.fs {
        let sockets = inherited_sockets(&fs.worker_fds).map_err(BuildError::WorkerFds)?;
        let device = Fs::new(&fs.tag, sockets, end.clone()).map_err(BuildError::Fs)?;
        let readiness = readiness.clone();
        devices.push(Box::new(device.seen_by(move || readiness.booted())));
    }
    for slot in &kept.nets {
        devices.push(Box::new(Net::new(slot.clone())));
    }
    for slot in &kept.slots {
        devices.push(Box::new(Block::new(slot.clone())));
    }
    Ok(devices)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_network_slot_has_a_pair_of_queues_for_each_vcpu_up_to_the_limit() {
        let pairs = |engine: &str, vcpus: u8| {
            let dir = tempfile::tempdir().unwrap();
            let json = serde_json::json!({"engine": engine, "kernel": "/k", "initramfs": "/i", "vcpus": vcpus,
                "memory_mib": 96, "net": [{"id": "n0", "mac": "02:00:00:00:00:01"}]});
            std::fs::write(dir.path().join("machine.json"), json.to_string()).unwrap();
            net_slots(&MachineConfig::load(dir.path()).unwrap())[0].pairs()
        };
        assert_eq!(pairs("kvm", 1), 1);
        assert_eq!(pairs("kvm", 3), 3);
        assert_eq!(pairs("kvm", 32), limits::NET_PAIRS);
        assert_eq!(pairs("emulated", 4), 1);
    }
}
