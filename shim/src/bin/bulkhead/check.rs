//! `bulkhead check`.

use std::process::ExitCode;

use bulkhead_shim::{check, config::Config};

use super::print;

#[derive(clap::Args)]
pub struct Args {
    /// Print JSON
    #[arg(long, conflicts_with = "engine")]
    json: bool,
    /// Print only the engine this host can use: kvm, emulated or none
    #[arg(long)]
    engine: bool,
}

pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let report = check::check(Config::load());
    if args.engine {
        print(&format!("{}\n", report.engine))?;
        return Ok(ExitCode::SUCCESS);
    }
    if args.json {
        print(&format!("{}\n", serde_json::to_string_pretty(&report)?))?;
    } else {
        print(&report.to_string())?;
    }
    Ok(if report.runs {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
