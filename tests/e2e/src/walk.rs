//! One walk through all of containerd, for versions other than the one that the whole suite runs on.

use bulkhead_cri::Cri;
use bulkhead_harness::{
    Context, Image, Invocation, Outcome, Suite, Test, command::Input, ensure, ensure_eq,
    events::Events, failure::read, runner::ANY, runner::MACHINES, skip, test,
};

use crate::{network::until, walk};

const BUSYBOX: &[Image] = &[Image::Busybox];
const CRI: &[Image] = &[Image::Pause, Image::Busybox];

/// The cases of this group, which need `--containerd`.
pub const TESTS: &[Test] = &[
    test!(walk::task_from_start_to_end, BUSYBOX, ANY),
    test!(walk::pod_by_cri, CRI, ANY).cri(),
    test!(walk::pod_by_cri_outlives_containerd, CRI, ANY).cri(),
    test!(walk::pod_without_a_pause_container, CRI, MACHINES).cri(),
    test!(walk::pod_outlives_an_upgrade_of_containerd, BUSYBOX, ANY),
];

/// Everything that `ctr` does with a task.
fn task_from_start_to_end(suite: &Suite) -> Outcome {
    let events = Events::subscribe(suite)?;
    let run = suite.busybox().sh("cat; echo err >&2; exit 3");
    let ended = run.input(Input::Bytes(b"in".to_vec())).output()?;
    ensure_eq!("stderr", ended.errors(), "err");
    ensure_eq!("stdout", ended.expect(3)?.text(), "in");

    let script = "trap 'exit 7' TERM; while :; do sleep 0.1; done";
    let pod = suite.busybox().sh(script).detach()?;
    let status = |text: &str| -> Outcome {
        let seen = pod.status()?.map(|(_, status)| status);
        ensure_eq!("status", seen.as_deref(), Some(text));
        Ok(())
    };
    status("RUNNING")?;
    let exec = pod.exec(&["sh", "-c", "cat; exit 4"]);
    let exec = exec.input(Input::Bytes(b"in".to_vec()));
    ensure_eq!("an exec's output", exec.output()?.expect(4)?.text(), "in");
    let list = pod.task(&["ps"]).output()?.ok()?.text();
    ensure!(list.lines().count() > 1, "ps: {list}");
    let output = pod.task(&["metrics", "--format", "json"]).output()?.ok()?;
    let metrics: serde_json::Value =
        serde_json::from_slice(&output.stdout).context("metrics as JSON")?;
    let memory = metrics["memory"]["usage"].as_u64();
    ensure!(memory > Some(0), "memory: {metrics}");
    pod.task(&["pause"]).output()?.ok()?;
    status("PAUSED")?;
    pod.task(&["resume"]).output()?.ok()?;
    status("RUNNING")?;
    suite.restart_containerd()?;
    status("RUNNING")?;
    ensure_eq!("exec after a restart", pod.sh("echo on")?, "on");
    let name = pod.name().to_owned();
    let after = Events::subscribe(suite)?;
    pod.kill("SIGTERM")?.ok()?;
    ensure_eq!("exit status", pod.delete()?, 7);
    after.wait_for(&name, "/tasks/delete", suite.scale.seconds(5))?;
    let (mut seen, later) = (events.of(&name), after.of(&name));
    seen.extend(later);
    let topics: Vec<&str> = seen
        .iter()
        .filter_map(|e| e.topic.strip_prefix("/tasks/"))
        .collect();
    ensure_eq!(
        "events",
        topics.join(" "),
        "create start exec-added exec-started exit paused resumed exit delete"
    );
    Ok(())
}

/// A pod begun under the older version goes on under this one: its output, its execs, its exit status.
fn pod_outlives_an_upgrade_of_containerd(suite: &Suite) -> Outcome {
    let mut containerd = suite.older_containerd("upgraded")?;
    let address = containerd.address();
    let ctr = |args: &[&str]| -> Outcome<String> {
        Ok(suite.ctr_at(&address, args).output()?.ok()?.text())
    };
    let tar = suite.tar_of(Image::Busybox)?;
    ctr(&["image", "import", &tar.to_string_lossy()])?;
    let log = suite.folder("upgraded")?.join("log");
    let uri = format!("file://{}", log.display());
    let name = suite.name("u");
    let image = Image::Busybox.reference();
    let script =
        "trap 'echo end; exit 5' TERM; i=0; while :; do echo $i; i=$((i+1)); sleep 0.05; done";
    ctr(&[
        &["run", "-d", "--log-uri", &uri, "--runtime", suite.runtime()][..],
        &[&image, &name, "sh", "-c", script],
    ]
    .concat())?;
    suite.upgrade(&mut containerd)?;
    let exec = ["task", "exec", "--exec-id", "e", &name, "echo", "on"];
    ensure_eq!("exec", ctr(&exec)?, "on");
    let before = read(&log)?.lines().count();
    until(suite.scale.seconds(10), "more output", || {
        Ok(read(&log)?.lines().count() > before)
    })?;
    ctr(&["task", "kill", "-s", "SIGTERM", &name])?;
    until(suite.scale.seconds(10), "its end", || {
        let list = ctr(&["task", "ls"])?;
        Ok(list.contains("STOPPED"))
    })?;
    let removed = suite.ctr_at(&address, ["task", "rm", &name]).output()?;
    let said = removed.ok()?.errors();
    ensure!(said.contains("non-zero exit code 5"), "exit status: {said}");
    ctr(&["container", "rm", &name])?;
    let text = read(&log)?;
    let count = text.lines().count().saturating_sub(1);
    let lines: String = (0..count).map(|n| format!("{n}\n")).collect();
    ensure_eq!("output", text, lines + "end\n");
    Ok(())
}

/// A pod of CRI with a pause container.
fn pod_by_cri(suite: &Suite) -> Outcome {
    let cri = Cri::connect(suite, CRI)?;
    pod(&cri, cri.run(cri.config("walk"))?)
}

fn pod_by_cri_outlives_containerd(suite: &Suite) -> Outcome {
    let cri = Cri::connect(suite, CRI)?;
    let pod = cri.run(cri.config("outlives"))?;
    let container = pod.start("one", Image::Busybox, &["sleep", "1000000"])?;
    suite.restart_containerd()?;
    let cri = Cri::connect(suite, CRI)?;
    let pod = pod.through(&cri);
    ensure_eq!("exec", pod.exec(&container, &["echo", "on"])?.stdout, "on");
    pod.remove(&container)?;
    pod.end()
}

/// A pod whose sandbox is the shim itself.
fn pod_without_a_pause_container(suite: &Suite) -> Outcome {
    if suite.major < 2 {
        return skip("this containerd does not know the Sandbox API");
    }
    let cri = Cri::connect(suite, CRI)?;
    pod(&cri, cri.run_with("sandboxed", cri.config("walk"))?)?;

    let pod = cri.run_with("sandboxed", cri.config("outlives"))?;
    let container = pod.start("one", Image::Busybox, &["sleep", "1000000"])?;
    suite.restart_containerd()?;
    let cri = Cri::connect(suite, CRI)?;
    let pod = pod.through(&cri);
    ensure_eq!("exec", pod.exec(&container, &["echo", "on"])?.stdout, "on");
    let (ready, info) = pod.state()?;
    let pid = info["pid"]
        .as_u64()
        .context(format_args!("pid in {info}"))?;
    ensure!(ready && info["vcpus"].as_u64() > Some(0), "{info}");
    // The machine's end is the pod's.
    let kill = Invocation::new("kill").args(["-9", &pid.to_string()]);
    kill.output()?.ok()?;
    until(suite.scale.seconds(10), "the pod is not ready", || {
        Ok(!pod.state()?.0)
    })?;
    pod.end()
}

/// What kubelet does with a pod, and what it then reads.
fn pod(cri: &Cri, pod: bulkhead_cri::Sandbox<'_>) -> Outcome {
    let one = pod.start("one", Image::Busybox, &["sleep", "1000000"])?;
    let two = pod.start("two", Image::Busybox, &["sleep", "1000000"])?;
    let said = pod.exec(
        &one,
        &["sh", "-c", "cat /etc/hostname; echo no >&2; exit 3"],
    )?;
    ensure_eq!("exit code", said.code, 3);
    ensure_eq!("stderr", said.stderr, "no");
    ensure_eq!("hostname", said.stdout, "walk");
    let files = pod.exec(&one, &["cat", "/etc/hosts", "/etc/resolv.conf"])?;
    ensure_eq!("files of the pod", files.code, 0);
    let address = pod.addresses()?;
    let seen = pod.exec(&two, &["ip", "-o", "address", "show", "dev", "eth0"])?;
    for address in &address {
        ensure!(
            seen.stdout.contains(address),
            "no {address}: {}",
            seen.stdout
        );
    }
    let ipc = ["readlink", "/proc/self/ns/ipc"];
    ensure_eq!(
        "ipc namespaces",
        pod.exec(&one, &ipc)?.stdout,
        pod.exec(&two, &ipc)?.stdout
    );
    let received = cri.received()?;
    ensure!(
        received.iter().any(|(id, _)| id == pod.id()),
        "stats: {received:?}"
    );
    pod.remove(&one)?;
    pod.end()
}
