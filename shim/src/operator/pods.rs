//! The pods of this host, by their state folders. Nothing is asked of a shim: a pod whose shim is gone is listed as well.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use serde::Serialize;
use serde_json::{Value, json};

use crate::sandbox::{
    control::{self, Client},
    record::{Record, now},
    state::{Owner, ProcessId, has_argument},
};

/// Why a pod cannot be told.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The folder of the state folders.
    #[error("reading {path}: {source}")]
    Read {
        /// Which one.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// There is none of that name.
    #[error("there is no pod {0:?}; `bulkhead list` shows those that are")]
    None(String),
    /// There are several.
    #[error("{name:?} is not one pod: {candidates}")]
    Several {
        /// What was asked for.
        name: String,
        /// What it could be.
        candidates: String,
    },
    /// Its processes are gone.
    #[error("the machine of pod {0} is not running")]
    Ended(String),
    /// The VMM does not answer.
    #[error("asking the VMM")]
    Vmm(#[from] control::Error),
}

/// A pod's state, as the list shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// Between its start and its first container.
    Starting,
    /// As it should be.
    Running,
    /// Its vCPUs stand still.
    Paused,
    /// The machine runs, and the shim is gone.
    NoShim,
    /// The VMM runs and does not answer.
    Stuck,
    /// The machine is gone; its shim has not cleaned up.
    Ended,
    /// Only the folder is left: containerd's next delete takes it away.
    Leftover,
}

impl State {
    /// As a word.
    pub fn name(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::NoShim => "no shim",
            Self::Stuck => "stuck",
            Self::Ended => "ended",
            Self::Leftover => "leftover",
        }
    }
}

/// A process of a pod.
#[derive(Clone, Debug, Serialize)]
pub struct Process {
    /// `keeper`, `shim`, `vmm`, `fs`, `fs-steward` or `emulator`.
    pub name: &'static str,
    /// On the host.
    pub pid: i32,
    /// Its memory, shared pages divided among their holders.
    pub pss_kib: Option<u64>,
}

/// A pod.
#[derive(Debug, Serialize)]
pub struct Pod {
    /// Its state folder.
    pub dir: PathBuf,
    /// How it stands.
    pub state: State,
    /// What the shim wrote down of it.
    #[serde(flatten)]
    pub record: Option<Record>,
    /// Its processes that live.
    pub processes: Vec<Process>,
    /// Memory in use.
    pub pss_kib: u64,
    /// Seconds since its start.
    pub age: Option<u64>,
}

impl Pod {
    /// Reads a state folder; nothing of a folder that vanishes meanwhile.
    pub fn read(dir: &Path) -> Option<Self> {
        let record = Record::load(dir).ok();
        let alive = |id: &ProcessId| id.is_alive();
        let shim = Owner::load(dir).map(|owner| owner.shim).filter(alive);
        let vmm = ProcessId::load(&dir.join("vmm.pid")).filter(alive);
        let fs = ProcessId::load(&dir.join("fs.pid")).filter(alive);
        let emulator = vmm.and_then(|vmm| emulator_of(vmm.pid, dir));
        let processes: Vec<Process> = [
            ("keeper", shim.map(|id| id.pid)),
            ("shim", shim.and_then(|id| id.session().first().copied())),
            ("vmm", vmm.map(|id| id.pid)),
            // The shim's child is the steward, and its child the server (`vmm/src/fs/jail.rs`).
            ("fs-steward", fs.map(|id| id.pid)),
            ("fs", fs.and_then(|id| id.session().first().copied())),
            ("emulator", emulator),
        ]
        .into_iter()
        .filter_map(|(name, pid)| {
            let pid = pid?;
            let pss_kib = pss_kib(pid);
            Some(Process { name, pid, pss_kib })
        })
        .collect();
        if !dir.is_dir() {
            return None;
        }
        let state = match (vmm, shim) {
            (None, None) => State::Leftover,
            (None, Some(_)) => State::Ended,
            (Some(_), None) => State::NoShim,
            (Some(_), Some(_)) => running(dir, record.as_ref()),
        };
        Some(Self {
            dir: dir.to_owned(),
            state,
            pss_kib: processes.iter().filter_map(|p| p.pss_kib).sum(),
            age: record.as_ref().map(|r| now().saturating_sub(r.created)),
            record,
            processes,
        })
    }

    /// `<namespace>/<id>`, or the folder's name if nothing was written down.
    pub fn name(&self) -> String {
        match &self.record {
            Some(record) => format!("{}/{}", record.namespace, record.id),
            None => {
                let name = self.dir.file_name().unwrap_or_default();
                name.to_string_lossy().into_owned()
            }
        }
    }

    /// Whether its machine is there.
    pub fn is_running(&self) -> bool {
        !matches!(self.state, State::Ended | State::Leftover)
    }

    /// An error if its machine is not there.
    pub fn must_run(&self) -> Result<(), Error> {
        self.is_running()
            .then_some(())
            .ok_or_else(|| Error::Ended(self.name()))
    }

    /// The VMM's report.
    pub fn report(&self) -> Result<Value, Error> {
        self.must_run()?;
        let client = Client::new(self.dir.join("control.sock"));
        Ok(client.request_blocking(&control::op("report"), &[])?)
    }

    /// Everything about it.
    pub fn inspect(&self) -> Result<Value, Error> {
        let record = self.record.as_ref();
        Ok(json!({
            "namespace": record.map(|r| &r.namespace), "id": record.map(|r| &r.id),
            "state": self.dir.display().to_string(), "pod": self.state, "age": self.age,
            "containers": record.map(|r| &r.containers), "vcpus": record.map(|r| r.vcpus),
            "memory_mib": record.map(|r| r.memory_mib), "debug_shell": record.map(|r| r.debug_shell),
            "stages_us": record.map(|r| r.stages_us),
            "pss_kib": self.pss_kib, "processes": self.processes, "report": self.report()?,
        }))
    }
}

fn running(dir: &Path, record: Option<&Record>) -> State {
    let client = Client::new(dir.join("control.sock"));
    match client.request_blocking(&control::op("report"), &[]) {
        Ok(report) if report.get("state").is_some_and(|s| s == "paused") => State::Paused,
        Ok(report) if report.get("ready_us").is_none_or(Value::is_null) => State::Starting,
        Ok(_) if record.is_some_and(|r| r.containers.is_empty()) => State::Starting,
        Ok(_) => State::Running,
        Err(_) => State::Stuck,
    }
}

/// All pods of the folder `state`, by name.
pub fn all(state: &Path) -> Result<Vec<Pod>, Error> {
    let folders = match fs::read_dir(state) {
        Ok(folders) => folders,
        // No pod was ever here.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => {
            return Err(Error::Read {
                path: state.to_owned(),
                source,
            });
        }
    };
    let mut pods: Vec<Pod> = folders
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .filter_map(|entry| Pod::read(&entry.path()))
        .collect();
    pods.sort_by_key(Pod::name);
    Ok(pods)
}

/// The pod that is meant by `namespace/id`, by an id, or by the beginning of either that no other has.
pub fn find(state: &Path, name: &str) -> Result<Pod, Error> {
    let mut pods = all(state)?;
    let names: Vec<String> = pods.iter().map(Pod::name).collect();
    let at = choose(&names, name)?;
    Ok(pods.swap_remove(at))
}

fn choose(names: &[String], wanted: &str) -> Result<usize, Error> {
    let id_of = |name: &str| name.split_once('/').map_or(name, |(_, id)| id).to_owned();
    let which = |fits: &dyn Fn(&str) -> bool| -> Vec<usize> {
        let fitting = names.iter().enumerate().filter(|(_, name)| fits(name));
        fitting.map(|(at, _)| at).collect()
    };
    let exact = which(&|name| name == wanted || id_of(name) == wanted);
    let found = match exact.is_empty() {
        true if wanted.is_empty() => Vec::new(),
        true => which(&|name| name.starts_with(wanted) || id_of(name).starts_with(wanted)),
        false => exact,
    };
    match found.as_slice() {
        [] => Err(Error::None(wanted.into())),
        [one] => Ok(*one),
        several => {
            let names = several.iter().take(8).filter_map(|&at| names.get(at));
            let names: Vec<&str> = names.map(String::as_str).collect();
            Err(Error::Several {
                name: wanted.into(),
                candidates: names.join(", "),
            })
        }
    }
}

/// The emulator is the VMM's child.
fn emulator_of(vmm: i32, dir: &Path) -> Option<i32> {
    let children = fs::read_to_string(format!("/proc/{vmm}/task/{vmm}/children"));
    // The emulator is made by a thread of its own.
    let of_threads = || {
        let tasks = fs::read_dir(format!("/proc/{vmm}/task")).ok()?;
        let lists = tasks.flatten().map(|task| task.path().join("children"));
        Some(
            lists
                .filter_map(|list| fs::read_to_string(list).ok())
                .collect::<String>(),
        )
    };
    let children = children
        .ok()
        .filter(|c| !c.trim().is_empty())
        .or_else(of_threads)?;
    let mut pids = children
        .split_whitespace()
        .filter_map(|pid| pid.parse().ok());
    // A second process of the VMM itself would have its arguments.
    pids.find(|&pid| !has_argument(pid, dir))
}

/// Memory that a process holds, shared pages divided among their holders.
fn pss_kib(pid: i32) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix("Pss:"))?;
    line.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_is_meant_by_name_id_or_a_beginning_that_no_other_has() {
        let names = ["default/web", "default/web2", "k8s.io/0abc", "k8s.io/web"];
        let names: Vec<String> = names.map(str::to_owned).to_vec();
        let found = |wanted: &str| choose(&names, wanted).map_err(|e| e.to_string());
        assert_eq!(found("default/web"), Ok(0));
        assert_eq!(found("web2"), Ok(1));
        assert_eq!(found("0a"), Ok(2));
        assert_eq!(found("k8s.io/w"), Ok(3));
        let both = found("web").unwrap_err();
        assert!(both.contains("default/web, k8s.io/web"), "{both}");
        assert!(found("nope").unwrap_err().contains("bulkhead list"));
        assert!(found("").is_err());
    }

    #[test]
    fn a_folder_without_processes_is_a_leftover_and_a_state_without_folder_is_empty() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("state");
        assert!(all(&state).unwrap().is_empty());
        fs::create_dir_all(state.join("default-web")).unwrap();
        fs::write(state.join("file"), "").unwrap();
        let pods = all(&state).unwrap();
        assert_eq!(pods.len(), 1);
        assert_eq!(pods[0].state, State::Leftover);
        assert_eq!(pods[0].name(), "default-web");
        assert!(find(&state, "default-w").unwrap().must_run().is_err());
    }
}
