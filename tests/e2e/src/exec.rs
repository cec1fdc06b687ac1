//! Further processes in a running container.

use bulkhead_harness::{
    Context, Engine, Image, Outcome, Pod, Run, Suite, Test, command::Input, ensure, ensure_eq,
    process, runner::ANY, spec, test,
};
use serde_json::json;

use crate::{exec, network::until};

const BUSYBOX: &[Image] = &[Image::Busybox];

/// The cases of this group.
pub const TESTS: &[Test] = &[
    test!(exec::output_and_exit_code_come_through, BUSYBOX, ANY),
    test!(exec::user_folder_and_terminal_are_its_own, BUSYBOX, ANY),
    test!(exec::stdin_ends_when_the_client_ends_it, BUSYBOX, ANY),
    test!(
        exec::shares_the_containers_namespaces_and_limits,
        BUSYBOX,
        ANY
    ),
    test!(
        exec::missing_program_is_said_and_the_container_goes_on,
        BUSYBOX,
        ANY
    ),
    test!(exec::signal_reaches_only_the_exec, BUSYBOX, ANY),
    test!(exec::many_one_after_another_leave_nothing, BUSYBOX, ANY).fast_host(),
    test!(exec::many_at_once, BUSYBOX, ANY),
    test!(exec::ends_with_the_container, BUSYBOX, ANY),
    test!(exec::of_a_stopped_container_is_refused, BUSYBOX, ANY),
];

fn sleeper(suite: &Suite) -> Outcome<Pod<'_>> {
    suite
        .busybox()
        .flags(&["--env", "A=b"])
        .sh("sleep 1000")
        .detach()
}

fn output_and_exit_code_come_through(suite: &Suite) -> Outcome {
    let pod = sleeper(suite)?;
    let output = pod
        .exec(&["sh", "-c", "echo out; echo err >&2; exit 3"])
        .output()?
        .expect(3)?;
    ensure_eq!(
        "stdout and stderr",
        (output.text(), output.errors()),
        ("out".into(), "err".into())
    );
    pod.exec(&["sh", "-c", "kill -9 $$"])
        .output()?
        .expect(137)?;
    pod.end()?;
    Ok(())
}

fn user_folder_and_terminal_are_its_own(suite: &Suite) -> Outcome {
    let pod = sleeper(suite)?;
    let exec = pod.exec(&[
        "sh",
        "-c",
        "id -u; id -g; pwd; grep CapEff /proc/self/status",
    ]);
    let text = exec
        .flags(&["--user", "65534:65534", "--cwd", "/tmp"])
        .output()?
        .ok()?
        .text();
    ensure_eq!(
        "user and folder",
        text,
        "65534\n65534\n/tmp\nCapEff:\t0000000000000000"
    );
    let exec = pod
        .exec(&["sh", "-c", "sleep 0.5; stty size; tty; exit 5"])
        .terminal(31, 91);
    let text = exec.output()?.expect(5)?.text();
    ensure_eq!("terminal", text, "31 91\n/dev/pts/0");
    pod.end()?;
    Ok(())
}

fn stdin_ends_when_the_client_ends_it(suite: &Suite) -> Outcome {
    let pod = sleeper(suite)?;
    let mut running = pod
        .exec(&["sh", "-c", "echo up; cat; echo end"])
        .input(Input::Open)
        .spawn()?;
    running.wait_for("up", suite.scale.seconds(20))?;
    running.write(b"some text\n")?;
    running.wait_for("some text", suite.scale.seconds(10))?;
    running.close_stdin();
    ensure_eq!("output", running.wait()?.ok()?.text(), "up\nsome text\nend");
    pod.end()?;
    Ok(())
}

fn shares_the_containers_namespaces_and_limits(suite: &Suite) -> Outcome {
    let pod = sleeper(suite)?;
    let script = r#"for n in mnt uts ipc net pid; do
        [ "$(readlink /proc/1/ns/$n)" = "$(readlink /proc/self/ns/$n)" ] || echo "other $n"; done
        echo $A; cmp /proc/1/cgroup /proc/self/cgroup && echo same; ulimit -n; grep NoNewPrivs /proc/self/status | tr -s '\t' ' '"#;
    ensure_eq!("exec", pod.sh(script)?, "b\nsame\n1024\nNoNewPrivs: 1");
    pod.end()?;
    Ok(())
}

fn missing_program_is_said_and_the_container_goes_on(suite: &Suite) -> Outcome {
    let pod = sleeper(suite)?;
    pod.exec(&["no-such-program"])
        .output()?
        .refused(&["no-such-program", "executable file not found in $PATH"])?;
    pod.exec(&["/etc/passwd"])
        .output()?
        .refused(&["/etc/passwd", "permission denied"])?;
    ensure_eq!("container", pod.sh("echo on")?, "on");
    pod.end()?;
    Ok(())
}

fn signal_reaches_only_the_exec(suite: &Suite) -> Outcome {
    let pod = sleeper(suite)?;
    let running = pod
        .exec(&["sh", "-c", "echo up; exec sleep 1000"])
        .flags(&["--exec-id", "victim"])
        .spawn()?;
    running.wait_for("up", suite.scale.seconds(20))?;
    pod.task(&["kill", "-s", "SIGKILL", "--exec-id", "victim"])
        .output()?
        .ok()?;
    running.wait()?.expect(137)?;
    ensure_eq!("container", pod.sh("echo on")?, "on");
    pod.end()?;
    Ok(())
}

/// Execs before the first look: buffers and pools have their size then.
const WARM_UP: u32 = 20;

/// How many one after another: the scale's, or as many as the variable says (the product's promise is 1,000).
fn execs(suite: &Suite) -> u32 {
    let asked = std::env::var("BULKHEAD_E2E_EXECS").ok();
    asked
        .and_then(|text| text.parse().ok())
        .unwrap_or(suite.scale.execs)
}

/// What a process holds.
#[derive(Debug)]
struct Held {
    name: String,
    descriptors: usize,
    /// None where it tells nothing: the emulator's translation cache grows with the code that runs.
    kib: Option<u64>,
}

/// The pod's processes on the host, and the agent.
fn held(suite: &Suite, pod: &Pod<'_>) -> Outcome<Vec<Held>> {
    if suite.engine == Engine::Runc {
        return Ok(Vec::new());
    }
    let script = "ls /proc/1/fd | wc -l; grep VmRSS /proc/1/status | tr -dc 0-9";
    let text = pod.sh(script)?;
    let mut numbers = text.lines().map(str::parse);
    let mut number = || numbers.next().and_then(Result::ok);
    let agent = Held {
        name: "agent".into(),
        descriptors: number().context(format_args!("the agent's descriptors: {text}"))?,
        kib: Some(number().context(format_args!("the agent's memory: {text}"))? as u64),
    };
    let mut all = vec![agent];
    for process in pod.processes() {
        let emulator = process.name.starts_with("qemu");
        all.push(Held {
            descriptors: process::fds(process.pid),
            kib: match emulator {
                true => None,
                false => Some(process.memory_kib(512)?),
            },
            name: process.name,
        });
    }
    ensure!(all.len() >= 4, "processes of the pod: {all:?}");
    Ok(all)
}

fn many_one_after_another_leave_nothing(suite: &Suite) -> Outcome {
    // Without a pid namespace of its own it sees the guest's processes, and so the agent.
    let mut spec = spec::default(&suite.rootfs()?, &["sleep", "1000"]);
    spec["process"]["capabilities"]["bounding"] = json!(["CAP_SYS_PTRACE"]);
    spec["process"]["capabilities"]["effective"] = json!(["CAP_SYS_PTRACE"]);
    spec["process"]["capabilities"]["permitted"] = json!(["CAP_SYS_PTRACE"]);
    if let Some(list) = spec["linux"]["namespaces"].as_array_mut() {
        list.retain(|namespace| namespace["type"] != "pid");
    }
    let pod = Run::of_spec(suite, &spec)?.detach()?;
    let count = execs(suite);
    let mut before = Vec::new();
    for round in 0..WARM_UP + count {
        if round == WARM_UP {
            before = held(suite, &pod)?;
        }
        let text = format!("round {round}");
        let output = pod
            .exec(&["sh", "-c", &format!("echo {text}; exit {}", round % 7)])
            .output()?;
        ensure_eq!("output", output.expect((round % 7) as i32)?.text(), text);
    }
    if suite.engine != Engine::Runc {
        ensure_eq!("processes left", pod.sh("ps -o comm | grep -c sleep")?, "1");
    }
    // Half a KiB an exec and the unrest of an allocator.
    let growth = 256 + u64::from(count) / 2;
    let mut after = Vec::new();
    until(suite.scale.seconds(10), "as much as before", || {
        after = held(suite, &pod)?;
        Ok(before.iter().zip(&after).all(|(before, after)| {
            before.name == after.name
                && before.descriptors == after.descriptors
                && after.kib <= before.kib.map(|k| k + growth)
        }))
    })
    .map_err(|error| format!("{error}: before {before:?}, after {count} execs {after:?}"))?;
    if count > suite.scale.execs {
        println!("         before {before:?}, after {count} execs {after:?}");
    }
    pod.end()?;
    Ok(())
}

fn many_at_once(suite: &Suite) -> Outcome {
    let pod = sleeper(suite)?;
    let mut running = Vec::new();
    for index in 0..suite.scale.execs_at_once {
        let script =
            format!("echo {index}; sleep 1; head -c 100000 /dev/zero | tr '\\0' x; exit {index}");
        running.push(pod.exec(&["sh", "-c", &script]).spawn()?);
    }
    for (index, running) in running.into_iter().enumerate() {
        let output = running.wait()?.expect(index as i32)?;
        let length = index.to_string().len() as u64 + 1 + 100_000;
        ensure_eq!("length of the output", output.stdout_len, length);
        ensure!(
            output.text().starts_with(&format!("{index}\nx")),
            "output of another exec"
        );
    }
    pod.end()?;
    Ok(())
}

fn ends_with_the_container(suite: &Suite) -> Outcome {
    let pod = sleeper(suite)?;
    let running = pod
        .exec(&["sh", "-c", "echo up; exec sleep 1000"])
        .spawn()?;
    running.wait_for("up", suite.scale.seconds(20))?;
    pod.kill("SIGKILL")?.ok()?;
    running.wait()?.expect(137)?;
    pod.delete()?;
    Ok(())
}

fn of_a_stopped_container_is_refused(suite: &Suite) -> Outcome {
    let pod = suite.busybox().sh("exit 0").detach()?;
    pod.wait_status("STOPPED", suite.scale.seconds(20))?;
    let output = pod.exec(&["true"]).output()?;
    ensure!(output.status != 0, "an exec started in a stopped container");
    pod.delete()?;
    Ok(())
}
