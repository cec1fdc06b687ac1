//! Limits of `docker run` and `docker update`, seen in the guest and by `docker stats`.

use bulkhead_harness::{
    Outcome, Suite, Test, ensure, ensure_eq,
    runner::{ANY, MACHINES},
    test,
};

use super::{BUSYBOX, SMALL, call, inside, inspect, start, text};
use crate::{docker, network::until};

/// The cases of this group.
pub const TESTS: &[Test] = &[
    test!(docker::limits::hold_are_shown_and_change, BUSYBOX, MACHINES)
        .docker()
        .fast_host(),
    test!(docker::limits::out_of_memory_is_told, BUSYBOX, ANY)
        .docker()
        .fast_host(),
];

/// Files of the container's cgroup: the host's Docker may show them below the root of the mount.
fn cgroup(suite: &Suite, name: &str, files: &str) -> Outcome<String> {
    let script = format!("cd /sys/fs/cgroup$(cut -d: -f3 /proc/self/cgroup) && cat {files}");
    inside(suite, name, &script)
}

fn hold_are_shown_and_change(suite: &Suite) -> Outcome {
    let made = start(
        suite,
        "limited",
        &[
            "--cpus=1.5",
            "--cpuset-cpus=1",
            "--memory=128m",
            "--memory-swap=128m",
            "--pids-limit=20",
            SMALL,
            "sh",
            "-c",
            "head -c 20000000 /dev/zero >/dev/shm/x; exec sleep 1000000",
        ],
    )?;
    let written = "until [ $(stat -c %s /dev/shm/x) = 20000000 ]; do sleep 0.1; done";
    inside(suite, "limited", written)?;
    let files = "cpu.max cpuset.cpus memory.max memory.swap.max pids.max";
    let before = cgroup(suite, "limited", files)?;
    ensure_eq!(
        "limits",
        before,
        format!("150000 100000\n0\n{}\n0\n20", 128 << 20)
    );
    // One CPU of the two that a machine for 1.5 has.
    let cpus = "nproc; cat /sys/devices/system/cpu/online";
    ensure_eq!("CPUs", inside(suite, "limited", cpus)?, "1\n0-1");
    let said = text(
        suite,
        &[
            "update",
            "--cpus=0.5",
            "--memory=96m",
            "--memory-swap=96m",
            "limited",
        ],
    )?;
    ensure_eq!("docker update", said, "limited");
    let files = "cpu.max memory.max memory.swap.max";
    let after = cgroup(suite, "limited", files)?;
    ensure_eq!(
        "after update",
        after,
        format!("50000 100000\n{}\n0", 96 << 20)
    );

    text(
        suite,
        &["exec", "-d", "limited", "sh", "-c", "while :; do :; done"],
    )?;
    // The first figure is since the start of the loop, the later ones are of a second.
    let mut seen = String::new();
    until(
        suite.scale.seconds(20),
        "docker stats shows half a CPU",
        || {
            let format = "{{.CPUPerc}} {{.MemUsage}} {{.PIDs}}";
            seen = text(
                suite,
                &["stats", "--no-stream", "--format", format, "limited"],
            )?;
            let cpu = seen.split('%').next().and_then(|n| n.parse::<f64>().ok());
            Ok(cpu.is_some_and(|cpu| (30.0..65.0).contains(&cpu)))
        },
    )
    .map_err(|error| format!("{error}: {seen}"))?;
    let words: Vec<&str> = seen.split(' ').skip(1).collect();
    let [used, "/", "96MiB", "2"] = words.as_slice() else {
        return Err(format!("docker stats: {seen}").into());
    };
    let used: f64 = used.trim_end_matches("MiB").parse().unwrap_or(0.0);
    ensure!((19.0..40.0).contains(&used), "20 MB in use: {seen}");
    let forks = "for i in $(seq 40); do sleep 10 & done";
    call(suite, &["exec", "limited", "sh", "-c", forks])?
        .output()?
        .refused(&["can't fork: Resource temporarily unavailable"])?;
    drop(made);
    Ok(())
}

fn out_of_memory_is_told(suite: &Suite) -> Outcome {
    let made = start(
        suite,
        "greedy",
        &["--memory=32m", SMALL, "sh", "-c", "exec tail /dev/zero"],
    )?;
    let status = text(suite, &["wait", "greedy"])?;
    ensure_eq!("docker wait", status, "137");
    let mut seen = String::new();
    until(suite.scale.seconds(5), "OOMKilled", || {
        seen = inspect(suite, "greedy", "{{.State.OOMKilled}} {{.State.ExitCode}}")?;
        Ok(seen == "true 137")
    })
    .map_err(|error| format!("{error}: {seen}"))?;
    drop(made);
    Ok(())
}
