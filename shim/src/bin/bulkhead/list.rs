//! `bulkhead list`.

use std::process::ExitCode;

use bulkhead_shim::{
    config,
    operator::{pods, table},
};

use super::print;

#[derive(clap::Args)]
pub struct Args {
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Print names only, one a line
    #[arg(long, short, conflicts_with = "json")]
    quiet: bool,
}

pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let pods = pods::all(&config::state())?;
    let text = if args.json {
        format!("{}\n", serde_json::to_string_pretty(&pods)?)
    } else if args.quiet {
        pods.iter().map(|pod| format!("{}\n", pod.name())).collect()
    } else {
        table::table(&pods)
    };
    print(&text)?;
    Ok(ExitCode::SUCCESS)
}
