//! When the pod's machine may rest: every call runs with its vCPUs running, and tells afterwards whether anything in
//! the pod still can.

use std::sync::Arc;

use super::{Shared, process::Phase};
use crate::sandbox::{Pod, rest::Awake};

/// Held by a call that may need the agent.
pub struct Call {
    shared: Arc<Shared>,
    pod: Arc<Pod>,
    _awake: Awake,
}

impl Drop for Call {
    // Before `_awake` is dropped, which looks at it.
    fn drop(&mut self) {
        self.pod.rest().set_quiet(self.shared.is_quiet());
    }
}

impl Shared {
    /// Lets the vCPUs run until the result is dropped; nothing without a pod.
    pub(crate) async fn awake(self: &Arc<Self>) -> Option<Call> {
        let pod = self.state().pod.clone()?;
        let awake = pod.rest().wake().await;
        Some(Call {
            shared: self.clone(),
            pod,
            _awake: awake,
        })
    }

    /// Every container that runs is paused, at least one is, and none was sent a signal since: a killed one has to come to its end.
    fn is_quiet(&self) -> bool {
        let state = self.state();
        let mut running = state
            .containers
            .values()
            .filter(|container| matches!(container.init.phase(), Phase::Starting | Phase::Running))
            .peekable();
        state.creating.is_empty()
            && running.peek().is_some()
            && running.all(|container| container.is_frozen())
    }
}
