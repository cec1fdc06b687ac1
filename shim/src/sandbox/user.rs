//! A user on the host for each pod alone: VMM and emulator run as it, so that pods cannot reach each other's processes even if their walls
//! are broken. Its number is in the pod's state folder, so it is free again when the folder is gone.

use std::{
    fs, io,
    os::fd::AsFd,
    path::{Path, PathBuf},
};

use rustix::fs::{FlockOperation, flock};

use super::state::write_private;
use crate::config::Jail;

/// The file in a pod's state folder.
const FILE: &str = "uid";

/// Why a pod has no user.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The range.
    #[error("[jail] uids in the configuration: all {0} users have a pod: make the range larger")]
    Used(u32),
    /// A folder or file.
    #[error("{path}: {source}")]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Gives the pod of `dir`, a folder of `state`, the lowest number of the range that no other has.
pub fn claim(state: &Path, dir: &Path, jail: &Jail) -> Result<u32, Error> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| Error::Io { path, source }
    };
    let folder = fs::File::open(state).map_err(failed(state))?;
    // Let go of with the descriptor.
    flock(folder.as_fd(), FlockOperation::LockExclusive)
        .map_err(|error| failed(state)(error.into()))?;
    let mut used = Vec::new();
    for entry in fs::read_dir(state).map_err(failed(state))?.flatten() {
        if let Ok(text) = fs::read_to_string(entry.path().join(FILE)) {
            used.extend(text.trim().parse::<u32>());
        }
    }
    used.sort_unstable();
    let mut range = (0..jail.uids).map(|index| jail.first_uid.saturating_add(index));
    let free = range.find(|uid| used.binary_search(uid).is_err());
    let uid = free.ok_or(Error::Used(jail.uids))?;
    let file = dir.join(FILE);
    write_private(&file, &uid.to_string())
        .and_then(|()| bulkhead_failpoint::reach("create.user"))
        .map_err(failed(&file))?;
    Ok(uid)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_pod_has_a_user_of_its_own_and_the_range_has_an_end() {
        let state = tempfile::tempdir().unwrap();
        let jail = Jail {
            first_uid: 1000,
            uids: 2,
            require: Vec::new(),
        };
        let claim = |name: &str| {
            let dir = state.path().join(name);
            fs::create_dir(&dir).unwrap();
            claim(state.path(), &dir, &jail)
        };
        assert_eq!(claim("a").unwrap(), 1000);
        assert_eq!(claim("b").unwrap(), 1001);
        let text = claim("c").unwrap_err().to_string();
        assert!(text.contains("all 2 users"), "{text}");
        fs::remove_dir_all(state.path().join("a")).unwrap();
        assert_eq!(claim("d").unwrap(), 1000);
    }
}
