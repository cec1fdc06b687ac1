//! How a container's first process starts and ends, and the options of its spec.

use bulkhead_harness::{
    Context, Image, Outcome, Run, Suite, Test, ensure, ensure_eq, failure::write, runner::ANY,
    spec, test,
};
use serde_json::json;

use crate::process;

const BUSYBOX: &[Image] = &[Image::Busybox];

/// The cases of this group.
pub const TESTS: &[Test] = &[
    test!(process::exit_codes_come_through, BUSYBOX, ANY),
    test!(process::death_by_signal_is_128_and_its_number, BUSYBOX, ANY),
    test!(process::stdout_and_stderr_stay_apart, BUSYBOX, ANY),
    test!(process::terminal_has_the_clients_size, BUSYBOX, ANY),
    test!(process::terminal_resize_arrives, BUSYBOX, ANY),
    test!(process::terminal_input_reaches_the_process, BUSYBOX, ANY),
    test!(process::user_groups_and_umask_are_the_specs, BUSYBOX, ANY),
    test!(process::hostname_is_the_specs, BUSYBOX, ANY),
    test!(
        process::no_capability_is_left_without_capabilities,
        BUSYBOX,
        ANY
    ),
    test!(process::sysctl_of_the_spec_is_set, BUSYBOX, ANY),
    test!(process::read_only_rootfs_refuses_writes, BUSYBOX, ANY),
    test!(
        process::folder_of_the_host_is_mounted_read_write,
        BUSYBOX,
        ANY
    ),
    test!(
        process::folder_of_the_host_is_mounted_read_only,
        BUSYBOX,
        ANY
    ),
    test!(process::single_files_of_the_host_are_mounted, BUSYBOX, ANY),
    test!(process::tmpfs_of_the_spec_has_its_size, BUSYBOX, ANY),
    test!(process::rootfs_can_be_a_folder_of_the_host, BUSYBOX, ANY),
    test!(
        process::privileged_has_the_capabilities_of_containerd,
        BUSYBOX,
        ANY
    ),
    test!(process::zombies_of_pid_one_are_its_own_affair, BUSYBOX, ANY),
];

fn exit_codes_come_through(suite: &Suite) -> Outcome {
    let codes: &[i32] = match suite.scale.pods_are_cheap() {
        true => &[0, 3, 255],
        false => &[3],
    };
    for &code in codes {
        suite
            .busybox()
            .sh(format!("exit {code}"))
            .output()?
            .expect(code)?;
    }
    Ok(())
}

fn death_by_signal_is_128_and_its_number(suite: &Suite) -> Outcome {
    // The first process of a pid namespace ignores signals it has no handler for, except those from outside.
    for (signal, status) in [("SIGKILL", 137), ("SIGTERM", 143)] {
        let script = "echo up; exec sleep 1000";
        let script = if signal == "SIGTERM" {
            "trap 'exit 143' TERM; echo up; sleep 1000 & wait"
        } else {
            script
        };
        let (pod, running) = suite.busybox().sh(script).attach()?;
        running.wait_for("up", suite.scale.seconds(30))?;
        pod.kill(signal)?.ok()?;
        running.wait()?.expect(status)?;
        pod.delete()?;
    }
    Ok(())
}

fn stdout_and_stderr_stay_apart(suite: &Suite) -> Outcome {
    let output = suite
        .busybox()
        .sh("echo one; echo two >&2")
        .output()?
        .ok()?;
    ensure_eq!("stdout", output.text(), "one");
    ensure_eq!("stderr", output.errors(), "two");
    Ok(())
}

fn terminal_has_the_clients_size(suite: &Suite) -> Outcome {
    let script =
        "sleep 0.5; stty size; test -t 0 && test -t 1 && test -t 2 && echo tty; tty; exit 4";
    let output = suite
        .busybox()
        .terminal(33, 77)
        .sh(script)
        .output()?
        .expect(4)?;
    ensure_eq!(
        "stty, isatty and tty",
        output.text(),
        "33 77\ntty\n/dev/pts/0"
    );
    Ok(())
}

fn terminal_resize_arrives(suite: &Suite) -> Outcome {
    let script = "trap 'stty size; exit 0' WINCH; echo up; while :; do sleep 0.1; done";
    let (pod, running) = suite
        .busybox()
        .terminal(20, 60)
        .input(bulkhead_harness::command::Input::Open)
        .sh(script)
        .attach()?;
    running.wait_for("up", suite.scale.seconds(30))?;
    running.resize_terminal(41, 99)?;
    running.wait_for("41 99", suite.scale.seconds(10))?;
    running.wait()?.ok()?;
    pod.delete()?;
    Ok(())
}

fn terminal_input_reaches_the_process(suite: &Suite) -> Outcome {
    let mut running = suite
        .busybox()
        .terminal(20, 60)
        .input(bulkhead_harness::command::Input::Open)
        .sh("stty -echo; echo up; read line; echo \"<$line>\"; cat >/dev/null; echo end")
        .spawn()?;
    running.wait_for("up", suite.scale.seconds(30))?;
    running.write(b"typed\n\x04")?;
    running.wait_for("end", suite.scale.seconds(10))?;
    let output = running.wait()?.ok()?;
    ensure!(
        output.text().contains("<typed>"),
        "output: {}",
        output.text()
    );
    Ok(())
}

fn of_spec(
    suite: &Suite,
    script: &str,
    change: impl FnOnce(&mut serde_json::Value),
) -> Outcome<String> {
    let mut spec = spec::default(&suite.rootfs()?, &["sh", "-c", script]);
    change(&mut spec);
    Ok(Run::of_spec(suite, &spec)?.output()?.ok()?.text())
}

fn user_groups_and_umask_are_the_specs(suite: &Suite) -> Outcome {
    let script = "id -u; id -g; id -G; umask; grep CapEff /proc/self/status";
    let text = of_spec(suite, script, |spec| {
        spec["process"]["user"] =
            json!({ "uid": 1000, "gid": 1001, "additionalGids": [5, 1002], "umask": 0o27 });
    })?;
    ensure_eq!(
        "id and umask",
        text,
        "1000\n1001\n1001 5 1002\n0027\nCapEff:\t0000000000000000"
    );
    Ok(())
}

fn hostname_is_the_specs(suite: &Suite) -> Outcome {
    let text = of_spec(suite, "hostname", |spec| {
        spec["hostname"] = json!("deck-seven")
    })?;
    ensure_eq!("hostname", text, "deck-seven");
    Ok(())
}

fn no_capability_is_left_without_capabilities(suite: &Suite) -> Outcome {
    let text = of_spec(
        suite,
        "grep Cap /proc/self/status | awk '{print $2}' | sort -u",
        |spec| {
            spec["process"]["capabilities"] = json!({});
        },
    )?;
    ensure_eq!("capability sets", text, "0000000000000000");
    Ok(())
}

fn sysctl_of_the_spec_is_set(suite: &Suite) -> Outcome {
    let text = of_spec(
        suite,
        "cat /proc/sys/net/ipv4/ip_unprivileged_port_start",
        |spec| {
            spec["linux"]["sysctl"] = json!({ "net.ipv4.ip_unprivileged_port_start": "81" });
        },
    )?;
    ensure_eq!("sysctl", text, "81");
    Ok(())
}

fn read_only_rootfs_refuses_writes(suite: &Suite) -> Outcome {
    let script = "touch /x 2>&1; touch /dev/x && echo dev; touch /run/x && echo run";
    let text = suite
        .busybox()
        .flag("--read-only")
        .sh(script)
        .output()?
        .ok()?
        .text();
    ensure!(text.contains("Read-only file system"), "output: {text}");
    ensure!(text.ends_with("dev\nrun"), "output: {text}");
    Ok(())
}

fn folder_of_the_host_is_mounted_read_write(suite: &Suite) -> Outcome {
    let folder = suite.folder("bind-rw")?;
    write(folder.join("from-host"), "host")?;
    let script = "cat /shared/from-host; echo guest >/shared/from-guest; mkdir /shared/d; mv /shared/from-host /shared/d/x";
    let mount = format!(
        "type=bind,src={},dst=/shared,options=rbind:rw",
        folder.display()
    );
    let output = suite.busybox().mount(mount).sh(script).output()?.ok()?;
    ensure_eq!("read", output.text(), "host");
    ensure_eq!(
        "written",
        bulkhead_harness::failure::read(folder.join("from-guest"))?,
        "guest\n"
    );
    ensure_eq!(
        "moved",
        bulkhead_harness::failure::read(folder.join("d/x"))?,
        "host"
    );
    Ok(())
}

fn folder_of_the_host_is_mounted_read_only(suite: &Suite) -> Outcome {
    let folder = suite.folder("bind-ro")?;
    write(folder.join("file"), "host")?;
    let script = "cat /shared/file; touch /shared/x 2>&1 || rm /shared/file 2>&1";
    let mount = format!(
        "type=bind,src={},dst=/shared,options=rbind:ro",
        folder.display()
    );
    let output = suite
        .busybox()
        .mount(mount)
        .sh(script)
        .output()?
        .expect(1)?;
    ensure!(
        output.text().starts_with("host"),
        "output: {}",
        output.text()
    );
    ensure_eq!(
        "refusals",
        output.text().matches("Read-only file system").count(),
        2
    );
    ensure!(
        folder.join("file").exists() && !folder.join("x").exists(),
        "the folder changed"
    );
    Ok(())
}

fn single_files_of_the_host_are_mounted(suite: &Suite) -> Outcome {
    let folder = suite.folder("bind-file")?;
    write(folder.join("ro"), "fixed")?;
    write(folder.join("rw"), "old")?;
    let mount = |name: &str, at: &str| {
        format!(
            "type=bind,src={}/{name},dst={at},options=rbind:{name}",
            folder.display()
        )
    };
    let script = "cat /etc/made; echo new >/etc/also; (echo x >/etc/made) 2>&1 | grep -c Read-only; ls /etc/secret 2>&1 | wc -l";
    write(folder.join("secret"), "")?;
    let run = suite
        .busybox()
        .mount(mount("ro", "/etc/made"))
        .mount(mount("rw", "/etc/also"));
    let output = run.sh(script).output()?.ok()?;
    ensure_eq!("output", output.text(), "fixed1\n1");
    ensure_eq!(
        "written",
        bulkhead_harness::failure::read(folder.join("rw"))?,
        "new\n"
    );
    Ok(())
}

fn tmpfs_of_the_spec_has_its_size(suite: &Suite) -> Outcome {
    let script = "grep ' /scratch ' /proc/mounts | cut -d' ' -f3; dd if=/dev/zero of=/scratch/x bs=1k count=2000 2>&1 | grep -c 'No space'; stat -c %a /scratch";
    let mount = "type=tmpfs,src=tmpfs,dst=/scratch,options=size=1m:mode=1770:nosuid";
    let output = suite.busybox().mount(mount).sh(script).output()?.ok()?;
    ensure_eq!("kind, full, mode", output.text(), "tmpfs\n1\n1770");
    Ok(())
}

fn rootfs_can_be_a_folder_of_the_host(suite: &Suite) -> Outcome {
    let rootfs = suite.rootfs()?;
    let run = Run::of_folder(suite, &rootfs).args(&[
        "/bin/sh",
        "-c",
        "echo kept >/tmp/kept; read c </proc/1/comm; echo $c",
    ]);
    ensure_eq!("comm", run.output()?.ok()?.text(), "sh");
    ensure_eq!(
        "file",
        bulkhead_harness::failure::read(rootfs.join("tmp/kept"))?,
        "kept\n"
    );
    Ok(())
}

fn privileged_has_the_capabilities_of_containerd(suite: &Suite) -> Outcome {
    let own = bulkhead_harness::failure::read("/proc/self/status")?;
    let own = own
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .context("no CapEff")?;
    let script = "grep CapEff /proc/self/status | awk '{print $2}'; mkdir /m; mount -t tmpfs x /m && echo mounted";
    let run = suite.busybox().flag("--privileged").sh(script);
    ensure_eq!(
        "capabilities and mount",
        run.output()?.ok()?.text(),
        format!("{}\nmounted", own.trim())
    );
    Ok(())
}

fn zombies_of_pid_one_are_its_own_affair(suite: &Suite) -> Outcome {
    // Orphans are PID 1's children; a shell reaps them.
    let script = "(sleep 0.1 & ) ; (sleep 0.1 & ); sleep 0.5; wait; ps -o stat | grep -c Z; exit 0";
    ensure_eq!(
        "zombies",
        suite.busybox().sh(script).output()?.ok()?.text(),
        "0"
    );
    Ok(())
}
