//! From the host's numbers and paths to the guest's: CPUs, memory nodes, namespaces.
//!
//! The guest has vCPUs 0 to n-1 and memory node 0. A cpuset of N host CPUs becomes the guest's first N: how many CPUs a
//! container may use is kept, which of the host's run them is the host's business.

use std::{collections::HashMap, fs};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{
    Spec, cpuset,
    view::{NamespaceView, ProcessView, View},
};
use crate::{
    refusal::{Refusal, unsupported, wrong},
    sandbox::machine::printable,
};

/// Where the kernel lists the CPUs that the host has, whether they are on or not.
const PRESENT: &str = "/sys/devices/system/cpu/present";
/// Where the kernel lists the host's memory nodes.
const NODES: &str = "/sys/devices/system/node/online";
/// The pod's network in the guest.
const POD_NETWORK: &str = "/proc/1/ns/net";
/// The field of a cpuset.
const CPUS: &str = "linux.resources.cpu.cpus";
/// Longest value that an error quotes.
const QUOTE_MAX: usize = 200;

/// What a spec is translated for.
#[derive(Clone, Debug, Default)]
pub struct Guest {
    /// vCPUs of the machine.
    pub vcpus: u64,
    /// By the pid on the host that containerd knows a container of the pod by, that of its init in the guest, if it runs.
    pub inits: HashMap<u32, Option<u32>>,
    /// Whether the container is in the pod's network; else it gets an empty one.
    pub pod_network: bool,
}

/// The CPUs that the host has.
#[derive(Clone, Debug)]
pub struct HostCpus {
    list: String,
    numbers: Vec<u32>,
}

impl HostCpus {
    /// Asks the kernel.
    pub fn read() -> Self {
        Self::of(&fs::read_to_string(PRESENT).unwrap_or_default())
    }

    /// Those of a list in the kernel's form.
    pub fn of(list: &str) -> Self {
        Self {
            list: list.trim().to_owned(),
            numbers: cpuset::parse(list).unwrap_or_default(),
        }
    }

    /// Refuses a cpuset with a CPU that the host does not have: as many others would be another set.
    pub fn check(&self, list: &str) -> Result<(), Refusal> {
        let wanted = cpus(list)?;
        let missing = wanted
            .iter()
            .find(|cpu| self.numbers.binary_search(cpu).is_err());
        missing.map_or(Ok(()), |cpu| {
            let reason = format!("the host has no CPU {cpu}; it has {}", self.list);
            Err(wrong(CPUS, reason))
        })
    }
}

/// The host CPUs of a container's cpuset, and how many of them the machine has.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Cpus {
    host: Vec<u32>,
    vcpus: u64,
}

impl Cpus {
    /// The guest's CPU for one of the host's: its place in the cpuset; without a cpuset they are counted alike.
    fn guest(&self, cpu: u32) -> Option<u32> {
        let place = match self.host.as_slice() {
            [] => cpu,
            host => host
                .binary_search(&cpu)
                .ok()
                .and_then(|i| u32::try_from(i).ok())?,
        };
        (u64::from(place) < self.vcpus).then_some(place)
    }
}

/// Refuses what has no meaning in a guest.
pub fn check(view: &View, host: &HostCpus) -> Result<(), Refusal> {
    host.check(&view.linux.resources.cpu.cpus)?;
    mems(&view.linux.resources.cpu.mems)?;
    for (name, list) in view.process.iter().flat_map(|p| &p.exec_cpu_affinity) {
        affinity(name, list)?;
    }
    for namespace in &view.linux.namespaces {
        joined(namespace)?;
    }
    Ok(())
}

fn cpus(list: &str) -> Result<Vec<u32>, Refusal> {
    let list = list.trim();
    if list.is_empty() {
        return Ok(Vec::new());
    }
    cpuset::parse(list).ok_or_else(|| no_list(CPUS, list))
}

fn affinity(name: &str, list: &str) -> Result<Vec<u32>, Refusal> {
    cpuset::parse(list).ok_or_else(|| {
        no_list(
            &format!("process.execCPUAffinity.{}", printable(name, 20)),
            list,
        )
    })
}

fn no_list(field: &str, list: &str) -> Refusal {
    let list = printable(list, QUOTE_MAX);
    wrong(field, format!("{list:?} is not a list such as 0-2,7"))
}

/// All of the host's nodes are the guest's one; a part of them would bind memory, which the machine's is not.
fn mems(list: &str) -> Result<(), Refusal> {
    const FIELD: &str = "linux.resources.cpu.mems";
    let list = list.trim();
    if list.is_empty() {
        return Ok(());
    }
    let wanted = cpuset::parse(list).ok_or_else(|| no_list(FIELD, list))?;
    let nodes = fs::read_to_string(NODES)
        .ok()
        .and_then(|text| cpuset::parse(&text));
    match wanted == nodes.unwrap_or_else(|| vec![0]) {
        true => Ok(()),
        false => Err(unsupported(
            FIELD,
            format!(
                "memory of a machine is not bound to nodes of the host ({list} are not all of them); leave it empty"
            ),
        )),
    }
}

/// The pid in a namespace's path, if it has one.
fn joined(namespace: &NamespaceView) -> Result<Option<u32>, Refusal> {
    let kind = namespace.r#type.as_str();
    if namespace.path.is_empty() || kind == "network" {
        return Ok(None);
    }
    let file = if kind == "mount" { "mnt" } else { kind };
    let pid = namespace
        .path
        .strip_prefix("/proc/")
        .and_then(|rest| rest.strip_suffix(file)?.strip_suffix("/ns/"))
        .and_then(|pid| pid.parse().ok());
    pid.map(Some).ok_or_else(|| {
        unsupported(
            format!("linux.namespaces[{}].path", printable(kind, 20)),
            format!(
                "{} is of the host; a container can join /proc/<pid>/ns/{} of its pod's containers, or leave the path empty",
                printable(&namespace.path, QUOTE_MAX),
                printable(file, 20)
            ),
        )
    })
}

/// Takes out what [`check`](super::check) let pass because it has no meaning in the guest.
pub fn drop_defaults(spec: &mut Value) {
    if let Some(process) = spec.get_mut("process") {
        drop_profile(process);
    }
}

fn drop_profile(process: &mut Value) {
    if let Some(process) = process.as_object_mut() {
        process.remove("apparmorProfile");
    }
}

impl Spec {
    /// Whether it wants to be in namespaces of another container.
    pub fn joins(&self) -> bool {
        let namespaces = &self.view.linux.namespaces;
        namespaces
            .iter()
            .any(|n| joined(n).is_ok_and(|pid| pid.is_some()))
    }

    /// Edits the JSON for the guest.
    pub fn translate(&mut self, guest: Guest) -> Result<Cpus, Refusal> {
        let cpus = Cpus {
            host: cpus(&self.view.linux.resources.cpu.cpus)?,
            vcpus: guest.vcpus,
        };
        if let Some(process) = &self.view.process
            && let Some(value) = self.value.get_mut("process")
        {
            self::process(value, process, &cpus)?;
        }
        if let Some(value) = self.value.pointer_mut("/linux/resources") {
            resources(value, guest.vcpus)?;
        }
        self.namespaces(&guest)?;
        Ok(cpus)
    }

    /// A network namespace's path is the host's: in the guest it becomes that of the pod's network. Another namespace's path names a
    /// container of the pod by the pid that containerd has for it; other pids are the guest's.
    fn namespaces(&mut self, guest: &Guest) -> Result<(), Refusal> {
        let list = self
            .value
            .pointer_mut("/linux/namespaces")
            .and_then(Value::as_array_mut);
        for (value, view) in list.into_iter().flatten().zip(&self.view.linux.namespaces) {
            let Some(value) = value.as_object_mut() else {
                continue;
            };
            if view.r#type == "network" {
                value.remove("path");
                if guest.pod_network {
                    value.insert("path".into(), POD_NETWORK.into());
                }
                continue;
            }
            let Some(host) = joined(view)? else {
                continue;
            };
            let Some(init) = guest.inits.get(&host) else {
                continue;
            };
            let pid = init.ok_or_else(|| {
                let field = format!("linux.namespaces[{}].path", view.r#type);
                unsupported(field, "the container that it names does not run")
            })?;
            let path = view.path.replacen(&host.to_string(), &pid.to_string(), 1);
            value.insert("path".into(), path.into());
        }
        Ok(())
    }
}

/// Edits a process's JSON.
pub fn process(value: &mut Value, view: &ProcessView, cpus: &Cpus) -> Result<(), Refusal> {
    drop_profile(value);
    for (name, list) in &view.exec_cpu_affinity {
        let wanted = affinity(name, list)?;
        let guest: Vec<u32> = wanted.iter().filter_map(|&cpu| cpus.guest(cpu)).collect();
        if guest.is_empty() {
            return Err(wrong(
                format!("process.execCPUAffinity.{}", printable(name, 20)),
                format!(
                    "the container has none of the CPUs {}",
                    printable(list, QUOTE_MAX)
                ),
            ));
        }
        value["execCPUAffinity"][name] = cpuset::print(&guest).into();
    }
    Ok(())
}

/// Refuses a resources object's cpuset as [`check`] does a spec's.
pub fn check_resources(value: &Value, host: &HostCpus) -> Result<(), Refusal> {
    let list = value.pointer("/cpu/cpus").and_then(Value::as_str);
    list.map_or(Ok(()), |list| host.check(list))
}

/// Edits a resources object's JSON for a machine with so many vCPUs.
pub fn resources(value: &mut Value, vcpus: u64) -> Result<(), Refusal> {
    let Some(cpu) = value.get_mut("cpu").and_then(Value::as_object_mut) else {
        return Ok(());
    };
    let text = |value: Option<&Value>| value.and_then(Value::as_str).unwrap_or_default().to_owned();
    let host = cpus(&text(cpu.get("cpus")))?;
    if !host.is_empty() {
        let count = (host.len() as u64).min(vcpus);
        let guest: Vec<u32> = (0..u32::try_from(count).unwrap_or(u32::MAX)).collect();
        let guest = cpuset::print(&guest);
        tracing::info!(host = %text(cpu.get("cpus")), guest, "linux.resources.cpu.cpus");
        cpu.insert("cpus".into(), guest.into());
    }
    let nodes = text(cpu.get("mems"));
    mems(&nodes)?;
    if !nodes.trim().is_empty() {
        cpu.insert("mems".into(), "0".into());
    }
    Ok(())
}
