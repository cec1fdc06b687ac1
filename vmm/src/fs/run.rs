//! Start and end of the file server.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;

use bulkhead_failpoint::reach;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

#[cfg(any(test, fuzzing))]
use super::creds;
use super::filter::Thread;
use super::inodes::Limits;
use super::jail::{self, Role};
use super::namespace::{self, Namespace};
use super::server::{Budget, Server};
use super::steward::{self, Steward};
use super::{control, worker};
use crate::limits;

/// What it keeps for itself.
const KEPT: u64 = (limits::FS_DESCRIPTORS_KEPT + limits::FS_TREES) as u64;
/// That, and a little for the guest, which could open nothing without it.
const LEAST: u64 = KEPT + 256;

/// What the file server is started with.
pub struct Config {
    /// The pod's state folder, for `fs.sock`.
    pub state_dir: PathBuf,
    /// SEQPACKET sockets to the VMM, one a worker.
    pub workers: Vec<OwnedFd>,
}

/// The file server could not start or go on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The control socket could not be made.
    #[error("listening on {}", path.display())]
    Listen {
        /// Its path.
        path: PathBuf,
        /// What went wrong.
        source: std::io::Error,
    },
    /// The namespace could not be made.
    #[error("making the file server's namespace")]
    Namespace(#[from] namespace::Error),
    /// The process could not be confined.
    #[error("confining the file server")]
    Jail(#[from] jail::Error),
    /// The host allows too few descriptors.
    #[error(
        "the limit of open files is {have}, and the file server needs {LEAST}: raise the hard limit that containerd runs with (LimitNOFILE)"
    )]
    Descriptors {
        /// The limit.
        have: u64,
    },
    /// A system call failed.
    #[error("{what}")]
    System {
        /// What was tried.
        what: &'static str,
        /// What went wrong.
        source: std::io::Error,
    },
}

fn system<E: Into<std::io::Error>>(what: &'static str) -> impl FnOnce(E) -> Error {
    move |source| Error::System {
        what,
        source: source.into(),
    }
}

/// Serves until every worker's socket has come to its end. Parts the calling process, which must have one thread, in two: this one
/// stays as the steward (`steward`), its child is the server.
pub fn run(config: Config) -> Result<(), Error> {
    let budget = budget()?;
    let parts = Parts::new(&config)?;
    reach("fs.start").map_err(system("starting"))?;
    match jail::split()? {
        Role::Server(way) => {
            drop(parts.steward);
            let namespace = Namespace::enter(&config.state_dir)?;
            way.enter()?;
            reach("fs.server").map_err(system("serving"))?;
            serve(
                config.workers,
                parts.listener,
                namespace,
                parts.server,
                budget,
            )
        }
        Role::Steward(child) => {
            drop((parts.server, parts.listener, config.workers));
            let child = child.map_ids()?;
            // For `ps`: the program's name is the server's.
            let _ = rustix::thread::set_name(c"fs-steward");
            drop(Namespace::enter(&config.state_dir)?);
            jail::confine_steward()?;
            reach("fs.steward").map_err(system("serving"))?;
            steward::serve(parts.steward).map_err(system("waiting for the server"))?;
            Ok(child.end()?)
        }
    }
}

/// What is made before the process is parted, with all of root's rights.
struct Parts {
    listener: UnixListener,
    server: Vec<OwnedFd>,
    steward: Vec<OwnedFd>,
}

impl Parts {
    fn new(config: &Config) -> Result<Self, Error> {
        let listener = listen(config)?;
        for socket in &config.workers {
            // Needs CAP_NET_ADMIN.
            worker::prepare(socket).map_err(system("setting a worker's send buffer"))?;
        }
        // One for each worker and one for the control socket.
        let count = config.workers.len().saturating_add(1);
        let (server, steward) =
            steward::channels(count).map_err(system("making the steward's sockets"))?;
        Ok(Self {
            listener,
            server,
            steward,
        })
    }
}

/// [`run`] in threads, as a fuzzer needs it.
#[cfg(fuzzing)]
pub fn run_in_threads(config: Config) -> Result<(), Error> {
    let budget = budget()?;
    run_within(config, budget)
}

/// [`run`] in threads, in the caller's user namespace.
#[cfg(any(test, fuzzing))]
pub(super) fn run_within(config: Config, budget: Budget) -> Result<(), Error> {
    let parts = Parts::new(&config)?;
    let (channels, scratch) = (parts.steward, config.state_dir.clone());
    std::thread::spawn(move || {
        let _namespace = Namespace::enter(&scratch).unwrap();
        jail::confine_steward_thread().unwrap();
        steward::serve(channels).unwrap();
    });
    let namespace = Namespace::enter(&config.state_dir)?;
    creds::drop_all_but(creds::SERVER).map_err(system("dropping capabilities"))?;
    serve(
        config.workers,
        parts.listener,
        namespace,
        parts.server,
        budget,
    )
}

fn serve(
    workers: Vec<OwnedFd>,
    listener: UnixListener,
    namespace: Namespace,
    steward: Vec<OwnedFd>,
    budget: Budget,
) -> Result<(), Error> {
    let server = Server::new(namespace, Steward::new(steward), budget)
        .map_err(system("looking at the guest's root"))?;
    let server = Arc::new(server);
    // Every worker holds the end to write to; that it has none left tells that they are gone.
    let (finished, alive) = pipe_with(PipeFlags::CLOEXEC).map_err(system("making a pipe"))?;
    let alive = Arc::new(alive);
    let count = workers.len();
    for (number, socket) in workers.into_iter().enumerate() {
        let (server, alive) = (Arc::clone(&server), Arc::clone(&alive));
        std::thread::Builder::new()
            .name(format!("fuse-{number}"))
            .spawn(move || {
                if let Err(error) = worker::serve(&server, &socket) {
                    tracing::error!(worker = number, %error, "worker ends");
                }
                drop(alive);
            })
            .map_err(system("starting a worker"))?;
    }
    drop(alive);
    Thread::Control
        .confine()
        .map_err(system("filtering system calls"))?;
    reach("fs.serve").map_err(system("serving"))?;
    tracing::info!(
        workers = count,
        descriptors = budget.inodes.descriptors,
        handles = budget.handles,
        "serving"
    );
    control::serve(&server, &listener, &finished).map_err(system("waiting for requests"))?;
    tracing::info!("all workers ended");
    Ok(())
}

fn listen(config: &Config) -> Result<UnixListener, Error> {
    let path = config.state_dir.join("fs.sock");
    let listener = match std::fs::remove_file(&path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        _ => UnixListener::bind(&path),
    };
    // A client that has gone between poll and accept must not stop the others.
    let listener = listener.and_then(|listener| listener.set_nonblocking(true).map(|()| listener));
    listener.map_err(|source| Error::Listen { path, source })
}

/// Raises the limit of open files as far as it goes and divides it.
fn budget() -> Result<Budget, Error> {
    let wanted =
        limits::FS_INODES + limits::FS_HANDLES + limits::FS_DESCRIPTORS_KEPT + limits::FS_TREES;
    let wanted = wanted as u64;
    let now = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: Some(wanted),
        maximum: Some(now.maximum.unwrap_or(wanted).max(wanted)),
    };
    // Past the hard limit only with CAP_SYS_RESOURCE.
    if setrlimit(Resource::Nofile, raised).is_err() {
        setrlimit(
            Resource::Nofile,
            Rlimit {
                current: now.maximum,
                maximum: now.maximum,
            },
        )
        .map_err(system("raising the limit of open files"))?;
    }
    let have = getrlimit(Resource::Nofile)
        .current
        .unwrap_or(wanted)
        .min(wanted);
    if have < LEAST {
        return Err(Error::Descriptors { have });
    }
    let free = usize::try_from(have.saturating_sub(KEPT)).unwrap_or(0);
    let handles = (free / 4).min(limits::FS_HANDLES);
    let descriptors = free.saturating_sub(handles).min(limits::FS_INODES);
    Ok(Budget {
        inodes: Limits {
            inodes: limits::FS_INODES,
            descriptors,
        },
        handles,
    })
}
