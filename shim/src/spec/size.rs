//! How large the pod's machine must be.

use std::{collections::BTreeMap, fs, thread};

use serde::{Deserialize, Serialize};

use super::{
    Spec, cpuset, object,
    view::{CpuView, ResourcesView},
};
use crate::{
    config::{self, Config},
    refusal::{Refusal, wrong},
    sandbox::{growth::Sizing, machine::Size},
};

/// Annotation: least vCPUs of the pod's machine.
pub const VCPUS: &str = "io.bulkhead.vcpus";
/// Annotation: least memory of the pod's machine in MiB.
pub const MEMORY: &str = "io.bulkhead.memory_mib";
/// Annotation: whether ports that listen on the guest's loopback are reached on that of the pod's namespace.
pub const PORT_FORWARD: &str = "io.bulkhead.port_forward";
const PREFIX: &str = "io.bulkhead.";
const KNOWN: [&str; 3] = [VCPUS, MEMORY, PORT_FORWARD];
/// Annotations of containerd's CRI plugin on a pod's first container: sums over the pod's containers.
const POD_QUOTA: &str = "io.kubernetes.cri.sandbox-cpu-quota";
const POD_PERIOD: &str = "io.kubernetes.cri.sandbox-cpu-period";
const POD_MEMORY: &str = "io.kubernetes.cri.sandbox-memory";
/// Annotation of containerd's CRI plugin, with this value on a pod's first container, which only holds it.
const CONTAINER_TYPE: (&str, &str) = ("io.kubernetes.cri.container-type", "sandbox");
/// The kernel's `cpu.max` period where none is given, in microseconds.
const PERIOD: u64 = 100_000;
/// What the guest needs beside the containers' own memory limit, in MiB.
const OVERHEAD_MIB: u64 = 128;

/// What this host can give to one machine.
#[derive(Clone, Copy, Debug)]
pub struct Host {
    /// CPUs that the shim may use.
    pub cpus: u64,
    /// Memory in MiB.
    pub memory_mib: u64,
}

impl Host {
    /// This host.
    pub fn this() -> Self {
        let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let memory_mib = text
            .lines()
            .find_map(|line| line.strip_prefix("MemTotal:")?.split_whitespace().next())
            .and_then(|kib| kib.parse::<u64>().ok())
            .map_or(config::MEMORY_MAX_MIB, |kib| kib / 1024);
        Self {
            cpus: thread::available_parallelism().map_or(1, |n| n.get() as u64),
            memory_mib,
        }
    }
}

/// Refuses annotations of ours that are unknown or out of range.
pub fn check_annotations(annotations: &BTreeMap<String, String>) -> Result<(), Refusal> {
    for key in annotations.keys() {
        if key.starts_with(PREFIX) && !KNOWN.contains(&key.as_str()) {
            let why = format!("is unknown; there are {}", KNOWN.join(", "));
            return Err(annotation(key, why));
        }
    }
    if let Some(vcpus) = number(annotations, VCPUS)? {
        config::check_vcpus(vcpus).map_err(|why| annotation(VCPUS, why))?;
    }
    if let Some(memory) = number(annotations, MEMORY)? {
        config::check_memory(memory).map_err(|why| annotation(MEMORY, why))?;
    }
    if let Some(word) = annotations.get(PORT_FORWARD)
        && !["on", "off"].contains(&word.as_str())
    {
        return Err(annotation(
            PORT_FORWARD,
            format!("{word:?} is neither \"on\" nor \"off\""),
        ));
    }
    Ok(())
}

fn annotation(key: &str, why: impl Into<String>) -> Refusal {
    wrong(format!("annotations[{key}]"), why)
}

fn number(annotations: &BTreeMap<String, String>, key: &str) -> Result<Option<u64>, Refusal> {
    let Some(text) = annotations.get(key) else {
        return Ok(None);
    };
    match text.parse() {
        Ok(number) => Ok(Some(number)),
        Err(_) => Err(annotation(key, format!("{text:?} is not a number"))),
    }
}

impl Spec {
    /// Whether ports are forwarded into the pod.
    pub fn port_forward(&self) -> bool {
        self.view
            .annotations
            .get(PORT_FORWARD)
            .is_none_or(|word| word != "off")
    }

    /// What this container's limits claim of the machine.
    pub fn claim(&self) -> Claim {
        let (key, sandbox) = CONTAINER_TYPE;
        let mut claim = Claim {
            idle: self
                .view
                .annotations
                .get(key)
                .is_some_and(|kind| kind == sandbox),
            ..Claim::default()
        };
        claim.change(&self.view.linux.resources);
        claim
    }

    /// The size of a machine for this container and its pod: at least the configuration's or the annotations', and
    /// what the limits need, as far as the host has it.
    pub fn sizing(&self, config: &Config, host: Host) -> Result<Sizing, Refusal> {
        let annotations = &self.view.annotations;
        let of_pod = |key: &str| {
            annotations
                .get(key)
                .and_then(|text| text.parse::<i64>().ok())
        };
        let pod = Claim {
            quota: of_pod(POD_QUOTA).unwrap_or(0),
            period: of_pod(POD_PERIOD).map_or(0, |period| period.try_into().unwrap_or(0)),
            memory: of_pod(POD_MEMORY).unwrap_or(0),
            // Containers without a limit are not told of.
            idle: true,
            ..Claim::default()
        };
        let least = Size {
            vcpus: number(annotations, VCPUS)?.unwrap_or(config.vcpus),
            memory_mib: number(annotations, MEMORY)?.unwrap_or(config.memory_mib),
        };
        let (own, pod) = (needed(least, [&self.claim()]), needed(least, [&pod]));
        let vcpus = own.vcpus.max(pod.vcpus);
        let memory = own.memory_mib.max(pod.memory_mib);
        let start = Size {
            vcpus: vcpus.min(host.cpus).min(config::VCPUS_MAX).max(least.vcpus),
            memory_mib: memory
                .min(host.memory_mib)
                .min(config::MEMORY_MAX_MIB)
                .max(least.memory_mib),
        };
        Ok(Sizing::new(config, host, least, start))
    }
}

/// What a container's limits let it use of the machine; 0 or less: no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claim {
    quota: i64,
    period: u64,
    /// CPUs of its cpuset.
    cpus: u64,
    /// In bytes.
    memory: i64,
    /// Without a limit it still uses nothing to speak of.
    idle: bool,
}

impl Claim {
    /// Takes over what is set.
    fn change(&mut self, resources: &ResourcesView) {
        let CpuView {
            quota,
            period,
            ref cpus,
            ..
        } = resources.cpu;
        if quota != 0 {
            self.quota = quota;
        }
        if period != 0 {
            self.period = period;
        }
        if let Some(cpus) = cpuset::parse(cpus) {
            self.cpus = cpus.len() as u64;
        }
        if resources.memory.limit != 0 {
            self.memory = resources.memory.limit;
        }
    }

    /// Thousandths of a CPU that the quota allows.
    fn milli_cpus(&self) -> u64 {
        let period = match self.period {
            0 => PERIOD,
            period => period,
        };
        let quota = u64::try_from(self.quota).unwrap_or(0);
        quota.saturating_mul(1000).div_ceil(period)
    }

    fn memory_mib(&self) -> Option<u64> {
        let bytes = u64::try_from(self.memory).ok().filter(|bytes| *bytes > 0);
        bytes.map(|bytes| bytes.div_ceil(1 << 20))
    }
}

/// A container's claim after an update of its resources.
pub fn changed_claim(mut claim: Claim, resources: &[u8]) -> Result<Claim, Refusal> {
    let field = "linux.resources";
    let view = ResourcesView::deserialize(object(field, resources)?)
        .map_err(|e| wrong(field, format!("are not OCI resources: {e}")))?;
    claim.change(&view);
    Ok(claim)
}

/// The size that a machine needs for containers with these claims, all at their limits at once. Where one has no memory limit,
/// there is `least` for it beside what the others may use.
pub fn needed<'a>(least: Size, claims: impl IntoIterator<Item = &'a Claim>) -> Size {
    let (mut milli_cpus, mut vcpus, mut memory) = (0u64, 0u64, 0u64);
    let mut beside = OVERHEAD_MIB;
    for claim in claims {
        milli_cpus = milli_cpus.saturating_add(claim.milli_cpus());
        vcpus = vcpus.max(claim.cpus);
        match claim.memory_mib() {
            Some(mib) => memory = memory.saturating_add(mib),
            None if claim.idle => {}
            None => beside = beside.max(least.memory_mib),
        }
    }
    let memory = match memory {
        0 => 0,
        mib => mib.saturating_add(beside),
    };
    Size {
        vcpus: least.vcpus.max(vcpus).max(milli_cpus.div_ceil(1000)),
        memory_mib: least.memory_mib.max(memory),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEAST: Size = Size {
        vcpus: 1,
        memory_mib: 512,
    };

    fn claim(quota: i64, cpus: u64, memory_mib: i64) -> Claim {
        Claim {
            quota,
            cpus,
            memory: memory_mib << 20,
            ..Claim::default()
        }
    }

    fn sum(claims: &[Claim]) -> (u64, u64) {
        let size = needed(LEAST, claims);
        (size.vcpus, size.memory_mib)
    }

    #[test]
    fn limits_add_up_and_whoever_has_none_keeps_what_the_machine_started_with() {
        assert_eq!(sum(&[]), (1, 512));
        assert_eq!(sum(&[claim(0, 0, 0)]), (1, 512));
        assert_eq!(sum(&[claim(0, 0, 256)]), (1, 512));
        assert_eq!(sum(&[claim(0, 0, 256), claim(0, 0, 512)]), (1, 768 + 128));
        assert_eq!(sum(&[claim(0, 0, 0), claim(0, 0, 256)]), (1, 512 + 256));
        let sandbox = Claim {
            idle: true,
            ..Claim::default()
        };
        assert_eq!(sum(&[sandbox, claim(0, 0, 512)]), (1, 512 + 128));
        assert_eq!(sum(&[sandbox, claim(0, 0, -1)]), (1, 512));
        assert_eq!(sum(&[claim(0, 0, i64::MAX >> 20); 3]).0, 1);
    }

    #[test]
    fn quotas_add_up_and_of_cpusets_the_largest_counts() {
        assert_eq!(sum(&[claim(50_000, 0, 0)]).0, 1);
        assert_eq!(sum(&[claim(50_000, 0, 0); 3]).0, 2);
        assert_eq!(sum(&[claim(-1, 0, 0), claim(150_000, 3, 0)]).0, 3);
        assert_eq!(sum(&[claim(i64::MAX, 0, 0); 3]).1, 512);
    }

    #[test]
    fn an_update_changes_what_it_names() {
        let before = claim(100_000, 2, 256);
        let after = |json: &str| changed_claim(before, json.as_bytes()).unwrap();
        assert_eq!(after("{}"), before);
        assert_eq!(after(r#"{"memory":null,"cpu":{"shares":5}}"#), before);
        assert_eq!(
            after(r#"{"memory":{"limit":536870912}}"#),
            claim(100_000, 2, 512)
        );
        assert_eq!(after(r#"{"cpu":{"quota":300000}}"#), claim(300_000, 2, 256));
        assert_eq!(after(r#"{"cpu":{"cpus":"0-3"}}"#), claim(100_000, 4, 256));
        assert_eq!(after(r#"{"memory":{"limit":-1}}"#).memory_mib(), None);
        assert!(changed_claim(before, b"[]").is_err());
        assert!(changed_claim(before, br#"{"memory":{"limit":"x"}}"#).is_err());
    }
}
