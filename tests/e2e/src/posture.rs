//! What the processes of a running pod are allowed, read from the live processes and compared with what is written here: at rest, under
//! load, and after containers, volumes and networks have come and gone, and another shim has taken over.

mod jail;

use std::{collections::BTreeSet, fs, os::unix::fs::MetadataExt, path::Path};

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
pub const TESTS: &[Test] = &[
    test!(
        posture::the_file_server_is_as_written_at_rest_under_load_and_after_changes,
        BUSYBOX,
        MACHINES
    ),
    test!(posture::jail::the_jail_is_as_written, BUSYBOX, MACHINES),
    test!(
        posture::jail::the_jail_is_as_written_with_networks,
        &[Image::Net],
        MACHINES
    )
    .networked(),
];

/// Kinds of namespaces, as `/proc/<pid>/ns` names them.
const NAMESPACES: [&str; 6] = ["user", "pid", "ipc", "uts", "mnt", "net"];

/// How a process stands, as far as it must not change.
#[derive(Debug)]
struct Posture {
    /// Capabilities that it has, by their bits (capabilities(7)).
    capabilities: &'static [u32],
    /// Those that a program of its could have.
    bounding: &'static [u32],
    /// Namespaces that are not the host's.
    apart: &'static [&'static str],
    /// Every mount that it sees: point, type, and options it must have.
    mounts: &'static [(&'static str, &'static str, &'static str)],
    /// Everything in its root.
    root: &'static [&'static str],
    /// Beginnings of what its descriptors may lead to, beside files of its own.
    descriptors: &'static [&'static str],
    /// Whether they also lead to files of mounts that the host does not see.
    trees: bool,
    /// Sockets of the state folder that it may listen on.
    listens: &'static [&'static str],
    /// Its limits of resources, by their names in `/proc/<pid>/limits`.
    limits: &'static [(&'static str, &'static str)],
    /// Filters of system calls on each thread.
    filters: u64,
    /// Names of its threads without their numbers; without any it is no program of ours.
    threads: &'static [&'static str],
    /// Threads that it has at times.
    further: &'static [&'static str],
    /// The thread that starts the others, and so has a filter less.
    starter: &'static str,
}

const ROOT: [(&str, &str, &str); 3] = [
    ("/", "tmpfs", "rw"),
    ("/fd", "proc", "rw"),
    ("/trees", "tmpfs", "ro,nosuid,nodev,noexec"),
];

/// The process that talks to the guest. CHOWN, DAC_OVERRIDE, DAC_READ_SEARCH, FOWNER, FSETID, SETGID, SETUID: in a user namespace of its own.
const SERVER: Posture = Posture {
    capabilities: &[0, 1, 2, 3, 4, 6, 7],
    bounding: &[],
    apart: &["user", "pid", "ipc", "uts", "mnt", "net"],
    mounts: &ROOT,
    root: &["fd", "trees"],
    descriptors: &["/dev/null", "socket:", "pipe:"],
    trees: true,
    listens: &["fs.sock"],
    limits: &[],
    filters: 1,
    threads: &["bulkhead-fs", "fuse"],
    further: &[],
    starter: "",
};

/// Its steward: DAC_READ_SEARCH, SYS_ADMIN and SETFCAP in the host's user namespace; its child has a pid namespace, it has not.
const STEWARD: Posture = Posture {
    capabilities: &[2, 21, 31],
    bounding: &[],
    apart: &["ipc", "uts", "mnt", "net"],
    mounts: &ROOT,
    root: &["fd", "trees"],
    descriptors: &["/dev/null", "socket:"],
    trees: true,
    listens: &[],
    limits: &[],
    filters: 1,
    threads: &["fs-steward"],
    further: &[],
    starter: "",
};

fn field(status: &str, name: &str) -> Outcome<String> {
    let line = status.lines().find(|line| line.starts_with(name));
    let value = line.and_then(|line| line.split_once(':')).context(name)?.1;
    Ok(value.split_whitespace().collect::<Vec<_>>().join(" "))
}

fn bits(set: &[u32]) -> u64 {
    set.iter().fold(0, |bits, bit| bits | 1 << bit)
}

/// `fuse-3` is one of the threads `fuse`.
fn kind(thread: &str) -> &str {
    let numberless = thread.trim_end_matches(|c: char| c.is_ascii_digit());
    numberless.trim_end_matches('-')
}

/// Prints how a process stands, as it is read from the host.
fn tell(what: &str, process: &Process) -> Outcome {
    let base = format!("/proc/{}", process.pid);
    let status = read(format!("{base}/status"))?;
    let mut values = Vec::new();
    for name in [
        "Uid",
        "CapEff",
        "CapBnd",
        "Seccomp:",
        "Seccomp_filters",
        "Threads",
    ] {
        let value = field(&status, name).unwrap_or_else(|_| "not told".into());
        let value = value
            .split(' ')
            .next()
            .unwrap_or_default()
            .trim_start_matches('0');
        let value = if value.is_empty() { "0" } else { value };
        values.push(format!("{} {value}", name.trim_end_matches(':')));
    }
    let apart = NAMESPACES.into_iter().filter(|kind| {
        let of = |base: &str| fs::read_link(format!("{base}/ns/{kind}")).ok();
        of(&base) != of("/proc/self")
    });
    let apart: Vec<_> = apart.collect();
    let descriptors = fs::read_dir(format!("{base}/fd")).context("fd")?.count();
    println!(
        "         {what}: {}, {descriptors} descriptors, apart: {}",
        values.join(", "),
        apart.join(" ")
    );
    Ok(())
}

impl Posture {
    /// Compares a process of `pod`, of this user, with what is written. `files`: those of the state folder that it has open.
    fn check(&self, pod: &Pod<'_>, process: &Process, uid: u32, files: &[String]) -> Outcome {
        let base = format!("/proc/{}", process.pid);
        self.check_threads(&base, uid)?;
        self.check_view(&base)?;
        self.check_descriptors(&base, files)?;
        self.check_sockets(pod, &base)?;
        let limits = read(format!("{base}/limits"))?;
        for (name, value) in self.limits {
            let line = limits.lines().find_map(|line| line.strip_prefix(name));
            let words: Vec<&str> = line.context(name)?.split_whitespace().take(2).collect();
            ensure_eq!(name, words, [*value, *value]);
        }
        let environment = format!("{base}/environ");
        // Files in /proc of what is not dumpable belong to root (proc(5)).
        let owner = fs::metadata(&environment).context("environ")?;
        ensure_eq!("owner in /proc", owner.uid(), 0);
        for variable in read(&environment)?.split_terminator('\0') {
            let meant = variable.starts_with("PATH=") || variable.starts_with("BULKHEAD_");
            ensure!(meant, "in its environment: {variable}");
        }
        Ok(())
    }

    fn check_threads(&self, base: &str, uid: u32) -> Outcome {
        let mut threads = BTreeSet::new();
        let tasks = fs::read_dir(format!("{base}/task")).context("threads")?;
        for task in tasks.flatten() {
            // One that ends meanwhile.
            let Ok(status) = fs::read_to_string(task.path().join("status")) else {
                continue;
            };
            let name = field(&status, "Name")?;
            self.check_thread(&name, uid, &status)
                .map_err(|e| format!("thread {name}: {e}"))?;
            threads.insert(kind(&name).to_owned());
        }
        for name in self.threads {
            ensure!(threads.remove(*name), "no thread {name}");
        }
        if !self.threads.is_empty() {
            threads.retain(|name| !self.further.contains(&name.as_str()));
            ensure!(threads.is_empty(), "unknown threads: {threads:?}");
        }
        Ok(())
    }

    fn check_thread(&self, name: &str, uid: u32, status: &str) -> Outcome {
        let value = |set| u64::from_str_radix(&field(status, set)?, 16).context(set);
        let allowed = bits(self.capabilities);
        for set in ["CapPrm", "CapEff"] {
            // Fewer while a worker makes a file for another user.
            let value = value(set)?;
            ensure!(
                value & !allowed == 0,
                "{set}: {value:x}, allowed {allowed:x}"
            );
        }
        for set in ["CapInh", "CapAmb"] {
            ensure_eq!(set, value(set)?, 0);
        }
        ensure_eq!("CapBnd", value("CapBnd")?, bits(self.bounding));
        // Root's workers take on a user for a moment.
        if uid != 0 {
            for ids in ["Uid", "Gid"] {
                ensure_eq!(
                    ids,
                    field(status, ids)?,
                    [uid.to_string().as_str(); 4].join(" ")
                );
            }
        }
        ensure_eq!("no new privileges", field(status, "NoNewPrivs")?, "1");
        ensure_eq!("seccomp mode", field(status, "Seccomp:")?, "2");
        // Older kernels do not count.
        if let Ok(filters) = field(status, "Seccomp_filters") {
            let wanted = self.filters - u64::from(name == self.starter);
            ensure_eq!("filters", filters, wanted.to_string());
        }
        let groups = field(status, "Groups")?;
        let own = uid != 0 && groups == uid.to_string();
        ensure!(own || groups.is_empty(), "groups: {groups}");
        Ok(())
    }

    /// What it can name: namespaces, mounts, its root.
    fn check_view(&self, base: &str) -> Outcome {
        for kind in NAMESPACES {
            let own = fs::read_link(format!("{base}/ns/{kind}")).context(kind)?;
            let hosts = fs::read_link(format!("/proc/self/ns/{kind}")).context(kind)?;
            ensure_eq!(
                format!("{kind} namespace apart"),
                own != hosts,
                self.apart.contains(&kind)
            );
        }
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
        let root = fs::read_dir(format!("{base}/root/")).context("root")?;
        let names: BTreeSet<String> = root
            .flatten()
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .collect();
        let written = self.root.iter().map(|&name| name.to_owned()).collect();
        ensure_eq!("root", names, written);
        Ok(())
    }

    fn check_descriptors(&self, base: &str, files: &[String]) -> Outcome {
        // Files of the host's own mounts; a tree is a mount of its own, which nobody else sees.
        let of_host: BTreeSet<String> = read("/proc/self/mountinfo")?
            .lines()
            .filter_map(|line| Some(line.split(' ').next()?.to_owned()))
            .collect();
        for entry in fs::read_dir(format!("{base}/fd")).context("fd")?.flatten() {
            let info = Path::new(base).join("fdinfo").join(entry.file_name());
            // One that is closed meanwhile.
            let (Ok(target), Ok(info)) = (fs::read_link(entry.path()), fs::read_to_string(info))
            else {
                continue;
            };
            let target = target.to_string_lossy().into_owned();
            let known =
                files.contains(&target) || self.descriptors.iter().any(|d| target.starts_with(d));
            let tree = self.trees
                && target.starts_with('/')
                && !of_host.contains(&field(&info, "mnt_id")?);
            ensure!(known || tree, "descriptor {target}");
        }
        Ok(())
    }

    /// All its sockets are of the host's inside (unix(7)), and it listens on what is written.
    fn check_sockets(&self, pod: &Pod<'_>, base: &str) -> Outcome {
        let mut own = BTreeSet::new();
        for entry in fs::read_dir(format!("{base}/fd")).context("fd")?.flatten() {
            let target = fs::read_link(entry.path()).unwrap_or_default();
            let target = target.to_string_lossy();
            let inode = target
                .strip_prefix("socket:[")
                .map(|i| i.trim_end_matches(']'));
            own.extend(inode.map(str::to_owned));
        }
        // A socket is told of in the network namespace where it was made: the pod's, the shim's, that of a process that ended.
        for process in pod.processes() {
            for table in [
                "tcp", "tcp6", "udp", "udp6", "raw", "raw6", "packet", "netlink",
            ] {
                let path = format!("/proc/{}/net/{table}", process.pid);
                for line in fs::read_to_string(path).unwrap_or_default().lines() {
                    let ours = line.split_whitespace().any(|word| own.contains(word));
                    ensure!(!ours, "socket of {table}: {line}");
                }
            }
            let path = format!("/proc/{}/net/unix", process.pid);
            for line in fs::read_to_string(path).unwrap_or_default().lines() {
                let fields: Vec<&str> = line.split_whitespace().collect();
                // Flags, inode and path; the flag is SO_ACCEPTCON.
                let [_, _, _, "00010000", _, _, inode, path] = fields.as_slice() else {
                    continue;
                };
                let name = path.rsplit('/').next().unwrap_or_default();
                let known = self.listens.contains(&name);
                ensure!(known || !own.contains(*inode), "it listens on {path}");
            }
        }
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
    let log = [log.to_string_lossy().into_owned()];
    let tell = |what, e| format!("{when}, {what}: {e}");
    SERVER
        .check(pod, server, 0, &log)
        .map_err(|e| tell("server", e))?;
    STEWARD
        .check(pod, steward, 0, &log)
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
    for process in pod.processes() {
        if process.name.starts_with("bulkhead-fs") {
            tell(&process.command(), &process)?;
        }
    }
    pod.end()?;
    Ok(())
}
