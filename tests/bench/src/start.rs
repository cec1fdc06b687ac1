//! From `ctr run` to its end, with the output of the program: one at a time and several at once; and the stages of a start.

use std::time::Instant;

use bulkhead_harness::{
    Context, Image, Suite,
    command::Output,
    ensure,
    failure::{Outcome, read},
};
use serde_json::Value;

use crate::{
    Plan,
    accounting::Accounting,
    figure::{Figure, measure},
    subject::Subject,
};

const SAYS: &str = "ready";

/// `start::*`.
pub fn figures(suite: &Suite, plan: &Plan) -> Outcome<Vec<Figure>> {
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
    if plan.wants("start::stages") {
        found.push(stages(suite, plan.rounds.div_ceil(3)));
    }
    Ok(found)
}

/// Where the time of a start goes: each stage from the end of the one before, as the shim notes it. `rootfs` goes on beside the boot.
fn stages(suite: &Suite, rounds: u32) -> Figure {
    const STAGES: [&str; 9] = [
        "shim",
        "vmm",
        "machine",
        "kernel",
        "agent",
        "rootfs",
        "network",
        "container",
        "total",
    ];
    let title = "stages of a pod's start, from the shim's begin to its first container";
    let mut figure = Figure::new("start::stages", title, "ms");
    let mut samples: [Vec<f64>; STAGES.len()] = Default::default();
    for round in 1..=rounds {
        eprint!("\rstart::stages: round {round} of {rounds} ");
        let seen = noted(suite);
        match seen {
            Ok(noted) => {
                for (all, stage) in samples.iter_mut().zip(STAGES) {
                    all.extend(noted[stage].as_f64().map(|us| us / 1e3));
                }
            }
            Err(error) => {
                figure.missing.push(error.to_string());
                break;
            }
        }
    }
    eprintln!();
    for (stage, samples) in STAGES.iter().zip(samples) {
        figure.add_part(*stage, samples);
    }
    figure
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
        "{}: status {}, {}",
        output.line,
        output.status,
        output.errors()
    );
    Ok(())
}
