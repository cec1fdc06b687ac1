//! A client of CRI (the Kubernetes container runtime interface, v1) for the tests: it does to the suite's containerd what
//! kubelet does to a node's. Pods and containers go with their values, as with the harness's `Pod`.

use std::{path::Path, time::Duration};

use bulkhead_harness::{Context, Failure, Image, Outcome, Suite};
use k8s_cri::v1::{
    self, image_service_client::ImageServiceClient, runtime_service_client::RuntimeServiceClient,
};
use tonic::transport::{Channel, Endpoint};

pub mod container;
pub mod forward;
pub mod stream;

pub use k8s_cri::v1::{
    ContainerConfig, ContainerState, DnsConfig, Int64Value, KeyValue, LinuxContainerResources,
    NamespaceMode, NamespaceOption, PodSandboxConfig, PortMapping, SecurityProfile,
};

/// The runtime handler that the suite's containerd has for the runtime under test.
pub const HANDLER: &str = "suite";

/// A connection to containerd.
#[derive(Debug)]
pub struct Cri {
    runtime: tokio::runtime::Runtime,
    client: RuntimeServiceClient<Channel>,
    cgroup: String,
    limit: Duration,
}

/// A call of the client's, with a time limit.
macro_rules! call {
    ($cri:expr, $method:ident, $request:expr) => {{
        let mut request = tonic::Request::new($request);
        request.set_timeout($cri.limit);
        let mut client = $cri.client.clone();
        $cri.runtime
            .block_on(client.$method(request))
            .map(tonic::Response::into_inner)
            .map_err(|status| {
                Failure::Failed(format!(
                    "{}: {:?}: {}",
                    stringify!($method),
                    status.code(),
                    status.message()
                ))
            })
    }};
}
use call;

impl Cri {
    /// Connects to the suite's containerd and waits until its CRI plugin knows the images.
    pub fn connect(suite: &Suite, images: &[Image]) -> Outcome<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("start a runtime")?;
        let channel = runtime.block_on(connect(&suite.address()))?;
        let cri = Self {
            client: RuntimeServiceClient::new(channel.clone()),
            runtime,
            cgroup: format!("/{}", suite.namespace()),
            limit: suite.scale.seconds(60),
        };
        make_cgroup(suite.namespace());
        for image in images {
            let image = Some(spec(*image));
            let end = std::time::Instant::now() + suite.scale.seconds(10);
            loop {
                let request = v1::ImageStatusRequest {
                    image: image.clone(),
                    ..Default::default()
                };
                let mut client = ImageServiceClient::new(channel.clone());
                let answer = cri.runtime.block_on(client.image_status(request));
                if answer.is_ok_and(|answer| answer.into_inner().image.is_some()) {
                    break;
                }
                if std::time::Instant::now() > end {
                    return Err(format!("CRI does not know {image:?}").into());
                }
                std::thread::sleep(Duration::from_millis(50));
            }
        }
        Ok(cri)
    }

    /// A pod's configuration with the least that kubelet gives.
    pub fn config(&self, name: &str) -> PodSandboxConfig {
        PodSandboxConfig {
            metadata: Some(v1::PodSandboxMetadata {
                name: name.into(),
                uid: format!("uid-{name}"),
                namespace: "default".into(),
                attempt: 0,
            }),
            hostname: name.into(),
            linux: Some(v1::LinuxPodSandboxConfig {
                cgroup_parent: self.cgroup.clone(),
                security_context: Some(v1::LinuxSandboxSecurityContext {
                    namespace_options: Some(v1::NamespaceOption {
                        pid: v1::NamespaceMode::Container.into(),
                        ..Default::default()
                    }),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    /// The same in the host's network.
    pub fn on_host_network(mut config: PodSandboxConfig) -> PodSandboxConfig {
        let context = config
            .linux
            .as_mut()
            .and_then(|l| l.security_context.as_mut());
        if let Some(options) = context.and_then(|c| c.namespace_options.as_mut()) {
            options.network = v1::NamespaceMode::Node.into();
        }
        config
    }

    /// RunPodSandbox.
    pub fn run(&self, config: PodSandboxConfig) -> Outcome<Sandbox<'_>> {
        self.run_with(HANDLER, config)
    }

    /// The same with another runtime handler.
    pub fn run_with(&self, handler: &str, config: PodSandboxConfig) -> Outcome<Sandbox<'_>> {
        let request = v1::RunPodSandboxRequest {
            config: Some(config.clone()),
            runtime_handler: handler.into(),
        };
        let id = call!(self, run_pod_sandbox, request)?.pod_sandbox_id;
        Ok(Sandbox {
            cri: self,
            id,
            config,
            gone: false,
        })
    }

    /// RunPodSandbox for several pods at the same time.
    pub fn run_all(&self, configs: Vec<PodSandboxConfig>) -> Vec<Outcome<Sandbox<'_>>> {
        let limit = self.limit;
        let ids = self.runtime.block_on(async {
            let calls = configs.iter().map(|config| {
                let mut client = self.client.clone();
                let mut request = tonic::Request::new(v1::RunPodSandboxRequest {
                    config: Some(config.clone()),
                    runtime_handler: HANDLER.into(),
                });
                request.set_timeout(limit.saturating_mul(4));
                tokio::spawn(async move { client.run_pod_sandbox(request).await })
            });
            let calls: Vec<_> = calls.collect();
            let mut ids = Vec::new();
            for call in calls {
                ids.push(call.await);
            }
            ids
        });
        let sandbox = |(id, config): (_, PodSandboxConfig)| {
            let id: Result<Result<tonic::Response<v1::RunPodSandboxResponse>, tonic::Status>, _> =
                id;
            let id = id.context("the call")?;
            let id = id.map_err(|status| {
                Failure::Failed(format!("run_pod_sandbox: {}", status.message()))
            })?;
            Ok(Sandbox {
                cri: self,
                id: id.into_inner().pod_sandbox_id,
                config,
                gone: false,
            })
        };
        ids.into_iter().zip(configs).map(sandbox).collect()
    }

    /// ListPodSandboxStats: id and bytes received of each pod's default interface.
    pub fn received(&self) -> Outcome<Vec<(String, u64)>> {
        let request = v1::ListPodSandboxStatsRequest::default();
        let stats = call!(self, list_pod_sandbox_stats, request)?.stats;
        Ok(stats
            .into_iter()
            .filter_map(|pod| {
                let network = pod.linux?.network?.default_interface?;
                Some((pod.attributes?.id, network.rx_bytes?.value))
            })
            .collect())
    }
}

/// The pods' parent cgroup, which on a node kubelet makes; it goes with the suite.
fn make_cgroup(name: &str) {
    let root = Path::new("/sys/fs/cgroup");
    let unified = root.join("cgroup.controllers").exists();
    let hierarchies = match unified {
        true => vec![root.to_path_buf()],
        false => std::fs::read_dir(root)
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.path())
            .collect(),
    };
    for hierarchy in hierarchies {
        // It may be there already, and a hierarchy that takes none is no matter.
        let _ = std::fs::create_dir(hierarchy.join(name));
    }
}

async fn connect(socket: &Path) -> Outcome<Channel> {
    let address = format!("unix://{}", socket.display());
    let endpoint = Endpoint::from_shared(address).context("containerd's address")?;
    endpoint.connect().await.context("connect to containerd")
}

fn spec(image: Image) -> v1::ImageSpec {
    v1::ImageSpec {
        image: image.reference(),
        ..Default::default()
    }
}

/// A pod; it is stopped and removed with this value.
#[derive(Debug)]
pub struct Sandbox<'a> {
    cri: &'a Cri,
    id: String,
    config: PodSandboxConfig,
    gone: bool,
}

/// What an exec said.
#[derive(Clone, Debug)]
pub struct Said {
    /// Stdout as text without the end's white space.
    pub stdout: String,
    /// The same of stderr.
    pub stderr: String,
    /// Exit code.
    pub code: i32,
}

impl Said {
    fn of(said: v1::ExecSyncResponse) -> Self {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim_end().to_owned();
        Self {
            stdout: text(&said.stdout),
            stderr: text(&said.stderr),
            code: said.exit_code,
        }
    }
}

impl Sandbox<'_> {
    /// Its id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// CreateContainer and StartContainer.
    pub fn start(&self, name: &str, image: Image, command: &[&str]) -> Outcome<String> {
        self.launch(container::config(name, image, command))
    }

    /// ExecSync.
    pub fn exec(&self, container: &str, command: &[&str]) -> Outcome<Said> {
        self.exec_within(container, command, 0)
    }

    /// The pod's addresses as kubelet learns them.
    pub fn addresses(&self) -> Outcome<Vec<String>> {
        let request = v1::PodSandboxStatusRequest {
            pod_sandbox_id: self.id.clone(),
            ..Default::default()
        };
        let status = call!(self.cri, pod_sandbox_status, request)?.status;
        let network = status.and_then(|s| s.network).context("no network")?;
        let more = network.additional_ips.into_iter().map(|ip| ip.ip);
        Ok(std::iter::once(network.ip).chain(more).collect())
    }

    /// PodSandboxStatus: whether it is ready, and what containerd's runtime adds.
    pub fn state(&self) -> Outcome<(bool, serde_json::Value)> {
        let request = v1::PodSandboxStatusRequest {
            pod_sandbox_id: self.id.clone(),
            verbose: true,
        };
        let answer = call!(self.cri, pod_sandbox_status, request)?;
        let status = answer.status.context("no status")?;
        let ready = status.state() == v1::PodSandboxState::SandboxReady;
        let info = answer.info.get("info").map(String::as_str);
        let info = serde_json::from_str(info.unwrap_or("null")).context("the info")?;
        Ok((ready, info))
    }

    /// PortForward: where containerd's streaming server serves it.
    pub fn forward(&self, port: u16) -> Outcome<String> {
        let request = v1::PortForwardRequest {
            pod_sandbox_id: self.id.clone(),
            port: vec![port.into()],
        };
        Ok(call!(self.cri, port_forward, request)?.url)
    }

    /// The same pod over another connection, after containerd was away.
    pub fn through<'b>(mut self, cri: &'b Cri) -> Sandbox<'b> {
        self.gone = true;
        Sandbox {
            cri,
            id: self.id.clone(),
            config: self.config.clone(),
            gone: false,
        }
    }

    /// StopContainer and RemoveContainer.
    pub fn remove(&self, container: &str) -> Outcome {
        self.stop(container, 1)?;
        let request = v1::RemoveContainerRequest {
            container_id: container.into(),
        };
        call!(self.cri, remove_container, request).map(drop)
    }

    /// StopPodSandbox and RemovePodSandbox, with whatever containers there are.
    pub fn end(mut self) -> Outcome {
        self.gone = true;
        self.undo()
    }

    fn undo(&self) -> Outcome {
        let request = v1::StopPodSandboxRequest {
            pod_sandbox_id: self.id.clone(),
        };
        call!(self.cri, stop_pod_sandbox, request)?;
        let request = v1::RemovePodSandboxRequest {
            pod_sandbox_id: self.id.clone(),
        };
        call!(self.cri, remove_pod_sandbox, request).map(drop)
    }
}

impl Drop for Sandbox<'_> {
    fn drop(&mut self) {
        if !self.gone {
            let _ = self.undo();
        }
    }
}
