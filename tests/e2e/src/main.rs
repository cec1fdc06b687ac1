//! `bulkhead-e2e`: claims about Bulkhead, each through the real `containerd` and `ctr`, on one engine.

use std::{path::PathBuf, process::ExitCode, time::Duration};

use bulkhead_harness::{
    Choice, Engine, Scale, Suite, Test,
    runner::{self, Tally},
    suite::Options,
};
use clap::{Parser, ValueEnum};

mod bad_input;
mod census;
mod cgroup;
mod crashes;
mod cri;
mod docker;
mod exec;
mod files;
mod host;
mod images;
mod lifecycle;
mod limits;
mod network;
mod operator;
mod pods;
mod posture;
mod process;
mod size;
mod soak;
mod stdio;
mod stopped;
mod survival;
mod task_api;
mod view;
mod walk;

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
    /// Folder of a Docker to use (dockerd, docker, docker-proxy) instead of the one in PATH.
    #[arg(long)]
    docker: Option<PathBuf>,
    /// Folder of another containerd (containerd, ctr) to use instead of the one in PATH; the cases that walk through all of it are added.
    #[arg(long)]
    containerd: Option<PathBuf>,
    /// Folder of an older containerd, from which is upgraded; without it the one in PATH.
    #[arg(long)]
    older: Option<PathBuf>,
    #[command(flatten)]
    choice: Choice,
    /// Smaller sizes.
    #[arg(long)]
    quick: bool,
    /// The soak in place of all other cases, with so many pods.
    #[arg(long, conflicts_with = "minutes")]
    pods: Option<u32>,
    /// The same for so many minutes.
    #[arg(long)]
    minutes: Option<u32>,
}

#[derive(Clone, Copy, ValueEnum)]
enum EngineName {
    Kvm,
    Emulated,
    Runc,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let pods = args.pods.map(soak::Length::Pods);
    let minutes = |m| soak::Length::Time(Duration::from_secs(u64::from(m) * 60));
    let all = match pods.or(args.minutes.map(minutes)) {
        Some(length) => {
            soak::LENGTH.get_or_init(|| length);
            soak::TESTS.to_vec()
        }
        None => all(args.containerd.is_some()),
    };
    let Some(chosen) = args.choice.of(&all, |test| test.name) else {
        return ExitCode::SUCCESS;
    };
    runner::conclude("bulkhead-e2e", run(&args, &chosen))
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
        docker: args.docker.clone(),
        containerd: args.containerd.clone(),
        older: args.older.clone(),
        scale,
    })?;
    Ok(runner::run(&suite, chosen))
}

fn all(other_containerd: bool) -> Vec<Test> {
    let mut all = [
        host::TESTS,
        census::TESTS,
        view::TESTS,
        process::TESTS,
        limits::TESTS,
        cgroup::TESTS,
        exec::TESTS,
        stdio::TESTS,
        files::TESTS,
        images::TESTS,
        lifecycle::TESTS,
        pods::TESTS,
        size::TESTS,
        bad_input::TESTS,
        crashes::TESTS,
        stopped::TESTS,
        survival::TESTS,
        posture::TESTS,
        task_api::TESTS,
        operator::TESTS,
    ]
    .concat();
    all.extend(cri::tests());
    all.extend(network::tests());
    all.extend(docker::tests());
    if other_containerd {
        all.extend_from_slice(walk::TESTS);
    }
    all
}
