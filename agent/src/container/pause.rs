//! A pod's pause: the process that keeps the pod's namespaces while its containers come and go. The set-up process stays and does what
//! the image's `/pause` does: it sleeps, reaps what is left to it if it is PID 1, and ends with 0 on SIGTERM and SIGINT. So a pod
//! costs neither the reading of that file nor a program of its own. It stays unreadable for the pod's other processes, for its file is
//! the agent's.

use std::process::exit;

use nix::sys::signal::{SigSet, Signal};
use oci_spec::runtime::Spec;
use rustix::process::WaitOptions;

use crate::{
    error::{Error, Result},
    sys,
};

/// The program whose place it takes.
const PROGRAM: &str = "/pause";

/// Refuses what a pause is not.
pub fn check(spec: &Spec, terminal: bool) -> Result<()> {
    let args = spec.process().as_ref().and_then(|p| p.args().as_deref());
    if args.unwrap_or_default() != [PROGRAM] {
        return Err(Error::field("process.args", "is not that of a pause"));
    }
    match terminal {
        true => Err(Error::field("process.terminal", "is not of a pause")),
        false => Ok(()),
    }
}

/// Stays until a signal ends it. That the agent's socket closes tells the agent that it runs.
pub fn hold() -> ! {
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGCHLD] {
        signals.add(signal);
    }
    // Blocked, they wait for `wait` below; without that they would be lost on a PID 1.
    if signals.thread_block().is_err() {
        exit(1);
    }
    sys::rename_process(PROGRAM);
    if sys::close_from(3).is_err() {
        exit(1);
    }
    loop {
        match signals.wait() {
            Ok(Signal::SIGTERM | Signal::SIGINT) => exit(0),
            Ok(_) => while let Ok(Some(_)) = rustix::process::wait(WaitOptions::NOHANG) {},
            // Not possible with these signals; it must not spin, nor end the pod.
            Err(_) => std::thread::park(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checked(process: &str, terminal: bool) -> bool {
        let json = format!(
            r#"{{"ociVersion":"1.0.2","process":{{"user":{{"uid":0,"gid":0}},"cwd":"/",{process}}}}}"#
        );
        check(&serde_json::from_str(&json).unwrap(), terminal).is_ok()
    }

    #[test]
    fn a_pause_has_no_arguments_and_no_terminal() {
        assert!(checked(r#""args":["/pause"]"#, false));
        assert!(!checked(r#""args":["/pause"]"#, true));
        for args in [r#"["/pause","-v"]"#, r#"["sleep"]"#, "[]"] {
            assert!(!checked(&format!(r#""args":{args}"#), false), "{args}");
        }
    }
}
