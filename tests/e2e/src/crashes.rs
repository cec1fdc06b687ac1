//! Processes that are killed at any moment, and guests that panic.

use std::time::{Duration, Instant};

use bulkhead_harness::{
    Engine, Image, Outcome, Suite, Test, ensure, events::Events, process, runner::MACHINES, test,
};
use rustix::process::Signal;

use crate::crashes;

const BUSYBOX: &[Image] = &[Image::Busybox];

/// The cases of this group.
pub const TESTS: &[Test] = &[
    test!(crashes::vmm_killed_at_rest, BUSYBOX, MACHINES),
    test!(crashes::vmm_killed_during_output, BUSYBOX, MACHINES),
    test!(crashes::vmm_killed_during_start, BUSYBOX, MACHINES),
    test!(crashes::vmm_killed_with_an_exec_running, BUSYBOX, MACHINES),
    test!(crashes::file_server_killed_at_rest, BUSYBOX, MACHINES),
    test!(
        crashes::file_servers_steward_killed_at_rest,
        BUSYBOX,
        MACHINES
    ),
    test!(crashes::file_server_killed_during_io, BUSYBOX, MACHINES),
    test!(crashes::file_server_killed_during_start, BUSYBOX, MACHINES),
    test!(
        crashes::emulator_killed_at_rest,
        BUSYBOX,
        &[Engine::Emulated]
    ),
    test!(crashes::keeper_killed_during_start, BUSYBOX, MACHINES),
    test!(crashes::guest_panic_is_quoted, BUSYBOX, MACHINES),
    test!(crashes::agent_killed_is_a_guest_panic, BUSYBOX, MACHINES),
];

fn next_pod_runs(suite: &Suite) -> Outcome {
    if suite.scale.pods_are_cheap() {
        suite.busybox().args(&["true"]).output()?.ok()?;
    }
    Ok(())
}

/// Kills one process of a running pod: containerd hears of it within two seconds, and the pod can be removed.
fn killed(suite: &Suite, script: &str, victim: &str) -> Outcome {
    let events = Events::subscribe(suite)?;
    let pod = suite.busybox().sh(script).detach()?;
    std::thread::sleep(Duration::from_millis(300));
    let process = pod.command(victim).or_else(|_| pod.process(victim))?;
    process.signal(Signal::KILL)?;
    events.wait_for(pod.name(), "/tasks/exit", suite.scale.seconds(2))?;
    pod.delete()?;
    next_pod_runs(suite)
}

const FLOOD: &str = "while :; do echo some output some output some output; done";

fn vmm_killed_at_rest(suite: &Suite) -> Outcome {
    killed(suite, "sleep 1000", "bulkhead-vmm")
}

fn vmm_killed_during_output(suite: &Suite) -> Outcome {
    let (pod, running) = suite.busybox().sh(FLOOD).attach()?;
    running.wait_for("output\nsome", suite.scale.seconds(30))?;
    pod.process("bulkhead-vmm")?.signal(Signal::KILL)?;
    let killed = Instant::now();
    let output = running.wait()?;
    ensure!(output.status != 0, "ctr run ended with 0");
    ensure!(
        killed.elapsed() < suite.scale.seconds(3),
        "ctr run ended after {:?}",
        killed.elapsed()
    );
    pod.delete()?;
    next_pod_runs(suite)
}

fn vmm_killed_with_an_exec_running(suite: &Suite) -> Outcome {
    let pod = suite.busybox().sh("sleep 1000").detach()?;
    let exec = pod
        .exec(&["sh", "-c", "echo up; sleep 1000"])
        .seconds(30)
        .spawn()?;
    exec.wait_for("up", suite.scale.seconds(20))?;
    pod.process("bulkhead-vmm")?.signal(Signal::KILL)?;
    ensure!(exec.wait()?.status != 0, "the exec ended with 0");
    pod.delete()?;
    next_pod_runs(suite)
}

/// Kills a process as soon as it appears while a pod starts, at several delays.
fn killed_during_start(suite: &Suite, victim: &str) -> Outcome {
    let delays: &[u128] = match suite.scale.pods_are_cheap() {
        true => &[0, 100, 400],
        false => &[500],
    };
    for &delay in delays {
        let run = suite.busybox().args(&["sleep", "1000"]).seconds(30);
        let (pod, mut running) = run.attach()?;
        let end = Instant::now() + suite.scale.seconds(10);
        let mut seen = None;
        loop {
            ensure!(
                !running.has_ended() && Instant::now() < end,
                "no {victim}: {}",
                running.stderr()
            );
            let mut all = pod.processes().into_iter();
            let found = all.find(|p| p.name.starts_with(victim) || p.command() == victim);
            if let Some(process) = found {
                let since = *seen.get_or_insert_with(Instant::now);
                if since.elapsed().as_millis() >= delay && process.signal(Signal::KILL).is_ok() {
                    break;
                }
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        let killed = Instant::now();
        let output = running.wait()?;
        ensure!(output.status != 0, "ctr run ended with 0");
        // containerd itself waits up to five seconds for a dead shim's `delete`.
        let limit = suite.scale.seconds(8);
        ensure!(
            killed.elapsed() < limit,
            "ctr run ended after {:?}",
            killed.elapsed()
        );
        // A container whose task came to be is removed with it; after a failed start there is no task.
        pod.delete_by_force()?;
    }
    next_pod_runs(suite)
}

fn vmm_killed_during_start(suite: &Suite) -> Outcome {
    killed_during_start(suite, "bulkhead-vmm")
}

fn file_server_killed_at_rest(suite: &Suite) -> Outcome {
    killed(suite, "sleep 1000", "bulkhead-fs")
}

fn file_servers_steward_killed_at_rest(suite: &Suite) -> Outcome {
    killed(suite, "sleep 1000", "fs-steward")
}

fn file_server_killed_during_io(suite: &Suite) -> Outcome {
    let script = "while :; do dd if=/dev/zero of=/x bs=64k count=50; cat /x >/dev/null; rm /x; done 2>/dev/null";
    killed(suite, script, "bulkhead-fs")
}

fn file_server_killed_during_start(suite: &Suite) -> Outcome {
    killed_during_start(suite, "bulkhead-fs")
}

fn emulator_killed_at_rest(suite: &Suite) -> Outcome {
    killed(suite, "sleep 1000", "qemu-system")
}

fn keeper_killed_during_start(suite: &Suite) -> Outcome {
    killed_during_start(suite, "bulkhead-keeper")
}

fn panicked(suite: &Suite, script: &str, line: &str) -> Outcome {
    let log = suite.log_mark();
    let run = suite.busybox().flag("--privileged").sh(script).seconds(30);
    let (pod, running) = run.attach()?;
    let output = running.wait()?;
    ensure!(output.status != 0, "ctr run ended with 0");
    let end = Instant::now() + suite.scale.seconds(3);
    // The task's client sees an exit status; the reason stands in containerd's log and in the state folder.
    while !suite.logs(log).contains(line) {
        ensure!(
            Instant::now() < end,
            "`{line}` is not quoted; ctr: {}\n{}",
            output.errors(),
            suite.logs(log)
        );
        std::thread::sleep(Duration::from_millis(50));
    }
    pod.delete_by_force()?;
    ensure!(
        process::of_pods(&suite.mark()).is_empty(),
        "processes are left"
    );
    next_pod_runs(suite)
}

fn guest_panic_is_quoted(suite: &Suite) -> Outcome {
    panicked(
        suite,
        "sleep 0.3; echo c >/proc/sysrq-trigger; sleep 1000",
        "Kernel panic - not syncing: sysrq triggered crash",
    )
}

fn agent_killed_is_a_guest_panic(suite: &Suite) -> Outcome {
    // `f` asks for the OOM killer, `i` kills everything but PID 1, so the agent's own memory is what remains.
    let script = "sleep 0.3; for s in i; do echo $s >/proc/sysrq-trigger; done; sleep 1000";
    let pod = suite.busybox().flag("--privileged").sh(script).detach()?;
    pod.wait_status("STOPPED", suite.scale.seconds(10))?;
    pod.delete()?;
    next_pod_runs(suite)
}
