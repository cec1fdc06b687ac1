//! The machine's size: what it starts with, what its containers need, and growth when that is more.
//!
//! A container's limits are its claim. When one comes or changes, the machine is made large enough for all claims, as
//! far as its reserve goes: the VMM makes CPUs and memory real (`grow`), the agent takes them up. It never shrinks, and
//! a host that cannot give more is no error: the limits stand, but the machine's own come first.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use bulkhead_protocol::{agent, agent_ttrpc::AgentClient};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::{control, deadline, machine::Size};
use crate::{
    config::{self, Config, Engine},
    spec::{self, Claim, Host},
};

/// How long the agent may take: each block of memory is set up by the guest's kernel.
const TAKE_UP: Duration = Duration::from_secs(120);
/// Steps in which memory is added, in MiB.
const BLOCK_MIB: u64 = 128;
/// Most CPUs beyond those of the start: each costs 0.45 MiB of the guest's memory and 0.25 ms of its boot.
const CPU_RESERVE: u64 = 4;
/// The emulator keeps books about all memory that it could have: 3 bits a page.
const EMULATED_RESERVE_MIB: u64 = 32 * 1024;

/// How large a machine is at the start, and within which bounds it stays.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sizing {
    /// What the configuration or the annotations ask for.
    pub least: Size,
    /// At the start.
    pub start: Size,
    /// With all of the reserve.
    pub most: Size,
}

impl Sizing {
    /// The reserve is what the host has, as far as it costs nothing.
    pub fn new(config: &Config, host: Host, least: Size, start: Size) -> Self {
        let cpus = start.vcpus.saturating_add(CPU_RESERVE);
        let vcpus = host.cpus.min(config::VCPUS_MAX).min(cpus);
        let memory = match config.engine {
            Engine::Kvm => config::MEMORY_MAX_MIB,
            Engine::Emulated => start.memory_mib.saturating_add(EMULATED_RESERVE_MIB),
        };
        let memory = memory.min(config::MEMORY_MAX_MIB).min(host.memory_mib);
        let reserve = memory.saturating_sub(start.memory_mib);
        Self {
            least,
            start,
            most: Size {
                vcpus: vcpus.max(start.vcpus),
                memory_mib: start
                    .memory_mib
                    .saturating_add(reserve / BLOCK_MIB * BLOCK_MIB),
            },
        }
    }
}

/// The VMM's answer to `grow`.
#[derive(Deserialize)]
struct Grown {
    vcpus: u32,
    memory: Vec<Range>,
}

#[derive(Deserialize)]
struct Range {
    address: u64,
    len: u64,
}

#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Control(#[from] control::Error),
    #[error("the VMM's answer: {0}")]
    Answer(#[from] serde_json::Error),
    #[error("the agent: {0}")]
    Agent(#[from] ttrpc::Error),
}

/// See the module.
pub struct Growth {
    sizing: Sizing,
    control: control::Client,
    state: Mutex<State>,
    /// One growth at a time.
    turn: tokio::sync::Mutex<()>,
}

struct State {
    size: Size,
    claims: HashMap<String, Claim>,
}

impl Growth {
    /// Of a machine that was just started.
    pub fn new(sizing: Sizing, control: control::Client) -> Self {
        Self {
            sizing,
            control,
            state: Mutex::new(State {
                size: sizing.start,
                claims: HashMap::new(),
            }),
            turn: tokio::sync::Mutex::default(),
        }
    }

    /// The bounds.
    pub fn sizing(&self) -> Sizing {
        self.sizing
    }

    /// What a machine has that was taken over.
    pub fn restore(&self, size: Size) {
        self.state().size = size;
    }

    /// The claim of a container that was taken over.
    pub fn restore_claim(&self, container: &str, claim: Claim) {
        self.state().claims.insert(container.into(), claim);
    }

    /// What the machine has now.
    pub fn size(&self) -> Size {
        self.state().size
    }

    /// What a container claims.
    pub fn claim(&self, container: &str) -> Claim {
        self.state()
            .claims
            .get(container)
            .copied()
            .unwrap_or_default()
    }

    /// A container is gone. What the machine has stays.
    pub fn forget(&self, container: &str) {
        self.state().claims.remove(container);
    }

    /// Notes a container's claim and makes the machine large enough for all of them, if it can be.
    pub async fn make_room(&self, agent: &AgentClient, container: &str, claim: Claim) {
        let _turn = self.turn.lock().await;
        let (size, needed) = {
            let mut state = self.state();
            state.claims.insert(container.into(), claim);
            let needed = spec::needed(self.sizing.least, state.claims.values());
            (state.size, needed)
        };
        let most = self.sizing.most;
        let target = Size {
            vcpus: needed.vcpus.min(most.vcpus).max(size.vcpus),
            memory_mib: needed.memory_mib.min(most.memory_mib).max(size.memory_mib),
        };
        if target != size
            && let Err(error) = self.grow(agent, target).await
        {
            tracing::warn!(%error, ?target, "the machine does not grow");
        }
        let size = self.size();
        if needed.vcpus > size.vcpus {
            tracing::warn!(
                needed = needed.vcpus,
                vcpus = size.vcpus,
                "linux.resources.cpu allows more than the machine can have"
            );
        }
        if needed.memory_mib > size.memory_mib {
            tracing::warn!(
                needed_mib = needed.memory_mib,
                memory_mib = size.memory_mib,
                "linux.resources.memory.limit is more than the machine can give"
            );
        }
    }

    async fn grow(&self, agent: &AgentClient, target: Size) -> Result<(), Failure> {
        let request =
            json!({ "op": "grow", "vcpus": target.vcpus, "memory_mib": target.memory_mib });
        let answer = self.control.request(request, Vec::new()).await?;
        let grown = Grown::deserialize(answer)?;
        let mut request = agent::GrowRequest::new();
        request.vcpus = grown.vcpus;
        request.memory = grown.memory.iter().map(range).collect();
        let ranges = grown.memory.iter().map(|range| range.len);
        let given = ranges.fold(0, u64::saturating_add);
        let taken = agent.grow(deadline(TAKE_UP), &request).await?;
        let start = self.sizing.start;
        let size = Size {
            vcpus: u64::from(taken.vcpus).min(target.vcpus),
            // The guest's word, as far as it was given that much.
            memory_mib: start
                .memory_mib
                .saturating_add(taken.memory_bytes.min(given) >> 20),
        };
        self.state().size = size;
        tracing::info!(?size, "the machine grew");
        Ok(())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn range(range: &Range) -> agent::MemoryRange {
    let mut message = agent::MemoryRange::new();
    message.address = range.address;
    message.len = range.len;
    message
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn size(vcpus: u64, memory_mib: u64) -> Size {
        Size { vcpus, memory_mib }
    }

    #[test]
    fn the_reserve_is_the_hosts_in_whole_blocks_and_bounded() {
        let most = |engine: &str, cpus, memory_mib, start| {
            let text = format!("engine = \"{engine}\"");
            let config = Config::parse(&text, Path::new("/c"), Path::new("/opt")).unwrap();
            let host = Host { cpus, memory_mib };
            Sizing::new(&config, host, start, start).most
        };
        assert_eq!(
            most("kvm", 4, 24_000, size(1, 512)),
            size(4, 512 + 183 * 128)
        );
        assert_eq!(most("kvm", 4, 1000, size(1, 600)), size(4, 600 + 3 * 128));
        assert_eq!(most("kvm", 128, 1000, size(2, 512)), size(6, 512 + 3 * 128));
        assert_eq!(most("kvm", 128, 1000, size(30, 512)).vcpus, 32);
        // A machine that is larger than the host stays as it is.
        assert_eq!(most("kvm", 1, 1000, size(2, 2000)), size(2, 2000));
        let large = 1 << 18;
        assert_eq!(most("kvm", 1, large, size(1, 512)), size(1, large));
        assert_eq!(
            most("emulated", 1, large, size(1, 512)),
            size(1, 512 + 32 * 1024)
        );
    }
}
