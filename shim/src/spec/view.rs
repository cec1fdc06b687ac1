//! The parts of the spec that the host looks at.

use std::{collections::BTreeMap, path::PathBuf};

use serde::Deserialize;

use crate::hooks::Hooks;

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct View {
    pub oci_version: String,
    pub process: Option<ProcessView>,
    pub root: Option<RootView>,
    pub hooks: Hooks,
    pub annotations: BTreeMap<String, String>,
    pub linux: LinuxView,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct ProcessView {
    pub args: Vec<String>,
    pub terminal: bool,
    #[serde(rename = "execCPUAffinity")]
    pub exec_cpu_affinity: BTreeMap<String, String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct RootView {
    pub path: PathBuf,
    pub readonly: bool,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct LinuxView {
    #[serde(rename = "cgroupsPath")]
    pub cgroups_path: String,
    pub namespaces: Vec<NamespaceView>,
    pub devices: Vec<DeviceView>,
    pub resources: ResourcesView,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct NamespaceView {
    pub r#type: String,
    pub path: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct DeviceView {
    pub path: String,
    pub r#type: String,
    pub major: i64,
    pub minor: i64,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct ResourcesView {
    pub devices: Vec<RuleView>,
    pub memory: MemoryView,
    pub cpu: CpuView,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct RuleView {
    pub allow: bool,
    pub r#type: String,
    pub major: Option<i64>,
    pub minor: Option<i64>,
    pub access: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct MemoryView {
    pub limit: i64,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct CpuView {
    pub quota: i64,
    pub period: u64,
    pub cpus: String,
    pub mems: String,
}
