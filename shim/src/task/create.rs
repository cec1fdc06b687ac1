//! Create and Exec: the machine with the first container, then the agent's half.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::Arc,
    time::Instant,
};

use bulkhead_failpoint::reach;
use bulkhead_protocol::{agent, limits::CONTAINERS_MAX};
use containerd_shim_protos::{
    api::{CreateTaskRequest, CreateTaskResponse, Empty, ExecProcessRequest},
    events::task::{TaskCreate, TaskExecAdded, TaskIO},
};
use protobuf::MessageField;

use super::{
    CALL, MAKE, Shared, answer,
    container::{Container, Made, process_request},
    error::Error,
    life::kill_in_guest,
    passed,
    process::{Phase, Process},
    record::Record,
};
use crate::{
    config::Config,
    hooks::{self, Runner},
    mounts::{Plan, Tree},
    refusal::unsupported,
    sandbox::{
        self, Pod, deadline,
        network::{self, namespace::Namespace},
        state::check_id,
        timeline::{Stage, short},
        vsock,
    },
    spec::{self, Cpus, Guest, Host, Spec},
    stdio::{Io, Keep, Paths, Pumps},
};

impl Shared {
    /// Create.
    pub(crate) async fn create(
        self: &Arc<Self>,
        req: &CreateTaskRequest,
    ) -> Result<CreateTaskResponse, Error> {
        self.timeline.end(Stage::Shim);
        let begun = Instant::now();
        check_id("id", &req.id)?;
        let there = self.container(&req.id).ok();
        if let Some(container) = there.filter(|c| c.is_asked_again()) {
            // Perhaps once more than containerd needs.
            self.publish_create(req, container.made.host_pid);
            let mut response = CreateTaskResponse::new();
            response.pid = container.made.host_pid;
            return Ok(response);
        }
        self.reserve(&req.id)?;
        let result = self.create_reserved(req).await;
        self.state().creating.remove(&req.id);
        let container = match result {
            Ok(container) => container,
            Err(error) => {
                self.stop_if_empty(None).await;
                return Err(error);
            }
        };
        tracing::info!(container = req.id, took = %short(begun.elapsed()), "created");
        let mut response = CreateTaskResponse::new();
        response.pid = container.made.host_pid;
        Ok(response)
    }

    fn reserve(&self, id: &str) -> Result<(), Error> {
        let mut state = self.state();
        if state.containers.contains_key(id) || state.creating.contains(id) {
            return Err(Error::Exists(format!("container {id}")));
        }
        if state.containers.len().saturating_add(state.creating.len()) >= CONTAINERS_MAX {
            return Err(Error::Limit("the pod has too many containers"));
        }
        state.creating.insert(id.into());
        Ok(())
    }

    /// Everything that can be refused is refused before the machine starts.
    async fn create_reserved(
        self: &Arc<Self>,
        req: &CreateTaskRequest,
    ) -> Result<Arc<Container>, Error> {
        if !req.checkpoint.is_empty() {
            return Err(Error::Unimplemented("restoring a checkpoint"));
        }
        let bundle = PathBuf::from(&req.bundle);
        let mut spec = Spec::load(&bundle)?;
        self.share_files(&req.id, &mut spec);
        let paths = Paths {
            stdin: req.stdin.clone(),
            stdout: req.stdout.clone(),
            stderr: req.stderr.clone(),
            terminal: req.terminal,
        };
        let io = Io::open(&paths, Keep::new(&self.kept, &req.id, "")).await?;
        let plan = Plan::new(&req.rootfs, &mut spec, &mut self.state().trees)?;
        let pod = match self.pod_with(&bundle, &spec, &plan.trees).await {
            Ok(pod) => pod,
            Err(error) => {
                self.release_trees(None, &plan.trees).await;
                return Err(error);
            }
        };
        let host_pid = match self.host_pid(&pod, &req.id).await {
            Ok(pid) => pid,
            Err(error) => {
                self.release_trees(Some(&pod), &plan.trees).await;
                return Err(error);
            }
        };
        let hooks = hooks_of(&spec, &req.id, &bundle, host_pid);
        let record = Record {
            id: req.id.clone(),
            bundle: bundle.clone(),
            trees: plan.trees.clone(),
            hooks: hooks.clone(),
            host_pid,
            made: None,
        };
        record.save(pod.dir());
        let made = self.make_with(&pod, req, &mut spec, &plan, &hooks, io);
        let (init_pid, cpus, pumps) = match made.await {
            Ok(made) => made,
            Err(error) => {
                pod.growth().forget(&req.id);
                pod.remove_pid(host_pid).await;
                self.release_trees(Some(&pod), &plan.trees).await;
                hooks.poststop().await;
                Record::forget(pod.dir(), &req.id);
                return Err(error);
            }
        };
        let init = Process::new("", paths);
        init.set_pumps(pumps);
        let made = Made {
            trees: plan.trees,
            hooks,
            cpus,
            init_pid,
            host_pid,
        };
        let container = Container::new(&req.id, bundle, pod.clone(), init, made);
        container.save();
        // The event first: once the container is in the table, other events of it may follow.
        self.publish_create(req, host_pid);
        self.state()
            .containers
            .insert(req.id.clone(), container.clone());
        if pod.end().is_some() {
            self.machine_ended(&pod).await;
        }
        self.note_containers(&pod);
        if req.id == self.pod_id {
            pod.note_start();
        }
        Ok(container)
    }

    /// What containerd shall know the container by: the machine's process for the pod's own, else a pid of its own.
    async fn host_pid(&self, pod: &Pod, id: &str) -> Result<u32, Error> {
        match id == self.pod_id {
            true => Ok(pod.pid()),
            false => Ok(pod.add_pid().await?),
        }
    }

    /// The pod, with the container's trees in its file server; started if this is its first container.
    async fn pod_with(
        self: &Arc<Self>,
        bundle: &Path,
        spec: &Spec,
        trees: &[Tree],
    ) -> Result<Arc<Pod>, Error> {
        // Also held for a further container: a tree that two containers share is served before the second goes on.
        let _booting = self.boot.lock().await;
        let running = self.state().pod.clone();
        if let Some(pod) = running {
            if let Some(end) = pod.end() {
                return Err(sandbox::Error::Ended(end).into());
            }
            if let Some(path) = spec.network() {
                pod.network().namespace().check_member(path)?;
            }
            pod.add_trees(trees).await?;
            return Ok(pod);
        }
        if spec.joins() {
            let why = "the pod has no container yet whose namespaces could be joined";
            return Err(unsupported("linux.namespaces", why).into());
        }
        self.forget_last();
        let config = Config::load()?;
        sandbox::preflight(&config).await?;
        let sizing = spec.sizing(&config, Host::this())?;
        let network = match spec.network() {
            Some(path) => Namespace::for_pod(path)?,
            None => Namespace::fresh()
                .map_err(|e| sandbox::Error::from(network::Error::Namespace(e)))?,
        };
        let (pod, ready) = Pod::start(
            &config,
            &self.namespace,
            &self.pod_id,
            bundle,
            sizing,
            (network, spec.cgroup()?),
            self.timeline.clone(),
        )?;
        self.state().pod = Some(pod.clone());
        self.watch_machine(&pod);
        // The rootfs and the taps are prepared while the guest boots.
        let started = async {
            let rootfs = async {
                pod.add_trees(trees).await?;
                pod.stage_ended(Stage::Rootfs);
                Ok(())
            };
            tokio::try_join!(pod.ready(ready), rootfs, pod.prepare_network())?;
            pod.update_network().await
        };
        let started = started.await;
        if let Err(error) = started {
            let error = pod.why(error).await;
            pod.stop().await;
            self.state().pod = None;
            return Err(error.into());
        }
        pod.save(spec.port_forward());
        pod.stage_ended(Stage::Network);
        network::follow::start(&pod, pod.network());
        if spec.port_forward() {
            network::forward::start(&pod, pod.network());
        }
        tracing::info!(vmm = pod.pid(), size = ?pod.size(), "the machine is ready");
        Ok(pod)
    }

    /// The hooks before the container, then the container: the guest's pid of its init, its CPUs and its streams.
    async fn make_with(
        &self,
        pod: &Arc<Pod>,
        req: &CreateTaskRequest,
        spec: &mut Spec,
        plan: &Plan,
        hooks: &Runner,
        io: Io,
    ) -> Result<(u32, Cpus, Pumps), Error> {
        pod.growth()
            .make_room(pod.agent()?, &req.id, spec.claim())
            .await;
        pod.save_size();
        let cpus = spec.translate(Guest {
            vcpus: pod.size().vcpus,
            inits: self.inits(pod),
            pod_network: req.id == self.pod_id || spec.network().is_some(),
        })?;
        if let Err(error) = hooks.remember() {
            tracing::warn!(%error, "should the shim die, poststop hooks will not run");
        }
        hooks.create().await?;
        let (pid, pumps) = self.make(pod, req, spec, plan, io).await?;
        Ok((pid, cpus, pumps))
    }

    /// By the pid that containerd knows a container by, that of its init in the guest, if it runs.
    fn inits(&self, pod: &Pod) -> HashMap<u32, Option<u32>> {
        let state = self.state();
        let of = |c: &Arc<Container>| {
            let init = c.init.exit().is_none().then_some(c.made.init_pid);
            (c.made.host_pid, init)
        };
        std::iter::once((pod.pid(), None))
            .chain(state.containers.values().map(of))
            .collect()
    }

    async fn make(
        &self,
        pod: &Arc<Pod>,
        req: &CreateTaskRequest,
        spec: &Spec,
        plan: &Plan,
        io: Io,
    ) -> Result<(u32, Pumps), Error> {
        let mut request = agent::CreateContainerRequest::new();
        request.container.clone_from(&req.id);
        request.spec = spec.to_json();
        request.bundle.clone_from(&req.bundle);
        request.rootfs = MessageField::some(plan.rootfs.clone());
        request.stdio = MessageField::some(io.request());
        request.pause = spec.is_pause();
        let result = pod
            .agent()?
            .create_container(deadline(MAKE), &request)
            .await;
        let pid = answer(pod, passed("create.container", result)).await?.pid;
        let pumps = connect(pod, &req.id, "", io).await;
        if pumps.is_err()
            && let Ok(agent) = pod.agent()
        {
            kill_in_guest(agent, &req.id, CALL).await;
            let request = process_request(&req.id, "");
            let _ = agent.delete(deadline(CALL), &request).await;
        }
        Ok((pid, pumps?))
    }

    fn publish_create(&self, req: &CreateTaskRequest, pid: u32) {
        let mut io = TaskIO::new();
        io.stdin.clone_from(&req.stdin);
        io.stdout.clone_from(&req.stdout);
        io.stderr.clone_from(&req.stderr);
        io.terminal = req.terminal;
        let mut event = TaskCreate::new();
        event.container_id.clone_from(&req.id);
        event.bundle.clone_from(&req.bundle);
        event.rootfs.clone_from(&req.rootfs);
        event.io = MessageField::some(io);
        event.pid = pid;
        self.events.publish(&event);
    }

    /// Exec: registers the process; nothing runs yet.
    pub(super) async fn exec(&self, req: &ExecProcessRequest) -> Result<Empty, Error> {
        check_id("exec_id", &req.exec_id)?;
        let container = self.container(&req.id)?;
        container.pod.must_run()?;
        if container.init.phase() != Phase::Running {
            return Err(Error::State {
                id: container.name(""),
                what: "exec into",
                phase: "not running",
            });
        }
        not_paused(&container, "exec into")?;
        let there = container.process(&req.exec_id).ok();
        if there.is_some_and(|process| process.is_asked_again()) {
            self.publish_exec(req);
            return Ok(Empty::new());
        }
        let program = spec::process(&req.spec.value, &container.made.cpus)?;
        let paths = Paths {
            stdin: req.stdin.clone(),
            stdout: req.stdout.clone(),
            stderr: req.stderr.clone(),
            terminal: req.terminal,
        };
        let process = Process::new(&req.exec_id, paths.clone());
        // First: the streams of another of this name are kept under it.
        container.add_exec(process.clone())?;
        let keep = Keep::new(&self.kept, &req.id, &req.exec_id);
        let made = match Io::open(&paths, keep).await {
            Ok(io) => self.make_exec(&container, req, program, io).await,
            Err(error) => Err(error.into()),
        };
        match made {
            Ok(pumps) => process.set_pumps(pumps),
            Err(error) => {
                container.remove_exec(&req.exec_id);
                return Err(error);
            }
        }
        container.save();
        self.publish_exec(req);
        Ok(Empty::new())
    }

    fn publish_exec(&self, req: &ExecProcessRequest) {
        let mut event = TaskExecAdded::new();
        event.container_id.clone_from(&req.id);
        event.exec_id.clone_from(&req.exec_id);
        self.events.publish(&event);
    }

    async fn make_exec(
        &self,
        container: &Container,
        req: &ExecProcessRequest,
        program: Vec<u8>,
        io: Io,
    ) -> Result<Pumps, Error> {
        let pod = &container.pod;
        let mut request = agent::CreateExecRequest::new();
        request.container.clone_from(&req.id);
        request.exec_id.clone_from(&req.exec_id);
        request.process = program;
        request.stdio = MessageField::some(io.request());
        let result = pod.agent()?.create_exec(deadline(CALL), &request).await;
        answer(pod, passed("exec.create", result)).await?;
        let pumps = connect(pod, &req.id, &req.exec_id, io).await;
        if pumps.is_err()
            && let Ok(agent) = pod.agent()
        {
            let request = container.request(&req.exec_id);
            let _ = agent.delete(deadline(CALL), &request).await;
        }
        pumps
    }
}

/// A process of a paused container would not begin before it is resumed, which its caller does not wait for.
pub(super) fn not_paused(container: &Container, what: &'static str) -> Result<(), Error> {
    if !container.is_paused() {
        return Ok(());
    }
    Err(Error::State {
        id: container.name(""),
        what,
        phase: "paused",
    })
}

fn hooks_of(spec: &Spec, id: &str, bundle: &Path, pid: u32) -> Runner {
    let state = hooks::State {
        oci_version: spec.version().into(),
        id: id.into(),
        pid: Some(pid),
        bundle: bundle.into(),
        annotations: spec.annotations().clone(),
        ..hooks::State::default()
    };
    Runner::new(spec.hooks().clone(), state)
}

async fn connect(pod: &Arc<Pod>, container: &str, exec: &str, io: Io) -> Result<Pumps, Error> {
    let socket = pod.vsock();
    let point = match exec {
        "" => "create.streams",
        _ => "exec.streams",
    };
    reach(point).map_err(Error::Stream)?;
    io.start(|kind| vsock::connect_stream(&socket, container, exec, kind))
        .await
        .map_err(Error::Stream)
}
