//! Where figures come from: the machine, the engine and the versions.

use std::{fs, path::Path};

use bulkhead_harness::{
    Engine, Invocation,
    failure::{Outcome, read},
};

/// Lines of name and value.
pub type Host = Vec<(&'static str, String)>;

/// Looks at it.
pub fn look(dist: &Path, engine: Engine) -> Outcome<Host> {
    let cpuinfo = read("/proc/cpuinfo")?;
    let model = cpuinfo
        .lines()
        .find_map(|line| line.strip_prefix("model name"));
    let model = model.map(|rest| rest.trim_start_matches([':', ' ', '\t']));
    let cpus = cpuinfo
        .lines()
        .filter(|line| line.starts_with("processor"))
        .count();
    let memory = read("/proc/meminfo")?;
    let memory = memory
        .split_whitespace()
        .nth(1)
        .and_then(|kib| kib.parse::<u64>().ok());
    let cgroups = match Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
        true => "v2",
        false => "v1 or hybrid",
    };
    let engine = match engine {
        Engine::Kvm => "kvm",
        _ => "emulated (a software CPU)",
    };
    let first = |program: &str| {
        let output = Invocation::new(program).arg("--version").output();
        let text = output.map(|o| o.text()).unwrap_or_default();
        match text.lines().next() {
            Some(line) => line.to_owned(),
            None => "not installed".into(),
        }
    };
    Ok(vec![
        ("CPU", format!("{cpus} × {}", model.unwrap_or("unknown"))),
        ("memory", format!("{} MiB", memory.unwrap_or(0) >> 10)),
        ("kernel", read("/proc/sys/kernel/osrelease")?.trim().into()),
        ("cgroups", cgroups.into()),
        ("Bulkhead's engine", engine.into()),
        ("Bulkhead", first(&dist.join("bulkhead").to_string_lossy())),
        ("guest kernel", size_of(&dist.join("vmlinux"))),
        ("initramfs", size_of(&dist.join("initramfs.cpio"))),
        ("containerd", first("containerd")),
        ("runc", first("runc")),
        ("crun", first("crun")),
        ("runsc", first("runsc")),
        ("QEMU", first("qemu-system-x86_64")),
    ])
}

fn size_of(file: &Path) -> String {
    let bytes = fs::metadata(file).map_or(0, |m| m.len());
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}
