//! `bulkhead`: the operator's command.

use std::{
    fs,
    io::{self, Write},
    process::ExitCode,
};

use anyhow::Context;
use bulkhead_shim::{
    check,
    config::Config,
    features,
    sandbox::{
        control::{self, Client},
        state::{self, Owner, ProcessId},
    },
};
use clap::{Parser, Subcommand};
use serde_json::{Value, json};

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
    Check {
        /// Print JSON
        #[arg(long, conflicts_with = "engine")]
        json: bool,
        /// Print only the engine this host can use: kvm, emulated or none
        #[arg(long)]
        engine: bool,
    },
    /// Prints what becomes of each field of the OCI runtime specification, with counts
    Features {
        /// Print the specification's features document (JSON), as `runc features` does
        #[arg(long, conflicts_with = "markdown")]
        json: bool,
        /// Print the table of docs/oci-spec.md
        #[arg(long)]
        markdown: bool,
    },
    /// Prints a running pod's report as JSON: engine, time to ready, VM exits, memory
    Inspect {
        /// containerd's namespace
        namespace: String,
        /// Id of the pod (of the container, if it is alone)
        id: String,
    },
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Check { json, engine } => check(json, engine),
        Command::Features { json, markdown } => features(json, markdown),
        Command::Inspect { namespace, id } => inspect(&namespace, &id),
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            eprintln!("bulkhead: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn check(json: bool, engine: bool) -> anyhow::Result<ExitCode> {
    let report = check::check(Config::load());
    if engine {
        print(&format!("{}\n", report.engine))?;
        return Ok(ExitCode::SUCCESS);
    }
    if json {
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

fn features(json: bool, markdown: bool) -> anyhow::Result<ExitCode> {
    let text = if json {
        format!("{}\n", serde_json::to_string_pretty(&features::document())?)
    } else if markdown {
        features::text::markdown()
    } else {
        features::text::terminal()
    };
    print(&text)?;
    Ok(ExitCode::SUCCESS)
}

fn inspect(namespace: &str, id: &str) -> anyhow::Result<ExitCode> {
    let config = Config::load()?;
    let dir = state::pod_dir(&config.state, namespace, id)?;
    anyhow::ensure!(
        dir.is_dir(),
        "there is no pod {namespace}/{id}: {} does not exist",
        dir.display()
    );
    let report = Client::new(dir.join("control.sock"))
        .request_blocking(&control::op("report"), &[])
        .context("asking the VMM")?;
    let emulator = report.get("emulator_pid").and_then(Value::as_i64);
    let pids = [
        ("shim", Owner::load(&dir).map(|o| o.shim.pid)),
        ("vmm", ProcessId::load(&dir.join("vmm.pid")).map(|p| p.pid)),
        ("fs", ProcessId::load(&dir.join("fs.pid")).map(|p| p.pid)),
        ("emulator", emulator.and_then(|pid| pid.try_into().ok())),
    ];
    let processes: Vec<Value> = pids
        .into_iter()
        .filter_map(|(name, pid)| {
            let pid = pid.filter(|&pid| pid > 0)?;
            Some(json!({ "name": name, "pid": pid, "pss_kib": pss_kib(pid) }))
        })
        .collect();
    let total: u64 = processes
        .iter()
        .filter_map(|p| p.get("pss_kib").and_then(Value::as_u64))
        .sum();
    let text = json!({
        "namespace": namespace, "id": id, "state": dir.display().to_string(),
        "pss_kib": total, "processes": processes, "report": report,
    });
    print(&format!("{}\n", serde_json::to_string_pretty(&text)?))?;
    Ok(ExitCode::SUCCESS)
}

/// Prints; a reader that went away is an error, not a panic.
fn print(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}

/// Memory that a process holds, shared pages divided among their holders.
fn pss_kib(pid: i32) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix("Pss:"))?;
    line.split_whitespace().next()?.parse().ok()
}
