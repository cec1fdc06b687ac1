//! How containers of a pod come, go and share.

use bulkhead_cri::{
    ContainerState, Cri, NamespaceMode, NamespaceOption,
    container::{mount, resources, security, shell},
};
use bulkhead_harness::{
    Context, Image, Outcome, Suite, Test, ensure, ensure_eq,
    failure::{read, write},
    runner::{ANY, MACHINES},
    test,
};

use super::IMAGES;
use crate::{cri, network::until};

/// The cases of this file.
pub const TESTS: &[Test] = &[
    test!(
        cri::containers::come_and_go_in_a_pod_that_stays,
        IMAGES,
        ANY
    )
    .cri()
    .fast_host(),
    test!(cri::containers::see_the_processes_they_shall, IMAGES, ANY)
        .cri()
        .fast_host(),
    test!(
        cri::containers::pause_costs_no_program_of_its_own,
        IMAGES,
        MACHINES
    ),
    test!(
        cri::containers::resources_change_and_are_told,
        IMAGES,
        MACHINES
    )
    .cri()
    .fast_host(),
];

fn come_and_go_in_a_pod_that_stays(suite: &Suite) -> Outcome {
    let cri = Cri::connect(suite, IMAGES)?;
    let folder = suite.folder("come-and-go")?;
    let pod = cri.run(cri.config("life"))?;

    // An init container runs to its end, then the others start.
    let mut init = shell("init", "echo prepared >/between/ready");
    init.mounts = vec![mount(&folder, "/between", false)];
    let init = pod.launch(init)?;
    let end = pod.wait(&init)?;
    ensure_eq!(
        "init container",
        (end.exit_code, end.reason.as_str()),
        (0, "Completed")
    );

    // It has a message for whoever looks after its end, and an end that it is told of.
    let message = folder.join("message");
    write(&message, "")?;
    let script = "trap 'cat /between/ready >/dev/termination-log; echo $STOPPING >>/dev/termination-log; exit 0' TERM
        touch /tmp/up; while :; do sleep 0.1; done";
    let mut app = shell("app", script);
    app.mounts = vec![
        mount(&folder, "/between", false),
        mount(&message, "/dev/termination-log", false),
    ];
    app.envs = vec![bulkhead_cri::KeyValue {
        key: "STOPPING".into(),
        value: "bye".into(),
    }];
    let app = pod.launch(app)?;
    until(suite.scale.seconds(10), "the app is up", || {
        Ok(pod.exec(&app, &["test", "-e", "/tmp/up"])?.code == 0)
    })?;
    // preStop is an exec of kubelet's before the signal.
    pod.sh(&app, "echo stopping >/between/pre-stop")?;
    let started = std::time::Instant::now();
    pod.stop(&app, 30)?;
    ensure!(
        started.elapsed() < suite.scale.seconds(15),
        "the signal was not heard"
    );
    let end = pod.status(&app)?;
    ensure_eq!("state", end.state(), ContainerState::ContainerExited);
    ensure_eq!(
        "exit code",
        (end.exit_code, end.reason.as_str()),
        (0, "Completed")
    );
    ensure!(end.finished_at > end.started_at, "times: {end:?}");
    ensure_eq!("message", read(&message)?, "prepared\nbye\n");
    ensure_eq!("preStop", read(folder.join("pre-stop"))?, "stopping\n");

    // One that does not listen is killed after its grace.
    let deaf = pod.launch(shell("deaf", "trap '' TERM; while :; do sleep 0.1; done"))?;
    pod.stop(&deaf, 1)?;
    ensure_eq!("exit code", pod.status(&deaf)?.exit_code, 137);

    // One that fails comes again, under the same name.
    for attempt in 0..2 {
        let mut again = shell("again", "exit 3");
        if let Some(metadata) = &mut again.metadata {
            metadata.attempt = attempt;
        }
        let again = pod.launch(again)?;
        let end = pod.wait(&again)?;
        ensure_eq!(
            "the failing one",
            (end.exit_code, end.reason.as_str()),
            (3, "Error")
        );
        pod.remove(&again)?;
    }

    let mut greedy = shell("greedy", "tail /dev/zero");
    resources(&mut greedy).memory_limit_in_bytes = 32 << 20;
    let greedy = pod.launch(greedy)?;
    let end = pod.wait(&greedy)?;
    ensure_eq!(
        "the greedy one",
        (end.exit_code, end.reason.as_str()),
        (137, "OOMKilled")
    );
    pod.end()
}

fn see_the_processes_they_shall(suite: &Suite) -> Outcome {
    let cri = Cri::connect(suite, IMAGES)?;
    let with = |mode: NamespaceMode, target: &str| NamespaceOption {
        pid: mode.into(),
        target_id: target.into(),
        ..Default::default()
    };
    let mut config = cri.config("processes");
    let linux = config.linux.get_or_insert_default();
    linux
        .security_context
        .get_or_insert_default()
        .namespace_options = Some(with(NamespaceMode::Pod, ""));
    let pod = cri.run(config)?;
    let launch = |name: &str, script: &str, option: NamespaceOption| {
        let mut config = shell(name, script);
        security(&mut config).namespace_options = Some(option);
        pod.launch(config)
    };
    let idle = "exec sleep 1000000";
    let one = launch("one", idle, with(NamespaceMode::Pod, ""))?;
    let two = launch("two", "exec sleep 2000000", with(NamespaceMode::Pod, ""))?;
    let own = launch(
        "own",
        "exec sleep 3000000",
        with(NamespaceMode::Container, ""),
    )?;
    // An ephemeral container, as `kubectl debug --target` makes it.
    let debug = launch("debug", idle, with(NamespaceMode::Target, &own))?;

    let line = "tr '\\0' ' ' </proc/1/cmdline";
    let seen = pod.sh(&one, "cat /proc/[0-9]*/cmdline | tr '\\0' ' '")?;
    ensure!(
        seen.contains("sleep 2000000"),
        "one does not see two: {seen}"
    );
    ensure!(!seen.contains("sleep 3000000"), "one sees a third: {seen}");
    let first = pod.sh(&two, line)?;
    ensure!(first.contains("/pause"), "PID 1 of the pod: {first}");
    ensure_eq!("PID 1 of its own", pod.sh(&own, line)?, "sleep 3000000");
    ensure_eq!(
        "PID 1 of the target",
        pod.sh(&debug, line)?,
        "sleep 3000000"
    );
    // What loses its parent is the pause's to reap.
    let orphan =
        "(sh -c 'sleep 0.3 & echo $!' >/tmp/pid); sleep 1; test ! -e /proc/$(cat /tmp/pid)";
    pod.sh(&one, orphan)?;
    // A target that ended cannot be joined.
    pod.stop(&own, 0)?;
    let late = launch("late", idle, with(NamespaceMode::Target, &own));
    ensure!(late.is_err(), "joined a container that has ended");
    pod.end()
}

/// The agent holds a pod's `/pause`; another command of that image, or the same outside of a pod, is run.
fn pause_costs_no_program_of_its_own(suite: &Suite) -> Outcome {
    let kind = ["--annotation", "io.kubernetes.cri.container-type=sandbox"];
    let held = suite.run(Image::Pause).flags(&kind);
    let (pod, running) = held.args(&["/pause"]).attach()?;
    pod.wait_status("RUNNING", suite.scale.seconds(30))?;
    let script = "tr '\\0' ' ' </proc/1/cmdline; cat /proc/1/comm; ls /proc | grep -c '^[0-9]'; readlink /proc/1/exe || true";
    let said = pod.exec(&["sh", "-c", script]).output()?.ok()?.text();
    let words: Vec<&str> = said.split_whitespace().collect();
    // Itself, the shell, ls and grep; a script that waits would have another process.
    ensure_eq!(
        "the pause",
        words.get(..2),
        Some(["/pause", "pause"].as_slice())
    );
    ensure!(!said.contains("busybox"), "a program runs: {said}");
    pod.kill("SIGTERM")?.ok()?;
    running.wait()?.expect(0)?;
    pod.delete()?;

    let other = suite.run(Image::Pause).flags(&kind);
    ensure_eq!(
        "another command",
        other.args(&["/pause", "-v"]).output()?.ok()?.text(),
        "pause"
    );
    let alone = suite.run(Image::Pause).args(&["/pause"]);
    let pod = alone.detach()?;
    let exe = pod.sh("readlink /proc/1/exe")?;
    ensure!(exe.contains("busybox"), "not the image's program: {exe}");
    pod.kill("SIGTERM")?.ok()?;
    ensure_eq!("exit status of the image's", pod.delete()?, 0);
    Ok(())
}

fn resources_change_and_are_told(suite: &Suite) -> Outcome {
    let cri = Cri::connect(suite, IMAGES)?;
    let pod = cri.run(cri.config("resources"))?;
    let script = "x=$(head -c 20000000 /dev/zero | tr '\\0' a); while :; do :; done";
    let mut busy = shell("busy", script);
    resources(&mut busy).memory_limit_in_bytes = 64 << 20;
    let busy = pod.launch(busy)?;
    let idle = pod.launch(shell("idle", "exec sleep 1000000"))?;
    let memory = |id: &str| -> Outcome<u64> {
        let memory = pod.stats(id)?.memory.and_then(|m| m.working_set_bytes);
        Ok(memory.context("no memory")?.value)
    };
    until(suite.scale.seconds(20), "20 MB are used", || {
        Ok((20_000_000..64 << 20).contains(&memory(&busy)?))
    })?;
    let little = memory(&idle)?;
    ensure!(
        (1..10_000_000).contains(&little),
        "the idle one has {little} bytes"
    );
    let cpu = || -> Outcome<u64> {
        let cpu = pod
            .stats(&busy)?
            .cpu
            .and_then(|c| c.usage_core_nano_seconds);
        Ok(cpu.context("no CPU time")?.value)
    };
    let before = cpu()?;
    until(suite.scale.seconds(20), "a second of a busy loop", || {
        Ok(cpu()?.saturating_sub(before) > 1_000_000_000)
    })?;
    let told = pod.pod_stats()?;
    ensure_eq!("containers in the pod's stats", told.containers.len(), 2);

    let limits = bulkhead_cri::LinuxContainerResources {
        memory_limit_in_bytes: 96 << 20,
        cpu_period: 100_000,
        cpu_quota: 30_000,
        cpu_shares: 512,
        ..Default::default()
    };
    pod.update(&busy, limits)?;
    let script = "cd /sys/fs/cgroup$(cut -d: -f3 /proc/self/cgroup); cat memory.max cpu.max";
    let seen = pod.sh(&busy, script)?;
    ensure_eq!("limits inside", seen, "100663296\n30000 100000");
    pod.end()
}
