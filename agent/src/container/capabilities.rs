//! Step: the five capability sets of a process. Names that this kernel does not have were taken out when the spec was parsed.

use oci_spec::runtime::{Capabilities, Capability, LinuxCapabilities};
use rustix::thread::{CapabilitySet, CapabilitySets};

use crate::error::{Context, Result};

/// The five capability sets of a process.
#[derive(Clone)]
pub struct Sets {
    bounding: CapabilitySet,
    sets: CapabilitySets,
    ambient: CapabilitySet,
}

impl Sets {
    /// From the spec; a missing set is empty.
    pub fn parse(spec: Option<&LinuxCapabilities>) -> Self {
        let set = |get: fn(&LinuxCapabilities) -> &Option<Capabilities>| {
            spec.and_then(|spec| get(spec).as_ref())
                .into_iter()
                .flatten()
                .fold(CapabilitySet::empty(), |set, &one| set | bit(one))
        };
        Self {
            bounding: set(LinuxCapabilities::bounding),
            sets: CapabilitySets {
                effective: set(LinuxCapabilities::effective),
                permitted: set(LinuxCapabilities::permitted),
                inheritable: set(LinuxCapabilities::inheritable),
            },
            ambient: set(LinuxCapabilities::ambient),
        }
    }

    /// Drops from the bounding set; needs CAP_SETPCAP, so it comes before the rest.
    pub fn apply_bounding(&self) -> Result<()> {
        for number in 0..64 {
            let one = CapabilitySet::from_bits_retain(1 << number);
            match rustix::thread::capability_is_in_bounding_set(one) {
                Ok(true) if !self.bounding.contains(one) => {
                    rustix::thread::remove_capability_from_bounding_set(one)
                        .step(|| format!("process.capabilities.bounding: drop {number}"))?;
                }
                Ok(_) => {}
                // Past the kernel's last capability.
                Err(_) => break,
            }
        }
        Ok(())
    }

    /// Sets the others.
    pub fn apply(&self) -> Result<()> {
        rustix::thread::set_capabilities(None, self.sets)
            .step(|| "process.capabilities: set".into())?;
        rustix::thread::clear_ambient_capability_set()
            .step(|| "process.capabilities.ambient: clear".into())?;
        for one in self.ambient.iter() {
            // One that is not permitted and inheritable as well cannot be had. The spec wants a warning, which was given when it
            // was parsed, and no failure.
            let _ = rustix::thread::configure_capability_in_ambient_set(one, true);
        }
        Ok(())
    }
}

fn bit(capability: Capability) -> CapabilitySet {
    // The crate prints `CHOWN`, which is how the flags are named as well.
    CapabilitySet::from_name(&capability.to_string()).unwrap_or(CapabilitySet::empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_capability_has_its_bit() {
        for (name, number) in [
            ("CAP_CHOWN", 0),
            ("CAP_SYS_ADMIN", 21),
            ("CAP_NET_RAW", 13),
            ("CAP_SETFCAP", 31),
            ("CAP_BPF", 39),
            ("CAP_CHECKPOINT_RESTORE", 40),
        ] {
            let one: Capability = serde_json::from_str(&format!("\"{name}\"")).unwrap();
            assert_eq!(bit(one).bits(), 1 << number, "{name}");
        }
    }

    #[test]
    fn missing_capabilities_are_none() {
        let sets = Sets::parse(None);
        assert!(sets.bounding.is_empty() && sets.sets.permitted.is_empty());
    }
}
