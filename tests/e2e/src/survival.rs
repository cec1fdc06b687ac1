//! The pod outlives its shim and containerd: what runs goes on, what is written arrives once, exit statuses are told.

use std::time::{Duration, Instant};

use bulkhead_cri::{Cri, forward::Forwarded};
use bulkhead_harness::{
    Context, Image, Outcome, Pod, Suite, Test, command::Input, ensure, ensure_eq, events::Events,
    failure::read, process, runner::MACHINES, test,
};
use rustix::process::Signal;

use crate::{network::until, operator::bulkhead, survival};

const BUSYBOX: &[Image] = &[Image::Busybox];

/// The cases of this group.
pub const TESTS: &[Test] = &[
    test!(survival::killed_shim_loses_no_output, BUSYBOX, MACHINES),
    test!(survival::killed_shim_loses_no_input, BUSYBOX, MACHINES),
    test!(
        survival::execs_go_on_and_the_program_on_the_disk_takes_over,
        BUSYBOX,
        MACHINES
    ),
    test!(
        survival::shim_killed_during_start_starts_all_the_same,
        BUSYBOX,
        MACHINES
    ),
    test!(
        survival::shim_killed_while_a_killed_containerd_is_away,
        BUSYBOX,
        MACHINES
    ),
    test!(
        survival::pod_ends_when_nothing_is_left_to_take_over,
        BUSYBOX,
        MACHINES
    ),
    test!(
        survival::an_error_in_the_configuration_stops_new_pods_alone,
        BUSYBOX,
        MACHINES
    ),
    test!(
        survival::pod_of_cri_keeps_its_connections_and_containers,
        &[Image::Pause, Image::Net],
        MACHINES
    )
    .cri()
    .fast_host(),
];

/// Kills the shim and waits until another has taken over.
pub fn kill(suite: &Suite, pod: &Pod<'_>, signal: Signal) -> Outcome {
    let before = pod.shim()?;
    before.signal(signal)?;
    let end = Instant::now() + suite.scale.seconds(10);
    while pod.shim().is_ok_and(|now| now.pid == before.pid) || pod.shim().is_err() {
        ensure!(Instant::now() < end, "no other shim after {before:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// `0`, `1` … in lines.
fn lines(count: u32) -> String {
    (0..count).map(|n| format!("{n}\n")).collect()
}

fn killed_shim_loses_no_output(suite: &Suite) -> Outcome {
    let count = match suite.scale.pods_are_cheap() {
        true => 40_000,
        false => 4000,
    };
    let script = format!(
        "i=0; while [ $i -lt {count} ]; do echo $i; i=$((i+1)); done; echo end >&2; exit 7"
    );
    let (pod, running) = suite.busybox().sh(script).attach()?;
    for begun in ["\n100\n", "\n1000\n", "\n2000\n"] {
        running.wait_for(begun, suite.scale.seconds(30))?;
        kill(suite, &pod, Signal::KILL)?;
    }
    let output = running.wait()?;
    ensure_eq!("exit status", output.status, 7);
    ensure_eq!("stderr", output.errors(), "end");
    let expected = lines(count);
    ensure!(
        output.stdout == expected.as_bytes(),
        "{} of {} bytes, or others",
        output.stdout.len(),
        expected.len()
    );
    pod.delete()?;
    Ok(())
}

fn killed_shim_loses_no_input(suite: &Suite) -> Outcome {
    const LINES: u32 = 20_000;
    let run = suite.busybox().input(Input::Open);
    let (pod, mut running) = run.sh("echo up; exec md5sum").attach()?;
    running.wait_for("up", suite.scale.seconds(30))?;
    let text = lines(LINES);
    for (number, part) in text.as_bytes().chunks(text.len() / 4 + 1).enumerate() {
        running.write(part)?;
        if number < 3 {
            kill(suite, &pod, Signal::KILL)?;
        }
    }
    running.close_stdin();
    let said = running.wait()?.ok()?.text();
    let sum = suite
        .command("sh")
        .args(["-c", &format!("seq 0 {} | md5sum", LINES - 1)]);
    let sum = sum.output()?.ok()?.text();
    ensure_eq!("checksum", said, format!("up\n{sum}"));
    pod.delete()?;
    Ok(())
}

fn execs_go_on_and_the_program_on_the_disk_takes_over(suite: &Suite) -> Outcome {
    let events = Events::subscribe(suite)?;
    let pod = suite
        .busybox()
        .sh("trap 'exit 9' TERM; sleep 1000 & wait")
        .detach()?;
    let exec = pod.exec(&["sh", "-c", "echo up; read word; echo got $word; exit 5"]);
    let mut exec = exec.input(Input::Open).spawn()?;
    exec.wait_for("up", suite.scale.seconds(20))?;
    kill(suite, &pod, Signal::KILL)?;
    ensure_eq!("a new exec", pod.sh("echo on")?, "on");
    kill(suite, &pod, Signal::HUP)?;
    let status = pod.status()?.map(|(_, status)| status);
    ensure_eq!("status", status, Some("RUNNING".to_owned()));
    exec.write(b"it\n")?;
    exec.close_stdin();
    let output = exec.wait()?.expect(5)?;
    ensure_eq!("the exec's output", output.text(), "up\ngot it");
    pod.task(&["metrics"]).output()?.ok()?;
    pod.task(&["pause"]).output()?.ok()?;
    kill(suite, &pod, Signal::KILL)?;
    let status = pod.status()?.map(|(_, status)| status);
    ensure_eq!("status", status, Some("PAUSED".to_owned()));
    pod.task(&["resume"]).output()?.ok()?;
    pod.kill("SIGTERM")?.ok()?;
    let name = pod.name().to_owned();
    ensure_eq!("exit status", pod.delete()?, 9);
    let exits = events.of(&name);
    let exits = exits.iter().filter(|e| e.topic == "/tasks/exit").count();
    ensure_eq!("exits that were told: two execs and init", exits, 3);
    Ok(())
}

fn shim_killed_during_start_starts_all_the_same(suite: &Suite) -> Outcome {
    let delays: &[u64] = match suite.scale.pods_are_cheap() {
        true => &[0, 10, 30, 100, 300, 900],
        false => &[500],
    };
    for &delay in delays {
        let (pod, running) = suite.busybox().sh("echo ran; exit 3").attach()?;
        let end = Instant::now() + suite.scale.seconds(10);
        while pod.shim().is_err() {
            ensure!(Instant::now() < end, "no shim: {}", running.stderr());
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(Duration::from_millis(delay));
        // It may have ended by now: then the delay was long enough for a whole run.
        if let Ok(shim) = pod.shim() {
            let _ = shim.signal(Signal::KILL);
        }
        let output = running.wait()?.expect(3)?;
        ensure_eq!(format_args!("output at {delay} ms"), output.text(), "ran");
        pod.delete()?;
    }
    Ok(())
}

fn shim_killed_while_a_killed_containerd_is_away(suite: &Suite) -> Outcome {
    let folder = suite.folder("survival")?;
    let log = folder.join("log");
    let script =
        "trap 'echo end; exit 4' TERM; i=0; while :; do echo $i; i=$((i+1)); sleep 0.01; done";
    let uri = format!("file://{}", log.display());
    let pod = suite.busybox().sh(script).log_to(&uri)?;
    let end = Instant::now() + suite.scale.seconds(20);
    while read(&log)?.lines().count() < 5 {
        ensure!(Instant::now() < end, "no output in the log");
        std::thread::sleep(Duration::from_millis(20));
    }
    suite.kill_containerd_and(|| kill(suite, &pod, Signal::KILL))?;
    let status = pod.status()?.map(|(_, status)| status);
    ensure_eq!("status", status, Some("RUNNING".to_owned()));
    ensure_eq!("exec", pod.sh("echo on")?, "on");
    pod.kill("SIGTERM")?.ok()?;
    ensure_eq!("exit status", pod.delete()?, 4);
    let text = read(&log)?;
    let count = text.lines().count().saturating_sub(1);
    let expected = lines(u32::try_from(count).unwrap_or(0)) + "end\n";
    ensure!(count > 5 && text == expected, "the log is {text}");
    Ok(())
}

/// A connection that is open when the shim dies goes on; new ones, port-forward, execs and a further container work; nothing was restarted.
fn pod_of_cri_keeps_its_connections_and_containers(suite: &Suite) -> Outcome {
    let cri = Cri::connect(suite, &[Image::Pause, Image::Net])?;
    let pod = cri.run(cri.config("survives"))?;
    let echo = ["socat", "TCP-LISTEN:7000,reuseaddr,fork", "EXEC:cat"];
    let server = pod.start("echo", Image::Net, &echo)?;
    let began = pod.status(&server)?.started_at;
    let addresses = pod.addresses()?;
    let address = addresses.first().context("an address")?;
    let to = format!("TCP:{address}:7000,retry=50,interval=0.1");
    let mut open = suite
        .network()?
        .tool(&["socat", "-", &to])
        .input(Input::Open)
        .spawn()?;
    let limit = suite.scale.seconds(10);
    open.write(b"before\n")?;
    open.wait_for("before", limit)?;
    let shim = || process::shim_of(process::of_pods(&suite.mark()), pod.id());
    let before = shim()?;
    before.signal(Signal::KILL)?;
    until(limit, "another shim", || {
        Ok(shim().is_ok_and(|now| now.pid != before.pid))
    })?;
    open.write(b"after\n")?;
    open.wait_for("after", limit)?;
    open.close_stdin();
    open.wait()?.ok()?;
    ensure_eq!("a new exec", pod.sh(&server, "echo on")?, "on");
    let more = pod.start("more", Image::Net, &["sleep", "1000000"])?;
    let dial = format!("echo anew | socat -t 5 - TCP:{address}:7000");
    ensure_eq!("from another container", pod.sh(&more, &dial)?, "anew");
    until(limit, "port-forward", || {
        let mut port = Forwarded::dial(suite.network()?.pid(), &pod.forward(7000)?, limit)?;
        port.send(b"there and back")?;
        Ok(port.wait_for("there and back").is_ok())
    })?;
    ensure_eq!("its start", pod.status(&server)?.started_at, began);
    pod.end()
}

fn an_error_in_the_configuration_stops_new_pods_alone(suite: &Suite) -> Outcome {
    let pod = suite
        .busybox()
        .sh("trap 'exit 9' TERM; sleep 1000 & wait")
        .detach()?;
    {
        let _configured = suite.configured("this is not toml")?;
        kill(suite, &pod, Signal::KILL)?;
        ensure_eq!("a new exec", pod.sh("echo on")?, "on");
        let text = bulkhead(suite, &["list"]).output()?.ok()?.text();
        ensure!(text.contains(pod.name()), "{text}");
        let refused = suite.busybox().args(&["true"]).output()?;
        refused.refused(&["config.toml"])?;
        pod.kill("SIGTERM")?.ok()?;
        ensure_eq!("exit status", pod.delete()?, 9);
    }
    // What is left of a pod whose shim is gone goes by `delete`, which is another process.
    let pod = suite.busybox().sh("sleep 1000").detach()?;
    let _configured = suite.configured("memory_mib = 8")?;
    pod.command("bulkhead-keeper")?.signal(Signal::KILL)?;
    pod.delete_by_force()
}

fn pod_ends_when_nothing_is_left_to_take_over(suite: &Suite) -> Outcome {
    for both in [["containerd-shim", "bulkhead-vmm"], ["bulkhead-keeper", ""]] {
        let events = Events::subscribe(suite)?;
        let pod = suite.busybox().sh("sleep 1000").detach()?;
        let victims: Vec<_> = both
            .iter()
            .filter(|name| !name.is_empty())
            .map(|name| pod.command(name))
            .collect::<Outcome<_>>()?;
        for victim in &victims {
            victim.signal(Signal::KILL)?;
        }
        events.wait_for(pod.name(), "/tasks/exit", suite.scale.seconds(8))?;
        // With the machine alone gone another shim may tell of it, and stays until the task is deleted.
        let end = Instant::now() + suite.scale.seconds(8);
        while victims.len() == 1 && !pod.processes().is_empty() {
            let left = pod.processes();
            ensure!(Instant::now() < end, "still there: {left:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
        pod.delete_by_force()?;
    }
    Ok(())
}
