//! What every case gets: a containerd of the suite's own, images, the configuration and names.

use std::{
    cell::{Cell, OnceCell, RefCell},
    collections::BTreeSet,
    ffi::OsStr,
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

mod images;
mod logs;

pub use images::{Image, Mounted};
use rustix::process::Signal;

use crate::{
    command::Invocation,
    containerd::{self, Containerd, Settings, unmount_below},
    docker::{self, Docker},
    failure::{Context, Outcome, make_folder, write},
    leaks::{Daemon, Scope},
    network::Network,
    pod::Run,
    process,
    scale::Scale,
};

/// What runs the containers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// Our VMM on `/dev/kvm`.
    Kvm,
    /// Our VMM with QEMU as a software CPU.
    Emulated,
    /// runc: shows that the cases themselves are right.
    Runc,
}

/// containerd's namespace of what comes through CRI.
pub const CRI_NAMESPACE: &str = "k8s.io";

/// How a suite is started.
#[derive(Clone, Debug)]
pub struct Options {
    /// What runs the containers.
    pub engine: Engine,
    /// Folder with the product's programs, kernel and initramfs.
    pub dist: PathBuf,
    /// Folder with the images' tar files.
    pub images: PathBuf,
    /// Folder of `dockerd` and its kind, if not in `PATH`.
    pub docker: Option<PathBuf>,
    /// Folder of `containerd` and `ctr`, if not in `PATH`.
    pub containerd: Option<PathBuf>,
    /// That of an older version, for upgrades; if none, the one in `PATH`.
    pub older: Option<PathBuf>,
    /// Sizes and waits.
    pub scale: Scale,
}

impl Options {
    /// Of a suite with the host's own containerd and without Docker, in this host's sizes.
    pub fn new(engine: impl Into<Engine>, dist: PathBuf, images: PathBuf) -> Self {
        Self {
            engine: engine.into(),
            dist,
            images,
            docker: None,
            containerd: None,
            older: None,
            scale: Scale::detect(false),
        }
    }
}

/// See the module.
#[derive(Debug)]
pub struct Suite {
    /// What it was started with.
    pub engine: Engine,
    /// Sizes and waits.
    pub scale: Scale,
    /// Folder with the product's programs, kernel and initramfs.
    pub dist: PathBuf,
    images: PathBuf,
    run: PathBuf,
    data: PathBuf,
    namespace: String,
    containerd: RefCell<Option<Containerd>>,
    imported: RefCell<BTreeSet<(Image, String)>>,
    counter: Cell<u32>,
    rootfs: OnceCell<PathBuf>,
    probe: OnceCell<Result<String, String>>,
    saved: RefCell<String>,
    network: Option<Network>,
    networked: OnceCell<Outcome<Box<Suite>>>,
    docker_programs: Option<PathBuf>,
    programs: Option<PathBuf>,
    older: Option<PathBuf>,
    /// containerd's major version.
    pub major: u32,
    docker: OnceCell<Outcome<Docker>>,
}

impl Suite {
    /// Starts containerd.
    pub fn start(options: Options) -> Outcome<Self> {
        Self::begin(options, "", false)
    }

    /// A suite beside this one in a network of its own: its containerd, `ctr` and CNI's plugins live there.
    pub fn networked(&self) -> Outcome<&Self> {
        let made = self.networked.get_or_init(|| {
            let options = Options {
                engine: self.engine,
                dist: self.dist.clone(),
                images: self.images.clone(),
                docker: self.docker_programs.clone(),
                containerd: self.programs.clone(),
                older: self.older.clone(),
                scale: self.scale.clone(),
            };
            Self::begin(options, "-net", true).map(Box::new)
        });
        made.as_deref().map_err(Clone::clone)
    }

    fn begin(options: Options, kind: &str, networked: bool) -> Outcome<Self> {
        let id = format!("bulkhead-e2e-{}{kind}", std::process::id());
        let (run, data) = (Path::new("/run").join(&id), Path::new("/var/tmp").join(&id));
        make_folder(&run)?;
        make_folder(&data)?;
        let network = match networked {
            true => Some(Network::start(
                &data.join("over"),
                options.scale.seconds(60),
            )?),
            false => None,
        };
        let suite = Self {
            engine: options.engine,
            scale: options.scale,
            dist: absolute(&options.dist)?,
            images: absolute(&options.images)?,
            run,
            data,
            namespace: format!("e2e-{}{kind}", std::process::id()),
            containerd: RefCell::new(None),
            imported: RefCell::default(),
            counter: Cell::new(0),
            rootfs: OnceCell::new(),
            probe: OnceCell::new(),
            saved: RefCell::default(),
            network,
            networked: OnceCell::new(),
            docker_programs: options.docker.as_deref().map(absolute).transpose()?,
            major: containerd::major_version(options.containerd.as_deref())?,
            programs: options.containerd.as_deref().map(absolute).transpose()?,
            older: options.older.as_deref().map(absolute).transpose()?,
            docker: OnceCell::new(),
        };
        suite.configure("")?;
        let containerd = Containerd::start(suite.settings("main", None))?;
        *suite.containerd.borrow_mut() = Some(containerd);
        suite
            .ctr(["namespaces", "create", &suite.namespace])
            .output()?
            .ok()?;
        if let Some(network) = &suite.network {
            suite.mount_tools(network)?;
        }
        Ok(suite)
    }

    fn mount_tools(&self, network: &Network) -> Outcome {
        self.import(Image::Net)?;
        let folder = self.data.join("tools");
        make_folder(&folder)?;
        let mount = self.ctr(["image", "mount", "--rw", &Image::Net.reference()]);
        mount.arg(&folder).output()?.ok()?;
        let at = folder.to_string_lossy();
        let script = "mount --bind /dev \"$1/dev\"; mount -t proc proc \"$1/proc\"";
        let bind = network.host(&["sh", "-ec", script, "sh", &at]);
        bind.output()?.ok()?;
        network.set_tools(folder.clone());
        Ok(())
    }

    /// The network of a [`networked`](Self::networked) suite.
    pub fn network(&self) -> Outcome<&Network> {
        self.network.as_ref().context("no network of its own")
    }

    /// Docker on this suite's containerd, which has a network of its own.
    pub fn docker(&self) -> Outcome<&Docker> {
        let made = self.docker.get_or_init(|| {
            let programs = self.docker_programs.as_deref();
            let (run, data) = (self.run.join("docker"), self.data.join("docker"));
            Docker::start(self, programs, &run, &data)
        });
        made.as_ref().map_err(Clone::clone)
    }

    fn enter(&self) -> Vec<String> {
        self.network
            .as_ref()
            .map(Network::enter)
            .unwrap_or_default()
    }

    /// A command where the suite's containerd lives.
    pub fn command(&self, program: &str) -> Invocation {
        match self.enter().split_first() {
            Some((first, rest)) => Invocation::new(first).args(rest).arg(program),
            None => Invocation::new(program),
        }
    }

    fn settings(&self, name: &str, before: Option<String>) -> Settings {
        Settings {
            run: self.run.join(name),
            data: self.data.join(name),
            programs: self.programs.clone(),
            dist: self.dist.clone(),
            config: self.config(),
            before,
            enter: self.enter(),
            cri: self.network.as_ref().map(|n| self.cri(n)),
            limit: self.scale.seconds(20),
        }
    }

    /// The CRI plugin: both runtimes by name, pods on the network's default list.
    fn cri(&self, network: &Network) -> String {
        let plugin = "plugins.\"io.containerd.grpc.v1.cri\"";
        format!(
            r#"[{plugin}]
  sandbox_image = "{pause}"
  stream_server_address = "127.0.0.1"
  stream_server_port = "0"
  disable_apparmor = true
  restrict_oom_score_adj = true
  netns_mounts_under_state_dir = true
[{plugin}.containerd]
  default_runtime_name = "suite"
[{plugin}.containerd.runtimes.suite]
  runtime_type = "{runtime}"
[{plugin}.containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
{sandboxed}[{plugin}.cni]
  bin_dir = "{plugins}"
  conf_dir = "/etc/cni/net.d"
"#,
            pause = Image::Pause.reference(),
            runtime = self.runtime(),
            // Pods without a pause container, by the Sandbox API.
            sandboxed = match self.major {
                0 | 1 => String::new(),
                _ => format!(
                    "[{plugin}.containerd.runtimes.sandboxed]\n  runtime_type = \"{}\"\n  sandboxer = \"shim\"\n",
                    self.runtime()
                ),
            },
            plugins = network.plugins().display(),
        )
    }

    /// Starts a second containerd; `before` runs in its mount namespace first.
    pub fn another_containerd(&self, name: &str, before: &str) -> Outcome<Containerd> {
        Containerd::start(self.settings(name, Some(before.to_owned())))
    }

    /// Starts a second containerd, of the older version. [`upgrade`](Self::upgrade) makes it the suite's version.
    pub fn older_containerd(&self, name: &str) -> Outcome<Containerd> {
        let programs = self.older.clone();
        Containerd::start(Settings {
            programs,
            ..self.settings(name, None)
        })
    }

    /// Upgrades another containerd to the suite's version.
    pub fn upgrade(&self, containerd: &mut Containerd) -> Outcome {
        containerd.replace(self.programs.clone())
    }

    /// The file that `BULKHEAD_CONFIG` names.
    pub fn config(&self) -> PathBuf {
        self.run.join("config.toml")
    }

    /// Folder of the pods' state folders.
    pub fn state(&self) -> PathBuf {
        self.run.join("pods")
    }

    /// State folder of a container's pod.
    pub fn state_of(&self, container: &str) -> PathBuf {
        self.state().join(format!("{}-{container}", self.namespace))
    }

    /// A folder for a case's own files, on a disk.
    pub fn folder(&self, name: &str) -> Outcome<PathBuf> {
        let folder = self.data.join("cases").join(name);
        make_folder(&folder)?;
        Ok(folder)
    }

    /// Writes the configuration, with `lines` in place of the keys they name.
    pub fn configure(&self, lines: &str) -> Outcome {
        let engine = match self.engine {
            Engine::Kvm => "kvm",
            _ => "emulated",
        };
        let defaults = [
            ("engine", format!("engine = {engine:?}")),
            ("state", format!("state = {:?}", self.state())),
        ];
        let mut text = String::from(lines);
        text.push('\n');
        for (key, line) in defaults {
            if !lines.lines().any(|l| l.trim_start().starts_with(key)) {
                text.push_str(&line);
                text.push('\n');
            }
        }
        write(self.config(), text)
    }

    /// The same until the value goes.
    pub fn configured(&self, lines: &str) -> Outcome<Configured<'_>> {
        self.configure(lines)?;
        Ok(Configured(self))
    }

    /// containerd's namespace.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// Text that only this suite's paths hold.
    pub fn mark(&self) -> String {
        self.run.to_string_lossy().into_owned()
    }

    /// A name that was not used before.
    pub fn name(&self, what: &str) -> String {
        self.counter.set(self.counter.get() + 1);
        format!("{what}-{}", self.counter.get())
    }

    /// `ctr` on the suite's containerd.
    pub fn ctr(&self, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Invocation {
        self.ctr_at(&self.address(), args)
    }

    /// `ctr` on another containerd.
    pub fn ctr_at(
        &self,
        address: &Path,
        args: impl IntoIterator<Item = impl AsRef<OsStr>>,
    ) -> Invocation {
        let ctr = containerd::program(self.programs.as_deref(), "ctr");
        self.command(&ctr.to_string_lossy())
            .arg("-a")
            .arg(address)
            .args(["-n", &self.namespace])
            .args(args)
            .limit(self.scale.seconds(60))
    }

    /// Its containerd's socket.
    pub fn address(&self) -> PathBuf {
        self.run.join("main/c.sock")
    }

    /// The runtime's name for `ctr run`.
    pub fn runtime(&self) -> &'static str {
        match self.engine {
            Engine::Runc => "io.containerd.runc.v2",
            _ => "io.containerd.bulkhead.v1",
        }
    }

    /// A container of an image, yet to be run.
    pub fn run(&self, image: Image) -> Run<'_> {
        Run::new(self, vec![image.reference()])
    }

    /// A busybox container.
    pub fn busybox(&self) -> Run<'_> {
        self.run(Image::Busybox)
    }

    /// Output of a command that many cases look at, run once.
    pub fn once(&self, run: impl FnOnce() -> Outcome<String>) -> Outcome<&str> {
        if let Some(kept) = self.probe.get() {
            return kept
                .as_deref()
                .map_err(|_| "as in the first case of the group".into());
        }
        let end = run();
        let kept = end.as_ref().map_err(ToString::to_string).cloned();
        let kept = self.probe.get_or_init(|| kept);
        end?;
        kept.as_deref().map_err(|error| error.as_str().into())
    }

    /// containerd's process.
    pub fn containerd_pid(&self) -> Outcome<u32> {
        let containerd = self.containerd.borrow();
        Ok(containerd.as_ref().context("no containerd")?.pid())
    }

    /// Restarts containerd.
    pub fn restart_containerd(&self) -> Outcome {
        let mut containerd = self.containerd.borrow_mut();
        containerd.as_mut().context("no containerd")?.restart()
    }

    /// Kills containerd, does something else while it is away, and starts it again.
    pub fn kill_containerd_and(&self, meanwhile: impl FnOnce() -> Outcome) -> Outcome {
        let mut containerd = self.containerd.borrow_mut();
        let containerd = containerd.as_mut().context("no containerd")?;
        containerd.kill_and(meanwhile)
    }

    /// Where a leak check looks.
    pub fn scope(&self) -> Scope {
        let containerd = self.containerd.borrow();
        let snapshots = "main/io.containerd.snapshotter.v1.overlayfs/snapshots";
        let mut folders = vec![(self.state(), 2), (self.data.join(snapshots), 1)];
        for namespace in [&self.namespace, CRI_NAMESPACE, docker::NAMESPACE] {
            folders.extend(containerd.iter().map(|c| (c.bundles(namespace), 2)));
        }
        Scope {
            mark: self.mark(),
            namespace: self.namespace.clone(),
            folders,
            containerd: containerd.as_ref().map(|containerd| Daemon {
                pid: containerd.pid(),
                socket: self.address(),
                namespaces: [&self.namespace, CRI_NAMESPACE, docker::NAMESPACE]
                    .map(ToString::to_string)
                    .to_vec(),
            }),
            holders: containerd
                .iter()
                .map(Containerd::pid)
                .chain([std::process::id()])
                .collect(),
            network: self.network.as_ref().map(|n| (n.pid(), n.enter())),
        }
    }

    /// Removes by force whatever a failed case left.
    pub fn clean(&self) {
        let list = |args: [&str; 3]| {
            self.ctr(args)
                .output()
                .map(|o| o.text())
                .unwrap_or_default()
        };
        for id in list(["task", "ls", "-q"]).lines() {
            let _ = self
                .ctr(["task", "rm", "-f", id])
                .limit(self.scale.seconds(10))
                .output();
        }
        for id in list(["container", "ls", "-q"]).lines() {
            let _ = self
                .ctr(["container", "rm", id])
                .limit(self.scale.seconds(10))
                .output();
        }
        for process in process::of_pods(&self.mark()) {
            let _ = process.signal(Signal::KILL);
        }
        unmount_below(&self.run.join("pods"));
        unmount_below(&self.data.join("cases"));
        let _ = fs::remove_dir_all(self.state());
        let _ = self.configure("");
    }

    /// How long an end that nobody waits for may take.
    pub fn settle(&self) -> Duration {
        self.scale.seconds(3)
    }

    /// Has containerd remove the snapshots that nobody uses: it overlooks one that is given up while it looks through them.
    pub fn collect_garbage(&self) {
        let lease = self.name("collect");
        let _ = self.ctr(["leases", "create", "--id", &lease]).output();
        let _ = self.ctr(["leases", "delete", "--sync", &lease]).output();
    }
}

impl Drop for Suite {
    fn drop(&mut self) {
        self.clean();
        if let Some(Ok(docker)) = self.docker.get() {
            docker.end();
        }
        self.containerd.borrow_mut().take();
        if let Some(network) = self.network.take() {
            network.end();
        }
        unmount_below(&self.run);
        unmount_below(&self.data);
        let _ = fs::remove_dir_all(&self.run);
        let _ = fs::remove_dir_all(&self.data);
        for hierarchy in fs::read_dir("/sys/fs/cgroup")
            .into_iter()
            .flatten()
            .flatten()
        {
            remove_cgroups(&hierarchy.path().join(&self.namespace));
        }
        remove_cgroups(&Path::new("/sys/fs/cgroup").join(&self.namespace));
    }
}

/// Also what a failed case has left below it.
fn remove_cgroups(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_cgroups(&entry.path());
        }
    }
    let _ = fs::remove_dir(folder);
}

/// Restores the configuration at its end.
#[derive(Debug)]
pub struct Configured<'a>(&'a Suite);

impl Drop for Configured<'_> {
    fn drop(&mut self) {
        let _ = self.0.configure("");
    }
}

fn absolute(path: &Path) -> Outcome<PathBuf> {
    std::path::absolute(path).context(format_args!("path {}", path.display()))
}
