//! The VMM's jail: what a guest that breaks a device finds is a process without rights.
//!
//! `bulkhead-vmm` is started as root by the shim, in the pod's cgroup and network namespace and in a pid namespace of its own, with the
//! descriptors that it needs. Its one thread opens what takes rights (`/dev/kvm`, images, sockets, `exit.json`), builds the machine, starts the
//! emulator where there is one, and calls [`enter`]; only then are there more threads, and only then does guest code run:
//!
//! ```text
//!  mount, ipc, uts namespaces ─ empty read-only root ─ limits ─ capabilities, also from the bounding set ─ user of this pod alone
//!    ─ not dumpable ─ Landlock: no file, no socket ─ seccomp for the process ─ [`threads`]: seccomp for each kind of thread
//! ```
//!
//! From there on nothing is reached by a name: sockets, taps and `vhost-net` come as descriptors. A layer that the host does not have is
//! named in the log, or ends the start if the configuration requires it.

mod landlock;
pub mod privileges;
pub mod rlimits;
mod root;
pub mod seccomp;
pub mod threads;

use std::io;

use serde::Deserialize;

use crate::config::{EngineKind, MachineConfig};

/// What is asked of the jail: `jail` in `machine.json`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JailConfig {
    /// User of this pod alone.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
    /// Layers without which the machine does not start.
    #[serde(default)]
    pub require: Vec<Layer>,
}

impl Default for JailConfig {
    /// Nobody, for a VMM that is started by hand.
    fn default() -> Self {
        Self {
            uid: 65534,
            gid: 65534,
            require: Vec::new(),
        }
    }
}

/// A part of the jail.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Layer {
    /// Mount, ipc and uts namespaces, and the empty root.
    Root,
    /// Limits of resources.
    Limits,
    /// A user of its own, without capabilities.
    User,
    /// No access to any file or port (landlock(7)).
    Landlock,
    /// System calls by thread (seccomp(2)).
    Seccomp,
}

impl Layer {
    /// As in the configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::Root => "root",
            Self::Limits => "limits",
            Self::User => "user",
            Self::Landlock => "landlock",
            Self::Seccomp => "seccomp",
        }
    }
}

/// The machine does not start.
#[derive(Debug, thiserror::Error)]
pub enum JailError {
    /// Credentials and namespaces belong to threads, so there must be one.
    #[error("the jail needs a process with one thread, and this has {0}")]
    Threads(usize),
    /// This layer was required.
    #[error(
        "the host lacks layer `{}` of the jail, which [jail] require in the configuration asks for: {why}",
        layer.name()
    )]
    Required {
        /// Which.
        layer: Layer,
        /// In the system's words.
        why: String,
    },
    /// What must not be left out.
    #[error("cannot {step} for the jail")]
    Step {
        /// What was tried.
        step: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

/// Why a layer is not there.
#[derive(Debug, thiserror::Error)]
#[error("cannot {step}: {source}")]
struct Missing {
    step: &'static str,
    source: io::Error,
}

fn missing<E: Into<io::Error>>(step: &'static str) -> impl FnOnce(E) -> Missing {
    move |source| Missing {
        step,
        source: source.into(),
    }
}

/// Enters the jail of `machine` for good.
pub fn enter(machine: &MachineConfig) -> Result<(), JailError> {
    let config = &machine.jail;
    threads::one_heap();
    let count = std::fs::read_dir("/proc/self/task").map_or(1, Iterator::count);
    if count != 1 {
        return Err(JailError::Threads(count));
    }
    let layer = |layer: Layer, result: Result<(), Missing>| match result {
        Ok(()) => Ok(()),
        Err(why) if config.require.contains(&layer) => Err(JailError::Required {
            layer,
            why: why.to_string(),
        }),
        Err(why) => {
            tracing::warn!(layer = layer.name(), %why, "this host lacks a layer of the jail");
            Ok(())
        }
    };
    layer(Layer::Root, root::enter(&machine.state_dir))?;
    layer(Layer::Limits, limit(machine))?;
    layer(Layer::User, privileges::drop(config.uid, config.gid))?;
    privileges::seal().map_err(|source| JailError::Step {
        step: "give up new privileges and dumps",
        source: source.into(),
    })?;
    // The emulator is outside, and is stopped and ended by signals.
    let signals = machine.engine == EngineKind::Emulated;
    layer(Layer::Landlock, landlock::deny_all(signals))?;
    let confined = seccomp::confine_process();
    let filtered = confined.is_ok();
    layer(Layer::Seccomp, confined)?;
    threads::begin(filtered).map_err(|source| JailError::Step {
        step: "start the thread that starts threads",
        source,
    })
}

fn limit(machine: &MachineConfig) -> Result<(), Missing> {
    // A disk is a file as long as its operator wants.
    let files: &[_] = match machine.blocks.is_empty() {
        true => &rlimits::OF_FILES,
        false => &[],
    };
    [&rlimits::OF_MACHINE, files]
        .into_iter()
        .try_for_each(rlimits::set)
        .map_err(missing("set a limit of resources"))
}
