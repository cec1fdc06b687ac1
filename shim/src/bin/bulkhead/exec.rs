//! `bulkhead exec`.

use std::{path::PathBuf, process::ExitCode};

use bulkhead_shim::{
    config,
    operator::{pods, shell},
};

#[derive(clap::Args)]
pub struct Args {
    /// The static busybox of this host that the guest is given
    #[arg(long, value_name = "FILE")]
    busybox: Option<PathBuf>,
    /// `namespace/id`, an id, or a beginning of either that no other pod has
    pod: String,
    /// A command of busybox, or a program by its path in the guest
    #[arg(
        trailing_var_arg = true,
        allow_hyphen_values = true,
        default_value = "sh"
    )]
    command: Vec<String>,
}

pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let pod = pods::find(&config::state(), &args.pod)?;
    let status = shell::run(&pod, args.command.clone(), args.busybox.as_deref())?;
    Ok(ExitCode::from(u8::try_from(status).unwrap_or(u8::MAX)))
}
