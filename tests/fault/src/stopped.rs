//! Processes that stand still while a pod starts, and before each step of its life: whoever waits for them gives up in time, and the pod can
//! be removed. The product's own limits are minutes (`stopped::` of the end-to-end suite waits for two of them); here they are a tenth.

use std::time::{Duration, Instant};

use bulkhead_harness::{
    Engine, Image, Outcome, Pod, Running, Suite, Test, ensure, ensure_eq, events::Events,
    process::Process, runner::MACHINES, test,
};
use rustix::process::Signal;

use crate::{
    life::{complete, one_line},
    points::Set,
    stopped,
};

/// The keeper's worker.
const SHIM: &str = "shim";
const KEEPER: &str = "bulkhead-keeper";
const BUSYBOX: &[Image] = &[Image::Busybox];
/// Longest that a step may take to succeed or fail.
const STEP: u32 = 45;

/// A moment after the start in which the guest boots.
const HALF: Duration = Duration::from_millis(300);

/// The cases.
pub const TESTS: &[Test] = &[
    test!(stopped::while_a_pod_starts, BUSYBOX, MACHINES),
    test!(stopped::before_each_step, BUSYBOX, MACHINES),
    test!(stopped::a_keeper_only_delays, BUSYBOX, MACHINES),
];

fn victims(suite: &Suite) -> &'static [&'static str] {
    const ALL: &[&str] = &[
        SHIM,
        "bulkhead-vmm",
        "bulkhead-fs",
        "fs-steward",
        "qemu-system",
    ];
    match suite.engine {
        Engine::Emulated => ALL,
        _ => &ALL[..4],
    }
}

fn find(pod: &Pod<'_>, victim: &str) -> Outcome<Process> {
    match victim {
        SHIM => pod.shim(),
        name => pod.command(name).or_else(|_| pod.process(name)),
    }
}

/// Stops it so long after it is first seen. The emulator is asked for its version before.
fn stop_early(suite: &Suite, pod: &Pod<'_>, victim: &str, delay: Duration) -> Outcome {
    let end = Instant::now() + suite.scale.seconds(10);
    let mut first = None;
    loop {
        if let Ok(process) = find(pod, victim) {
            let seen = *first.get_or_insert_with(Instant::now);
            if seen.elapsed() >= delay && process.signal(Signal::STOP).is_ok() {
                return Ok(());
            }
        }
        ensure!(Instant::now() < end, "no {victim}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Waits for the end of a client, which is told why it fails. A shim is followed by another.
fn told(what: &str, victim: &str, client: Running) -> Outcome {
    let output = client.wait()?;
    let errors = one_line(&output.errors());
    ensure!(
        output.status == 0 || (victim != SHIM && !errors.is_empty()),
        "{what} without {victim}: {}, {errors:?}",
        output.status
    );
    Ok(())
}

fn removed(suite: &Suite, pods: Vec<(&'static str, Pod<'_>)>, events: &Events) -> Outcome {
    let limit = suite.scale.seconds(STEP);
    let mut clients = Vec::new();
    for (victim, pod) in &pods {
        clients.push((*victim, pod.task(&["rm", "-f"]).limit(limit).spawn()?));
    }
    for (victim, client) in clients {
        told("rm", victim, client)?;
    }
    for (victim, pod) in pods {
        let name = pod.name().to_owned();
        pod.delete_by_force()?;
        complete(&events.of(&name), &name).map_err(|e| format!("{victim}: {e}"))?;
    }
    Ok(())
}

fn while_a_pod_starts(suite: &Suite) -> Outcome {
    let _set = Set::new("patience", "little")?;
    let events = Events::subscribe(suite)?;
    let mut starting = Vec::new();
    for delay in [Duration::ZERO, HALF] {
        for &victim in victims(suite) {
            let run = suite.busybox().args(&["sleep", "100000"]).seconds(STEP);
            let (pod, client) = run.begin()?;
            stop_early(suite, &pod, victim, delay)?;
            starting.push((victim, pod, client));
        }
    }
    let mut pods = Vec::new();
    for (victim, pod, client) in starting {
        told("start", victim, client)?;
        pods.push((victim, pod));
    }
    removed(suite, pods, &events)
}

fn before_each_step(suite: &Suite) -> Outcome {
    let _set = Set::new("patience", "little")?;
    let events = Events::subscribe(suite)?;
    let limit = suite.scale.seconds(STEP);
    // The machine may be gone.
    let stop = |pods: &[(&'static str, Pod<'_>)]| {
        for (victim, pod) in pods {
            let _ = find(pod, victim).and_then(|process| process.signal(Signal::STOP));
        }
    };
    let mut pods = Vec::new();
    for &victim in victims(suite) {
        pods.push((victim, suite.busybox().args(&["sleep", "100000"]).detach()?));
    }
    stop(&pods);
    let mut clients = Vec::new();
    let mut members = Vec::new();
    for (victim, pod) in &pods {
        clients.push((
            "exec",
            *victim,
            pod.exec(&["echo", "here"]).seconds(STEP).spawn()?,
        ));
        let of_pod = format!("io.kubernetes.cri.sandbox-id={}", pod.name());
        let run = suite.busybox().args(&["sleep", "100000"]).seconds(STEP);
        let (member, client) = run.flags(&["--annotation", &of_pod]).begin()?;
        clients.push(("member", *victim, client));
        members.push((*victim, member));
    }
    for (what, victim, client) in clients {
        told(what, victim, client)?;
    }
    stop(&pods);
    let mut clients = Vec::new();
    for (victim, pod) in &pods {
        clients.push((
            *victim,
            pod.task(&["kill", "-s", "SIGKILL"]).limit(limit).spawn()?,
        ));
    }
    for (victim, client) in clients {
        told("kill", victim, client)?;
    }
    for (_, pod) in &pods {
        events.wait_for(pod.name(), "/tasks/exit", limit)?;
    }
    stop(&pods);
    removed(suite, members, &events)?;
    stop(&pods);
    removed(suite, pods, &events)
}

/// Nothing is lost by it, and nothing but its own end ends the wait: containerd has no limit for its calls.
fn a_keeper_only_delays(suite: &Suite) -> Outcome {
    let pod = suite.busybox().args(&["sleep", "100000"]).detach()?;
    let keeper = find(&pod, KEEPER)?;
    keeper.signal(Signal::STOP)?;
    let mut exec = pod.exec(&["echo", "here"]).spawn()?;
    std::thread::sleep(Duration::from_secs(1));
    ensure!(!exec.has_ended(), "an exec without the keeper");
    keeper.signal(Signal::CONT)?;
    ensure_eq!("output", exec.wait()?.ok()?.text(), "here");
    ensure_eq!("exit status", pod.end()?, 137);
    Ok(())
}
