//! The agent's side of making a process: starts the set-up copy, follows its reports, releases the execve.

use std::{
    fs::File,
    io::Write,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    process::{Command, Stdio},
    sync::Arc,
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

use super::control::{COPY_ARG, Report, Work, receive};
use crate::{
    error::{Context, Error, Result},
    reaper::{Reaped, Reaper},
    sys,
};

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
    let work = memory_file(work)?;
    // From here on a child may end before its pid is known: the reaper keeps unknown ends until the launch is over.
    let launch = reaper.launch();
    spawn_copy(&theirs, &work, cgroup, others, stdio)?;
    drop((theirs, work));

    let mut pid = None;
    let mut pty = None;
    loop {
        let report = match next(&control).await {
            Ok(report) => report,
            Err(error) => return Err(unprepared(error, pid)),
        };
        match report {
            Some((Report::Pid(number), _)) => pid = Some((number, launch.claim(number))),
            Some((Report::Pty, fd)) => pty = fd,
            Some((Report::Ready, _)) => {
                let Some((pid, reaped)) = pid else {
                    // The process's own report may overtake the copy's: the pid comes next.
                    match next(&control).await {
                        Ok(Some((Report::Pid(number), _))) => {
                            let reaped = launch.claim(number);
                            return Ok(Prepared {
                                pid: number,
                                reaped,
                                pty,
                                control,
                            });
                        }
                        _ => {
                            let text = "the set-up process told no pid".to_string();
                            return Err(Error::State(text).into());
                        }
                    }
                };
                return Ok(Prepared {
                    pid,
                    reaped,
                    pty,
                    control,
                });
            }
            Some((Report::Failed { class, text }, _)) => {
                // The copy's report of the pid may come after the process's of its failure.
                if pid.is_none()
                    && let Ok(Some((Report::Pid(number), _))) = next(&control).await
                {
                    pid = Some((number, launch.claim(number)));
                }
                return Err(unprepared(Error::Reported { class, text }, pid));
            }
            None => {
                let text = "the set-up process ended without a report".to_string();
                return Err(unprepared(Error::State(text), pid));
            }
        }
    }
}

fn unprepared(error: Error, pid: Option<(u32, watch::Receiver<Option<Reaped>>)>) -> Unprepared {
    Unprepared {
        error,
        reaped: pid.map(|(_, reaped)| reaped),
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

/// Starts the copy. The agent has one thread, so no other child can inherit what is inheritable here for a moment.
fn spawn_copy(
    control: &OwnedFd,
    work: &OwnedFd,
    cgroup: BorrowedFd<'_>,
    others: &[OwnedFd],
    stdio: ChildStdio,
) -> Result<()> {
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
    spawned.map(drop).step(|| "start the set-up process".into())
}
