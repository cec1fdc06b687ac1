//! What goes wrong with a pod.

use std::{io, path::PathBuf, sync::Arc};

use super::{control, machine::End, postmortem::PostMortem, state, user};

/// Why a pod does not run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An id that cannot be part of a path.
    #[error(transparent)]
    Id(#[from] state::IdError),
    /// There is one already.
    #[error("pod {0} exists already")]
    Exists(String),
    /// The state folder.
    #[error("state folder {path}: {source}")]
    State {
        /// Which file or folder.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// No user for it.
    #[error("a user for the pod: {0}")]
    User(#[from] user::Error),
    /// What the machine is made of.
    #[error("{what} {path}: {why}")]
    File {
        /// The configuration's key.
        what: &'static str,
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// A helper does not start.
    #[error("starting {program}: {source}")]
    Spawn {
        /// Which one.
        program: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The machine ended.
    #[error("{}", PostMortem::of(.0))]
    Ended(Arc<End>),
    /// The agent did not call, or never will.
    #[error("{0}")]
    NotReady(Box<PostMortem>),
    /// Asked for too early.
    #[error("the pod's agent is not ready yet")]
    NoAgent,
    /// The agent cannot be reached.
    #[error("connecting to the agent: {0}")]
    Agent(#[source] io::Error),
    /// Shim and agent are of different builds.
    #[error(
        "the agent in the initramfs has version {0:?}, the shim {ours}: install one build of both",
        ours = bulkhead_protocol::VERSION
    )]
    Version(String),
    /// A process of a pod that was to be taken over.
    #[error("the pod cannot be taken over: the process of {0} is gone")]
    Lost(String),
    /// VMM or file server.
    #[error(transparent)]
    Control(#[from] control::Error),
    /// Its cgroup.
    #[error(transparent)]
    Cgroup(#[from] super::cgroup::Error),
    /// The network.
    #[error(transparent)]
    Network(#[from] super::network::Error),
    /// A tree.
    #[error(transparent)]
    Mount(#[from] crate::mounts::Error),
}
