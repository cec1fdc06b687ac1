//! How a pod's start went: what is noted of it, and what an error says when it failed.

use std::{sync::Arc, time::Duration};

use bulkhead_failpoint::patience;
use serde::Deserialize;
use tokio::time::{sleep, timeout};

use super::{
    END, Error, Pod, control,
    machine::End,
    postmortem::PostMortem,
    timeline::{OfVmm, Stage},
};
use crate::{check, config::Engine};

/// How long a machine may take until its agent is ready.
const READY_KVM: Duration = Duration::from_secs(60);
/// The same, with software as CPU.
const READY_EMULATED: Duration = Duration::from_secs(120);
/// With engine `kvm`, after this the host is checked: one without hardware virtualization is told at once.
const DOUBT: Duration = Duration::from_secs(5);

impl Pod {
    /// Ends once the machine has had its time, or when the host turns out to be unfit.
    pub(super) async fn lateness(&self) -> Error {
        let limit = match self.engine {
            Engine::Kvm => READY_KVM,
            Engine::Emulated => READY_EMULATED,
        };
        if self.engine == Engine::Kvm {
            sleep(DOUBT).await;
            if let Some(advice) = kvm_trouble().await {
                let what = "the guest does not start: this host cannot run engine \"kvm\"";
                return self.late(|_| what.into(), advice).await;
            }
        }
        sleep(patience(limit)).await;
        let seconds = limit.as_secs();
        let what = |doing| format!("the guest was not ready after {seconds} s, while {doing}");
        self.late(what, String::new()).await
    }

    async fn late(&self, what: impl FnOnce(&'static str) -> String, advice: String) -> Error {
        let console = self.report().await;
        let stages = self.timeline.now();
        Error::NotReady(Box::new(PostMortem {
            what: what(stages.doing()),
            advice,
            stages,
            console,
            ..PostMortem::default()
        }))
    }

    /// What a failed start is about: the machine's own end says more than a connection that broke, and what the check of
    /// the host knows more than an engine that failed.
    pub async fn why(&self, error: Error) -> Error {
        // A connection that broke may be the begin of it.
        if matches!(error, Error::Control(control::Error::Io { .. })) {
            let _ = timeout(END, self.ended()).await;
        }
        let end = match (self.end(), error) {
            (Some(end), Error::Control(_)) if !end.is_orderly() => end,
            (_, Error::Ended(end)) => end,
            (_, error) => return error,
        };
        if self.engine == Engine::Kvm
            && ["engine-failed", "guest-triple-fault"].contains(&end.reason.as_str())
            && let Some(advice) = kvm_trouble().await
        {
            let mut end = End::clone(&end);
            end.advice = advice;
            return Error::Ended(Arc::new(end));
        }
        Error::Ended(end)
    }

    /// An error that tells how the machine ended, if it did.
    pub fn must_run(&self) -> Result<(), Error> {
        self.end().map_or(Ok(()), |end| Err(Error::Ended(end)))
    }

    /// Takes over the VMM's times, and gives back the console's tail.
    async fn report(&self) -> String {
        let report = timeout(
            Duration::from_secs(2),
            self.control.request(control::op("report"), Vec::new()),
        );
        let Ok(Ok(report)) = report.await else {
            return String::new();
        };
        let console = report.get("console").and_then(|c| c.as_str());
        let console = console.unwrap_or_default().to_owned();
        self.timeline
            .of_vmm(OfVmm::deserialize(report).unwrap_or_default());
        console
    }

    /// Logs and writes down how long the start took, once the first container is made.
    pub fn note_start(self: &Arc<Self>) {
        self.timeline.end(Stage::Container);
        let pod = self.clone();
        tokio::spawn(async move {
            pod.report().await;
            let stages = pod.timeline.now();
            tracing::info!(%stages, "the pod has started");
            pod.book
                .change(|record| record.stages_us = stages.durations_us());
        });
    }

    /// Writes down the pod's containers.
    pub fn note_containers(&self, ids: Vec<String>) {
        self.book.change(|record| record.containers = ids);
    }

    /// A stage of the start has ended.
    pub fn stage_ended(&self, stage: Stage) {
        self.timeline.end(stage);
    }
}

/// What the check of the host says against KVM.
async fn kvm_trouble() -> Option<String> {
    tokio::task::spawn_blocking(check::kvm_trouble)
        .await
        .unwrap_or_default()
}
