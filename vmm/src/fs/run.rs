//! Start and end of the file server.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;

use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::inodes::Limits;
use super::namespace::{self, Namespace};
use super::server::{Budget, Server};
use super::trees::Trees;
use super::{control, creds, worker};
use crate::limits;

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

/// Serves until every worker's socket has come to its end. Takes the calling thread into a namespace of its own,
/// for good.
pub fn run(config: Config) -> Result<(), Error> {
    let budget = budget().map_err(system("raising the limit of open files"))?;
    run_within(config, budget)
}

/// [`run`] with a budget given.
pub(super) fn run_within(config: Config, budget: Budget) -> Result<(), Error> {
    let listener = listen(&config)?;
    // Needs CAP_NET_ADMIN, which goes below.
    for socket in &config.workers {
        worker::prepare(socket).map_err(system("setting a worker's send buffer"))?;
    }
    let namespace = Namespace::enter(&config.state_dir)?;
    creds::drop_unneeded().map_err(system("dropping capabilities"))?;
    let root = namespace
        .root
        .try_clone()
        .map_err(system("copying the root's descriptor"))?;
    let server = Server::new(root, Trees::new(namespace), budget)
        .map_err(system("looking at the guest's root"))?;
    let server = Arc::new(server);
    // Every worker holds the end to write to; that it has none left tells that they are gone.
    let (finished, alive) = pipe_with(PipeFlags::CLOEXEC).map_err(system("making a pipe"))?;
    let alive = Arc::new(alive);
    let count = config.workers.len();
    for (number, socket) in config.workers.into_iter().enumerate() {
        let (server, alive) = (Arc::clone(&server), Arc::clone(&alive));
        std::thread::Builder::new()
            .name(format!("fuse-{number}"))
            .spawn(move || {
                if let Err(errno) = worker::serve(&server, &socket) {
                    tracing::error!(worker = number, %errno, "worker ends");
                }
                drop(alive);
            })
            .map_err(system("starting a worker"))?;
    }
    drop(alive);
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
fn budget() -> Result<Budget, Errno> {
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
        )?;
    }
    let have = getrlimit(Resource::Nofile)
        .current
        .unwrap_or(wanted)
        .min(wanted);
    let kept = (limits::FS_DESCRIPTORS_KEPT + limits::FS_TREES) as u64;
    let free = usize::try_from(have.saturating_sub(kept)).unwrap_or(0);
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
