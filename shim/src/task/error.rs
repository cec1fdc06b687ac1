//! What goes wrong in a Task call, and the status code that containerd gets for it.

use ttrpc::Code;

use crate::{
    config, hooks,
    limits::AGENT_TEXT,
    mounts,
    refusal::Refusal,
    sandbox::{self, machine::printable},
    spec, stdio,
};

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configuration.
    #[error(transparent)]
    Config(#[from] config::Error),
    /// The bundle's spec.
    #[error(transparent)]
    Spec(#[from] spec::Error),
    /// A part of a process or of resources.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// A hook on the host.
    #[error(transparent)]
    Hook(#[from] hooks::Error),
    /// The rootfs or a mount.
    #[error(transparent)]
    Mount(#[from] mounts::Error),
    /// A standard stream on the host.
    #[error(transparent)]
    Stdio(#[from] stdio::Error),
    /// The pod.
    #[error(transparent)]
    Pod(#[from] sandbox::Error),
    /// An id that cannot be one.
    #[error(transparent)]
    Id(#[from] sandbox::state::IdError),
    /// There is no such thing.
    #[error("{0}: not found")]
    NotFound(String),
    /// There is such a thing already.
    #[error("{0}: already exists")]
    Exists(String),
    /// The process has ended, so it takes no signal.
    #[error("{0}: process already finished")]
    Finished(String),
    /// Not in this state.
    #[error("{id}: cannot {what} a process that is {phase}")]
    State {
        /// Which process.
        id: String,
        /// What was asked for.
        what: &'static str,
        /// Its phase.
        phase: &'static str,
    },
    /// Too many of them.
    #[error("{0}")]
    Limit(&'static str),
    /// Not there.
    #[error("{0} is not supported")]
    Unimplemented(&'static str),
    /// The agent says no.
    #[error("the agent: {0}")]
    Agent(ttrpc::Error),
    /// A stream into the guest.
    #[error("connecting the standard streams: {0}")]
    Stream(#[source] std::io::Error),
    /// An answer that cannot be encoded.
    #[error("encoding the answer: {0}")]
    Encode(#[from] protobuf::Error),
}

impl Error {
    fn code(&self) -> Code {
        match self {
            Self::Refused(refusal)
            | Self::Spec(spec::Error::Refused(refusal))
            | Self::Mount(mounts::Error::Refused(refusal))
            | Self::Pod(sandbox::Error::Mount(mounts::Error::Refused(refusal)))
                if refusal.unsupported =>
            {
                Code::UNIMPLEMENTED
            }
            Self::Unimplemented(_) => Code::UNIMPLEMENTED,
            Self::Refused(_) | Self::Spec(_) | Self::Mount(_) | Self::Stdio(_) | Self::Id(_) => {
                Code::INVALID_ARGUMENT
            }
            Self::Pod(sandbox::Error::Id(_) | sandbox::Error::Mount(_)) => Code::INVALID_ARGUMENT,
            Self::Pod(sandbox::Error::Exists(_)) | Self::Exists(_) => Code::ALREADY_EXISTS,
            Self::Pod(sandbox::Error::Ended(_)) => Code::UNAVAILABLE,
            // What the host cannot do is no matter of time.
            Self::Pod(sandbox::Error::NotReady(why)) if !why.advice.is_empty() => {
                Code::FAILED_PRECONDITION
            }
            Self::Pod(sandbox::Error::NotReady(_)) => Code::DEADLINE_EXCEEDED,
            Self::Config(_) | Self::Pod(sandbox::Error::NoAgent) => Code::FAILED_PRECONDITION,
            Self::Pod(sandbox::Error::File { .. }) => Code::FAILED_PRECONDITION,
            Self::Pod(_) | Self::Hook(_) | Self::Encode(_) => Code::INTERNAL,
            Self::NotFound(_) | Self::Finished(_) => Code::NOT_FOUND,
            Self::State { .. } => Code::FAILED_PRECONDITION,
            Self::Limit(_) => Code::RESOURCE_EXHAUSTED,
            Self::Agent(_) | Self::Stream(_) => Code::UNAVAILABLE,
        }
    }
}

impl From<Error> for ttrpc::Error {
    fn from(error: Error) -> Self {
        match error {
            // The agent's own statuses are typed and name the field: they pass, but as what a guest says.
            Error::Agent(Self::RpcStatus(status)) => {
                ttrpc::error::get_rpc_status(status.code(), printable(&status.message, AGENT_TEXT))
            }
            error => ttrpc::error::get_rpc_status(error.code(), error),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{refusal, sandbox::machine::End};

    fn status(error: Error) -> (Code, String) {
        match error.into() {
            ttrpc::Error::RpcStatus(status) => (status.code(), status.message),
            other => panic!("{other}"),
        }
    }

    #[test]
    fn errors_have_the_code_containerd_knows_and_name_what_is_wrong() {
        let refusal = refusal::wrong("process.args", "is empty");
        let (code, text) = status(spec::Error::from(refusal).into());
        assert_eq!(code, Code::INVALID_ARGUMENT);
        assert_eq!(text, "process.args: is empty");
        let refusal = refusal::unsupported("linux.intelRdt", "is not there");
        assert_eq!(status(refusal.into()).0, Code::UNIMPLEMENTED);
        let (code, _) = status(Error::NotFound("container a".into()));
        assert_eq!(code, Code::NOT_FOUND);
    }

    #[test]
    fn what_the_agent_says_is_cut_and_has_no_control_characters() {
        let text = format!("{}\u{1b}[2Jprocess.args: is empty", "x".repeat(1 << 20));
        let said = ttrpc::error::get_rpc_status(Code::INVALID_ARGUMENT, text);
        let (code, text) = status(Error::Agent(said));
        assert_eq!(code, Code::INVALID_ARGUMENT);
        assert!(text.len() <= AGENT_TEXT && text.ends_with("?[2Jprocess.args: is empty"));
    }

    #[test]
    fn a_dead_machines_reason_is_in_the_error() {
        let end = End {
            reason: "guest-panic".into(),
            detail: "Kernel panic - not syncing: x".into(),
            ..End::default()
        };
        let (code, text) = status(sandbox::Error::Ended(Arc::new(end)).into());
        assert_eq!(code, Code::UNAVAILABLE);
        assert!(
            text.contains("guest-panic\n  Kernel panic - not syncing: x\n"),
            "{text}"
        );
    }

    #[test]
    fn the_agents_status_passes_unchanged() {
        let agent = ttrpc::error::get_rpc_status(Code::NOT_FOUND, "exec: \"nope\": not found");
        let (code, text) = status(Error::Agent(agent));
        assert_eq!(code, Code::NOT_FOUND);
        assert_eq!(text, "exec: \"nope\": not found");
    }
}
