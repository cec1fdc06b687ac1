//! A container's life as Docker tells it, and clients that go away.

use bulkhead_harness::{
    Engine, Outcome, Suite, Test, command::Input, ensure, ensure_eq, process, runner::ANY, test,
};
use rustix::process::Signal;

use super::{BUSYBOX, Made, SMALL, call, inside, inspect, start, text};
use crate::{docker, network::until};

/// The cases of this group.
pub const TESTS: &[Test] = &[
    test!(docker::life::is_told_in_order, BUSYBOX, ANY)
        .docker()
        .fast_host(),
    test!(
        docker::life::clients_that_go_away_leave_nothing,
        BUSYBOX,
        ANY
    )
    .docker()
    .fast_host(),
    test!(
        docker::life::failed_container_is_started_again,
        BUSYBOX,
        ANY
    )
    .docker()
    .fast_host(),
];

/// Says each line of stdin back; ends with 4 at `end`.
const ECHO: &str = r#"while read line; do [ "$line" = end ] && exit 4; echo "<$line>"; done"#;

fn is_told_in_order(suite: &Suite) -> Outcome {
    let limit = suite.scale.seconds(20);
    let made = start(
        suite,
        "lived",
        &[
            "-i",
            "--health-cmd=test -e /tmp/well",
            "--health-interval=300ms",
            "--health-retries=2",
            SMALL,
            "sh",
            "-c",
            ECHO,
        ],
    )?;
    let id = inspect(suite, "lived", "{{.Id}}")?;
    let container = format!("container={id}");
    let watch = [
        "events",
        "--since=1h",
        "--filter",
        &container,
        "--format={{.Action}}",
    ];
    let watch = call(suite, &watch)?.spawn()?;
    let health = |expected: &str| {
        until(limit, expected, || {
            let seen = inspect(suite, &id, "{{.State.Health.Status}}")?;
            Ok(seen == expected)
        })
    };
    health("unhealthy")?;
    inside(suite, "lived", "touch /tmp/well")?;
    health("healthy")?;
    let mut attach = call(suite, &["attach", "lived"])?
        .input(Input::Open)
        .spawn()?;
    attach.write(b"typed\n")?;
    attach.wait_for("<typed>", limit)?;
    text(suite, &["pause", "lived"])?;
    let list = text(suite, &["ps"])?;
    ensure!(list.contains("(Paused)"), "docker ps: {list}");
    let refused = call(suite, &["exec", "lived", "true"])?.output()?;
    refused.refused(&["is paused, unpause the container before exec"])?;
    attach.write(b"while paused\n")?;
    std::thread::sleep(suite.scale.seconds(1) / 2);
    let seen = attach.stdout();
    ensure!(
        !seen.contains("<while paused>"),
        "it runs while paused: {seen}"
    );
    text(suite, &["unpause", "lived"])?;
    attach.wait_for("<while paused>", limit)?;
    text(suite, &["rename", "lived", "renamed"])?;
    let renamed = Made::by(suite, &["rm", "-f", "renamed"]);
    let wait = call(suite, &["wait", "renamed"])?.spawn()?;
    attach.write(b"end\n")?;
    attach.wait()?.expect(4)?;
    ensure_eq!("docker wait", wait.wait()?.ok()?.text(), "4");
    text(suite, &["rm", "renamed"])?;
    drop(renamed);
    drop(made);

    watch.wait_for("destroy\n", limit)?;
    let events = watch.stdout();
    let told: Vec<&str> = events
        .lines()
        .filter(|line| !line.starts_with("exec_"))
        .collect();
    let expected = [
        "create",
        "start",
        "health_status: unhealthy",
        "health_status: healthy",
        "attach",
        "pause",
        "unpause",
        "rename",
        "die",
        "destroy",
    ];
    ensure_eq!("docker events", told, expected);
    let execs: Vec<&str> = events
        .lines()
        .filter(|line| line.contains("touch"))
        .filter_map(|line| line.split(':').next())
        .collect();
    ensure_eq!("of the exec", execs, ["exec_create", "exec_start"]);
    Ok(())
}

/// Descriptors of the pod's processes.
fn descriptors(suite: &Suite) -> Vec<(String, usize)> {
    process::of_pods(&suite.mark())
        .iter()
        .map(|p| (p.name.clone(), process::fds(p.pid)))
        .collect()
}

fn clients_that_go_away_leave_nothing(suite: &Suite) -> Outcome {
    let limit = suite.scale.seconds(20);
    let made = start(suite, "left", &["-i", SMALL, "sh", "-c", ECHO])?;
    // The first of each kind may open what stays.
    let mut before = Vec::new();
    for round in 0..3 {
        if round == 1 {
            before = descriptors(suite);
            ensure!(
                before.len() >= 3 || suite.engine == Engine::Runc,
                "processes of the pod: {before:?}"
            );
        }
        let mut attach = call(suite, &["attach", "left"])?
            .input(Input::Open)
            .spawn()?;
        attach.write(format!("round {round}\n").as_bytes())?;
        attach.wait_for(&format!("<round {round}>"), limit)?;
        attach.signal(Signal::KILL);
        let exec = ["exec", "-i", "left", "sh", "-c", "echo up; exec cat"];
        let exec = call(suite, &exec)?.input(Input::Open).spawn()?;
        exec.wait_for("up", limit)?;
        exec.signal(Signal::KILL);
        let typing = call(
            suite,
            &[
                "exec",
                "-it",
                "left",
                "sh",
                "-c",
                "echo up; exec sleep 1000",
            ],
        )?;
        let typing = typing.in_terminal(20, 60).input(Input::Open).spawn()?;
        typing.wait_for("up", limit)?;
        typing.signal(Signal::KILL);
        // What reads its client's input ends with it, the other goes on as anywhere.
        until(limit, "cat ends", || {
            Ok(inside(suite, "left", "pidof cat || echo none")? == "none")
        })?;
        inside(suite, "left", "killall sleep")?;
        until(limit, "sleep ends", || {
            Ok(inside(suite, "left", "pidof sleep || echo none")? == "none")
        })?;
    }
    let mut after = Vec::new();
    until(limit, "no more descriptors than before", || {
        after = descriptors(suite);
        let mut pairs = after.iter().zip(&before);
        Ok(after.len() == before.len()
            && pairs.all(|(now, then)| now.0 == then.0 && now.1 <= then.1))
    })
    .map_err(|error| format!("{error}: before {before:?}, after {after:?}"))?;
    let logs = text(suite, &["logs", "left"])?;
    ensure_eq!("the log", logs, "<round 0>\n<round 1>\n<round 2>");
    drop(made);
    Ok(())
}

fn failed_container_is_started_again(suite: &Suite) -> Outcome {
    let made = start(
        suite,
        "failing",
        &[
            "--restart=on-failure:1",
            SMALL,
            "sh",
            "-c",
            "echo run >>/runs; cat /runs; exit 3",
        ],
    )?;
    let mut seen = String::new();
    until(suite.scale.seconds(30), "the second end", || {
        let format = "{{.RestartCount}} {{.State.Status}} {{.State.ExitCode}}";
        seen = inspect(suite, "failing", format)?;
        Ok(seen == "1 exited 3")
    })
    .map_err(|error| format!("{error}: {seen}"))?;
    // Its files stay, as does what it said before.
    ensure_eq!(
        "docker logs",
        text(suite, &["logs", "failing"])?,
        "run\nrun\nrun"
    );
    drop(made);
    Ok(())
}
