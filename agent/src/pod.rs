//! The pod's containers and their processes: the state behind the service.
//!
//! One lock holds the containers and is never held over an await. The agent works on one thread and reaps only in its event loop, so a
//! pid that is not marked as reaped is still its process's. What a process goes through is in `pod/life.rs`.

mod life;

use std::{
    collections::HashMap,
    os::fd::OwnedFd,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use bulkhead_failpoint::reach;
use bulkhead_protocol::{
    agent::{
        CreateContainerRequest, CreateExecRequest, ListResponse, ListedContainer, ListedProcess,
    },
    id,
    limits::{CONTAINERS_MAX, EXECS_MAX, SPEC_MAX},
    stream::StreamHeader,
};
use oci_spec::runtime::{LinuxNamespaceType, LinuxResources, Process as ProcessSpec, Spec};
use rustix::process::{Pid, PidfdFlags};
use tokio_vsock::VsockStream;

use crate::{
    container::{
        cgroup::{self, Cgroup},
        check,
        control::{Shared, Work},
        hooks::Identity,
        ids::Ids,
        launch::Prepared,
        namespaces, parse, pause, process, rootfs,
    },
    error::{Context, Error, Result},
    network::PodNetwork,
    reaper::Reaper,
    streams::{Flags, Pumps},
};

pub use life::Exit;
use life::{Begun, Process};

struct Container {
    cgroup: Cgroup,
    shared: Shared,
    init: Arc<Process>,
    execs: HashMap<String, Arc<Process>>,
    /// Of the streams of all of them; none before the first.
    pumps: Option<Pumps>,
}

/// All containers of the pod.
pub struct Pod {
    reaper: Arc<Reaper>,
    network: Arc<PodNetwork>,
    /// `None` while a container is being made or deleted.
    containers: Mutex<HashMap<String, Option<Container>>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Pod {
    /// An empty pod.
    pub fn new(reaper: Arc<Reaper>) -> Self {
        Self {
            reaper,
            network: Arc::default(),
            containers: Mutex::default(),
        }
    }

    /// The reaper.
    pub fn reaper(&self) -> Arc<Reaper> {
        Arc::clone(&self.reaper)
    }

    /// The network that its containers share.
    pub fn network(&self) -> Arc<PodNetwork> {
        Arc::clone(&self.network)
    }

    fn with<T>(&self, container: &str, act: impl FnOnce(&mut Container) -> Result<T>) -> Result<T> {
        match lock(&self.containers).get_mut(container) {
            Some(Some(found)) => act(found),
            Some(None) => Err(Error::State(format!("container {container} is busy"))),
            None => Err(Error::NotFound(format!("container {container}"))),
        }
    }

    fn process(&self, container: &str, exec: &str) -> Result<Arc<Process>> {
        self.with(container, |found| {
            if exec.is_empty() {
                return Ok(Arc::clone(&found.init));
            }
            let missing = || Error::NotFound(format!("exec {exec} of container {container}"));
            found.execs.get(exec).cloned().ok_or_else(missing)
        })
    }

    /// Makes a container; answers its init's pid.
    pub async fn create(self: Arc<Self>, request: CreateContainerRequest) -> Result<u32> {
        let name = request.container;
        check_id("container", &name)?;
        if request.spec.len() > SPEC_MAX {
            return Err(Error::field("spec", "is too large"));
        }
        let spec: Spec = parse::parse("spec", &request.spec)?;
        check::check(&spec)?;
        let rootfs = match request.pause {
            true => rootfs::Rootfs::parse_of_pause(&request.rootfs)?,
            false => rootfs::Rootfs::parse(&request.rootfs)?,
        };
        let flags = flags(&request.stdio);
        check_terminal(spec.process().as_ref(), flags)?;
        if request.pause {
            pause::check(&spec, flags.terminal)?;
        }
        {
            let mut containers = lock(&self.containers);
            if containers.contains_key(&name) {
                return Err(Error::AlreadyExists(format!("container {name}")));
            }
            if containers.len() >= CONTAINERS_MAX {
                return Err(Error::Limit("the pod has too many containers".into()));
            }
            containers.insert(name.clone(), None);
        }
        let identity = Identity {
            id: name.clone(),
            bundle: request.bundle,
        };
        let made = self
            .make(identity, spec, rootfs, flags, request.pause)
            .await;
        let mut containers = lock(&self.containers);
        match made {
            Ok((container, pid)) => {
                containers.insert(name, Some(container));
                Ok(pid)
            }
            Err(error) => {
                containers.remove(&name);
                Err(error)
            }
        }
    }

    async fn make(
        self: &Arc<Self>,
        identity: Identity,
        mut spec: Spec,
        rootfs: rootfs::Rootfs,
        flags: Flags,
        pause: bool,
    ) -> Result<(Container, u32)> {
        let own_network = self.network.is_unused() && namespaces::own_network(&mut spec)?;
        let (joins, joined, ids) = self.open_joins(&spec)?;
        let linux = spec.linux().as_ref();
        let shared = Shared {
            seccomp: linux.and_then(|linux| linux.seccomp().clone()),
            personality: linux.and_then(|linux| linux.personality().clone()),
            ids,
            cgroup_namespace: namespaces::is_new(&spec, LinuxNamespaceType::Cgroup)
                || namespaces::is_joined(&spec, LinuxNamespaceType::Cgroup),
        };
        reach("agent.cgroup").step(|| "make the cgroup".into())?;
        let mut pumps = None;
        let process = Process::new(flags, None, &mut pumps)?;
        let cgroup = Cgroup::create(&identity.id, &spec, &shared.ids)?;
        let work = Work::Create {
            spec: Box::new(spec),
            rootfs,
            terminal: flags.terminal,
            pause,
            container: identity,
            shared: shared.clone(),
            joins,
        };
        let folder = cgroup::open(cgroup.path())?;
        let mut launched = process.launch(&self.reaper, &work, folder, &joined).await;
        if let Err(error) = reach("agent.launched") {
            launched = launched.and(Err(Error::step("launch", error)));
        }
        if let (Ok(prepared), true) = (&launched, own_network)
            && let Err(error) = self.network.adopt(prepared.pid)
        {
            let mut reaped = prepared.reaped.clone();
            // Without its agent the process ends.
            launched = Err(error);
            let _ = reaped.wait_for(Option::is_some).await;
        }
        match launched {
            Ok(prepared) => {
                let pid = prepared.pid;
                let path = cgroup.path().to_path_buf();
                process.watch(&prepared, move |_| {
                    // Without a pid namespace of its own a container's processes outlive their init.
                    let _ = std::fs::write(path.join("cgroup.kill"), "1");
                    cgroup::oom_kills(&path) > 0
                });
                process.created(prepared);
                let container = Container {
                    cgroup,
                    shared,
                    init: process,
                    execs: HashMap::new(),
                    pumps,
                };
                Ok((container, pid))
            }
            Err(error) => {
                let _ = Cgroup::remove(cgroup.path()).await;
                Err(error)
            }
        }
    }

    /// Opens the namespaces of other containers that the spec joins; answers their kinds, their files, and the id mappings that
    /// the container will have.
    fn open_joins(&self, spec: &Spec) -> Result<(Vec<LinuxNamespaceType>, Vec<OwnedFd>, Ids)> {
        let mut ids = Ids::of(spec);
        let (mut kinds, mut files) = (Vec::new(), Vec::new());
        for join in namespaces::joins(spec)? {
            if join.is_pod_network() {
                files.push(self.network.join()?);
                kinds.push(join.kind);
                continue;
            }
            if !self.is_init(join.pid) {
                return Err(join.unknown());
            }
            // Nothing is reaped in here, so the pid is still the init's.
            files.push(join.open()?);
            kinds.push(join.kind);
            if join.kind == LinuxNamespaceType::User {
                let real = Ids::of_process(join.pid)?;
                if !ids.is_empty() && ids != real {
                    let reason = "is not the mapping of the user namespace that is joined";
                    return Err(Error::field("linux.uidMappings, gidMappings", reason));
                }
                ids = real;
            }
        }
        Ok((kinds, files, ids))
    }

    /// Whether a pid is the init of a container.
    fn is_init(&self, pid: u32) -> bool {
        let containers = lock(&self.containers);
        let mut inits = containers.values().flatten();
        inits.any(|container| container.init.pid() == Some(pid))
    }

    /// Registers an exec.
    pub fn create_exec(&self, request: &CreateExecRequest) -> Result<()> {
        check_id("exec", &request.exec_id)?;
        reach("agent.exec").step(|| "register the exec".into())?;
        if request.process.len() > SPEC_MAX {
            return Err(Error::field("process", "is too large"));
        }
        let spec: ProcessSpec = parse::parse("process", &request.process)?;
        process::check("process", &spec)?;
        let flags = flags(&request.stdio);
        check_terminal(Some(&spec), flags)?;
        self.with(&request.container, |container| {
            let name = &request.exec_id;
            if container.execs.contains_key(name) {
                return Err(Error::AlreadyExists(format!("exec {name}")));
            }
            if container.execs.len() >= EXECS_MAX {
                return Err(Error::Limit("the container has too many execs".into()));
            }
            let process = Process::new(flags, Some(spec), &mut container.pumps)?;
            container.execs.insert(name.clone(), process);
            Ok(())
        })
    }

    /// Starts a created init or a registered exec; answers its pid.
    pub async fn start(self: Arc<Self>, container: String, exec: String) -> Result<u32> {
        let point = if exec.is_empty() {
            "agent.start"
        } else {
            "agent.exec-start"
        };
        reach(point).step(|| "start".into())?;
        let process = self.process(&container, &exec)?;
        let started = match process.begin()? {
            Begun::Created(prepared) => process.release(prepared).await,
            Begun::Exec(spec) => match self.prepare_exec(&container, &process, *spec).await {
                Ok(prepared) => process.release(prepared).await,
                Err(error) => Err(error),
            },
        };
        if let Err(error) = &started {
            process.not_started(error);
        }
        started
    }

    async fn prepare_exec(
        &self,
        container: &str,
        process: &Arc<Process>,
        spec: ProcessSpec,
    ) -> Result<Prepared> {
        let (folder, target, shared, path) = self.with(container, |found| {
            let Some(init) = found.init.pid() else {
                return Err(Error::State(format!("container {container} has ended")));
            };
            if !found.init.is_running() {
                return Err(Error::State(format!(
                    "container {container} is not running"
                )));
            }
            let path = cgroup::path_of(init).unwrap_or_else(|| found.cgroup.path().into());
            let pid = Pid::from_raw(init.cast_signed());
            let pid = pid.ok_or_else(|| Error::State("the init has no pid".into()))?;
            let target = rustix::process::pidfd_open(pid, PidfdFlags::empty())
                .step(|| "open the init".into())?;
            let folder = cgroup::open(&path)?;
            let outer = found.cgroup.path().to_path_buf();
            Ok((folder, target, found.shared.clone(), outer))
        })?;
        let work = Work::Exec {
            process: Box::new(spec),
            shared,
            terminal: process.has_terminal(),
        };
        let kills = cgroup::oom_kills(&path);
        let prepared = process
            .launch(&self.reaper, &work, folder, &[target])
            .await?;
        process.watch(&prepared, move |reaped| {
            reaped.status == 137 && cgroup::oom_kills(&path) > kills
        });
        Ok(prepared)
    }

    /// Waits for a process's end.
    pub async fn wait(&self, container: &str, exec: &str) -> Result<Exit> {
        let process = self.process(container, exec)?;
        Ok(process.wait().await)
    }

    /// Sends a signal to a process, or to all of the container.
    pub fn signal(&self, container: &str, exec: &str, signal: u32, all: bool) -> Result<()> {
        reach("agent.signal").step(|| "signal".into())?;
        let number = i32::try_from(signal)
            .ok()
            .filter(|number| (0..=64).contains(number));
        let number = number.ok_or_else(|| Error::field("signal", "is not a signal"))?;
        if !all {
            return self.process(container, exec)?.signal(number);
        }
        self.with(container, |found| {
            if number == libc::SIGKILL {
                return found.cgroup.kill();
            }
            for pid in found.cgroup.pids() {
                let signal = nix::sys::signal::Signal::try_from(number).ok();
                let pid = nix::unistd::Pid::from_raw(pid.cast_signed());
                let _ = nix::sys::signal::kill(pid, signal);
            }
            Ok(())
        })
    }

    /// Frees an exec, or a container with everything it has.
    pub async fn delete(self: Arc<Self>, container: String, exec: String) -> Result<Exit> {
        reach("agent.delete").step(|| "delete".into())?;
        let process = self.process(&container, &exec)?;
        let exit = process.end().await?;
        if !exec.is_empty() {
            self.with(&container, |found| {
                found.execs.remove(&exec);
                Ok(())
            })?;
            return Ok(exit);
        }
        let taken = match lock(&self.containers).get_mut(&container) {
            Some(slot) => slot.take(),
            None => None,
        };
        let Some(taken) = taken else {
            return Err(Error::State(format!("container {container} is busy")));
        };
        let removed = Cgroup::remove(taken.cgroup.path()).await;
        let mut containers = lock(&self.containers);
        match removed {
            Ok(()) => {
                containers.remove(&container);
                Ok(exit)
            }
            Err(error) => {
                containers.insert(container, Some(taken));
                Err(error)
            }
        }
    }

    /// Sets the size of a terminal; a process without one has nothing to set.
    pub fn resize(&self, container: &str, exec: &str, width: u32, height: u32) -> Result<()> {
        self.process(container, exec)?.resize(width, height)
    }

    /// Ends a process's stdin.
    pub fn close_stdin(&self, container: &str, exec: &str) -> Result<()> {
        self.process(container, exec)?.streams().close_stdin();
        Ok(())
    }

    /// Hands a stream's connection to its process.
    pub fn connect(&self, header: &StreamHeader, connection: VsockStream) -> bool {
        self.process(&header.container, &header.exec)
            .is_ok_and(|process| process.streams().connect(header.stream, connection))
    }

    /// Pids of the container's processes.
    pub fn pids(&self, container: &str) -> Result<Vec<u32>> {
        self.with(container, |found| Ok(found.cgroup.pids()))
    }

    /// What there is.
    pub fn list(&self) -> ListResponse {
        let containers = lock(&self.containers);
        let listed = containers.iter().map(|(name, container)| ListedContainer {
            container: name.clone(),
            busy: container.is_none(),
            processes: container.as_ref().map_or_else(Vec::new, |container| {
                let init = std::iter::once((String::new(), &container.init));
                let execs = container.execs.iter().map(|(id, exec)| (id.clone(), exec));
                let listed = init.chain(execs).map(|(exec_id, process)| ListedProcess {
                    exec_id,
                    phase: process.phase().into(),
                    ..Default::default()
                });
                listed.collect()
            }),
            ..Default::default()
        });
        ListResponse {
            containers: listed.collect(),
            ..Default::default()
        }
    }

    /// Folder of the container's cgroup.
    pub fn cgroup_path(&self, container: &str) -> Result<std::path::PathBuf> {
        self.with(container, |found| Ok(found.cgroup.path().to_path_buf()))
    }

    /// Changes the container's limits.
    pub fn update(&self, container: &str, resources: &[u8]) -> Result<()> {
        let resources: LinuxResources = parse::parse("linux.resources", resources)?;
        cgroup::check(&resources)?;
        self.with(container, |found| found.cgroup.update(&resources))
    }
}

fn check_id(field: &str, name: &str) -> Result<()> {
    if id::is_valid(name) {
        Ok(())
    } else {
        Err(Error::field(field, "is not a valid id"))
    }
}

fn check_terminal(process: Option<&ProcessSpec>, flags: Flags) -> Result<()> {
    let wanted = process.and_then(ProcessSpec::terminal) == Some(true);
    if wanted && !flags.terminal {
        return Err(Error::field(
            "process.terminal",
            "needs stdio with a terminal",
        ));
    }
    Ok(())
}

fn flags(stdio: &bulkhead_protocol::agent::Stdio) -> Flags {
    Flags {
        stdin: stdio.stdin,
        stdout: stdio.stdout,
        stderr: stdio.stderr,
        terminal: stdio.terminal,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_pod_that_is_full_takes_no_container() {
        let pod = Arc::new(Pod::new(Arc::default()));
        let taken = (0..CONTAINERS_MAX).map(|number| (format!("c{number}"), None));
        lock(&pod.containers).extend(taken);
        let spec = r#"{"ociVersion":"1.0.2","process":{"user":{"uid":0,"gid":0},"args":["sh"],"cwd":"/"},
            "linux":{"namespaces":[{"type":"mount"},{"type":"pid"}]}}"#;
        let mut request = CreateContainerRequest::new();
        request.container = "one-more".into();
        request.spec = spec.into();
        request.rootfs.mut_or_insert_default().lower = vec!["t1/fs".into()];
        let refused = Arc::clone(&pod).create(request).await;
        assert!(matches!(refused, Err(Error::Limit(_))), "{refused:?}");
        assert_eq!(lock(&pod.containers).len(), CONTAINERS_MAX);
    }
}
