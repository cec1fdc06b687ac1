//! `bulkhead features`.

use std::process::ExitCode;

use bulkhead_shim::features;

use super::print;

#[derive(clap::Args)]
pub struct Args {
    /// Print the specification's features document (JSON), as `runc features` does
    #[arg(long, conflicts_with = "markdown")]
    json: bool,
    /// Print the table of docs/oci-spec.md
    #[arg(long)]
    markdown: bool,
}

pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let text = if args.json {
        format!("{}\n", serde_json::to_string_pretty(&features::document())?)
    } else if args.markdown {
        features::text::markdown()
    } else {
        features::text::terminal()
    };
    print(&text)?;
    Ok(ExitCode::SUCCESS)
}
