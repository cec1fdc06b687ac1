//! The ttrpc service and the two listeners. Only the host may talk to the agent: a container could open vsock sockets as well.

use std::{
    pin::Pin,
    sync::{Arc, OnceLock},
    task::{Context as TaskContext, Poll},
    time::Duration,
};

use anyhow::Context as _;
use async_trait::async_trait;
use bulkhead_protocol::{
    VERSION,
    agent::{
        ContainerRequest, CreateContainerRequest, CreateExecRequest, Empty, GrowRequest,
        GrowResponse, ListPidsResponse, ListResponse, ProcessRequest, ProcessResponse,
        ResizePtyRequest, SetNetworkRequest, SignalRequest, StatsResponse, UpdateRequest,
        WaitResponse, WatchPortsRequest, WatchPortsResponse,
    },
    agent_ttrpc::{self, Agent},
    limits::{AGENT_PORT, DEBUG_PORT, FORWARD_PORT, READY_PORT, STREAM_HEADER_MAX, STREAM_PORT},
    stream::StreamHeader,
};
use futures_core::Stream;
use tokio::io::AsyncWriteExt;
use tokio_vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockAddr, VsockListener, VsockStream};
use ttrpc::r#async::{Server, TtrpcContext, transport::Listener};

use crate::{
    boot::PODS,
    container::cgroup::Cgroup,
    debug::{self, Shell},
    error::Error,
    network::{forward::Forwarder, ports::Watcher},
    pod::{Exit, Pod},
    power,
    reaper::now,
    streams::read_line,
};

/// How long to wait when the agent is out of descriptors.
const EXHAUSTED: Duration = Duration::from_millis(200);
/// How long a stream's connection may take to send its header.
const HEADER_PATIENCE: Duration = Duration::from_secs(10);

/// Serves for ever; tells the host when it can be called.
pub async fn serve(pod: Arc<Pod>) -> anyhow::Result<()> {
    let listen = |port| {
        VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, port))
            .with_context(|| format!("listen on vsock port {port}"))
    };
    let streams = HostOnly(listen(STREAM_PORT)?);
    let forwards = HostOnly(listen(FORWARD_PORT)?);
    let calls = HostOnly(listen(AGENT_PORT)?);
    let service = Arc::new(Service {
        pod: Arc::clone(&pod),
        ports: OnceLock::new(),
    });
    let mut server = Server::new()
        .add_listener(Listener::new(calls))
        .register_service(agent_ttrpc::create_agent(service));
    server.start().await.context("serve ttrpc")?;
    say_ready()
        .await
        .with_context(|| format!("tell the host on vsock port {READY_PORT}"))?;
    let forwarder = Arc::new(Forwarder::new(pod.network()));
    tokio::spawn(async move {
        loop {
            let connection = forwards.next().await;
            let forwarder = Arc::clone(&forwarder);
            tokio::spawn(async move { forwarder.serve(connection).await });
        }
    });
    if debug::is_allowed() {
        let shells = HostOnly(listen(DEBUG_PORT)?);
        let shell = Arc::new(Shell::new(pod.reaper()));
        tokio::spawn(async move {
            loop {
                let connection = shells.next().await;
                let shell = Arc::clone(&shell);
                tokio::spawn(async move { shell.serve(connection).await });
            }
        });
    }
    loop {
        let connection = streams.next().await;
        let pod = Arc::clone(&pod);
        tokio::spawn(async move {
            let _ = tokio::time::timeout(HEADER_PATIENCE, take_stream(pod, connection)).await;
        });
    }
}

async fn say_ready() -> std::io::Result<()> {
    let mut host = VsockStream::connect(VsockAddr::new(VMADDR_CID_HOST, READY_PORT)).await?;
    host.write_all(format!("ready {VERSION}\n").as_bytes())
        .await?;
    host.shutdown(std::net::Shutdown::Write)
}

/// Reads a stream's header and hands the connection to the process.
async fn take_stream(pod: Arc<Pod>, mut connection: VsockStream) -> Option<()> {
    let mut line = read_line(&mut connection, STREAM_HEADER_MAX).await?;
    line.push(b'\n');
    let (header, _) = StreamHeader::parse(&line).ok()??;
    pod.connect(&header, connection);
    Some(())
}

/// A listener that drops every connection which is not the host's.
struct HostOnly(VsockListener);

impl HostOnly {
    /// The next connection. A port is never given up: a container could take it over.
    async fn next(&self) -> VsockStream {
        loop {
            match self.accept().await {
                Ok(connection) => return connection,
                Err(_) => tokio::time::sleep(EXHAUSTED).await,
            }
        }
    }

    async fn accept(&self) -> std::io::Result<VsockStream> {
        std::future::poll_fn(|context| self.poll(context)).await
    }

    fn poll(&self, context: &mut TaskContext<'_>) -> Poll<std::io::Result<VsockStream>> {
        loop {
            match self.0.poll_accept(context) {
                Poll::Ready(Ok((connection, from))) if from.cid() == VMADDR_CID_HOST => {
                    return Poll::Ready(Ok(connection));
                }
                Poll::Ready(Ok(_)) => {}
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Pending => return Poll::Pending,
            }
        }
    }
}

impl Stream for HostOnly {
    type Item = std::io::Result<VsockStream>;

    fn poll_next(self: Pin<&mut Self>, context: &mut TaskContext<'_>) -> Poll<Option<Self::Item>> {
        self.poll(context).map(Some)
    }
}

struct Service {
    pod: Arc<Pod>,
    ports: OnceLock<Watcher>,
}

type Answer<T> = ttrpc::Result<T>;

fn answer<T>(result: Result<T, Error>) -> Answer<T> {
    result.map_err(|error| ttrpc::Error::from(&error))
}

/// Runs work that must not stop half-way when the caller's connection breaks.
async fn to_the_end<T: Send + 'static>(
    work: impl Future<Output = Result<T, Error>> + Send + 'static,
) -> Answer<T> {
    let done = tokio::spawn(work).await;
    answer(done.unwrap_or_else(|error| Err(Error::State(format!("the agent's task: {error}")))))
}

fn wait_response(exit: Exit) -> WaitResponse {
    WaitResponse {
        exit_status: exit.reaped.status,
        ended_ago_ns: match exit.reaped.at {
            0 => 0,
            at => now().saturating_sub(at).max(0).cast_unsigned(),
        },
        oom_killed: exit.oom,
        pid: exit.pid,
        ..Default::default()
    }
}

fn process_response(pid: u32) -> ProcessResponse {
    ProcessResponse {
        pid,
        ..Default::default()
    }
}

#[async_trait]
impl Agent for Service {
    async fn create_container(
        &self,
        _: &TtrpcContext,
        request: CreateContainerRequest,
    ) -> Answer<ProcessResponse> {
        let pid = to_the_end(Arc::clone(&self.pod).create(request)).await?;
        Ok(process_response(pid))
    }

    async fn create_exec(&self, _: &TtrpcContext, request: CreateExecRequest) -> Answer<Empty> {
        answer(self.pod.create_exec(&request))?;
        Ok(Empty::new())
    }

    async fn start(&self, _: &TtrpcContext, request: ProcessRequest) -> Answer<ProcessResponse> {
        let pod = Arc::clone(&self.pod);
        let pid = to_the_end(pod.start(request.container, request.exec_id)).await?;
        Ok(process_response(pid))
    }

    async fn wait(&self, _: &TtrpcContext, request: ProcessRequest) -> Answer<WaitResponse> {
        let exit = answer(self.pod.wait(&request.container, &request.exec_id).await)?;
        Ok(wait_response(exit))
    }

    async fn signal(&self, _: &TtrpcContext, request: SignalRequest) -> Answer<Empty> {
        let SignalRequest {
            container,
            exec_id,
            signal,
            all,
            ..
        } = request;
        answer(self.pod.signal(&container, &exec_id, signal, all))?;
        Ok(Empty::new())
    }

    async fn delete(&self, _: &TtrpcContext, request: ProcessRequest) -> Answer<WaitResponse> {
        let pod = Arc::clone(&self.pod);
        let exit = to_the_end(pod.delete(request.container, request.exec_id)).await?;
        Ok(wait_response(exit))
    }

    async fn resize_pty(&self, _: &TtrpcContext, request: ResizePtyRequest) -> Answer<Empty> {
        let ResizePtyRequest {
            container,
            exec_id,
            width,
            height,
            ..
        } = request;
        answer(self.pod.resize(&container, &exec_id, width, height))?;
        Ok(Empty::new())
    }

    async fn close_stdin(&self, _: &TtrpcContext, request: ProcessRequest) -> Answer<Empty> {
        answer(self.pod.close_stdin(&request.container, &request.exec_id))?;
        Ok(Empty::new())
    }

    async fn list_pids(
        &self,
        _: &TtrpcContext,
        request: ContainerRequest,
    ) -> Answer<ListPidsResponse> {
        Ok(ListPidsResponse {
            pids: answer(self.pod.pids(&request.container))?,
            ..Default::default()
        })
    }

    async fn list(&self, _: &TtrpcContext, _: Empty) -> Answer<ListResponse> {
        Ok(self.pod.list())
    }

    async fn stats(&self, _: &TtrpcContext, request: ContainerRequest) -> Answer<StatsResponse> {
        let path = match request.container.as_str() {
            "" => PODS.into(),
            container => answer(self.pod.cgroup_path(container))?,
        };
        Ok(crate::stats::collect(&path))
    }

    async fn pause(&self, _: &TtrpcContext, request: ContainerRequest) -> Answer<Empty> {
        let path = answer(self.pod.cgroup_path(&request.container))?;
        answer(Cgroup::freeze(&path, true).await)?;
        Ok(Empty::new())
    }

    async fn resume(&self, _: &TtrpcContext, request: ContainerRequest) -> Answer<Empty> {
        let path = answer(self.pod.cgroup_path(&request.container))?;
        answer(Cgroup::freeze(&path, false).await)?;
        Ok(Empty::new())
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateRequest) -> Answer<Empty> {
        answer(self.pod.update(&request.container, &request.resources))?;
        Ok(Empty::new())
    }

    async fn set_network(&self, _: &TtrpcContext, request: SetNetworkRequest) -> Answer<Empty> {
        answer(self.pod.network().set(&request))?;
        Ok(Empty::new())
    }

    async fn watch_ports(
        &self,
        _: &TtrpcContext,
        request: WatchPortsRequest,
    ) -> Answer<WatchPortsResponse> {
        let watcher = self.ports.get_or_init(|| Watcher::new(self.pod.network()));
        answer(watcher.watch(request.generation).await)
    }

    async fn grow(&self, _: &TtrpcContext, request: GrowRequest) -> Answer<GrowResponse> {
        to_the_end(async move { crate::growth::grow(&request).await }).await
    }

    async fn shutdown(&self, _: &TtrpcContext, _: Empty) -> Answer<Empty> {
        tokio::spawn(power::shut_down(self.pod.reaper()));
        Ok(Empty::new())
    }
}
