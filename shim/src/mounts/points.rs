//! Mount points in a root that is served read-only: the guest cannot make those that its image lacks, so they are made on the host
//! beforehand, as runc makes them. Links resolve inside the root. What cannot be made is left to the agent, whose error names it.

use std::{
    fs, io,
    os::fd::{AsFd, OwnedFd},
    path::{Component, Path, PathBuf},
};

use rustix::{
    fs::{Mode, OFlags, ResolveFlags, mkdirat, open, openat, openat2},
    io::Errno,
};
use serde_json::Value;

use super::text;

const FOLDER: Mode = Mode::from_raw_mode(0o755);
const FILE: Mode = Mode::from_raw_mode(0o644);

/// Makes what is missing in `root` for the spec's mounts.
pub fn make(root: &Path, spec: &Value) {
    let mounts = spec.get("mounts").and_then(Value::as_array);
    let mut covered: Vec<PathBuf> = Vec::new();
    for mount in mounts.into_iter().flatten() {
        let path = clean(Path::new(text(mount, "destination")));
        // In another mount's tree, not in the root's.
        if path.as_os_str().is_empty() || covered.iter().any(|outer| path.starts_with(outer)) {
            continue;
        }
        let file = fs::metadata(text(mount, "source")).is_ok_and(|m| m.is_file());
        if let Err(error) = make_one(root, &path, file) {
            tracing::debug!(path = %path.display(), %error, "no mount point was made");
        }
        covered.push(path);
    }
}

/// Without `.` and `..`, relative.
fn clean(path: &Path) -> PathBuf {
    let mut cleaned = PathBuf::new();
    for component in path.components() {
        match component {
            Component::Normal(name) => cleaned.push(name),
            Component::ParentDir => drop(cleaned.pop()),
            _ => {}
        }
    }
    cleaned
}

fn make_one(root: &Path, path: &Path, file: bool) -> io::Result<()> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = open(root, flags, Mode::empty())?;
    let inside = |path: &Path| {
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        openat2(&root, path, flags, Mode::empty(), resolve)
    };
    let mut parent: Option<OwnedFd> = None;
    let mut done = PathBuf::new();
    let mut names = path.components().peekable();
    while let Some(name) = names.next() {
        done.push(name);
        let there = match inside(&done) {
            Err(Errno::NOENT) => {
                let at = parent.as_ref().map_or(root.as_fd(), AsFd::as_fd);
                if file && names.peek().is_none() {
                    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
                    openat(at, name.as_os_str(), flags, FILE)?;
                } else {
                    mkdirat(at, name.as_os_str(), FOLDER)?;
                }
                inside(&done)?
            }
            other => other?,
        };
        parent = Some(there);
    }
    Ok(())
}
