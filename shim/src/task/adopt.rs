//! Taking over: a new shim finds the pod that another one ran, by its state folder and the agent's word.
//!
//! Calls that had no answer come again (`keeper`). What they wanted may be done already, half or whole: a half-made container is
//! taken back and made anew, and the first Create, Exec or Start of something that is there is answered as done. The Delete of the last
//! container is answered also when the pod is gone, by what the keeper has kept of it.

use std::{collections::HashMap, sync::Arc, time::Duration};

use bulkhead_protocol::{
    agent::{self, Phase as GuestPhase},
    id,
    limits::{CONTAINERS_MAX, EXECS_MAX},
};
use tokio::time::{Instant, sleep};

use super::{
    CALL, Service, Shared, answer,
    container::{Container, Made, process_request},
    error::Error,
    life::{KILLED, kill_in_guest, killed},
    process::Process,
    record::{Record, Saved},
};
use crate::{
    sandbox::{self, Pod, deadline, network, vsock},
    sandbox_api::Asked,
    stdio::{Io, Keep},
};

/// How long what a shim before has opened waits for the call that it was opened for.
const COME_AGAIN: Duration = Duration::from_secs(60);
/// How long a half-made container may be busy.
const TAKE_BACK: Duration = Duration::from_secs(20);
/// How long to wait before a half-made container is asked for again.
const BUSY: Duration = Duration::from_millis(100);

impl Service {
    /// Takes over from a shim that died. An error means that it cannot be.
    pub async fn adopt(&self) -> Result<(), sandbox::Error> {
        let adopted = self.0.adopt().await;
        let kept = self.0.kept.clone();
        tokio::spawn(async move {
            // The calls that they were opened for come again, if anybody still waits for their answers.
            sleep(COME_AGAIN).await;
            kept.forget_the_rest();
        });
        adopted
    }
}

/// What the agent knows: phases by container and exec.
type Known = HashMap<(String, String), GuestPhase>;

impl Shared {
    async fn adopt(self: &Arc<Self>) -> Result<(), sandbox::Error> {
        self.state().sandbox = Asked::load();
        if let Some(record) = Record::kept(&self.kept) {
            tracing::warn!(container = record.id, "the pod was being removed");
            {
                let mut state = self.state();
                (state.over, state.last) = (true, Some(record));
            }
            return Pod::remove(&self.pods, &self.namespace, &self.pod_id).await;
        }
        let timeline = self.timeline.clone();
        let found = Pod::adopt(&self.pods, &self.namespace, &self.pod_id, timeline).await?;
        let Some((pod, ready)) = found else {
            tracing::info!("there was no machine yet");
            return Ok(());
        };
        let records = Record::all(pod.dir());
        {
            let mut state = self.state();
            for record in &records {
                state.trees.restore(&record.trees);
            }
            state.trees.skip();
            state.pod = Some(pod.clone());
        }
        let _awake = self.awake().await;
        for record in &records {
            if record.made.is_none() {
                self.take_back(&pod, record).await;
            }
        }
        let known = known(&pod).await?;
        self.take_back_execs(&pod, &records, &known).await;
        for record in records {
            if let Some(made) = record.made {
                let (trees, hooks) = (record.trees, record.hooks);
                let init = made.processes.iter().find(|p| p.exec_id.is_empty());
                let Some(init) = init else { continue };
                let init = Process::new("", init.paths.clone());
                let in_guest = Made {
                    trees,
                    hooks,
                    cpus: made.cpus,
                    init_pid: made.init_pid,
                    host_pid: record.host_pid,
                };
                pod.growth().restore_claim(&record.id, made.claim);
                let container =
                    Container::new(&record.id, record.bundle, pod.clone(), init, in_guest);
                container.set_paused(made.paused);
                // One may have been on its way.
                container.set_signalled();
                container.recover();
                self.state().containers.insert(record.id, container.clone());
                for saved in made.processes {
                    self.take_over(&container, saved, &known).await;
                }
                container.save();
            }
        }
        self.watch_machine(&pod);
        network::follow::start(&pod, pod.network());
        if ready.port_forward {
            network::forward::start(&pod, pod.network());
        }
        if let Err(error) = pod.update_network().await {
            tracing::error!(%error, "the network after the shim's death");
        }
        tracing::warn!(
            vmm = pod.pid(),
            containers = self.state().containers.len(),
            "took the pod over"
        );
        Ok(())
    }

    /// Takes over a process: its streams go on, its end is waited for, or told if it was not.
    async fn take_over(self: &Arc<Self>, container: &Arc<Container>, saved: Saved, known: &Known) {
        let exec = saved.exec_id.as_str();
        let process = match exec {
            "" => container.init.clone(),
            _ => Process::new(exec, saved.paths.clone()),
        };
        let phase = known.get(&(container.id.clone(), exec.to_owned()));
        if phase.is_none() && !exec.is_empty() {
            return; // Deleted in the guest; what was asked is done.
        }
        if !exec.is_empty() && container.add_exec(process.clone()).is_err() {
            return;
        }
        let keep = Keep::new(&self.kept, &container.id, exec);
        let io = Io::restore(&saved.paths, keep).await;
        if saved.ended.is_none() || io.is_restored() {
            let socket = container.pod.vsock();
            let connect = |kind| vsock::connect_stream(&socket, &container.id, exec, kind);
            match io.start(connect).await {
                Ok(pumps) => process.set_pumps(pumps),
                Err(error) => {
                    tracing::error!(container = container.id, exec, %error, "its streams are lost");
                }
            }
        }
        process.recover();
        match (saved.ended, phase) {
            (Some(ended), _) => {
                process.stop(ended.exit());
                if ended.told {
                    process.set_told();
                } else {
                    self.tell_exit(container, &process, &ended.exit());
                }
            }
            // The container was being deleted.
            (None, None) => drop(process.stop(killed(KILLED))),
            (None, Some(GuestPhase::CREATED)) if exec.is_empty() => {
                // It may have been killed.
                self.watch(container.clone(), process);
            }
            (None, Some(GuestPhase::CREATED)) => {}
            (None, Some(_)) => {
                process.begin_start();
                process.begin_stdin();
                process.started();
                self.watch_again(container.clone(), process);
            }
        }
    }

    /// Execs that the guest has and nobody has noted go: their Exec comes again.
    async fn take_back_execs(&self, pod: &Pod, records: &[Record], known: &Known) {
        let end = Instant::now() + CALL;
        for (container, exec) in known.keys().filter(|(_, exec)| !exec.is_empty()) {
            let record = records.iter().find(|record| record.id == *container);
            let Some(made) = record.and_then(|record| record.made.as_ref()) else {
                continue;
            };
            if made.processes.iter().any(|saved| saved.exec_id == *exec) {
                continue;
            }
            let request = process_request(container, exec);
            if let Ok(agent) = pod.agent()
                // As many as it likes to name are not waited for one after another.
                && let rest = end.saturating_duration_since(Instant::now())
                && let Err(error) = agent.delete(deadline(rest), &request).await
            {
                tracing::warn!(container, exec, %error, "a half-made exec stays in the guest");
            }
        }
    }

    /// A container that was being made goes: its Create comes again.
    async fn take_back(&self, pod: &Arc<Pod>, record: &Record) {
        tracing::warn!(container = record.id, "half made: taken back");
        let result = async {
            let end = Instant::now() + TAKE_BACK;
            while known_raw(pod)
                .await?
                .containers
                .iter()
                .any(|c| c.container == record.id && c.busy)
                && Instant::now() < end
            {
                sleep(BUSY).await;
            }
            let agent = pod.agent()?;
            if kill_in_guest(agent, &record.id, CALL).await {
                let request = process_request(&record.id, "");
                let deleted = agent.delete(deadline(CALL), &request).await;
                answer(pod, deleted).await?;
            }
            Ok::<(), Error>(())
        };
        if let Err(error) = result.await {
            tracing::error!(container = record.id, %error, "a half-made container stays in the guest");
        }
        // Not all of them were handed over.
        self.release_trees(Some(pod), &record.trees).await;
        pod.remove_pid(record.host_pid).await;
        record.hooks.poststop().await;
        Record::forget(pod.dir(), &record.id);
    }
}

async fn known_raw(pod: &Pod) -> Result<agent::ListResponse, sandbox::Error> {
    let listed = pod
        .agent()?
        .list(deadline(CALL), &agent::Empty::new())
        .await;
    listed.map_err(|e| sandbox::Error::Lost(format!("the agent, which does not answer ({e})")))
}

async fn known(pod: &Pod) -> Result<Known, sandbox::Error> {
    Ok(believed(known_raw(pod).await?))
}

/// As much of the agent's list as a pod can hold: ids are copied for each process, and each is looked at.
fn believed(list: agent::ListResponse) -> Known {
    let containers = list.containers.into_iter().take(CONTAINERS_MAX);
    let containers = containers.filter(|container| id::is_valid(&container.container));
    let processes = containers.flat_map(|container| {
        let id = container.container;
        // Its init and its execs.
        let processes = container.processes.into_iter().take(EXECS_MAX + 1);
        processes
            .filter(|process| process.exec_id.is_empty() || id::is_valid(&process.exec_id))
            .map(move |process| {
                let phase = process.phase.enum_value_or_default();
                ((id.clone(), process.exec_id), phase)
            })
    });
    processes.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listed(id: &str, execs: usize) -> agent::ListedContainer {
        let mut container = agent::ListedContainer::new();
        container.container = id.into();
        container.processes = (0..execs)
            .map(|number| {
                let mut process = agent::ListedProcess::new();
                process.exec_id = format!("x{number}");
                process
            })
            .collect();
        container
    }

    #[test]
    fn a_list_of_the_agents_is_believed_as_far_as_a_pod_can_be() {
        let mut list = agent::ListResponse::new();
        // Its id would be copied for each of its processes.
        list.containers.push(listed(&"a".repeat(2 << 20), 100_000));
        list.containers.push(listed("../a", 1));
        list.containers.push(listed("c", 100_000));
        list.containers
            .extend((0..1000).map(|number| listed(&format!("c{number}"), 1)));
        let known = believed(list);
        assert!(known.keys().all(|(container, _)| id::is_valid(container)));
        assert!(
            known.len() < EXECS_MAX + 1 + CONTAINERS_MAX,
            "{}",
            known.len()
        );
        assert!(known.contains_key(&("c".to_owned(), "x0".to_owned())));
    }
}
