//! The processes that run the guest: the VMM, and the emulator where there is one.

use std::{thread::sleep, time::Duration};

use bulkhead_harness::{
    Context, Engine, Image, Outcome, Pod, Suite, ensure, ensure_eq,
    failure::read,
    network as net,
    process::{Process, parent},
};
use rustix::process::Signal;

use super::{Posture, tell};
use crate::survival;

/// `bulkhead-vmm`: a user of this pod alone, no capability, nothing that it could name.
const VMM: Posture = Posture {
    capabilities: &[],
    bounding: &[],
    // Its network is the pod's.
    apart: &["pid", "ipc", "uts", "mnt", "net"],
    mounts: &[("/", "tmpfs", "ro,nosuid,nodev,noexec")],
    root: &[],
    descriptors: &[
        "/dev/null",
        "/dev/kvm",
        "/dev/net/tun",
        "/dev/vhost-net",
        // Memory of the emulator's guest.
        "/memfd:memory-backend-memfd",
        "anon_inode:[eventfd]",
        "anon_inode:[eventpoll]",
        // A network's rate.
        "anon_inode:[timerfd]",
        // The emulator.
        "anon_inode:[pidfd]",
        "anon_inode:kvm-vm",
        "anon_inode:kvm-vcpu",
        "pipe:",
        "socket:",
    ],
    trees: false,
    listens: &["control.sock", "vsock.sock"],
    limits: &[
        ("Max core file size", "0"),
        ("Max file size", "2097152"),
        ("Max processes", "1024"),
        ("Max open files", "16384"),
        ("Max msgqueue size", "0"),
    ],
    // No clone3; the process's; the thread's own.
    filters: 3,
    threads: &["bulkhead-vmm", "threads", "control", "rng", "vsock", "fs"],
    further: &[
        "container",
        "vcpu",
        "balloon",
        "n",
        "n0",
        "n1",
        "n2",
        "n3",
        "net-control",
        "console",
        "emulator",
        "emulator-err",
        "vhost-rng",
        "vhost-vsock",
        "vhost-fs",
        "vhost-net",
        // The kernel's own, counted as the process's.
        "kvm-nx-lpage-re",
        "vhost",
    ],
    starter: "threads",
};

/// QEMU: no wall, and yet nobody on the host. The capabilities are those of its change of root and user, which it has made.
const EMULATOR: Posture = Posture {
    capabilities: &[],
    bounding: &[6, 7, 18],
    apart: &["pid", "ipc", "uts", "mnt", "net"],
    // None from where its root is.
    mounts: &[],
    root: &[],
    descriptors: &[
        "/dev/null",
        "/memfd:memory-backend-memfd",
        "anon_inode:[eventfd]",
        "anon_inode:[eventpoll]",
        "anon_inode:[signalfd]",
        "pipe:",
        "socket:",
    ],
    trees: false,
    listens: &[],
    limits: &[
        ("Max core file size", "0"),
        ("Max processes", "1024"),
        ("Max open files", "16384"),
        ("Max msgqueue size", "0"),
    ],
    // Its own.
    filters: 1,
    threads: &[],
    further: &[],
    starter: "",
};

fn user_of(suite: &Suite, pod: &Pod<'_>) -> Outcome<u32> {
    let text = read(suite.state_of(pod.name()).join("uid"))?;
    text.trim().parse().context("the pod's user")
}

fn jail(suite: &Suite, pod: &Pod<'_>, when: &str) -> Outcome {
    let tell = |what: &str, e| format!("{when}, {what}: {e}");
    let state = suite.state_of(pod.name());
    let files = ["vmm.log", "exit.json"].map(|name| state.join(name).display().to_string());
    let uid = user_of(suite, pod)?;
    let vmm = pod.process("bulkhead-vmm")?;
    VMM.check(pod, &vmm, uid, &files)
        .map_err(|e| tell("VMM", e))?;
    let emulator = emulator(suite, pod, &vmm)?;
    if let Some(emulator) = &emulator {
        EMULATOR
            .check(pod, emulator, uid, &[])
            .map_err(|e| tell("emulator", e))?;
    }
    Ok(())
}

fn emulator(suite: &Suite, pod: &Pod<'_>, vmm: &Process) -> Outcome<Option<Process>> {
    if suite.engine != Engine::Emulated {
        return Ok(None);
    }
    let emulator = pod.process("qemu-system-")?;
    ensure_eq!("the emulator's parent", parent(emulator.pid), Some(vmm.pid));
    Ok(Some(emulator))
}

pub fn the_jail_is_as_written(suite: &Suite) -> Outcome {
    let pod = suite
        .busybox()
        .flags(&["--annotation", "io.bulkhead.memory_mib=128"])
        .sh("sleep 1000")
        .detach()?;
    jail(suite, &pod, "at rest")?;
    let load = pod.exec(&[
        "sh",
        "-c",
        "echo busy; while :; do dd if=/dev/zero of=/file bs=64k count=64 conv=fsync 2>/dev/null; \
         ls -R / >/dev/null 2>&1; echo -n x >&2; done",
    ]);
    let load = load.spawn()?;
    load.wait_for("busy", suite.scale.seconds(30))?;
    for _ in 0..10 {
        jail(suite, &pod, "under load")?;
        sleep(Duration::from_millis(50));
    }
    let of_pod = format!("io.kubernetes.cri.sandbox-id={}", pod.name());
    let member = suite
        .busybox()
        .flags(&["--annotation", &of_pod])
        .flags(&["--memory-limit", "268435456"])
        .sh("sleep 1000")
        .detach()?;
    jail(suite, &pod, "with another container in a larger machine")?;
    survival::kill(suite, &pod, Signal::KILL)?;
    ensure_eq!("said after the shim's end", pod.sh("echo here")?, "here");
    jail(suite, &pod, "with another shim")?;
    drop(load);
    member.end()?;
    jail(suite, &pod, "after the container's end")?;
    let other = suite.busybox().sh("sleep 1000").detach()?;
    jail(suite, &other, "another pod")?;
    let (one, two) = (user_of(suite, &pod)?, user_of(suite, &other)?);
    ensure!(one != two, "two pods have user {one}");
    other.end()?;
    let vmm = pod.process("bulkhead-vmm")?;
    tell("VMM", &vmm)?;
    if let Some(emulator) = emulator(suite, &pod, &vmm)? {
        tell("emulator", &emulator)?;
    }
    pod.end()?;
    Ok(())
}

pub fn the_jail_is_as_written_with_networks(suite: &Suite) -> Outcome {
    let network = suite.network()?;
    let mut plug = network.pod()?;
    let [flag, value] = plug.flag();
    let run = suite.run(Image::Net).flag(flag).flag(value);
    let pod = run.args(&["sleep", "1000"]).detach()?;
    jail(suite, &pod, "with a network")?;
    let second = net::single(
        "posture",
        serde_json::json!({ "type": "ptp" }),
        &["10.93.0.0/24"],
    );
    plug.add(&second, "net1", &[])?;
    let ping =
        "for i in 1 2 3 4 5 6 7 8 9; do ping -c 1 -W 5 10.93.0.1 && exit; sleep 1; done; exit 1";
    pod.sh(ping)?;
    jail(suite, &pod, "with another network")?;
    survival::kill(suite, &pod, Signal::KILL)?;
    plug.remove("net1")?;
    let gone = "while ip link show net1 >/dev/null 2>&1; do sleep 0.1; done";
    pod.sh(gone)?;
    jail(suite, &pod, "after the network")?;
    pod.end()?;
    plug.end()?;
    let folder = "/var/lib/cni/networks/posture";
    network.host(&["rm", "-r", folder]).output()?.ok().map(drop)
}
