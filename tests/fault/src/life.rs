//! A pod's life from create to delete, and what holds of it whatever fails: the step says why in time, events are complete and in order,
//! everything can be removed, and removed again. That nothing is left is the harness's check after each case.

use std::{fmt, time::Instant};

use bulkhead_harness::{
    Failure, Outcome, Pod, Suite, ensure, ensure_eq,
    events::{Event, Events},
};

/// A step that a client takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// `ctr run -d`: create and start.
    Run,
    /// The same of a second container in the pod.
    Member,
    /// A program in the first.
    Exec,
    /// SIGKILL and removal of the second.
    End,
    /// SIGKILL and removal of the first, and with it of the pod.
    Last,
}

/// How a life went.
pub enum Ended {
    /// Every step did what it should.
    Well,
    /// This one failed, with this text.
    At(Step, String),
}

impl fmt::Debug for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Well => f.write_str("every step succeeded"),
            Self::At(step, text) => write!(f, "{step:?} failed: {text}"),
        }
    }
}

/// Longest that a step may take to fail or succeed.
const STEP: u32 = 45;

/// Takes the steps until one fails, then removes by force what is left, twice.
pub fn live(suite: &Suite) -> Outcome<Ended> {
    let events = Events::subscribe(suite)?;
    let names = [suite.name("c"), suite.name("c")];
    let ended = steps(suite, &names)?;
    for name in names.iter().rev() {
        remove(suite, name)?;
    }
    for name in &names {
        complete(&events.of(name), name)?;
    }
    Ok(ended)
}

fn steps(suite: &Suite, [first, second]: &[String; 2]) -> Outcome<Ended> {
    let of_pod = format!("io.kubernetes.cri.sandbox-id={first}");
    let run = || suite.busybox().args(&["sleep", "100000"]);
    let pod = match timed(suite, Step::Run, || run().named(first).detach())? {
        Ok(pod) => pod,
        Err(at) => return Ok(at),
    };
    let member = || {
        run()
            .named(second)
            .flags(&["--annotation", &of_pod])
            .detach()
    };
    let member = match timed(suite, Step::Member, member)? {
        Ok(pod) => pod,
        Err(at) => return Ok(at),
    };
    if let Err(at) = timed(suite, Step::Exec, || said(&pod))? {
        return Ok(at);
    }
    for (step, pod) in [(Step::End, member), (Step::Last, pod)] {
        if let Err(at) = timed(suite, step, || {
            ensure_eq!("exit status", pod.end()?, 137);
            Ok(())
        })? {
            return Ok(at);
        }
    }
    Ok(Ended::Well)
}

fn said(pod: &Pod<'_>) -> Outcome {
    ensure_eq!("output", pod.sh("echo here")?, "here");
    Ok(())
}

fn timed<T>(
    suite: &Suite,
    step: Step,
    take: impl FnOnce() -> Outcome<T>,
) -> Outcome<Result<T, Ended>> {
    let begun = Instant::now();
    let taken = take();
    let (took, limit) = (begun.elapsed(), suite.scale.seconds(STEP));
    ensure!(took < limit, "{step:?} took {took:?}: {:?}", taken.err());
    match taken {
        Ok(value) => Ok(Ok(value)),
        Err(Failure::Failed(text)) => Ok(Err(Ended::At(step, text))),
        Err(skipped) => Err(skipped),
    }
}

/// What is there goes, and goes again.
fn remove(suite: &Suite, name: &str) -> Outcome {
    for _ in 0..2 {
        let limit = suite.scale.seconds(STEP);
        let output = suite
            .ctr(["task", "rm", "-f", name])
            .limit(limit)
            .output()?;
        let errors = output.errors();
        ensure!(
            output.status == 0 || errors.contains("not found") || errors.contains("exit code"),
            "removing {name}: {errors}"
        );
        let output = suite.ctr(["container", "rm", name]).output()?;
        let errors = output.errors();
        ensure!(
            output.status == 0 || errors.contains("not found"),
            "removing container {name}: {errors}"
        );
    }
    Ok(())
}

/// What began was told, in order, to its end. A shim that takes over may tell again what was told.
pub fn complete(events: &[Event], name: &str) -> Outcome {
    const ORDER: [&str; 4] = [
        "/tasks/create",
        "/tasks/start",
        "/tasks/exit",
        "/tasks/delete",
    ];
    let mut told: Vec<&str> = Vec::new();
    for event in events {
        // An exec has an end of its own.
        let of_exec = event.fields["id"].as_str().is_some_and(|id| id != name);
        let topic = event.topic.as_str();
        if !of_exec && ORDER.contains(&topic) && !told.contains(&topic) {
            told.push(topic);
        }
    }
    let exec = |topic: &str| {
        let of = |e: &Event| e.fields["exec_id"].is_string() || e.fields["id"] != name;
        events.iter().position(|e| e.topic == topic && of(e))
    };
    if let Some(end) = exec("/tasks/exit") {
        ensure!(
            exec("/tasks/exec-started").is_some_and(|start| start < end),
            "the end of an exec of {name} was told before its start"
        );
    }
    let sorted: Vec<&str> = ORDER.into_iter().filter(|t| told.contains(t)).collect();
    ensure_eq!(format!("order of {name}'s events"), told, sorted);
    if told.contains(&"/tasks/start") {
        ensure_eq!(format!("{name}'s events"), told, ORDER);
    }
    Ok(())
}

/// An error is broken where its lines are full; here it is one.
pub fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}
