//! `bulkhead-e2e`: claims about Bulkhead, each through the real `containerd` and `ctr`, on one engine.

use std::{path::PathBuf, process::ExitCode};

use bulkhead_harness::{
    Engine, Scale, Suite, Test,
    runner::{self, Tally},
    suite::Options,
};
use clap::{Parser, ValueEnum};

mod bad_input;
mod crashes;
mod exec;
mod files;
mod host;
mod images;
mod lifecycle;
mod limits;
mod pods;
mod process;
mod stdio;
mod view;

#[derive(Parser)]
#[command(version, about)]
struct Args {
    /// What runs the containers; runc shows that the cases themselves are right.
    #[arg(long, value_enum, default_value = "emulated")]
    engine: EngineName,
    /// Folder with the product's programs, kernel and initramfs.
    #[arg(long, default_value = "target/bulkhead")]
    dist: PathBuf,
    /// Folder with the images' tar files.
    #[arg(long)]
    images: Option<PathBuf>,
    /// Only cases whose name holds one of these words.
    #[arg(long)]
    filter: Vec<String>,
    /// Not the one of this name.
    #[arg(long)]
    skip: Vec<String>,
    /// Only each N-th case beginning with the K-th, as K/N.
    #[arg(long, value_name = "K/N", value_parser = shard)]
    shard: Option<(usize, usize)>,
    /// Print the names.
    #[arg(long)]
    list: bool,
    /// Smaller sizes.
    #[arg(long)]
    quick: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum EngineName {
    Kvm,
    Emulated,
    Runc,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let all = all();
    let (first, step) = args.shard.unwrap_or((1, 1));
    let chosen: Vec<&Test> = all
        .iter()
        .filter(|t| args.filter.is_empty() || args.filter.iter().any(|w| t.name.contains(w)))
        .skip(first - 1)
        .step_by(step)
        .filter(|t| !args.skip.iter().any(|name| t.name == name))
        .collect();
    if args.list {
        for test in &chosen {
            println!("{}", test.name);
        }
        return ExitCode::SUCCESS;
    }
    match run(&args, &chosen) {
        Ok(tally) => {
            println!(
                "{} passed, {} failed, {} skipped",
                tally.passed, tally.failed, tally.skipped
            );
            ExitCode::from(u8::from(tally.failed > 0))
        }
        Err(error) => {
            eprintln!("bulkhead-e2e: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn shard(text: &str) -> Result<(usize, usize), String> {
    text.split_once('/')
        .and_then(|(k, n)| Some((k.parse().ok()?, n.parse().ok()?)))
        .filter(|(k, n)| (1..=*n).contains(k))
        .ok_or_else(|| "is not K/N with K from 1 to N".into())
}

fn run(args: &Args, chosen: &[&Test]) -> anyhow::Result<Tally> {
    let engine = match args.engine {
        EngineName::Kvm => Engine::Kvm,
        EngineName::Emulated => Engine::Emulated,
        EngineName::Runc => Engine::Runc,
    };
    let Some(images) = args.images.clone() else {
        anyhow::bail!("--images names the folder with the images' tar files");
    };
    let scale = Scale::detect(args.quick);
    println!(
        "engine {engine:?}, sizes: {} (transfers {}, {} execs, {} at once, {} pods, {} at once)",
        scale.name,
        Scale::size(scale.bulk),
        scale.execs,
        scale.execs_at_once,
        scale.pods,
        scale.pods_at_once
    );
    let suite = Suite::start(Options {
        engine,
        dist: args.dist.clone(),
        images,
        scale,
    })?;
    Ok(runner::run(&suite, chosen))
}

fn all() -> Vec<Test> {
    [
        host::TESTS,
        view::TESTS,
        process::TESTS,
        limits::TESTS,
        exec::TESTS,
        stdio::TESTS,
        files::TESTS,
        images::TESTS,
        lifecycle::TESTS,
        pods::TESTS,
        bad_input::TESTS,
        crashes::TESTS,
    ]
    .concat()
}
