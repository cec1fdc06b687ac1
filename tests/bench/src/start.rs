//! From `ctr run` to its end, with the output of the program: one at a time and several at once; and the stages of a start.

use std::time::Instant;

use bulkhead_harness::{
    Context, Image, Suite,
    command::Output,
    ensure,
    events::Events,
    failure::{Outcome, read},
    leaks::Snapshot,
};
use serde_json::Value;

use crate::{
    Plan,
    accounting::Accounting,
    figure::{Figure, Plot, measure},
    subject::{RUNC_AGAIN, Subject},
};

const SAYS: &str = "ready";

const IDS: [&str; 8] = [
    "start::one",
    "start::cpu",
    "start::burst_2",
    "start::burst_5",
    "start::burst_10",
    "start::stages",
    "start::teardown",
    "start::leaks",
];

/// `start::*`.
pub fn figures(suite: &Suite, plan: &Plan) -> Outcome<Vec<Figure>> {
    if !IDS.iter().any(|id| plan.wants(id)) {
        return Ok(Vec::new());
    }
    let subjects = Subject::all(suite.engine);
    suite.import(Image::Busybox)?;
    let mut found = Vec::new();
    if plan.wants("start::one") {
        let accounting = Accounting::of(suite.containerd_pid()?)?;
        // Programs and image come into the page cache.
        for subject in subjects {
            let _ = one(suite, &accounting, subject);
        }
        let figures = [
            Figure::new(
                "start::one",
                "`ctr run --rm` of `echo`, from start to end",
                "ms",
            ),
            Figure::new(
                "start::cpu",
                "CPU time of everything that took part, containerd included",
                "ms",
            ),
        ];
        found.extend(measure(figures, plan.rounds, &subjects, |subject| {
            one(suite, &accounting, subject)
        }));
    }
    for at_once in plan.bursts {
        let id = format!("start::burst_{at_once}");
        if plan.wants(&id) {
            let title = format!(
                "{at_once} times `ctr run --rm` of `echo` at once, until the last has ended"
            );
            let figures = [Figure::new(&id, title, "ms")];
            let rounds = plan.rounds.div_ceil(3);
            found.extend(measure(figures, rounds, &subjects, |subject| {
                burst(suite, subject, *at_once)
            }));
        }
    }
    let events = Events::subscribe(suite)?;
    if plan.wants("start::stages") {
        found.push(stages(suite, &events, plan.rounds.div_ceil(3)));
    }
    if plan.wants("start::teardown") {
        let title = "from the news of a program's end to its task's removal, with everything on the host gone";
        let figures = [Figure::new("start::teardown", title, "ms")];
        let rounds = plan.rounds.div_ceil(2);
        found.extend(measure(figures, rounds, &subjects, |subject| {
            end(suite, &events, subject).map(|[_, delete]| [delete])
        }));
    }
    if plan.wants("start::leaks") {
        found.push(leaks(suite, &subjects));
    }
    Ok(found)
}

/// Where the time of a start goes, as the shim notes it, and that of an end, as containerd tells it.
fn stages(suite: &Suite, events: &Events, rounds: u32) -> Figure {
    // Name, and what it follows if not the one before.
    const STAGES: [(&str, Option<&str>); 8] = [
        ("shim", None),
        ("vmm", None),
        ("rootfs", Some("vmm")),
        ("machine", Some("vmm")),
        ("kernel", None),
        ("agent", None),
        ("network", None),
        ("container", None),
    ];
    let title = "a pod from the shim's begin to its task's removal, stage by stage; rootfs goes on beside the boot. \
                 exit: from the start of a program that ends at once to the news of its end; delete: to the end of everything";
    let mut figure = Figure::new("start::stages", title, "ms").drawn(Plot::Waterfall);
    let mut samples: [Vec<f64>; STAGES.len()] = Default::default();
    let mut ends: [Vec<f64>; 2] = Default::default();
    for round in 1..=rounds {
        eprint!("\rstart::stages: round {round} of {rounds} ");
        let subject = Subject::bulkhead(suite.engine);
        let seen = noted(suite).and_then(|noted| Ok((noted, end(suite, events, subject)?)));
        match seen {
            Ok((noted, end)) => {
                for (all, (stage, _)) in samples.iter_mut().zip(STAGES) {
                    all.extend(noted[stage].as_f64().map(|us| us / 1e3));
                }
                for (all, ms) in ends.iter_mut().zip(end) {
                    all.push(ms);
                }
            }
            Err(error) => {
                figure.missing.push(error.to_string());
                break;
            }
        }
    }
    eprintln!();
    for ((stage, after), samples) in STAGES.into_iter().zip(samples) {
        figure.add_part(stage, samples);
        if let Some(row) = figure.rows.last_mut() {
            row.after = after;
        }
    }
    for (name, samples) in ["exit", "delete"].into_iter().zip(ends) {
        figure.add_part(name, samples);
    }
    figure
}

/// Milliseconds from the start of a program that ends at once to the news of its end, and from there to its task's removal.
fn end(suite: &Suite, events: &Events, subject: Subject) -> Outcome<[f64; 2]> {
    let run = subject.run(suite, Image::Busybox).args(&["echo", SAYS]);
    let name = run.name().to_owned();
    counts(&run.output()?)?;
    let limit = suite.scale.seconds(10);
    let at = |topic: &str| -> Outcome<f64> {
        Ok(events.wait_for(&name, topic, limit)?.time.as_secs_f64() * 1e3)
    };
    let [started, exited, deleted] = [
        at("/tasks/start")?,
        at("/tasks/exit")?,
        at("/tasks/delete")?,
    ];
    // The news of a program that ends at once may come first.
    Ok([(exited - started).max(0.0), deleted - exited])
}

/// Microseconds by stage of a pod that is started for it.
fn noted(suite: &Suite) -> Outcome<Value> {
    let subject = Subject::bulkhead(suite.engine);
    let pod = subject.run(suite, Image::Busybox).args(&["sleep", "1000"]);
    let pod = pod.detach()?;
    let file = suite.state_of(pod.name()).join("pod.json");
    let text = read(&file)?;
    let record: Value = serde_json::from_str(&text).context("pod.json")?;
    pod.end()?;
    Ok(record["stages_us"].clone())
}

/// What is left on the host after a pod: processes, mounts, sockets, links, cgroups, files.
fn leaks(suite: &Suite, subjects: &[Subject]) -> Figure {
    let title = "what a pod leaves behind on the host when it has ended: processes, mounts, sockets, links, cgroups, files";
    let mut figure = Figure::new("start::leaks", title, "things");
    for &subject in subjects.iter().filter(|&&subject| subject != RUNC_AGAIN) {
        let scope = suite.scope();
        let before = Snapshot::take(&scope);
        let run = subject.run(suite, Image::Busybox).args(&["echo", SAYS]);
        match run.output().and_then(|output| counts(&output)) {
            Ok(()) => {
                let left = before.leaks(&scope, suite.scale.seconds(5));
                figure.add_part(subject.name, vec![left.len() as f64]);
                figure.notes.extend(
                    left.into_iter()
                        .map(|left| format!("{}: {left}\n", subject.name)),
                );
            }
            Err(error) => figure.missing.push(format!("{}: {error}", subject.name)),
        }
    }
    figure
}

fn one(suite: &Suite, accounting: &Accounting, subject: Subject) -> Outcome<[f64; 2]> {
    let run = subject.run(suite, Image::Busybox).args(&["echo", SAYS]);
    let group = accounting.path(run.name());
    let before = accounting.cpu_ms()?;
    let output = run.flags(&["--cgroup", &group]).output()?;
    counts(&output)?;
    Ok([
        output.took.as_secs_f64() * 1e3,
        accounting.cpu_ms()? - before,
    ])
}

fn burst(suite: &Suite, subject: Subject, at_once: u32) -> Outcome<[f64; 1]> {
    let start = Instant::now();
    let running: Vec<_> = (0..at_once)
        .map(|_| {
            subject
                .run(suite, Image::Busybox)
                .args(&["echo", SAYS])
                .seconds(60 * at_once)
                .spawn()
        })
        .collect::<Outcome<_>>()?;
    for run in running {
        counts(&run.wait()?)?;
    }
    Ok([start.elapsed().as_secs_f64() * 1e3])
}

/// A run counts with exit status 0 and the program's output alone.
fn counts(output: &Output) -> Outcome {
    ensure!(
        output.status == 0 && output.stdout.trim_ascii() == SAYS.as_bytes(),
        "status {}, {}",
        output.status,
        output.errors()
    );
    Ok(())
}
