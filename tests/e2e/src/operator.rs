//! The operator's command, and what errors of machines look like to a client.

use std::{
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    time::Instant,
};

use bulkhead_harness::{
    Context, Engine, Image, Outcome, Suite, Test, command::Input, command::Invocation, ensure,
    ensure_eq, failure::write, runner::MACHINES, test,
};
use rustix::process::Signal;
use serde_json::Value;

use crate::operator;

const BUSYBOX: &[Image] = &[Image::Busybox];

/// The cases of this group.
pub const TESTS: &[Test] = &[
    test!(
        operator::a_pod_is_listed_and_opened_where_that_is_allowed,
        BUSYBOX,
        MACHINES
    ),
    test!(
        operator::no_shell_unless_the_machine_was_started_with_it,
        BUSYBOX,
        MACHINES
    ),
    test!(operator::failures_are_post_mortems, BUSYBOX, MACHINES),
    test!(
        operator::installed_files_run_a_container_and_undo_leaves_nothing,
        BUSYBOX,
        MACHINES
    )
    .fast_host(),
];

/// The operator's command on the suite's pods.
pub fn bulkhead(suite: &Suite, args: &[&str]) -> Invocation {
    Invocation::new(suite.dist.join("bulkhead"))
        .args(args)
        .env("BULKHEAD_CONFIG", suite.config())
        .limit(suite.scale.seconds(30))
}

fn a_pod_is_listed_and_opened_where_that_is_allowed(suite: &Suite) -> Outcome {
    let _configured = suite.configured("debug_shell = true")?;
    let checked = bulkhead(suite, &["check"]).output()?.text();
    ensure!(checked.contains("debug_shell = true"), "{checked}");
    let wide = checked.lines().find(|line| line.chars().count() > 100);
    ensure!(wide.is_none(), "check: wider than 100 columns: {wide:?}");
    let pod = suite.busybox().args(&["sleep", "1000"]).detach()?;
    let name = format!("{}/{}", suite.namespace(), pod.name());

    let list = bulkhead(suite, &["list"]).output()?.ok()?.text();
    let row = list.lines().find(|line| line.contains(pod.name()));
    let row = row.context(format_args!("{name} is not listed: {list}"))?;
    ensure!(row.contains("running*") && row.len() <= 100, "{row}");
    let json = bulkhead(suite, &["inspect", &name]).output()?.ok()?.text();
    let report: Value = serde_json::from_str(&json).context("inspect")?;
    ensure_eq!(
        "containers",
        report["containers"],
        serde_json::json!([pod.name()])
    );
    for stage in ["vmm", "machine", "kernel", "agent", "container", "total"] {
        let took = report["stages_us"][stage].as_u64();
        ensure!(took.is_some(), "no time of stage {stage}: {json}");
    }
    let log = bulkhead(suite, &["logs", pod.name()])
        .output()?
        .ok()?
        .text();
    ensure!(
        log.contains("vmm   | ") && log.contains("machine started"),
        "{log}"
    );

    // With pipes: each stream by itself, and the exit status.
    let script = "echo out; echo err >&2; cat; test -e /proc/1/exe && exit 7";
    let shell = bulkhead(suite, &["exec", pod.name(), "--", "sh", "-c", script]);
    let said = shell
        .input(Input::Bytes(b"in\n".to_vec()))
        .output()?
        .expect(7)?;
    ensure_eq!("stdout", said.text(), "out\nin");
    ensure_eq!("stderr", said.errors().trim().to_owned(), "err");
    // It is beside the containers: the agent is PID 1, and the container's program is there.
    let processes = bulkhead(suite, &["exec", &name, "ps"])
        .output()?
        .ok()?
        .text();
    ensure!(
        processes.contains("/init") && processes.contains("sleep 1000"),
        "{processes}"
    );
    // With a terminal.
    let shell = bulkhead(
        suite,
        &["exec", pod.name(), "sh", "-c", "stty size; tty; exit 5"],
    );
    let said = shell.in_terminal(33, 99).output()?.expect(5)?.text();
    ensure!(
        said.contains("33 99") && said.contains("/dev/pts/"),
        "{said}"
    );
    pod.end()?;
    bulkhead(suite, &["logs", &name])
        .output()?
        .refused(&["there is no pod"])?;
    Ok(())
}

fn no_shell_unless_the_machine_was_started_with_it(suite: &Suite) -> Outcome {
    let pod = suite.busybox().args(&["sleep", "1000"]).detach()?;
    // What the configuration says now does not matter.
    let _configured = suite.configured("debug_shell = true")?;
    bulkhead(suite, &["exec", pod.name(), "true"])
        .output()?
        .refused(&["no debugging shell", "debug_shell = true"])?;
    // Nor is the command the only thing in the way: nobody listens in the guest.
    use std::io::{Read, Write};
    let mut socket =
        UnixStream::connect(suite.state_of(pod.name()).join("vsock.sock")).context("vsock")?;
    socket
        .set_read_timeout(Some(suite.scale.seconds(20)))
        .context("time limit")?;
    socket.write_all(b"CONNECT 1029\n").context("connect")?;
    let mut answer = Vec::new();
    let read = socket.read_to_end(&mut answer);
    ensure!(
        read.is_ok() && !answer.starts_with(b"OK"),
        "port 1029 of the guest answers: {read:?} {:?}",
        String::from_utf8_lossy(&answer)
    );
    pod.end()?;
    Ok(())
}

/// What a client prints: ten lines of 100 columns at most beside the client's own words, without control characters.
fn post_mortem(errors: &str) -> Outcome {
    let begin = errors.find("task: ").or_else(|| errors.find("ctr: "));
    let at = begin.context(format_args!("no error: {errors}"))?;
    let text = errors.get(at + 6..).unwrap_or_default();
    ensure!(
        text.trim().lines().count() <= 10,
        "more than ten lines: {text}"
    );
    for line in text.trim().lines() {
        let line = line.trim_end_matches(": unavailable");
        ensure!(
            line.chars().count() <= 100,
            "wider than 100 columns: {line}"
        );
        ensure!(!line.chars().any(char::is_control), "{line:?}");
    }
    Ok(())
}

fn failures_are_post_mortems(suite: &Suite) -> Outcome {
    // An initramfs whose /init is no program.
    let file = suite.folder("post-mortem")?.join("broken.cpio");
    let mut bytes =
        std::fs::read(suite.dist.join("initramfs.cpio")).context("read the initramfs")?;
    let elf = bytes
        .windows(4)
        .position(|window| window == b"\x7fELF")
        .context("no ELF")?;
    bytes[elf..elf + 64].fill(0);
    write(&file, bytes)?;
    {
        let _configured = suite.configured(&format!("initramfs = {file:?}"))?;
        let output = suite.busybox().args(&["true"]).output()?;
        let output = output.refused(&[
            "while the guest's kernel booted: guest-panic",
            "\n  Kernel panic - not syncing: No working init found",
            "\n  | [",
            "\n  took: shim ",
            "kernel not done after",
        ])?;
        post_mortem(&output.errors())?;
    }
    if suite.engine == Engine::Emulated {
        // An ELF file that is no kernel: what the emulator says is told.
        let _configured = suite.configured("kernel = \"/proc/self/exe\"")?;
        let output = suite.busybox().args(&["true"]).output()?;
        let output = output.refused(&[
            "engine-failed",
            "Error loading uncompressed kernel",
            "took: ",
        ])?;
        post_mortem(&output.errors())?;
    }
    // A machine that dies later: whoever asks for something in it learns why, and how its start had been.
    let pod = suite.busybox().args(&["sleep", "1000"]).detach()?;
    pod.process("bulkhead-vmm")?.signal(Signal::KILL)?;
    pod.wait_status("STOPPED", suite.scale.seconds(5))?;
    let output = pod.exec(&["true"]).output()?.refused(&[
        "ended while the pod ran: vmm-died",
        "killed by signal 9",
        "container ",
    ])?;
    post_mortem(&output.errors())?;
    pod.delete()?;
    Ok(())
}

/// Everything in a folder, by path, kind, permissions and content.
fn tree(root: &Path) -> Outcome<String> {
    let script = "cd \"$1\" && find . -printf '%p %y %m %l\\n' | sort && find . -type f -print0 | sort -z | xargs -0r sha256sum";
    let list = Invocation::new("sh").args(["-ec", script, "sh"]).arg(root);
    Ok(list.output()?.ok()?.text())
}

fn installed_files_run_a_container_and_undo_leaves_nothing(suite: &Suite) -> Outcome {
    let folder = suite.folder(&suite.name("install"))?;
    let root = folder.join("root");
    let docker = root.join("etc/docker");
    std::fs::create_dir_all(&docker).context("make folders")?;
    write(docker.join("daemon.json"), "{\n  \"debug\": true\n}\n")?;
    let before = tree(&root)?;
    let version = Invocation::new("containerd")
        .arg("--version")
        .output()?
        .text();
    let path = root.to_string_lossy().into_owned();
    let install = |more: &[&str]| {
        let args = [&["install", "--root", &path], more].concat();
        bulkhead(suite, &args)
            .output()?
            .ok()
            .map(|output| output.text())
    };
    let shown = install(&["--dry-run"])?;
    ensure!(
        shown.contains("+     \"runtimes\""),
        "no change of daemon.json: {shown}"
    );
    ensure_eq!("the root after a dry run", tree(&root)?, before);
    let done = install(&[])?;
    ensure!(done.contains("systemctl restart containerd"), "{done}");
    let installed = tree(&root)?;
    install(&[])?;
    ensure_eq!("the root after a second time", tree(&root)?, installed);
    run_installed(suite, &folder, &root)?;
    // For the other generation of containerd the file is of its version.
    let undo = ["uninstall", "--root", &path];
    bulkhead(suite, &undo).output()?.ok()?;
    ensure_eq!("the root after undo", tree(&root)?, before);
    let other = match version.contains(" 2.") || version.contains(" v2.") {
        true => ("1.7", "version = 2"),
        false => ("2.1", "version = 3"),
    };
    install(&["--containerd", other.0])?;
    let text = std::fs::read_to_string(root.join("etc/containerd/config.toml")).context("read")?;
    ensure!(text.contains(other.1), "{text}");
    bulkhead(suite, &undo).output()?.ok()?;
    ensure_eq!("the root after undo", tree(&root)?, before);
    Ok(())
}

/// A containerd with the written file and the installed programs: the handler is there, and a container runs.
fn run_installed(suite: &Suite, folder: &Path, root: &Path) -> Outcome {
    let at = |name: &str| -> PathBuf { folder.join(name) };
    let search = std::env::var("PATH").unwrap_or_default();
    let search = format!("{}:{search}", root.join("usr/local/bin").display());
    let containerd = |args: &[&str]| {
        Invocation::new("containerd")
            .arg("--config")
            .arg(root.join("etc/containerd/config.toml"))
            .arg("--root")
            .arg(at("data"))
            .arg("--state")
            .arg(at("state"))
            .arg("--address")
            .arg(at("c.sock"))
            .args(args)
            .env("PATH", &search)
            .env("BULKHEAD_CONFIG", suite.config())
    };
    let dump = containerd(&["config", "dump"]).output()?.ok()?.text();
    let handler = dump.find("runtimes.bulkhead]");
    let handler = handler.context(format_args!("no handler: {dump}"))?;
    let section = dump.get(handler..).unwrap_or_default();
    ensure!(
        section.contains("runtime_type = \"io.containerd.bulkhead.v1\""),
        "{section}"
    );
    let mut running = containerd(&[]).limit(suite.scale.seconds(120)).spawn()?;
    let end = Instant::now() + suite.scale.seconds(20);
    while UnixStream::connect(at("c.sock")).is_err() {
        ensure!(
            !running.has_ended() && Instant::now() < end,
            "containerd: {}",
            running.stderr()
        );
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    let (rootfs, name) = (suite.rootfs()?, suite.name("installed"));
    let ctr = |args: &[&str]| suite.ctr_at(&at("c.sock"), args);
    let run = ctr(&["run", "--rm", "--runtime", suite.runtime(), "--rootfs"]);
    let ran = run
        .arg(&rootfs)
        .arg(&name)
        .args(["/bin/echo", "from the installed"]);
    let ran = ran.output();
    running.signal(Signal::TERM);
    running.wait()?;
    ensure_eq!("output", ran?.ok()?.text(), "from the installed");
    Ok(())
}
