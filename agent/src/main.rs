//! The agent: PID 1 of the guest. Started by the kernel as `/init`; starts copies of itself for the set-up of containers.

mod boot;
mod container;
mod debug;
mod error;
mod growth;
mod network;
mod pod;
mod power;
mod reaper;
mod service;
mod stats;
mod streams;
mod sys;

use std::sync::Arc;

use anyhow::Context;
use tokio::signal::unix::{SignalKind, signal};

fn main() {
    let args: Vec<String> = std::env::args().collect();
    if args
        .get(1)
        .is_some_and(|arg| arg == container::control::COPY_ARG)
    {
        container::enter::main(args.get(2..).unwrap_or_default());
    }
    if args.get(1).is_some_and(|arg| arg == debug::COPY_ARG) {
        debug::become_program(args.get(2..).unwrap_or_default());
    }
    if !rustix::process::getpid().is_init() {
        eprintln!(
            "bulkhead-agent {}: runs as PID 1 of a guest",
            bulkhead_protocol::VERSION
        );
        std::process::exit(2);
    }
    if let Err(error) = boot::boot() {
        power::fatal(&error.text());
    }
    if let Err(error) = serve() {
        power::fatal(&format!("{error:#}"));
    }
}

fn serve() -> anyhow::Result<()> {
    // One thread beside those of standard streams, which start nothing. Set-up happens in copies that are executed anew, so a fork never
    // finds a lock held by another thread.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("start the runtime")?;
    bulkhead_failpoint::reach("agent.serve")?;
    runtime.block_on(async {
        let sigchld = signal(SignalKind::child()).context("watch children")?;
        let reaper = Arc::new(reaper::Reaper::default());
        tokio::spawn(Arc::clone(&reaper).run(sigchld));
        let pod = Arc::new(pod::Pod::new(reaper));
        service::serve(pod).await
    })
}
