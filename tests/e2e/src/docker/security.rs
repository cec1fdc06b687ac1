//! Who the container is and what it may, by the options of `docker run`.

use bulkhead_harness::{
    Context, Outcome, Suite, Test, ensure, ensure_eq,
    failure::{read, write},
    runner::{ANY, MACHINES},
    test,
};

use super::{BUSYBOX, SMALL, run};
use crate::docker;

/// The cases of this group.
pub const TESTS: &[Test] = &[
    test!(docker::security::a_container_is_confined, BUSYBOX, ANY)
        .docker()
        .fast_host(),
    test!(docker::security::a_container_is_let_loose, BUSYBOX, ANY)
        .docker()
        .fast_host(),
    test!(
        docker::security::a_privileged_one_has_the_guest_and_no_device_of_the_host,
        BUSYBOX,
        MACHINES
    )
    .docker()
    .fast_host(),
];

/// A call that it refuses with an error that nobody else gives it.
const PROFILE: &str = r#"{
  "defaultAction": "SCMP_ACT_ALLOW",
  "syscalls": [{ "names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 18 }]
}"#;

fn seen(suite: &Suite, options: &[&str], script: &str) -> Outcome<String> {
    let args = [&["--rm"], options, &[SMALL, "sh", "-c", script]].concat();
    Ok(run(suite, &args)?.output()?.ok()?.text())
}

/// A hexadecimal field of `/proc/self/status`.
fn mask(status: &str, field: &str) -> Outcome<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix(field));
    let digits = line.context(format_args!("no {field} in {status}"))?.trim();
    u64::from_str_radix(digits, 16).context(format_args!("{field} {digits}"))
}

fn a_container_is_confined(suite: &Suite) -> Outcome {
    let profile = suite.folder("seccomp")?.join("profile.json");
    write(&profile, PROFILE)?;
    let seccomp = format!("seccomp={}", profile.display());
    let options = [
        "--init",
        "--user=1000:1001",
        "--cap-drop=ALL",
        "--cap-add=NET_BIND_SERVICE",
        "--security-opt",
        &seccomp,
        "--read-only",
        "--tmpfs",
        "/scratch:size=1m,mode=1777",
    ];
    // An orphan goes to PID 1, which is docker-init and takes its end.
    let script = r#"
        tr '\0' '\n' </proc/1/cmdline | head -n 1
        id -u; id -g
        grep -E '^(CapBnd|Seccomp):' /proc/self/status | tr '\t' ' '
        touch /file 2>&1
        dd if=/dev/zero of=/scratch/large bs=2M count=1 2>&1 | grep error; stat -c %s /scratch/large
        rm /scratch/large; mkdir /scratch/folder 2>&1
        sh -c 'sleep 0.1 &'; sleep 0.5
        grep -l '^State:.Z' /proc/[0-9]*/status | wc -l"#;
    ensure_eq!(
        "what it is and may",
        seen(suite, &options, script)?,
        "/sbin/docker-init\n1000\n1001\nCapBnd: 0000000000000400\nSeccomp: 2\n\
         touch: /file: Read-only file system\n\
         dd: error writing '/scratch/large': No space left on device\n1048576\n\
         mkdir: can't create directory '/scratch/folder': Invalid cross-device link\n0"
    );
    Ok(())
}

fn a_container_is_let_loose(suite: &Suite) -> Outcome {
    let script = "grep -E '^(CapEff|Seccomp):' /proc/self/status";
    let plain = seen(suite, &[], script)?;
    let options = [
        "--cap-add=SYS_NICE",
        "--cap-drop=CHOWN",
        "--security-opt=seccomp=unconfined",
    ];
    let loose = seen(suite, &options, script)?;
    let (nice, chown) = (1 << 23, 1);
    ensure_eq!(
        "capabilities",
        mask(&loose, "CapEff:")?,
        (mask(&plain, "CapEff:")? | nice) & !chown
    );
    let modes = (mask(&plain, "Seccomp:")?, mask(&loose, "Seccomp:")?);
    ensure_eq!("seccomp by default and unconfined", modes, (2, 0));
    Ok(())
}

fn a_privileged_one_has_the_guest_and_no_device_of_the_host(suite: &Suite) -> Outcome {
    let find = suite.command("find").args(["/dev", "-type", "b"]);
    let disks = find.output()?.ok()?.text();
    let disks = disks.lines().filter(|path| !path.contains("loop")).count();
    let script = r#"
        grep -E '^(CapEff|Seccomp):' /proc/self/status
        find /dev -type b ! -name 'loop*' | sed 's/^/disk /'
        ls /dev/kvm /dev/vhost-net 2>/dev/null
        mount -t tmpfs tmpfs /tmp && echo 7 >/proc/sys/vm/swappiness && cat /proc/sys/vm/swappiness"#;
    let text = seen(suite, &["--privileged"], script)?;
    // Docker gives what its daemon has; where that is everything, it is everything in the guest.
    let all = mask(&read("/proc/self/status")?, "CapBnd:")?;
    ensure_eq!("capabilities", mask(&text, "CapEff:")?, all);
    let rest: Vec<&str> = text.lines().skip(1).collect();
    ensure_eq!(
        "seccomp, devices and what it can change",
        rest,
        ["Seccomp:\t0", "7"]
    );
    ensure!(disks > 0, "this host has no disk that could have been seen");
    Ok(())
}
