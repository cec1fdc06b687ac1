//! CPU time of everything that a run involves, by a cgroup of its own: a shim leaves its parent, so nothing else sees it.
//!
//! containerd and what it starts live in `<group>/main`, containers that have cgroups on the host in others below the group.

use std::{
    fs,
    path::{Path, PathBuf},
};

use bulkhead_harness::failure::{Context, Outcome, make_folder, read, write};

/// The group; it goes with the value, once nothing lives in it.
#[derive(Debug)]
pub struct Accounting {
    name: String,
    folder: PathBuf,
    v2: bool,
}

impl Accounting {
    /// Makes the group and moves a process into it.
    pub fn of(pid: u32) -> Outcome<Self> {
        let root = Path::new("/sys/fs/cgroup");
        let v2 = root.join("cgroup.controllers").exists();
        let name = format!("bulkhead-bench-{}", std::process::id());
        let hierarchy = if v2 {
            root.to_owned()
        } else {
            root.join("cpuacct")
        };
        let group = Self {
            folder: hierarchy.join(&name),
            name,
            v2,
        };
        let main = group.folder.join("main");
        make_folder(&main)?;
        write(main.join("cgroup.procs"), pid.to_string())?;
        Ok(group)
    }

    /// For `ctr run --cgroup`.
    pub fn path(&self, container: &str) -> String {
        format!("/{}/{container}", self.name)
    }

    /// CPU time so far, in ms.
    pub fn cpu_ms(&self) -> Outcome<f64> {
        let file = if self.v2 { "cpu.stat" } else { "cpuacct.usage" };
        let text = read(self.folder.join(file))?;
        let (value, per_ms) = match text.strip_prefix("usage_usec ") {
            Some(rest) => (rest.lines().next().unwrap_or_default(), 1e3),
            None => (text.trim(), 1e6),
        };
        let value: f64 = value
            .parse()
            .context(format_args!("{file} of {}", self.name))?;
        Ok(value / per_ms)
    }
}

impl Drop for Accounting {
    fn drop(&mut self) {
        let main = self.folder.join("main");
        let up = self
            .folder
            .parent()
            .unwrap_or(&self.folder)
            .join("cgroup.procs");
        for pid in read(main.join("cgroup.procs")).unwrap_or_default().lines() {
            let _ = fs::write(&up, pid);
        }
        let _ = fs::remove_dir(main);
        let _ = fs::remove_dir(&self.folder);
    }
}
