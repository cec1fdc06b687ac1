//! What another shim must know of a container, in `<state folder>/containers/<id>.json`: written at each change, read by `adopt.rs`.
//!
//! What runs and what has ended the agent knows. Here stands what only the shim knows: bundle, trees, hooks, streams, and of an ended process
//! whether containerd was told.
//!
//! With its last container a pod goes, and the folder with it. The record of that one goes to the keeper before, in a memfd: by it another shim
//! knows that the pod was being removed, and answers the Delete.

use std::{
    fs, io,
    os::{fd::AsFd, unix::fs::FileExt},
    path::{Path, PathBuf},
};

use protobuf::well_known_types::timestamp::Timestamp;
use rustix::fs::{MemfdFlags, memfd_create};
use serde::{Deserialize, Serialize};

use super::{
    container::Container,
    process::{Exit, Phase, Process},
};
use crate::{
    hooks::Runner,
    keeper::Kept,
    mounts::Tree,
    sandbox::state::{make_private_dir, remove_file, replace_private},
    spec::{Claim, Cpus},
    stdio::Paths,
};

/// The folder in a pod's state folder.
const FOLDER: &str = "containers";
/// What the keeper knows the last one by: no container is called so.
const LAST: &str = "";
const ROLE: &str = "last";

/// A container.
#[derive(Debug, Serialize, Deserialize)]
pub struct Record {
    /// Its id.
    pub id: String,
    /// Its bundle.
    pub bundle: PathBuf,
    /// Its trees.
    pub trees: Vec<Tree>,
    /// Its hooks.
    pub hooks: Runner,
    /// The pid that containerd knows it by.
    pub host_pid: u32,
    /// What the guest has of it; none while it is being made.
    pub made: Option<Made>,
}

/// A container that was made.
#[derive(Debug, Serialize, Deserialize)]
pub struct Made {
    /// What it claims of the machine.
    pub claim: Claim,
    /// What its cpuset became.
    pub cpus: Cpus,
    /// Pid of its init in the guest.
    pub init_pid: u32,
    /// Whether it is frozen.
    pub paused: bool,
    /// Its init and its execs.
    pub processes: Vec<Saved>,
}

/// A process.
#[derive(Debug, Serialize, Deserialize)]
pub struct Saved {
    /// Empty for init.
    pub exec_id: String,
    /// The host's ends of its streams.
    pub paths: Paths,
    /// Its end, if it is known.
    pub ended: Option<Ended>,
}

/// How a process ended.
#[derive(Debug, Serialize, Deserialize)]
pub struct Ended {
    status: u32,
    seconds: i64,
    nanos: i32,
    oom: bool,
    /// Whether containerd was told.
    pub told: bool,
}

impl Saved {
    fn of(process: &Process) -> Self {
        let ended = match process.phase() {
            Phase::Stopped(exit) => Some(Ended {
                status: exit.status,
                seconds: exit.at.seconds,
                nanos: exit.at.nanos,
                oom: exit.oom,
                told: process.is_told(),
            }),
            _ => None,
        };
        Self {
            exec_id: process.exec_id.clone(),
            paths: process.paths.clone(),
            ended,
        }
    }
}

impl Ended {
    /// The exit.
    pub fn exit(&self) -> Exit {
        let mut at = Timestamp::new();
        at.seconds = self.seconds;
        at.nanos = self.nanos;
        Exit {
            status: self.status,
            at,
            oom: self.oom,
        }
    }
}

impl Record {
    /// Of a container as it is now.
    pub fn of(container: &Container) -> Self {
        let processes = container.processes();
        Self {
            id: container.id.clone(),
            bundle: container.bundle.clone(),
            trees: container.made.trees.clone(),
            hooks: container.made.hooks.clone(),
            host_pid: container.made.host_pid,
            made: Some(Made {
                claim: container.pod.growth().claim(&container.id),
                cpus: container.made.cpus.clone(),
                init_pid: container.made.init_pid,
                paused: container.is_paused(),
                processes: processes.iter().map(|p| Saved::of(p)).collect(),
            }),
        }
    }

    /// Writes it into the pod's folder.
    pub fn save(&self, dir: &Path) {
        let folder = dir.join(FOLDER);
        let text = serde_json::to_string(self).map_err(io::Error::other);
        let saved = text.and_then(|text| {
            let file = file(dir, &self.id);
            // The folder is made with the first container.
            replace_private(&file, &text)
                .or_else(|_| make_private_dir(&folder).and_then(|()| replace_private(&file, &text)))
        });
        if let Err(error) = saved {
            tracing::warn!(container = self.id, %error, "another shim would not know this");
        }
    }

    /// Removes it.
    pub fn forget(dir: &Path, id: &str) {
        if let Err(error) = remove_file(&file(dir, id)) {
            tracing::warn!(container = id, %error, "its record stays until the pod ends");
        }
    }

    /// Has the keeper keep it: its pod goes.
    pub fn keep(&self, kept: &Kept) {
        let written = serde_json::to_vec(self)
            .map_err(io::Error::other)
            .and_then(|text| {
                let file = fs::File::from(memfd_create("bulkhead-last", MemfdFlags::CLOEXEC)?);
                file.write_all_at(&text, 0)?;
                Ok(file)
            });
        match written {
            Ok(file) => kept.store(LAST, ROLE, file.as_fd()),
            Err(error) => {
                tracing::warn!(container = self.id, %error, "another shim could not answer for it");
            }
        }
    }

    /// The one that a shim before has had kept.
    pub fn kept(kept: &Kept) -> Option<Self> {
        let file = fs::File::from(kept.take(LAST).remove(ROLE)?);
        let length = file.metadata().ok()?.len();
        let mut text = vec![0; usize::try_from(length).ok()?];
        file.read_exact_at(&mut text, 0).ok()?;
        serde_json::from_slice(&text).ok()
    }

    /// The keeper shall keep none: there is another pod.
    pub fn let_go(kept: &Kept) {
        kept.forget(LAST, None);
    }

    /// The end of its init.
    pub fn ended(&self) -> Option<&Ended> {
        let mut processes = self.made.iter().flat_map(|made| &made.processes);
        processes.find(|p| p.exec_id.is_empty())?.ended.as_ref()
    }

    /// All of a pod.
    pub fn all(dir: &Path) -> Vec<Self> {
        let entries = fs::read_dir(dir.join(FOLDER)).into_iter().flatten();
        entries
            .flatten()
            .filter(|entry| entry.path().extension().is_some_and(|e| e == "json"))
            .filter_map(|entry| {
                let read = fs::read(entry.path()).and_then(|text| {
                    serde_json::from_slice(&text).map_err(io::Error::other)
                });
                read.inspect_err(|error| {
                    tracing::error!(file = %entry.path().display(), %error, "a container is not taken over");
                })
                .ok()
            })
            .collect()
    }
}

fn file(dir: &Path, id: &str) -> PathBuf {
    dir.join(FOLDER).join(format!("{id}.json"))
}

impl Container {
    /// Notes what has changed, for another shim.
    pub fn save(&self) {
        // Without a machine there is nothing to take over, and no folder. An exit can be told after the container is deleted.
        if self.pod.end().is_none() && !self.is_deleted() {
            Record::of(self).save(self.pod.dir());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_read_as_they_were_written_and_forgotten_ones_are_gone() {
        let dir = tempfile::tempdir().unwrap();
        let record = |id: &str| Record {
            id: id.into(),
            bundle: "/b".into(),
            trees: Vec::new(),
            hooks: Runner::default(),
            host_pid: 9,
            made: Some(Made {
                claim: Claim::default(),
                cpus: Cpus::default(),
                init_pid: 7,
                paused: true,
                processes: vec![Saved {
                    exec_id: String::new(),
                    paths: Paths::default(),
                    ended: Some(Ended {
                        status: 3,
                        seconds: 5,
                        nanos: 6,
                        oom: false,
                        told: false,
                    }),
                }],
            }),
        };
        record("web.new").save(dir.path());
        record("db").save(dir.path());
        let mut seen = Record::all(dir.path());
        seen.sort_by(|a, b| a.id.cmp(&b.id));
        let ids: Vec<&str> = seen.iter().map(|r| r.id.as_str()).collect();
        assert_eq!(ids, ["db", "web.new"]);
        let made = seen.pop().unwrap().made.unwrap();
        assert!(made.paused && made.init_pid == 7);
        let ended = made.processes[0].ended.as_ref().unwrap();
        assert_eq!((ended.exit().status, ended.exit().at.nanos), (3, 6));
        Record::forget(dir.path(), "db");
        Record::forget(dir.path(), "db");
        assert_eq!(Record::all(dir.path()).len(), 1);
    }
}
