//! `bulkhead-vmm`: one machine, started and asked by the shim.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use bulkhead_failpoint::reach;
use bulkhead_vmm::config::MachineConfig;
use bulkhead_vmm::control::Control;
use bulkhead_vmm::machine::end::{End, EndReason, EndSender, ExitFile, end_channel};
use bulkhead_vmm::machine::readiness::Readiness;
use bulkhead_vmm::machine::{Machine, builder};
use bulkhead_vmm::serial::ConsoleRing;
use bulkhead_vmm::{jail, log};
use clap::Parser;
use tracing_subscriber::EnvFilter;

/// Runs one machine, described by machine.json in its state folder.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// The pod's state folder
    #[arg(long)]
    state_dir: PathBuf,
}

fn main() {
    let readiness = Readiness::new(Instant::now());
    let arguments = Arguments::parse();
    log_to_stderr();
    let console = ConsoleRing::new();
    let exit = match ExitFile::create(&arguments.state_dir) {
        Ok(exit) => exit,
        Err(error) => {
            tracing::error!(%error, folder = %arguments.state_dir.display(), "cannot make exit.json");
            std::process::exit(1);
        }
    };
    record_panics(&exit, &console, &readiness);
    let end = run(&arguments.state_dir, &console, &readiness);
    tracing::info!(reason = ?end.reason, "{}", end.detail);
    if let Err(error) = end.record(&exit, &console, &readiness) {
        tracing::error!(%error, "cannot write exit.json");
    }
    // At once: vCPU and device threads end with the process.
    std::process::exit(end.reason.exit_code());
}

fn run(state_dir: &Path, console: &Arc<ConsoleRing>, readiness: &Readiness) -> End {
    let config = match MachineConfig::load(state_dir) {
        Ok(config) => config,
        Err(error) => return failure(EndReason::ConfigInvalid, error),
    };
    let (sender, receiver) = end_channel();
    let machine = match start(&config, console, sender, readiness) {
        Ok(machine) => machine,
        Err(error) => return failure(EndReason::EngineFailed, error),
    };
    tracing::info!(engine = config.engine.name(), "machine started");
    let end = receiver.recv().unwrap_or_else(|_| {
        End::new(
            EndReason::EngineFailed,
            "nothing is left that could run the machine",
        )
    });
    tracing::info!(exits = ?machine.exits(), "machine ended");
    machine.kill();
    end
}

/// Everything that takes rights; the jail; then the threads.
fn start(
    config: &MachineConfig,
    console: &Arc<ConsoleRing>,
    sender: EndSender,
    readiness: &Readiness,
) -> anyhow::Result<Arc<Machine>> {
    // Bound first, so that the shim can connect from the start.
    let control = Control::bind(&config.state_dir)?;
    reach("vmm.build")?;
    let built = builder::build(config, console, &sender, readiness)?;
    reach("vmm.jail")?;
    jail::enter(config)?;
    reach("vmm.start")?;
    let machine = built.start(console.clone(), sender.clone(), readiness.clone())?;
    let machine = Arc::new(machine);
    reach("vmm.serve")?;
    control.serve(machine.clone(), sender)?;
    jail::threads::confine_main();
    Ok(machine)
}

fn failure(reason: EndReason, error: impl Into<anyhow::Error>) -> End {
    End::new(reason, format!("{:#}", error.into()))
}

/// A bug in this program ends the machine with a reason too.
fn record_panics(exit: &ExitFile, console: &Arc<ConsoleRing>, readiness: &Readiness) {
    let (exit, console) = (exit.clone(), console.clone());
    let readiness = readiness.clone();
    std::panic::set_hook(Box::new(move |info| {
        let end = End::new(
            EndReason::EngineFailed,
            format!("bug in bulkhead-vmm: {info}"),
        );
        tracing::error!("{}", end.detail);
        let _ = end.record(&exit, &console, &readiness);
        std::process::abort();
    }));
}

fn log_to_stderr() {
    let filter = EnvFilter::try_from_env("BULKHEAD_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(false)
        .with_target(false)
        .with_writer(log::stderr)
        // They would be printed with `eprintln!`, which panics when the log cannot be written.
        .log_internal_errors(false)
        .init();
}
