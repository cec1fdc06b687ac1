//! `bulkhead inspect`.

use std::process::ExitCode;

use bulkhead_shim::{config::Config, operator::pods};

use super::print;

#[derive(clap::Args)]
pub struct Args {
    /// `namespace/id`, an id, or a beginning of either that no other pod has
    #[arg(required = true, num_args = 1..=2, value_names = ["POD", "ID"])]
    pod: Vec<String>,
}

pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    // Namespace and id may also be two arguments.
    let pod = pods::find(&Config::load()?, &args.pod.join("/"))?;
    let report = pod.inspect()?;
    print(&format!("{}\n", serde_json::to_string_pretty(&report)?))?;
    Ok(ExitCode::SUCCESS)
}
