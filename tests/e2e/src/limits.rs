//! Limits of a container's resources.

use bulkhead_harness::{
    Engine, Image, Outcome, Run, Suite, Test, ensure, ensure_eq, events::Events, runner::MACHINES,
    spec, test,
};
use serde_json::json;

use crate::limits;

const BUSYBOX: &[Image] = &[Image::Busybox];

/// The cases of this group. The files are those of cgroup v2, which the guest has on every host.
pub const TESTS: &[Test] = &[
    test!(
        limits::memory_and_cpu_limits_stand_in_the_cgroup,
        BUSYBOX,
        MACHINES
    ),
    test!(limits::pids_limit_refuses_more_processes, BUSYBOX, MACHINES),
    test!(
        limits::memory_beyond_the_limit_is_killed_and_reported,
        BUSYBOX,
        bulkhead_harness::runner::ANY
    ),
];

fn memory_and_cpu_limits_stand_in_the_cgroup(suite: &Suite) -> Outcome {
    let script = "cd /sys/fs/cgroup$(cut -d: -f3 /proc/self/cgroup) 2>/dev/null; test -e memory.max || cd /sys/fs/cgroup; cat memory.max cpu.max cpu.weight";
    let output = suite
        .busybox()
        .mount("type=cgroup,src=cgroup,dst=/sys/fs/cgroup,options=ro:nosuid:noexec:nodev")
        .flags(&[
            "--memory-limit",
            "67108864",
            "--cpus",
            "0.5",
            "--cpu-shares",
            "512",
        ])
        .sh(script)
        .output()?
        .ok()?;
    let text = output.text();
    let lines: Vec<&str> = text.lines().collect();
    ensure_eq!(
        "memory.max and cpu.max",
        lines.get(..2),
        Some(&["67108864", "50000 100000"][..])
    );
    // 1 + ((512 - 2) * 9999) / 262142, as the OCI runtime specification converts shares.
    ensure!(
        matches!(lines.get(2), Some(&"20" | &"59" | &"50")),
        "cpu.weight: {text}"
    );
    Ok(())
}

fn pids_limit_refuses_more_processes(suite: &Suite) -> Outcome {
    let script = "for i in 1 2 3 4 5 6 7 8 9; do sleep 5 & done 2>&1; wait";
    let mut spec = spec::default(&suite.rootfs()?, &["sh", "-c", script]);
    spec["linux"]["resources"] = json!({ "pids": { "limit": 5 } });
    let output = Run::of_spec(suite, &spec)?.output()?;
    let text = format!("{}{}", output.text(), output.errors());
    ensure!(text.contains("can't fork"), "output: {text}");
    Ok(())
}

fn memory_beyond_the_limit_is_killed_and_reported(suite: &Suite) -> Outcome {
    let events = Events::subscribe(suite)?;
    let script = "echo up; exec tail -c 200m /dev/zero";
    let run = suite
        .busybox()
        .flags(&["--memory-limit", "25165824"])
        .sh(script);
    let name = run.name().to_owned();
    run.output()?.expect(137)?;
    if suite.engine != Engine::Runc {
        events.wait_for(&name, "/tasks/oom", suite.scale.seconds(3))?;
    }
    Ok(())
}
