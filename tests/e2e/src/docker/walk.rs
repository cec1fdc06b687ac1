//! The walk of everybody's first day: a web application is run, looked at, stopped and removed.

use bulkhead_harness::{
    Engine, Image, Outcome, Suite, Test,
    command::Input,
    ensure, ensure_eq,
    failure::{read, write},
    process,
    runner::ANY,
    test,
};

use super::{SMALL, call, inside, inspect, run, start, text};
use crate::{docker, network::until};

const NODE: &[Image] = &[Image::Node];
const APPLICATION: &str = "localhost/bulkhead/node";

/// The cases of this group.
pub const TESTS: &[Test] = &[
    test!(docker::walk::output_and_exit_code, super::BUSYBOX, ANY).docker(),
    test!(docker::walk::web_application, NODE, ANY)
        .docker()
        .fast_host(),
];

fn output_and_exit_code(suite: &Suite) -> Outcome {
    let script = "echo out; echo err >&2; exit 7";
    let output = run(suite, &["--rm", SMALL, "sh", "-c", script])?.output()?;
    let output = output.expect(7)?;
    ensure_eq!(
        "output",
        (output.text(), output.errors()),
        ("out".into(), "err".into())
    );
    ensure_eq!("after --rm", text(suite, &["ps", "-aq"])?, "");
    Ok(())
}

/// The application's answer at the published port.
fn answer(suite: &Suite, path: &str) -> Outcome<String> {
    let network = suite.network()?;
    let url = format!("http://127.0.0.1:1234{path}");
    let mut seen = String::new();
    until(suite.scale.seconds(30), "the application answers", || {
        let curl = network.tool(&["curl", "-s", "-m", "5", &url]);
        seen = curl.output()?.text();
        Ok(!seen.is_empty())
    })?;
    Ok(seen)
}

fn web_application(suite: &Suite) -> Outcome {
    let made = start(
        suite,
        "kiada",
        &["-p", "1234:8080", "--memory", "200m", APPLICATION],
    )?;
    let id = inspect(suite, "kiada", "{{.Id}}")?;
    let short = id.get(..12).unwrap_or_default();
    let seen = answer(suite, "/")?;
    ensure!(
        seen.starts_with(&format!("kiada on {short} for ::ffff:10.93.0.")),
        "answer: {seen}"
    );
    is_shown(suite, short)?;
    let mut follow = call(suite, &["logs", "-f", "kiada"])?.spawn()?;
    follow.wait_for("listening\nGET /\n", suite.scale.seconds(10))?;
    answer(suite, "/while-followed")?;
    follow.wait_for("GET /while-followed\n", suite.scale.seconds(10))?;
    terminal_in_it(suite)?;
    files_go_both_ways(suite, "running")?;
    ensure!(!follow.has_ended(), "logs -f ended: {}", follow.stderr());

    text(suite, &["stop", "kiada"])?;
    let followed = follow.wait()?.ok()?.text();
    ensure!(followed.ends_with("stopping"), "followed log: {followed}");
    let state = inspect(suite, "kiada", "{{.State.Status}} {{.State.ExitCode}}")?;
    ensure_eq!("after stop", state, "exited 0");
    let list = text(suite, &["ps", "-a"])?;
    ensure!(list.contains("Exited (0)"), "docker ps -a: {list}");
    files_go_both_ways(suite, "stopped")?;

    text(suite, &["start", "kiada"])?;
    answer(suite, "/")?;
    let seen = inside(suite, "kiada", "cat /tmp/in.stopped /tmp/own.running")?;
    ensure_eq!("files after start", seen, "in the second time\nown");
    text(suite, &["restart", "kiada"])?;
    answer(suite, "/")?;
    let refused = call(suite, &["rm", "kiada"])?.output()?;
    refused.refused(&["container is running"])?;
    text(suite, &["rm", "-f", "kiada"])?;
    ensure_eq!("after rm", text(suite, &["ps", "-aq"])?, "");
    drop(made);
    Ok(())
}

/// `ps`, `inspect`, `top` and `stats` of the application.
fn is_shown(suite: &Suite, short: &str) -> Outcome {
    let list = text(suite, &["ps"])?;
    let line = list.lines().nth(1).unwrap_or_default();
    for word in [short, APPLICATION, "Up ", "0.0.0.0:1234->8080/tcp", "kiada"] {
        ensure!(line.contains(word), "no {word} in docker ps: {list}");
    }
    let format = "{{.State.Status}} {{.HostConfig.Runtime}} {{.State.Pid}}";
    let seen = inspect(suite, "kiada", format)?;
    let pid = seen.rsplit(' ').next().unwrap_or_default();
    ensure_eq!(
        "inspect",
        seen,
        format!("running {} {pid}", suite.runtime())
    );
    // Of a machine the host has one process to show, the one that runs it.
    let program = match suite.engine {
        Engine::Runc => "node",
        _ => "bulkhead-vmm",
    };
    let name = read(format!("/proc/{pid}/comm"))?;
    ensure_eq!("program of .State.Pid", name.trim_end(), program);
    let top = text(suite, &["top", "kiada", "-o", "pid,comm"])?;
    let words: Vec<&str> = top.split_whitespace().collect();
    ensure_eq!("docker top", words, ["PID", "COMMAND", pid, program]);
    let inside_it = inside(suite, "kiada", "ps -o comm | grep node")?;
    ensure_eq!("ps in the container", inside_it, "node");
    let format = "{{.Name}} {{.MemUsage}} {{.PIDs}}";
    let stats = text(
        suite,
        &["stats", "--no-stream", "--format", format, "kiada"],
    )?;
    let threads = inside(suite, "kiada", "ls /proc/1/task | wc -l")?;
    let words: Vec<&str> = stats.split(' ').collect();
    let [name, used, "/", limit, pids] = words.as_slice() else {
        return Err(format!("docker stats: {stats}").into());
    };
    ensure_eq!(
        "stats",
        (*name, *limit, *pids),
        ("kiada", "200MiB", &*threads)
    );
    let used: f64 = used.trim_end_matches("MiB").parse().unwrap_or(0.0);
    ensure!((5.0..200.0).contains(&used), "memory of node: {stats}");
    ensure!(
        process::of_pods(&suite.mark())
            .iter()
            .any(|p| p.pid.to_string() == pid)
            || suite.engine == Engine::Runc,
        "the pid {pid} is of no pod"
    );
    Ok(())
}

/// `exec -it bash`, with a window that changes its size.
fn terminal_in_it(suite: &Suite) -> Outcome {
    let limit = suite.scale.seconds(20);
    let exec = call(suite, &["exec", "-it", "kiada", "bash"])?;
    let mut bash = exec.in_terminal(30, 100).input(Input::Open).spawn()?;
    bash.wait_for("# ", limit)?;
    bash.write(b"stty size; tty; echo \"user $(id -un)\"\n")?;
    bash.wait_for("30 100\r\n/dev/pts/0\r\nuser root\r\n", limit)?;
    bash.resize_terminal(41, 99)?;
    let asked = std::time::Instant::now();
    while !bash.stdout().contains("41 99\r\n") {
        ensure!(asked.elapsed() < limit, "no new size: {}", bash.stdout());
        bash.write(b"stty size\n")?;
        std::thread::sleep(std::time::Duration::from_millis(300));
    }
    bash.write(b"exit 3\n")?;
    bash.wait()?.expect(3).map(drop)
}

/// `docker cp` into the container, over what it has, and out of it.
fn files_go_both_ways(suite: &Suite, state: &str) -> Outcome {
    let folder = suite.folder("cp")?;
    let (file, back) = (folder.join("in"), folder.join("back"));
    let (local, returned) = (file.to_string_lossy(), back.to_string_lossy());
    let there = format!("kiada:/tmp/in.{state}");
    let runs = state == "running";
    let look = format!("cat /tmp/in.{state} 2>/dev/null || echo none");
    if runs {
        ensure_eq!("before", inside(suite, "kiada", &look)?, "none");
    }
    for content in ["in\n", "in the second time\n"] {
        write(&file, content)?;
        text(suite, &["cp", &local, &there])?;
        if runs {
            let seen = inside(suite, "kiada", &look)?;
            ensure_eq!("what was copied in", seen, content.trim_end());
        }
    }
    if runs {
        inside(suite, "kiada", &format!("echo own >/tmp/own.{state}"))?;
    }
    text(suite, &["cp", "kiada:/tmp/own.running", &returned])?;
    ensure_eq!("what was copied out", read(&back)?, "own\n");
    Ok(())
}
