//! A container of the pod, as the shim sees it.

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use bulkhead_protocol::{agent, limits::EXECS_MAX};

use super::{error::Error, process::Process};
use crate::{hooks::Runner, mounts::Tree, sandbox::Pod, spec::Cpus};

/// What a container was made with.
pub struct Made {
    /// What of the host it was given.
    pub trees: Vec<Tree>,
    /// Its hooks on the host.
    pub hooks: Runner,
    /// What its cpuset became.
    pub cpus: Cpus,
    /// Pid of its first process in the guest.
    pub init_pid: u32,
    /// The pid on the host that is told for its processes: by it another container can name this one's namespaces.
    pub host_pid: u32,
}

/// A container.
pub struct Container {
    /// Its id.
    pub id: String,
    /// Its bundle on the host.
    pub bundle: PathBuf,
    /// Where it runs.
    pub pod: Arc<Pod>,
    /// Its first process.
    pub init: Arc<Process>,
    /// What of the host it was given, and what it became in the guest.
    pub made: Made,
    execs: Mutex<HashMap<String, Arc<Process>>>,
    paused: AtomicBool,
    /// Taken over, and nobody has asked to create it since.
    recovered: AtomicBool,
    /// Deleted: nothing of it is noted any more.
    deleted: AtomicBool,
    /// A signal waits for it since it was paused.
    signalled: AtomicBool,
}

impl Container {
    /// A created container.
    pub fn new(
        id: &str,
        bundle: PathBuf,
        pod: Arc<Pod>,
        init: Arc<Process>,
        made: Made,
    ) -> Arc<Self> {
        Arc::new(Self {
            id: id.into(),
            bundle,
            pod,
            init,
            made,
            execs: Mutex::default(),
            paused: AtomicBool::new(false),
            recovered: AtomicBool::new(false),
            deleted: AtomicBool::new(false),
            signalled: AtomicBool::new(false),
        })
    }

    /// It was taken over: its Create may come again, which was answered by nobody.
    pub fn recover(&self) {
        self.recovered.store(true, Ordering::Relaxed);
    }

    /// It is deleted.
    pub fn set_deleted(&self) {
        self.deleted.store(true, Ordering::Relaxed);
    }

    /// Whether it is deleted.
    pub fn is_deleted(&self) -> bool {
        self.deleted.load(Ordering::Relaxed)
    }

    /// Whether a Create of what is there is such a one; true once.
    pub fn is_asked_again(&self) -> bool {
        self.recovered.swap(false, Ordering::Relaxed)
    }

    /// The init process for an empty id, else the exec.
    pub fn process(&self, exec_id: &str) -> Result<Arc<Process>, Error> {
        if exec_id.is_empty() {
            return Ok(self.init.clone());
        }
        let found = self.execs().get(exec_id).cloned();
        found.ok_or_else(|| Error::NotFound(self.name(exec_id)))
    }

    /// Registers an exec.
    pub fn add_exec(&self, process: Arc<Process>) -> Result<(), Error> {
        let mut execs = self.execs();
        if execs.contains_key(&process.exec_id) {
            return Err(Error::Exists(self.name(&process.exec_id)));
        }
        if execs.len() >= EXECS_MAX {
            return Err(Error::Limit(
                "the container has too many execs that were not deleted",
            ));
        }
        execs.insert(process.exec_id.clone(), process);
        Ok(())
    }

    /// Forgets an exec.
    pub fn remove_exec(&self, exec_id: &str) {
        self.execs().remove(exec_id);
    }

    /// Every process.
    pub fn processes(&self) -> Vec<Arc<Process>> {
        let mut all = self.exec_list();
        all.push(self.init.clone());
        all
    }

    /// Every exec.
    pub fn exec_list(&self) -> Vec<Arc<Process>> {
        self.execs().values().cloned().collect()
    }

    /// Whether it is frozen.
    pub fn is_paused(&self) -> bool {
        self.paused.load(Ordering::Relaxed)
    }

    /// Remembers whether it is frozen.
    pub fn set_paused(&self, paused: bool) {
        self.paused.store(paused, Ordering::Relaxed);
        self.signalled.store(false, Ordering::Relaxed);
    }

    /// Remembers that a signal was sent.
    pub fn set_signalled(&self) {
        self.signalled.store(true, Ordering::Relaxed);
    }

    /// Whether nothing of it can run: it is frozen, and no signal is to end it.
    pub fn is_frozen(&self) -> bool {
        self.is_paused() && !self.signalled.load(Ordering::Relaxed)
    }

    /// The agent's name for a process.
    pub fn request(&self, exec_id: &str) -> agent::ProcessRequest {
        process_request(&self.id, exec_id)
    }

    /// The agent's name for the container.
    pub fn container_request(&self) -> agent::ContainerRequest {
        let mut request = agent::ContainerRequest::new();
        request.container.clone_from(&self.id);
        request
    }

    /// What errors call a process.
    pub fn name(&self, exec_id: &str) -> String {
        match exec_id {
            "" => format!("container {}", self.id),
            _ => format!("exec {exec_id} of container {}", self.id),
        }
    }

    fn execs(&self) -> MutexGuard<'_, HashMap<String, Arc<Process>>> {
        self.execs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The agent's name for a process.
pub fn process_request(container: &str, exec_id: &str) -> agent::ProcessRequest {
    let mut request = agent::ProcessRequest::new();
    request.container = container.into();
    request.exec_id = exec_id.into();
    request
}
