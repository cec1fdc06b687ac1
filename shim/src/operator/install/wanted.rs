//! What an installation consists of.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use super::{Error, Target, containerd, docker, io_error};
use crate::config::DEFAULT_PATH;

/// Programs, kernel and initramfs, with their permissions.
pub const FILES: [(&str, u32); 6] = [
    ("containerd-shim-bulkhead-v1", 0o755),
    ("bulkhead", 0o755),
    ("bulkhead-vmm", 0o755),
    ("bulkhead-fs", 0o755),
    ("vmlinux", 0o644),
    ("initramfs.cpio", 0o644),
];
/// What is found by `PATH`.
const LINKED: [&str; 2] = ["containerd-shim-bulkhead-v1", "bulkhead"];

/// What the guest needs beside its containers (see `spec::size`), and the host's processes; the CPU is the VMM's and the shim's.
const RUNTIME_CLASS: &str = "\
# The runtime class of pods that Bulkhead runs: kubectl apply -f this, then runtimeClassName: bulkhead in a pod.
apiVersion: node.k8s.io/v1
kind: RuntimeClass
metadata:
  name: bulkhead
handler: bulkhead
overhead:
  podFixed:
    memory: 160Mi
    cpu: 100m
";

/// What is known of the host.
#[derive(Clone, Debug)]
pub struct Facts {
    /// The engine that it can run: `kvm`, `emulated` or `none`.
    pub engine: &'static str,
    /// Why it is not `kvm`.
    pub why: String,
    /// Version of containerd, if there is one.
    pub containerd: Option<(u32, u32)>,
    /// Whether there is a Docker.
    pub docker: bool,
}

/// A thing to place.
#[derive(Clone, Debug)]
pub enum Item {
    /// A file of the distribution.
    Copy {
        /// Where from, on this host.
        from: PathBuf,
        /// Where to.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
    },
    /// A symbolic link.
    Link {
        /// Where.
        path: PathBuf,
        /// Where to it leads.
        to: PathBuf,
    },
    /// A text: if somebody else has written or changed it, it stays as it is.
    Text {
        /// Where.
        path: PathBuf,
        /// Its content.
        text: String,
    },
    /// A file that is edited.
    Edit {
        /// Which one.
        path: PathBuf,
        /// Its content afterwards.
        text: String,
    },
}

impl Item {
    /// Where it goes.
    pub fn path(&self) -> &Path {
        match self {
            Self::Copy { path, .. }
            | Self::Link { path, .. }
            | Self::Text { path, .. }
            | Self::Edit { path, .. } => path,
        }
    }
}

/// The items, and what is to be said to the operator afterwards.
#[derive(Debug, Default)]
pub struct Wanted {
    /// In the order in which they are placed.
    pub items: Vec<Item>,
    /// What the operator has to do.
    pub todo: Vec<String>,
}

/// Everything for a host with these facts; the files come from the folder `from`.
pub fn wanted(target: &Target, from: &Path, facts: &Facts) -> Result<Wanted, Error> {
    let mut wanted = Wanted::default();
    for (name, mode) in FILES {
        let from = from.join(name);
        fs::metadata(&from).map_err(io_error("reading", &from))?;
        wanted.items.push(Item::Copy {
            from,
            path: target.lib().join(name),
            mode,
        });
    }
    for name in LINKED {
        wanted.items.push(Item::Link {
            path: target.prefix.join("bin").join(name),
            to: Path::new("../lib/bulkhead").join(name),
        });
    }
    wanted.items.push(Item::Text {
        path: DEFAULT_PATH.into(),
        text: config(facts),
    });
    wanted.items.push(Item::Text {
        path: target.prefix.join("share/bulkhead/runtimeclass.yaml"),
        text: RUNTIME_CLASS.into(),
    });
    if facts.engine == "none" {
        wanted.todo.push(format!(
            "This host can run no engine yet ({}): see `bulkhead check`.",
            facts.why
        ));
    }
    containerd_items(target, facts, &mut wanted)?;
    docker_items(target, facts, &mut wanted)?;
    let class = target.prefix.join("share/bulkhead/runtimeclass.yaml");
    wanted.todo.push(format!(
        "Kubernetes: kubectl apply -f {}, then runtimeClassName: bulkhead in a pod.",
        class.display()
    ));
    if ![Path::new("/usr/local"), Path::new("/usr")].contains(&target.prefix.as_path()) {
        wanted.todo.push(format!(
            "containerd must have {} in its PATH.",
            target.prefix.join("bin").display()
        ));
    }
    Ok(wanted)
}

fn config(facts: &Facts) -> String {
    // Without what was measured: the same host gets the same file.
    let (engine, comment) = match facts.engine {
        "emulated" => (
            "emulated",
            "# A software CPU, which is no wall: this host cannot run \"kvm\", and `bulkhead check` tells why.\n",
        ),
        _ => ("kvm", ""),
    };
    format!(
        "# Bulkhead's configuration. Keys: docs/architecture.md, \"Configuration\".\n{comment}engine = \"{engine}\"\n"
    )
}

fn containerd_items(target: &Target, facts: &Facts, wanted: &mut Wanted) -> Result<(), Error> {
    let Some(version) = facts.containerd else {
        wanted
            .todo
            .push("containerd is not installed: nothing was configured for it.".into());
        return Ok(());
    };
    let path = target.on_host(Path::new(containerd::MAIN));
    let main = read(&path)?;
    // Ours of an earlier installation is written anew.
    let ours = main
        .as_deref()
        .is_some_and(|main| main.starts_with("# Written by `bulkhead install`."));
    let plan = containerd::plan(version, main.as_deref().filter(|_| !ours));
    let plan = plan.map_err(|why| Error::Unreadable { path, why })?;
    let main_file = containerd::MAIN;
    match plan {
        containerd::Plan::Done => {}
        containerd::Plan::Add(lines) => {
            wanted
                .todo
                .push(format!("containerd: add to {main_file}:\n\n{lines}"));
        }
        containerd::Plan::Write { path, text, add } => {
            wanted.items.push(Item::Text { path, text });
            if let Some(lines) = add {
                wanted.todo.push(format!(
                    "containerd: add to {main_file}, before its first section:\n\n{lines}"
                ));
            }
        }
    }
    if main.as_deref().is_some_and(containerd::cri_is_off) {
        wanted.todo.push(format!(
            "containerd: {main_file} turns the CRI plugin off; Kubernetes needs it (disabled_plugins)."
        ));
    }
    wanted
        .todo
        .push("containerd: systemctl restart containerd (pods go on).".into());
    Ok(())
}

fn docker_items(target: &Target, facts: &Facts, wanted: &mut Wanted) -> Result<(), Error> {
    let path = target.on_host(Path::new(docker::FILE));
    let before = read(&path)?;
    if !facts.docker && before.is_none() {
        return Ok(());
    }
    let merged = docker::merge(before.as_deref().unwrap_or_default());
    match merged.map_err(|why| Error::Unreadable { path, why })? {
        // Said again to plan.rs, so that an installation over an older one keeps the entry.
        None => wanted.items.push(Item::Edit {
            path: docker::FILE.into(),
            text: before.unwrap_or_default(),
        }),
        Some(text) => wanted.items.push(Item::Edit {
            path: docker::FILE.into(),
            text,
        }),
    }
    wanted
        .todo
        .push("Docker: systemctl reload docker, then docker run --runtime bulkhead.".into());
    Ok(())
}

fn read(path: &Path) -> Result<Option<String>, Error> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(io_error("reading", path)(source)),
    }
}
