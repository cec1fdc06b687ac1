//! What does not depend on how busy the host is: system calls, page faults, threads and VM exits of a start, by program.
//!
//! System calls are counted by `strace`, in pods of a suite of their own whose shim is traced with all that it starts.

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    io::{BufRead, BufReader, Write},
    os::unix::{
        fs::{PermissionsExt, symlink},
        net::UnixStream,
    },
    path::Path,
};

use bulkhead_harness::{
    Context, Engine, Image, Pod, Suite,
    failure::{Outcome, make_folder, read, write},
    suite::Options,
};
use serde_json::Value;

use crate::{Plan, figure::Figure, subject::Subject};

const SHIM: &str = "containerd-shim-bulkhead-v1";
const ROUNDS: u32 = 3;
/// Samples by program or kind, in the order of their names.
type Counts = BTreeMap<String, Vec<f64>>;

/// `counts::page_faults`, `counts::threads`, `counts::vm_exits`.
pub fn figures(suite: &Suite, plan: &Plan) -> Outcome<Vec<Figure>> {
    let faults = Figure::new(
        "counts::page_faults",
        "page faults until the pod's program runs, by process",
        "faults",
    );
    let threads = Figure::new(
        "counts::threads",
        "threads of an idle pod by process",
        "threads",
    );
    let mut exits = Figure::new(
        "counts::vm_exits",
        "VM exits until the agent serves; by kind until the pod's program runs",
        "exits",
    );
    if ![&faults, &threads, &exits]
        .iter()
        .any(|figure| plan.wants(&figure.id))
    {
        return Ok(Vec::new());
    }
    suite.import(Image::Busybox)?;
    let mut samples: [Counts; 3] = Default::default();
    for round in 1..=ROUNDS {
        eprint!("\rcounts: round {round} of {ROUNDS} ");
        let pod = idle(suite)?;
        for process in pod.processes() {
            let Some((fault, thread)) = of_process(process.pid) else {
                continue;
            };
            let name = process.command();
            add(&mut samples[0], &name, fault);
            add(&mut samples[1], &name, thread);
        }
        let report = report(&suite.state_of(pod.name()))?;
        if let Some(all) = report["exits_until_ready"].as_f64() {
            add(&mut samples[2], UNTIL_READY, all);
            for (kind, count) in report["exits"].as_object().into_iter().flatten() {
                add(&mut samples[2], kind, count.as_f64().unwrap_or_default());
            }
        }
        pod.end()?;
    }
    eprintln!();
    if suite.engine != Engine::Kvm {
        exits
            .missing
            .push("engine emulated has none: see the KVM test host's report".into());
    }
    let mut all = [faults, threads, exits];
    for (figure, samples) in all.iter_mut().zip(samples) {
        fill(figure, samples);
    }
    Ok(all
        .into_iter()
        .filter(|figure| plan.wants(&figure.id))
        .collect())
}

/// The row of `counts::vm_exits` that has a bar.
const UNTIL_READY: &str = "until the agent serves";

/// `counts::system_calls` and `counts::kvm_calls`; starts a suite of its own.
pub fn traced(options: Options, plan: &Plan) -> Outcome<Vec<Figure>> {
    let mut calls = Figure::new(
        "counts::system_calls",
        "system calls of a start by program, until the pod's program runs (strace)",
        "calls",
    );
    let mut kvm = Figure::new(
        "counts::kvm_calls",
        "calls to KVM of a start (ioctl, strace)",
        "calls",
    );
    if !plan.wants(&calls.id) && !plan.wants(&kvm.id) {
        return Ok(Vec::new());
    }
    let folder = std::env::temp_dir().join(format!("bulkhead-bench-trace-{}", std::process::id()));
    let result = trace(options, &folder);
    let removed = fs::remove_dir_all(&folder);
    let [by_program, by_request] = result?;
    removed.context(format_args!("remove {}", folder.display()))?;
    if by_request.is_empty() {
        kvm.missing.push("engine emulated makes none".into());
    }
    fill(&mut calls, by_program);
    fill(&mut kvm, by_request);
    Ok(vec![calls, kvm])
}

fn trace(options: Options, folder: &Path) -> Outcome<[Counts; 2]> {
    let mut samples: [Counts; 2] = Default::default();
    let dist = fs::canonicalize(&options.dist).context("find the product's folder")?;
    let (bin, traces) = (folder.join("bin"), folder.join("traces"));
    make_folder(&bin)?;
    make_folder(&traces)?;
    for name in fs::read_dir(&dist).context("list the product's folder")? {
        let name = name.context("list the product's folder")?.file_name();
        if name != SHIM {
            symlink(dist.join(&name), bin.join(&name)).context("link the product")?;
        }
    }
    // strace must not be an heir of the shim's stdout, at whose end containerd waits.
    let script = format!(
        "#!/bin/sh\ncase \"$*\" in *\" start\")\n\
         strace -f -qq -s 0 -e signal=none --decode-pids=pidns -o '{}/'$$ -p $$ </dev/null >/dev/null 2>&1 &\n\
         while grep -q '^TracerPid:.0$' /proc/$$/status; do sleep 0.01; done\n;; esac\n\
         exec '{}' \"$@\"\n",
        traces.display(),
        dist.join(SHIM).display()
    );
    write(bin.join(SHIM), script)?;
    fs::set_permissions(bin.join(SHIM), fs::Permissions::from_mode(0o755))
        .context("make the script executable")?;
    let suite = Suite::start(Options {
        dist: bin,
        ..options
    })?;
    suite.import(Image::Busybox)?;
    for round in 1..=ROUNDS {
        eprint!("\rcounts::system_calls: round {round} of {ROUNDS} ");
        let pod = idle(&suite)?;
        let mut text = String::new();
        for file in fs::read_dir(&traces).context("list the traces")? {
            let file = file.context("list the traces")?.path();
            text.push_str(&read(&file)?);
            fs::remove_file(&file).context("remove a trace")?;
        }
        pod.end()?;
        for (all, counts) in samples.iter_mut().zip(count(&text)) {
            for (name, count) in counts {
                add(all, &name, f64::from(count));
            }
        }
    }
    eprintln!();
    Ok(samples)
}

/// System calls by program, and calls to KVM by request, of lines as `strace -f` writes them.
fn count(trace: &str) -> [BTreeMap<String, u32>; 2] {
    let mut programs: HashMap<&str, String> = HashMap::new();
    let mut executing: HashMap<&str, &str> = HashMap::new();
    let (mut calls, mut kvm) = (BTreeMap::new(), BTreeMap::new());
    // What comes before the shim is the script's.
    for line in trace.lines().skip_while(|line| !line.contains(SHIM)) {
        let Some((pid, call)) = line.split_once(' ') else {
            continue;
        };
        let call = call.trim_start();
        let result = call.rsplit_once(" = ").map(|(_, result)| result.trim());
        // A child runs its parent's program until it runs its own.
        let name = call.split(['(', ' ']).find(|word| *word != "<...");
        if let (Some("clone" | "clone3" | "fork" | "vfork"), Some(child)) = (name, result)
            && let Some(program) = programs.get(pid).cloned()
        {
            programs.insert(outside(child), program);
        }
        if name == Some("execve") {
            // The path stands in the line in which the call begins.
            if let Some(path) = call.split('"').nth(1) {
                executing.insert(pid, path.rsplit('/').next().unwrap_or_default());
            }
            if let (Some("0"), Some(program)) = (result, executing.get(pid)) {
                programs.insert(pid, (*program).to_owned());
            }
        }
        if call.starts_with(['<', '+', '-']) {
            continue;
        }
        let Some(program) = programs.get(pid) else {
            continue;
        };
        *calls.entry(program.clone()).or_default() += 1;
        if let Some(("ioctl", arguments)) = call.split_once('(')
            && let Some(request) = arguments.split([',', ')']).nth(1)
            && request.trim().starts_with("KVM_")
        {
            *kvm.entry(request.trim().to_owned()).or_default() += 1;
        }
    }
    [calls, kvm]
}

/// The process id that strace writes at the begin of a line, of one that a call gave: `2`, or in a process id namespace
/// `2 /* 1234 in strace's PID NS */`.
fn outside(result: &str) -> &str {
    let translated = result.split_once("/* ").map(|(_, outside)| outside);
    let pid = translated.unwrap_or(result).split(' ').next();
    pid.unwrap_or_default()
}

fn idle(suite: &Suite) -> Outcome<Pod<'_>> {
    let run = Subject::bulkhead(suite.engine).run(suite, Image::Busybox);
    run.args(&["sleep", "1000"]).detach()
}

/// Page faults so far and threads.
fn of_process(pid: u32) -> Option<(f64, f64)> {
    let stat = read(format!("/proc/{pid}/stat")).ok()?;
    // The fields after the name, which can hold anything; "proc(5)", from the third on.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let field = |number: usize| fields.get(number - 3)?.parse::<f64>().ok();
    Some((field(10)? + field(12)?, field(20)?))
}

/// The VMM's report of a pod with this state folder.
pub fn report(state: &Path) -> Outcome<Value> {
    let socket = state.join("control.sock");
    let asked = UnixStream::connect(&socket).and_then(|mut stream| {
        stream.write_all(b"{\"op\":\"report\"}\n")?;
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line)?;
        Ok(line)
    });
    let line = asked.context(format_args!("ask {}", socket.display()))?;
    let answer: Value = serde_json::from_str(&line).context("the VMM's report")?;
    Ok(answer["ok"].clone())
}

fn add(counts: &mut Counts, name: &str, sample: f64) {
    counts.entry(name.to_owned()).or_default().push(sample);
}

fn fill(figure: &mut Figure, counts: Counts) {
    for (name, samples) in counts {
        figure.add_part(name, samples);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_counts_for_the_program_that_made_it() {
        let trace = "\
7 wait4(-1, <unfinished ...>
7 execve(\"/dist/containerd-shim-bulkhead-v1\", [\"shim\"...], 0x1) = 0
7 clone3({flags=CLONE_VM}, 88 <unfinished ...>
7 <... clone3 resumed>) = 8
8 execve(\"/dist/vmm\", [], 0x1 <unfinished ...>
8 <... execve resumed>) = 0
8 ioctl(3, KVM_CREATE_VM, 0) = 4
8 clone(child_stack=0x1, flags=CLONE_VM|CLONE_THREAD) = 2 /* 9 in strace's PID NS */
9 ioctl(4, KVM_RUN, 0 <unfinished ...>
8 --- SIGCHLD ---
9 <... ioctl resumed>) = 0
7 read(3, \"\"..., 1) = 0
8 +++ exited with 0 +++
";
        let [calls, kvm] = count(trace);
        assert_eq!((calls[SHIM], calls["vmm"], calls.len()), (4, 3, 2));
        assert_eq!((kvm["KVM_CREATE_VM"], kvm["KVM_RUN"]), (1, 1));
    }

    #[test]
    fn faults_and_threads_of_this_process() {
        let (faults, threads) = of_process(std::process::id()).unwrap();
        assert!(faults > 100.0 && threads >= 1.0);
    }
}
