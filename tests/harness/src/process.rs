//! The host's processes as `/proc` shows them.

use std::{fs, path::Path};

use rustix::process::{Pid, Signal};

use crate::{
    failure::{Context, Outcome},
    smaps::{self, Map},
};

/// Executables of a pod.
const OURS: [&str; 5] = [
    "containerd-shim",
    "bulkhead-vmm",
    "bulkhead-fs",
    "qemu-system-",
    "bulkhead",
];

/// A process of a pod.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Process {
    /// Its id.
    pub pid: u32,
    /// Name of its executable.
    pub name: String,
    /// Its arguments, by spaces.
    pub line: String,
}

impl Process {
    /// CPU time that it has had, in ticks of a hundredth second (proc_pid_stat(5)).
    pub fn cpu_ticks(&self) -> Outcome<u64> {
        let file = format!("/proc/{}/stat", self.pid);
        let text = fs::read_to_string(&file).context(&file)?;
        // After the name: state is field 3, user and system time are 14 and 15.
        let (_, rest) = text.rsplit_once(')').context(&file)?;
        let fields: Vec<&str> = rest.split_whitespace().collect();
        let field = |at: usize| fields.get(at).and_then(|field| field.parse::<u64>().ok());
        Ok(field(11)
            .context(&file)?
            .saturating_add(field(12).context(&file)?))
    }

    /// Sends a signal to it.
    pub fn signal(&self, signal: Signal) -> Outcome {
        let pid = i32::try_from(self.pid)
            .ok()
            .and_then(Pid::from_raw)
            .context("pid")?;
        rustix::process::kill_process(pid, signal)
            .context(format_args!("signal {} ({})", self.name, self.pid))
    }

    /// What it calls itself.
    pub fn command(&self) -> String {
        let comm = fs::read_to_string(format!("/proc/{}/comm", self.pid)).unwrap_or_default();
        comm.trim_end().to_owned()
    }

    /// Whether it is there and no zombie.
    pub fn is_alive(&self) -> bool {
        fs::read_to_string(format!("/proc/{}/stat", self.pid))
            .is_ok_and(|stat| !stat.rsplit(')').next().unwrap_or("").starts_with(" Z"))
    }

    /// KiB of memory in use, without mappings as large as `machine_mib` / 2: the guest's memory is no growth.
    pub fn memory_kib(&self, machine_mib: u64) -> Outcome<u64> {
        self.mapped_kib(machine_mib, |map| map.rss)
    }

    /// KiB that the process has written, as large mappings are left out again: of its own, and of code that it makes
    /// itself, which is the emulator's translations.
    pub fn written_kib(&self, machine_mib: u64) -> Outcome<(u64, u64)> {
        let all = self.mapped_kib(machine_mib, |map| map.dirty)?;
        let code = self.mapped_kib(machine_mib, |map| match map.rights {
            "rwxp" => map.dirty,
            _ => 0,
        })?;
        Ok((all.saturating_sub(code), code))
    }

    fn mapped_kib(&self, machine_mib: u64, kib: fn(&Map<'_>) -> u64) -> Outcome<u64> {
        let smaps = crate::failure::read(format!("/proc/{}/smaps", self.pid))?;
        let maps = smaps::maps(&smaps);
        let own = maps.iter().filter(|map| map.kib < machine_mib * 512);
        Ok(own.map(kib).sum())
    }
}

/// Every process of a pod (shim, VMM, file server, emulator) whose arguments, working folder or environment
/// mention `mark`, by id.
pub fn of_pods(mark: &str) -> Vec<Process> {
    let mut found: Vec<Process> = all()
        .filter(|p| OURS.iter().any(|name| p.name.starts_with(name)))
        .filter(|p| mentions(p, mark))
        .collect();
    found.sort();
    found
}

fn all() -> impl Iterator<Item = Process> {
    fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
            let exe = fs::read_link(entry.path().join("exe")).ok()?;
            let name = exe.file_name()?.to_string_lossy().into_owned();
            let line = fs::read(entry.path().join("cmdline")).ok()?;
            let line = String::from_utf8_lossy(&line).replace('\0', " ");
            Some(Process { pid, name, line })
        })
}

fn mentions(process: &Process, mark: &str) -> bool {
    let base = Path::new("/proc").join(process.pid.to_string());
    if process.line.contains(mark)
        || fs::read_link(base.join("cwd")).is_ok_and(|cwd| cwd.to_string_lossy().contains(mark))
        || fs::read(base.join("environ"))
            .is_ok_and(|env| String::from_utf8_lossy(&env).contains(mark))
    {
        return true;
    }
    // The emulator inherits all it needs as descriptors. One whose VMM has died is anybody's, so it counts.
    process.name.starts_with("qemu-system-")
        && process.line.contains("-machine microvm")
        && match parent(process.pid) {
            Some(1) | None => true,
            Some(parent) => fs::read(format!("/proc/{parent}/cmdline"))
                .is_ok_and(|line| String::from_utf8_lossy(&line).contains(mark)),
        }
}

/// The process of `all` that answers for pod `id`: the child of its keeper.
pub fn shim_of(all: Vec<Process>, id: &str) -> Outcome<Process> {
    let named = format!("-id {id} ");
    let keeper = all
        .iter()
        .find(|p| p.command() == "bulkhead-keeper" && format!("{} ", p.line).contains(&named))
        .map(|p| p.pid)
        .context(format_args!("no keeper of {id}"))?;
    let mut shims = all.into_iter();
    shims
        .find(|p| p.name.starts_with("containerd-shim") && parent(p.pid) == Some(keeper))
        .context(format_args!("no shim of {id}"))
}

/// The parent's id.
pub fn parent(pid: u32) -> Option<u32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit(')')
        .next()?
        .split_whitespace()
        .nth(1)?
        .parse()
        .ok()
}

/// How many descriptors the process has.
pub fn fds(pid: u32) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count)
}

/// What the descriptors of the process refer to.
pub fn descriptors(pid: u32) -> Vec<String> {
    fs::read_dir(format!("/proc/{pid}/fd"))
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| fs::read_link(entry.path()).ok())
        .map(|target| target.to_string_lossy().into_owned())
        .collect()
}

/// Descriptors of the process that name a memfd or a network namespace.
pub fn special_fds(pid: u32) -> Vec<String> {
    let mut targets = descriptors(pid);
    targets.retain(|target| target.starts_with("/memfd:") || target.starts_with("net:["));
    targets
}
