//! A task's states, what `ctr task` tells of it, and the events.

use bulkhead_harness::{
    Image, Outcome, Suite, Test, ensure, ensure_eq, events::Events, failure::write, runner::ANY,
    runner::MACHINES, test,
};

use crate::lifecycle;

const BUSYBOX: &[Image] = &[Image::Busybox];

/// The cases of this group.
pub const TESTS: &[Test] = &[
    test!(lifecycle::list_shows_the_state, BUSYBOX, ANY),
    test!(lifecycle::processes_are_listed, BUSYBOX, ANY),
    test!(
        lifecycle::metrics_are_those_of_the_container,
        BUSYBOX,
        MACHINES
    ),
    test!(
        lifecycle::paused_container_stands_still_and_goes_on,
        BUSYBOX,
        ANY
    ),
    test!(lifecycle::kill_all_ends_every_process, BUSYBOX, ANY),
    test!(
        lifecycle::kill_of_an_ended_container_is_not_found,
        BUSYBOX,
        ANY
    ),
    test!(lifecycle::running_container_is_not_deleted, BUSYBOX, ANY),
    test!(lifecycle::deleted_by_force_while_it_runs, BUSYBOX, ANY),
    test!(
        lifecycle::created_container_can_be_started_again_after_its_end,
        BUSYBOX,
        ANY
    ),
    test!(lifecycle::events_come_in_order, BUSYBOX, ANY),
    test!(
        lifecycle::containerd_restart_leaves_the_pod_running,
        BUSYBOX,
        ANY
    ),
    test!(
        lifecycle::exit_while_containerd_is_away_is_told_later,
        BUSYBOX,
        MACHINES
    ),
];

fn list_shows_the_state(suite: &Suite) -> Outcome {
    let pod = suite
        .busybox()
        .sh("trap 'exit 7' TERM; sleep 1000 & wait")
        .detach()?;
    let (pid, status) = pod.status()?.unwrap_or_default();
    ensure_eq!("status", status, "RUNNING");
    ensure!(pid > 0, "pid is {pid}");
    // Without its handler yet, PID 1 would not hear the signal.
    pod.sh("until pidof sleep; do sleep 0.1; done")?;
    pod.kill("SIGTERM")?.ok()?;
    pod.wait_status("STOPPED", suite.scale.seconds(10))?;
    ensure_eq!("exit status of the task", pod.delete()?, 7);
    Ok(())
}

fn processes_are_listed(suite: &Suite) -> Outcome {
    let pod = suite
        .busybox()
        .sh("sleep 1000 & sleep 1000 & wait")
        .detach()?;
    pod.sh("until [ $(pidof sleep | wc -w) = 2 ]; do sleep 0.1; done")?;
    let text = pod.task(&["ps"]).output()?.ok()?.text();
    ensure_eq!("header and three processes", text.lines().count(), 4);
    pod.end()?;
    Ok(())
}

fn metrics_are_those_of_the_container(suite: &Suite) -> Outcome {
    let script = "head -c 20000000 /dev/zero >/dev/shm/x; sleep 1000 & wait";
    let pod = suite
        .busybox()
        .flags(&["--memory-limit", "100663296"])
        .sh(script)
        .detach()?;
    pod.sh("while [ $(stat -c %s /dev/shm/x) -lt 20000000 ]; do sleep 0.1; done")?;
    let output = pod.task(&["metrics", "--format", "json"]).output()?.ok()?;
    let metrics: serde_json::Value = serde_json::from_slice(&output.stdout)
        .map_err(|e| format!("metrics: {e}: {}", output.text()))?;
    let memory = &metrics["memory"];
    let usage = memory["usage"].as_u64().unwrap_or(0);
    ensure!(
        (20_000_000..100_663_296).contains(&usage),
        "memory usage: {metrics}"
    );
    ensure_eq!("limit", memory["usage_limit"].as_u64(), Some(100_663_296));
    ensure_eq!("pids", metrics["pids"]["current"].as_u64(), Some(2));
    ensure!(
        metrics["cpu"]["usage_usec"].as_u64() > Some(0),
        "cpu: {metrics}"
    );
    pod.end()?;
    Ok(())
}

fn paused_container_stands_still_and_goes_on(suite: &Suite) -> Outcome {
    let (pod, running) = suite
        .busybox()
        .sh("while :; do echo tick; sleep 0.1; done")
        .attach()?;
    running.wait_for("tick\ntick", suite.scale.seconds(30))?;
    pod.task(&["pause"]).output()?.ok()?;
    ensure_eq!(
        "status",
        pod.status()?.map(|(_, s)| s),
        Some("PAUSED".to_owned())
    );
    std::thread::sleep(suite.scale.seconds(1) / 2);
    let before = running.stdout_len();
    std::thread::sleep(suite.scale.seconds(1));
    ensure_eq!("bytes while paused", running.stdout_len(), before);
    pod.task(&["resume"]).output()?.ok()?;
    ensure_eq!(
        "status",
        pod.status()?.map(|(_, s)| s),
        Some("RUNNING".to_owned())
    );
    std::thread::sleep(suite.scale.seconds(1));
    ensure!(running.stdout_len() > before, "nothing after resume");
    pod.kill("SIGKILL")?.ok()?;
    running.wait()?.expect(137)?;
    pod.delete()?;
    Ok(())
}

fn kill_all_ends_every_process(suite: &Suite) -> Outcome {
    let script = "trap '' TERM; (trap - TERM; exec sleep 1000) & child=$!; echo up; wait $child; echo child $?; sleep 1000";
    let (pod, running) = suite.busybox().sh(script).attach()?;
    running.wait_for("up", suite.scale.seconds(30))?;
    pod.task(&["kill", "--all", "-s", "SIGTERM"])
        .output()?
        .ok()?;
    running.wait_for("child 143", suite.scale.seconds(10))?;
    pod.task(&["kill", "--all", "-s", "SIGKILL"])
        .output()?
        .ok()?;
    running.wait()?.expect(137)?;
    pod.delete()?;
    Ok(())
}

fn kill_of_an_ended_container_is_not_found(suite: &Suite) -> Outcome {
    let pod = suite.busybox().sh("exit 0").detach()?;
    pod.wait_status("STOPPED", suite.scale.seconds(20))?;
    pod.kill("SIGTERM")?.refused(&["not found"])?;
    pod.delete()?;
    Ok(())
}

fn running_container_is_not_deleted(suite: &Suite) -> Outcome {
    let pod = suite.busybox().sh("sleep 1000").detach()?;
    ensure!(
        pod.task(&["rm"]).output()?.status != 0,
        "a running task was deleted"
    );
    ensure_eq!("container", pod.sh("echo on")?, "on");
    pod.end()?;
    Ok(())
}

fn deleted_by_force_while_it_runs(suite: &Suite) -> Outcome {
    suite.busybox().sh("sleep 1000").detach()?.delete_by_force()
}

fn created_container_can_be_started_again_after_its_end(suite: &Suite) -> Outcome {
    let name = suite.name("again");
    let folder = suite.folder("again")?;
    write(folder.join("script"), "echo run >>/count; wc -l </count")?;
    let mount = format!(
        "type=bind,src={},dst=/again,options=rbind:ro",
        folder.display()
    );
    let image = Image::Busybox.reference();
    suite
        .ctr([
            "container",
            "create",
            "--runtime",
            suite.runtime(),
            "--mount",
            &mount,
        ])
        .args([&image, &name, "sh", "/again/script"])
        .output()?
        .ok()?;
    for round in ["1", "2"] {
        let output = suite.ctr(["task", "start", &name]).output()?.ok()?;
        ensure_eq!("runs so far", output.text(), round);
    }
    suite.ctr(["container", "rm", &name]).output()?.ok()?;
    Ok(())
}

fn events_come_in_order(suite: &Suite) -> Outcome {
    let events = Events::subscribe(suite)?;
    let pod = suite.busybox().sh("sleep 1000").detach()?;
    pod.exec(&["sh", "-c", "exit 4"])
        .flags(&["--exec-id", "four"])
        .output()?
        .expect(4)?;
    let name = pod.name().to_owned();
    pod.task(&["pause"]).output()?.ok()?;
    pod.task(&["resume"]).output()?.ok()?;
    pod.kill("SIGKILL")?.ok()?;
    pod.delete()?;
    events.wait_for(&name, "/tasks/delete", suite.scale.seconds(5))?;
    let seen = events.of(&name);
    let topics: Vec<&str> = seen
        .iter()
        .map(|event| event.topic.as_str())
        .filter(|topic| topic.starts_with("/tasks/"))
        .collect();
    let expected = [
        "/tasks/create",
        "/tasks/start",
        "/tasks/exec-added",
        "/tasks/exec-started",
        "/tasks/exit",
        "/tasks/paused",
        "/tasks/resumed",
        "/tasks/exit",
        "/tasks/delete",
    ];
    ensure_eq!("topics", topics, expected);
    let exits: Vec<(Option<&str>, Option<u64>)> = seen
        .iter()
        .filter(|event| event.topic == "/tasks/exit")
        .map(|event| {
            (
                event.fields["id"].as_str(),
                event.fields["exit_status"].as_u64(),
            )
        })
        .collect();
    ensure_eq!(
        "exits",
        exits,
        [(Some("four"), Some(4)), (Some(name.as_str()), Some(137))]
    );
    Ok(())
}

fn containerd_restart_leaves_the_pod_running(suite: &Suite) -> Outcome {
    let pod = suite
        .busybox()
        .sh("trap 'exit 9' TERM; sleep 1000 & wait")
        .detach()?;
    suite.restart_containerd()?;
    ensure_eq!(
        "status",
        pod.status()?.map(|(_, s)| s),
        Some("RUNNING".to_owned())
    );
    ensure_eq!("exec", pod.sh("echo on")?, "on");
    pod.kill("SIGTERM")?.ok()?;
    ensure_eq!("exit status", pod.delete()?, 9);
    Ok(())
}

fn exit_while_containerd_is_away_is_told_later(suite: &Suite) -> Outcome {
    let pod = suite.busybox().sh("sleep 0.2; exit 6").detach()?;
    suite.restart_containerd()?;
    pod.wait_status("STOPPED", suite.scale.seconds(10))?;
    ensure_eq!("exit status", pod.delete()?, 6);
    Ok(())
}
