//! What the processes of a running pod are allowed, read from the live processes and compared with what is written here: at rest, under
//! load, and after containers and volumes have come and gone.

use std::{collections::BTreeSet, fs, path::Path};

use bulkhead_harness::{
    Context, Image, Outcome, Pod, Suite, Test, ensure, ensure_eq,
    failure::read,
    process::{Process, parent},
    runner::MACHINES,
    test,
};

use crate::posture;

const BUSYBOX: &[Image] = &[Image::Busybox];

/// The cases of this group.
pub const TESTS: &[Test] = &[test!(
    posture::the_file_server_is_as_written_at_rest_under_load_and_after_changes,
    BUSYBOX,
    MACHINES
)];

/// How a process stands, as far as it must not change.
#[derive(Debug)]
struct Posture {
    /// Capabilities that it has, by their bits (capabilities(7)).
    capabilities: &'static [u32],
    /// Namespaces that are not the host's.
    apart: &'static [&'static str],
    /// Every mount that it sees: point, type, and options it must have.
    mounts: &'static [(&'static str, &'static str, &'static str)],
    /// Beginnings of what its descriptors may lead to, beside the log and files of mounts that the host does not see.
    descriptors: &'static [&'static str],
    /// At least one, of exactly these names.
    threads: &'static [&'static str],
}

const ROOT: [(&str, &str, &str); 3] = [
    ("/", "tmpfs", "rw"),
    ("/fd", "proc", "rw"),
    ("/trees", "tmpfs", "ro,nosuid,nodev,noexec"),
];

/// The process that talks to the guest. CHOWN, DAC_OVERRIDE, DAC_READ_SEARCH, FOWNER, FSETID, SETGID, SETUID: in a user namespace of its own.
const SERVER: Posture = Posture {
    capabilities: &[0, 1, 2, 3, 4, 6, 7],
    apart: &["user", "pid", "ipc", "uts", "mnt", "net"],
    mounts: &ROOT,
    descriptors: &["/dev/null", "socket:", "pipe:"],
    threads: &["bulkhead-fs", "fuse-0", "fuse-1", "fuse-2", "fuse-3"],
};

/// Its steward: DAC_READ_SEARCH, SYS_ADMIN and SETFCAP in the host's user namespace; its child has a pid namespace, it has not.
const STEWARD: Posture = Posture {
    capabilities: &[2, 21, 31],
    apart: &["ipc", "uts", "mnt", "net"],
    mounts: &ROOT,
    descriptors: &["/dev/null", "socket:"],
    threads: &["fs-steward"],
};

fn field(status: &str, name: &str) -> Outcome<String> {
    let line = status.lines().find(|line| line.starts_with(name));
    let value = line.and_then(|line| line.split_once(':')).context(name)?.1;
    Ok(value.split_whitespace().collect::<Vec<_>>().join(" "))
}

impl Posture {
    fn check(&self, process: &Process, log: &str) -> Outcome {
        let base = format!("/proc/{}", process.pid);
        let mut threads = BTreeSet::new();
        let tasks = fs::read_dir(format!("{base}/task")).context("threads")?;
        for task in tasks.flatten() {
            let status = read(task.path().join("status"))?;
            let name = field(&status, "Name")?;
            self.check_thread(&status)
                .map_err(|e| format!("{name}: {e}"))?;
            threads.insert(name);
        }
        let expected: BTreeSet<String> = self.threads.iter().map(|&t| t.to_owned()).collect();
        ensure_eq!("threads", threads, expected);
        for kind in ["user", "pid", "ipc", "uts", "mnt", "net", "cgroup"] {
            let own = fs::read_link(format!("{base}/ns/{kind}")).context(kind)?;
            let hosts = fs::read_link(format!("/proc/self/ns/{kind}")).context(kind)?;
            ensure_eq!(
                format!("{kind} namespace apart"),
                own != hosts,
                self.apart.contains(&kind)
            );
        }
        let limits = read(format!("{base}/limits"))?;
        let core = limits
            .lines()
            .find_map(|line| line.strip_prefix("Max core file size"));
        let core: Vec<&str> = core.unwrap_or_default().split_whitespace().collect();
        ensure_eq!("core files", core, ["0", "0", "bytes"]);
        let mut mounts = Vec::new();
        for line in read(format!("{base}/mountinfo"))?.lines() {
            let fields: Vec<&str> = line.split(' ').collect();
            let kind = line.split(" - ").nth(1).and_then(|t| t.split(' ').next());
            let (Some(point), Some(options), Some(kind)) = (fields.get(4), fields.get(5), kind)
            else {
                return Err(format!("mountinfo: {line}").into());
            };
            mounts.push(((*point).to_owned(), kind.to_owned(), (*options).to_owned()));
        }
        mounts.sort();
        let points: Vec<&str> = mounts.iter().map(|(point, _, _)| point.as_str()).collect();
        let written: Vec<&str> = self.mounts.iter().map(|(point, _, _)| *point).collect();
        ensure_eq!("mounts", points, written);
        for ((point, kind, options), (_, expected, least)) in mounts.iter().zip(self.mounts) {
            ensure_eq!(format!("type of {point}"), kind.as_str(), *expected);
            ensure!(options.starts_with(least), "options of {point}: {options}");
        }
        // Files of the host's own mounts; a tree is a mount of its own, which nobody else sees.
        let of_host: BTreeSet<String> = read("/proc/self/mountinfo")?
            .lines()
            .filter_map(|line| Some(line.split(' ').next()?.to_owned()))
            .collect();
        for entry in fs::read_dir(format!("{base}/fd")).context("fd")?.flatten() {
            let info = Path::new(&base).join("fdinfo").join(entry.file_name());
            // One that is closed meanwhile.
            let (Ok(target), Ok(info)) = (fs::read_link(entry.path()), fs::read_to_string(info))
            else {
                continue;
            };
            let target = target.to_string_lossy().into_owned();
            let known = target == log || self.descriptors.iter().any(|d| target.starts_with(d));
            let apart = !of_host.contains(&field(&info, "mnt_id")?);
            ensure!(
                known || (target.starts_with('/') && apart),
                "descriptor {target}"
            );
        }
        Ok(())
    }

    fn check_thread(&self, status: &str) -> Outcome {
        let bits = self.capabilities.iter();
        let allowed = bits.fold(0u64, |set, bit| set | 1 << bit);
        for set in ["CapPrm", "CapEff"] {
            let value = u64::from_str_radix(&field(status, set)?, 16).context(set)?;
            // Fewer while a worker makes a file for another user.
            ensure!(
                value & !allowed == 0,
                "{set}: {value:x}, allowed {allowed:x}"
            );
        }
        for set in ["CapInh", "CapBnd", "CapAmb"] {
            ensure_eq!(set, field(status, set)?, "0000000000000000");
        }
        ensure_eq!("no new privileges", field(status, "NoNewPrivs")?, "1");
        ensure_eq!("seccomp mode", field(status, "Seccomp:")?, "2");
        ensure_eq!("groups", field(status, "Groups")?, "");
        Ok(())
    }
}

fn file_server(suite: &Suite, pod: &Pod<'_>, when: &str) -> Outcome {
    let both: Vec<Process> = pod
        .processes()
        .into_iter()
        .filter(|p| p.name.starts_with("bulkhead-fs"))
        .collect();
    let [one, two] = both.as_slice() else {
        return Err(format!("{when}: processes of the file server: {both:?}").into());
    };
    let (server, steward) = match parent(one.pid) == Some(two.pid) {
        true => (one, two),
        false => (two, one),
    };
    ensure_eq!("the server's parent", parent(server.pid), Some(steward.pid));
    let log = suite.state_of(pod.name()).join("fs.log");
    let log = log.to_string_lossy();
    let tell = |what, e| format!("{when}, {what}: {e}");
    SERVER.check(server, &log).map_err(|e| tell("server", e))?;
    STEWARD
        .check(steward, &log)
        .map_err(|e| tell("steward", e))?;
    let map = read(format!("/proc/{}/uid_map", server.pid))?;
    let hosts = read("/proc/self/uid_map")?;
    ensure_eq!(
        "ids",
        map.split_whitespace().collect::<Vec<_>>(),
        hosts.split_whitespace().collect::<Vec<_>>()
    );
    Ok(())
}

fn the_file_server_is_as_written_at_rest_under_load_and_after_changes(suite: &Suite) -> Outcome {
    let pod = suite.busybox().sh("sleep 1000").detach()?;
    file_server(suite, &pod, "at rest")?;
    let load = pod
        .exec(&[
            "sh",
            "-c",
            "for i in 1 2 3 4 5 6 7 8; do mkdir -p /d/$i; for u in 1 2 3; do echo $i >/d/$i/$u; chown $u:$u /d/$i/$u; done; done; \
             echo busy; while :; do dd if=/dev/zero of=/d/file bs=64k count=64 conv=fsync 2>/dev/null; find / -xdev >/dev/null; done",
        ])
        .spawn()?;
    load.wait_for("busy", suite.scale.seconds(30))?;
    for _ in 0..10 {
        file_server(suite, &pod, "under load")?;
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    drop(load);
    let volume = suite.folder("posture")?;
    let mount = format!(
        "type=bind,src={},dst=/volume,options=rbind:rw",
        volume.display()
    );
    let of_pod = format!("io.kubernetes.cri.sandbox-id={}", pod.name());
    let member = suite
        .busybox()
        .flags(&["--annotation", &of_pod])
        .mount(mount)
        .sh("echo x >/volume/file; sleep 1000")
        .detach()?;
    file_server(suite, &pod, "with another container")?;
    member.end()?;
    file_server(suite, &pod, "after changes")?;
    pod.end()?;
    Ok(())
}
