//! An agent that is called, and lies.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use async_trait::async_trait;
use bulkhead_protocol::{
    agent::{
        ContainerRequest, CpuStats, CreateContainerRequest, Empty, IoStats, ListPidsResponse,
        ListeningPort, MemoryStats, ProcessRequest, ProcessResponse, SetNetworkRequest,
        SignalRequest, StatsResponse, WaitResponse, WatchPortsRequest, WatchPortsResponse,
    },
    agent_ttrpc::{self, Agent},
    limits::{AGENT_PORT, STREAM_PORT},
};
use futures_core::Stream;
use tokio::{io::AsyncWriteExt, time::sleep};
use tokio_vsock::{VMADDR_CID_ANY, VsockAddr, VsockListener, VsockStream};
use ttrpc::r#async::{Server, TtrpcContext, transport::Listener};

struct Liar(String);

struct Calls(VsockListener);

impl Stream for Calls {
    type Item = std::io::Result<VsockStream>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0
            .poll_accept(context)
            .map(|end| Some(end.map(|(call, _)| call)))
    }
}

/// Serves for ever, and says that it does.
pub async fn serve(attack: &str) {
    let listen = |port| VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, port));
    let (Ok(calls), Ok(streams)) = (listen(AGENT_PORT), listen(STREAM_PORT)) else {
        return;
    };
    let mut server = Server::new()
        .add_listener(Listener::new(Calls(calls)))
        .register_service(agent_ttrpc::create_agent(Arc::new(Liar(attack.to_owned()))));
    if server.start().await.is_err() {
        return;
    }
    super::say_ready().await;
    let flood = attack == "answers_and_output_without_end";
    while let Ok((mut stream, _)) = streams.accept().await {
        tokio::spawn(async move {
            while flood && stream.write_all(&[b'y'; 32 << 10]).await.is_ok() {}
            sleep(Duration::from_secs(1000)).await;
        });
    }
}

impl Liar {
    fn is(&self, attack: &str) -> bool {
        self.0 == attack
    }
}

fn refused(text: String) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(ttrpc::get_status(ttrpc::Code::INTERNAL, text))
}

#[async_trait]
impl Agent for Liar {
    async fn set_network(&self, _: &TtrpcContext, _: SetNetworkRequest) -> ttrpc::Result<Empty> {
        Ok(Empty::new())
    }

    async fn create_container(
        &self,
        _: &TtrpcContext,
        _: CreateContainerRequest,
    ) -> ttrpc::Result<ProcessResponse> {
        for (attack, lines) in [("long_error", 20_000), ("error_of_megabytes", 200_000)] {
            if self.is(attack) {
                return Err(refused("\u{1b}[2J\u{202e}no\n".repeat(lines)));
            }
        }
        if self.is("create_never_answers") {
            sleep(Duration::from_secs(10_000)).await;
        }
        let mut answer = ProcessResponse::new();
        answer.pid = u32::MAX;
        Ok(answer)
    }

    async fn start(&self, _: &TtrpcContext, _: ProcessRequest) -> ttrpc::Result<ProcessResponse> {
        if self.is("gone_at_start") {
            super::restart();
        }
        Ok(ProcessResponse::new())
    }

    async fn wait(&self, _: &TtrpcContext, _: ProcessRequest) -> ttrpc::Result<WaitResponse> {
        if self.is("end_of_nonsense") {
            let mut end = WaitResponse::new();
            end.exit_status = u32::MAX;
            end.ended_ago_ns = u64::MAX;
            end.oom_killed = true;
            end.pid = 1;
            return Ok(end);
        }
        sleep(Duration::from_secs(10_000)).await;
        Err(refused("never".into()))
    }

    async fn signal(&self, _: &TtrpcContext, _: SignalRequest) -> ttrpc::Result<Empty> {
        Ok(Empty::new())
    }

    async fn delete(&self, _: &TtrpcContext, _: ProcessRequest) -> ttrpc::Result<WaitResponse> {
        Err(refused("it stays".into()))
    }

    async fn list_pids(
        &self,
        _: &TtrpcContext,
        _: ContainerRequest,
    ) -> ttrpc::Result<ListPidsResponse> {
        let mut answer = ListPidsResponse::new();
        answer.pids = (0..700_000).collect();
        Ok(answer)
    }

    async fn stats(&self, _: &TtrpcContext, _: ContainerRequest) -> ttrpc::Result<StatsResponse> {
        let mut answer = StatsResponse::new();
        let mut cpu = CpuStats::new();
        (cpu.usage_usec, cpu.user_usec, cpu.system_usec) = (u64::MAX, u64::MAX, u64::MAX);
        answer.cpu = Some(cpu).into();
        let mut memory = MemoryStats::new();
        (memory.usage, memory.usage_limit) = (u64::MAX, 0);
        memory
            .stat
            .extend((0..50_000).map(|n| (format!("key{n}"), u64::MAX)));
        for key in ["workingset_refault_anon", "workingset_refault_file"] {
            memory.stat.insert(key.into(), u64::MAX);
        }
        answer.memory = Some(memory).into();
        let device = |n| {
            let mut io = IoStats::new();
            (io.major, io.minor, io.rbytes) = (n, u64::MAX, u64::MAX);
            io
        };
        answer.io = (0..50_000).map(device).collect();
        Ok(answer)
    }

    async fn watch_ports(
        &self,
        _: &TtrpcContext,
        request: WatchPortsRequest,
    ) -> ttrpc::Result<WatchPortsResponse> {
        let mut answer = WatchPortsResponse::new();
        answer.generation = request.generation.wrapping_add(1);
        let port = |port| {
            let mut listening = ListeningPort::new();
            (listening.port, listening.ipv4, listening.ipv6) = (port, true, true);
            listening
        };
        answer.ports = (0..140_000).map(port).collect();
        Ok(answer)
    }
}
