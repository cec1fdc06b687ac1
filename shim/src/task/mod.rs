//! containerd's Task service, one implementation under the names of v2 and v3.
//!
//! `create.rs` makes containers and execs, `life.rs` starts, ends and deletes processes, `record.rs` and `adopt.rs` let another shim take
//! over; here stand the service's state and the calls that only pass on to the agent. The pid that is told for every process of a container is the VMM's on the
//! host, or for the pod's further containers that of a thread of it (its network namespace is the pod's); guest pids are in the
//! answer of `Pids` only, and Docker gets none.

mod adopt;
pub mod container;
mod create;
pub mod error;
mod life;
pub mod process;
mod record;
mod rest;
pub mod stats;

use std::{
    collections::{HashMap, HashSet},
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use async_trait::async_trait;
use bulkhead_failpoint::reach;
use bulkhead_protocol::agent;
use containerd_shim_protos::{
    api::{
        CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest,
        CreateTaskResponse, DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest,
        PauseRequest, PidsRequest, PidsResponse, ProcessInfo, ResizePtyRequest, ResumeRequest,
        ShutdownRequest, StartRequest, StartResponse, StateRequest, StateResponse, StatsRequest,
        StatsResponse, Status, UpdateTaskRequest, WaitRequest, WaitResponse,
    },
    events::task::{TaskPaused, TaskResumed},
    sandbox_async::create_sandbox,
    shim_async::{Task, create_task},
};
use protobuf::{MessageField, well_known_types::timestamp::Timestamp};
use tokio::{sync::Notify, time::timeout};
use ttrpc::r#async::TtrpcContext;

use self::{
    container::Container,
    error::Error,
    process::{Phase, Process},
    record::Record,
};
use crate::{
    events::Publisher,
    keeper::{self, Kept},
    mounts::{Table, Tree},
    sandbox::{self, Pod, deadline, timeline::Timeline},
    sandbox_api::Asked,
    spec,
};

/// containerd's namespace of Docker's containers. Docker looks every pid up on the host: `docker top` asks the host's `ps`.
const DOCKER: &str = "moby";
/// How long the agent may take for a short call.
pub(crate) const CALL: Duration = Duration::from_secs(30);
/// How long it may take to make a container or to start a process.
const MAKE: Duration = Duration::from_secs(120);

pub(crate) type Rpc<T> = ttrpc::Result<T>;

/// The service. Cheap to clone.
#[derive(Clone)]
pub struct Service(Arc<Shared>);

/// What the calls share.
pub struct Shared {
    /// Folder of the pods' state folders.
    pods: PathBuf,
    namespace: String,
    pod_id: String,
    events: Publisher,
    shutdown: Arc<Notify>,
    kept: Kept,
    timeline: Arc<Timeline>,
    /// Held while the machine boots, so that it boots once.
    boot: tokio::sync::Mutex<()>,
    state: Mutex<State>,
}

#[derive(Default)]
pub(crate) struct State {
    pub(crate) pod: Option<Arc<Pod>>,
    /// What `CreateSandbox` asked for, where containerd speaks the Sandbox API.
    pub(crate) sandbox: Option<Asked>,
    containers: HashMap<String, Arc<Container>>,
    /// Ids whose `Create` is under way.
    creating: HashSet<String>,
    trees: Table,
    /// A pod was here and went; the keeper has the record of its last container.
    over: bool,
    /// That record, if it was a shim before that began to remove the pod.
    last: Option<Record>,
}

/// The time now.
pub fn now() -> Timestamp {
    SystemTime::now().into()
}

impl Service {
    /// The service of the pod `namespace`/`pod_id`, whose state folder is in `pods`; `shutdown` is notified when the shim shall end.
    pub fn new(
        pods: PathBuf,
        namespace: &str,
        pod_id: &str,
        events: Publisher,
        shutdown: Arc<Notify>,
        kept: Kept,
    ) -> Self {
        Self(Arc::new(Shared {
            pods,
            namespace: namespace.into(),
            pod_id: pod_id.into(),
            events,
            shutdown,
            kept,
            timeline: Arc::new(Timeline::begin()),
            boot: tokio::sync::Mutex::default(),
            state: Mutex::default(),
        }))
    }

    /// The service under both of its names, v2 (containerd 1.6, 1.7) and v3 (2.x) have the same messages, and the Sandbox service.
    pub fn register(&self) -> HashMap<String, ttrpc::r#async::Service> {
        let mut services = create_task(Arc::new(self.clone()));
        let v2 = create_task(Arc::new(self.clone()))
            .into_values()
            .map(|service| ("containerd.task.v2.Task".to_owned(), service));
        services.extend(v2);
        services.extend(create_sandbox(Arc::new(self.clone())));
        services
    }

    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.0
    }

    /// Ends the pod, whatever runs in it.
    pub async fn stop(&self) {
        let pod = self.0.state().pod.take();
        if let Some(pod) = pod {
            pod.stop().await;
        }
    }

    /// Does `work` to its end, whatever becomes of the call: ttrpc drops one at its deadline and with its connection, and what is half
    /// done nobody could finish or undo. The machine does not rest meanwhile.
    pub(crate) async fn to_the_end<T: Send + 'static>(
        &self,
        call: &'static str,
        id: String,
        work: impl Future<Output = Result<T, Error>> + Send + 'static,
    ) -> Rpc<T> {
        let shared = self.0.clone();
        let whole = async move {
            let _awake = shared.awake().await;
            reply(call, &id, work.await)
        };
        let done = tokio::spawn(whole).await;
        done.unwrap_or_else(|error| Err(ttrpc::Error::Others(format!("{call}: {error}"))))
    }

    /// Answers once nothing was here for `limit`: containerd gave up between `start` and `Create`, or never came back.
    pub async fn unused(&self, limit: Duration) {
        loop {
            tokio::time::sleep(limit).await;
            if self.is_unused() {
                return;
            }
        }
    }

    /// Whether nothing is here.
    pub fn is_unused(&self) -> bool {
        let state = self.0.state();
        state.pod.is_none() && state.containers.is_empty() && state.creating.is_empty()
    }
}

impl Shared {
    pub(crate) fn pod_id(&self) -> &str {
        &self.pod_id
    }

    /// The shim is needed no more.
    pub(crate) fn end_shim(&self) {
        self.shutdown.notify_one();
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes down which containers the pod has, for `bulkhead list`.
    fn note_containers(&self, pod: &Pod) {
        let mut ids: Vec<String> = self.state().containers.keys().cloned().collect();
        ids.sort();
        pod.note_containers(ids);
    }

    pub(crate) fn container(&self, id: &str) -> Result<Arc<Container>, Error> {
        let found = self.state().containers.get(id).cloned();
        found.ok_or_else(|| Error::NotFound(format!("container {id}")))
    }

    fn process(&self, id: &str, exec_id: &str) -> Result<(Arc<Container>, Arc<Process>), Error> {
        let container = self.container(id)?;
        let process = container.process(exec_id)?;
        Ok((container, process))
    }

    /// Gives a container's trees back; what nobody else uses is removed.
    async fn release_trees(&self, pod: Option<&Pod>, trees: &[Tree]) {
        let unused = self.state().trees.release(trees);
        if let Some(pod) = pod {
            pod.remove_trees(&unused).await;
        }
    }
}

/// The agent's answer; a broken connection becomes the machine's end, if it is that.
pub(crate) async fn answer<T>(pod: &Pod, result: ttrpc::Result<T>) -> Result<T, Error> {
    let error = match result {
        Ok(answer) => return Ok(answer),
        Err(error @ ttrpc::Error::RpcStatus(_)) => error,
        Err(error) => match timeout(Duration::from_secs(1), pod.ended()).await {
            Ok(end) => return Err(sandbox::Error::Ended(end).into()),
            Err(_) => error,
        },
    };
    Err(Error::Agent(error))
}

/// An answer of the agent, unless tests have it lost at this point.
pub(crate) fn passed<T>(point: &'static str, answer: ttrpc::Result<T>) -> ttrpc::Result<T> {
    reach(point).map_err(|error| ttrpc::Error::Others(error.to_string()))?;
    answer
}

/// Logs a failed call and makes it a status.
pub(crate) fn reply<T>(call: &'static str, id: &str, result: Result<T, Error>) -> Rpc<T> {
    result.map_err(|error| {
        match &error {
            Error::NotFound(_) | Error::Finished(_) => {
                tracing::debug!(call, container = id, %error);
            }
            error => tracing::warn!(call, container = id, %error),
        }
        error.into()
    })
}

impl Shared {
    fn state_of(&self, id: &str, exec_id: &str) -> Result<StateResponse, Error> {
        let (container, process) = self.process(id, exec_id)?;
        let mut state = StateResponse::new();
        state.id = id.into();
        state.exec_id = exec_id.into();
        state.bundle = container.bundle.display().to_string();
        state.pid = container.made.host_pid;
        state.stdin.clone_from(&process.paths.stdin);
        state.stdout.clone_from(&process.paths.stdout);
        state.stderr.clone_from(&process.paths.stderr);
        state.terminal = process.paths.terminal;
        let status = match process.phase() {
            Phase::Created | Phase::Starting => Status::CREATED,
            Phase::Running if container.is_paused() => Status::PAUSED,
            Phase::Running => Status::RUNNING,
            Phase::Stopped(exit) => {
                state.exit_status = exit.status;
                state.exited_at = MessageField::some(exit.at);
                Status::STOPPED
            }
        };
        state.status = status.into();
        Ok(state)
    }

    async fn pids(&self, id: &str) -> Result<PidsResponse, Error> {
        let container = self.container(id)?;
        let ended = matches!(container.init.phase(), Phase::Stopped(_));
        let pids = if ended || self.namespace == DOCKER {
            // The task's own: containerd 1.7 takes a shim without pids for a leaked one when it restarts, and the exit
            // status would be lost.
            vec![container.made.host_pid]
        } else {
            let request = container.container_request();
            let agent = container.pod.agent()?;
            let result = agent.list_pids(deadline(CALL), &request).await;
            answer(&container.pod, result).await?.pids
        };
        let mut response = PidsResponse::new();
        response.processes = pids
            .into_iter()
            .map(|pid| {
                let mut info = ProcessInfo::new();
                info.pid = pid;
                info
            })
            .collect();
        Ok(response)
    }

    async fn pause(&self, id: &str, pause: bool) -> Result<Empty, Error> {
        let container = self.container(id)?;
        let agent = container.pod.agent()?;
        let request = container.container_request();
        let result = if pause {
            agent.pause(deadline(CALL), &request).await
        } else {
            agent.resume(deadline(CALL), &request).await
        };
        answer(&container.pod, result).await?;
        container.set_paused(pause);
        container.save();
        if pause {
            let mut event = TaskPaused::new();
            event.container_id = id.into();
            self.events.publish(&event);
        } else {
            let mut event = TaskResumed::new();
            event.container_id = id.into();
            self.events.publish(&event);
        }
        Ok(Empty::new())
    }

    async fn resize(&self, req: &ResizePtyRequest) -> Result<Empty, Error> {
        let (container, process) = self.process(&req.id, &req.exec_id)?;
        if process.exit().is_some() {
            return Err(Error::Finished(container.name(&req.exec_id)));
        }
        let mut request = agent::ResizePtyRequest::new();
        request.container.clone_from(&req.id);
        request.exec_id.clone_from(&req.exec_id);
        request.width = req.width;
        request.height = req.height;
        let agent = container.pod.agent()?;
        let result = agent.resize_pty(deadline(CALL), &request).await;
        answer(&container.pod, result).await?;
        Ok(Empty::new())
    }

    async fn update(&self, req: &UpdateTaskRequest) -> Result<Empty, Error> {
        let container = self.container(&req.id)?;
        let agent = container.pod.agent()?;
        let growth = container.pod.growth();
        let claim = spec::changed_claim(growth.claim(&req.id), &req.resources.value)?;
        growth.make_room(agent, &req.id, claim).await;
        container.pod.save_size();
        container.save();
        let mut request = agent::UpdateRequest::new();
        request.container.clone_from(&req.id);
        request.resources = spec::resources(&req.resources.value, growth.size().vcpus)?;
        let result = agent.update(deadline(CALL), &request).await;
        answer(&container.pod, result).await?;
        Ok(Empty::new())
    }

    async fn stats(&self, id: &str) -> Result<StatsResponse, Error> {
        let container = self.container(id)?;
        let request = container.container_request();
        let agent = container.pod.agent()?;
        let result = agent.stats(deadline(CALL), &request).await;
        let stats = answer(&container.pod, result).await?;
        let mut response = StatsResponse::new();
        response.stats = MessageField::some(stats::to_any(&stats)?);
        Ok(response)
    }

    fn connect(&self, id: &str) -> Result<ConnectResponse, Error> {
        let mut response = ConnectResponse::new();
        response.shim_pid = keeper::pid();
        response.task_pid = self.container(id)?.made.host_pid;
        response.version = env!("CARGO_PKG_VERSION").into();
        Ok(response)
    }
}

#[async_trait]
impl Task for Service {
    async fn state(&self, _: &TtrpcContext, req: StateRequest) -> Rpc<StateResponse> {
        reply("state", &req.id, self.0.state_of(&req.id, &req.exec_id))
    }

    async fn create(&self, _: &TtrpcContext, req: CreateTaskRequest) -> Rpc<CreateTaskResponse> {
        let (shared, id) = (self.0.clone(), req.id.clone());
        let work = async move { shared.create(&req).await };
        self.to_the_end("create", id, work).await
    }

    async fn start(&self, _: &TtrpcContext, req: StartRequest) -> Rpc<StartResponse> {
        let (shared, id) = (self.0.clone(), req.id.clone());
        let work = async move { shared.start(&req.id, &req.exec_id).await };
        self.to_the_end("start", id, work).await
    }

    async fn delete(&self, _: &TtrpcContext, req: DeleteRequest) -> Rpc<DeleteResponse> {
        let (shared, id) = (self.0.clone(), req.id.clone());
        let work = async move { shared.delete(&req.id, &req.exec_id).await };
        self.to_the_end("delete", id, work).await
    }

    async fn pids(&self, _: &TtrpcContext, req: PidsRequest) -> Rpc<PidsResponse> {
        let _awake = self.0.awake().await;
        reply("pids", &req.id, self.0.pids(&req.id).await)
    }

    async fn pause(&self, _: &TtrpcContext, req: PauseRequest) -> Rpc<Empty> {
        let (shared, id) = (self.0.clone(), req.id.clone());
        let work = async move { shared.pause(&req.id, true).await };
        self.to_the_end("pause", id, work).await
    }

    async fn resume(&self, _: &TtrpcContext, req: ResumeRequest) -> Rpc<Empty> {
        let (shared, id) = (self.0.clone(), req.id.clone());
        let work = async move { shared.pause(&req.id, false).await };
        self.to_the_end("resume", id, work).await
    }

    async fn checkpoint(&self, _: &TtrpcContext, req: CheckpointTaskRequest) -> Rpc<Empty> {
        let error = Error::Unimplemented("checkpoint");
        reply("checkpoint", &req.id, Err(error))
    }

    async fn kill(&self, _: &TtrpcContext, req: KillRequest) -> Rpc<Empty> {
        let (shared, id) = (self.0.clone(), req.id.clone());
        let work = async move { shared.kill(&req).await };
        self.to_the_end("kill", id, work).await
    }

    async fn exec(&self, _: &TtrpcContext, req: ExecProcessRequest) -> Rpc<Empty> {
        let (shared, id) = (self.0.clone(), req.id.clone());
        let work = async move { shared.exec(&req).await };
        self.to_the_end("exec", id, work).await
    }

    async fn resize_pty(&self, _: &TtrpcContext, req: ResizePtyRequest) -> Rpc<Empty> {
        let _awake = self.0.awake().await;
        reply("resize_pty", &req.id, self.0.resize(&req).await)
    }

    async fn close_io(&self, _: &TtrpcContext, req: CloseIORequest) -> Rpc<Empty> {
        let found = self.0.process(&req.id, &req.exec_id);
        let result = found.map(|(_, process)| {
            if req.stdin {
                process.close_stdin();
            }
            Empty::new()
        });
        reply("close_io", &req.id, result)
    }

    async fn update(&self, _: &TtrpcContext, req: UpdateTaskRequest) -> Rpc<Empty> {
        let (shared, id) = (self.0.clone(), req.id.clone());
        let work = async move { shared.update(&req).await };
        self.to_the_end("update", id, work).await
    }

    async fn wait(&self, _: &TtrpcContext, req: WaitRequest) -> Rpc<WaitResponse> {
        let result = match self.0.process(&req.id, &req.exec_id) {
            Ok((_, process)) => {
                let mut response = WaitResponse::new();
                if let Some(exit) = process.wait().await {
                    response.exit_status = exit.status;
                    response.exited_at = MessageField::some(exit.at);
                }
                Ok(response)
            }
            Err(error) => Err(error),
        };
        reply("wait", &req.id, result)
    }

    async fn stats(&self, _: &TtrpcContext, req: StatsRequest) -> Rpc<StatsResponse> {
        let _awake = self.0.awake().await;
        reply("stats", &req.id, self.0.stats(&req.id).await)
    }

    async fn connect(&self, _: &TtrpcContext, req: ConnectRequest) -> Rpc<ConnectResponse> {
        reply("connect", &req.id, self.0.connect(&req.id))
    }

    async fn shutdown(&self, _: &TtrpcContext, req: ShutdownRequest) -> Rpc<Empty> {
        let (this, id) = (self.clone(), req.id.clone());
        let work = async move {
            // Other containers of the pod keep the shim.
            let keeps = !this.0.state().containers.is_empty() && !req.now;
            if !keeps {
                this.stop().await;
                this.0.end_shim();
            }
            Ok(Empty::new())
        };
        self.to_the_end("shutdown", id, work).await
    }
}
