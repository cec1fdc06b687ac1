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
use crate::sandbox::state::write_private;

/// Its name.
const FILE: &str = "network.json";
/// That of the next one, until it is whole.
const NEXT: &str = "network.json.new";
/// Longest file that is read.
const FILE_MAX: u64 = 64 << 10;

/// An interface with a redirect of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Noted {
    /// Its number.
    pub index: u32,
    /// Whether the qdisc is ours, too.
    pub qdisc: bool,
}

/// The file.
#[derive(Debug, Serialize, Deserialize)]
struct Note {
    namespace: PathBuf,
    identity: Identity,
    links: Vec<Noted>,
}

/// Writes what is on the interfaces of `namespace`. A namespace without a path goes with the pod: then there is nothing to write.
pub fn write(dir: &Path, namespace: &Namespace, links: Vec<Noted>) -> io::Result<()> {
    let Some(path) = namespace.path() else {
        return Ok(());
    };
    let note = Note {
        namespace: path.to_owned(),
        identity: namespace.identity(),
        links,
    };
    let text = serde_json::to_string(&note).map_err(io::Error::other)?;
    let next = dir.join(NEXT);
    write_private(&next, &text)?;
    fs::rename(next, dir.join(FILE))
}

/// Takes off what a dead shim's note tells.
pub fn clean(dir: &Path) {
    let file = dir.join(FILE);
    let Ok(text) = fs::metadata(&file)
        .map(|m| m.len() <= FILE_MAX)
        .and_then(|small| {
            if small {
                fs::read(&file)
            } else {
                Ok(Vec::new())
            }
        })
    else {
        return;
    };
    let Ok(note) = serde_json::from_slice::<Note>(&text) else {
        return;
    };
    // Gone, or another of the same name: then so are our traces.
    let Ok(namespace) = Namespace::open(&note.namespace) else {
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
            tracing::warn!(%error, namespace = %note.namespace.display(), "a redirect stays");
        }
    }
}
