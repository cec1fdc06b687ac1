//! The agent's side of making a process: starts the set-up copy, follows its reports, releases the execve.

use std::{
    fs::File,
    io::Write,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    process::{Command, Stdio},
    sync::Arc,
    time::Duration,
};

use rustix::{
    fs::MemfdFlags,
    io::FdFlags,
    net::{AddressFamily, SendFlags, SocketFlags, SocketType},
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::watch,
};

use super::{
    control::{COPY_ARG, Report, Work, receive},
    hooks,
};
use crate::{
    error::{Context, Error, Result},
    reaper::{Launch, Reaped, Reaper},
    sys,
};

/// Time that the set-up of an exec has. The container may stop or freeze the process, which is among its own by then.
const EXEC_PATIENCE: Duration = Duration::from_secs(60);

/// Time that the set-up of a container has, beside its hooks: it may copy folders, and read them from a slow host.
const CREATE_PATIENCE: Duration = Duration::from_secs(300);

/// A child, and its end.
type Claimed = (u32, watch::Receiver<Option<Reaped>>);

/// The container process's ends of its standard streams; `None` is the null device.
#[derive(Default)]
pub struct ChildStdio {
    /// Its stdin.
    pub stdin: Option<OwnedFd>,
    /// Its stdout.
    pub stdout: Option<OwnedFd>,
    /// Its stderr.
    pub stderr: Option<OwnedFd>,
}

/// A process that waits for its start.
pub struct Prepared {
    /// Pid in the agent's namespace.
    pub pid: u32,
    /// Its end, as soon as it is reaped.
    pub reaped: watch::Receiver<Option<Reaped>>,
    /// Master of its pty.
    pub pty: Option<OwnedFd>,
    control: AsyncFd<OwnedFd>,
}

/// A process that could not be made.
pub struct Unprepared {
    /// Why.
    pub error: Error,
    /// Its end, if it got so far as to be cloned: it may still be in the cgroup.
    pub reaped: Option<watch::Receiver<Option<Reaped>>>,
}

impl From<Error> for Unprepared {
    fn from(error: Error) -> Self {
        Self {
            error,
            reaped: None,
        }
    }
}

/// Makes a process up to its execve. `others` are the descriptors that go with the work.
pub async fn prepare(
    reaper: &Arc<Reaper>,
    work: &Work,
    stdio: ChildStdio,
    cgroup: BorrowedFd<'_>,
    others: &[OwnedFd],
) -> std::result::Result<Prepared, Unprepared> {
    let (ours, theirs) = rustix::net::socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )
    .step(|| "make a socket pair".into())?;
    rustix::io::ioctl_fionbio(&ours, true).step(|| "set up the socket pair".into())?;
    let control = sys::watch(ours, Interest::READABLE).step(|| "watch the socket pair".into())?;
    let file = memory_file(work)?;
    // From here on a child may end before its pid is known: the reaper keeps unknown ends until the launch is over.
    let launch = reaper.launch();
    let copy = spawn_copy(&theirs, &file, cgroup, others, stdio)?;
    drop((theirs, file));
    // Its number is claimed so that its end is not taken for that of a later process.
    let copy = (copy, launch.claim(copy));

    let mut process = None;
    let reports = follow(&control, &launch, &mut process);
    let followed = match patience(work) {
        None => reports.await,
        Some(limit) => match tokio::time::timeout(limit, reports).await {
            Ok(followed) => followed,
            Err(_) => Err(Error::State(format!(
                "the process was not set up within {} s",
                limit.as_secs()
            ))),
        },
    };
    let error = match (followed, process) {
        (Ok(pty), Some((pid, reaped))) => {
            return Ok(Prepared {
                pid,
                reaped,
                pty,
                control,
            });
        }
        (followed, claimed) => {
            process = claimed;
            let untold = || Error::State("the set-up process told no pid".into());
            followed.err().unwrap_or_else(untold)
        }
    };
    // Most often they are ending already; one that is stopped would not.
    for claimed in [Some(&copy), process.as_ref()].into_iter().flatten() {
        kill(claimed);
    }
    Err(Unprepared {
        error,
        reaped: process.map(|(_, reaped)| reaped),
    })
}

/// How long the set-up may take; `None` without a limit, which a hook decides.
fn patience(work: &Work) -> Option<Duration> {
    match work {
        Work::Create { spec, .. } => {
            hooks::time_to_create(spec).map(|hooks| hooks.saturating_add(CREATE_PATIENCE))
        }
        Work::Exec { .. } => Some(EXEC_PATIENCE),
    }
}

/// Follows the reports until the process is ready; answers the master of its pty. Its pid goes to `process` as soon as it is told.
async fn follow(
    control: &AsyncFd<OwnedFd>,
    launch: &Launch,
    process: &mut Option<Claimed>,
) -> Result<Option<OwnedFd>> {
    let mut pty = None;
    let mut ready = false;
    // The process's own reports may overtake the copy's of its pid.
    while !ready || process.is_none() {
        match next(control).await? {
            Some((Report::Pid(number), _)) if process.is_none() => {
                *process = Some((number, launch.claim(number)));
            }
            Some((Report::Pty, fd)) => pty = fd,
            Some((Report::Ready, _)) => ready = true,
            Some((Report::Failed { class, text }, _)) => {
                if process.is_none()
                    && let Ok(Some((Report::Pid(number), _))) = next(control).await
                {
                    *process = Some((number, launch.claim(number)));
                }
                return Err(Error::Reported { class, text });
            }
            Some((report, _)) => {
                return Err(Error::State(format!("unexpected report {report:?}")));
            }
            None => {
                let text = "the set-up process ended without a report";
                return Err(Error::State(text.into()));
            }
        }
    }
    Ok(pty)
}

/// Kills a child. Until it is reaped, which happens on this thread, the number is its own.
fn kill((pid, reaped): &Claimed) {
    let pid = rustix::process::Pid::from_raw(pid.cast_signed());
    if let (Some(pid), None) = (pid, *reaped.borrow()) {
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
    }
}

impl Prepared {
    /// Lets it execve; answers once it did.
    pub async fn start(&self) -> Result<()> {
        rustix::net::send(self.control.get_ref(), b"s", SendFlags::NOSIGNAL)
            .map_err(|_| Error::State("the process has ended before its start".into()))?;
        match next(&self.control).await? {
            None => Ok(()),
            Some((Report::Failed { class, text }, _)) => Err(Error::Reported { class, text }),
            Some((report, _)) => Err(Error::State(format!("unexpected report {report:?}"))),
        }
    }
}

async fn next(control: &AsyncFd<OwnedFd>) -> Result<Option<(Report, Option<OwnedFd>)>> {
    control
        .async_io(Interest::READABLE, |fd| receive(fd))
        .await
        .step(|| "read a report of the set-up process".into())
}

/// The work as a file in memory: it may be larger than a socket's buffer.
fn memory_file(work: &Work) -> Result<OwnedFd> {
    let what = || "hand over the work".to_string();
    let json = serde_json::to_vec(work).step(what)?;
    let fd = rustix::fs::memfd_create(c"work", MemfdFlags::CLOEXEC).step(what)?;
    let mut file = File::from(fd);
    file.write_all(&json).step(what)?;
    rustix::fs::seek(&file, rustix::fs::SeekFrom::Start(0)).step(what)?;
    Ok(file.into())
}

/// Starts the copy; answers its pid. The agent starts children on one thread alone, so no other child can inherit what is inheritable
/// here for a moment.
fn spawn_copy(
    control: &OwnedFd,
    work: &OwnedFd,
    cgroup: BorrowedFd<'_>,
    others: &[OwnedFd],
    stdio: ChildStdio,
) -> Result<u32> {
    let stream = |fd: Option<OwnedFd>| fd.map_or_else(Stdio::null, Stdio::from);
    let mut fds = vec![control.as_fd(), work.as_fd(), cgroup];
    fds.extend(others.iter().map(AsFd::as_fd));
    let mut command = Command::new("/proc/self/exe");
    command
        .arg(COPY_ARG)
        .args(fds.iter().map(|fd| fd.as_raw_fd().to_string()))
        .env_clear()
        .stdin(stream(stdio.stdin))
        .stdout(stream(stdio.stdout))
        .stderr(stream(stdio.stderr));
    let inherit = |flags: FdFlags| {
        fds.iter()
            .try_for_each(|fd| rustix::io::fcntl_setfd(fd, flags))
            .step(|| "pass descriptors to the set-up process".into())
    };
    inherit(FdFlags::empty())?;
    let spawned = command.spawn();
    inherit(FdFlags::CLOEXEC)?;
    // The reaper waits for it; what it has to say comes over the socket.
    spawned
        .map(|copy| copy.id())
        .step(|| "start the set-up process".into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{container::control::send, reaper::now};

    async fn followed(reports: &[Report]) -> (Result<Option<OwnedFd>>, Option<u32>) {
        let (ours, theirs) = rustix::net::socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::NONBLOCK,
            None,
        )
        .unwrap();
        for report in reports {
            send(theirs.as_fd(), report, None).unwrap();
        }
        drop(theirs);
        let control = sys::watch(ours, Interest::READABLE).unwrap();
        let reaper = Arc::new(Reaper::default());
        let mut process = None;
        let result = follow(&control, &reaper.launch(), &mut process).await;
        (result, process.map(|(pid, _)| pid))
    }

    #[tokio::test]
    async fn the_pid_may_come_last_but_once() {
        let (result, pid) = followed(&[Report::Ready, Report::Pid(7)]).await;
        assert!(result.is_ok());
        assert_eq!(pid, Some(7));
        let (result, pid) = followed(&[Report::Pid(7), Report::Pid(8), Report::Ready]).await;
        assert!(result.unwrap_err().text().contains("unexpected report"));
        assert_eq!(pid, Some(7));
        let (result, pid) = followed(&[Report::Ready]).await;
        assert!(result.unwrap_err().text().contains("without a report"));
        assert_eq!(pid, None);
    }

    #[tokio::test]
    async fn a_failure_is_told_with_the_pid_that_comes_after_it() {
        let failed = Report::from(&Error::State("why".into()));
        let (result, pid) = followed(&[failed, Report::Pid(7)]).await;
        assert_eq!(result.unwrap_err().text(), "why");
        assert_eq!(pid, Some(7));
    }

    #[test]
    fn a_stopped_process_is_killed_and_an_ended_one_let_be() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let pid = rustix::process::Pid::from_child(&child);
        rustix::process::kill_process(pid, rustix::process::Signal::STOP).unwrap();
        let ended = Reaped {
            status: 0,
            at: now(),
        };
        let (_sender, reaped) = watch::channel(Some(ended));
        kill(&(child.id(), reaped));
        assert!(child.try_wait().unwrap().is_none());
        let (_sender, reaped) = watch::channel(None);
        kill(&(child.id(), reaped));
        assert!(!child.wait().unwrap().success());
    }
}
