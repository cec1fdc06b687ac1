//! `bulkhead-hostile`: guests that attack, each through the real containerd, shim, VMM and file server, beside a pod that
//! must not notice. What holds after every attack stands in [`attack`].

use std::{path::PathBuf, process::ExitCode};

use bulkhead_harness::{
    Choice, Engine, Scale, Suite, Test,
    runner::{self, Tally},
    suite::Options,
};
use clap::{Parser, ValueEnum};

mod agents;
mod attack;
mod machines;

#[derive(Parser)]
#[command(version, about)]
struct Args {
    /// What runs the guests.
    #[arg(long, value_enum, default_value = "emulated")]
    engine: EngineName,
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

#[derive(Clone, Copy, ValueEnum)]
enum EngineName {
    Kvm,
    Emulated,
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
    match run(&args, &chosen) {
        Ok(tally) => {
            println!(
                "{} passed, {} failed, {} skipped",
                tally.passed, tally.failed, tally.skipped
            );
            ExitCode::from(u8::from(tally.failed > 0))
        }
        Err(error) => {
            eprintln!("bulkhead-hostile: {error:#}");
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
