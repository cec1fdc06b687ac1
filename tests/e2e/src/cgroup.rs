//! The pod's processes are in the cgroup that containerd names: counted there, held by the limits above, and gone with the pod.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use bulkhead_harness::{
    Context, Engine, Image, Outcome, Pod, Suite, Test, ensure, ensure_eq,
    events::Events,
    failure::{make_folder, read, write},
    runner::MACHINES,
    spec, test,
};
use rustix::process::Signal;

use crate::{cgroup, network::until};

const BUSYBOX: &[Image] = &[Image::Busybox];
/// Where the hierarchies are mounted.
const ROOT: &str = "/sys/fs/cgroup";

/// The cases of this group.
pub const TESTS: &[Test] = &[
    test!(
        cgroup::processes_are_where_containerd_says,
        BUSYBOX,
        MACHINES
    ),
    test!(
        cgroup::a_path_that_leads_elsewhere_or_is_anothers_is_refused,
        BUSYBOX,
        MACHINES
    ),
    test!(
        cgroup::a_memory_limit_above_ends_the_pod_and_no_other,
        BUSYBOX,
        MACHINES
    ),
    test!(
        cgroup::a_cpu_quota_above_holds_the_machine,
        BUSYBOX,
        MACHINES
    ),
    test!(
        cgroup::nothing_is_left_though_processes_were_moved_and_the_shim_killed,
        BUSYBOX,
        MACHINES
    ),
];

/// The roots of all hierarchies: one with v2, one a controller with v1.
fn roots() -> Vec<PathBuf> {
    let root = Path::new(ROOT);
    if root.join("cgroup.controllers").exists() {
        return vec![root.into()];
    }
    let entries = fs::read_dir(root).into_iter().flatten().flatten();
    let folders = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    let folders = folders.map(|entry| entry.path());
    folders
        .filter(|path| path.join("cgroup.procs").exists())
        .collect()
}

/// Folder of a cgroup in the hierarchy of a controller.
fn folder(controller: &str, path: &str) -> PathBuf {
    let v1 = Path::new(ROOT).join(controller);
    let root = match v1.join("cgroup.procs").exists() {
        true => v1,
        false => ROOT.into(),
    };
    root.join(path.trim_start_matches('/'))
}

/// Where a process is, each path once.
fn cgroups_of(pid: u32) -> Outcome<Vec<String>> {
    let text = read(format!("/proc/{pid}/cgroup"))?;
    let mut paths: Vec<String> = text
        .lines()
        .filter_map(|line| Some(line.splitn(3, ':').nth(2)?.to_owned()))
        .collect();
    paths.sort();
    paths.dedup();
    Ok(paths)
}

/// The pod's processes but the shim's.
fn machine(pod: &Pod<'_>) -> Vec<(String, u32)> {
    let processes = pod.processes().into_iter();
    processes
        .filter(|p| !p.name.starts_with("containerd-shim"))
        .map(|p| (p.name, p.pid))
        .collect()
}

fn is_at(pod: &Pod<'_>, suite: &Suite, path: &str) -> Outcome {
    let machine = machine(pod);
    // VMM, both processes of the file server, emulator.
    let expected = match suite.engine {
        Engine::Emulated => 4,
        _ => 3,
    };
    ensure_eq!("processes", machine.len(), expected);
    for (name, pid) in machine {
        ensure_eq!(
            format!("cgroups of {name}"),
            cgroups_of(pid)?,
            [path.to_owned()]
        );
    }
    let shim = cgroups_of(pod.shim()?.pid)?;
    ensure!(
        !shim.contains(&path.to_owned()),
        "the shim is there as well"
    );
    Ok(())
}

fn is_gone(path: &str) -> Outcome {
    for root in roots() {
        let folder = root.join(path.trim_start_matches('/'));
        ensure!(!folder.exists(), "{} is left", folder.display());
    }
    Ok(())
}

/// A cgroup of the test's own, in all hierarchies; goes at its end.
struct Parent(String);

impl Parent {
    fn make(path: String) -> Outcome<Self> {
        for root in roots() {
            let mut folder = root;
            for name in path.split('/').filter(|name| !name.is_empty()) {
                let gives = fs::read_to_string(folder.join("cgroup.controllers"));
                for controller in gives.unwrap_or_default().split_whitespace() {
                    let _ = fs::write(
                        folder.join("cgroup.subtree_control"),
                        format!("+{controller}"),
                    );
                }
                folder.push(name);
                make_folder(&folder)?;
            }
        }
        Ok(Self(path))
    }
}

impl Drop for Parent {
    fn drop(&mut self) {
        for root in roots() {
            let _ = fs::remove_dir(root.join(self.0.trim_start_matches('/')));
        }
    }
}

fn processes_are_where_containerd_says(suite: &Suite) -> Outcome {
    let namespace = suite.namespace();
    // What ctr names without being asked.
    let pod = suite.busybox().sh("sleep 1000").detach()?;
    let path = format!("/{namespace}/{}", pod.name());
    is_at(&pod, suite, &path)?;
    // Its further containers have theirs in the guest: an empty one on the host would be taken for their use.
    let second = format!("/{namespace}/second");
    let of_pod = format!("io.kubernetes.cri.sandbox-id={}", pod.name());
    let member = suite
        .busybox()
        .flags(&["--annotation", &of_pod, "--cgroup", &second])
        .sh("sleep 1000")
        .detach()?;
    is_gone(&second)?;
    member.end()?;
    pod.end()?;
    is_gone(&path)?;
    // Folders that are not there yet.
    let parent = Parent::make(format!("/{namespace}/a"))?;
    let path = format!("{}/b", parent.0);
    let pod = suite
        .busybox()
        .flags(&["--cgroup", &path])
        .sh("sleep 1000")
        .detach()?;
    is_at(&pod, suite, &path)?;
    pod.end()?;
    is_gone(&path)?;
    drop(parent);
    // systemd's form, and none.
    let slice = format!("bulkheadtest{}", std::process::id());
    let _slice = Parent::make(format!("/{slice}.slice"))?;
    let mut named = spec::default(&suite.rootfs()?, &["sleep", "1000"]);
    named["linux"]["cgroupsPath"] = format!("{slice}.slice:bulk:pod").into();
    let pod = bulkhead_harness::Run::of_spec(suite, &named)?.detach()?;
    is_at(&pod, suite, &format!("/{slice}.slice/bulk-pod.scope"))?;
    pod.end()?;
    let unnamed = spec::default(&suite.rootfs()?, &["sleep", "1000"]);
    let pod = bulkhead_harness::Run::of_spec(suite, &unnamed)?.detach()?;
    let path = format!("/{namespace}/{}", pod.name());
    is_at(&pod, suite, &path)?;
    pod.end()?;
    is_gone(&path)
}

fn a_path_that_leads_elsewhere_or_is_anothers_is_refused(suite: &Suite) -> Outcome {
    let namespace = suite.namespace();
    for path in [format!("/{namespace}/../../x"), "/".into(), "a:b:c".into()] {
        let run = suite.busybox().flags(&["--cgroup", &path]).sh("true");
        run.output()?.refused(&["linux.cgroupsPath"])?;
    }
    let parent = Parent::make(format!("/{namespace}/busy"))?;
    let mut other = Command::new("sleep").arg("1000").spawn().context("sleep")?;
    let procs = folder("memory", &parent.0).join("cgroup.procs");
    write(procs, other.id().to_string())?;
    let run = suite.busybox().flags(&["--cgroup", &parent.0]).sh("true");
    let refused = run.output()?.refused(&["linux.cgroupsPath", "processes"]);
    let alive = other.try_wait().context("wait")?.is_none();
    let _ = other.kill();
    let _ = other.wait();
    refused?;
    ensure!(alive, "the other's process was ended");
    Ok(())
}

fn a_memory_limit_above_ends_the_pod_and_no_other(suite: &Suite) -> Outcome {
    // The emulator's own memory beside the guest's.
    let limit_mib = match suite.engine {
        Engine::Emulated => 320,
        _ => 160,
    };
    let parent = Parent::make(format!("/{}/limited", suite.namespace()))?;
    let at = |name| folder("memory", &parent.0).join(name);
    let bytes = (limit_mib << 20).to_string();
    match at("memory.max").exists() {
        true => {
            write(at("memory.max"), &bytes)?;
            let _ = fs::write(at("memory.swap.max"), "0");
        }
        false => {
            write(at("memory.limit_in_bytes"), &bytes)?;
            let _ = fs::write(at("memory.memsw.limit_in_bytes"), &bytes);
        }
    }
    let events = Events::subscribe(suite)?;
    let other = suite.busybox().sh("sleep 1000").detach()?;
    let path = format!("{}/pod", parent.0);
    let run = suite
        .busybox()
        .flags(&[
            "--cgroup",
            &path,
            "--annotation",
            "io.bulkhead.memory_mib=1024",
        ])
        .mount("type=tmpfs,src=tmpfs,dst=/big,options=size=900m")
        .sh("dd if=/dev/zero of=/big/file bs=1M count=800; sleep 1000");
    let name = run.name().to_owned();
    run.output()?.expect(137)?;
    events.wait_for(&name, "/tasks/oom", suite.scale.seconds(3))?;
    ensure_eq!("the other pod", other.sh("echo lives")?, "lives");
    other.end()?;
    is_gone(&path)
}

/// Microseconds of CPU that a cgroup has used.
fn used(path: &str) -> Outcome<u64> {
    let v1 = folder("cpuacct", path).join("cpuacct.usage");
    if v1.exists() {
        let nanoseconds: u64 = read(v1)?.trim().parse().context("cpuacct.usage")?;
        return Ok(nanoseconds / 1000);
    }
    stat(path, "usage_usec ")
}

/// A line of `cpu.stat`.
fn stat(path: &str, key: &str) -> Outcome<u64> {
    let text = read(folder("cpu", path).join("cpu.stat"))?;
    let value = text.lines().find_map(|line| line.strip_prefix(key));
    value.context(key)?.trim().parse().context(key)
}

fn a_cpu_quota_above_holds_the_machine(suite: &Suite) -> Outcome {
    let parent = Parent::make(format!("/{}/quota", suite.namespace()))?;
    let path = format!("{}/pod", parent.0);
    let pod = suite
        .busybox()
        .flags(&["--cgroup", &path])
        .sh("while :; do :; done")
        .detach()?;
    let at = |name| folder("cpu", &parent.0).join(name);
    match at("cpu.max").exists() {
        true => write(at("cpu.max"), "20000 100000")?,
        false => {
            write(at("cpu.cfs_period_us"), "100000")?;
            write(at("cpu.cfs_quota_us"), "20000")?;
        }
    }
    let (before, begun) = (used(&path)?, Instant::now());
    std::thread::sleep(Duration::from_secs(4));
    let used = used(&path)?.saturating_sub(before);
    let wall = u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX);
    // A period before and one after count as well.
    ensure!(
        used * 100 <= wall * 27,
        "{used} us of CPU in {wall} us with a quota of a fifth"
    );
    ensure!(
        stat(&parent.0, "nr_throttled ")? > 0,
        "nobody was held back"
    );
    let lift = match at("cpu.max").exists() {
        true => write(at("cpu.max"), "max 100000"),
        false => write(at("cpu.cfs_quota_us"), "-1"),
    };
    lift?;
    pod.end()?;
    is_gone(&path)
}

fn nothing_is_left_though_processes_were_moved_and_the_shim_killed(suite: &Suite) -> Outcome {
    let pod = suite.busybox().sh("sleep 1000").detach()?;
    let path = format!("/{}/{}", suite.namespace(), pod.name());
    // The worker dies; where the machine is stays as it was.
    let before = pod.shim()?;
    before.signal(Signal::KILL)?;
    let limit = suite.scale.seconds(10);
    until(limit, "another shim", || {
        Ok(pod.shim().is_ok_and(|now| now.pid != before.pid))
    })?;
    ensure_eq!("a command", pod.sh("echo lives")?, "lives");
    is_at(&pod, suite, &path)?;
    // One of the pod's out of it, one of somebody's into it.
    let fs_server = pod.process("bulkhead-fs")?;
    let mut other = Command::new("sleep").arg("1000").spawn().context("sleep")?;
    for root in roots() {
        let own = root.join(path.trim_start_matches('/')).join("cgroup.procs");
        write(root.join("cgroup.procs"), fs_server.pid.to_string())?;
        write(own, other.id().to_string())?;
    }
    let keeper = pod.command("bulkhead-keeper")?;
    let shim = pod.shim()?;
    keeper.signal(Signal::KILL)?;
    shim.signal(Signal::KILL)?;
    let gone = until(limit, "the pod's end", || Ok(is_gone(&path).is_ok()));
    let ended = other.try_wait().context("wait")?.is_some();
    let _ = other.kill();
    let _ = other.wait();
    gone?;
    ensure!(ended, "what was moved into the pod's cgroup goes on");
    pod.delete_by_force()
}
