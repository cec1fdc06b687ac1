//! One of the two runtimes: its pod, and how a case's container runs in it.
//!
//! `ctr` reads a spec into the types that it knows and so drops newer fields. The shims are therefore started through
//! a script that puts the case's whole `config.json` into the bundle first; both runtimes read the same text.

use std::{
    cell::RefCell,
    fs,
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
    time::Duration,
};

use bulkhead_harness::{
    Context, Failure, Outcome, Pod, Run, Running, Suite, failure::make_folder, failure::write,
};
use serde_json::{Map, Value, json};

use crate::case::{Case, Fixture, apply, base, fill_in};

/// Namespaces of the machine's first process, which have the same numbers on every kernel.
const INITIAL: [(&str, u64); 6] = [
    ("ipc", 0xefff_ffff),
    ("uts", 0xefff_fffe),
    ("user", 0xefff_fffd),
    ("pid", 0xefff_fffc),
    ("cgroup", 0xefff_fffb),
    ("time", 0xefff_fffa),
];

/// Which runtime.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `io.containerd.runc.v2`.
    Runc,
    /// `io.containerd.bulkhead.v1`.
    Bulkhead,
}

impl Kind {
    /// Its name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Runc => "runc",
            Self::Bulkhead => "bulkhead",
        }
    }

    fn runtime(self) -> &'static str {
        match self {
            Self::Runc => "io.containerd.runc.v2",
            Self::Bulkhead => "io.containerd.bulkhead.v1",
        }
    }

    /// File name of its shim.
    pub fn shim(self) -> &'static str {
        match self {
            Self::Runc => "containerd-shim-runc-v2",
            Self::Bulkhead => "containerd-shim-bulkhead-v1",
        }
    }
}

/// A side.
pub struct Side<'a> {
    /// Which runtime.
    pub kind: Kind,
    /// containerd and its like.
    pub suite: &'a Suite,
    probe: PathBuf,
    raw: PathBuf,
    pod: RefCell<Option<Held<'a>>>,
}

/// The pod: its first container stays, and the cases' containers join it.
struct Held<'a> {
    pod: Pod<'a>,
    client: Running,
    pid: u32,
    view: Value,
}

/// A case's bundle on one side.
#[derive(Clone, Debug)]
pub struct Bundle {
    /// The container's name.
    pub name: String,
    /// The spec.
    pub spec: Value,
    /// The rootfs.
    pub root: PathBuf,
    /// A folder beside it.
    pub folder: PathBuf,
}

/// How a container's run ended.
#[derive(Clone, Debug)]
pub struct End {
    /// Whether the program ran.
    pub started: bool,
    /// What is compared.
    pub seen: Value,
    /// The client's error.
    pub error: String,
    /// How long it took.
    pub took: Duration,
}

impl End {
    /// Whether it ended well, and what it said is not whole.
    pub fn lost_words(&self) -> bool {
        self.started && self.seen["status"] == 0 && self.seen["view"].is_string()
    }
}

/// Makes the scripts that stand for the shims in `folder`.
pub fn make_shims(folder: &Path, suite: &Suite, dist: &Path) -> Outcome {
    let raw = suite.folder("raw")?;
    for kind in [Kind::Runc, Kind::Bulkhead] {
        let program = match kind {
            Kind::Runc => find(kind.shim())?,
            Kind::Bulkhead => dist.join(kind.shim()),
        };
        let text = format!(
            "#!/bin/sh\n# Puts the whole config.json of the case into the bundle, then is the shim.\nid= previous=\n\
             for word; do [ \"$previous\" = -id ] && id=$word; previous=$word; done\n\
             [ \"$previous\" = start ] && [ -f \"{raw}/$id.json\" ] && cp \"{raw}/$id.json\" config.json\n\
             exec {program} \"$@\"\n",
            raw = raw.display(),
            program = program.display()
        );
        let file = folder.join(kind.shim());
        write(&file, text)?;
        fs::set_permissions(&file, PermissionsExt::from_mode(0o755))
            .context(format_args!("make {} executable", file.display()))?;
    }
    Ok(())
}

fn find(program: &str) -> Outcome<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .map(|folder| folder.join(program))
        .find(|file| file.exists())
        .context(format_args!("no {program} in PATH"))
}

impl<'a> Side<'a> {
    /// A side without a pod yet.
    pub fn new(kind: Kind, suite: &'a Suite, probe: &Path) -> Outcome<Self> {
        Ok(Self {
            kind,
            suite,
            probe: probe.to_owned(),
            raw: suite.folder("raw")?,
            pod: RefCell::new(None),
        })
    }

    /// Whether this is Bulkhead's.
    pub fn is_ours(&self) -> bool {
        self.kind == Kind::Bulkhead
    }

    fn pod_name(&self) -> String {
        format!("pod-{}", self.kind.name())
    }

    /// Starts the pod unless it runs.
    pub fn ensure_pod(&self) -> Outcome {
        if self.pod_lives() {
            return Ok(());
        }
        self.end_pod();
        let (root, folder) = self.make_root("pod")?;
        let mut spec = base();
        apply(
            &mut spec,
            &json!({
                "process": { "args": ["/probe", "hold", "namespaces"] },
                "annotations": { "io.kubernetes.cri.container-type": "sandbox", "io.bulkhead.memory_mib": "768" },
            }),
        );
        let name = self.pod_name();
        let names = self.names(&name, &root, &folder, 0);
        fill_in(&mut spec, &names);
        // The client waits for as long as the suite runs.
        let (pod, client) = self.start(&name, &spec)?.seconds(86_400).attach()?;
        client.wait_for("}\n", self.suite.scale.seconds(40))?;
        let view = serde_json::from_str(client.stdout().trim()).context("parse the pod's view")?;
        let (pid, _) = pod.status()?.context("the pod has no status")?;
        *self.pod.borrow_mut() = Some(Held {
            pod,
            client,
            pid,
            view,
        });
        Ok(())
    }

    /// Whether the pod's first container runs.
    pub fn pod_lives(&self) -> bool {
        let mut pod = self.pod.borrow_mut();
        pod.as_mut().is_some_and(|held| !held.client.has_ended())
    }

    /// Ends the pod.
    pub fn end_pod(&self) {
        let Some(held) = self.pod.borrow_mut().take() else {
            return;
        };
        let _ = held.pod.kill("SIGTERM");
        let _ = held.client.wait();
        let _ = held.pod.delete();
    }

    fn names(
        &self,
        name: &str,
        root: &Path,
        folder: &Path,
        pid: u32,
    ) -> [(&'static str, String); 6] {
        [
            ("$ROOT", root.to_string_lossy().into_owned()),
            ("$DIR", folder.to_string_lossy().into_owned()),
            ("$NAME", name.into()),
            ("$NS", self.suite.namespace().into()),
            ("$POD", self.pod_name()),
            ("$PID", pid.to_string()),
        ]
    }

    /// A fresh rootfs that holds the probe and little else, and a folder beside it.
    fn make_root(&self, key: &str) -> Outcome<(PathBuf, PathBuf)> {
        let base = self.suite.folder(&format!("{}-{key}", self.kind.name()))?;
        let (root, folder) = (base.join("root"), base.join("dir"));
        let _ = fs::remove_dir_all(&root);
        for name in ["proc", "sys", "dev", "tmp", "etc"] {
            make_folder(root.join(name))?;
        }
        make_folder(&folder)?;
        write(
            root.join("etc/passwd"),
            "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000:user:/home/user:/bin/sh\n",
        )?;
        let probe = root.join("probe");
        fs::hard_link(&self.probe, &probe)
            .or_else(|_| fs::copy(&self.probe, &probe).map(drop))
            .context("put the probe into the rootfs")?;
        Ok((root, folder))
    }

    /// The bundle of a case.
    pub fn bundle(&self, case: &Case) -> Outcome<Bundle> {
        let name = self.suite.name(self.kind.name());
        let (root, folder) = self.make_root(&name)?;
        let pid = self.pod.borrow().as_ref().map_or(0, |held| held.pid);
        let names = self.names(&name, &root, &folder, pid);
        for fixture in &case.files {
            let real = |path: &str| {
                let mut path = json!(path);
                fill_in(&mut path, &names);
                PathBuf::from(path.as_str().unwrap_or_default())
            };
            match fixture {
                Fixture::Folder(path) => make_folder(real(path))?,
                Fixture::File(path, text) => write(real(path), text)?,
                Fixture::Link(path, target) => {
                    let path = real(path);
                    let _ = fs::remove_dir(&path);
                    symlink(real(target), &path)
                        .context(format_args!("link {}", path.display()))?;
                }
            }
        }
        let mut spec = base();
        let args: Vec<&str> = std::iter::once("/probe")
            .chain(case.args.iter().map(String::as_str))
            .collect();
        spec["process"]["args"] = json!(args);
        apply(&mut spec, &case.patch);
        fill_in(&mut spec, &names);
        if let Some(text) = case.raw {
            write(self.raw.join(format!("{name}.json")), text(&spec))?;
        }
        Ok(Bundle {
            name,
            spec,
            root,
            folder,
        })
    }

    /// Removes what a bundle left on the disk.
    pub fn forget(&self, bundle: &Bundle) {
        let _ = fs::remove_file(self.raw.join(format!("{}.json", bundle.name)));
        if let Some(base) = bundle.root.parent() {
            let _ = fs::remove_dir_all(base);
        }
    }

    /// A `ctr run` of this side's runtime with exactly this spec.
    pub fn start(&self, name: &str, spec: &Value) -> Outcome<Run<'a>> {
        let raw = self.raw.join(format!("{name}.json"));
        if !raw.exists() {
            write(&raw, spec.to_string())?;
        }
        Ok(Run::of_spec(self.suite, spec)?
            .named(name)
            .runtime(self.kind.runtime()))
    }

    /// Starts a bundle's container with the client attached.
    pub fn spawn(&self, bundle: &Bundle) -> Outcome<Running> {
        self.start(&bundle.name, &bundle.spec)?.spawn()
    }

    /// Waits for the end of what [`spawn`](Self::spawn) started.
    pub fn end(&self, bundle: &Bundle, running: Running) -> Outcome<End> {
        let output = running.wait()?;
        let error = output.errors();
        let refusal = error.lines().find(|line| line.starts_with("ctr: "));
        if refusal.is_some() {
            let remove = self.suite.ctr(["container", "rm", &bundle.name]);
            let _ = remove.output();
        }
        let text = output.text();
        let mut view = serde_json::from_str(&text).unwrap_or_else(|_| json!(text));
        self.name_namespaces(&mut view);
        let mut seen = Map::new();
        seen.insert("started".into(), json!(refusal.is_none()));
        if refusal.is_none() {
            seen.insert("status".into(), json!(output.status));
            seen.insert("view".into(), view);
        }
        Ok(End {
            started: refusal.is_none(),
            seen: seen.into(),
            error: refusal.unwrap_or(&error).to_owned(),
            took: output.took,
        })
    }

    /// Runs a bundle's container to its end.
    pub fn run(&self, bundle: &Bundle) -> Outcome<End> {
        let running = self.spawn(bundle)?;
        self.end(bundle, running)
    }

    /// Numbers of namespaces mean nothing to the other side: whose they are does.
    fn name_namespaces(&self, view: &mut Value) {
        let pod = self.pod.borrow();
        let Some(Value::Object(map)) = view.get_mut("namespaces") else {
            return;
        };
        for (kind, value) in map {
            let Some(text) = value.as_str() else { continue };
            let number = text
                .split(['[', ']'])
                .nth(1)
                .and_then(|n| n.parse::<u64>().ok());
            let Some(number) = number else { continue };
            let pods = pod
                .as_ref()
                .and_then(|held| held.view["namespaces"][kind].as_str());
            *value = if INITIAL.contains(&(kind, number)) {
                json!("the machine's")
            } else if pods == Some(text) {
                json!("the pod's")
            } else {
                json!("its own")
            };
        }
    }

    /// The numbers `ctr` shows for a container's task: pid and status.
    pub fn status(&self, name: &str) -> Outcome<Option<(u32, String)>> {
        let list = self.suite.ctr(["task", "ls"]).output()?.ok()?.text();
        Ok(list.lines().find_map(|line| {
            let mut words = line.split_whitespace();
            (words.next() == Some(name)).then_some(())?;
            Some((words.next()?.parse().ok()?, words.next()?.to_owned()))
        }))
    }

    /// Sends a signal to a container's first process.
    pub fn kill(&self, name: &str, signal: &str) -> Outcome {
        self.suite
            .ctr(["task", "kill", "-s", signal, name])
            .output()?
            .ok()?;
        Ok(())
    }
}

impl Drop for Side<'_> {
    fn drop(&mut self) {
        self.end_pod();
    }
}

/// Adds what only a failure of the harness itself says.
pub fn failed(text: impl Into<String>) -> Failure {
    Failure::Failed(text.into())
}
