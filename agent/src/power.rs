//! The end of the machine.

use std::{fs::OpenOptions, io::Write, sync::Arc, time::Duration};

use rustix::process::{Pid, Signal, kill_process_group};
use tokio::time::Instant;

use crate::{boot, reaper::Reaper};

/// How long processes may take to die of SIGKILL before the machine goes anyway.
const PATIENCE: Duration = Duration::from_secs(2);

/// Kills every process, syncs, restarts (which a microVM takes as its end).
pub async fn shut_down(reaper: Arc<Reaper>) {
    kill_everything();
    let _ = tokio::time::timeout_at(Instant::now() + PATIENCE, async {
        let kind = tokio::signal::unix::SignalKind::child();
        let Ok(mut sigchld) = tokio::signal::unix::signal(kind) else {
            return;
        };
        while reaper.reap() {
            if sigchld.recv().await.is_none() {
                return;
            }
        }
    })
    .await;
    // Lets the answer to the shim's request out.
    for _ in 0..16 {
        tokio::task::yield_now().await;
    }
    boot::release_trees();
    restart();
}

fn kill_everything() {
    // kill(-1) spares the caller, and only PID 1 may mean it.
    if rustix::process::getpid().is_init() {
        let _ = nix::sys::signal::kill(
            nix::unistd::Pid::from_raw(-1),
            nix::sys::signal::Signal::SIGKILL,
        );
    } else if let Some(group) = Pid::from_raw(0) {
        let _ = kill_process_group(group, Signal::KILL);
    }
}

/// One line on the console, then the end.
pub fn fatal(text: &str) -> ! {
    let line = format!("bulkhead-agent: {text}\n");
    if let Ok(mut console) = OpenOptions::new().write(true).open("/dev/console") {
        let _ = console.write_all(line.as_bytes());
        // The port is slower than the end.
        let _ = rustix::termios::tcdrain(&console);
    }
    restart()
}

fn restart() -> ! {
    if rustix::process::getpid().is_init() {
        let _ = nix::sys::reboot::reboot(nix::sys::reboot::RebootMode::RB_AUTOBOOT);
    }
    std::process::exit(1)
}
