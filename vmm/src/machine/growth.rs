//! The size of a machine, and how it becomes larger.
//!
//! A machine starts with what its configuration says and has a reserve beyond that: CPUs that the guest's kernel finds in
//! its tables but does not start, and addresses where memory can come. Growth makes a part of the reserve real;
//! the guest's kernel takes it up when the agent tells it to. A machine never shrinks.
//!
//! With engine `emulated` the emulator has all of it from the beginning, and the kernel's command line alone keeps
//! the guest from it.

use serde::Serialize;

use super::{Engine, Machine, MachineError, lock};
use crate::arch::x86_64::layout;
use crate::config::MachineConfig;

/// More than the reserve holds.
#[derive(Debug, thiserror::Error)]
#[error("{field} is {asked}: the machine can grow to {most}")]
pub struct BeyondReserve {
    field: &'static str,
    asked: u32,
    most: u64,
}

/// How large a machine is and can become.
pub(super) struct Size {
    vcpus: u8,
    vcpus_max: u8,
    boot: u64,
    added: u64,
    reserve: u64,
}

/// What a machine has.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct Grown {
    vcpus: u8,
    memory_mib: u64,
    /// What was added since the start.
    memory: Vec<Added>,
}

#[derive(Debug, PartialEq, Eq, Serialize)]
struct Added {
    address: u64,
    len: u64,
}

impl Size {
    pub(super) fn new(config: &MachineConfig) -> Self {
        Self {
            vcpus: config.vcpus,
            vcpus_max: config.vcpus_max(),
            boot: config.memory_bytes(),
            added: 0,
            reserve: config.reserve_bytes(),
        }
    }

    pub(super) fn vcpus(&self) -> u8 {
        self.vcpus
    }

    pub(super) fn memory_mib(&self) -> u64 {
        self.boot.saturating_add(self.added) >> 20
    }

    /// What must have been added for `memory_mib`: whole blocks, and no less than now.
    fn added_for(&self, memory_mib: u32) -> Result<u64, BeyondReserve> {
        let wanted = (u64::from(memory_mib) << 20).saturating_sub(self.boot);
        let wanted = wanted.next_multiple_of(layout::MEMORY_BLOCK);
        if wanted > self.reserve {
            return Err(BeyondReserve {
                field: "memory_mib",
                asked: memory_mib,
                most: self.boot.saturating_add(self.reserve) >> 20,
            });
        }
        Ok(wanted.max(self.added))
    }

    fn vcpus_for(&self, vcpus: u32) -> Result<u8, BeyondReserve> {
        let fits = u8::try_from(vcpus).ok().filter(|n| *n <= self.vcpus_max);
        let wanted = fits.ok_or(BeyondReserve {
            field: "vcpus",
            asked: vcpus,
            most: self.vcpus_max.into(),
        })?;
        Ok(wanted.max(self.vcpus))
    }

    fn grown(&self) -> Grown {
        let ranges = layout::growth_ranges(self.boot, self.added);
        Grown {
            vcpus: self.vcpus,
            memory_mib: self.memory_mib(),
            memory: ranges
                .iter()
                .map(|range| Added {
                    address: range.address,
                    len: range.len,
                })
                .collect(),
        }
    }
}

impl Machine {
    /// Makes the machine at least so large. What is beyond the reserve changes nothing; what the host refuses leaves
    /// what was there, and perhaps a part of what was asked for.
    pub fn grow(&self, vcpus: u32, memory_mib: u32) -> Result<Grown, MachineError> {
        let mut size = lock(&self.size);
        let (vcpus, added) = (size.vcpus_for(vcpus)?, size.added_for(memory_mib)?);
        if added > size.added {
            if let Engine::Kvm(engine) = &self.engine {
                engine.grow_memory(added)?;
            }
            size.added = added;
        }
        if let Engine::Kvm(engine) = &self.engine
            && added > 0
        {
            // All of them, and each time: one that failed before is told again.
            let memory = engine.memory();
            let told = self.nets.iter().map(|net| net.memory_grew(&memory));
            told.fold(Ok(()), Result::and)?;
        }
        if vcpus > size.vcpus {
            size.vcpus = match &self.engine {
                Engine::Kvm(engine) => {
                    // The answer tells how many there are: memory does not wait for them.
                    if let Err(error) = engine.grow_vcpus(vcpus) {
                        tracing::error!(%error, "not all vCPUs could be made");
                    }
                    engine.vcpus()
                }
                Engine::Emulated(_) => vcpus,
            };
        }
        let grown = size.grown();
        tracing::info!(
            vcpus = grown.vcpus,
            memory_mib = grown.memory_mib,
            "the machine's size"
        );
        Ok(grown)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn size() -> Size {
        Size {
            vcpus: 1,
            vcpus_max: 4,
            boot: 600 * MIB,
            added: 128 * MIB,
            reserve: 512 * MIB,
        }
    }

    #[test]
    fn a_size_is_rounded_up_to_blocks_and_never_shrinks() {
        let size = size();
        let added = |mib| size.added_for(mib).unwrap() / MIB;
        assert_eq!(added(0), 128);
        assert_eq!(added(728), 128);
        assert_eq!(added(729), 256);
        assert_eq!(added(600 + 512), 512);
        assert_eq!(size.vcpus_for(0).unwrap(), 1);
        assert_eq!(size.vcpus_for(4).unwrap(), 4);
    }

    #[test]
    fn beyond_the_reserve_is_refused_with_what_there_is() {
        let error = size().added_for(1113).unwrap_err();
        assert_eq!(
            error.to_string(),
            "memory_mib is 1113: the machine can grow to 1112"
        );
        assert!(size().added_for(u32::MAX).is_err());
        for vcpus in [5, 256, u32::MAX] {
            let error = size().vcpus_for(vcpus).unwrap_err();
            assert!(error.to_string().ends_with("the machine can grow to 4"));
        }
    }

    #[test]
    fn the_answer_names_all_memory_that_was_added() {
        let grown = Size {
            boot: 3 << 30,
            ..size()
        }
        .grown();
        let json = serde_json::to_value(&grown).unwrap();
        let expected = serde_json::json!({"vcpus": 1, "memory_mib": 3072 + 128,
            "memory": [{"address": 4u64 << 30, "len": 128 << 20}]});
        assert_eq!(json, expected);
    }
}
