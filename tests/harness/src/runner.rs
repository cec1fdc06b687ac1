//! Runs cases one after another, each between two looks at the host, and tells.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    process::ExitCode,
    time::Instant,
};

use crate::{
    failure::{Failure, Outcome, skip},
    leaks::Snapshot,
    suite::{CRI_NAMESPACE, Engine, Image, Suite},
};

/// A case.
#[derive(Clone, Copy, Debug)]
pub struct Test {
    /// Group and claim.
    pub name: &'static str,
    /// Images it needs.
    pub images: &'static [Image],
    /// Engines it applies to.
    pub engines: &'static [Engine],
    /// Which suite it gets.
    pub place: Place,
    /// It asks too much of a host that is itself emulated; a case beside it shows the same there.
    pub fast_host: bool,
    /// The case.
    pub run: fn(&Suite) -> Outcome,
}

/// Where a case's containerd lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In the machine's network.
    Machine,
    /// In a network of the suite's own.
    Network,
    /// There, and the images are CRI's.
    Cri,
    /// There, with Docker's daemon.
    Docker,
}

impl Test {
    /// The same in the suite's own network.
    pub const fn networked(mut self) -> Self {
        self.place = Place::Network;
        self
    }

    /// The same with Docker, in the suite's own network.
    pub const fn docker(mut self) -> Self {
        self.place = Place::Docker;
        self
    }

    /// The same, and not on a host that is itself emulated.
    pub const fn fast_host(mut self) -> Self {
        self.fast_host = true;
        self
    }

    /// The same through CRI, in the suite's own network.
    pub const fn cri(mut self) -> Self {
        self.place = Place::Cri;
        self
    }
}

/// Every engine.
pub const ANY: &[Engine] = &[Engine::Kvm, Engine::Emulated, Engine::Runc];
/// Engines of the product.
pub const MACHINES: &[Engine] = &[Engine::Kvm, Engine::Emulated];

/// A case from its function: `test!(module::function, IMAGES, ENGINES)`.
#[macro_export]
macro_rules! test {
    ($function:path, $images:expr, $engines:expr) => {
        $crate::Test {
            name: stringify!($function),
            images: $images,
            engines: $engines,
            place: $crate::runner::Place::Machine,
            fast_host: false,
            run: $function,
        }
    };
}

/// How many cases ended how.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tally {
    /// The claim held.
    pub passed: u32,
    /// It did not.
    pub failed: u32,
    /// It does not apply here.
    pub skipped: u32,
}

/// Prints the closing line of a run of `program`, or why there was none; its exit code.
pub fn conclude(program: &str, ran: Result<Tally, impl std::fmt::Display>) -> ExitCode {
    match ran {
        Ok(tally) => {
            println!(
                "{} passed, {} failed, {} skipped",
                tally.passed, tally.failed, tally.skipped
            );
            ExitCode::from(u8::from(tally.failed > 0))
        }
        Err(error) => {
            eprintln!("{program}: {error:#}");
            ExitCode::from(2)
        }
    }
}

/// Runs the cases and prints each one's end.
pub fn run(suite: &Suite, tests: &[&Test]) -> Tally {
    let mut tally = Tally::default();
    let mut failed = Vec::new();
    for (index, test) in tests.iter().enumerate() {
        let start = Instant::now();
        let (suite, place) = match (applies(suite, test), test.place) {
            (Ok(()), Place::Machine) => (suite, Ok(())),
            (Ok(()), _) => match suite.networked() {
                Ok(networked) => (networked, Ok(())),
                Err(failure) => (suite, Err(failure)),
            },
            (skipped, _) => (suite, skipped),
        };
        let log = suite.log_mark();
        suite.forget_logs();
        let end = place.and_then(|()| one(suite, test));
        let word = match &end {
            Ok(()) => "ok",
            Err(Failure::Skipped(_)) => "skip",
            Err(Failure::Failed(_)) => "FAIL",
        };
        println!(
            "{:>3}/{} {word:<4} {:<72} {:>7.2} s",
            index + 1,
            tests.len(),
            test.name,
            start.elapsed().as_secs_f64()
        );
        match end {
            Ok(()) => tally.passed += 1,
            Err(Failure::Skipped(lacks)) => {
                tally.skipped += 1;
                println!("         {lacks}");
            }
            Err(Failure::Failed(text)) => {
                tally.failed += 1;
                failed.push(test.name);
                println!("{text}\n{}", suite.logs(log));
                suite.clean();
            }
        }
    }
    for name in failed {
        println!("failed: {name}");
    }
    tally
}

fn applies(suite: &Suite, test: &Test) -> Outcome {
    if !test.engines.contains(&suite.engine) {
        return skip(format!("does not apply to {:?}", suite.engine));
    }
    if test.fast_host && !suite.scale.pods_are_cheap() {
        return skip("too slow on an emulated host");
    }
    Ok(())
}

fn one(suite: &Suite, test: &Test) -> Outcome {
    for image in test.images {
        match test.place {
            Place::Cri => suite.import_into(*image, CRI_NAMESPACE)?,
            Place::Docker => suite.docker()?.load(suite, *image)?,
            _ => suite.import(*image)?,
        }
    }
    let scope = suite.scope();
    let before = Snapshot::take(&scope);
    let end = catch_unwind(AssertUnwindSafe(|| (test.run)(suite)))
        .unwrap_or_else(|_| Err(Failure::Failed("the case panicked".into())));
    // After a failure the state folders stay for the logs; what is left tells nothing more.
    end?;
    let mut leaks = before.leaks(&suite.scope(), suite.settle());
    if leaks.iter().any(|leak| leak.contains("/snapshots/")) {
        suite.collect_garbage();
        leaks = before.leaks(&suite.scope(), suite.settle());
    }
    if leaks.is_empty() {
        return Ok(());
    }
    Err(Failure::Failed(format!(
        "the case passed but left:\n  {}",
        leaks.join("\n  ")
    )))
}
