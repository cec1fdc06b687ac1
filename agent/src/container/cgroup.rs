//! The container's cgroup (v2): limits, device program, freezer, events, statistics. Called by the agent, not by the set-up
//! copy: a cgroup outlives its processes.

use std::{
    fs, io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
};

use oci_spec::runtime::LinuxResources;
use rustix::fs::{Mode, OFlags};
use tokio::io::Interest;

use super::{bpf::Rules, limits};
use crate::{
    boot::PODS,
    error::{Context, Error, Result},
    sys,
};

/// A container's cgroup.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
    devices: Option<OwnedFd>,
}

impl Cgroup {
    /// Makes the cgroup with its limits and device rules.
    pub fn create(container: &str, resources: Option<&LinuxResources>) -> Result<Self> {
        let path = Path::new(PODS).join(container);
        fs::create_dir(&path).step(|| format!("make cgroup {}", path.display()))?;
        let mut cgroup = Self {
            path,
            devices: None,
        };
        let made = cgroup.set_up(resources);
        if made.is_err() {
            let _ = fs::remove_dir(&cgroup.path);
        }
        made.map(|()| cgroup)
    }

    fn set_up(&mut self, resources: Option<&LinuxResources>) -> Result<()> {
        self.set_devices(resources)?;
        match resources {
            Some(resources) => self.apply(resources),
            None => Ok(()),
        }
    }

    fn set_devices(&mut self, resources: Option<&LinuxResources>) -> Result<()> {
        let none = Vec::new();
        let rules = resources
            .and_then(|resources| resources.devices().as_ref())
            .unwrap_or(&none);
        let program = Rules::fold(rules)?.program();
        let program = sys::bpf_load_device_program(&program)
            .step(|| "linux.resources.devices: load the device program".into())?;
        let folder = self.open()?;
        sys::bpf_attach_device_program(
            folder.as_fd(),
            program.as_fd(),
            self.devices.as_ref().map(AsFd::as_fd),
        )
        .step(|| "linux.resources.devices: attach the device program".into())?;
        self.devices = Some(program);
        Ok(())
    }

    /// Changes the limits; device rules only if some are given.
    pub fn update(&mut self, resources: &LinuxResources) -> Result<()> {
        if resources.devices().as_ref().is_some_and(|d| !d.is_empty()) {
            self.set_devices(Some(resources))?;
        }
        self.apply(resources)
    }

    fn apply(&self, resources: &LinuxResources) -> Result<()> {
        for setting in limits::settings(resources, &|file| self.path.join(file).exists())? {
            fs::write(self.path.join(&setting.file), &setting.value).step(|| {
                let limits::Setting { field, file, value } = &setting;
                format!("{field}: write \"{value}\" to {file}")
            })?;
        }
        Ok(())
    }

    /// Its folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn open(&self) -> Result<OwnedFd> {
        open(&self.path)
    }

    /// Pids of all its processes, nested cgroups included.
    pub fn pids(&self) -> Vec<u32> {
        let mut pids = Vec::new();
        each_folder(&self.path, &mut |folder| {
            if let Ok(text) = fs::read_to_string(folder.join("cgroup.procs")) {
                pids.extend(text.lines().filter_map(|line| line.parse::<u32>().ok()));
            }
        });
        pids
    }

    /// Kills every process in it, at once.
    pub fn kill(&self) -> Result<()> {
        fs::write(self.path.join("cgroup.kill"), "1").step(|| "kill the cgroup".into())
    }

    /// Freezes or thaws, and waits until the kernel says it is done.
    pub async fn freeze(path: &Path, frozen: bool) -> Result<()> {
        let value = if frozen { "1" } else { "0" };
        fs::write(path.join("cgroup.freeze"), value).step(|| "freeze the cgroup".into())?;
        wait_for_event(path, "frozen", u64::from(frozen)).await
    }

    /// Kills what is left and removes the cgroup with all nested ones.
    pub async fn remove(path: &Path) -> Result<()> {
        match fs::write(path.join("cgroup.kill"), "1") {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            other => other.step(|| "kill the cgroup".into())?,
        }
        wait_for_event(path, "populated", 0).await?;
        let mut folders = Vec::new();
        each_folder(path, &mut |folder| folders.push(folder.to_path_buf()));
        for folder in folders.iter().rev() {
            fs::remove_dir(folder).step(|| format!("remove cgroup {}", folder.display()))?;
        }
        Ok(())
    }
}

/// Opens a cgroup's folder, for CLONE_INTO_CGROUP.
pub fn open(path: &Path) -> Result<OwnedFd> {
    rustix::fs::open(
        path,
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .step(|| format!("open cgroup {}", path.display()))
}

/// The cgroup a process is in now: an init that moved itself into a nested one leaves the outer one unusable.
pub fn path_of(pid: u32) -> Option<PathBuf> {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    let name = text.lines().find_map(|line| line.strip_prefix("0::/"))?;
    let path = Path::new("/sys/fs/cgroup").join(name);
    path.starts_with(PODS).then_some(path)
}

/// How often the kernel killed one of a cgroup's processes for memory.
pub fn oom_kills(path: &Path) -> u64 {
    fs::read_to_string(path.join("memory.events"))
        .ok()
        .and_then(|text| value_of(&text, "oom_kill"))
        .unwrap_or(0)
}

fn each_folder(path: &Path, visit: &mut dyn FnMut(&Path)) {
    visit(path);
    let Ok(entries) = fs::read_dir(path) else {
        return;
    };
    for entry in entries.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            each_folder(&entry.path(), visit);
        }
    }
}

/// Waits until `cgroup.events` says `key value`; the kernel notifies by POLLPRI. A cgroup that is gone is quiet.
async fn wait_for_event(path: &Path, key: &str, value: u64) -> Result<()> {
    let what = || format!("wait for \"{key} {value}\" of {}", path.display());
    let file = fs::File::open(path.join("cgroup.events")).step(what)?;
    let file = sys::watch(file.into(), Interest::PRIORITY).step(what)?;
    let mut buffer = [0; 256];
    loop {
        let length = rustix::io::pread(file.get_ref(), &mut buffer, 0).step(what)?;
        let text = String::from_utf8_lossy(buffer.get(..length).unwrap_or_default());
        if value_of(&text, key) == Some(value) {
            return Ok(());
        }
        file.ready(Interest::PRIORITY)
            .await
            .step(what)?
            .clear_ready();
    }
}

/// The number after `key` in a file of `key number` lines.
pub fn value_of(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|line| {
        line.strip_prefix(key)?
            .strip_prefix(' ')?
            .trim()
            .parse()
            .ok()
    })
}

/// Refuses what [`Cgroup::create`] could not enforce, before anything is made.
pub fn check(resources: &LinuxResources) -> Result<()> {
    Rules::fold(resources.devices().as_deref().unwrap_or_default())?;
    limits::settings(resources, &|_| true).map(|_| ())?;
    match resources.network().is_some() || resources.rdma().as_ref().is_some_and(|r| !r.is_empty())
    {
        true if resources.network().is_some() => Err(Error::refused("linux.resources.network")),
        true => Err(Error::refused("linux.resources.rdma")),
        false => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_found_by_its_whole_key() {
        let text = "low 1\noom 2\noom_kill 3\n";
        assert_eq!(value_of(text, "oom"), Some(2));
        assert_eq!(value_of(text, "oom_kill"), Some(3));
        assert_eq!(value_of(text, "max"), None);
    }
}
