//! The keeper: a small process in front of the shim, so that containerd and the pod outlive the shim's death or upgrade.
//!
//! ```text
//!   containerd ══ ttrpc ══ keeper ── socket pairs ── worker (the shim: Task service, pod)
//!                            │ listening socket, connections, calls without an answer,
//!                            └ descriptors of the standard streams that the worker stored
//! ```
//!
//! containerd forgets a pod whose shim closes its connection. So the connections end at the keeper, which passes whole frames on
//! (`frame.rs`) and knows which calls wait for an answer. When the worker dies (a bug, `kill -9`, a HUP for a new version), the keeper starts
//! the program that is on the disk now, hands it the stored descriptors and the connections, and sends the calls without an answer once more;
//! the new worker finds the pod by its state folder (`task/adopt.rs`). Nothing that went through a standard stream is lost: it moves from
//! socket to fifo inside the kernel (`stdio.rs`), and both are held here.
//!
//! A worker that stands still is no worker: while a call has no answer the keeper asks for signs of life, and kills one that gives none (`life.rs`).
//!
//! It has one thread, no runtime and no state that must be saved. What it reads comes from containerd and from the worker, both root. If
//! the keeper itself is killed, containerd calls `delete`, and the worker ends the pod.

mod channel;
mod client;
mod frame;
mod life;
mod starter;
mod worker;

use std::{
    collections::BTreeMap,
    env, io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::{
            net::{UnixListener, UnixStream},
            process::CommandExt,
        },
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use bulkhead_failpoint::reach;
use rustix::{
    event::{PollFd, PollFlags, poll},
    process::{Pid, set_child_subreaper},
};

use self::{channel::Message, client::Client, life::Life};
use crate::{
    args::Args,
    bootstrap::{remove_socket, socket_path},
    logging,
    sandbox::state::remove_file,
};
pub use channel::End;
pub use starter::Starter;
pub use worker::{Connections, Kept};

/// The descriptor that the keeper (its way to `start`) and an executed worker (its channel) find theirs at.
pub const INHERITED_FD: i32 = 3;
/// The action of a worker that was executed anew.
pub const SERVE: &str = "serve";
/// A worker that dies so often...
const DEATHS_MAX: usize = 10;
/// ...within this time is not started again: containerd cleans up.
const DEATHS_WITHIN: Duration = Duration::from_secs(30);
/// So many deaths lately are followed at once; before the next there is a pause, which doubles...
const DEATHS_AT_ONCE: usize = 3;
const PAUSE: Duration = Duration::from_millis(100);
/// ...up to this.
const PAUSE_MAX: Duration = Duration::from_secs(3);
/// How long no connection is taken after one could not be.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);
/// How long answers may take to go out after the worker's orderly end.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// What a process is after [`run`].
pub enum Role {
    /// The keeper, and the pod is over.
    Over,
    /// The first worker, with its channel to the keeper.
    Worker(OwnedFd),
}

/// A descriptor's place: process, role.
type Place = (String, String);

struct Keeper {
    program: PathBuf,
    args: Args,
    listener: UnixListener,
    channel: OwnedFd,
    worker: Life,
    clients: Vec<Client>,
    stored: BTreeMap<Place, OwnedFd>,
    /// The worker has said that the pod is over.
    over: bool,
    /// The worker has made way on purpose.
    wanted: bool,
    deaths: Vec<Instant>,
    /// No connection is taken before.
    accepts_from: Option<Instant>,
}

/// Keeps the shim of `args`, which `start` at the other end of `starter` waits for. The worker is a copy of this process: it returns first.
pub fn run(args: &Args, starter: OwnedFd) -> io::Result<Role> {
    let starter = Starter::from(starter);
    match begin(args, &starter) {
        Ok(Begun::Worker(channel)) => Ok(Role::Worker(channel)),
        Ok(Begun::Keeper(mut keeper)) => {
            drop(starter);
            reach("keeper.keep")?;
            keeper.keep()?;
            Ok(Role::Over)
        }
        Err(error) => {
            let _ = remove_socket(&socket_of(args));
            starter.fail(&error);
            Err(error)
        }
    }
}

enum Begun {
    Keeper(Box<Keeper>),
    Worker(OwnedFd),
}

/// Worker first, socket second: at each moment somebody is left who removes the socket, `start` or the worker.
fn begin(args: &Args, starter: &Starter) -> io::Result<Begun> {
    // Known before an upgrade replaces the file.
    let program = env::current_exe()?;
    // Orphans of a worker (VMM, file server) come to us, and nobody has to reap them.
    set_child_subreaper(Some(rustix::process::getpid()))?;
    raise_descriptors();
    be_keeper(true);
    reach("keeper.worker")?;
    let (channel, theirs) = channel::pair()?;
    // SAFETY: this process has one thread, so the child finds every lock free.
    let worker = match unsafe { libc::fork() } {
        -1 => return Err(io::Error::last_os_error()),
        0 => {
            be_keeper(false);
            return Ok(Begun::Worker(theirs));
        }
        pid => Pid::from_raw(pid),
    };
    drop(theirs);
    let _ = rustix::thread::set_name(c"bulkhead-keeper");
    let socket = socket_of(args);
    remove_file(&socket)?;
    let listener = UnixListener::bind(&socket)?;
    listener.set_nonblocking(true)?;
    reach("keeper.socket")?;
    channel::send(channel.as_fd(), &Message::Go { first: true }, None)?;
    starter.listens()?;
    Ok(Begun::Keeper(Box::new(Keeper {
        program,
        args: args.clone(),
        listener,
        channel,
        worker: Life::of(worker),
        clients: Vec::new(),
        stored: BTreeMap::new(),
        over: false,
        wanted: false,
        deaths: Vec::new(),
        accepts_from: None,
    })))
}

fn socket_of(args: &Args) -> PathBuf {
    socket_path(&args.address, &args.namespace, &args.id)
}

/// The keeper's signals: children that nobody waits for leave no zombies, and what ends or renews a pod is the worker's business.
fn be_keeper(keeper: bool) {
    let action = if keeper { libc::SIG_IGN } else { libc::SIG_DFL };
    for signal in [libc::SIGCHLD, libc::SIGHUP, libc::SIGTERM, libc::SIGINT] {
        // SAFETY: both are dispositions that need no handler.
        unsafe { libc::signal(signal, action) };
    }
}

/// Streams of many processes are kept; worker and keeper may have what the hard limit allows.
fn raise_descriptors() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    // What it has must do otherwise.
    let _ = setrlimit(Resource::Nofile, limit);
}

/// How long to wait before the next worker.
fn pause(deaths: usize) -> Duration {
    match deaths.checked_sub(DEATHS_AT_ONCE) {
        None | Some(0) => Duration::ZERO,
        Some(more) => {
            let doubled =
                u32::try_from(more).map_or(u32::MAX, |n| 1 << n.min(16).saturating_sub(1));
            PAUSE.saturating_mul(doubled).min(PAUSE_MAX)
        }
    }
}

impl Keeper {
    fn keep(&mut self) -> io::Result<()> {
        loop {
            let (listener, channel) = self.wait()?;
            if listener {
                self.accept();
            }
            for client in &mut self.clients {
                client.pump();
            }
            let alive = !channel || self.hear();
            if !alive {
                if self.over {
                    self.last_words();
                    return Ok(());
                }
                self.replace()?;
            }
            self.clients.retain(|client| !client.is_over());
            self.look_after_worker();
        }
    }

    /// Since when the oldest call has no answer.
    fn unanswered(&self) -> Option<Instant> {
        self.clients.iter().filter_map(Client::unanswered).min()
    }

    fn look_after_worker(&mut self) {
        match self.worker.look(self.unanswered(), Instant::now()) {
            life::Next::Wait => {}
            // A worker that is gone is seen by reading.
            life::Next::Ask => drop(channel::send(self.channel.as_fd(), &Message::Ping, None)),
            life::Next::Kill => {
                logging::start(&self.args);
                tracing::error!(after = ?life::STANDS_STILL, "the shim stands still: it is killed");
                self.worker.kill();
            }
        }
    }

    /// Waits for something to do; tells whether the listener and the channel have it.
    fn wait(&self) -> io::Result<(bool, bool)> {
        let mut timeout = self
            .accepts_from
            .map(|from| from.saturating_duration_since(Instant::now()));
        let listens = timeout.is_none_or(|rest| rest.is_zero());
        let look = self.worker.timeout(self.unanswered(), Instant::now());
        timeout = timeout.into_iter().chain(look).min();
        let mut fds = vec![
            PollFd::new(&self.channel, PollFlags::IN),
            // An empty interest still hears of errors, of which a listening socket has none.
            PollFd::new(
                &self.listener,
                match listens {
                    true => PollFlags::IN,
                    false => PollFlags::empty(),
                },
            ),
        ];
        for client in &self.clients {
            client.interests(&mut fds);
            timeout = timeout.into_iter().chain(client.timeout()).min();
        }
        let timeout = timeout.and_then(|t| rustix::event::Timespec::try_from(t).ok());
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let ready = |fd: Option<&PollFd<'_>>| fd.is_some_and(|fd| !fd.revents().is_empty());
        Ok((ready(fds.get(1)), ready(fds.first())))
    }

    fn accept(&mut self) {
        self.accepts_from = None;
        let accepted = self.listener.accept().map(|(stream, _)| stream);
        match accepted.and_then(Client::new) {
            Ok((client, end)) => {
                // Should the worker be dead, its successor gets the client.
                let _ = channel::send(self.channel.as_fd(), &Message::Client, Some(end.as_fd()));
                self.clients.push(client);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => {
                logging::start(&self.args);
                tracing::warn!(%error, "accepting a connection");
                self.accepts_from = Some(Instant::now() + ACCEPT_AGAIN);
            }
        }
    }

    /// Takes the worker's messages; false once it is gone.
    fn hear(&mut self) -> bool {
        loop {
            match channel::receive(self.channel.as_fd(), false) {
                Ok(Some((message, fd))) => self.follow(message, fd),
                Ok(None) => return true,
                Err(_) => return false,
            }
        }
    }

    fn follow(&mut self, message: Message, fd: Option<OwnedFd>) {
        match (message, fd) {
            (Message::Store { process, role }, Some(fd))
                if self.stored.len() < crate::limits::KEEPER_STREAMS =>
            {
                self.stored.insert((process, role), fd);
            }
            (
                Message::Open {
                    process,
                    path,
                    ends,
                },
                Some(answers),
            ) => self.open(&process, &path, &ends, answers.as_fd()),
            (Message::Forget { process, role }, _) => match role {
                Some(role) => drop(self.stored.remove(&(process, role))),
                None => self.stored.retain(|(of, _), _| *of != process),
            },
            (Message::End, _) => self.over = true,
            (Message::Replace, _) => self.wanted = true,
            (Message::Pong, _) => self.worker.gave_sign(),
            _ => {}
        }
    }

    /// Opens a fifo for the worker. The keeper does it since opening wakes the peer: should the worker die before it had the
    /// descriptor kept, the peer would see the end.
    fn open(&mut self, process: &str, path: &Path, ends: &[End], answers: BorrowedFd<'_>) {
        let opened: io::Result<Vec<OwnedFd>> = ends.iter().map(|end| end.open(path)).collect();
        let fds = match opened {
            Ok(fds) => fds,
            Err(error) => {
                let errno = error.raw_os_error().unwrap_or(libc::EIO);
                let _ = channel::send(answers, &Message::Refused { errno }, None);
                return;
            }
        };
        for (end, fd) in ends.iter().zip(fds) {
            let (process, role) = (process.to_owned(), end.role.clone());
            let store = Message::Store { process, role };
            // A worker that is gone needs no answer, and its successor is given what is kept.
            let _ = channel::send(answers, &store, Some(fd.as_fd()));
            self.follow(store, Some(fd));
        }
    }

    /// The worker is gone: the program that is on the disk now takes over. A program that does not start is a death, too: an upgrade may be
    /// under way.
    fn replace(&mut self) -> io::Result<()> {
        // Not before: most keepers never have anything to say, and logging has its price in memory.
        logging::start(&self.args);
        if std::mem::take(&mut self.wanted) {
            if self.hand_over().is_ok() {
                return Ok(());
            }
        } else {
            tracing::error!("the shim died: another takes over");
        }
        loop {
            self.deaths.retain(|at| at.elapsed() < DEATHS_WITHIN);
            self.deaths.push(Instant::now());
            let deaths = self.deaths.len();
            if deaths > DEATHS_MAX {
                return Err(io::Error::other("the shim dies again and again"));
            }
            std::thread::sleep(pause(deaths));
            match self.hand_over() {
                Ok(()) => return Ok(()),
                Err(error) => tracing::error!(%error, "starting another shim"),
            }
        }
    }

    /// Starts a worker and gives it all there is.
    fn hand_over(&mut self) -> io::Result<()> {
        let (channel, theirs) = channel::pair()?;
        // With ignored children a failed start cannot be told from a started one.
        be_keeper(false);
        let started = spawn_with(&self.program, theirs.as_fd(), &self.args, Some(SERVE));
        be_keeper(true);
        // What has ended in between.
        while let Ok(Some(_)) = rustix::process::wait(rustix::process::WaitOptions::NOHANG) {}
        self.worker = Life::of(started?);
        drop(theirs);
        self.channel = channel;
        for ((process, role), fd) in &self.stored {
            let (process, role) = (process.clone(), role.clone());
            let message = Message::Store { process, role };
            channel::send(self.channel.as_fd(), &message, Some(fd.as_fd()))?;
        }
        for client in &mut self.clients {
            let end = client.reconnect()?;
            channel::send(self.channel.as_fd(), &Message::Client, Some(end.as_fd()))?;
        }
        let go = Message::Go { first: false };
        channel::send(self.channel.as_fd(), &go, None)
    }

    /// What the worker answered before its end still goes out.
    fn last_words(&mut self) {
        let end = Instant::now() + LAST_WORDS;
        while self.clients.iter().any(Client::has_words) && Instant::now() < end {
            let _ = self.wait();
            for client in &mut self.clients {
                client.pump();
            }
        }
    }
}

/// Starts `program` detached, with `fd` as its [`INHERITED_FD`] and nothing else; gives its pid. It is not waited for.
pub fn spawn_with(
    program: &Path,
    fd: BorrowedFd<'_>,
    args: &Args,
    action: Option<&str>,
) -> io::Result<Option<Pid>> {
    let fd = fd.as_raw_fd();
    let mut command = Command::new(program);
    command
        .args(["-namespace", &args.namespace, "-id", &args.id])
        .args(["-address", &args.address])
        .args(["-publish-binary", &args.publish_binary])
        .args(args.debug.then_some("-debug"))
        .args(action)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let detach = action.is_none();
    // SAFETY: between fork and exec only system calls are made; `fd` is open until `spawn` returns, and INHERITED_FD is free for
    // us in the child.
    unsafe {
        command.pre_exec(move || {
            if detach {
                rustix::process::setsid()?;
            }
            let done = if fd == INHERITED_FD {
                libc::fcntl(fd, libc::F_SETFD, 0)
            } else {
                libc::dup2(fd, INHERITED_FD)
            };
            if done < 0 {
                return Err(io::Error::last_os_error());
            }
            libc::close_range(4, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC as _);
            Ok(())
        });
    }
    let child = command.spawn()?;
    Ok(i32::try_from(child.id()).ok().and_then(Pid::from_raw))
}

/// The pid that the pod's shim is known by: the keeper's, which stays. Called by a worker.
pub fn pid() -> u32 {
    rustix::process::getppid().map_or(0, |pid| Pid::as_raw_nonzero(pid).get().unsigned_abs())
}

/// Both ends of a connection between keeper and worker, without waiting.
fn stream_pair() -> io::Result<(UnixStream, UnixStream)> {
    let (ours, theirs) = UnixStream::pair()?;
    ours.set_nonblocking(true)?;
    theirs.set_nonblocking(true)?;
    Ok((ours, theirs))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_deaths_are_followed_at_once_and_later_ones_ever_later() {
        assert_eq!(pause(1), Duration::ZERO);
        assert_eq!(pause(3), Duration::ZERO);
        assert_eq!(pause(4), PAUSE);
        assert_eq!(pause(5), PAUSE * 2);
        assert_eq!(pause(DEATHS_MAX), PAUSE_MAX);
        assert_eq!(pause(1000), PAUSE_MAX);
    }
}
