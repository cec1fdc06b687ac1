//! `pod.json` in the state folder: what the operator's command tells of a pod without asking anybody, and what a shim must know that
//! takes the pod over. Written by the shim, also when the pod's containers change; read by `bulkhead list` and `inspect`, which take it as data.

use std::{
    fs,
    io::{self, Read},
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    time::{SystemTime, UNIX_EPOCH},
};

use serde::{Deserialize, Serialize};

use super::{growth::Sizing, machine::Size, state::replace_private, timeline::Durations};
use crate::config::{Config, Engine};

/// The file's name.
const FILE: &str = "pod.json";
/// Longest file that is read.
const FILE_MAX: u64 = 256 * 1024;

/// What is written down.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// containerd's namespace.
    pub namespace: String,
    /// The pod's id.
    pub id: String,
    /// When it was started, in seconds since 1970.
    pub created: u64,
    /// What runs its vCPUs.
    pub engine: Engine,
    /// vCPUs of its machine.
    pub vcpus: u64,
    /// Memory of its machine in MiB.
    pub memory_mib: u64,
    /// Whether the guest offers a debugging shell.
    pub debug_shell: bool,
    /// Ids of its containers.
    pub containers: Vec<String>,
    /// How long the stages of its start took.
    #[serde(default)]
    pub stages_us: Durations,
    /// What another shim must know; none until the machine is ready.
    #[serde(default)]
    pub ready: Option<Ready>,
}

/// Of a pod whose machine is ready, what is not in the other files.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ready {
    /// Where the network namespace was found, if it outlives the pod.
    pub network: Option<PathBuf>,
    /// Whether ports are forwarded.
    pub port_forward: bool,
    /// The bounds of its size.
    pub sizing: Sizing,
}

impl Record {
    /// A pod that starts now.
    pub fn new(namespace: &str, id: &str, config: &Config, size: Size) -> Self {
        Self {
            namespace: namespace.into(),
            id: id.into(),
            created: now(),
            engine: config.engine,
            vcpus: size.vcpus,
            memory_mib: size.memory_mib,
            debug_shell: config.debug_shell,
            containers: Vec::new(),
            stages_us: Durations::default(),
            ready: None,
        }
    }

    /// Reads a pod's record.
    pub fn load(dir: &Path) -> io::Result<Self> {
        let mut text = Vec::new();
        fs::File::open(dir.join(FILE))?
            .take(FILE_MAX)
            .read_to_end(&mut text)?;
        serde_json::from_slice(&text).map_err(io::Error::other)
    }
}

/// Seconds since 1970.
pub fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |time| time.as_secs())
}

/// The file of a pod that runs.
pub struct Book {
    dir: PathBuf,
    record: Mutex<Option<Record>>,
}

impl Book {
    /// Writes a first record.
    pub fn open(dir: &Path, record: Record) -> io::Result<Self> {
        save(dir, &record)?;
        Ok(Self {
            dir: dir.to_owned(),
            record: Mutex::new(Some(record)),
        })
    }

    /// Changes the record and writes it; a pod goes on without its entry in a list.
    pub fn change(&self, change: impl FnOnce(&mut Record)) {
        let mut slot = self.record.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(record) = slot.as_mut() else { return };
        let before = record.clone();
        change(record);
        if *record == before {
            return;
        }
        if let Err(error) = save(&self.dir, record) {
            tracing::warn!(%error, "writing {FILE}");
        }
    }

    /// That of a pod that is taken over.
    pub fn adopt(dir: &Path, record: Record) -> Self {
        Self {
            dir: dir.to_owned(),
            record: Mutex::new(Some(record)),
        }
    }

    /// Nothing is written any more: the folder goes.
    pub fn close(&self) {
        *self.record.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

fn save(dir: &Path, record: &Record) -> io::Result<()> {
    let text = serde_json::to_string(record).map_err(io::Error::other)?;
    replace_private(&dir.join(FILE), &text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_follows_its_pod_until_it_is_closed() {
        let dir = tempfile::tempdir().unwrap();
        let config = Config::parse("", Path::new("/c"), Path::new("/opt")).unwrap();
        let size = Size {
            vcpus: 2,
            memory_mib: 256,
        };
        let record = Record::new("default", "web", &config, size);
        let book = Book::open(dir.path(), record.clone()).unwrap();
        assert_eq!(Record::load(dir.path()).unwrap(), record);
        book.change(|r| r.containers.push("web".into()));
        assert_eq!(Record::load(dir.path()).unwrap().containers, ["web"]);
        book.close();
        book.change(|r| r.containers.clear());
        assert_eq!(Record::load(dir.path()).unwrap().containers, ["web"]);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
