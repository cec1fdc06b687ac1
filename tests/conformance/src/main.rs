//! `bulkhead-conformance`: the same bundle under runc and under Bulkhead in the same containerd, compared by what a probe
//! inside sees. A difference that [`explained`] does not give a reason for fails the case.

use std::{path::PathBuf, process::ExitCode, time::Instant};

use bulkhead_harness::{
    Choice, Engine, Failure, MachineEngine, Outcome, Suite, leaks::Snapshot, suite::Options,
};
use clap::Parser;

mod case;
mod cases;
mod compare;
mod explained;
mod host;
mod judge;
mod report;
mod side;

use case::Case;
use host::Host;
use judge::{Verdict, judge};
use report::Report;
use side::{Kind, Side};

#[derive(Parser)]
#[command(version, about)]
struct Args {
    /// What runs Bulkhead's side.
    #[arg(long, value_enum, default_value = "emulated")]
    engine: MachineEngine,
    /// Folder with the product's programs, kernel and initramfs.
    #[arg(long, default_value = "target/bulkhead")]
    dist: PathBuf,
    /// Folder with the images' tar files; not used, for the rootfs is made here.
    #[arg(long)]
    images: Option<PathBuf>,
    /// The static probe; without this, `conformance-probe` beside this program.
    #[arg(long)]
    probe: Option<PathBuf>,
    #[command(flatten)]
    choice: Choice,
    /// Print what each side saw.
    #[arg(long)]
    verbose: bool,
    /// Start no case after so many seconds; what is left counts as skipped.
    #[arg(long)]
    seconds: Option<u64>,
    /// Write the report, in Markdown, to this file.
    #[arg(long)]
    report: Option<PathBuf>,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let all = cases::all();
    let Some(chosen) = args.choice.of(&all, |case| &case.name) else {
        return ExitCode::SUCCESS;
    };
    match run(&args, &chosen) {
        Ok(failed) => ExitCode::from(u8::from(failed > 0)),
        Err(error) => {
            eprintln!("bulkhead-conformance: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn run(args: &Args, chosen: &[&Case]) -> anyhow::Result<usize> {
    let engine = Engine::from(args.engine);
    let probe = match &args.probe {
        Some(probe) => probe.clone(),
        None => std::env::current_exe()?.with_file_name("conformance-probe"),
    };
    let dist = std::fs::canonicalize(&args.dist)?;
    let host = Host::look(engine, &dist);
    let shims = std::env::temp_dir().join(format!("bulkhead-conformance-{}", std::process::id()));
    std::fs::create_dir_all(&shims)?;
    let _shims = Removed(shims.clone());
    // The rootfs is made here.
    let images = args.images.clone().unwrap_or_else(|| dist.clone());
    let suite = Suite::start(Options::new(engine, shims.clone(), images))?;
    side::make_shims(&shims, &suite, &dist)?;
    println!(
        "engine {engine:?}, runc {}.{}, cgroup {} on the host",
        host.runc.0,
        host.runc.1,
        if host.cgroup_v2 { "v2" } else { "v1" }
    );
    let before = Snapshot::take(&suite.scope());
    let mut report = Report::new(&host);
    let begin = Instant::now();
    {
        let runc = Side::new(Kind::Runc, &suite, &probe)?;
        let ours = Side::new(Kind::Bulkhead, &suite, &probe)?;
        for (index, case) in chosen.iter().enumerate() {
            let start = Instant::now();
            let log = suite.log_mark();
            let late = args.seconds.is_some_and(|s| begin.elapsed().as_secs() >= s);
            let end = if late {
                Err(Failure::Skipped("out of time".into()))
            } else {
                judge(case, &host, &ours, &runc)
            };
            report.add(
                case,
                start.elapsed(),
                index + 1,
                chosen.len(),
                &end,
                args.verbose,
            );
            if args.verbose && matches!(end, Err(Failure::Failed(_))) {
                let logs = suite.logs(log);
                println!("{}", bulkhead_harness::command::tail(&logs, 4000));
            }
        }
    }
    let leaks = before.leaks(&suite.scope(), suite.settle());
    report.leaks(&leaks);
    report.close();
    if let Some(file) = &args.report {
        std::fs::write(file, report.markdown())?;
    }
    Ok(report.failed())
}

/// What a case's evaluation gives.
type End = Outcome<Verdict>;

/// A folder that goes with this value.
struct Removed(PathBuf);

impl Drop for Removed {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
