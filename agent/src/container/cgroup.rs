//! The container's cgroup (v2): limits, device program, freezer, events, statistics. Called by the agent, not by the set-up
//! copy: a cgroup outlives its processes.

use std::{
    fs, io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
};

use oci_spec::runtime::{LinuxNamespaceType, LinuxResources, Mount, Spec};
use rustix::fs::{Mode, OFlags};
use tokio::io::Interest;

use super::{bpf::Rules, ids::Ids, limits, namespaces};
use crate::{
    boot::PODS,
    error::{Context, Error, Result},
    sys::{
        self,
        bpf::{self, Hook},
    },
};

/// A container's cgroup.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
    devices: Option<OwnedFd>,
}

impl Cgroup {
    /// Makes the cgroup with its limits and device rules; it belongs to root of the user namespace that has `ids`, if the
    /// container may write to it (runtime-spec, config-linux, "Cgroup ownership").
    pub fn create(container: &str, spec: &Spec, ids: &Ids) -> Result<Self> {
        let linux = spec.linux().as_ref();
        let resources = linux.and_then(|linux| linux.resources().as_ref());
        let path = Path::new(PODS).join(container);
        fs::create_dir(&path).step(|| format!("make cgroup {}", path.display()))?;
        let mut cgroup = Self {
            path,
            devices: None,
        };
        let made = cgroup.set_up(resources).and_then(|()| {
            // The group as well: who execs from the namespace has rights over a file only if it knows both owners.
            match (ids.outer_uid(0), ids.outer_gid(0)) {
                (Some(uid), Some(gid)) if !ids.is_empty() && is_delegated(spec) => {
                    cgroup.give(uid, gid)
                }
                _ => Ok(()),
            }
        });
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

    /// Gives away what the kernel says may be.
    fn give(&self, owner: u32, group: u32) -> Result<()> {
        let what = || format!("give the cgroup to user {owner}");
        let files = fs::read_to_string("/sys/kernel/cgroup/delegate").step(what)?;
        for file in [""].into_iter().chain(files.lines()) {
            match std::os::unix::fs::chown(self.path.join(file), Some(owner), Some(group)) {
                // A controller that this kernel, or this level, does not have.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                other => other.step(what)?,
            }
        }
        Ok(())
    }

    fn set_devices(&mut self, resources: Option<&LinuxResources>) -> Result<()> {
        let none = Vec::new();
        let rules = resources
            .and_then(|resources| resources.devices().as_ref())
            .unwrap_or(&none);
        let program = Rules::fold(rules)?.program();
        let program = bpf::load(Hook::Device, &program)
            .step(|| "linux.resources.devices: load the device program".into())?;
        let folder = self.open()?;
        bpf::attach(
            Hook::Device,
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
        self.check_usage(resources)?;
        check_devices(resources)?;
        for setting in limits::settings(resources, &|file| self.path.join(file).exists())? {
            if setting.file == limits::BFQ_WEIGHT {
                use_bfq()?;
            }
            fs::write(self.path.join(&setting.file), &setting.value).step(|| {
                let limits::Setting { field, file, value } = &setting;
                format!("{field}: write \"{value}\" to {file}")
            })?;
        }
        Ok(())
    }

    /// `memory.checkBeforeUpdate`: no limit below what is in use.
    fn check_usage(&self, resources: &LinuxResources) -> Result<()> {
        let Some(memory) = resources.memory() else {
            return Ok(());
        };
        if memory.check_before_update() != Some(true) {
            return Ok(());
        }
        let read = |file: &str| {
            let text = fs::read_to_string(self.path.join(file)).unwrap_or_default();
            text.trim().parse::<i64>().unwrap_or(0)
        };
        let used = read("memory.current");
        let total = used.saturating_add(read("memory.swap.current"));
        for (field, limit, used) in [
            ("limit", memory.limit(), used),
            ("swap", memory.swap(), total),
        ] {
            if let Some(limit) = limit.filter(|&limit| limit > 0 && limit < used) {
                let reason = format!("{limit} is below the usage of {used}");
                return Err(Error::field(
                    format!("linux.resources.memory.{field}"),
                    reason,
                ));
            }
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

/// Whether the container has a cgroup namespace of its own and its cgroup mounted writable.
fn is_delegated(spec: &Spec) -> bool {
    let writable = |mount: &Mount| {
        let kind = mount.typ().as_deref().unwrap_or_default();
        let options = mount.options().as_deref().unwrap_or_default();
        let readonly = options.iter().any(|o| matches!(o.as_str(), "ro" | "rro"));
        matches!(kind, "cgroup" | "cgroup2") && !readonly
    };
    namespaces::is_new(spec, LinuxNamespaceType::Cgroup)
        && spec.mounts().iter().flatten().any(writable)
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

/// A limit on a device that the machine does not have would be no limit.
fn check_devices(resources: &LinuxResources) -> Result<()> {
    for (field, major, minor) in limits::block_devices(resources) {
        if !Path::new(&format!("/sys/dev/block/{major}:{minor}")).exists() {
            let reason = format!("{major}:{minor} is not a block device of the machine");
            return Err(Error::field(
                format!("linux.resources.blockIO.{field}"),
                reason,
            ));
        }
    }
    Ok(())
}

/// Weights count only where BFQ schedules.
fn use_bfq() -> Result<()> {
    let what = || "linux.resources.blockIO: use the scheduler BFQ".to_string();
    for device in fs::read_dir("/sys/block").step(what)?.flatten() {
        let file = device.path().join("queue/scheduler");
        let known = fs::read_to_string(&file).unwrap_or_default();
        if known.contains("bfq") && !known.contains("[bfq]") {
            fs::write(&file, "bfq").step(what)?;
        }
    }
    Ok(())
}

/// Refuses what [`Cgroup::create`] could not enforce, before anything is made.
pub fn check(resources: &LinuxResources) -> Result<()> {
    Rules::fold(resources.devices().as_deref().unwrap_or_default())?;
    limits::settings(resources, &|_| true).map(|_| ())?;
    let network = resources.network().as_ref();
    let classes = network.is_some_and(|network| {
        network.class_id().is_some_and(|id| id != 0)
            || network.priorities().as_ref().is_some_and(|p| !p.is_empty())
    });
    if classes {
        return Err(Error::refused("linux.resources.network"));
    }
    match resources
        .rdma()
        .as_ref()
        .is_some_and(|rdma| !rdma.is_empty())
    {
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
