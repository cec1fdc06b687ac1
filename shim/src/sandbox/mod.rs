//! The pod: one machine, its file server, its state folder and the way to its agent.
//!
//! ```text
//!   start ── ready ──► running ── end ──► ended ──► gone (no process, no folder)
//!     └────── end before ready ─────────────┘
//! ```
//!
//! One task watches the two children. Whatever ends the machine (a stop, a panic, `kill -9`), everybody learns it
//! from the same `watch` channel, with the reason.

pub mod adopt;
pub mod cgroup;
pub mod control;
mod error;
mod failure;
mod files;
mod frames;
pub mod growth;
mod launch;
pub mod machine;
pub mod network;
pub mod pids;
pub mod postmortem;
pub mod record;
pub mod rest;
pub mod spawn;
pub mod state;
pub mod timeline;
pub mod uplink;
pub mod user;
pub mod vsock;

use std::{
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
    time::Duration,
};

use bulkhead_failpoint::{patience, reach};
use bulkhead_protocol::{agent, agent_ttrpc::AgentClient, limits::AGENT_PORT};
use tokio::{
    net::UnixStream,
    sync::{mpsc, watch},
    time::timeout,
};
use ttrpc::context::{self, Context};

pub use self::error::Error;
use self::{
    frames::Capped,
    growth::{Growth, Sizing},
    machine::{End, Size},
    network::{Network, namespace::Namespace, note},
    record::{Book, Record},
    rest::Rest,
    spawn::{Helper, Net, Place},
    state::{Owner, ProcessId},
    timeline::{Stage, Timeline},
};
use crate::{
    check,
    config::{Config, Engine},
    keeper,
    spec::CgroupPath,
};

/// How long the guest may take to power off before it is stopped from outside.
const POWER_OFF: Duration = Duration::from_secs(3);
/// The VMM's word, and ours where it does not see it.
const FILE_SERVER_DIED: &str = "file-server-died";
/// How long the VMM may take to see that its file server is gone.
const FS_DEATH: Duration = Duration::from_millis(800);

/// How long the machine's end may come after a connection of it broke.
const END: Duration = Duration::from_secs(2);

/// How far the machine has come to its end.
#[derive(Clone, Debug)]
enum Life {
    Runs,
    Ended(Arc<End>),
    Gone(Arc<End>),
}

/// A pod.
pub struct Pod {
    name: String,
    dir: PathBuf,
    vmm: ProcessId,
    growth: Growth,
    rest: Arc<Rest>,
    agent: OnceLock<AgentClient>,
    control: control::Client,
    files: control::Client,
    network: Arc<Network>,
    life: watch::Receiver<Life>,
    engine: Engine,
    timeline: Arc<Timeline>,
    book: Arc<Book>,
}

impl Pod {
    /// Makes the state folder and starts the machine in the host's cgroup and network namespace; the guest boots while the caller
    /// goes on.
    pub fn start(
        config: &Config,
        namespace: &str,
        id: &str,
        bundle: &Path,
        sizing: Sizing,
        place: (Namespace, Option<CgroupPath>),
        timeline: Arc<Timeline>,
    ) -> Result<(Arc<Self>, Ready), Error> {
        let dir = state::pod_dir(&config.state, namespace, id)?;
        let record = Record::new(namespace, id, config, sizing.start);
        clear_stale(&dir, &format!("{namespace}/{id}"))?;
        state::make_private_dir(&dir).map_err(state_error(&dir))?;
        let of = (record, timeline);
        let started = reach("create.folder")
            .map_err(state_error(&dir))
            .and_then(|()| Self::start_in(config, of, &dir, bundle, sizing, place));
        if started.is_err() {
            let _ = wipe(&dir);
        }
        started
    }

    fn start_in(
        config: &Config,
        (record, timeline): (Record, Arc<Timeline>),
        dir: &Path,
        bundle: &Path,
        sizing: Sizing,
        (namespace, cgroup): (Namespace, Option<CgroupPath>),
    ) -> Result<(Arc<Self>, Ready), Error> {
        if config.engine == Engine::Emulated {
            tracing::warn!(
                "engine \"emulated\": the guest runs on a software CPU, which is no wall"
            );
        }
        if config.debug_shell {
            tracing::warn!("debug_shell: the guest offers a shell to root of the host");
        }
        let name = format!("{}/{}", record.namespace, record.id);
        let cgroup = cgroup.unwrap_or_else(|| CgroupPath::of_id(&record.namespace, &record.id));
        let book = Arc::new(Book::open(dir, record).map_err(state_error(dir))?);
        let keeper = i32::try_from(keeper::pid()).ok().and_then(ProcessId::of);
        let owner = keeper.zip(state::bundle_inode(bundle));
        if let Some((shim, bundle)) = owner {
            let owner = Owner { shim, bundle };
            owner.save(dir).map_err(state_error(dir))?;
        }
        let uid = user::claim(&config.state, dir, &config.jail)?;
        let (uplink, for_uplink) = uplink::pair().map_err(state_error(dir))?;
        let (mut for_vmm, for_fs) = spawn::fs_channels().map_err(state_error(dir))?;
        machine::write_machine(dir, config, sizing, uid, &for_vmm, &for_uplink)
            .and_then(|()| reach("create.config"))
            .map_err(state_error(dir))?;
        for_vmm.push(for_uplink);
        let control = control::Client::new(dir.join("control.sock"));
        let network = Network::new(
            namespace,
            dir,
            control.clone(),
            config.engine,
            sizing.start.vcpus,
        )?;
        let cgroups = cgroup::make(dir, &cgroup)?;
        let in_cgroup = |net, own_pids| Place {
            net,
            own_pids,
            cgroups: &cgroups,
        };
        let place = in_cgroup(Net::Of(network.namespace().as_fd()), true);
        let (vmm, vmm_id) = child(&config.vmm, dir, "vmm", &for_vmm, place, Vec::new())?;
        network.set_vmm(vmm_id.pid.unsigned_abs());
        let workers = for_fs
            .iter()
            .flat_map(|fd| ["--worker-fd".to_owned(), fd.as_raw_fd().to_string()])
            .collect();
        let place = in_cgroup(Net::Empty, false);
        let (fs, fs_id) = match child(&config.fs, dir, "fs", &for_fs, place, workers) {
            Ok(started) => started,
            Err(error) => {
                // Not left to the caller: without a wait the child would stay as a zombie.
                vmm_id.kill_session();
                tokio::spawn(async move {
                    let mut vmm = vmm;
                    vmm.wait().await
                });
                return Err(error);
            }
        };
        timeline.end(Stage::Vmm);
        let of = (name, config.engine);
        let helpers = [(vmm, vmm_id), (fs, fs_id)];
        let noted = (timeline, book);
        let ready = uplink.serve(network.clone());
        let pod = Self::watched(of, dir, sizing, control, network, helpers, noted);
        Ok((Arc::new(pod), ready))
    }

    /// A pod whose VMM and file server run, watched to its end.
    fn watched(
        (name, engine): (String, Engine),
        dir: &Path,
        sizing: Sizing,
        control: control::Client,
        network: Arc<Network>,
        [vmm, fs]: [(Helper, ProcessId); 2],
        (timeline, book): (Arc<Timeline>, Arc<Book>),
    ) -> Self {
        let vmm_id = vmm.1;
        let (tx, life) = watch::channel(Life::Runs);
        tokio::spawn(watch_helpers(
            vmm,
            fs,
            dir.to_owned(),
            network.clone(),
            (timeline.clone(), book.clone()),
            tx,
        ));
        Self {
            name,
            dir: dir.to_owned(),
            vmm: vmm_id,
            growth: Growth::new(sizing, control.clone()),
            rest: Rest::new(control.clone()),
            agent: OnceLock::new(),
            control,
            files: control::Client::new(dir.join("fs.sock")),
            network,
            life,
            engine,
            timeline,
            book,
        }
    }

    /// Waits until the agent serves, and connects to it.
    pub async fn ready(&self, mut ready: Ready) -> Result<(), Error> {
        let booted = async {
            let version = vsock::accept_ready(&mut ready).await;
            let version = version
                .and_then(|version| reach("create.ready").map(|()| version))
                .map_err(Error::Agent)?;
            if version != bulkhead_protocol::VERSION {
                return Err(Error::Version(version));
            }
            self.connect_agent().await?;
            self.timeline.end(Stage::Agent);
            Ok(())
        };
        tokio::select! {
            biased;
            end = self.ended() => Err(Error::Ended(end)),
            result = booted => match result {
                Err(error @ Error::Agent(_)) => Err(self.explain(error).await),
                result => result,
            },
            error = self.lateness() => Err(error),
        }
    }

    /// Connects to the agent, which serves.
    async fn connect_agent(&self) -> Result<(), Error> {
        reach("create.agent").map_err(Error::Agent)?;
        let stream = vsock::connect(&self.vsock(), AGENT_PORT)
            .await
            .map_err(Error::Agent)?;
        let socket = ttrpc::r#async::transport::Socket::new(Capped::new(stream));
        let client = AgentClient::new(ttrpc::r#async::Client::new(socket));
        let _ = self.agent.set(client);
        Ok(())
    }

    /// A broken connection is most often the machine's end: then that is the reason.
    async fn explain(&self, error: Error) -> Error {
        match timeout(END, self.ended()).await {
            Ok(end) => Error::Ended(end),
            Err(_) => error,
        }
    }

    /// `<namespace>/<id>`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its state folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Pid of the VMM on the host: what the pod's first container shows as its pid.
    pub fn pid(&self) -> u32 {
        self.vmm.pid.unsigned_abs()
    }

    /// A pid on the host for a further container: in the pod's network namespace, and there until it is taken back or the machine ends.
    pub async fn add_pid(&self) -> Result<u32, Error> {
        let request = control::op("add-pid");
        let answer = self.control.request(request, Vec::new()).await?;
        let pid = answer.get("pid").and_then(serde_json::Value::as_u64);
        pid.and_then(|pid| u32::try_from(pid).ok())
            .and_then(|pid| pids::on_host(self.pid(), pid).ok())
            .ok_or_else(|| control::Error::no_answer("control.sock", "add-pid").into())
    }

    /// Takes a pid back.
    pub async fn remove_pid(&self, pid: u32) {
        if pid == self.pid() || self.end().is_some() {
            return;
        }
        // One that is gone needs no removal.
        let Ok(local) = pids::in_namespace(self.pid(), pid) else {
            return;
        };
        let request = control::remove_pid(local);
        if let Err(error) = self.control.request(request, Vec::new()).await {
            tracing::warn!(pid, %error, "a container's pid stays until the pod ends");
        }
    }

    /// vCPUs and memory of its machine now.
    pub fn size(&self) -> Size {
        self.growth.size()
    }

    /// How its machine becomes larger.
    pub fn growth(&self) -> &Growth {
        &self.growth
    }

    /// When its vCPUs are stopped.
    pub fn rest(&self) -> &Arc<Rest> {
        &self.rest
    }

    /// The socket that leads to the guest's ports.
    pub fn vsock(&self) -> PathBuf {
        self.dir.join("vsock.sock")
    }

    /// The agent, once it is ready and as long as the machine runs.
    pub fn agent(&self) -> Result<&AgentClient, Error> {
        if let Some(end) = self.end() {
            return Err(Error::Ended(end));
        }
        self.agent.get().ok_or(Error::NoAgent)
    }

    /// Why the machine ended, if it did.
    pub fn end(&self) -> Option<Arc<End>> {
        match &*self.life.borrow() {
            Life::Runs => None,
            Life::Ended(end) | Life::Gone(end) => Some(end.clone()),
        }
    }

    /// Waits for the machine's end.
    pub async fn ended(&self) -> Arc<End> {
        let mut life = self.life.clone();
        let lost = || Arc::new(End::default());
        match life.wait_for(|l| !matches!(l, Life::Runs)).await.as_deref() {
            Ok(Life::Ended(end) | Life::Gone(end)) => end.clone(),
            _ => lost(),
        }
    }

    /// Its network.
    pub fn network(&self) -> &Arc<Network> {
        &self.network
    }

    /// What of the network needs no agent.
    pub async fn prepare_network(&self) -> Result<(), Error> {
        Ok(self.network.update(None, true).await?)
    }

    /// Gives the guest what its namespace holds now, and says so of what cannot be given.
    pub async fn update_network(&self) -> Result<(), Error> {
        let agent = self.agent()?;
        match self.network.update(Some(agent), true).await {
            Err(error) => Err(self.explain(error.into()).await),
            Ok(()) => Ok(()),
        }
    }

    /// Ends the machine and waits until nothing of the pod is left.
    pub async fn stop(&self) {
        let _awake = self.rest.wake().await;
        let asked = reach("delete.power-off").is_ok();
        if asked && self.end().is_none() && self.agent.get().is_some() {
            let off = async {
                if let Ok(agent) = self.agent() {
                    let _ = agent
                        .shutdown(deadline(POWER_OFF), &agent::Empty::new())
                        .await;
                }
                self.ended().await
            };
            let _ = timeout(POWER_OFF, off).await;
        }
        if self.end().is_none() {
            let stop = async {
                let _ = self.control.request(control::op("stop"), Vec::new()).await;
                self.ended().await
            };
            if timeout(Duration::from_secs(1), stop).await.is_err() {
                tracing::warn!("the machine does not stop: killed");
                self.kill();
            }
        }
        self.gone().await;
    }

    /// Ends the machine the hard way.
    pub fn kill(&self) {
        self.vmm.kill_session();
    }

    async fn gone(&self) {
        let mut life = self.life.clone();
        let _ = timeout(
            Duration::from_secs(10),
            life.wait_for(|l| matches!(l, Life::Gone(_))),
        )
        .await;
    }
}

/// The guest's connections to the ready port.
pub type Ready = mpsc::Receiver<UnixStream>;

/// Checks what a machine is made of, before anything is started for it.
pub async fn preflight(config: &Config) -> Result<(), Error> {
    let config = config.clone();
    tokio::task::spawn_blocking(move || preflight_blocking(&config))
        .await
        .unwrap_or(Ok(()))
}

fn preflight_blocking(config: &Config) -> Result<(), Error> {
    let file = |what, path: &Path| {
        let path = path.to_owned();
        move |why| Error::File { what, path, why }
    };
    check::host::check_kernel(&config.kernel).map_err(file("kernel", &config.kernel))?;
    check::host::check_initramfs(&config.initramfs)
        .map_err(file("initramfs", &config.initramfs))?;
    for (what, program) in [("bulkhead-vmm", &config.vmm), ("bulkhead-fs", &config.fs)] {
        check::host::check_program(program).map_err(file(what, program))?;
    }
    check::engine_present(config).map_err(|(what, path, why)| Error::File { what, path, why })
}

/// A context with a time limit for a call to the agent.
pub fn deadline(limit: Duration) -> Context {
    context::with_duration(patience(limit))
}

fn state_error(path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::State { path, source }
}

/// What a shim that died left in the folder goes; a pod whose shim lives stays.
fn clear_stale(dir: &Path, name: &str) -> Result<(), Error> {
    if !dir.exists() {
        return Ok(());
    }
    if Owner::load(dir).is_some_and(|owner| owner.shim.is_alive()) {
        return Err(Error::Exists(name.to_owned()));
    }
    tracing::warn!(dir = %dir.display(), "removing what a dead shim left");
    wipe(dir).map_err(state_error(dir))
}

/// Ends what is left of the pod whose state folder is `dir`, and removes what it has on the host, the folder last.
pub fn wipe(dir: &Path) -> io::Result<()> {
    state::kill_children(dir);
    note::clean(dir);
    cgroup::clean(dir);
    state::remove_dir(dir)
}

fn child(
    program: &Path,
    dir: &Path,
    name: &str,
    keep: &[OwnedFd],
    place: Place<'_>,
    mut args: Vec<String>,
) -> Result<(Helper, ProcessId), Error> {
    let spawn_error = |source| Error::Spawn {
        program: program.to_owned(),
        source,
    };
    args.splice(0..0, ["--state-dir".to_owned(), dir.display().to_string()]);
    let log = dir.join(format!("{name}.log"));
    let point = match name {
        "vmm" => "create.vmm",
        _ => "create.fs",
    };
    let spawned = reach(point).and_then(|()| spawn::spawn(program, &args, keep, place, &log));
    let (child, pid) = spawned.map_err(spawn_error)?;
    // Not reaped yet, so the pid is the child's even if it has ended.
    let id = ProcessId::of(pid).ok_or_else(|| spawn_error(io::ErrorKind::NotFound.into()))?;
    let file = dir.join(format!("{name}.pid"));
    id.save(&file).map_err(state_error(&file))?;
    Ok((child, id))
}

/// Watches both processes to the end of the pod, then removes what is left of it.
async fn watch_helpers(
    (mut vmm, vmm_id): (Helper, ProcessId),
    (mut fs, fs_id): (Helper, ProcessId),
    dir: PathBuf,
    network: Arc<Network>,
    (timeline, book): (Arc<Timeline>, Arc<Book>),
    life: watch::Sender<Life>,
) {
    let mut killed = false;
    let status = tokio::select! {
        biased;
        status = vmm.wait() => status,
        status = fs.wait() => {
            // With the VMM the file server ends as well, and is sometimes gone before it.
            match timeout(FS_DEATH, vmm.wait()).await {
                Ok(status) => status,
                Err(_) => {
                    tracing::warn!(?status, "the file server ended; the machine does not end by itself");
                    killed = true;
                    vmm_id.kill_session();
                    vmm.wait().await
                }
            }
        }
    };
    let mut end = End::read(&dir, status);
    if killed && end.reason == "vmm-died" {
        end.reason = FILE_SERVER_DIED.into();
        end.detail = "bulkhead-fs ended".into();
    }
    if end.reason == FILE_SERVER_DIED {
        let why = machine::last_word(&dir.join("fs.log"));
        end.detail = format!("{} {why}", end.detail).trim_end().into();
    }
    if !end.is_orderly()
        && let Some((1.., path)) = cgroup::oom_kills(&dir)
    {
        end.out_of_memory(&path);
    }
    timeline.of_vmm(end.of_vmm);
    end.stages = timeline.now();
    let end = Arc::new(end);
    if end.is_orderly() {
        tracing::info!(%end, "the machine ended");
    } else {
        tracing::error!(%end, "the machine ended");
    }
    life.send_replace(Life::Ended(end.clone()));
    // The emulator is in the VMM's session; the file server ends when its sockets do.
    vmm_id.kill_session();
    if timeout(Duration::from_millis(500), fs.wait())
        .await
        .is_err()
    {
        fs_id.kill_session();
        let _ = fs.wait().await;
    }
    let leftovers = dir.clone();
    let removed = tokio::task::spawn_blocking(move || {
        vmm_id.wait_gone(Duration::from_secs(3));
        network.close();
        cgroup::clean(&leftovers);
        book.close();
        reach("delete.folder").and_then(|()| state::remove_dir(&leftovers))
    });
    if let Ok(Err(error)) = removed.await {
        tracing::error!(%error, dir = %dir.display(), "removing the state folder");
    }
    life.send_replace(Life::Gone(end));
}
