//! `bulkhead-fault`: a step of a pod's life fails, or the process that takes it is killed there. Through the real containerd, with the
//! product's own programs, in which the steps have names (`failpoint/`). What holds after each stands in [`life`].

use std::{path::PathBuf, process::ExitCode};

use bulkhead_harness::{
    Choice, Engine, Scale, Suite, Test,
    runner::{self, Tally},
    suite::Options,
};
use clap::{Parser, ValueEnum};

mod host;
mod life;
mod points;

#[derive(Parser)]
#[command(version, about)]
struct Args {
    /// What runs the guests.
    #[arg(long, value_enum, default_value = "emulated")]
    engine: EngineName,
    /// Folder with the product's programs, built with their failpoints.
    #[arg(long, default_value = "target/fault/dist")]
    dist: PathBuf,
    /// Folder with the images' tar files.
    #[arg(long)]
    images: PathBuf,
    #[command(flatten)]
    choice: Choice,
}

#[derive(Clone, Copy, ValueEnum)]
enum EngineName {
    Kvm,
    Emulated,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let all: Vec<Test> = [points::TESTS, host::TESTS].concat();
    let Some(chosen) = args.choice.of(&all, |test| test.name) else {
        return ExitCode::SUCCESS;
    };
    points::announce();
    match run(&args, &chosen) {
        Ok(tally) => {
            println!(
                "{} passed, {} failed, {} skipped",
                tally.passed, tally.failed, tally.skipped
            );
            ExitCode::from(u8::from(tally.failed > 0))
        }
        Err(error) => {
            eprintln!("bulkhead-fault: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn run(args: &Args, chosen: &[&Test]) -> anyhow::Result<Tally> {
    let suite = Suite::start(Options {
        engine: match args.engine {
            EngineName::Kvm => Engine::Kvm,
            EngineName::Emulated => Engine::Emulated,
        },
        dist: args.dist.clone(),
        images: args.images.clone(),
        docker: None,
        containerd: None,
        older: None,
        scale: Scale::detect(false),
    })?;
    Ok(runner::run(&suite, chosen))
}
