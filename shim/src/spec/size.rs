//! How large the pod's machine must be.

use std::{collections::BTreeMap, fs, thread};

use super::{Spec, cpuset, view::CpuView};
use crate::{
    config::{self, Config},
    refusal::{Refusal, wrong},
    sandbox::machine::Size,
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

    /// The size of a machine for this container and its pod: at least the configuration's or the annotations', and
    /// what the limits need, as far as the host has it.
    pub fn size(&self, config: &Config, host: Host) -> Result<Size, Refusal> {
        let annotations = &self.view.annotations;
        let of_pod = |key: &str| {
            annotations
                .get(key)
                .and_then(|text| text.parse::<i64>().ok())
        };
        let resources = &self.view.linux.resources;
        let pod_cpu = CpuView {
            quota: of_pod(POD_QUOTA).unwrap_or(0),
            period: of_pod(POD_PERIOD).map_or(0, |period| period.try_into().unwrap_or(0)),
            ..CpuView::default()
        };
        let vcpus = vcpus(&resources.cpu)
            .max(vcpus(&pod_cpu))
            .min(host.cpus)
            .min(config::VCPUS_MAX);
        let memory = memory(resources.memory.limit)
            .max(memory(of_pod(POD_MEMORY).unwrap_or(0)))
            .min(host.memory_mib)
            .min(config::MEMORY_MAX_MIB);
        let least_vcpus = number(annotations, VCPUS)?.unwrap_or(config.vcpus);
        let least_memory = number(annotations, MEMORY)?.unwrap_or(config.memory_mib);
        Ok(Size {
            vcpus: least_vcpus.max(vcpus),
            memory_mib: least_memory.max(memory),
        })
    }

    /// Names the limits that a machine of this size cannot hold: they stand, but the machine's own come first.
    pub fn report_excess(&self, size: Size) {
        let resources = &self.view.linux.resources;
        if vcpus(&resources.cpu) > size.vcpus {
            tracing::warn!(
                vcpus = size.vcpus,
                "linux.resources.cpu allows more than the machine has"
            );
        }
        if memory(resources.memory.limit) > size.memory_mib {
            tracing::warn!(
                memory_mib = size.memory_mib,
                "linux.resources.memory.limit is more than the machine can give"
            );
        }
    }
}

/// vCPUs that a quota or a cpuset can use; 0 without either.
fn vcpus(cpu: &CpuView) -> u64 {
    let period = match cpu.period {
        0 => PERIOD,
        period => period,
    };
    let quota = u64::try_from(cpu.quota).unwrap_or(0).div_ceil(period);
    let set = cpuset::parse(&cpu.cpus).map_or(0, |cpus| cpus.len() as u64);
    quota.max(set)
}

/// MiB of a machine for a memory limit; 0 without one.
fn memory(limit: i64) -> u64 {
    match u64::try_from(limit) {
        Ok(bytes) if bytes > 0 => bytes.div_ceil(1 << 20).saturating_add(OVERHEAD_MIB),
        _ => 0,
    }
}
