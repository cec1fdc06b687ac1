//! `bulkhead-fault`: a step of a pod's life fails, or the process that takes it is killed there. Through the real containerd, with the
//! product's own programs, in which the steps have names (`failpoint/`). What holds after each stands in [`life`].

use std::{path::PathBuf, process::ExitCode};

use bulkhead_harness::{
    Choice, MachineEngine, Outcome, Suite, Test,
    runner::{self, Tally},
    suite::Options,
};
use clap::Parser;

mod clock;
mod host;
mod life;
mod network;
mod points;
mod stopped;

#[derive(Parser)]
#[command(version, about)]
struct Args {
    /// What runs the guests.
    #[arg(long, value_enum, default_value = "emulated")]
    engine: MachineEngine,
    /// Folder with the product's programs, built with their failpoints.
    #[arg(long, default_value = "target/fault/dist")]
    dist: PathBuf,
    /// Folder with the images' tar files.
    #[arg(long)]
    images: PathBuf,
    #[command(flatten)]
    choice: Choice,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let all: Vec<Test> = [
        points::TESTS,
        host::TESTS,
        network::TESTS,
        clock::TESTS,
        stopped::TESTS,
    ]
    .concat();
    let Some(chosen) = args.choice.of(&all, |test| test.name) else {
        return ExitCode::SUCCESS;
    };
    points::announce();
    runner::conclude("bulkhead-fault", run(&args, &chosen))
}

fn run(args: &Args, chosen: &[&Test]) -> Outcome<Tally> {
    let options = Options::new(args.engine, args.dist.clone(), args.images.clone());
    Ok(runner::run(&Suite::start(options)?, chosen))
}
