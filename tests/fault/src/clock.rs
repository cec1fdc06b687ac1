//! A clock that is set by an hour while pods start, run and stop: every wait is by a clock that nobody sets.
//!
//! The machine's own clock stays as it is, for it is others', too: `clock.c` shows another date to shim, VMM, file server and emulator alone.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use bulkhead_harness::{
    Context, Image, Invocation, Outcome, Suite, Test, ensure,
    events::{Event, Events},
    failure::read,
    runner::MACHINES,
    test,
};
use rustix::process::Signal;

use crate::clock;

const BUSYBOX: &[Image] = &[Image::Busybox];
const HOUR: i64 = 3600;
/// A moment after the start in which a pod is half way.
const HALF: Duration = Duration::from_millis(500);
/// Longest that a step may take; none of them waits for anything.
const STEP: u32 = 20;

/// The cases.
pub const TESTS: &[Test] = &[
    test!(clock::the_hosts_that_jumps, BUSYBOX, MACHINES),
    test!(clock::the_guests_that_jumps, BUSYBOX, MACHINES),
];

fn the_hosts_that_jumps(suite: &Suite) -> Outcome {
    let folder = suite.folder("clock")?;
    let shift = folder.join("shift");
    let file = File::create(&shift).context("make the clock's file")?;
    let jump = |by: i64| {
        let bytes = by.to_ne_bytes();
        file.write_all_at(&bytes, 0).context("set the clock")
    };
    jump(0)?;
    let library = suite.dist.join("../clock.so");
    let before = format!(
        "export LD_PRELOAD={} FAULT_CLOCK={}",
        library.display(),
        shift.display()
    );
    let another = suite.another_containerd("clock", &before)?;
    let address = another.address();
    let (rootfs, limit) = (suite.rootfs()?, suite.scale.seconds(STEP));
    let ctr = |args: &[&str]| suite.ctr_at(&address, args).limit(limit);
    let start = |name: &str| -> Invocation {
        let run = ["run", "-d", "--null-io", "--runtime", suite.runtime()];
        let run = ctr(&run).arg("--rootfs").arg(&rootfs).arg(name);
        run.args(["/bin/sleep", "100000"])
    };
    let names = [
        suite.name("clock"),
        suite.name("clock"),
        suite.name("clock"),
    ];
    let [first, second, third] = &names;
    start(first).output()?.ok()?;
    // While one starts, on and back.
    for (name, by) in [(second, HOUR), (third, -HOUR)] {
        let starting = start(name).spawn()?;
        std::thread::sleep(HALF);
        jump(by)?;
        starting.wait()?.ok()?;
        for name in [first, name] {
            let exec = ctr(&["task", "exec", "--exec-id", &suite.name("x"), name]);
            let text = exec.args(["/bin/echo", "here"]).output()?.ok()?.text();
            ensure!(text == "here", "an exec in {name} said {text:?}");
        }
    }
    // They have seen it: the third began between both jumps.
    let record = read(suite.state_of(third).join("pod.json"))?;
    let created: serde_json::Value = serde_json::from_str(&record).context("pod.json")?;
    let created = created["created"].as_u64().context("created")?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let now = now.map_or(0, |time| time.as_secs());
    ensure!(created > now + 3000, "began at {created}, and now is {now}");
    for name in &names {
        jump(HOUR)?;
        let kill = ctr(&["task", "kill", "-s", "SIGKILL", name]).spawn()?;
        jump(-HOUR)?;
        kill.wait()?.ok()?;
        // Waits for the end.
        ctr(&["task", "rm", "-f", name]).output()?;
        ctr(&["container", "rm", name]).output()?.ok()?;
    }
    let left = fs::read_dir(suite.state()).map_or(0, Iterator::count);
    ensure!(left == 0, "{left} state folders are left");
    Ok(())
}

/// When a process ended is told by how long ago that was: a shim that asks later, for one before it stood still and died, is told the same.
fn the_guests_that_jumps(suite: &Suite) -> Outcome {
    let events = Events::subscribe(suite)?;
    let run = || suite.busybox().flag("--privileged");
    let pod = run().args(&["sleep", "100000"]).detach()?;
    let of_pod = format!("io.kubernetes.cri.sandbox-id={}", pod.name());
    let member = run().sh("sleep 1").flags(&["--annotation", &of_pod]);
    let member = member.detach()?;
    let set = "(sleep 2; date -s @$(($(date +%s) + 3600))) >/dev/null 2>&1 &";
    pod.sh(set)?;
    let shim = pod.shim()?;
    shim.signal(Signal::STOP)?;
    std::thread::sleep(suite.scale.seconds(3));
    shim.signal(Signal::KILL)?;
    let end = events.wait_for(member.name(), "/tasks/exit", suite.scale.seconds(STEP))?;
    let apart = late(&end)?;
    ensure!(apart < 60.0, "it ended {apart} s before that was told");
    let began = Instant::now();
    let text = pod.sh("date +%s")?;
    ensure!(text.parse::<u64>().is_ok(), "date: {text}");
    member.delete()?;
    pod.end()?;
    let took = began.elapsed();
    ensure!(took < suite.scale.seconds(STEP), "the end took {took:?}");
    Ok(())
}

/// Seconds from the end to the event that tells it.
fn late(event: &Event) -> Outcome<f64> {
    let at = event.fields["exited_at"].as_str().context("exited_at")?;
    let (_, time) = at.trim_end_matches('Z').split_once('T').context("a time")?;
    let mut seconds = 0.0;
    for part in time.split(':') {
        seconds = seconds * 60.0 + part.parse::<f64>().context("a time")?;
    }
    // Over midnight, too.
    Ok((event.time.as_secs_f64() - seconds).rem_euclid(24.0 * 3600.0))
}
