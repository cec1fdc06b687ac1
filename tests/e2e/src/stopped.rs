//! Processes of a pod that stand still: whoever waits for them has a deadline, and the pod can be removed.

use std::time::{Duration, Instant};

use bulkhead_harness::{
    Engine, Image, Outcome, Suite, Test, ensure, ensure_eq, events::Events, runner::MACHINES, test,
};
use rustix::process::Signal;

use crate::stopped;

/// The keeper's worker.
const SHIM: &str = "shim";
const BUSYBOX: &[Image] = &[Image::Busybox];

/// The cases of this group.
pub const TESTS: &[Test] = &[test!(
    stopped::a_process_that_stands_still_keeps_no_pod,
    BUSYBOX,
    MACHINES
)];

/// Stops one process in each of several pods and never lets it run on: SIGKILL of the container is told as its end,
/// and the pod is removed.
fn a_process_that_stands_still_keeps_no_pod(suite: &Suite) -> Outcome {
    let victims: &[&str] = match suite.engine {
        Engine::Emulated => &[SHIM, "bulkhead-vmm", "bulkhead-fs", "qemu-system"],
        _ => &[SHIM, "bulkhead-vmm", "bulkhead-fs"],
    };
    // A container may outlive SIGKILL by 30 s, then its machine goes; a shim is asked after 15 s and killed after 30 more.
    let limit = suite.scale.seconds(60);
    let mut all = Vec::new();
    for &victim in victims {
        let events = Events::subscribe(suite)?;
        let pod = suite.busybox().sh("sleep 1000").detach()?;
        std::thread::sleep(Duration::from_millis(300));
        let process = match victim {
            SHIM => pod.shim()?,
            _ => pod.command(victim).or_else(|_| pod.process(victim))?,
        };
        process.signal(Signal::STOP)?;
        let kill = pod.task(&["kill", "-s", "SIGKILL"]).limit(limit).spawn()?;
        all.push((pod, events, process, kill, Instant::now()));
    }
    for (pod, events, process, kill, killed) in all {
        kill.wait()?;
        events.wait_for(pod.name(), "/tasks/exit", limit)?;
        let took = killed.elapsed();
        ensure!(
            took < limit,
            "{}: the end came after {took:?}",
            process.name
        );
        let name = pod.name().to_owned();
        pod.delete()?;
        events.wait_for(&name, "/tasks/delete", suite.scale.seconds(5))?;
        let told: Vec<String> = events.of(&name).into_iter().map(|e| e.topic).collect();
        let told: Vec<&str> = told
            .iter()
            .filter_map(|t| t.strip_prefix("/tasks/"))
            .collect();
        ensure_eq!("events", told, ["create", "start", "exit", "delete"]);
        ensure!(!process.is_alive(), "{} is left", process.name);
    }
    Ok(())
}
