//! `network.json` in the state folder: what we put on interfaces of a namespace that outlives the pod, so that `delete` takes it off
//! if the shim dies. Written before anything is done, and read again only by a process of ours.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use super::{
    namespace::{Identity, Namespace},
    netlink::Netlink,
    redirect,
};
use crate::sandbox::state::replace_private;

/// Its name.
const FILE: &str = "network.json";
/// Longest file that is read.
const FILE_MAX: u64 = 64 << 10;

/// An interface with a redirect of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Noted {
    /// Its number.
    pub index: u32,
    /// The slot that it is in.
    pub slot: usize,
    /// Whether the qdisc is ours, too.
    pub qdisc: bool,
    /// Whether everything is done to it.
    pub whole: bool,
}

/// The file.
#[derive(Debug, Serialize, Deserialize)]
struct Note {
    /// None: it goes with the pod.
    namespace: Option<PathBuf>,
    identity: Identity,
    links: Vec<Noted>,
}

/// Writes what is on the interfaces of `namespace`.
pub fn write(dir: &Path, namespace: &Namespace, links: Vec<Noted>) -> io::Result<()> {
    let note = Note {
        namespace: namespace.path().map(Path::to_owned),
        identity: namespace.identity(),
        links,
    };
    let text = serde_json::to_string(&note).map_err(io::Error::other)?;
    replace_private(&dir.join(FILE), &text)
}

fn read(dir: &Path) -> Option<Note> {
    let file = dir.join(FILE);
    if fs::metadata(&file).ok()?.len() > FILE_MAX {
        return None;
    }
    serde_json::from_slice(&fs::read(&file).ok()?).ok()
}

/// What a shim before has noted of `namespace`.
pub fn load(dir: &Path, namespace: &Namespace) -> Vec<Noted> {
    let note = read(dir).filter(|note| note.identity == namespace.identity());
    note.map_or_else(Vec::new, |note| note.links)
}

/// Takes off what a dead shim's note tells.
pub fn clean(dir: &Path) {
    let Some(note) = read(dir) else { return };
    let Some(path) = note.namespace else { return };
    // Gone, or another of the same name: then so are our traces.
    let Ok(namespace) = Namespace::open(&path) else {
        return;
    };
    if namespace.identity() != note.identity {
        return;
    }
    let Ok(mut netlink) = namespace.run(Netlink::open) else {
        return;
    };
    for link in note.links {
        if let Err(error) = redirect::disconnect(&mut netlink, link.index, link.qdisc) {
            tracing::warn!(%error, namespace = %path.display(), "a redirect stays");
        }
    }
}
