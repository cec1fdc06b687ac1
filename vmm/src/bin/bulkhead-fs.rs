//! `bulkhead-fs`: the file server of one pod, started by the shim.

use std::os::fd::RawFd;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use bulkhead_vmm::{fs, jail, log};
use clap::Parser;

/// Serves host folders to a guest by FUSE messages over sockets.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// The pod's state folder
    #[arg(long)]
    state_dir: PathBuf,
    /// An inherited SEQPACKET socket to the VMM; one a worker
    #[arg(long = "worker-fd", required = true)]
    worker_fds: Vec<RawFd>,
}

fn main() -> ExitCode {
    // No thread's filter has what glibc does to trim a heap of its own.
    jail::threads::one_heap();
    small_pages();
    tracing_subscriber::fmt()
        .with_writer(log::stderr)
        // They would be printed with `eprintln!`, which panics when the log cannot be written.
        .log_internal_errors(false)
        .with_ansi(false)
        .with_target(false)
        .init();
    match serve(Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

/// A huge page of a thread's stack or of the heap costs more than all that the server needs; no kernel fails to do without.
fn small_pages() {
    let _ = rustix::thread::disable_transparent_huge_pages(true);
}

fn serve(arguments: Arguments) -> anyhow::Result<()> {
    let workers =
        fs::inherited_sockets(&arguments.worker_fds).context("taking over the workers' sockets")?;
    Ok(fs::run(fs::Config {
        state_dir: arguments.state_dir,
        workers,
    })?)
}
