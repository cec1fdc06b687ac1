//! How a test case ends when it does not pass.

use std::{fmt::Display, io};

/// Why a case did not pass.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Failure {
    /// The case does not apply here; the text says what is lacking.
    #[error("{0}")]
    Skipped(String),
    /// A claim did not hold, or the means to check it failed.
    #[error("{0}")]
    Failed(String),
}

/// What a case and the harness's functions return.
pub type Outcome<T = ()> = Result<T, Failure>;

impl From<String> for Failure {
    fn from(text: String) -> Self {
        Self::Failed(text)
    }
}

impl From<&str> for Failure {
    fn from(text: &str) -> Self {
        Self::Failed(text.to_owned())
    }
}

/// Ends a case as skipped; `lacks` says what is not there.
pub fn skip<T>(lacks: impl Into<String>) -> Outcome<T> {
    Err(Failure::Skipped(lacks.into()))
}

/// Says what was tried when something outside the harness fails.
pub trait Context<T> {
    /// `what` was tried, on what.
    fn context(self, what: impl Display) -> Outcome<T>;
}

impl<T, E: Display> Context<T> for Result<T, E> {
    fn context(self, what: impl Display) -> Outcome<T> {
        self.map_err(|source| Failure::Failed(format!("{what}: {source}")))
    }
}

impl<T> Context<T> for Option<T> {
    fn context(self, what: impl Display) -> Outcome<T> {
        self.ok_or_else(|| Failure::Failed(what.to_string()))
    }
}

/// Reads a whole text file.
pub fn read(path: impl AsRef<std::path::Path>) -> Outcome<String> {
    let path = path.as_ref();
    std::fs::read(path)
        .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
        .context(format_args!("read {}", path.display()))
}

/// Writes a whole file.
pub fn write(path: impl AsRef<std::path::Path>, bytes: impl AsRef<[u8]>) -> Outcome {
    let path = path.as_ref();
    std::fs::write(path, bytes).context(format_args!("write {}", path.display()))
}

/// Makes a folder with its parents.
pub fn make_folder(path: impl AsRef<std::path::Path>) -> Outcome {
    let path = path.as_ref();
    std::fs::create_dir_all(path).context(format_args!("make folder {}", path.display()))
}

/// `Ok` unless the file cannot be removed for another reason than its absence.
pub fn absent_is_fine(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Fails the case with a message unless the condition holds.
#[macro_export]
macro_rules! ensure {
    ($condition:expr, $($message:tt)+) => {
        if !$condition {
            return Err($crate::Failure::Failed(format!($($message)+)));
        }
    };
}

/// Fails the case unless both values are equal; the first argument says what is compared.
#[macro_export]
macro_rules! ensure_eq {
    ($what:expr, $got:expr, $expected:expr) => {{
        let (got, expected) = (&$got, &$expected);
        if got != expected {
            return Err($crate::Failure::Failed(format!(
                "{}: got {got:?}, expected {expected:?}",
                $what
            )));
        }
    }};
}
