//! `bulkhead install` and `bulkhead uninstall`.

use std::{
    env,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::Context;
use bulkhead_shim::{
    check::{self, host},
    config::Config,
    operator::install::{
        Target,
        plan::Plan,
        undo,
        wanted::{Facts, wanted},
    },
};

use super::print;

#[derive(clap::Args)]
pub struct Place {
    /// Folder of bin and lib
    #[arg(long, default_value = "/usr/local", value_name = "DIR")]
    prefix: PathBuf,
    /// Folder that stands for /, for images and tests
    #[arg(long, default_value = "/", value_name = "DIR")]
    root: PathBuf,
    /// Print what would be done, and do nothing
    #[arg(long)]
    dry_run: bool,
}

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    place: Place,
    /// Folder with the files to place [default: that of this program]
    #[arg(long, value_name = "DIR")]
    from: Option<PathBuf>,
    /// Configure for this version of containerd, or for none [default: what is installed]
    #[arg(long, value_name = "VERSION|none")]
    containerd: Option<String>,
    /// Take an installation back, as `uninstall` does
    #[arg(long, conflicts_with_all = ["from", "containerd"])]
    undo: bool,
}

#[derive(clap::Args)]
pub struct UndoArgs {
    #[command(flatten)]
    place: Place,
}

pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    if args.undo {
        return take_back(&args.place);
    }
    let target = target(&args.place)?;
    let exe = env::current_exe().context("finding our own executable")?;
    let beside = exe.parent().unwrap_or(Path::new("/"));
    let from = args.from.as_deref().unwrap_or(beside);
    let report = check::check(Config::load());
    let facts = Facts {
        engine: report.engine,
        why: report.why,
        containerd: containerd(args.containerd.as_deref())?,
        docker: host::in_path("dockerd").is_some(),
    };
    let plan = Plan::new(&target, wanted(&target, from, &facts)?)?;
    if args.place.dry_run {
        print("Nothing is done; this would be:\n\n")?;
    } else {
        plan.apply(&target)?;
    }
    print(&plan.text())?;
    Ok(ExitCode::SUCCESS)
}

fn containerd(given: Option<&str>) -> anyhow::Result<Option<(u32, u32)>> {
    match given {
        None => Ok(host::version_of("containerd")
            .ok()
            .map(|(_, version)| version)),
        Some("none") => Ok(None),
        Some(text) => {
            let version = host::parse_version(text).map(|(_, version)| version);
            Ok(Some(version.with_context(|| {
                format!("--containerd {text}: is not a version such as 1.7 or 2.1")
            })?))
        }
    }
}

pub fn undo(args: &UndoArgs) -> anyhow::Result<ExitCode> {
    take_back(&args.place)
}

fn take_back(place: &Place) -> anyhow::Result<ExitCode> {
    let target = target(place)?;
    if place.dry_run {
        print("Nothing is done; this would be:\n\n")?;
    }
    print(&undo::undo(&target, place.dry_run)?)?;
    print("\nTo do by hand: systemctl restart containerd, systemctl reload docker.\n")?;
    Ok(ExitCode::SUCCESS)
}

fn target(place: &Place) -> anyhow::Result<Target> {
    Ok(Target::new(place.root.clone(), place.prefix.clone())?)
}
