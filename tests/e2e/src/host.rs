//! What a spec asks of the host: hooks, the size of the machine, CPUs by number, namespaces of the pod, fields that are refused.

use std::fs;

use bulkhead_harness::{
    Image, Outcome, Run, Suite, Test, ensure, ensure_eq, failure::Context, runner::MACHINES, spec,
    test,
};
use serde_json::{Value, json};

use crate::host;

const BUSYBOX: &[Image] = &[Image::Busybox];

/// The cases of this group.
pub const TESTS: &[Test] = &[
    test!(
        host::hooks_run_in_order_with_the_containers_state,
        BUSYBOX,
        MACHINES
    ),
    test!(
        host::failing_create_hook_fails_create_and_poststop_runs,
        BUSYBOX,
        MACHINES
    ),
    test!(
        host::failing_poststart_hook_ends_the_container,
        BUSYBOX,
        MACHINES
    ),
    test!(
        host::limits_size_the_machine_and_cpus_are_the_guests,
        BUSYBOX,
        MACHINES
    ),
    test!(
        host::second_container_joins_namespaces_by_the_pid_containerd_knows,
        BUSYBOX,
        MACHINES
    ),
    test!(host::refused_fields_are_named, BUSYBOX, MACHINES),
];

fn shell(script: &str) -> Value {
    json!([{ "path": "/bin/sh", "args": ["hook", "-c", script], "env": ["PATH=/usr/bin:/bin"], "timeout": 20 }])
}

fn hooks_run_in_order_with_the_containers_state(suite: &Suite) -> Outcome {
    let folder = suite.folder(&suite.name("hooks"))?;
    let at = folder.display();
    let hook = |kind: &str| {
        // The pid's program, while there is one.
        shell(&format!(
            "cat > {at}/{kind}; echo {kind} >> {at}/order; \
             pid=$(sed -n 's/.*\"pid\":\\([0-9]*\\).*/\\1/p' {at}/{kind}); \
             test -z \"$pid\" || cat /proc/$pid/comm >> {at}/order"
        ))
    };
    let mut spec = spec::default(&suite.rootfs()?, &["echo", "program"]);
    spec["annotations"] = json!({ "some.key": "its value" });
    for kind in ["prestart", "createRuntime", "poststart", "poststop"] {
        spec["hooks"][kind] = hook(kind);
    }
    let run = Run::of_spec(suite, &spec)?;
    let name = run.name().to_owned();
    ensure_eq!("output", run.output()?.ok()?.text(), "program");
    let read =
        |file: &str| fs::read_to_string(folder.join(file)).context("reading what a hook wrote");
    let order = read("order")?;
    ensure_eq!(
        "order",
        order.lines().collect::<Vec<_>>(),
        [
            "prestart",
            "bulkhead-vmm",
            "createRuntime",
            "bulkhead-vmm",
            "poststart",
            "bulkhead-vmm",
            "poststop"
        ]
    );
    for (kind, status) in [
        ("prestart", "creating"),
        ("createRuntime", "creating"),
        ("poststart", "running"),
        ("poststop", "stopped"),
    ] {
        let state: Value = serde_json::from_str(&read(kind)?).context("parsing the state")?;
        ensure_eq!(kind, state["status"].as_str(), Some(status));
        ensure_eq!(kind, state["id"].as_str(), Some(name.as_str()));
        ensure_eq!(
            kind,
            state["annotations"]["some.key"].as_str(),
            Some("its value")
        );
    }
    Ok(())
}

fn failing_create_hook_fails_create_and_poststop_runs(suite: &Suite) -> Outcome {
    let folder = suite.folder(&suite.name("hooks"))?;
    let mut spec = spec::default(&suite.rootfs()?, &["true"]);
    spec["hooks"]["createRuntime"] = shell("echo no network for you >&2; exit 3");
    spec["hooks"]["poststop"] = shell(&format!("touch {}/poststop", folder.display()));
    let output = Run::of_spec(suite, &spec)?.output()?;
    output.refused(&["hooks.createRuntime[0] (/bin/sh)", "no network for you"])?;
    ensure!(folder.join("poststop").exists(), "poststop did not run");
    Ok(())
}

fn failing_poststart_hook_ends_the_container(suite: &Suite) -> Outcome {
    let mut spec = spec::default(&suite.rootfs()?, &["sleep", "1000"]);
    spec["hooks"]["poststart"] = shell("echo late >&2; exit 4");
    let output = Run::of_spec(suite, &spec)?.output()?;
    output.refused(&["hooks.poststart[0] (/bin/sh)", "late"])?;
    Ok(())
}

fn limits_size_the_machine_and_cpus_are_the_guests(suite: &Suite) -> Outcome {
    let script = "nproc; awk '/MemTotal/ {print int($2/1024)}' /proc/meminfo; \
                  grep Cpus_allowed_list /proc/self/status";
    let mut spec = spec::default(&suite.rootfs()?, &["sh", "-c", script]);
    spec["linux"]["resources"] = json!({
        "cpu": { "quota": 150_000, "period": 100_000 },
        "memory": { "limit": 700 << 20 }
    });
    let text = Run::of_spec(suite, &spec)?.output()?.ok()?.text();
    let numbers: Vec<u64> = text.lines().filter_map(|l| l.parse().ok()).collect();
    // A machine has no more CPUs than the host.
    let cpus = std::thread::available_parallelism().map_or(1, |n| n.get() as u64);
    ensure_eq!("vCPUs", numbers.first(), Some(&cpus.min(2)));
    ensure!(
        numbers.get(1).is_some_and(|&mib| mib > 700),
        "memory: {text}"
    );
    // The host's last CPU is the guest's first.
    let last = (cpus - 1).to_string();
    spec["linux"]["resources"] = json!({ "cpu": { "cpus": last, "mems": "0" } });
    let text = Run::of_spec(suite, &spec)?.output()?.ok()?.text();
    ensure!(text.ends_with("Cpus_allowed_list:\t0"), "output: {text}");
    Ok(())
}

fn second_container_joins_namespaces_by_the_pid_containerd_knows(suite: &Suite) -> Outcome {
    let mut first = spec::default(&suite.rootfs()?, &["sleep", "1000"]);
    first["hostname"] = json!("the-pod");
    let pod = Run::of_spec(suite, &first)?.detach()?;
    let (pid, _) = pod.status()?.context("the first container's status")?;
    let script = "hostname; ps | grep -c '[s]leep 1000'";
    let mut second = spec::default(&suite.rootfs()?, &["sh", "-c", script]);
    second["annotations"] = json!({ "io.kubernetes.cri.sandbox-id": pod.name() });
    second["linux"]["namespaces"] = json!([
        { "type": "mount" }, { "type": "network" },
        { "type": "uts", "path": format!("/proc/{pid}/ns/uts") },
        { "type": "ipc", "path": format!("/proc/{pid}/ns/ipc") },
        { "type": "pid", "path": format!("/proc/{pid}/ns/pid") }
    ]);
    let text = Run::of_spec(suite, &second)?.output()?.ok()?.text();
    ensure_eq!("hostname and processes", text, "the-pod\n1");
    pod.end()?;
    Ok(())
}

fn refused_fields_are_named(suite: &Suite) -> Outcome {
    for (pointer, key, value, needle) in [
        (
            "/linux",
            "intelRdt",
            json!({ "closID": "x" }),
            "linux.intelRdt.closID: the guest has no resctrl",
        ),
        (
            "/process",
            "selinuxLabel",
            json!("a:b:c:d"),
            "process.selinuxLabel",
        ),
        (
            "/linux",
            "devices",
            json!([{ "path": "/dev/kvm", "type": "c", "major": 10, "minor": 232 }]),
            "/dev/kvm, c 10:232",
        ),
    ] {
        let mut spec = spec::default(&suite.rootfs()?, &["true"]);
        if let Some(parent) = spec.pointer_mut(pointer) {
            parent[key] = value;
        }
        Run::of_spec(suite, &spec)?.output()?.refused(&[needle])?;
    }
    Ok(())
}
