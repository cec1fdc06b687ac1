//! One process of a container: its init or an exec.
//!
//! It is *registered* (an exec that has not started), *created* (waits for its execve), *running*, then *ended*. Each change is
//! made here; the pod says when.

use std::{
    os::fd::{AsFd, OwnedFd},
    sync::{Arc, Mutex},
    time::Duration,
};

use bulkhead_protocol::agent::Phase;
use oci_spec::runtime::Process as ProcessSpec;
use tokio::{io::unix::AsyncFd, sync::watch};

use super::lock;
use crate::{
    container::{
        attributes,
        control::Work,
        launch::{Prepared, prepare},
        tty,
    },
    error::{Context, Error, Result},
    reaper::{Reaped, Reaper, now},
    streams::{Flags, Pumps, Streams},
};

/// How a process ended.
#[derive(Clone, Copy, Debug)]
pub struct Exit {
    /// Code and time.
    pub reaped: Reaped,
    /// Whether the kernel killed in this cgroup for memory.
    pub oom: bool,
    /// Its pid while it ran; 0 if it never did.
    pub pid: u32,
}

/// Time that a process which could not be set up has for its end.
const KILL_PATIENCE: Duration = Duration::from_secs(10);

enum State {
    /// An exec that waits for its start.
    Registered(Box<ProcessSpec>),
    /// A start is on.
    Starting,
    /// Set up; only the execve is missing.
    Created(Prepared),
    /// The execve succeeded.
    Running,
    /// It could not be started.
    Failed,
}

const NEVER_RAN: Exit = Exit {
    reaped: Reaped { status: 0, at: 0 },
    oom: false,
    pid: 0,
};

/// What a process that is started has so far.
pub enum Begun {
    /// Nothing but an exec's spec.
    Exec(Box<ProcessSpec>),
    /// All but the execve.
    Created(Prepared),
}

/// A container's init or an exec.
pub struct Process {
    flags: Flags,
    streams: Streams,
    state: Mutex<State>,
    /// Pid and its reaped end, once there is a process.
    alive: Mutex<Option<(u32, watch::Receiver<Option<Reaped>>)>>,
    pty: Mutex<Option<Arc<AsyncFd<OwnedFd>>>>,
    exit: watch::Sender<Option<Exit>>,
}

impl Process {
    /// An exec to be started by its spec, or an init that is being made; `pumps` are its container's.
    pub fn new(
        flags: Flags,
        exec: Option<ProcessSpec>,
        pumps: &mut Option<Pumps>,
    ) -> Result<Arc<Self>> {
        let state = exec.map_or(State::Starting, |spec| State::Registered(Box::new(spec)));
        Ok(Arc::new(Self {
            flags,
            streams: Streams::new(flags, pumps)?,
            state: Mutex::new(state),
            alive: Mutex::new(None),
            pty: Mutex::new(None),
            exit: watch::Sender::new(None),
        }))
    }

    /// Its pid, as long as it is not reaped.
    pub fn pid(&self) -> Option<u32> {
        match &*lock(&self.alive) {
            Some((pid, reaped)) if reaped.borrow().is_none() => Some(*pid),
            _ => None,
        }
    }

    /// Whether its start is still to come.
    pub fn phase(&self) -> Phase {
        match *lock(&self.state) {
            State::Registered(_) | State::Created(_) if self.exited().is_none() => Phase::CREATED,
            _ => Phase::STARTED,
        }
    }

    fn exited(&self) -> Option<Exit> {
        *self.exit.borrow()
    }

    /// Waits for its end.
    pub async fn wait(&self) -> Exit {
        let mut exit = self.exit.subscribe();
        let ended = exit.wait_for(Option::is_some).await;
        ended.ok().and_then(|exit| *exit).unwrap_or(NEVER_RAN)
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: i32) -> Result<()> {
        let Some(pid) = self.pid() else {
            return Err(Error::NotFound("the process".into()));
        };
        let signal = nix::sys::signal::Signal::try_from(signal).ok();
        let pid = nix::unistd::Pid::from_raw(pid.cast_signed());
        nix::sys::signal::kill(pid, signal).step(|| "send the signal".into())
    }

    /// Its streams.
    pub fn streams(&self) -> &Streams {
        &self.streams
    }

    /// Whether it has a terminal.
    pub fn has_terminal(&self) -> bool {
        self.flags.terminal
    }

    /// Whether its program was started; it may have ended since.
    pub fn is_running(&self) -> bool {
        matches!(*lock(&self.state), State::Running)
    }

    /// Launches it up to its execve and connects its streams.
    pub async fn launch(
        &self,
        reaper: &Arc<Reaper>,
        work: &Work,
        cgroup: OwnedFd,
        others: &[OwnedFd],
    ) -> Result<Prepared> {
        let stdio = self.streams.open_pipes()?;
        let prepared = prepare(reaper, work, stdio, cgroup.as_fd(), others).await;
        let mut prepared = match prepared {
            Ok(prepared) => prepared,
            Err(failed) => {
                // It is on its way out; the cgroup can be removed once it is reaped. In a file system of the container's it may
                // hang in spite of SIGKILL.
                if let Some(mut reaped) = failed.reaped {
                    let ended = reaped.wait_for(Option::is_some);
                    let _ = tokio::time::timeout(KILL_PATIENCE, ended).await;
                }
                return Err(failed.error);
            }
        };
        let (spec, exec) = work.process();
        let set = spec.map_or(Ok(()), |spec| attributes::apply(prepared.pid, spec, exec));
        if let Err(error) = set {
            // Without its agent the process ends.
            let mut reaped = prepared.reaped.clone();
            drop(prepared);
            let _ = reaped.wait_for(Option::is_some).await;
            return Err(error);
        }
        if let Some(master) = prepared.pty.take() {
            *lock(&self.pty) = Some(self.streams.set_pty(master)?);
        }
        Ok(prepared)
    }

    /// Notes its end when it comes. `oom` is asked then.
    pub fn watch(
        self: &Arc<Self>,
        prepared: &Prepared,
        oom: impl FnOnce(Reaped) -> bool + Send + 'static,
    ) {
        let pid = prepared.pid;
        let mut reaped = prepared.reaped.clone();
        *lock(&self.alive) = Some((pid, reaped.clone()));
        let process = Arc::clone(self);
        tokio::spawn(async move {
            let end = reaped.wait_for(Option::is_some).await;
            let Some(reaped) = end.ok().and_then(|end| *end) else {
                return;
            };
            let oom = oom(reaped);
            process.exit.send_replace(Some(Exit { reaped, oom, pid }));
        });
    }

    /// It is set up, and waits for its start.
    pub fn created(&self, prepared: Prepared) {
        *lock(&self.state) = State::Created(prepared);
    }

    /// Begins its only start.
    pub fn begin(&self) -> Result<Begun> {
        let mut state = lock(&self.state);
        match std::mem::replace(&mut *state, State::Starting) {
            State::Registered(spec) => Ok(Begun::Exec(spec)),
            State::Created(prepared) => Ok(Begun::Created(prepared)),
            other => {
                *state = other;
                Err(Error::State("the process was started already".into()))
            }
        }
    }

    /// Lets it execute its program; answers its pid.
    pub async fn release(&self, prepared: Prepared) -> Result<u32> {
        let started = prepared.start().await;
        *lock(&self.state) = match started {
            Ok(()) => State::Running,
            Err(_) => State::Failed,
        };
        started.map(|()| prepared.pid)
    }

    /// The start failed: unless there is a process that ends, this is its end.
    pub fn not_started(&self, error: &Error) {
        if self.pid().is_some() || self.exited().is_some() {
            return;
        }
        *lock(&self.state) = State::Failed;
        let status = exit_code_of(error);
        let reaped = Reaped { status, at: now() };
        self.exit.send_replace(Some(Exit {
            reaped,
            ..NEVER_RAN
        }));
    }

    /// Its end, before it is deleted; what was not started ends now.
    pub async fn end(&self) -> Result<Exit> {
        let (registered, unstarted) = match *lock(&self.state) {
            State::Registered(_) => (true, false),
            State::Created(_) | State::Failed => (false, true),
            State::Starting | State::Running => (false, false),
        };
        match self.exited() {
            Some(exit) => Ok(exit),
            None if registered => {
                // Whoever waits for it waits in vain.
                self.exit.send_replace(Some(NEVER_RAN));
                Ok(NEVER_RAN)
            }
            None if unstarted => {
                let _ = self.signal(libc::SIGKILL);
                Ok(self.wait().await)
            }
            None => Err(Error::State("the process has not ended".into())),
        }
    }

    /// Sets the size of its terminal; without one there is nothing to set.
    pub fn resize(&self, width: u32, height: u32) -> Result<()> {
        match &*lock(&self.pty) {
            Some(pty) => {
                let size = tty::winsize(width.into(), height.into());
                rustix::termios::tcsetwinsize(pty.get_ref(), size)
                    .step(|| "resize the terminal".into())
            }
            None => Ok(()),
        }
    }
}

/// Exit code of a process that could not be started, as shells and runc have it.
fn exit_code_of(error: &Error) -> u32 {
    let text = error.text();
    if text.ends_with("permission denied") || text.ends_with("is a directory") {
        126
    } else if text.contains("exec: ") {
        127
    } else {
        255
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processes_that_cannot_start_have_the_exit_codes_of_shells() {
        let code = |text: &str| exit_code_of(&Error::Executable(text.into()));
        assert_eq!(code("exec: \"x\": executable file not found in $PATH"), 127);
        assert_eq!(code("exec: \"/x\": permission denied"), 126);
        assert_eq!(exit_code_of(&Error::State("x".into())), 255);
    }
}
