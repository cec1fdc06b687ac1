//! From `ctr run` to its end, with the output of the program: one at a time and several at once.

use std::time::Instant;

use bulkhead_harness::{Image, Suite, command::Output, ensure, failure::Outcome};

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
    Ok(found)
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
