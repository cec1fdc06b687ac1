//! How errors of the steps reach the shim: a status code and one line of text.

use std::{error::Error as StdError, fmt::Write as _, io};

use serde::{Deserialize, Serialize};

/// Longest error text sent, in bytes.
const TEXT_MAX: usize = 4096;

/// Class of a failure; becomes the ttrpc status code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Class {
    /// A field of the spec or request is wrong.
    InvalidArgument,
    /// A field of the spec is refused.
    Unimplemented,
    /// No such container, exec or process.
    NotFound,
    /// The id is taken.
    AlreadyExists,
    /// The state does not allow it.
    FailedPrecondition,
    /// A limit is reached.
    ResourceExhausted,
    /// The guest failed.
    Internal,
}

/// Error of the agent.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A field of the spec has a value that cannot be used.
    #[error("{field}: {reason}")]
    Field {
        /// Path of the field, such as `process.cwd`.
        field: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A field of the spec that is not enforced, and therefore refused.
    #[error("{field} is not supported")]
    Refused {
        /// Path of the field.
        field: String,
    },
    /// The executable cannot be run; the text is the one of runc.
    #[error("unable to start container process: {0}")]
    Executable(String),
    /// No such object.
    #[error("{0} does not exist")]
    NotFound(String),
    /// The id is in use.
    #[error("{0} exists already")]
    AlreadyExists(String),
    /// Not possible in this state.
    #[error("{0}")]
    State(String),
    /// A limit is reached.
    #[error("{0}")]
    Limit(String),
    /// A system call of a step failed.
    #[error("{what}")]
    Step {
        /// What was tried, on what.
        what: String,
        /// The system's answer.
        source: io::Error,
    },
    /// An error that another process of the agent reported.
    #[error("{text}")]
    Reported {
        /// Its class.
        class: Class,
        /// Its text.
        text: String,
    },
}

/// Result of the agent.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// A field with a wrong value.
    pub fn field(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Field {
            field: field.into(),
            reason: reason.into(),
        }
    }

    /// A refused field.
    pub fn refused(field: impl Into<String>) -> Self {
        Self::Refused {
            field: field.into(),
        }
    }

    /// A failed step.
    pub fn step(what: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self::Step {
            what: what.into(),
            source: source.into(),
        }
    }

    /// The class that decides the status code.
    pub fn class(&self) -> Class {
        match self {
            Self::Field { .. } | Self::Executable(_) => Class::InvalidArgument,
            Self::Refused { .. } => Class::Unimplemented,
            Self::NotFound(_) => Class::NotFound,
            Self::AlreadyExists(_) => Class::AlreadyExists,
            Self::State(_) => Class::FailedPrecondition,
            Self::Limit(_) => Class::ResourceExhausted,
            Self::Step { .. } => Class::Internal,
            Self::Reported { class, .. } => *class,
        }
    }

    /// The whole chain of causes as one line, capped.
    pub fn text(&self) -> String {
        let mut text = self.to_string();
        let mut source = self.source();
        while let Some(cause) = source {
            let _ = write!(text, ": {}", describe(cause));
            source = cause.source();
        }
        let mut end = text.len().min(TEXT_MAX);
        while !text.is_char_boundary(end) {
            end = end.saturating_sub(1);
        }
        text.truncate(end);
        text.replace('\n', " ")
    }
}

/// System errors as people know them: `no such file or directory`, without Rust's `(os error 2)`.
fn describe(cause: &(dyn StdError + 'static)) -> String {
    match cause
        .downcast_ref::<io::Error>()
        .and_then(io::Error::raw_os_error)
    {
        Some(number) => errno_text(number),
        None => cause.to_string(),
    }
}

/// Text of an errno, in lower case like runc's.
pub fn errno_text(number: i32) -> String {
    let mut text = nix::errno::Errno::from_raw(number).desc().to_string();
    if let Some(first) = text.get_mut(..1) {
        first.make_ascii_lowercase();
    }
    text
}

/// Adds what was tried to a system's error.
pub trait Context<T> {
    /// Names the step that failed.
    fn step(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: Into<io::Error>> Context<T> for std::result::Result<T, E> {
    fn step(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|error| Error::step(what(), error))
    }
}

impl From<&Error> for ttrpc::Error {
    fn from(error: &Error) -> Self {
        use ttrpc::Code;
        let code = match error.class() {
            Class::InvalidArgument => Code::INVALID_ARGUMENT,
            Class::Unimplemented => Code::UNIMPLEMENTED,
            Class::NotFound => Code::NOT_FOUND,
            Class::AlreadyExists => Code::ALREADY_EXISTS,
            Class::FailedPrecondition => Code::FAILED_PRECONDITION,
            Class::ResourceExhausted => Code::RESOURCE_EXHAUSTED,
            Class::Internal => Code::INTERNAL,
        };
        ttrpc::Error::RpcStatus(ttrpc::get_status(code, error.text()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_step_tells_what_was_tried_and_the_cause_once() {
        let error = Error::step("mount /x", io::Error::from_raw_os_error(libc::ENOENT));
        assert_eq!(error.text(), "mount /x: no such file or directory");
        assert_eq!(error.class(), Class::Internal);
    }

    #[test]
    fn a_refused_field_is_named() {
        let error = Error::refused("linux.intelRdt");
        assert_eq!(error.text(), "linux.intelRdt is not supported");
        assert_eq!(error.class(), Class::Unimplemented);
    }

    #[test]
    fn long_texts_are_cut_at_a_character() {
        let error = Error::field("f", "é".repeat(TEXT_MAX));
        assert!(error.text().len() <= TEXT_MAX);
    }
}
