//! The hierarchies that are mounted on this host: one with cgroup v2, one for each controller with v1, both with a hybrid layout.

use std::{
    fs,
    io::{self, ErrorKind},
    path::{Path, PathBuf},
};

use crate::spec::CgroupPath;

/// A mounted hierarchy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hierarchy {
    mount: PathBuf,
    kind: Kind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    V1 { cpuset: bool },
    V2,
}

impl Hierarchy {
    /// All of them.
    pub fn all() -> io::Result<Vec<Self>> {
        Ok(parse(&fs::read_to_string("/proc/self/mountinfo")?))
    }

    /// Its root, as far as this process sees it.
    pub fn root(&self) -> &Path {
        &self.mount
    }

    /// Whether it is cgroup v2's.
    pub fn is_unified(&self) -> bool {
        self.kind == Kind::V2
    }

    /// The folder of a cgroup.
    pub fn folder(&self, path: &CgroupPath) -> PathBuf {
        let mut folder = self.mount.clone();
        folder.extend(path.folders());
        folder
    }

    /// Makes a cgroup, and what is missing above it. What is there already stays as it is.
    pub fn make(&self, path: &CgroupPath) -> io::Result<PathBuf> {
        let mut folder = self.mount.clone();
        for name in path.folders() {
            if self.kind == Kind::V2 {
                enable_controllers(&folder)?;
            }
            let above = folder.clone();
            folder.push(name);
            match fs::create_dir(&folder) {
                Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(error),
                _ => {}
            }
            if self.kind == (Kind::V1 { cpuset: true }) {
                inherit_cpuset(&above, &folder)?;
            }
        }
        Ok(folder)
    }
}

/// cgroup-v2.rst, "Enabling and Disabling": what is above must give the controllers on. One that it cannot give is not missed: the
/// pod is then accounted where it is enabled.
fn enable_controllers(folder: &Path) -> io::Result<()> {
    let has = fs::read_to_string(folder.join("cgroup.controllers"))?;
    let gives = fs::read_to_string(folder.join("cgroup.subtree_control"))?;
    let gives: Vec<&str> = gives.split_whitespace().collect();
    for controller in has.split_whitespace().filter(|name| !gives.contains(name)) {
        let file = folder.join("cgroup.subtree_control");
        if let Err(error) = fs::write(&file, format!("+{controller}")) {
            tracing::debug!(controller, file = %file.display(), %error, "a controller stays off");
        }
    }
    Ok(())
}

/// cpusets.rst: a new cpuset of v1 has no CPUs and takes no process.
fn inherit_cpuset(above: &Path, folder: &Path) -> io::Result<()> {
    for name in ["cpuset.cpus", "cpuset.mems"] {
        if fs::read_to_string(folder.join(name))?.trim().is_empty() {
            fs::write(folder.join(name), fs::read(above.join(name))?)?;
        }
    }
    Ok(())
}

/// proc_pid_mountinfo(5).
fn parse(text: &str) -> Vec<Hierarchy> {
    let mut seen = Vec::new();
    let mut found = Vec::new();
    for line in text.lines() {
        let Some((head, tail)) = line.split_once(" - ") else {
            continue;
        };
        let head: Vec<&str> = head.split(' ').collect();
        let tail: Vec<&str> = tail.split(' ').collect();
        let (Some(device), Some(mount), Some(kind)) = (head.get(2), head.get(4), tail.first())
        else {
            continue;
        };
        let kind = match *kind {
            "cgroup" => {
                let options = tail.get(2).copied().unwrap_or_default();
                let cpuset = options.split(',').any(|option| option == "cpuset");
                Kind::V1 { cpuset }
            }
            "cgroup2" => Kind::V2,
            _ => continue,
        };
        // A hierarchy can be mounted more than once; every mount leads to it. An escaped path is none of an init system's.
        if !seen.contains(device) && !mount.contains('\\') {
            seen.push(*device);
            found.push(Hierarchy {
                mount: PathBuf::from(mount),
                kind,
            });
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_hierarchy_is_found_once_and_its_kind_known() {
        let text = "\
30 24 0:26 / /sys/fs/cgroup rw - tmpfs tmpfs rw
31 30 0:27 / /sys/fs/cgroup/cpuset rw,relatime shared:9 - cgroup cgroup rw,cpuset
32 30 0:28 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
33 30 0:29 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw
34 30 0:28 / /mnt rw - cgroup cgroup rw,memory
35 24 8:1 / / rw - ext4 /dev/cgroup rw";
        let of = |mount: &str, kind| Hierarchy {
            mount: mount.into(),
            kind,
        };
        let expected = [
            of("/sys/fs/cgroup/cpuset", Kind::V1 { cpuset: true }),
            of("/sys/fs/cgroup/memory", Kind::V1 { cpuset: false }),
            of("/sys/fs/cgroup/unified", Kind::V2),
        ];
        assert_eq!(parse(text), expected);
    }
}
