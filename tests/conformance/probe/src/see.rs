//! What a process of the container sees, by sections.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::{
        ffi::OsStrExt,
        fs::{FileTypeExt, MetadataExt, PermissionsExt},
    },
};

use serde_json::{Map, Value, json};

use crate::{devices, sys, syscalls};

/// The sections named in `names`, by commas; `paths` are looked at one by one.
pub fn see(names: &str, paths: &[&str]) -> Value {
    let mut view = Map::new();
    for name in names.split(',').filter(|name| !name.is_empty()) {
        view.insert(name.into(), section(name));
    }
    if !paths.is_empty() {
        let seen = paths.iter().map(|p| ((*p).to_owned(), path(p)));
        view.insert("paths".into(), seen.collect::<Map<_, _>>().into());
    }
    view.into()
}

fn section(name: &str) -> Value {
    match name {
        "identity" => identity(),
        "capabilities" => capabilities(),
        "rlimits" => rlimits(),
        "oom" => json!(read("/proc/self/oom_score_adj")),
        "scheduling" => scheduling(),
        "affinity" => json!(status("Cpus_allowed_list")),
        "mounts" => mounts(),
        "namespaces" => namespaces(),
        "cgroup" => cgroup(),
        "devices" => devices::nodes(),
        "access" => devices::access(),
        "syscalls" => syscalls::all(),
        "process" => process(),
        "environment" => environment(),
        "descriptors" => descriptors(),
        "signals" => signals(),
        "personality" => json!(format!("{:#x}", sys::personality())),
        "terminal" => terminal(),
        "late" => late(),
        "names" => names(),
        "network" => network(),
        other => json!(format!("no section {other}")),
    }
}

/// A small file's text without the line's end.
pub fn read(path: &str) -> Option<String> {
    let bytes = fs::read(path).ok()?;
    Some(String::from_utf8_lossy(&bytes).trim_end().to_owned())
}

fn status(key: &str) -> Option<String> {
    let text = read("/proc/self/status")?;
    let line = text
        .lines()
        .find_map(|l| l.strip_prefix(key)?.strip_prefix(':'))?;
    Some(line.split_whitespace().collect::<Vec<_>>().join(" "))
}

fn identity() -> Value {
    let mut groups: Vec<u32> = status("Groups")
        .unwrap_or_default()
        .split(' ')
        .filter_map(|word| word.parse().ok())
        .collect();
    groups.sort_unstable();
    json!({ "uid": status("Uid"), "gid": status("Gid"), "groups": groups, "umask": status("Umask") })
}

fn capabilities() -> Value {
    json!({
        "inheritable": status("CapInh"), "permitted": status("CapPrm"), "effective": status("CapEff"),
        "bounding": status("CapBnd"), "ambient": status("CapAmb"),
        "securebits": sys::prctl(libc::PR_GET_SECUREBITS, 0),
        "no_new_privs": status("NoNewPrivs"), "seccomp": status("Seccomp"),
        "dumpable": sys::prctl(libc::PR_GET_DUMPABLE, 0), "keepcaps": sys::prctl(libc::PR_GET_KEEPCAPS, 0),
    })
}

fn rlimits() -> Value {
    let names = [
        "CPU",
        "FSIZE",
        "DATA",
        "STACK",
        "CORE",
        "RSS",
        "NPROC",
        "NOFILE",
        "MEMLOCK",
        "AS",
        "LOCKS",
        "SIGPENDING",
        "MSGQUEUE",
        "NICE",
        "RTPRIO",
        "RTTIME",
    ];
    let text = |value: u64| match value {
        libc::RLIM_INFINITY => "max".to_owned(),
        value => value.to_string(),
    };
    let all = (0..).zip(names).map(|(number, name)| {
        let (soft, hard) = sys::rlimit(number);
        (name.to_owned(), json!([text(soft), text(hard)]))
    });
    all.collect::<Map<_, _>>().into()
}

fn scheduling() -> Value {
    // struct sched_attr: size, policy, flags (64), nice, priority, runtime, deadline, period (64 each), two clamps.
    let mut attr = [0_u32; 14];
    let size = std::mem::size_of_val(&attr);
    let got = sys::call(
        libc::SYS_sched_getattr,
        [0, attr.as_mut_ptr() as usize, size, 0, 0],
    );
    // For other policies `runtime` is the kernel's own slice.
    let deadline = attr[1] == 6;
    let long = |low: usize| {
        if low > 2 && !deadline {
            return 0;
        }
        u64::from(attr[low]) | (u64::from(attr[low + 1]) << 32)
    };
    let io = sys::call(libc::SYS_ioprio_get, [1, 0, 0, 0, 0]);
    json!({
        "getattr": sys::answer(got), "policy": attr[1], "flags": long(2), "nice": attr[4].cast_signed(),
        "priority": attr[5], "runtime": long(6), "deadline": long(8), "period": long(10),
        "io_class": io >> 13, "io_level": io & 0x1fff,
    })
}

/// Mounts by their point; a second one on the same point is `point#2`.
fn mounts() -> Value {
    let text = read("/proc/self/mountinfo").unwrap_or_default();
    let (mut by_point, mut order) = (Map::new(), Vec::new());
    for line in text.lines() {
        let Some((before, after)) = line.split_once(" - ") else {
            continue;
        };
        let before: Vec<&str> = before.split(' ').collect();
        let after: Vec<&str> = after.split(' ').collect();
        let (Some(point), Some(options), Some(kind)) =
            (before.get(4), before.get(5), after.first())
        else {
            continue;
        };
        let mut name = (*point).to_owned();
        let mut number = 1;
        while by_point.contains_key(&name) {
            number += 1;
            name = format!("{point}#{number}");
        }
        let optional = before.get(6..).unwrap_or_default();
        let mut propagation: Vec<&str> = optional
            .iter()
            .filter_map(|field| match field.split(':').next() {
                Some("shared") => Some("shared"),
                Some("master") => Some("slave"),
                Some("unbindable") => Some("unbindable"),
                _ => None,
            })
            .collect();
        if propagation.is_empty() {
            propagation.push("private");
        }
        // Of a file system that the runtime makes, its own options; of another, they are the host's matter.
        let made = ["tmpfs", "devpts", "proc", "mqueue", "sysfs"].contains(kind);
        let own = after.get(2).filter(|_| made).map(|text| words(text));
        // What is masked depends on what the kernel has.
        if !name.starts_with("/proc/") && !name.starts_with("/sys/") {
            order.push(name.clone());
        }
        by_point.insert(
            name,
            json!({ "type": kind, "options": words(options), "own": own, "propagation": propagation }),
        );
    }
    json!({ "order": order, "at": by_point })
}

fn words(text: &str) -> Vec<&str> {
    let mut words: Vec<&str> = text.split(',').collect();
    words.sort_unstable();
    words
}

fn namespaces() -> Value {
    let kinds = ["cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts"];
    let mut all: Map<String, Value> = kinds
        .iter()
        .map(|kind| {
            let link = fs::read_link(format!("/proc/self/ns/{kind}"));
            let text = link.map(|l| l.to_string_lossy().into_owned()).ok();
            ((*kind).to_owned(), json!(text))
        })
        .collect();
    for (key, file) in [
        ("uid_map", "uid_map"),
        ("gid_map", "gid_map"),
        ("setgroups", "setgroups"),
        ("offsets", "timens_offsets"),
    ] {
        let text = read(&format!("/proc/self/{file}"));
        let lines: Option<Vec<String>> = text.map(|text| {
            let lines = text.lines();
            lines
                .map(|l| l.split_whitespace().collect::<Vec<_>>().join(" "))
                .collect()
        });
        all.insert(key.into(), json!(lines));
    }
    all.into()
}

/// The files of the process's cgroup under their names in v2.
fn cgroup() -> Value {
    let own = read("/proc/self/cgroup").unwrap_or_default();
    let root = "/sys/fs/cgroup";
    if !fs::exists(format!("{root}/cgroup.controllers")).unwrap_or(false) {
        return cgroup_v1(root, &own);
    }
    let path = own
        .lines()
        .find_map(|l| l.strip_prefix("0::"))
        .unwrap_or("/");
    let nested = format!("{root}{path}");
    let folder = if fs::exists(format!("{nested}/cgroup.procs")).unwrap_or(false) {
        nested.trim_end_matches('/')
    } else {
        root
    };
    let mut all = Map::new();
    for file in [
        "cpu.max",
        "cpu.max.burst",
        "cpu.weight",
        "cpu.idle",
        "cpuset.cpus",
        "cpuset.mems",
        "memory.max",
        "memory.low",
        "memory.high",
        "memory.min",
        "memory.swap.max",
        "memory.oom.group",
        "pids.max",
        "io.weight",
        "io.bfq.weight",
        "io.max",
        "hugetlb.2MB.max",
        "hugetlb.1GB.max",
    ] {
        if let Some(text) = read(&format!("{folder}/{file}")) {
            all.insert(file.into(), json!(text));
        }
    }
    all.insert("version".into(), json!(2));
    all.insert("path".into(), json!(path));
    let procs = format!("{folder}/cgroup.procs");
    all.insert("write".into(), json!(sys::open(&procs, libc::O_WRONLY)));
    all.into()
}

fn cgroup_v1(root: &str, own: &str) -> Value {
    let find = |controller: &str, file: &str| {
        let path = own.lines().find_map(|line| {
            let mut fields = line.splitn(3, ':').skip(1);
            let names = fields.next()?;
            names
                .split(',')
                .any(|n| n == controller)
                .then(|| fields.next())?
        })?;
        [
            format!("{root}/{controller}{path}/{file}"),
            format!("{root}/{controller}/{file}"),
        ]
        .iter()
        .find_map(|candidate| read(candidate))
    };
    let bytes = |text: String| match text.parse::<u64>() {
        // v1 says "no limit" with the largest number of pages.
        Ok(value) if value >= 1 << 62 => "max".into(),
        _ => text,
    };
    let mut all = Map::new();
    let mut put = |name: &str, value: Option<String>| {
        if let Some(value) = value {
            all.insert(name.into(), json!(value));
        }
    };
    let quota = find("cpu", "cpu.cfs_quota_us").map(|q| if q == "-1" { "max".into() } else { q });
    let period = find("cpu", "cpu.cfs_period_us");
    put(
        "cpu.max",
        quota.zip(period).map(|(q, p)| format!("{q} {p}")),
    );
    put(
        "memory.max",
        find("memory", "memory.limit_in_bytes").map(bytes),
    );
    put("pids.max", find("pids", "pids.max"));
    put("cpuset.cpus", find("cpuset", "cpuset.cpus"));
    put("cpuset.mems", find("cpuset", "cpuset.mems"));
    all.insert("version".into(), json!(1));
    all.into()
}

fn process() -> Value {
    let args: Vec<String> = std::env::args_os()
        .map(|arg| arg.to_string_lossy().into_owned())
        .collect();
    let stat = read("/proc/self/stat").unwrap_or_default();
    let after = stat.rsplit(')').next().unwrap_or("");
    let fields: Vec<&str> = after.split_whitespace().collect();
    let link = |name: &str| {
        let link = fs::read_link(format!("/proc/self/{name}"));
        link.map(|l| l.to_string_lossy().into_owned()).ok()
    };
    json!({
        "argv": args, "cwd": link("cwd"), "root": link("root"), "exe": link("exe"), "pid": std::process::id(),
        "ppid": fields.get(1), "pgrp": fields.get(2), "session": fields.get(3),
        "comm": read("/proc/self/comm"), "timer_slack": sys::prctl(libc::PR_GET_TIMERSLACK, 0),
    })
}

fn environment() -> Value {
    let raw = fs::read("/proc/self/environ").unwrap_or_default();
    let count = raw.split(|&b| b == 0).filter(|e| !e.is_empty()).count();
    let mut entries: Vec<String> = raw
        .split(|&b| b == 0)
        .filter(|e| !e.is_empty())
        .take(50)
        .map(|e| String::from_utf8_lossy(e.get(..200).unwrap_or(e)).into_owned())
        .collect();
    // HOME is added by the runtime, at another place in the order.
    let home = entries.iter().position(|e| e.starts_with("HOME="));
    let home = home.map(|place| entries.remove(place));
    json!({ "entries": entries, "home": home, "count": count, "bytes": raw.len() })
}

fn descriptors() -> Value {
    let mut all = BTreeMap::new();
    let Ok(entries) = fs::read_dir("/proc/self/fd") else {
        return Value::Null;
    };
    for entry in entries.flatten() {
        let Ok(number) = entry.file_name().to_string_lossy().parse::<i32>() else {
            continue;
        };
        let Ok(link) = fs::read_link(entry.path()) else {
            continue;
        };
        let link = link.to_string_lossy().into_owned();
        // The folder that is being read.
        if link.starts_with("/proc/") && link.ends_with("/fd") {
            continue;
        }
        let what = link.split(":[").next().unwrap_or("").to_owned();
        let mode = match sys::fd_flags(number) & libc::O_ACCMODE {
            libc::O_RDONLY => "r",
            libc::O_WRONLY => "w",
            _ => "rw",
        };
        all.insert(number.to_string(), json!([what, mode]));
    }
    json!(all)
}

fn signals() -> Value {
    json!({ "pending": status("SigPnd"), "blocked": status("SigBlk"), "ignored": status("SigIgn"), "caught": status("SigCgt") })
}

fn terminal() -> Value {
    let all = (0..3).map(|fd| match sys::window(fd) {
        Some((rows, columns)) => json!([rows, columns]),
        None => Value::Null,
    });
    let tty = read("/proc/self/stat").unwrap_or_default();
    let number = tty
        .rsplit(')')
        .next()
        .unwrap_or("")
        .split_whitespace()
        .nth(4)
        .map(|n| n != "0");
    json!({ "sizes": all.collect::<Vec<_>>(), "controls": number, "dev_tty": sys::open("/dev/tty", libc::O_RDWR) })
}

/// A terminal gets its size after the start: the client hears of the start first.
fn late() -> Value {
    for _ in 0..40 {
        if sys::window(0) != Some((0, 0)) {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    Value::Null
}

fn names() -> Value {
    let [host, domain, _] = sys::uname();
    json!({ "host": host, "domain": domain })
}

fn network() -> Value {
    let text = read("/proc/net/dev").unwrap_or_default();
    let mut links: Vec<&str> = text
        .lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(name, _)| name.trim())
        .collect();
    links.sort_unstable();
    json!({ "links": links, "lo": read("/sys/class/net/lo/flags") })
}

fn path(path: &str) -> Value {
    let Ok(meta) = fs::symlink_metadata(path) else {
        let missing = fs::symlink_metadata(path).map(drop);
        return json!({ "missing": sys::outcome(&missing) });
    };
    let kind = meta.file_type();
    let mut seen = Map::new();
    let mut put = |key: &str, value: Value| seen.insert(key.into(), value);
    put(
        "mode",
        json!(format!("{:o}", meta.permissions().mode() & 0o7777)),
    );
    put("owner", json!(format!("{}:{}", meta.uid(), meta.gid())));
    if kind.is_symlink() {
        let target = fs::read_link(path).unwrap_or_default();
        put(
            "link",
            json!(String::from_utf8_lossy(target.as_os_str().as_bytes())),
        );
    } else if kind.is_dir() {
        put("kind", json!("folder"));
        let entries = fs::read_dir(path);
        put("read", json!(sys::outcome(&entries)));
        let mut names: Vec<String> = entries
            .into_iter()
            .flatten()
            .flatten()
            .map(|e| e.file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        put("count", json!(names.len()));
        names.truncate(20);
        put("names", json!(names));
        let file = format!("{path}/.probe");
        let made = fs::File::create_new(&file);
        put("write", json!(sys::outcome(&made)));
        let _ = fs::remove_file(file);
    } else if kind.is_file() {
        put("kind", json!("file"));
        let text = fs::read(path);
        put("read", json!(sys::outcome(&text)));
        let text = text.unwrap_or_default();
        let start = text.get(..200).unwrap_or(&text);
        put("text", json!(String::from_utf8_lossy(start)));
        put("write", json!(sys::open(path, libc::O_WRONLY)));
    } else {
        let name = if kind.is_char_device() {
            "character device"
        } else if kind.is_block_device() {
            "block device"
        } else if kind.is_fifo() {
            "fifo"
        } else {
            "socket"
        };
        put("kind", json!(name));
        put(
            "device",
            json!(format!(
                "{}:{}",
                libc::major(meta.rdev()),
                libc::minor(meta.rdev())
            )),
        );
        put(
            "read",
            json!(sys::open(
                path,
                libc::O_RDONLY | libc::O_NONBLOCK | libc::O_NOCTTY
            )),
        );
        put(
            "write",
            json!(sys::open(
                path,
                libc::O_WRONLY | libc::O_NONBLOCK | libc::O_NOCTTY
            )),
        );
    }
    seen.into()
}
