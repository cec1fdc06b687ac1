//! The machine's size follows what is in the pod, and it rests while the pod is paused.

use std::{
    io::{BufRead, BufReader, Write},
    os::unix::net::UnixStream,
    thread::sleep,
    time::Duration,
};

use bulkhead_harness::{
    Context, Engine, Image, Outcome, Pod, Suite, Test, ensure, ensure_eq, runner::MACHINES, test,
};
use serde_json::Value;

use crate::{network::until, size};

const BUSYBOX: &[Image] = &[Image::Busybox];
/// The image as one names it in `docker run`.
const DOCKER_IMAGE: &str = "localhost/bulkhead/busybox";

/// The cases of this group.
pub const TESTS: &[Test] = &[
    test!(
        size::a_second_containers_limits_make_the_machine_larger,
        BUSYBOX,
        MACHINES
    ),
    test!(
        size::a_paused_pod_stops_its_machine_and_calls_wake_it,
        BUSYBOX,
        MACHINES
    ),
    // The emulator's guest has no balloon.
    test!(
        size::memory_that_the_guest_has_freed_goes_back_to_the_host,
        BUSYBOX,
        &[Engine::Kvm]
    ),
    test!(
        size::docker_update_makes_the_machine_larger,
        BUSYBOX,
        MACHINES
    )
    .docker()
    .fast_host(),
];

/// CPUs and MiB of memory that a program sees.
const SEEN: &str = "nproc; awk '/MemTotal/ {print int($2/1024)}' /proc/meminfo";

fn numbers(text: &str) -> Vec<u64> {
    text.lines()
        .filter_map(|line| line.trim().parse().ok())
        .collect()
}

/// CPUs that a machine of this host can have, of those that are asked for.
fn cpus(asked: u64) -> u64 {
    std::thread::available_parallelism()
        .map_or(1, |n| n.get() as u64)
        .min(asked)
}

/// What the VMM tells of itself.
fn report(suite: &Suite, pod: &str) -> Outcome<Value> {
    let socket = suite.state_of(pod).join("control.sock");
    let mut stream = UnixStream::connect(&socket).context(format_args!("{}", socket.display()))?;
    stream
        .write_all(b"{\"op\":\"report\"}\n")
        .context("ask the VMM")?;
    let mut line = String::new();
    BufReader::new(stream)
        .read_line(&mut line)
        .context("the VMM's answer")?;
    let answer: Value = serde_json::from_str(&line).context("the VMM's answer")?;
    Ok(answer["ok"].clone())
}

fn a_second_containers_limits_make_the_machine_larger(suite: &Suite) -> Outcome {
    let pod = suite
        .busybox()
        .flags(&["--annotation", "io.bulkhead.memory_mib=128"])
        .flags(&["--annotation", "io.bulkhead.vcpus=1"])
        .sh("sleep 1000")
        .detach()?;
    let before = numbers(&pod.sh(SEEN)?);
    ensure_eq!("CPUs before", before.first(), Some(&1));
    ensure!(
        before.get(1).is_some_and(|mib| *mib < 128),
        "memory before: {before:?}"
    );
    // More than the machine had.
    let script = format!(
        "{SEEN}; dd if=/dev/zero of=/big/file bs=1M count=200 2>/dev/null; wc -c </big/file"
    );
    let text = suite
        .busybox()
        .flags(&[
            "--annotation",
            &format!("io.kubernetes.cri.sandbox-id={}", pod.name()),
        ])
        .flags(&["--memory-limit", "268435456", "--cpus", "1.5"])
        .mount("type=tmpfs,src=tmpfs,dst=/big,options=size=220m")
        .sh(script)
        .output()?
        .ok()?
        .text();
    let inside = numbers(&text);
    ensure_eq!("CPUs", inside.first(), Some(&cpus(2)));
    ensure!(
        inside.get(1).is_some_and(|mib| (320..=384).contains(mib)),
        "memory in {text}"
    );
    ensure_eq!("bytes in memory", inside.get(2), Some(&(200 << 20)));
    // It does not shrink, and the first container has it as well.
    let first = numbers(&pod.sh(SEEN)?);
    ensure_eq!("in the first", Some(first.as_slice()), inside.get(..2));
    let report = report(suite, pod.name())?;
    ensure_eq!(
        "the VMM's report",
        (report["vcpus"].as_u64(), report["memory_mib"].as_u64()),
        (Some(cpus(2)), Some(384))
    );
    pod.end()?;
    Ok(())
}

fn memory_that_the_guest_has_freed_goes_back_to_the_host(suite: &Suite) -> Outcome {
    const MIB: u64 = 1 << 10;
    let pod = suite
        .busybox()
        .mount("type=tmpfs,src=tmpfs,dst=/big,options=size=110m")
        .sh("sleep 1000")
        .detach()?;
    let vmm = pod.process("bulkhead-vmm")?;
    let resident = || vmm.memory_kib(1 << 20);
    pod.sh("dd if=/dev/zero of=/big/file bs=1M count=100 2>/dev/null")?;
    let full = resident()?;
    ensure!(full > 100 * MIB, "with 100 MiB of files: {full} KiB");
    pod.sh("rm /big/file")?;
    // The guest reports every two seconds.
    until(
        suite.scale.seconds(20),
        "the host has the memory of a removed file back",
        || Ok(resident()? + 90 * MIB < full),
    )?;
    let text = pod.sh(
        "dd if=/dev/zero bs=1M count=100 2>/dev/null | tee /big/file | md5sum; md5sum </big/file",
    )?;
    let sums: Vec<&str> = text.lines().collect();
    ensure_eq!("what is written again", sums.first(), sums.last());
    pod.end()?;
    Ok(())
}

/// CPU time of what runs the vCPUs, in ticks.
fn ticks(suite: &Suite, pod: &Pod) -> Outcome<u64> {
    let name = match suite.engine {
        Engine::Emulated => "qemu-system",
        _ => "bulkhead-vmm",
    };
    pod.process(name)?.cpu_ticks()
}

fn stops(suite: &Suite, pod: &Pod) -> Outcome {
    until(suite.scale.seconds(5), "stopped vCPUs", || {
        Ok(report(suite, pod.name())?["state"] == "paused")
    })?;
    let before = ticks(suite, pod)?;
    sleep(Duration::from_millis(300));
    let after = ticks(suite, pod)?;
    // The VMM itself answers the report.
    ensure!(after - before <= 2, "{before} ticks, then {after}");
    Ok(())
}

fn a_paused_pod_stops_its_machine_and_calls_wake_it(suite: &Suite) -> Outcome {
    let pod = suite.busybox().sh("while :; do :; done").detach()?;
    ensure_eq!("state", report(suite, pod.name())?["state"], "running");
    pod.task(&["pause"]).output()?.ok()?;
    stops(suite, &pod)?;
    let metrics = pod.task(&["metrics"]).output()?.ok()?.text();
    ensure!(
        metrics.contains("memory.usage_in_bytes") || metrics.contains("memory"),
        "metrics: {metrics}"
    );
    ensure_eq!(
        "status",
        pod.status()?.map(|(_, s)| s),
        Some("PAUSED".to_owned())
    );
    stops(suite, &pod)?;
    pod.task(&["resume"]).output()?.ok()?;
    ensure_eq!("state", report(suite, pod.name())?["state"], "running");
    let before = ticks(suite, &pod)?;
    until(suite.scale.seconds(5), "CPU time after resume", || {
        Ok(ticks(suite, &pod)? > before + 10)
    })?;
    // A second container that runs keeps the machine running; without it the pod rests again.
    pod.task(&["pause"]).output()?.ok()?;
    stops(suite, &pod)?;
    let joined = format!("io.kubernetes.cri.sandbox-id={}", pod.name());
    let output = suite
        .busybox()
        .flags(&["--annotation", &joined])
        .sh("echo awake")
        .output()?;
    ensure_eq!("a second container", output.ok()?.text(), "awake");
    stops(suite, &pod)?;
    // Killed while it is frozen in a machine that stands still.
    ensure_eq!("exit status", pod.end()?, 137);
    Ok(())
}

fn docker_update_makes_the_machine_larger(suite: &Suite) -> Outcome {
    let docker = suite.docker()?;
    let text =
        |args: &[&str]| -> Outcome<String> { Ok(docker.call(suite, args).output()?.ok()?.text()) };
    let run = [
        "-d",
        "--name",
        "grows",
        "--memory",
        "64m",
        DOCKER_IMAGE,
        "sleep",
        "1000000",
    ];
    docker.run(suite, &run).output()?.ok()?;
    let seen =
        || -> Outcome<Vec<u64>> { Ok(numbers(&text(&["exec", "grows", "sh", "-c", SEEN])?)) };
    let grown = (|| -> Outcome<(Vec<u64>, Vec<u64>)> {
        let before = seen()?;
        let more = [
            "--memory",
            "640m",
            "--memory-swap",
            "640m",
            "--cpus",
            "2",
            "grows",
        ];
        text(&[&["update"], &more[..]].concat())?;
        Ok((before, seen()?))
    })();
    text(&["rm", "-f", "grows"])?;
    let (before, after) = grown?;
    ensure!(
        before.first() == Some(&1) && before.get(1) < Some(&512),
        "before: {before:?}"
    );
    ensure_eq!("CPUs", after.first(), Some(&cpus(2)));
    ensure!(after.get(1) > Some(&640), "after: {after:?}");
    Ok(())
}
