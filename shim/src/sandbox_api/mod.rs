//! containerd's Sandbox service (2.x, `sandboxer = "shim"`): a pod without a pause container. It is served beside the Task service, and
//! containers come by that.
//!
//! containerd calls `start` for the sandbox alone, in a bundle without `config.json`; containers that follow use the same connection.
//! The pod's namespaces need somebody who keeps them: that is the agent's pause, without rootfs. It stands in the pod's table under the
//! sandbox's id, as a pause container does where containerd makes one, with the spec that is written into the bundle here.

mod config;
mod files;

use std::{fs, io, path::Path, sync::Arc, time::Duration};

use async_trait::async_trait;
use bulkhead_protocol::agent;
use containerd_shim_protos::{
    api::CreateTaskRequest,
    sandbox_api::{
        CreateSandboxRequest, CreateSandboxResponse, PingRequest, PingResponse, PlatformRequest,
        PlatformResponse, SandboxMetricsRequest, SandboxMetricsResponse, SandboxStatusRequest,
        SandboxStatusResponse, ShutdownSandboxRequest, ShutdownSandboxResponse,
        StartSandboxRequest, StartSandboxResponse, StopSandboxRequest, StopSandboxResponse,
        WaitSandboxRequest, WaitSandboxResponse,
    },
    sandbox_async::Sandbox,
};
use protobuf::{Message, MessageField, well_known_types::timestamp::Timestamp};
use serde_json::json;
use tokio::time::timeout;
use ttrpc::r#async::TtrpcContext;

use crate::{
    sandbox::{self, deadline},
    spec::{self, Spec},
    task::{CALL, Rpc, Service, Shared, answer, error::Error, now, reply, stats},
};

/// How long the ends of a stopped pod's processes may take to be recorded.
const RECORDED: Duration = Duration::from_secs(5);

/// How long the answer to `ShutdownSandbox` has to be on its way: containerd takes a connection that ends before for an error.
const ANSWERED: Duration = Duration::from_millis(100);

/// Files in the bundle: what was asked for, and when.
const ASKED: &str = "bulkhead-sandbox";
const ASKED_AT: &str = "bulkhead-sandbox-at";

/// The states that CRI knows.
const READY: &str = "SANDBOX_READY";
const NOT_READY: &str = "SANDBOX_NOTREADY";

/// A sandbox that was asked for.
#[derive(Clone, Debug)]
pub struct Asked {
    request: CreateTaskRequest,
    created_at: Timestamp,
}

impl Asked {
    /// Leaves it in the bundle, for another shim.
    fn save(&self) -> io::Result<()> {
        let dir = Path::new(&self.request.bundle);
        let request = self.request.write_to_bytes().map_err(io::Error::other)?;
        fs::write(dir.join(ASKED), request)?;
        let time = self.created_at.write_to_bytes().map_err(io::Error::other)?;
        fs::write(dir.join(ASKED_AT), time)
    }

    /// What an earlier shim has left in the bundle, which is the shim's working folder.
    pub fn load() -> Option<Self> {
        let request = CreateTaskRequest::parse_from_bytes(&fs::read(ASKED).ok()?).ok()?;
        let created_at = Timestamp::parse_from_bytes(&fs::read(ASKED_AT).ok()?).ok()?;
        Some(Self {
            request,
            created_at,
        })
    }
}

impl Shared {
    /// The one sandbox that this shim is for.
    fn asked(&self, id: &str) -> Result<Asked, Error> {
        let asked = self.state().sandbox.clone();
        let found = asked.filter(|asked| asked.request.id == id);
        found.ok_or_else(|| Error::NotFound(format!("sandbox {id}")))
    }

    /// Everything that can be refused is refused here; the machine boots at the start.
    fn create_sandbox(&self, req: &CreateSandboxRequest) -> Result<CreateSandboxResponse, Error> {
        if req.sandbox_id != self.pod_id() {
            let id = &req.sandbox_id;
            return Err(Error::NotFound(format!("a shim for sandbox {id}")));
        }
        if self.state().sandbox.is_some() {
            return Err(Error::Exists(format!("sandbox {}", req.sandbox_id)));
        }
        let bundle = Path::new(&req.bundle_path);
        let file = bundle.join("config.json");
        // A client other than CRI may have given the spec itself.
        if let Some(config) = config::parse(req.options.as_ref())? {
            let text = config::spec(req, &config).to_string();
            fs::write(&file, text)
                .and_then(|()| files::write(bundle, &config))
                .map_err(|source| spec::Error::Write { path: file, source })?;
        }
        Spec::load(bundle)?;
        let mut request = CreateTaskRequest::new();
        request.id.clone_from(&req.sandbox_id);
        request.bundle.clone_from(&req.bundle_path);
        request.rootfs.clone_from(&req.rootfs);
        let asked = Asked {
            request,
            created_at: now(),
        };
        if let Err(error) = asked.save() {
            tracing::warn!(%error, "another shim would not know that it is a sandbox");
        }
        self.state().sandbox = Some(asked);
        Ok(CreateSandboxResponse::new())
    }

    /// What a container of the pod has of the sandbox.
    pub(crate) fn share_files(&self, id: &str, spec: &mut Spec) {
        let sandbox = self.state().sandbox.clone();
        if let Some(asked) = sandbox.filter(|asked| asked.request.id != id) {
            files::mount(Path::new(&asked.request.bundle), &mut spec.value);
        }
    }

    async fn start_sandbox(self: &Arc<Self>, id: &str) -> Result<StartSandboxResponse, Error> {
        let asked = self.asked(id)?;
        let pid = self.create(&asked.request).await?.pid;
        if let Err(error) = self.start(id, "").await {
            let _ = self.delete(id, "").await;
            return Err(error);
        }
        let mut response = StartSandboxResponse::new();
        response.pid = pid;
        response.created_at = MessageField::some(asked.created_at);
        Ok(response)
    }

    /// Ends the machine, and with it whatever still runs.
    async fn stop_sandbox(&self, id: &str) -> Result<StopSandboxResponse, Error> {
        self.asked(id)?;
        let pod = self.state().pod.clone();
        if let Some(pod) = pod {
            pod.stop().await;
        }
        if let Ok(container) = self.container(id) {
            let _ = timeout(RECORDED, container.init.wait()).await;
        }
        Ok(StopSandboxResponse::new())
    }

    async fn wait_sandbox(&self, id: &str) -> Result<WaitSandboxResponse, Error> {
        self.asked(id)?;
        let mut response = WaitSandboxResponse::new();
        if let Some(exit) = self.container(id)?.init.wait().await {
            response.exit_status = exit.status;
            response.exited_at = MessageField::some(exit.at);
        }
        Ok(response)
    }

    fn sandbox_status(&self, req: &SandboxStatusRequest) -> Result<SandboxStatusResponse, Error> {
        let id = &req.sandbox_id;
        let asked = self.asked(id)?;
        let mut response = SandboxStatusResponse::new();
        response.sandbox_id.clone_from(id);
        response.state = NOT_READY.into();
        response.created_at = MessageField::some(asked.created_at);
        let Ok(container) = self.container(id) else {
            return Ok(response);
        };
        response.pid = container.made.host_pid;
        match container.init.exit() {
            None => response.state = READY.into(),
            Some(exit) => response.exited_at = MessageField::some(exit.at),
        }
        if req.verbose {
            let size = container.pod.size();
            let info = json!({
                "pid": container.made.host_pid,
                "vcpus": size.vcpus,
                "memoryMiB": size.memory_mib,
                "end": container.pod.end().map(|end| end.to_string()),
            });
            response.info.insert("info".into(), info.to_string());
        }
        Ok(response)
    }

    fn ping_sandbox(&self, id: &str) -> Result<PingResponse, Error> {
        self.asked(id)?;
        match self.container(id)?.pod.end() {
            Some(end) => Err(sandbox::Error::Ended(end).into()),
            None => Ok(PingResponse::new()),
        }
    }

    /// Of all the pod's containers together.
    async fn sandbox_metrics(&self, id: &str) -> Result<SandboxMetricsResponse, Error> {
        self.asked(id)?;
        let pod = self.container(id)?.pod.clone();
        let all = agent::ContainerRequest::new();
        let result = pod.agent()?.stats(deadline(CALL), &all).await;
        let values = answer(&pod, result).await?;
        let mut response = SandboxMetricsResponse::new();
        let metrics = response.metrics.mut_or_insert_default();
        metrics.id = id.into();
        metrics.timestamp = MessageField::some(now());
        metrics.data = MessageField::some(stats::to_any(&values)?);
        Ok(response)
    }
}

fn platform() -> PlatformResponse {
    let mut response = PlatformResponse::new();
    let platform = response.platform.mut_or_insert_default();
    platform.os = "linux".into();
    platform.architecture = "amd64".into();
    response
}

#[async_trait]
impl Sandbox for Service {
    async fn create_sandbox(
        &self,
        _: &TtrpcContext,
        req: CreateSandboxRequest,
    ) -> Rpc<CreateSandboxResponse> {
        let result = self.shared().create_sandbox(&req);
        reply("create_sandbox", &req.sandbox_id, result)
    }

    async fn start_sandbox(
        &self,
        _: &TtrpcContext,
        req: StartSandboxRequest,
    ) -> Rpc<StartSandboxResponse> {
        let (shared, id) = (self.shared().clone(), req.sandbox_id);
        let asked = id.clone();
        let work = async move { shared.start_sandbox(&asked).await };
        self.to_the_end("start_sandbox", id, work).await
    }

    async fn platform(&self, _: &TtrpcContext, req: PlatformRequest) -> Rpc<PlatformResponse> {
        let result = self.shared().asked(&req.sandbox_id).map(|_| platform());
        reply("platform", &req.sandbox_id, result)
    }

    async fn stop_sandbox(
        &self,
        _: &TtrpcContext,
        req: StopSandboxRequest,
    ) -> Rpc<StopSandboxResponse> {
        let (shared, id) = (self.shared().clone(), req.sandbox_id);
        let asked = id.clone();
        let work = async move { shared.stop_sandbox(&asked).await };
        self.to_the_end("stop_sandbox", id, work).await
    }

    async fn wait_sandbox(
        &self,
        _: &TtrpcContext,
        req: WaitSandboxRequest,
    ) -> Rpc<WaitSandboxResponse> {
        let result = self.shared().wait_sandbox(&req.sandbox_id).await;
        reply("wait_sandbox", &req.sandbox_id, result)
    }

    async fn sandbox_status(
        &self,
        _: &TtrpcContext,
        req: SandboxStatusRequest,
    ) -> Rpc<SandboxStatusResponse> {
        let result = self.shared().sandbox_status(&req);
        reply("sandbox_status", &req.sandbox_id, result)
    }

    async fn ping_sandbox(&self, _: &TtrpcContext, req: PingRequest) -> Rpc<PingResponse> {
        let result = self.shared().ping_sandbox(&req.sandbox_id);
        reply("ping_sandbox", &req.sandbox_id, result)
    }

    async fn shutdown_sandbox(
        &self,
        _: &TtrpcContext,
        req: ShutdownSandboxRequest,
    ) -> Rpc<ShutdownSandboxResponse> {
        // Also without a sandbox: containerd calls it when none could be made.
        let this = self.clone();
        let work = async move {
            this.stop().await;
            tokio::spawn(async move {
                tokio::time::sleep(ANSWERED).await;
                this.shared().end_shim();
            });
            Ok(ShutdownSandboxResponse::new())
        };
        self.to_the_end("shutdown_sandbox", req.sandbox_id, work)
            .await
    }

    async fn sandbox_metrics(
        &self,
        _: &TtrpcContext,
        req: SandboxMetricsRequest,
    ) -> Rpc<SandboxMetricsResponse> {
        let _awake = self.shared().awake().await;
        let result = self.shared().sandbox_metrics(&req.sandbox_id).await;
        reply("sandbox_metrics", &req.sandbox_id, result)
    }
}
