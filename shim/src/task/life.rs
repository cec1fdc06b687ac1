//! Start, Kill, Delete, and the end of processes and of the machine.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use bulkhead_failpoint::patience;
use bulkhead_protocol::{agent, agent_ttrpc::AgentClient};
use containerd_shim_protos::{
    api::{DeleteResponse, Empty, KillRequest, StartResponse},
    events::task::{TaskDelete, TaskExecStarted, TaskExit, TaskOOM, TaskStart},
};
use protobuf::{MessageField, well_known_types::timestamp::Timestamp};
use tokio::{
    task::JoinSet,
    time::{Instant, sleep_until, timeout, timeout_at},
};
use ttrpc::context;

use super::{
    CALL, MAKE, Shared, answer,
    container::{Container, process_request},
    create::not_paused,
    error::Error,
    now, passed,
    process::{Exit, Phase, Process},
    record::{Ended, Record},
};
use crate::{
    limits::AGENT_TEXT,
    sandbox::{self, Pod, deadline, machine::printable},
};

/// Exit status of a process that was killed, or whose machine ended: 128 + SIGKILL.
pub const KILLED: u32 = 137;
/// How long a container may live after SIGKILL.
const SURVIVAL: Duration = Duration::from_secs(30);
/// How long the execs of a container that has ended may take to end.
const EXECS_END: Duration = Duration::from_secs(2);
/// After this a call that the shim before had not answered has come again.
const ASKED_AGAIN: Duration = Duration::from_millis(500);
/// Exit status of a process that was never started.
const NOT_STARTED: u32 = 255;

impl Shared {
    /// Start.
    pub(crate) async fn start(
        self: &Arc<Self>,
        id: &str,
        exec_id: &str,
    ) -> Result<StartResponse, Error> {
        let (container, process) = self.process(id, exec_id)?;
        if process.phase() != Phase::Created && process.is_asked_again() {
            if process.exit().is_none() {
                self.publish_start(&container, exec_id);
            }
            let mut response = StartResponse::new();
            response.pid = container.made.host_pid;
            return Ok(response);
        }
        container.pod.must_run()?;
        not_paused(&container, "start")?;
        if !process.begin_start() {
            return Err(Error::State {
                id: container.name(exec_id),
                what: "start",
                phase: phase_name(&process.phase()),
            });
        }
        process.begin_stdin();
        let started = async {
            if exec_id.is_empty() {
                // Docker, and ctr with CNI, plug in after create.
                container.pod.update_network().await?;
            }
            self.start_in_guest(&container, exec_id).await
        };
        if let Err(error) = started.await {
            // It may have started all the same, or still do so. Without an agent it is gone with the machine.
            if let Ok(agent) = container.pod.agent() {
                sigkill(agent, &container.id, exec_id).await;
            }
            // As if never started, so no event; but who waits gets an answer, and who reads its end.
            process.set_told();
            process.stop(killed(NOT_STARTED));
            process.cut_off();
            container.save();
            return Err(error);
        }
        if exec_id.is_empty()
            && let Err(error) = container.made.hooks.poststart().await
        {
            self.end_created(&container, &process).await;
            return Err(error.into());
        }
        let pid = container.made.host_pid;
        self.publish_start(&container, exec_id);
        process.started();
        self.watch(container, process);
        let mut response = StartResponse::new();
        response.pid = pid;
        Ok(response)
    }

    fn publish_start(&self, container: &Container, exec_id: &str) {
        if exec_id.is_empty() {
            let mut event = TaskStart::new();
            event.container_id.clone_from(&container.id);
            event.pid = container.made.host_pid;
            self.events.publish(&event);
        } else {
            let mut event = TaskExecStarted::new();
            event.container_id.clone_from(&container.id);
            event.exec_id = exec_id.into();
            event.pid = container.made.host_pid;
            self.events.publish(&event);
        }
    }

    async fn start_in_guest(&self, container: &Container, exec_id: &str) -> Result<(), Error> {
        let agent = container.pod.agent()?;
        let request = container.request(exec_id);
        let result = agent.start(deadline(MAKE), &request).await;
        let point = match exec_id {
            "" => "start.container",
            _ => "exec.start",
        };
        answer(&container.pod, passed(point, result)).await?;
        Ok(())
    }

    /// Waits for the end of a process in the background.
    pub(super) fn watch(self: &Arc<Self>, container: Arc<Container>, process: Arc<Process>) {
        let shared = self.clone();
        tokio::spawn(async move {
            let exit = exit_of(&container, &process.exec_id).await;
            shared.record(&container, &process, exit).await;
        });
    }

    /// The same of one that was taken over: its end is told no sooner than its start, which may be asked for again.
    pub(super) fn watch_again(self: &Arc<Self>, container: Arc<Container>, process: Arc<Process>) {
        let shared = self.clone();
        let from = Instant::now() + ASKED_AGAIN;
        tokio::spawn(async move {
            let exit = exit_of(&container, &process.exec_id).await;
            sleep_until(from).await;
            shared.record(&container, &process, exit).await;
        });
    }

    /// Watches the machine to its end.
    pub(super) fn watch_machine(self: &Arc<Self>, pod: &Arc<Pod>) {
        let (shared, pod) = (self.clone(), pod.clone());
        tokio::spawn(async move {
            pod.ended().await;
            shared.machine_ended(&pod).await;
        });
    }

    /// Records an end, once, and tells containerd.
    async fn record(&self, container: &Arc<Container>, process: &Arc<Process>, exit: Exit) {
        process.settled().await;
        if process.stop(exit.clone()) {
            container.save();
            self.tell_exit(container, process, &exit);
        }
    }

    /// Queues the events of an end.
    pub(super) fn tell_exit(
        &self,
        container: &Arc<Container>,
        process: &Arc<Process>,
        exit: &Exit,
    ) {
        if exit.oom {
            let mut event = TaskOOM::new();
            event.container_id.clone_from(&container.id);
            self.events.publish(&event);
        }
        let event = exit_event(
            &container.id,
            &process.exec_id,
            container.made.host_pid,
            exit,
        );
        let (of, told) = (container.clone(), process.clone());
        self.events.publish_then(&event, move || {
            told.set_told();
            of.save();
        });
        tracing::info!(
            container = container.id,
            exec = process.exec_id,
            status = exit.status,
            "ended"
        );
    }

    /// The machine ended: so did every process in it.
    pub(super) async fn machine_ended(&self, pod: &Arc<Pod>) {
        let containers: Vec<_> = self.state().containers.values().cloned().collect();
        for container in containers {
            if !Arc::ptr_eq(&container.pod, pod) {
                continue;
            }
            for process in container.processes() {
                if process.phase() == Phase::Created && !process.exec_id.is_empty() {
                    // Never started, and perhaps never told of.
                    process.set_told();
                    process.stop(killed(KILLED));
                    continue;
                }
                let exit = with_machine(pod, &process.exec_id);
                self.record(&container, &process, exit).await;
            }
        }
    }

    /// Kill.
    pub(super) async fn kill(self: &Arc<Self>, req: &KillRequest) -> Result<Empty, Error> {
        let (container, process) = self.process(&req.id, &req.exec_id)?;
        match process.phase() {
            Phase::Stopped(_) => return Err(Error::Finished(container.name(&req.exec_id))),
            Phase::Created if !req.exec_id.is_empty() => {
                return Err(Error::State {
                    id: container.name(&req.exec_id),
                    what: "signal",
                    phase: "created",
                });
            }
            _ => {}
        }
        let mut request = agent::SignalRequest::new();
        request.container.clone_from(&req.id);
        request.exec_id.clone_from(&req.exec_id);
        request.signal = req.signal;
        request.all = req.all;
        let agent = container.pod.agent()?;
        container.set_signalled();
        let to_death = req.exec_id.is_empty() && req.signal == libc::SIGKILL.unsigned_abs();
        if to_death {
            must_end(&container, &process);
        }
        let result = agent.signal(deadline(CALL), &request).await;
        match answer(&container.pod, passed("kill.signal", result)).await {
            // With its machine, which is about to be recorded.
            Err(Error::Pod(sandbox::Error::Ended(_))) => {
                return Err(Error::Finished(container.name(&req.exec_id)));
            }
            Err(Error::Agent(ttrpc::Error::RpcStatus(status)))
                if to_death && status.code() == ttrpc::Code::INTERNAL =>
            {
                let why = printable(&status.message, AGENT_TEXT);
                tracing::error!(
                    container = container.id,
                    why,
                    "the agent does not kill it: the machine is killed"
                );
                container.pod.kill();
            }
            result => result.map(drop)?,
        }
        if process.phase() == Phase::Created {
            // No start will watch it.
            self.watch(container, process);
        }
        Ok(Empty::new())
    }

    /// Delete of an exec or of a container, which takes the pod with it if it is the last.
    pub(crate) async fn delete(&self, id: &str, exec_id: &str) -> Result<DeleteResponse, Error> {
        if exec_id.is_empty()
            && let Some(record) = self.take_last(id)
        {
            return Ok(self.deleted_before(&record).await);
        }
        let (container, process) = self.process(id, exec_id)?;
        match process.phase() {
            Phase::Running | Phase::Starting => {
                return Err(Error::State {
                    id: container.name(exec_id),
                    what: "delete",
                    phase: "running",
                });
            }
            Phase::Created => self.end_created(&container, &process).await,
            Phase::Stopped(_) => process.drain().await,
        }
        if exec_id.is_empty() {
            self.end_execs(&container).await;
        }
        delete_in_guest(&container, exec_id).await;
        let exit = process.exit().unwrap_or_else(|| killed(KILLED));
        let pid = container.made.host_pid;
        if exec_id.is_empty() {
            if self.state().containers.remove(id).is_none() {
                return Err(Error::NotFound(container.name("")));
            }
            container.pod.growth().forget(id);
            self.note_containers(&container.pod);
            self.release_trees(Some(&container.pod), &container.made.trees)
                .await;
            container.pod.remove_pid(pid).await;
            container.set_deleted();
            self.publish_delete(id, pid, &exit);
            self.stop_if_empty(Some(&container)).await;
            // Not before: a shim that takes over would know nothing of what is still to be given back, nor answer this call.
            Record::forget(container.pod.dir(), id);
            container.made.hooks.poststop().await;
            tracing::info!(container = id, "deleted");
        } else {
            container.remove_exec(exec_id);
            container.save();
        }
        Ok(deleted(pid, exit))
    }

    fn publish_delete(&self, id: &str, pid: u32, exit: &Exit) {
        let mut event = TaskDelete::new();
        event.container_id = id.into();
        event.pid = pid;
        event.exit_status = exit.status;
        event.exited_at = MessageField::some(exit.at.clone());
        self.events.publish(&event);
    }

    /// The Delete of the last container, which a shim before did not live to answer; the pod is gone.
    async fn deleted_before(&self, record: &Record) -> DeleteResponse {
        let ended = record.ended();
        let exit = ended.map_or_else(|| killed(KILLED), Ended::exit);
        if !ended.is_some_and(|ended| ended.told) {
            let event = exit_event(&record.id, "", record.host_pid, &exit);
            self.events.publish(&event);
        }
        self.publish_delete(&record.id, record.host_pid, &exit);
        record.hooks.poststop().await;
        tracing::info!(container = record.id, "deleted by the shim before");
        deleted(record.host_pid, exit)
    }

    /// The record of the last container of a pod that is gone, if it is `id`'s.
    fn take_last(&self, id: &str) -> Option<Record> {
        self.state().last.take_if(|record| record.id == id)
    }

    /// There will be another pod: who takes over then shall not take it for the one that is gone.
    pub(super) fn forget_last(&self) {
        let mut state = self.state();
        state.last = None;
        if std::mem::take(&mut state.over) {
            Record::let_go(&self.kept);
        }
    }

    /// A process that did not get past its start goes without an exit event.
    async fn end_created(&self, container: &Container, process: &Process) {
        process.cut_off();
        if !process.exec_id.is_empty() {
            process.stop(killed(KILLED));
            return;
        }
        if let Ok(agent) = container.pod.agent() {
            kill_in_guest(agent, &container.id, Duration::from_secs(5)).await;
        }
        process.stop(killed(KILLED));
    }

    /// With its init every exec of a container ends (the pid namespace is gone).
    async fn end_execs(&self, container: &Arc<Container>) {
        let execs = container.exec_list();
        let end = Instant::now() + EXECS_END;
        let mut drains = JoinSet::new();
        for exec in &execs {
            if exec.phase() == Phase::Created {
                exec.cut_off();
                exec.set_told();
                exec.stop(killed(KILLED));
            } else if timeout_at(end, exec.wait()).await.is_err() {
                self.record(container, exec, killed(KILLED)).await;
            }
            let exec = exec.clone();
            drains.spawn(async move { exec.drain().await });
        }
        drains.join_all().await;
        for exec in &execs {
            container.remove_exec(&exec.exec_id);
        }
    }

    /// The last container takes the pod with it; `deleted` is it, if its Delete is to be answered.
    pub(super) async fn stop_if_empty(&self, deleted: Option<&Container>) {
        let pod = {
            let mut state = self.state();
            if !state.containers.is_empty() || !state.creating.is_empty() {
                return;
            }
            if let Some(container) = deleted {
                state.over = true;
                Record::of(container).keep(&self.kept);
            }
            state.pod.take()
        };
        if let Some(pod) = pod {
            pod.stop().await;
        }
    }
}

fn deleted(pid: u32, exit: Exit) -> DeleteResponse {
    let mut response = DeleteResponse::new();
    response.pid = pid;
    response.exit_status = exit.status;
    response.exited_at = MessageField::some(exit.at);
    response
}

fn exit_event(container: &str, exec: &str, pid: u32, exit: &Exit) -> TaskExit {
    let mut event = TaskExit::new();
    event.container_id = container.into();
    event.id = match exec {
        "" => container.into(),
        exec => exec.into(),
    };
    event.pid = pid;
    event.exit_status = exit.status;
    event.exited_at = MessageField::some(exit.at.clone());
    event
}

/// Waits for the end of a process, by the agent's word or by the machine's end.
async fn exit_of(container: &Container, exec_id: &str) -> Exit {
    let pod = &container.pod;
    let Ok(agent) = pod.agent() else {
        return with_machine(pod, exec_id);
    };
    let request = container.request(exec_id);
    let waited = tokio::select! {
        biased;
        waited = agent.wait(context::Context::default(), &request) => waited,
        _ = pod.ended() => return with_machine(pod, exec_id),
    };
    match passed("exit.wait", waited) {
        Ok(end) => Exit {
            // The guest's word: wait(2) has no more.
            status: end.exit_status.min(255),
            at: ago(Duration::from_nanos(end.ended_ago_ns)),
            oom: end.oom_killed,
        },
        Err(error) => {
            // Without its agent the machine is of no use.
            if !matches!(error, ttrpc::Error::RpcStatus(_))
                && timeout(Duration::from_secs(1), pod.ended()).await.is_err()
            {
                tracing::error!(%error, "the agent is lost: the machine is killed");
                pod.kill();
            }
            with_machine(pod, exec_id)
        }
    }
}

/// The end of a process with its machine. For want of memory it is told once a container.
fn with_machine(pod: &Pod, exec_id: &str) -> Exit {
    Exit {
        oom: exec_id.is_empty() && pod.end().is_some_and(|end| end.is_out_of_memory()),
        ..killed(KILLED)
    }
}

/// SIGKILL ends a container, whatever its guest says: one that is not heard to have ended takes the machine with it.
fn must_end(container: &Arc<Container>, process: &Arc<Process>) {
    let (container, process) = (container.clone(), process.clone());
    tokio::spawn(async move {
        // A start has deadlines of its own, and its poststart hooks may take longer.
        process.settled().await;
        if timeout(patience(SURVIVAL), process.wait()).await.is_err() {
            tracing::error!(
                container = container.id,
                "SIGKILL did not end it within {} s: the machine is killed",
                SURVIVAL.as_secs()
            );
            container.pod.kill();
        }
    });
}

/// Sends SIGKILL to every process of a container, or to one exec; false if the guest does not know it.
async fn sigkill(agent: &AgentClient, container: &str, exec_id: &str) -> bool {
    let mut request = agent::SignalRequest::new();
    request.container = container.into();
    request.exec_id = exec_id.into();
    request.signal = libc::SIGKILL.unsigned_abs();
    request.all = exec_id.is_empty();
    agent.signal(deadline(CALL), &request).await.is_ok()
}

/// Kills every process of a container in the guest and waits for the end of its init; false if the guest does not know it.
pub async fn kill_in_guest(agent: &AgentClient, container: &str, patience: Duration) -> bool {
    let signalled = sigkill(agent, container, "").await;
    let _ = agent
        .wait(deadline(patience), &process_request(container, ""))
        .await;
    signalled
}

/// What the guest does not free is its own loss: no guest keeps the host from removing a container that has ended.
async fn delete_in_guest(container: &Container, exec_id: &str) {
    let Ok(agent) = container.pod.agent() else {
        return; // Gone with the machine.
    };
    let request = container.request(exec_id);
    let result = passed(
        "delete.container",
        agent.delete(deadline(CALL), &request).await,
    );
    if let Err(Error::Agent(error)) = answer(&container.pod, result).await {
        let error = Error::Agent(error);
        tracing::warn!(container = container.name(exec_id), %error, "the guest does not delete it");
    }
}

/// A time that the guest knows, by the host's clock; at most the host's own age.
fn ago(time: Duration) -> Timestamp {
    let now = SystemTime::now();
    let booted = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let age = Duration::from_secs(u64::try_from(booted.tv_sec).unwrap_or(0));
    now.checked_sub(time.min(age)).unwrap_or(now).into()
}

/// An end without the agent's word.
pub fn killed(status: u32) -> Exit {
    Exit {
        status,
        at: now(),
        oom: false,
    }
}

fn phase_name(phase: &Phase) -> &'static str {
    match phase {
        Phase::Created => "created",
        Phase::Starting => "starting",
        Phase::Running => "running",
        Phase::Stopped(_) => "stopped",
    }
}
