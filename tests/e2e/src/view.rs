//! What a process sees in a container of the default spec: one container answers most of these claims.

use bulkhead_harness::{
    Context, Engine, Image, Outcome, Suite, Test, ensure, ensure_eq, runner::ANY, runner::MACHINES,
    spec, test,
};

const BUSYBOX: &[Image] = &[Image::Busybox];

/// The cases of this group.
pub const TESTS: &[Test] = &[
    test!(view::kernel_is_the_guests_own, BUSYBOX, MACHINES),
    test!(view::pid_one_is_the_containers_process, BUSYBOX, ANY),
    test!(view::environment_arguments_and_folder_arrive, BUSYBOX, ANY),
    test!(view::missing_working_folder_is_created, BUSYBOX, ANY),
    test!(view::capabilities_are_those_of_the_spec, BUSYBOX, ANY),
    test!(view::no_new_privileges_is_set, BUSYBOX, ANY),
    test!(view::open_file_limit_is_the_specs, BUSYBOX, ANY),
    test!(view::masked_paths_are_empty, BUSYBOX, ANY),
    test!(view::read_only_paths_refuse_writes, BUSYBOX, ANY),
    test!(view::mounts_are_those_of_the_spec, BUSYBOX, ANY),
    test!(view::devices_of_the_default_set_work, BUSYBOX, ANY),
    test!(view::network_namespace_has_loopback_only, BUSYBOX, ANY),
    test!(
        view::only_the_containers_processes_are_visible,
        BUSYBOX,
        ANY
    ),
    test!(view::guest_shows_no_kernel_warning, BUSYBOX, MACHINES),
];

use crate::view;

const SCRIPT: &str = r#"
section() { echo "=== $1"; }
section uname; uname -r
section comm; cat /proc/1/comm
section args; for a in "$0" "$@"; do echo "[$a]"; done
section env; env | sort
section cwd; pwd
section status; cat /proc/self/status
section nofile; ulimit -n; ulimit -Hn
section masked; for f in /proc/keys /proc/timer_list /proc/kcore /proc/sched_debug; do
  [ -e $f ] && echo "$f $(head -c 100 $f 2>/dev/null | wc -c)"; done; ls /sys/firmware | wc -l
section readonly; for f in /proc/sys/kernel/hostname /proc/sysrq-trigger /proc/irq/x /sys/x; do
  (echo x >$f) 2>&1 | sed 's/.*: //'; done
section mounts; cat /proc/mounts
section devices; echo lost >/dev/null; head -c 5 /dev/zero | wc -c; head -c 5 /dev/urandom | wc -c
  (echo x >/dev/full) 2>&1 | sed 's/.*: //'; ls -l /dev/ptmx /dev/fd /dev/stdout | awk '{print $NF}'
section links; ls /sys/class/net; cat /sys/class/net/lo/flags; ping -c 1 -W 2 127.0.0.1 >/dev/null && echo pong
section ps; ps -o pid,comm
section end
"#;

fn probe(suite: &Suite) -> Outcome<&str> {
    suite.once(|| {
        let output = suite
            .busybox()
            .flags(&["--env", "GREETING=hello world", "--env", "EMPTY="])
            .flags(&["--cwd", "/made/for/this"])
            .args(&["sh", "-c", SCRIPT, "zero", "with space", "", "$HOME*"])
            .output()?
            .ok()?;
        Ok(output.text())
    })
}

fn section<'a>(suite: &'a Suite, name: &str) -> Outcome<&'a str> {
    let text = probe(suite)?;
    let head = format!("=== {name}\n");
    let start = text
        .find(&head)
        .context(format_args!("no section {name} in {text}"))?
        + head.len();
    let rest = text.get(start..).unwrap_or("");
    Ok(rest.split("=== ").next().unwrap_or("").trim_end())
}

fn status<'a>(suite: &'a Suite, key: &str) -> Outcome<&'a str> {
    let text = section(suite, "status")?;
    let line = text
        .lines()
        .find_map(|l| l.strip_prefix(key)?.strip_prefix(':'));
    Ok(line.context(format_args!("no {key} in {text}"))?.trim())
}

fn kernel_is_the_guests_own(suite: &Suite) -> Outcome {
    let host = bulkhead_harness::failure::read("/proc/sys/kernel/osrelease")?;
    let guest = section(suite, "uname")?;
    ensure!(
        guest != host.trim(),
        "the container runs on the host's kernel {guest}"
    );
    ensure!(guest.starts_with("6."), "unexpected kernel {guest}");
    Ok(())
}

fn pid_one_is_the_containers_process(suite: &Suite) -> Outcome {
    ensure_eq!("/proc/1/comm", section(suite, "comm")?, "sh");
    Ok(())
}

fn environment_arguments_and_folder_arrive(suite: &Suite) -> Outcome {
    ensure_eq!(
        "arguments",
        section(suite, "args")?,
        "[zero]\n[with space]\n[]\n[$HOME*]"
    );
    let env = section(suite, "env")?;
    for line in ["GREETING=hello world", "EMPTY="] {
        ensure!(env.lines().any(|l| l == line), "no {line} in {env}");
    }
    ensure!(
        env.contains("PATH=/usr/local/sbin"),
        "no PATH of the image in {env}"
    );
    ensure!(
        !env.contains("BULKHEAD"),
        "a variable of the runtime is in {env}"
    );
    Ok(())
}

fn missing_working_folder_is_created(suite: &Suite) -> Outcome {
    ensure_eq!("pwd", section(suite, "cwd")?, "/made/for/this");
    Ok(())
}

fn capabilities_are_those_of_the_spec(suite: &Suite) -> Outcome {
    ensure_eq!(
        "number of default capabilities",
        spec::CAPABILITIES.len(),
        14
    );
    for set in ["CapPrm", "CapEff", "CapBnd"] {
        ensure_eq!(set, status(suite, set)?, "00000000a80425fb");
    }
    ensure_eq!("CapAmb", status(suite, "CapAmb")?, "0000000000000000");
    Ok(())
}

fn no_new_privileges_is_set(suite: &Suite) -> Outcome {
    ensure_eq!("NoNewPrivs", status(suite, "NoNewPrivs")?, "1");
    Ok(())
}

fn open_file_limit_is_the_specs(suite: &Suite) -> Outcome {
    ensure_eq!(
        "soft and hard limit",
        section(suite, "nofile")?,
        "1024\n1024"
    );
    Ok(())
}

fn masked_paths_are_empty(suite: &Suite) -> Outcome {
    let text = section(suite, "masked")?;
    for line in text.lines() {
        ensure!(
            line.ends_with(" 0") || line == "0",
            "masked path has content: {line}"
        );
    }
    Ok(())
}

fn read_only_paths_refuse_writes(suite: &Suite) -> Outcome {
    let text = section(suite, "readonly")?;
    ensure_eq!("writes", text.lines().count(), 4);
    for line in text.lines() {
        ensure!(
            line.contains("Read-only") || line.contains("nonexistent") || line.contains("denied"),
            "a write to a read-only path: {line}"
        );
    }
    ensure!(
        text.starts_with("Read-only"),
        "/proc/sys is writable: {text}"
    );
    Ok(())
}

fn mounts_are_those_of_the_spec(suite: &Suite) -> Outcome {
    let text = section(suite, "mounts")?;
    for (point, kind, options) in [
        ("/", "overlay", "rw"),
        ("/proc", "proc", "rw,nosuid,nodev,noexec"),
        ("/dev", "tmpfs", "nosuid,size=65536k,mode=755"),
        ("/dev/pts", "devpts", "gid=5,mode=620,ptmxmode=666"),
        ("/dev/shm", "tmpfs", "size=65536k"),
        ("/dev/mqueue", "mqueue", "nosuid"),
        ("/sys", "sysfs", "ro,nosuid,nodev,noexec"),
        ("/run", "tmpfs", "nosuid"),
        ("/proc/sys", "proc", "ro"),
    ] {
        let found = text.lines().find(|line| {
            let words: Vec<&str> = line.split(' ').collect();
            words.get(1) == Some(&point)
                && words.get(2) == Some(&kind)
                && options.split(',').all(|option| {
                    words
                        .get(3)
                        .is_some_and(|o| o.split(',').any(|o| o == option))
                })
        });
        ensure!(
            found.is_some(),
            "no mount {kind} on {point} with {options} in\n{text}"
        );
    }
    let machine = suite.engine != Engine::Runc;
    ensure!(
        !(machine && text.contains("virtiofs")),
        "the tree share is visible in\n{text}"
    );
    Ok(())
}

fn devices_of_the_default_set_work(suite: &Suite) -> Outcome {
    let expected = "5\n5\nNo space left on device\n/proc/self/fd\npts/ptmx\n/proc/self/fd/1";
    ensure_eq!(
        "devices",
        section(suite, "devices")?.replace("write error: ", ""),
        expected
    );
    Ok(())
}

fn network_namespace_has_loopback_only(suite: &Suite) -> Outcome {
    ensure_eq!(
        "links, flags (up), ping",
        section(suite, "links")?,
        "lo\n0x9\npong"
    );
    Ok(())
}

fn only_the_containers_processes_are_visible(suite: &Suite) -> Outcome {
    let text = section(suite, "ps")?;
    let names: Vec<&str> = text
        .lines()
        .skip(1)
        .filter_map(|l| l.split_whitespace().nth(1))
        .collect();
    ensure_eq!("processes", names, ["sh", "ps"]);
    Ok(())
}

fn guest_shows_no_kernel_warning(suite: &Suite) -> Outcome {
    let pod = suite
        .busybox()
        .flag("--privileged")
        .sh("sleep 1000")
        .detach()?;
    let text =
        pod.sh("dmesg | grep -E 'WARNING|BUG|Oops|firmware bug|Call Trace|segfault' || true")?;
    ensure!(text.is_empty(), "the guest's kernel log says: {text}");
    pod.end()?;
    Ok(())
}
