//! A containerd of the suite's own: folders, sockets and configuration apart from the host's.

use std::{
    fs::File,
    os::unix::{net::UnixStream, process::CommandExt},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};

use crate::{
    command::Invocation,
    failure::{Context, Failure, Outcome, make_folder, write},
    profile,
};

/// Where a containerd lives and what it starts with.
#[derive(Clone, Debug)]
pub struct Settings {
    /// State and sockets; short, for a socket's path has at most 107 bytes.
    pub run: PathBuf,
    /// Images and snapshots.
    pub data: PathBuf,
    /// Folder of `containerd` and `ctr`, if not in `PATH`.
    pub programs: Option<PathBuf>,
    /// Folder of the shim, first in `PATH`.
    pub dist: PathBuf,
    /// File that `BULKHEAD_CONFIG` names.
    pub config: PathBuf,
    /// Shell text that runs before containerd in the same process, in a mount namespace of its own.
    pub before: Option<String>,
    /// Words before the command: it runs in other namespaces than the suite.
    pub enter: Vec<String>,
    /// The CRI plugin's part of the configuration; without it the plugin is off.
    pub cri: Option<String>,
    /// How long it may take to answer.
    pub limit: Duration,
}

/// A running containerd; it ends with this value.
#[derive(Debug)]
pub struct Containerd {
    settings: Settings,
    child: Child,
}

impl Containerd {
    /// Starts containerd and waits until it answers.
    pub fn start(settings: Settings) -> Outcome<Self> {
        make_folder(&settings.run)?;
        make_folder(&settings.data)?;
        let text = format!(
            r#"version = 2
root = "{data}"
state = "{run}/state"
disabled_plugins = [{cri_off}"io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs", "io.containerd.internal.v1.opt",
  "io.containerd.nri.v1.nri", "io.containerd.tracing.processor.v1.otlp", "io.containerd.internal.v1.tracing"]
[grpc]
  address = "{run}/c.sock"
[ttrpc]
  address = "{run}/c.sock.ttrpc"
[debug]
  address = "{run}/{debug}"
# By default a removed snapshot stays for fifty times as long as the last collection took.
[plugins."io.containerd.gc.v1.scheduler"]
  deletion_threshold = 1
{cri}"#,
            cri_off = match settings.cri {
                None => "\"io.containerd.grpc.v1.cri\", ",
                Some(_) => "",
            },
            cri = settings.cri.as_deref().unwrap_or_default(),
            data = settings.data.display(),
            debug = profile::SOCKET,
            run = settings.run.display(),
        );
        write(settings.run.join("containerd.toml"), text)?;
        let child = Self::spawn(&settings)?;
        let mut containerd = Self { settings, child };
        containerd.wait_until_ready()?;
        Ok(containerd)
    }

    /// The address for `ctr -a`.
    pub fn address(&self) -> PathBuf {
        self.settings.run.join("c.sock")
    }

    /// Its log, to which the shims write as well.
    pub fn log(&self) -> PathBuf {
        self.settings.run.join("containerd.log")
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Folder of the bundles of `namespace`.
    pub fn bundles(&self, namespace: &str) -> PathBuf {
        self.settings
            .run
            .join("state/io.containerd.runtime.v2.task")
            .join(namespace)
    }

    /// Ends containerd and starts it again; tasks go on in between.
    pub fn restart(&mut self) -> Outcome {
        self.again(Signal::TERM, || Ok(()))
    }

    /// Kills containerd, does something else while it is away, and starts it again.
    pub fn kill_and(&mut self, meanwhile: impl FnOnce() -> Outcome) -> Outcome {
        self.again(Signal::KILL, meanwhile)
    }

    fn again(&mut self, signal: Signal, meanwhile: impl FnOnce() -> Outcome) -> Outcome {
        self.end(signal)?;
        meanwhile()?;
        self.child = Self::spawn(&self.settings)?;
        self.wait_until_ready()
    }

    /// Ends it and starts another version in its place.
    pub fn replace(&mut self, programs: Option<PathBuf>) -> Outcome {
        self.settings.programs = programs;
        self.restart()
    }

    fn spawn(settings: &Settings) -> Outcome<Child> {
        let log = File::options()
            .create(true)
            .append(true)
            .open(settings.run.join("containerd.log"))
            .context("open containerd's log")?;
        let path = std::env::var("PATH").unwrap_or_default();
        let program = program(settings.programs.as_deref(), "containerd");
        let mut command = match &settings.before {
            None if !settings.enter.is_empty() => {
                let mut command = Command::new(&settings.enter[0]);
                command.args(&settings.enter[1..]).arg(program);
                command
            }
            None => Command::new(program),
            Some(text) => {
                let mut command = Command::new("unshare");
                command.args(["-m", "sh", "-ec", &format!("{text}\nexec \"$@\"")]);
                command.arg("sh").arg(program);
                command
            }
        };
        command
            .arg("-c")
            .arg(settings.run.join("containerd.toml"))
            .env("PATH", format!("{}:{path}", settings.dist.display()))
            .env("BULKHEAD_CONFIG", &settings.config)
            .stdin(Stdio::null())
            .stdout(log.try_clone().context("log")?)
            .stderr(log)
            .process_group(0)
            .spawn()
            .context("start containerd")
    }

    fn wait_until_ready(&mut self) -> Outcome {
        let end = Instant::now() + self.settings.limit;
        while Instant::now() < end {
            if let Ok(Some(status)) = self.child.try_wait() {
                return Err(Failure::Failed(format!("containerd: {status}")));
            }
            if UnixStream::connect(self.address()).is_ok() {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Err(Failure::Failed("containerd does not answer".into()))
    }

    fn end(&mut self, signal: Signal) -> Outcome {
        let pid = i32::try_from(self.child.id())
            .ok()
            .and_then(Pid::from_raw)
            .context("pid")?;
        let _ = kill_process(pid, signal);
        let end = Instant::now() + self.settings.limit;
        while matches!(self.child.try_wait(), Ok(None)) {
            if Instant::now() > end {
                let _ = self.child.kill();
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }
}

/// A program of the folder, or of `PATH`.
pub fn program(folder: Option<&Path>, name: &str) -> PathBuf {
    folder.map_or_else(|| name.into(), |folder| folder.join(name))
}

/// The major version of a containerd.
pub fn major_version(folder: Option<&Path>) -> Outcome<u32> {
    let output = Invocation::new(program(folder, "containerd")).arg("--version");
    let text = output.output()?.ok()?.text();
    // `containerd NAME VERSION REVISION`
    let version = text.split_whitespace().nth(2).unwrap_or_default();
    let major = version.trim_start_matches('v').split('.').next();
    major
        .and_then(|major| major.parse().ok())
        .context(format_args!("version in {text:?}"))
}

impl Drop for Containerd {
    fn drop(&mut self) {
        let _ = self.end(Signal::TERM);
    }
}

/// Unmounts everything at or below `folder`, deepest first.
pub fn unmount_below(folder: &Path) {
    let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let mut points: Vec<&str> = table
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .filter(|point| Path::new(point).starts_with(folder))
        .collect();
    points.sort_by_key(|point| std::cmp::Reverse(point.len()));
    for point in points {
        let _ = rustix::mount::unmount(point, rustix::mount::UnmountFlags::DETACH);
    }
}
