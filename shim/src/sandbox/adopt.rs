//! A pod that runs already: taken over by a new shim from its state folder.
//!
//! `pod.json` is written once the machine is ready. Without it the shim died while the machine booted: then what there is goes, and the call
//! that wanted it is made again.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
};

use bulkhead_protocol::{agent_ttrpc::AgentClient, limits::AGENT_PORT};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::{
    Error, Life, Pod, control,
    machine::Size,
    network::{Network, namespace::Namespace, note},
    ready_limit,
    spawn::Helper,
    state::{self, ProcessId},
    state_error, vsock, watch_helpers,
};
use crate::config::Config;

/// Its name.
const FILE: &str = "pod.json";

/// What a new shim must know of a pod beside what is in the other files.
#[derive(Debug, Serialize, Deserialize)]
pub struct Record {
    /// The machine's.
    pub size: Size,
    /// Where the network namespace was found, if it outlives the pod.
    pub network: Option<PathBuf>,
    /// Whether ports are forwarded.
    pub port_forward: bool,
}

impl Record {
    fn load(dir: &Path) -> Option<Self> {
        serde_json::from_slice(&fs::read(dir.join(FILE)).ok()?).ok()
    }
}

impl Pod {
    /// Notes that the machine is ready, and what another shim would have to know.
    pub fn save(&self, port_forward: bool) -> Result<(), Error> {
        let record = Record {
            size: self.size,
            network: self.network.namespace().path().map(Path::to_owned),
            port_forward,
        };
        let text = serde_json::to_string(&record).map_err(io::Error::other);
        text.and_then(|text| state::replace_private(&self.dir.join(FILE), &text))
            .map_err(state_error(&self.dir))
    }

    /// The pod `namespace`/`id` that another shim has left; none if there is no machine that was ready.
    pub async fn adopt(
        config: &Config,
        namespace: &str,
        id: &str,
    ) -> Result<Option<(Arc<Self>, Record)>, Error> {
        let dir = state::pod_dir(&config.state, namespace, id)?;
        if !dir.exists() {
            return Ok(None);
        }
        let Some(record) = Record::load(&dir) else {
            state::kill_children(&dir);
            note::clean(&dir);
            state::remove_dir(&dir).map_err(state_error(&dir))?;
            return Ok(None);
        };
        let pod = Self::adopt_in(config, format!("{namespace}/{id}"), &dir, &record).await?;
        Ok(Some((pod, record)))
    }

    async fn adopt_in(
        config: &Config,
        name: String,
        dir: &Path,
        record: &Record,
    ) -> Result<Arc<Self>, Error> {
        let helper = |file: &str| -> Result<(Helper, ProcessId), Error> {
            let path = dir.join(file);
            let id = ProcessId::load(&path).ok_or_else(|| Error::Lost(file.into()))?;
            let helper = Helper::adopt(id).map_err(|_| Error::Lost(file.into()))?;
            Ok((helper, id))
        };
        let (vmm, vmm_id) = helper("vmm.pid")?;
        let (fs, fs_id) = helper("fs.pid")?;
        let control = control::Client::new(dir.join("control.sock"));
        let pid = vmm_id.pid.unsigned_abs();
        let namespace = Namespace::of_process(pid, record.network.clone())
            .map_err(|_| Error::Lost("vmm.pid".into()))?;
        let network = Network::adopt(
            namespace,
            dir,
            control.clone(),
            config.engine,
            record.size.vcpus,
        )?;
        network.set_vmm(pid);
        let (tx, life) = watch::channel(Life::Runs);
        tokio::spawn(watch_helpers(
            (vmm, vmm_id),
            (fs, fs_id),
            dir.to_owned(),
            network.clone(),
            tx,
        ));
        let pod = Self {
            name,
            dir: dir.to_owned(),
            vmm: vmm_id,
            size: record.size,
            agent: OnceLock::new(),
            control,
            files: control::Client::new(dir.join("fs.sock")),
            network,
            life,
            ready_limit: ready_limit(config.engine),
        };
        let stream = vsock::connect(&pod.vsock(), AGENT_PORT)
            .await
            .map_err(Error::Agent)?;
        let socket = ttrpc::r#async::transport::Socket::from(stream);
        let client = AgentClient::new(ttrpc::r#async::Client::new(socket));
        let _ = pod.agent.set(client);
        Ok(Arc::new(pod))
    }
}
