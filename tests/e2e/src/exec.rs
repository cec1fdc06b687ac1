//! Further processes in a running container.

use bulkhead_harness::{
    Image, Outcome, Pod, Suite, Test, command::Input, ensure, ensure_eq, runner::ANY, test,
};

use crate::exec;

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
    test!(exec::many_one_after_another, BUSYBOX, ANY),
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

fn many_one_after_another(suite: &Suite) -> Outcome {
    let pod = sleeper(suite)?;
    for round in 0..suite.scale.execs {
        let text = format!("round {round}");
        let output = pod
            .exec(&["sh", "-c", &format!("echo {text}; exit {}", round % 7)])
            .output()?;
        ensure_eq!("output", output.expect((round % 7) as i32)?.text(), text);
    }
    ensure_eq!("processes left", pod.sh("ps -o comm | grep -c sleep")?, "1");
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
