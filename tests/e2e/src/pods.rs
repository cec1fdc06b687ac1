//! Many pods: one after another, at once, in any order.

use bulkhead_harness::{
    Image, Outcome, Pod, Suite, Test, ensure, ensure_eq, runner::ANY, runner::MACHINES, test,
};

use crate::pods;

const BUSYBOX: &[Image] = &[Image::Busybox];

/// The cases of this group.
pub const TESTS: &[Test] = &[
    test!(pods::many_one_after_another, BUSYBOX, ANY),
    test!(pods::many_at_once, BUSYBOX, ANY),
    test!(pods::deleted_in_any_order, BUSYBOX, ANY),
    test!(pods::killed_at_once, BUSYBOX, ANY),
    test!(pods::each_has_a_machine_of_its_own, BUSYBOX, MACHINES),
    test!(
        pods::size_of_the_machine_follows_the_annotations,
        BUSYBOX,
        MACHINES
    ),
];

fn many_one_after_another(suite: &Suite) -> Outcome {
    for round in 0..suite.scale.pods {
        let output = suite
            .busybox()
            .sh(format!("echo {round}; exit {}", round % 5))
            .output()?;
        ensure_eq!(
            "output",
            output.expect((round % 5) as i32)?.text(),
            round.to_string()
        );
    }
    Ok(())
}

fn many_at_once(suite: &Suite) -> Outcome {
    let mut running = Vec::new();
    for index in 0..suite.scale.pods_at_once {
        let run = suite
            .busybox()
            .sh(format!("echo {index}; exit {index}"))
            .seconds(15 * suite.scale.pods_at_once);
        running.push(run.spawn()?);
    }
    for (index, running) in running.into_iter().enumerate() {
        ensure_eq!(
            "output",
            running.wait()?.expect(index as i32)?.text(),
            index.to_string()
        );
    }
    Ok(())
}

fn deleted_in_any_order(suite: &Suite) -> Outcome {
    let start = |_| suite.busybox().sh("sleep 1000").detach();
    let mut pods = (0..3).map(start).collect::<Outcome<Vec<_>>>()?;
    for index in [1, 1, 0] {
        let pod = pods.remove(index);
        ensure_eq!("exit status", pod.end()?, 137);
        for pod in &pods {
            ensure_eq!("the others", pod.sh("echo on")?, "on");
        }
    }
    Ok(())
}

/// As many kills as there may be for one pod after another: only the first ones find it alive.
fn killed_at_once(suite: &Suite) -> Outcome {
    let start = |_| suite.busybox().sh("sleep 1000").detach();
    let pods = (0..suite.scale.pods_at_once)
        .map(start)
        .collect::<Outcome<Vec<_>>>()?;
    let kill = |pod: &Pod<'_>| pod.task(&["kill", "-s", "SIGKILL"]).spawn();
    let kills = pods.iter().cycle().take(suite.scale.kills_at_once as usize);
    let kills = kills.map(kill).collect::<Outcome<Vec<_>>>()?;
    let mut killed = vec![false; pods.len()];
    for (index, kill) in kills.into_iter().enumerate() {
        let output = kill.wait()?;
        match output.status {
            0 => killed[index % pods.len()] = true,
            _ => ensure!(
                output.errors().contains("not found"),
                "kill {index}: {}",
                output.errors()
            ),
        }
    }
    ensure!(
        killed.iter().all(|killed| *killed),
        "no kill of a pod worked: {killed:?}"
    );
    for pod in pods {
        ensure_eq!("exit status", pod.delete()?, 137);
    }
    Ok(())
}

fn each_has_a_machine_of_its_own(suite: &Suite) -> Outcome {
    let one = suite.busybox().sh("sleep 1000").detach()?;
    let two = suite.busybox().sh("sleep 1000").detach()?;
    let boot = "cat /proc/sys/kernel/random/boot_id";
    ensure!(one.sh(boot)? != two.sh(boot)?, "two pods share a kernel");
    for pod in [&one, &two] {
        for name in ["containerd-shim", "bulkhead-vmm", "bulkhead-fs"] {
            pod.process(name)?;
        }
    }
    two.end()?;
    one.end()?;
    Ok(())
}

fn size_of_the_machine_follows_the_annotations(suite: &Suite) -> Outcome {
    let script = "nproc; awk '/MemTotal/ {print int($2/1024)}' /proc/meminfo";
    let run = suite
        .busybox()
        .flags(&["--annotation", "io.bulkhead.vcpus=2"]);
    let run = run.flags(&["--annotation", "io.bulkhead.memory_mib=256"]);
    let text = run.sh(script).output()?.ok()?.text();
    let numbers: Vec<u64> = text.lines().filter_map(|l| l.parse().ok()).collect();
    ensure_eq!("vCPUs", numbers.first(), Some(&2));
    ensure!(
        numbers.get(1).is_some_and(|mib| (180..=256).contains(mib)),
        "memory: {text}"
    );
    Ok(())
}
