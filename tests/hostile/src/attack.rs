//! One attack and what holds after it: the client has its answer in time, the pod's processes stayed within what the
//! limits tables allow and did not panic, another pod answers, the host's files are as they were. That nothing is left is
//! the harness's check after each case.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use bulkhead_harness::{
    Context, Outcome, Suite, command::Running, ensure, ensure_eq, failure::write, pod::Pod, process,
};

/// How the pod must end.
#[derive(Clone, Copy, Debug)]
pub enum End {
    /// `ctr run` fails within so many seconds; one of the texts stands in its error or in the log.
    Fails(u32, &'static [&'static str]),
    /// It runs until it is killed, which takes so many seconds at most.
    Killed(u32),
}

/// Most memory in KiB and descriptors of a process of a pod under attack.
///
/// The VMM has buffers for 64 vsock connections of the guest of 256 KiB each, the shim parses answers of 4 MiB, and may
/// listen on 256 forwarded ports of two families.
const MOST: [(&str, u64, usize); 3] = [
    ("bulkhead-vmm", 32 << 10, 512),
    ("bulkhead-fs", 24 << 10, 1024),
    ("containerd-shim-bulkhead-v1", 96 << 10, 1024),
];

/// What was seen of the pod while it was there.
#[derive(Default)]
struct Watch {
    memory: BTreeMap<String, u64>,
    descriptors: BTreeMap<String, usize>,
    logs: BTreeMap<PathBuf, String>,
}

impl Watch {
    fn look(&mut self, suite: &Suite, pod: &Pod) {
        for process in pod.processes() {
            if let Ok(kib) = process.memory_kib(512) {
                let most = self.memory.entry(process.name.clone()).or_default();
                *most = kib.max(*most);
            }
            let most = self.descriptors.entry(process.name).or_default();
            *most = process::fds(process.pid).max(*most);
        }
        for name in ["vmm.log", "fs.log", "exit.json"] {
            let path = suite.state_of(pod.name()).join(name);
            if let Ok(text) = fs::read(&path) {
                self.logs
                    .insert(path, String::from_utf8_lossy(&text).into_owned());
            }
        }
    }

    fn check(&self) -> Outcome {
        for (name, kib, count) in MOST {
            let memory = self.memory.get(name).copied().unwrap_or_default();
            ensure!(memory <= kib, "{name} had {memory} KiB, more than {kib}");
            let open = self.descriptors.get(name).copied().unwrap_or_default();
            ensure!(
                open <= count,
                "{name} had {open} descriptors, more than {count}"
            );
        }
        for (path, text) in &self.logs {
            ensure!(
                !text.contains("panicked at"),
                "{} tells of a panic:\n{text}",
                path.display()
            );
        }
        Ok(())
    }

    fn tell(&self) {
        let words = self.memory.iter().map(|(name, kib)| {
            let open = self.descriptors.get(name).copied().unwrap_or_default();
            format!("{name} {kib} KiB, {open} descriptors")
        });
        println!("         at most: {}", words.collect::<Vec<_>>().join("; "));
    }
}

/// Files of the host beside and within what the pod is given.
struct Canary(PathBuf);

impl Canary {
    fn new(suite: &Suite) -> Outcome<Self> {
        let folder = suite.folder(&suite.name("canary"))?;
        fs::create_dir(folder.join("tree")).context("a folder")?;
        for name in ["beside", "tree/within"] {
            write(folder.join(name), "canary")?;
        }
        std::os::unix::fs::symlink("../beside", folder.join("tree/link")).context("a link")?;
        Ok(Self(folder))
    }

    /// For `ctr run --mount`.
    fn mount(&self) -> String {
        let tree = self.0.join("tree");
        format!(
            "type=bind,src={},dst=/canary,options=rbind:ro",
            tree.display()
        )
    }

    fn check(self) -> Outcome {
        for name in ["beside", "tree/within"] {
            let text = fs::read_to_string(self.0.join(name)).context(name)?;
            ensure_eq!(name, text, "canary");
        }
        let count = |below: &str| fs::read_dir(self.0.join(below)).map_or(0, Iterator::count);
        ensure_eq!("files", (count(""), count("tree")), (2, 2));
        fs::remove_dir_all(&self.0).context("the canary's folder")
    }
}

/// Runs a pod with `lines` in the configuration; `meanwhile` happens once its container runs. What the shims and containerd
/// logged is given back.
pub fn attack(
    suite: &Suite,
    lines: &str,
    end: End,
    meanwhile: impl FnOnce(&Pod) -> Outcome,
) -> Outcome<String> {
    let bystander = suite.busybox().args(&["sleep", "100000"]).detach()?;
    let canary = Canary::new(suite)?;
    let log = suite.log_mark();
    let mut watch = Watch::default();
    {
        let _configured = suite.configured(lines)?;
        let run = suite.busybox().mount(canary.mount());
        let (pod, running) = run.args(&["sleep", "100000"]).seconds(200).attach()?;
        watch.look(suite, &pod);
        match end {
            End::Fails(seconds, texts) => {
                let errors = fails(suite, &pod, running, seconds, &mut watch)?;
                let said = format!("{errors}\n{}", log_since(suite, log)?);
                ensure!(
                    texts.iter().any(|text| said.contains(text)),
                    "none of {texts:?} is said: {said}"
                );
                pod.delete_by_force()?;
            }
            End::Killed(seconds) => {
                let limit = suite.scale.seconds(60);
                wait(suite, &pod, &mut watch, limit, || {
                    Ok(pod.status()?.is_some_and(|(_, status)| status == "RUNNING"))
                })?;
                meanwhile(&pod)?;
                watch.look(suite, &pod);
                let killed = Instant::now();
                pod.kill("SIGKILL")?;
                let limit = suite.scale.seconds(seconds);
                let mut running = running;
                wait(suite, &pod, &mut watch, limit, || Ok(running.has_ended()))?;
                println!("         SIGKILL took {:?}", killed.elapsed());
                running.wait()?;
                pod.delete_by_force()?;
            }
        }
    }
    watch.tell();
    watch.check()?;
    let said = log_since(suite, log)?;
    ensure!(!said.contains("panicked at"), "a panic: {said}");
    let line = said.lines().map(str::len).max().unwrap_or_default();
    ensure!(line < 64 << 10, "a line of {line} bytes in the log");
    ensure_eq!("the other pod", bystander.sh("echo lives")?, "lives");
    bystander.end()?;
    canary.check()?;
    Ok(said)
}

fn fails(
    suite: &Suite,
    pod: &Pod,
    mut running: Running,
    seconds: u32,
    watch: &mut Watch,
) -> Outcome<String> {
    let limit = suite.scale.seconds(seconds);
    wait(suite, pod, watch, limit, || Ok(running.has_ended()))?;
    let output = running.wait()?;
    ensure!(output.status != 0, "ctr run ended with 0");
    let errors = output.errors();
    ensure!(
        errors.len() < 16 << 10 && !errors.contains('\u{1b}') && !errors.contains('\u{202e}'),
        "what the guest says reaches the terminal: {errors:?}"
    );
    Ok(errors)
}

fn wait(
    suite: &Suite,
    pod: &Pod,
    watch: &mut Watch,
    limit: Duration,
    mut done: impl FnMut() -> Outcome<bool>,
) -> Outcome {
    let end = Instant::now() + limit;
    while !done()? {
        ensure!(Instant::now() < end, "not done after {limit:?}");
        watch.look(suite, pod);
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

/// What containerd and the shims have logged.
fn log_since(suite: &Suite, mark: usize) -> Outcome<String> {
    let config = suite.config();
    let folder = config.parent().context("the suite's folder")?;
    let bytes = fs::read(folder.join("main/containerd.log")).context("containerd's log")?;
    let new = bytes.get(mark..).unwrap_or_default();
    Ok(String::from_utf8_lossy(new).into_owned())
}

/// A file beside this program.
pub fn beside(name: &str) -> Outcome<PathBuf> {
    let program = std::env::current_exe().context("this program")?;
    let file = program.with_file_name(name);
    ensure!(
        Path::exists(&file),
        "{} is missing: tests/hostile/build makes it",
        file.display()
    );
    Ok(file)
}
