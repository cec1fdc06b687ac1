//! `bulkhead-hostile`: guests that attack, each through the real containerd, shim, VMM and file server, beside a pod that
//! must not notice. What holds after every attack stands in [`attack`].

use std::{path::PathBuf, process::ExitCode};

use bulkhead_harness::{
    Choice, MachineEngine, Outcome, Suite, Test,
    runner::{self, Tally},
    suite::Options,
};
use clap::Parser;

mod agents;
mod attack;
mod machines;

#[derive(Parser)]
#[command(version, about)]
struct Args {
    /// What runs the guests.
    #[arg(long, value_enum, default_value = "emulated")]
    engine: MachineEngine,
    /// Folder with the product's programs, kernel and initramfs.
    #[arg(long, default_value = "target/bulkhead")]
    dist: PathBuf,
    /// Folder with the images' tar files.
    #[arg(long)]
    images: PathBuf,
    #[command(flatten)]
    choice: Choice,
    /// Also the attacks that wait for the shim's long deadlines.
    #[arg(long)]
    long: bool,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let mut all: Vec<Test> = [machines::TESTS, agents::TESTS].concat();
    if args.long {
        all.extend_from_slice(agents::LONG);
    }
    let Some(chosen) = args.choice.of(&all, |test| test.name) else {
        return ExitCode::SUCCESS;
    };
    runner::conclude("bulkhead-hostile", run(&args, &chosen))
}

fn run(args: &Args, chosen: &[&Test]) -> Outcome<Tally> {
    let options = Options::new(args.engine, args.dist.clone(), args.images.clone());
    Ok(runner::run(&Suite::start(options)?, chosen))
}
