//! What goes through containerd's streaming server, and containers' logs.

use bulkhead_cri::{Cri, container::shell, stream::Stream};
use bulkhead_harness::{Outcome, Suite, Test, ensure, ensure_eq, failure::read, runner::ANY, test};

use super::IMAGES;
use crate::{cri, network::until};

/// The cases of this file.
pub const TESTS: &[Test] = &[
    test!(cri::streams::exec_attach_probes_and_logs, IMAGES, ANY)
        .cri()
        .fast_host(),
];

fn exec_attach_probes_and_logs(suite: &Suite) -> Outcome {
    let cri = Cri::connect(suite, IMAGES)?;
    let logs = suite.folder("logs")?;
    let mut config = cri.config("streams");
    config.log_directory = logs.to_string_lossy().into_owned();
    let pod = cri.run(config)?;
    let mut echo = shell(
        "echo",
        "while read line; do echo \"got $line\"; echo err >&2; done",
    );
    echo.stdin = true;
    let echo = pod.launch(echo)?;
    let server = suite.network()?.pid();
    let limit = suite.scale.seconds(20);
    let dial = |url: String| Stream::dial(server, &url, limit);

    // `kubectl attach`, which goes away and comes back.
    for word in ["one", "two"] {
        let mut attached = dial(pod.attach_url(&echo)?)?;
        attached.send(format!("{word}\n").as_bytes())?;
        attached.wait_for(&format!("got {word}\n"))?;
    }
    // `kubectl exec`.
    let script = "head -n 1; echo no >&2; exit 5";
    let mut exec = dial(pod.exec_url(&echo, &["sh", "-c", script], false)?)?;
    exec.send(b"there and back\n")?;
    let (stdout, stderr, code) = exec.end()?;
    ensure_eq!(
        "exec",
        (stdout.as_str(), stderr.as_str(), code),
        ("there and back\n", "no\n", 5)
    );
    // `kubectl exec -it`, in a window whose size changes.
    let script = "while [ \"$(stty size)\" != '33 44' ]; do sleep 0.1; done; stty size; read word; echo \"word $word\"";
    let mut shell = dial(pod.exec_url(&echo, &["sh", "-c", script], true)?)?;
    shell.resize(44, 33)?;
    shell.wait_for("33 44")?;
    shell.send(b"hello\n")?;
    let (stdout, _, code) = shell.end()?;
    ensure!(
        stdout.contains("word hello") && code == 0,
        "{stdout:?}, {code}"
    );

    // Probes: the exit code counts, and one that hangs is ended.
    ensure_eq!("a probe", pod.exec_within(&echo, &["false"], 5)?.code, 1);
    let hangs = pod.exec_within(&echo, &["sleep", "1234"], 1);
    let error = hangs
        .map(|said| format!("{said:?}"))
        .unwrap_or_else(|e| e.to_string());
    ensure!(error.contains("timeout"), "a probe that hangs: {error}");
    until(
        suite.scale.seconds(5),
        "the probe's process is gone",
        || {
            let seen = pod.sh(&echo, "cat /proc/[0-9]*/cmdline | tr '\\0' ' '")?;
            Ok(!seen.contains("sleep 1234"))
        },
    )?;

    // The log, and its rotation.
    let log = logs.join("echo.log");
    let has = |text: &str| -> Outcome<bool> {
        // TIME STREAM TAG LINE
        Ok(read(&log)?
            .lines()
            .any(|line| line.split_once(' ').is_some_and(|(_, rest)| rest == text)))
    };
    for line in ["stdout F got one", "stderr F err", "stdout F got two"] {
        ensure!(has(line)?, "no {line:?} in the log: {}", read(&log)?);
    }
    std::fs::rename(&log, logs.join("echo.log.1")).map_err(|e| format!("rename: {e}"))?;
    pod.reopen_log(&echo)?;
    let mut attached = dial(pod.attach_url(&echo)?)?;
    attached.send(b"three\n")?;
    attached.wait_for("got three\n")?;
    until(suite.scale.seconds(5), "the new log", || {
        has("stdout F got three")
    })?;
    ensure!(!has("stdout F got one")?, "the new log is the old one");
    pod.end()
}
