//! Containers of a pod: what kubelet asks for each, and what it reads.

use std::time::Duration;

use bulkhead_harness::{Context, Image, Outcome};
use k8s_cri::v1::{self, ContainerConfig, LinuxContainerResources, Mount};

use crate::{Failure, Said, Sandbox, call, spec};

/// A container's configuration with the least that kubelet gives.
pub fn config(name: &str, image: Image, command: &[&str]) -> ContainerConfig {
    let mut config = ContainerConfig {
        metadata: Some(v1::ContainerMetadata {
            name: name.into(),
            attempt: 0,
        }),
        image: Some(spec(image)),
        command: command.iter().map(|&word| word.into()).collect(),
        log_path: format!("{name}.log"),
        ..Default::default()
    };
    // Processes of its own, as the pod's other containers have.
    security(&mut config).namespace_options = Some(v1::NamespaceOption {
        pid: v1::NamespaceMode::Container.into(),
        ..Default::default()
    });
    config
}

/// A shell script as a container of busybox.
pub fn shell(name: &str, script: &str) -> ContainerConfig {
    config(name, Image::Busybox, &["sh", "-c", script])
}

/// The part of a container's configuration that says what it may.
pub fn security(config: &mut ContainerConfig) -> &mut v1::LinuxContainerSecurityContext {
    let linux = config.linux.get_or_insert_default();
    linux.security_context.get_or_insert_default()
}

/// The part that says how much it may have.
pub fn resources(config: &mut ContainerConfig) -> &mut LinuxContainerResources {
    let linux = config.linux.get_or_insert_default();
    linux.resources.get_or_insert_default()
}

/// A mount of a path of the host.
pub fn mount(from: &std::path::Path, to: &str, readonly: bool) -> Mount {
    Mount {
        container_path: to.into(),
        host_path: from.to_string_lossy().into_owned(),
        readonly,
        ..Default::default()
    }
}

impl Sandbox<'_> {
    /// CreateContainer.
    pub fn create(&self, config: ContainerConfig) -> Outcome<String> {
        let request = v1::CreateContainerRequest {
            pod_sandbox_id: self.id.clone(),
            config: Some(config),
            sandbox_config: Some(self.config.clone()),
        };
        Ok(call!(self.cri, create_container, request)?.container_id)
    }

    /// StartContainer.
    pub fn begin(&self, container: &str) -> Outcome {
        let request = v1::StartContainerRequest {
            container_id: container.into(),
        };
        call!(self.cri, start_container, request).map(drop)
    }

    /// Both.
    pub fn launch(&self, config: ContainerConfig) -> Outcome<String> {
        let id = self.create(config)?;
        self.begin(&id)?;
        Ok(id)
    }

    /// ContainerStatus.
    pub fn status(&self, container: &str) -> Outcome<v1::ContainerStatus> {
        let request = v1::ContainerStatusRequest {
            container_id: container.into(),
            verbose: false,
        };
        let status = call!(self.cri, container_status, request)?.status;
        status.context("no status")
    }

    /// Its status once it has ended.
    pub fn wait(&self, container: &str) -> Outcome<v1::ContainerStatus> {
        let end = std::time::Instant::now() + self.cri.limit;
        loop {
            let status = self.status(container)?;
            if status.state() == v1::ContainerState::ContainerExited {
                return Ok(status);
            }
            if std::time::Instant::now() > end {
                return Err(format!("{container} does not end: {status:?}").into());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// StopContainer with a grace period in seconds.
    pub fn stop(&self, container: &str, grace: i64) -> Outcome {
        let request = v1::StopContainerRequest {
            container_id: container.into(),
            timeout: grace,
        };
        call!(self.cri, stop_container, request).map(drop)
    }

    /// ExecSync of a shell script; it must succeed.
    pub fn sh(&self, container: &str, script: &str) -> Outcome<String> {
        let said = self.exec(container, &["sh", "-c", script])?;
        match said.code {
            0 => Ok(said.stdout),
            _ => Err(format!("{script}: {said:?}").into()),
        }
    }

    /// ExecSync with a limit in seconds.
    pub fn exec_within(&self, container: &str, command: &[&str], limit: i64) -> Outcome<Said> {
        let request = v1::ExecSyncRequest {
            container_id: container.into(),
            cmd: command.iter().map(|&word| word.into()).collect(),
            timeout: limit,
        };
        Ok(Said::of(call!(self.cri, exec_sync, request)?))
    }

    /// Exec: where containerd's streaming server serves it.
    pub fn exec_url(&self, container: &str, command: &[&str], tty: bool) -> Outcome<String> {
        let request = v1::ExecRequest {
            container_id: container.into(),
            cmd: command.iter().map(|&word| word.into()).collect(),
            tty,
            stdin: true,
            stdout: true,
            stderr: !tty,
        };
        Ok(call!(self.cri, exec, request)?.url)
    }

    /// Attach: the same.
    pub fn attach_url(&self, container: &str) -> Outcome<String> {
        let request = v1::AttachRequest {
            container_id: container.into(),
            stdin: true,
            tty: false,
            stdout: true,
            stderr: true,
        };
        Ok(call!(self.cri, attach, request)?.url)
    }

    /// ReopenContainerLog, after the file was renamed.
    pub fn reopen_log(&self, container: &str) -> Outcome {
        let request = v1::ReopenContainerLogRequest {
            container_id: container.into(),
        };
        call!(self.cri, reopen_container_log, request).map(drop)
    }

    /// UpdateContainerResources.
    pub fn update(&self, container: &str, linux: LinuxContainerResources) -> Outcome {
        let request = v1::UpdateContainerResourcesRequest {
            container_id: container.into(),
            linux: Some(linux),
            ..Default::default()
        };
        call!(self.cri, update_container_resources, request).map(drop)
    }

    /// ContainerStats.
    pub fn stats(&self, container: &str) -> Outcome<v1::ContainerStats> {
        let request = v1::ContainerStatsRequest {
            container_id: container.into(),
        };
        let stats = call!(self.cri, container_stats, request)?.stats;
        stats.context("no stats")
    }

    /// The pod in ListPodSandboxStats.
    pub fn pod_stats(&self) -> Outcome<v1::LinuxPodSandboxStats> {
        let request = v1::ListPodSandboxStatsRequest::default();
        let all = call!(self.cri, list_pod_sandbox_stats, request)?.stats;
        let mine = all
            .into_iter()
            .find(|pod| pod.attributes.as_ref().is_some_and(|a| a.id == self.id));
        mine.and_then(|pod| pod.linux)
            .context("no stats of the pod")
    }

    /// StartContainer of several and StopPodSandbox, all at the same time. The pod's stop must succeed; of the starts some may not.
    pub fn stop_while_starting(&self, containers: &[String]) -> Outcome {
        let cri = self.cri;
        let limit = cri.limit;
        let stopped = cri.runtime.block_on(async {
            let mut starts = tokio::task::JoinSet::new();
            for container in containers {
                let mut client = cri.client.clone();
                let mut request = tonic::Request::new(v1::StartContainerRequest {
                    container_id: container.clone(),
                });
                request.set_timeout(limit);
                starts.spawn(async move { client.start_container(request).await.is_ok() });
            }
            let mut client = cri.client.clone();
            let mut request = tonic::Request::new(v1::StopPodSandboxRequest {
                pod_sandbox_id: self.id.clone(),
            });
            request.set_timeout(limit);
            let stopped = client.stop_pod_sandbox(request).await;
            while starts.join_next().await.is_some() {}
            stopped
        });
        stopped
            .map(drop)
            .map_err(|status| Failure::Failed(format!("stop_pod_sandbox: {}", status.message())))
    }
}
