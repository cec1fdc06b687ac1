//! What a pod must not leave on the host. A snapshot is taken before a case and compared after it; ends that
//! containerd does not wait for get a bounded time.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use crate::{network::Network, process, profile, records::records};

/// Folder of the shims' sockets.
const SHIMS: &str = "/run/containerd/s";
const DEAD_SHIM: &str = "socket of a dead shim";
/// How long containerd takes to clean up after a shim that died.
const CLEANED_UP: Duration = Duration::from_secs(3);

/// Where to look. Entries that name none of the suite's folders are ignored where others use the host as well.
#[derive(Clone, Debug)]
pub struct Scope {
    /// Text that only the suite's own paths hold.
    pub mark: String,
    /// containerd's namespace, unique to the suite.
    pub namespace: String,
    /// Folders in which no new entry may stay, with the depth that is looked at.
    pub folders: Vec<(PathBuf, u32)>,
    /// The suite's containerd.
    pub containerd: Option<Daemon>,
    /// Processes that may not gain a memfd or a network namespace: containerd and the suite.
    pub holders: Vec<u32>,
    /// A process of the suite's own network, and the words that lead there.
    pub network: Option<(u32, Vec<String>)>,
}

/// A containerd: what it has on record, its descriptors and its goroutines are to be what they were.
#[derive(Clone, Debug)]
pub struct Daemon {
    /// Its process.
    pub pid: u32,
    /// Its socket.
    pub socket: PathBuf,
    /// Namespaces that it has records in.
    pub namespaces: Vec<String>,
}

impl Daemon {
    /// One line a thing. What cannot be asked is a thing as well.
    fn state(&self) -> Vec<String> {
        let descriptors = process::descriptors(self.pid).into_iter().map(kind);
        let goroutines = profile::goroutines(&self.socket.with_file_name(profile::SOCKET));
        let goroutines = goroutines.unwrap_or_else(|failure| vec![failure.to_string()]);
        let goroutines = goroutines.iter().map(|begun| format!("goroutine {begun}"));
        let mut state: Vec<String> = numbered(descriptors.chain(goroutines)).collect();
        // Last, for containerd takes a while to see the connection go.
        for namespace in &self.namespaces {
            state.extend(
                records(&self.socket, namespace)
                    .unwrap_or_else(|failure| vec![failure.to_string()]),
            );
        }
        state
            .into_iter()
            .map(|one| format!("containerd: {one}"))
            .collect()
    }
}

/// What is on the host, one line a thing.
#[derive(Clone, Debug)]
pub struct Snapshot(BTreeSet<String>);

impl Snapshot {
    /// Looks at the host.
    pub fn take(scope: &Scope) -> Self {
        let mut seen = BTreeSet::new();
        for process in process::of_pods(&scope.mark) {
            if process.is_alive() {
                let fds = process::special_fds(process.pid);
                seen.insert(format!(
                    "process {} ({}): {}",
                    process.name, process.pid, process.line
                ));
                seen.extend(
                    fds.iter()
                        .map(|fd| format!("{fd} in process {}", process.pid)),
                );
            }
        }
        for pid in &scope.holders {
            let fds = process::special_fds(*pid);
            seen.extend(fds.iter().map(|fd| format!("{fd} in process {pid}")));
        }
        if let Some(containerd) = &scope.containerd {
            seen.extend(containerd.state());
        }
        let ours = |line: &&str| {
            line.contains(&scope.mark)
                || (line.contains("bulkhead") && !line.contains("/bulkhead-"))
        };
        // Mount tables and sockets are the namespace's.
        let mut views = vec!["/proc/self".to_owned()];
        if let Some((pid, enter)) = &scope.network {
            views.push(format!("/proc/{pid}"));
            seen.extend(Network::state(enter));
        }
        let all =
            |file: &str| -> String { views.iter().map(|v| text(format!("{v}/{file}"))).collect() };
        for line in all("mountinfo").lines().filter(ours) {
            // Mount ids are used again; point, type and source say which it is.
            let rest: Vec<&str> = line.split(' ').skip(3).collect();
            seen.insert(format!("mount {}", rest.join(" ")));
        }
        let sockets = all("net/unix");
        for line in sockets.lines() {
            let Some(path) = line.split_whitespace().nth(7) else {
                continue;
            };
            // Accepted connections of containerd's own sockets come and go.
            if ours(&path) && !path.contains("/c.sock") {
                seen.insert(format!("unix socket {path}"));
            }
        }
        for entry in names(Path::new("/sys/block"))
            .iter()
            .filter(|n| n.starts_with("loop"))
        {
            let backing = text(format!("/sys/block/{entry}/loop/backing_file"));
            if ours(&backing.as_str()) {
                seen.insert(format!("loop device {entry}: {}", backing.trim_end()));
            }
        }
        seen.extend(
            names(Path::new("/sys/class/net"))
                .iter()
                .map(|n| format!("network link {n}")),
        );
        let netns = names(Path::new("/run/netns"));
        seen.extend(netns.iter().map(|n| format!("network namespace {n}")));
        cgroups(Path::new("/sys/fs/cgroup"), &scope.namespace, &mut seen);
        for name in names(Path::new("/dev/shm")) {
            if name.contains("bulkhead") || name.contains("qemu") {
                seen.insert(format!("file /dev/shm/{name}"));
            }
        }
        for (folder, depth) in &scope.folders {
            files(folder, *depth, &mut seen);
        }
        // Shims of every containerd have their sockets here, those of another suite in its network namespace; what nobody
        // listens on was left.
        let elsewhere: String = process::of_pods("")
            .iter()
            .filter(|p| p.name.starts_with("containerd-shim"))
            .map(|p| text(format!("/proc/{}/net/unix", p.pid)))
            .collect();
        for name in names(Path::new(SHIMS)) {
            let path = format!("{SHIMS}/{name}");
            if !sockets.contains(&path) && !elsewhere.contains(&path) {
                seen.insert(format!("{DEAD_SHIM} {path}"));
            }
        }
        Self(seen)
    }

    /// What is there now and was not before; looks again until nothing is left or `limit` has passed.
    pub fn leaks(&self, scope: &Scope, limit: Duration) -> Vec<String> {
        let end = Instant::now() + limit;
        let mut since = BTreeMap::new();
        loop {
            let now = Instant::now();
            let left: BTreeSet<String> = Self::take(scope).0.difference(&self.0).cloned().collect();
            since.retain(|line, _| left.contains(line));
            for line in left {
                since.entry(line).or_insert(now);
            }
            if since.is_empty() {
                return Vec::new();
            }
            if now >= end {
                // Suites share the shims' folder, and one of another may be about to be cleaned up.
                let is_new = |line: &str, at: Instant| {
                    line.starts_with(DEAD_SHIM) && now.saturating_duration_since(at) < CLEANED_UP
                };
                since.retain(|line, at| !is_new(line, *at) || now < end + CLEANED_UP);
                if !since.iter().any(|(line, at)| is_new(line, *at)) {
                    return since.into_keys().collect();
                }
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

/// A descriptor without the number that each one of its kind has of its own.
fn kind(target: String) -> String {
    let kind = target.split(":[").next().unwrap_or_default();
    format!("descriptor {kind}")
}

/// The n-th of a name, so that fewer than before is nothing new.
fn numbered(names: impl Iterator<Item = String>) -> impl Iterator<Item = String> {
    let mut counts = BTreeMap::<String, u32>::new();
    names.map(move |name| {
        let count = counts.entry(name.clone()).or_default();
        *count += 1;
        format!("{name}, number {count}")
    })
}

fn text(path: impl AsRef<Path>) -> String {
    fs::read(path)
        .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
        .unwrap_or_default()
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

/// cgroups below those named like the namespace, in every hierarchy. The namespace's own folder stays with every
/// runtime that uses it.
fn cgroups(folder: &Path, namespace: &str, seen: &mut BTreeSet<String>) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            continue;
        }
        let path = entry.path();
        let shown = path.to_string_lossy();
        if shown.contains(&format!("{namespace}/")) || shown.contains("/bulkhead") {
            seen.insert(format!("cgroup {shown}"));
        }
        cgroups(&path, namespace, seen);
    }
}

fn files(folder: &Path, depth: u32, seen: &mut BTreeSet<String>) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        seen.insert(format!("file {}", path.display()));
        if depth > 1 && entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            files(&path, depth - 1, seen);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_appears_is_a_leak_and_one_that_goes_in_time_is_not() {
        let folder = std::env::temp_dir().join(format!("leaks-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let scope = Scope {
            mark: folder.display().to_string(),
            namespace: "none-such".into(),
            folders: vec![(folder.clone(), 2)],
            containerd: None,
            holders: vec![],
            network: None,
        };
        let before = Snapshot::take(&scope);
        let file = folder.join("left");
        fs::write(&file, "").unwrap();
        let leaks = before.leaks(&scope, Duration::ZERO);
        assert_eq!(leaks, [format!("file {}", file.display())]);
        let remover = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(100));
            fs::remove_file(file).unwrap();
        });
        assert!(before.leaks(&scope, Duration::from_secs(3)).is_empty());
        remover.join().unwrap();
        fs::remove_dir_all(folder).unwrap();
    }
}
