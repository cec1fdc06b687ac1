//! `bulkhead logs`.

use std::{io, process::ExitCode};

use bulkhead_shim::{
    config,
    operator::{logs::Logs, pods},
};

#[derive(clap::Args)]
pub struct Args {
    /// `namespace/id`, an id, or a beginning of either that no other pod has
    pod: String,
    /// Go on until the pod is gone
    #[arg(long, short)]
    follow: bool,
}

pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let pod = pods::find(&config::state(), &args.pod)?;
    let mut out = io::stdout().lock();
    let mut logs = Logs::of(&pod);
    logs.write_new(&mut out)?;
    if args.follow {
        logs.follow(&pod, &mut out)?;
    } else {
        logs.write_rest(&mut out)?;
    }
    Ok(ExitCode::SUCCESS)
}
