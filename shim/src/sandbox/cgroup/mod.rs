//! The pod's cgroup on the host: VMM, emulator and file server are in it from before their programs run, so that its memory and CPU are
//! counted where containerd said, and a limit above it holds the machine. Nothing is limited in it itself: containers have their limits
//! in the guest.
//!
//! The shim stays where containerd starts it: it must answer also for a pod that is throttled or out of memory.
//!
//! `cgroup.json` in the state folder names the cgroup from before it is made until it is gone, for `delete` and the next shim.

mod hierarchy;

use std::{
    fs,
    io::{self, ErrorKind},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};
use serde::{Deserialize, Serialize};

use self::hierarchy::Hierarchy;
use super::state::replace_private;
use crate::spec::CgroupPath;

/// The note in the state folder.
const FILE: &str = "cgroup.json";
/// Longest note that is read.
const FILE_MAX: u64 = 16 << 10;
/// How long processes may take to leave the cgroup once they are killed.
const EMPTY: Duration = Duration::from_secs(3);
/// How deep folders that somebody has made in the pod's cgroup are followed.
const DEPTH_MAX: u32 = 64;

/// Why the pod's processes cannot be where containerd wants them.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Somebody else's.
    #[error(
        "linux.cgroupsPath: {path} has processes or cgroups of others: name another, or remove it"
    )]
    Busy {
        /// The folder.
        path: PathBuf,
    },
    /// It cannot be made or joined.
    #[error("linux.cgroupsPath: {what} {path}: {source}")]
    Path {
        /// What was tried.
        what: &'static str,
        /// The folder or file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

fn path_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Path { what, path, source }
}

/// The note.
#[derive(Debug, Serialize, Deserialize)]
struct Note {
    path: String,
}

/// How a process gets into the cgroup of each hierarchy.
#[derive(Debug, Default)]
pub struct Membership {
    /// The folder of v2's, in which a process is made.
    pub unified: Option<OwnedFd>,
    /// `cgroup.procs` of v1's: a process joins by writing `0`.
    pub procs: Vec<OwnedFd>,
}

/// Makes the cgroup in every hierarchy.
pub fn make(dir: &Path, path: &CgroupPath) -> Result<Membership, Error> {
    let mountinfo = Path::new("/proc/self/mountinfo");
    let hierarchies = Hierarchy::all().map_err(path_error("reading", mountinfo))?;
    if hierarchies.is_empty() {
        tracing::warn!("no cgroup hierarchy is mounted: nobody counts or limits what the pod uses");
    }
    // All of them first: what is another's is not noted, and so never removed.
    for hierarchy in &hierarchies {
        let folder = hierarchy.folder(path);
        if !members(&folder).is_empty() || !below(&folder).is_empty() {
            return Err(Error::Busy { path: folder });
        }
    }
    let note = Note {
        path: path.to_string(),
    };
    let text = serde_json::to_string(&note).map_err(io::Error::other);
    text.and_then(|text| replace_private(&dir.join(FILE), &text))
        .map_err(path_error("writing", &dir.join(FILE)))?;
    bulkhead_failpoint::reach("create.cgroup").map_err(path_error("making", &dir.join(FILE)))?;
    let mut membership = Membership::default();
    for hierarchy in &hierarchies {
        let made = hierarchy.make(path);
        let folder = made.map_err(path_error("making", &hierarchy.folder(path)))?;
        let opened = |file: &Path, options: &fs::OpenOptions| {
            let opened = options.open(file).map_err(path_error("opening", file))?;
            Ok(OwnedFd::from(opened))
        };
        if hierarchy.is_unified() {
            let fd = opened(&folder, fs::OpenOptions::new().read(true))?;
            membership.unified = Some(fd);
        } else {
            let file = folder.join("cgroup.procs");
            let fd = opened(&file, fs::OpenOptions::new().write(true))?;
            membership.procs.push(fd);
        }
    }
    Ok(membership)
}

/// The noted cgroup's folders.
fn noted(dir: &Path) -> Option<(CgroupPath, Vec<Hierarchy>)> {
    let file = dir.join(FILE);
    if fs::metadata(&file).ok()?.len() > FILE_MAX {
        return None;
    }
    let note: Note = serde_json::from_slice(&fs::read(&file).ok()?).ok()?;
    let path = CgroupPath::parse(&note.path).ok()?;
    Some((path, Hierarchy::all().ok()?))
}

/// How many of the pod's processes the host's kernel has killed for want of memory, and the cgroup's path.
pub fn oom_kills(dir: &Path) -> Option<(u64, CgroupPath)> {
    let (path, hierarchies) = noted(dir)?;
    let count = |hierarchy: &Hierarchy| {
        let folder = hierarchy.folder(&path);
        // v2, and v1 since Linux 4.13.
        let texts = ["memory.events", "memory.oom_control"]
            .map(|name| fs::read_to_string(folder.join(name)));
        let text = texts.into_iter().find_map(Result::ok)?;
        let mut lines = text.lines();
        lines.find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse::<u64>().ok())
    };
    let kills = hierarchies.iter().find_map(count)?;
    Some((kills, path))
}

/// Removes the cgroup that is noted in a pod's state folder, with whatever is still in it. The pod's own processes are gone
/// before; folders above it stay, as with every runtime.
pub fn clean(dir: &Path) {
    let Some((path, hierarchies)) = noted(dir) else {
        return;
    };
    let end = Instant::now() + EMPTY;
    for hierarchy in hierarchies {
        let folder = hierarchy.folder(&path);
        if let Err(error) = remove(&hierarchy, &folder, end) {
            tracing::warn!(%error, folder = %folder.display(), "a cgroup stays");
        }
    }
}

fn remove(hierarchy: &Hierarchy, folder: &Path, end: Instant) -> io::Result<()> {
    for below in below(folder) {
        remove_empty(&below, DEPTH_MAX)?;
    }
    loop {
        match fs::remove_dir(folder) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            Err(error) if error.kind() == ErrorKind::ResourceBusy && Instant::now() < end => {
                empty(hierarchy, folder);
                thread::sleep(Duration::from_millis(2));
            }
            done => return done,
        }
    }
}

/// Nothing that the pod has made, so nothing in it is ended.
fn remove_empty(folder: &Path, depth: u32) -> io::Result<()> {
    if let Some(depth) = depth.checked_sub(1) {
        for below in below(folder) {
            remove_empty(&below, depth)?;
        }
    }
    fs::remove_dir(folder)
}

fn below(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let folders = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    folders.map(|entry| entry.path()).collect()
}

/// Ends what somebody has moved into the pod's cgroup; a shim or containerd, which would have been moved there by mistake, leaves it.
fn empty(hierarchy: &Hierarchy, folder: &Path) {
    let parent = rustix::process::getppid();
    let spared = [Some(rustix::process::getpid()), parent];
    for pid in members(folder).into_iter().filter_map(Pid::from_raw) {
        if spared.contains(&Some(pid)) {
            let _ = fs::write(hierarchy.root().join("cgroup.procs"), pid.to_string());
        } else {
            let _ = kill_process(pid, Signal::KILL);
        }
    }
}

fn members(folder: &Path) -> Vec<i32> {
    let text = fs::read_to_string(folder.join("cgroup.procs")).unwrap_or_default();
    text.lines().filter_map(|line| line.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command};

    use super::*;

    /// A cgroup's name that no other test has, below a folder that goes with it.
    struct Named(CgroupPath, tempfile::TempDir);

    impl Named {
        fn new(name: &str) -> Self {
            let path = format!("/bulkhead-unit-{}-{name}/pod", std::process::id());
            Self(
                CgroupPath::parse(&path).unwrap(),
                tempfile::tempdir().unwrap(),
            )
        }

        fn folders(&self) -> Vec<PathBuf> {
            let hierarchies = Hierarchy::all().unwrap();
            assert!(
                !hierarchies.is_empty(),
                "this test needs a host with cgroups"
            );
            hierarchies.iter().map(|h| h.folder(&self.0)).collect()
        }

        fn make(&self) -> Result<Membership, Error> {
            make(self.1.path(), &self.0)
        }

        fn clean(&self) {
            clean(self.1.path());
        }
    }

    impl Drop for Named {
        fn drop(&mut self) {
            self.clean();
            for folder in self.folders() {
                let _ = fs::remove_dir(folder.parent().unwrap());
            }
        }
    }

    fn sleeper() -> Child {
        Command::new("sleep").arg("60").spawn().unwrap()
    }

    #[test]
    fn a_process_is_in_every_hierarchy_and_whatever_was_moved_there_is_ended_with_the_cgroup() {
        let named = Named::new("moved");
        named.make().unwrap();
        let mut child = sleeper();
        for folder in named.folders() {
            fs::write(folder.join("cgroup.procs"), child.id().to_string()).unwrap();
        }
        let pid = i32::try_from(child.id()).unwrap();
        for folder in named.folders() {
            assert_eq!(members(&folder), [pid], "{}", folder.display());
        }
        fs::create_dir(named.folders()[0].join("below")).unwrap();
        let waiter = thread::spawn(move || child.wait().unwrap());
        named.clean();
        for folder in named.folders() {
            assert!(!folder.exists(), "{}", folder.display());
            assert!(folder.parent().unwrap().exists());
        }
        assert!(!waiter.join().unwrap().success());
    }

    #[test]
    fn a_cgroup_that_has_processes_of_others_is_refused_and_left_alone() {
        let (named, second) = (Named::new("busy"), tempfile::tempdir().unwrap());
        named.make().unwrap();
        let mut child = sleeper();
        let procs = named.folders()[0].join("cgroup.procs");
        fs::write(procs, child.id().to_string()).unwrap();
        let error = make(second.path(), &named.0).unwrap_err();
        assert!(matches!(error, Error::Busy { .. }), "{error}");
        clean(second.path());
        assert!(named.folders()[0].exists());
        assert!(child.try_wait().unwrap().is_none());
        child.kill().unwrap();
        child.wait().unwrap();
        // What is there and empty is used: a pod whose state folder was lost has left it.
        make(second.path(), &named.0).unwrap();
    }

    #[test]
    fn a_note_that_leads_elsewhere_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        for text in [r#"{"path":"/"}"#, r#"{"path":"/../x"}"#, "{", ""] {
            fs::write(dir.path().join(FILE), text).unwrap();
            assert!(noted(dir.path()).is_none(), "{text}");
        }
    }
}
