//! A pod that runs already: taken over by a new shim from its state folder.
//!
//! `pod.json` says `ready` once the machine is. Without that the shim died while the machine booted: then what there is goes, and the call
//! that wanted it is made again.

use std::{io, path::Path, sync::Arc};

use super::{
    Error, Pod, control,
    machine::Size,
    network::{Network, namespace::Namespace},
    record::{Book, Ready, Record},
    spawn::Helper,
    state::{self, ProcessId},
    state_error,
    timeline::Timeline,
    uplink, wipe,
};

impl Pod {
    /// Notes that the machine is ready, and what another shim would have to know.
    pub fn save(&self, port_forward: bool) {
        let ready = Ready {
            network: self.network.namespace().path().map(Path::to_owned),
            port_forward,
            sizing: self.growth.sizing(),
        };
        self.book.change(|record| record.ready = Some(ready));
    }

    /// Notes the size that the machine has now.
    pub fn save_size(&self) {
        let size = self.size();
        self.book.change(|record| {
            record.vcpus = size.vcpus;
            record.memory_mib = size.memory_mib;
        });
    }

    /// The pod `namespace`/`id` in the folder `state` that another shim has left; none if there is no machine that was ready.
    pub async fn adopt(
        state: &Path,
        namespace: &str,
        id: &str,
        timeline: Arc<Timeline>,
    ) -> Result<Option<(Arc<Self>, Ready)>, Error> {
        let dir = state::pod_dir(state, namespace, id)?;
        let record = match Record::load(&dir) {
            Ok(record) => Some(record),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            // A pod may run all the same.
            Err(source) => return Err(state_error(&dir)(source)),
        };
        let Some((record, ready)) = record.and_then(|r| Some((r.clone(), r.ready?))) else {
            wipe(&dir).map_err(state_error(&dir))?;
            return Ok(None);
        };
        let pod = Self::adopt_in(record, &ready, &dir, timeline).await?;
        Ok(Some((pod, ready)))
    }

    /// Removes what is left of a pod that was being removed.
    pub async fn remove(state: &Path, namespace: &str, id: &str) -> Result<(), Error> {
        let dir = state::pod_dir(state, namespace, id)?;
        let wiped = tokio::task::spawn_blocking(move || wipe(&dir).map_err(state_error(&dir)));
        wiped.await.unwrap_or(Ok(()))
    }

    async fn adopt_in(
        record: Record,
        ready: &Ready,
        dir: &Path,
        timeline: Arc<Timeline>,
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
        let namespace = Namespace::of_process(pid, ready.network.clone())
            .map_err(|_| Error::Lost("vmm.pid".into()))?;
        let network = Network::adopt(
            namespace,
            dir,
            control.clone(),
            record.engine,
            ready.sizing.start.vcpus,
        )?;
        network.set_vmm(pid);
        let (uplink, theirs) = uplink::pair().map_err(state_error(dir))?;
        control.request(control::op("uplink"), vec![theirs]).await?;
        // It was ready long ago.
        drop(uplink.serve(network.clone()));
        let size = Size {
            vcpus: record.vcpus,
            memory_mib: record.memory_mib,
        };
        let of = (format!("{}/{}", record.namespace, record.id), record.engine);
        let helpers = [(vmm, vmm_id), (fs, fs_id)];
        let noted = (timeline, Arc::new(Book::adopt(dir, record)));
        let pod = Self::watched(of, dir, ready.sizing, control, network, helpers, noted);
        pod.growth.restore(size);
        pod.rest.doubt();
        let _awake = pod.rest.wake().await;
        pod.connect_agent().await?;
        Ok(Arc::new(pod))
    }
}
