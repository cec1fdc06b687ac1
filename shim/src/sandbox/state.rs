//! The state folder of a pod, and the processes that belong to it (`docs/architecture.md`, "State folder").
//! Used by the shim and, after the shim's death, by `delete`: so what is in the files is checked again.

use std::{
    fs, io,
    os::unix::{
        ffi::OsStrExt,
        fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use bulkhead_protocol::id;
use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use sha2::{Digest, Sha256};

/// Longest path of a state folder, so that the sockets in it still fit in a socket address (107 bytes).
const DIR_MAX: usize = 91;

/// Why an id cannot name a pod's folder.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "{field}: {value:?} is not an id: letters, digits, '.', '_' and '-', beginning with a letter or digit, \
     at most 128 bytes"
)]
pub struct IdError {
    /// `id`, `exec_id` or `namespace`.
    pub field: &'static str,
    /// What was given.
    pub value: String,
}

/// Checks an id before it becomes part of a path.
pub fn check_id(field: &'static str, value: &str) -> Result<(), IdError> {
    if id::is_valid(value) && !value.contains("..") {
        return Ok(());
    }
    Err(IdError {
        field,
        value: value.chars().take(160).collect(),
    })
}

/// The state folder of the pod; a name that would not fit in socket addresses is shortened by a hash.
pub fn pod_dir(state: &Path, namespace: &str, id: &str) -> Result<PathBuf, IdError> {
    check_id("namespace", namespace)?;
    check_id("id", id)?;
    let name = format!("{namespace}-{id}");
    let dir = state.join(&name);
    if dir.as_os_str().as_bytes().len() <= DIR_MAX {
        return Ok(dir);
    }
    let hash = hex(&Sha256::digest(format!("{namespace}/{id}")), 16);
    let head: String = name.chars().take(16).collect();
    Ok(state.join(format!("{head}-{hash}")))
}

/// The first `len` hexadecimal digits of `bytes`.
pub fn hex(bytes: &[u8], len: usize) -> String {
    let mut text: String = bytes.iter().map(|b| format!("{b:02x}")).collect();
    text.truncate(len);
    text
}

/// Makes a folder of mode 0700, with its parents.
pub fn make_private_dir(dir: &Path) -> io::Result<()> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
}

/// A process by pid and start time, so that a pid that was used again is not taken for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProcessId {
    /// The pid.
    pub pid: i32,
    /// Field 22 of `/proc/<pid>/stat`.
    pub start_time: u64,
}

/// The fields of `/proc/<pid>/stat` that are used here.
struct Stat {
    state: u8,
    session: i32,
    start_time: u64,
}

fn stat(pid: i32) -> Option<Stat> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    parse_stat(&text)
}

fn parse_stat(text: &str) -> Option<Stat> {
    // proc_pid_stat(5): the second field is in parentheses and may hold anything.
    let (_, rest) = text.rsplit_once(") ")?;
    let fields: Vec<&str> = rest.split(' ').collect();
    Some(Stat {
        state: *fields.first()?.as_bytes().first()?,
        session: fields.get(3)?.parse().ok()?,
        start_time: fields.get(19)?.parse().ok()?,
    })
}

impl ProcessId {
    /// The running process `pid`.
    pub fn of(pid: i32) -> Option<Self> {
        let start_time = stat(pid)?.start_time;
        Some(Self { pid, start_time })
    }

    /// Whether it still runs (a zombie does not).
    pub fn is_alive(self) -> bool {
        stat(self.pid).is_some_and(|s| s.start_time == self.start_time && s.state != b'Z')
    }

    /// Writes `<pid> <starttime>`.
    pub fn save(self, file: &Path) -> io::Result<()> {
        write_private(file, &format!("{} {}\n", self.pid, self.start_time))
    }

    /// Reads what [`save`](Self::save) wrote.
    pub fn load(file: &Path) -> Option<Self> {
        let text = fs::read_to_string(file).ok()?;
        let (pid, start_time) = text.trim().split_once(' ')?;
        let pid: i32 = pid.parse().ok()?;
        (pid > 1).then_some(())?;
        Some(Self {
            pid,
            start_time: start_time.parse().ok()?,
        })
    }

    /// Kills the process with its group, and every process left of the session it led.
    pub fn kill_session(self) {
        let alive = stat(self.pid).filter(|s| s.start_time == self.start_time);
        if let (Some(_), Some(pid)) = (&alive, Pid::from_raw(self.pid)) {
            let _ = kill_process_group(pid, Signal::KILL);
            let _ = kill_process(pid, Signal::KILL);
        } else if stat(self.pid).is_some() {
            return; // The number belongs to somebody else, and so does its session.
        }
        for pid in self.session() {
            if let Some(pid) = Pid::from_raw(pid) {
                let _ = kill_process(pid, Signal::KILL);
            }
        }
    }

    /// Waits until neither the process nor its session is there.
    pub fn wait_gone(self, limit: Duration) -> bool {
        let end = Instant::now() + limit;
        while self.is_alive() || !self.session().is_empty() {
            if Instant::now() > end {
                return false;
            }
            thread::sleep(Duration::from_millis(5));
        }
        true
    }

    /// The other processes of the session that it leads.
    pub fn session(self) -> Vec<i32> {
        pids()
            .filter(|&pid| pid != self.pid)
            .filter(|&pid| {
                stat(pid).is_some_and(|s| {
                    s.session == self.pid && s.start_time >= self.start_time && s.state != b'Z'
                })
            })
            .collect()
    }
}

fn pids() -> impl Iterator<Item = i32> {
    fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|e| e.file_name().to_str()?.parse().ok())
}

fn processes() -> impl Iterator<Item = ProcessId> {
    pids().filter_map(ProcessId::of)
}

/// Whether a process was started with `--state-dir <dir>`.
pub fn has_argument(pid: i32, dir: &Path) -> bool {
    let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let mut args = line.split(|&b| b == 0);
    args.any(|arg| arg == b"--state-dir") && args.next() == Some(dir.as_os_str().as_bytes())
}

/// The children whose pid files may stand in a pod's folder.
pub const CHILDREN: [&str; 2] = ["vmm.pid", "fs.pid"];

/// Kills what the pid files name and waits for its end. A shim that died in the middle of a start may not have
/// written them yet: so whoever was started with this folder is found by its command line as well.
pub fn kill_children(dir: &Path) {
    let mut children: Vec<ProcessId> = CHILDREN
        .iter()
        .filter_map(|name| ProcessId::load(&dir.join(name)))
        .collect();
    children.extend(processes().filter(|id| has_argument(id.pid, dir)));
    for child in &children {
        child.kill_session();
    }
    for child in &children {
        child.wait_gone(Duration::from_secs(3));
    }
}

/// Removes a file or socket; it is no error that it is gone.
pub fn remove_file(file: &Path) -> io::Result<()> {
    match fs::remove_file(file) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

/// Writes a file of mode 0600.
pub fn write_private(file: &Path, text: &str) -> io::Result<()> {
    use io::Write;
    fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(file)?
        .write_all(text.as_bytes())
}

/// Writes a file of mode 0600 that is whole at every moment.
pub fn replace_private(file: &Path, text: &str) -> io::Result<()> {
    let next = file.with_extension("new");
    write_private(&next, text)?;
    fs::rename(next, file)
}

/// Who owns a pod: the shim's process (its keeper) and the bundle it was made for, in `shim.pid`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner {
    /// The shim.
    pub shim: ProcessId,
    /// Inode of the bundle's folder: a new bundle of the same id is another pod.
    pub bundle: u64,
}

impl Owner {
    /// Writes the owner into the pod's folder.
    pub fn save(self, dir: &Path) -> io::Result<()> {
        write_private(
            &dir.join("shim.pid"),
            &format!(
                "{} {} {}\n",
                self.shim.pid, self.shim.start_time, self.bundle
            ),
        )
    }

    /// Reads the owner from the pod's folder.
    pub fn load(dir: &Path) -> Option<Self> {
        let text = fs::read_to_string(dir.join("shim.pid")).ok()?;
        let mut fields = text.split_whitespace();
        Some(Self {
            shim: ProcessId {
                pid: fields.next()?.parse().ok().filter(|&pid| pid > 1)?,
                start_time: fields.next()?.parse().ok()?,
            },
            bundle: fields.next()?.parse().ok()?,
        })
    }
}

/// Inode of a bundle's folder.
pub fn bundle_inode(bundle: &Path) -> Option<u64> {
    fs::metadata(bundle).ok().map(|m| m.ino())
}

/// Removes a folder; it is no error that it is gone.
pub fn remove_dir(dir: &Path) -> io::Result<()> {
    match fs::remove_dir_all(dir) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{BufRead, BufReader},
        process::{Command, Stdio},
    };

    use super::*;

    #[test]
    fn ids_that_are_paths_or_too_long_are_refused_by_name() {
        for id in ["a/b", "..", "a..b", "", &"x".repeat(129)] {
            let error = pod_dir(Path::new("/run/b"), "default", id).unwrap_err();
            assert_eq!(error.field, "id");
        }
        assert!(pod_dir(Path::new("/run/b"), "../x", "a").is_err());
    }

    #[test]
    fn a_pods_folder_always_leaves_room_for_its_sockets() {
        let state = Path::new("/run/bulkhead");
        let short = pod_dir(state, "k8s.io", &"a".repeat(64)).unwrap();
        assert!(short.ends_with(format!("k8s.io-{}", "a".repeat(64))));
        let long = pod_dir(state, "default", &"a".repeat(76)).unwrap();
        assert!(long.as_os_str().len() <= DIR_MAX);
        let other = pod_dir(state, "default", &"a".repeat(75)).unwrap();
        assert_ne!(long, other);
    }

    #[test]
    fn a_command_name_with_parentheses_does_not_confuse_stat() {
        let stat = parse_stat("7 (a) b) S 1 7 6 0 -1 0 0 0 0 0 0 0 0 0 20 0 1 0 4242 0 0").unwrap();
        assert_eq!((stat.session, stat.start_time), (6, 4242));
    }

    #[test]
    fn a_session_is_killed_also_when_its_leader_is_gone() {
        // The shell leads a session, tells of a child that it leaves in it, and ends with its input.
        let mut shell = Command::new("setsid")
            .args(["sh", "-c", "sleep 60 & echo $!; read end"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let mut output = BufReader::new(shell.stdout.take().unwrap());
        output.read_line(&mut line).unwrap();
        let member = ProcessId::of(line.trim().parse().unwrap()).unwrap();
        let session = ProcessId::of(shell.id() as i32).unwrap();
        assert_eq!(session.session(), [member.pid]);
        drop(shell.stdin.take());
        shell.wait().unwrap();
        session.kill_session();
        assert!(session.wait_gone(Duration::from_secs(2)));
        assert!(!member.is_alive());
    }

    #[test]
    fn a_pid_that_was_used_again_is_left_alone() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let mut id = ProcessId::of(child.id() as i32).unwrap();
        id.start_time += 1;
        assert!(!id.is_alive());
        id.kill_session();
        assert!(child.try_wait().unwrap().is_none());
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn owners_and_pids_survive_their_files() {
        let dir = tempfile::tempdir().unwrap();
        let shim = ProcessId {
            pid: 77,
            start_time: 5,
        };
        let owner = Owner { shim, bundle: 9 };
        owner.save(dir.path()).unwrap();
        assert_eq!(Owner::load(dir.path()), Some(owner));
        shim.save(&dir.path().join("vmm.pid")).unwrap();
        assert_eq!(ProcessId::load(&dir.path().join("vmm.pid")), Some(shim));
        fs::write(dir.path().join("vmm.pid"), "1 0\n").unwrap();
        assert_eq!(ProcessId::load(&dir.path().join("vmm.pid")), None);
    }
}
