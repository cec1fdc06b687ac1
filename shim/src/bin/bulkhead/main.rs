//! `bulkhead`: the operator's command. A file a subcommand; what they do is in the library, under `operator`.

mod check;
mod exec;
mod features;
mod inspect;
mod install;
mod list;
mod logs;

use std::{
    io::{self, Write},
    process::ExitCode,
};

use clap::{Parser, Subcommand};

/// A container runtime that puts every pod in a virtual machine of its own.
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Tells what this host can run, and why not; succeeds if the configured engine can run
    Check(check::Args),
    /// Lists the pods of this host: state, engine, size, memory in use, containers, age
    List(list::Args),
    /// Prints a running pod's report as JSON: engine, stages of its start, VM exits, memory
    Inspect(inspect::Args),
    /// Prints a pod's logs: the guest's console (kernel and agent), the VMM's, the file server's
    Logs(logs::Args),
    /// Opens a debugging shell in a pod's guest, beside its containers (needs debug_shell = true)
    Exec(exec::Args),
    /// Prints what becomes of each field of the OCI runtime specification, with counts
    Features(features::Args),
    /// Places the programs, and configures Bulkhead, containerd and Docker; restarts nothing
    Install(install::Args),
    /// Takes back what `install` has placed
    Uninstall(install::UndoArgs),
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Check(args) => check::run(&args),
        Command::List(args) => list::run(&args),
        Command::Inspect(args) => inspect::run(&args),
        Command::Logs(args) => logs::run(&args),
        Command::Exec(args) => exec::run(&args),
        Command::Features(args) => features::run(&args),
        Command::Install(args) => install::run(&args),
        Command::Uninstall(args) => install::undo(&args),
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            eprintln!("bulkhead: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Prints; a reader that went away is an error, not a panic.
fn print(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}
