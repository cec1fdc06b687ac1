//! What was placed: written before anything is done, so that a broken installation can be taken back as well.

use std::{
    fs, io,
    path::{Component, PathBuf},
};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{Error, Target, io_error};
use crate::sandbox::state::hex;

/// The manifest.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Version of what was placed.
    pub version: String,
    /// In the order in which they were placed.
    pub entries: Vec<Entry>,
}

/// One path.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// As seen from the root.
    pub path: PathBuf,
    /// What was placed there.
    #[serde(flatten)]
    pub kind: Kind,
}

/// What was placed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Kind {
    /// A folder that was not there.
    Folder,
    /// A symbolic link.
    Link {
        /// Where it leads.
        to: PathBuf,
    },
    /// A file.
    File {
        /// Of its content.
        sha256: String,
        /// What was there before, if it was edited.
        #[serde(skip_serializing_if = "Option::is_none")]
        before: Option<Before>,
    },
}

/// A file as it was.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Before {
    /// Its content.
    pub text: String,
    /// Its permissions.
    pub mode: u32,
}

impl Manifest {
    /// The manifest of an installation, if there is one.
    pub fn load(target: &Target) -> Result<Option<Self>, Error> {
        let path = target.on_host(&target.manifest());
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(io_error("reading", &path)(source)),
        };
        let unreadable = |why: String| Error::Unreadable {
            path: path.clone(),
            why,
        };
        let mut manifest: Self =
            serde_json::from_slice(&text).map_err(|error| unreadable(error.to_string()))?;
        for entry in &mut manifest.entries {
            let mut parts = entry.path.components();
            let absolute = parts.next() == Some(Component::RootDir);
            if !absolute || !parts.all(|part| matches!(part, Component::Normal(_))) {
                let shown = entry.path.display();
                return Err(unreadable(format!("{shown} is no path of an installation")));
            }
            if let Kind::File {
                before: Some(before),
                ..
            } = &mut entry.kind
            {
                before.mode &= 0o777;
            }
        }
        Ok(Some(manifest))
    }

    /// The entry of a path.
    pub fn entry(&self, path: &std::path::Path) -> Option<&Kind> {
        let found = self.entries.iter().find(|entry| entry.path == path);
        found.map(|entry| &entry.kind)
    }
}

/// Hash of a file's content.
pub fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes), 64)
}
