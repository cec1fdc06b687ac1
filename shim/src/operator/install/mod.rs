//! `bulkhead install` and `uninstall`.
//!
//! ```text
//!  what is wanted (wanted.rs, containerd.rs, docker.rs) -- compared with what is there --> actions (plan.rs) --> done, or shown
//!                                                                                           |
//!                                                                            manifest (manifest.rs) --> undo (undo.rs)
//! ```
//!
//! The manifest says what was placed, with hashes, and what an edited file was before. So undo gives the host back byte for byte, and
//! leaves alone what somebody has changed since. Nothing is restarted.

pub mod containerd;
pub mod diff;
pub mod docker;
pub mod manifest;
pub mod plan;
pub mod undo;
pub mod wanted;

use std::{
    io,
    path::{Path, PathBuf},
};

/// Why something was not installed or taken back.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file or folder.
    #[error("{what} {path}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// Which one.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Something else has the place.
    #[error("{path} is there and was not placed by an installation: move it away first")]
    Foreign {
        /// Which one.
        path: PathBuf,
    },
    /// A file that we would change cannot be read as what it should be.
    #[error("{path}: {why}")]
    Unreadable {
        /// Which one.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// An option.
    #[error("{option} {path}: must be an absolute path")]
    Relative {
        /// Its name.
        option: &'static str,
        /// Its value.
        path: PathBuf,
    },
    /// There is nothing to take back.
    #[error("there is no installation under {prefix}: {manifest} does not exist")]
    NotInstalled {
        /// The prefix.
        prefix: PathBuf,
        /// Its manifest.
        manifest: PathBuf,
    },
}

/// Where an installation goes.
#[derive(Clone, Debug)]
pub struct Target {
    /// What stands for `/`.
    pub root: PathBuf,
    /// Folder of `bin` and `lib`, as seen from the root.
    pub prefix: PathBuf,
}

impl Target {
    /// Checks the options.
    pub fn new(root: PathBuf, prefix: PathBuf) -> Result<Self, Error> {
        for (option, path) in [("--root", &root), ("--prefix", &prefix)] {
            if !path.is_absolute() {
                let path = path.clone();
                return Err(Error::Relative { option, path });
            }
        }
        Ok(Self { root, prefix })
    }

    /// Where a path of the target is on this host.
    pub fn on_host(&self, path: &Path) -> PathBuf {
        self.root.join(path.strip_prefix("/").unwrap_or(path))
    }

    /// The folder of the programs, the kernel and the initramfs.
    pub fn lib(&self) -> PathBuf {
        self.prefix.join("lib/bulkhead")
    }

    /// The manifest.
    pub fn manifest(&self) -> PathBuf {
        self.lib().join("install.json")
    }
}

fn io_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Io { what, path, source }
}

#[cfg(test)]
mod tests;
