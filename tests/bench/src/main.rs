//! `bulkhead-bench`: Bulkhead beside its peers, in one run and through one containerd; writes JSON, Markdown and one HTML page.
//!
//! What is compared takes turns, round by round, and figures are told as ratios of the same round; runc stands twice in
//! each, so that the noise of the host is seen. Nothing here passes or fails but `--short`, which compares with kept figures.

use std::{path::PathBuf, process::ExitCode};

use bulkhead_harness::{Engine, Scale, Suite, failure::Outcome, suite::Options};
use clap::{Parser, ValueEnum};

mod accounting;
mod counts;
mod figure;
mod files;
mod guest;
mod host;
mod kept;
mod memory;
mod network;
mod plot;
mod report;
mod start;
mod stats;
mod subject;
mod vmm;
mod workload;

use figure::Figure;
use guest::Product;

#[derive(Parser)]
#[command(version, about)]
struct Args {
    /// Bulkhead's engine.
    #[arg(long, value_enum, default_value = "emulated")]
    engine: EngineName,
    /// Folder with the product's programs, kernel and initramfs.
    #[arg(long, default_value = "target/bulkhead")]
    dist: PathBuf,
    /// Folder with the images' tar files.
    #[arg(long)]
    images: PathBuf,
    /// Archive with the clock of guests that are measured alone.
    #[arg(long, default_value = "target/bench/clock.cpio")]
    clock: PathBuf,
    /// Folder for results.json, results.md and report.html.
    #[arg(long, default_value = "target/bench")]
    out: PathBuf,
    /// Rounds of the cheapest figures; the others take a part of them.
    #[arg(long)]
    rounds: Option<u32>,
    /// Figures whose id contains this; several times for any of several.
    #[arg(long)]
    filter: Vec<String>,
    /// The most idle pods side by side, beside 1 and 10 (50 want 4 GiB).
    #[arg(long, default_value = "0")]
    pods: u32,
    /// Measures only what does not depend on the host's load, and fails if it grew beyond what this file holds.
    #[arg(long, conflicts_with = "filter")]
    short: Option<PathBuf>,
    /// Writes what `--short` measures into the file.
    #[arg(long, requires = "short")]
    keep: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum EngineName {
    Kvm,
    Emulated,
}

impl Args {
    fn product(&self) -> Product<'_> {
        Product {
            dist: &self.dist,
            clock: &self.clock,
        }
    }
}

impl EngineName {
    fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Emulated => "emulated",
        }
    }
}

/// How much is measured.
pub struct Plan {
    /// Rounds of the cheapest figures.
    pub rounds: u32,
    /// Pods at once.
    pub bursts: &'static [u32],
    /// The most idle pods side by side, or 0.
    pub most_pods: u32,
    filter: Vec<String>,
    short: bool,
}

impl Plan {
    /// Whether a figure was asked for.
    pub fn wants(&self, id: &str) -> bool {
        let asked = self.filter.iter().any(|part| id.contains(part));
        (asked || self.filter.is_empty()) && (!self.short || Self::is_steady(id))
    }

    /// Whether anything but the guest alone was asked for.
    fn needs_containerd(&self) -> bool {
        let alone = self.filter.iter().all(|part| part.starts_with("guest::"));
        self.filter.is_empty() || !alone
    }

    /// Whether a figure is the same on a busy host.
    fn is_steady(id: &str) -> bool {
        id.starts_with("guest::") || id.starts_with("counts::")
    }
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("bulkhead-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Whether nothing grew.
fn run(args: &Args) -> anyhow::Result<bool> {
    let engine = match args.engine {
        EngineName::Kvm => Engine::Kvm,
        EngineName::Emulated => Engine::Emulated,
    };
    let scale = Scale::detect(false);
    let (rounds, bursts): (u32, &[u32]) = match scale.pods_are_cheap() {
        true => (15, &[2, 5, 10]),
        false => (5, &[2, 5]),
    };
    let plan = Plan {
        rounds: args.rounds.unwrap_or(rounds),
        bursts,
        most_pods: args.pods,
        filter: args.filter.clone(),
        short: args.short.is_some(),
    };
    let host = host::look(&args.dist, engine)?;
    // The same guest whatever the engine, and the KVM test host has no emulator.
    let mut figures = match engine {
        Engine::Kvm => Vec::new(),
        _ => guest::figures(args.product(), &plan),
    };
    if plan.needs_containerd() {
        behind_containerd(args, engine, scale, &plan, &host, &mut figures)?;
    }
    let Some(kept) = &args.short else {
        report::write(&args.out, &host, &figures)?;
        report::tell(&args.out, &figures);
        return Ok(true);
    };
    if args.keep {
        kept::keep(kept, args.engine.name(), &figures)?;
        return Ok(true);
    }
    let tally = kept::compare(kept, args.engine.name(), &figures)?;
    let kept::Tally { passed, failed } = tally;
    println!("{passed} passed, {failed} failed, 0 skipped");
    Ok(failed == 0 && passed > 0)
}

/// What runs in containers. What fails is told in the report, which is written after each group: a run that is ended early has one.
fn behind_containerd(
    args: &Args,
    engine: Engine,
    scale: Scale,
    plan: &Plan,
    host: &host::Host,
    figures: &mut Vec<Figure>,
) -> anyhow::Result<()> {
    let options = Options {
        engine,
        dist: args.dist.clone(),
        images: args.images.clone(),
        docker: None,
        containerd: None,
        older: None,
        scale,
    };
    let mut add = |group: &str, result: Outcome<Vec<Figure>>| {
        match result {
            Ok(more) => figures.extend(more),
            Err(error) if plan.short => return Err(error.into()),
            Err(error) => {
                let mut none = Figure::new(group, "all figures of this group", "");
                none.missing.push(error.to_string());
                figures.push(none);
            }
        }
        match plan.short {
            true => Ok(()),
            false => report::write(&args.out, host, figures),
        }
    };
    add("counts", counts::traced(options.clone(), plan))?;
    let _scripts = subject::Scripts::make()?;
    let suite = Suite::start(options)?;
    add("counts", counts::figures(&suite, plan))?;
    add("vmm", vmm::figures(&suite, args.product(), plan))?;
    add("start", start::figures(&suite, plan))?;
    add("memory", memory::figures(&suite, plan))?;
    add("workload", workload::figures(&suite, plan))?;
    add("files", files::figures(&suite, plan))?;
    add("network", network::figures(&suite, plan))
}
