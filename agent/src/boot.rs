//! What the machine needs before the agent can serve: mounts, cgroups, loopback.

use std::{fs, io, path::Path};

use rustix::{
    io::Errno,
    mount::{MountFlags, UnmountFlags},
    process::{Resource, Rlimit, setrlimit},
};

use crate::{
    error::{Context, Result},
    sys,
};

/// Where the host's trees are (virtio-fs, tag `pod`).
pub const TREES: &str = "/run/bulkhead/trees";
/// Where a container's rootfs is mounted, in its own mount namespace.
pub const ROOTFS: &str = "/run/bulkhead/rootfs";
/// Parent of the containers' cgroups.
pub const PODS: &str = "/sys/fs/cgroup/pods";

/// Descriptors that the agent may have; the kernel's own maximum (fs.nr_open).
const DESCRIPTORS_MAX: u64 = 1 << 20;

/// virtio-fs tag of the trees.
const TAG: &str = "pod";

/// Does all of it.
pub fn boot() -> Result<()> {
    // Mounts, pipes and sockets of many containers are held at once. Their processes get limits of their own.
    let most = Rlimit {
        current: Some(DESCRIPTORS_MAX),
        maximum: Some(DESCRIPTORS_MAX),
    };
    setrlimit(Resource::Nofile, most).step(|| "raise the limit of descriptors".into())?;
    leave_rootfs()?;
    let none = MountFlags::empty();
    let safe = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount("proc", "/proc", safe, "")?;
    mount("sysfs", "/sys", safe, "")?;
    mount("devtmpfs", "/dev", MountFlags::NOSUID, "mode=755")?;
    mount(
        "devpts",
        "/dev/pts",
        MountFlags::NOSUID | MountFlags::NOEXEC,
        "mode=620,ptmxmode=666",
    )?;
    mount(
        "tmpfs",
        "/dev/shm",
        MountFlags::NOSUID | MountFlags::NODEV,
        "mode=1777",
    )?;
    mount("mqueue", "/dev/mqueue", safe, "")?;
    mount(
        "tmpfs",
        "/run",
        MountFlags::NOSUID | MountFlags::NODEV,
        "mode=755",
    )?;
    mount(
        "tmpfs",
        "/tmp",
        MountFlags::NOSUID | MountFlags::NODEV,
        "mode=1777",
    )?;
    mount("cgroup2", "/sys/fs/cgroup", safe, "nsdelegate")?;
    enable_controllers(Path::new("/sys/fs/cgroup"))?;
    fs::create_dir(PODS).step(|| format!("make {PODS}"))?;
    enable_controllers(Path::new(PODS))?;
    fs::create_dir_all(ROOTFS).step(|| format!("make {ROOTFS}"))?;
    fs::create_dir_all(TREES).step(|| format!("make {TREES}"))?;
    rustix::mount::mount(TAG, TREES, "virtiofs", none, None)
        .step(|| format!("mount virtio-fs tag \"{TAG}\" on {TREES}"))?;
    // What a CPU holds back of free pages the host does not get back: 0.5 MiB in place of 3.
    let fraction = "/proc/sys/vm/percpu_pagelist_high_fraction";
    fs::write(fraction, "1000").step(|| format!("write {fraction}"))?;
    sys::loopback_up().step(|| "bring loopback up".into())?;
    rustix::system::sethostname(b"bulkhead").step(|| "set the hostname".into())
}

/// Puts a bind mount of the initramfs above it: `pivot_root` does not work on the initial root itself.
fn leave_rootfs() -> Result<()> {
    let at = "/mnt";
    make_folder(at)?;
    rustix::mount::mount_bind("/", at).step(|| "bind the initial root".into())?;
    // The agent runs from the initial root, and so do its copies: a container that gets hold of one by /proc/PID/exe
    // must not write to the program.
    rustix::mount::mount_remount("/", MountFlags::BIND | MountFlags::RDONLY, "")
        .step(|| "make the initial root read-only".into())?;
    rustix::process::chdir(at).step(|| format!("enter {at}"))?;
    rustix::mount::mount_move(".", "/").step(|| "move the root".into())?;
    rustix::process::chroot(".").step(|| "enter the root".into())?;
    rustix::process::chdir("/").step(|| "enter /".into())
}

fn make_folder(path: &str) -> Result<()> {
    match fs::create_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            Err(error).step(|| format!("make {path}"))
        }
        _ => Ok(()),
    }
}

fn mount(kind: &str, at: &str, flags: MountFlags, data: &str) -> Result<()> {
    make_folder(at)?;
    let data = std::ffi::CString::new(data).unwrap_or_default();
    match rustix::mount::mount(kind, at, kind, flags, data.as_c_str()) {
        // The kernel has mounted it itself.
        Err(Errno::BUSY) => Ok(()),
        other => other.step(|| format!("mount {kind} on {at}")),
    }
}

fn enable_controllers(folder: &Path) -> Result<()> {
    let what = || format!("enable the controllers of {}", folder.display());
    let available = fs::read_to_string(folder.join("cgroup.controllers")).step(what)?;
    let all: Vec<String> = available
        .split_whitespace()
        .map(|name| format!("+{name}"))
        .collect();
    fs::write(folder.join("cgroup.subtree_control"), all.join(" ")).step(what)
}

/// Lets go of the trees, so that the host's file server sees every file closed.
pub fn release_trees() {
    rustix::fs::sync();
    let _ = rustix::mount::unmount(TREES, UnmountFlags::DETACH);
}
