//! A Docker daemon of the suite's own, on the suite's containerd and in the suite's network: its folders, sockets, bridge
//! and firewall rules are inside and end with it.

use std::{
    cell::RefCell,
    collections::BTreeSet,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use rustix::process::Signal;

use crate::{
    command::{Invocation, Running},
    failure::{Failure, Outcome, make_folder, skip, write},
    suite::{Image, Suite},
};

/// containerd's namespace of Docker's containers.
pub const NAMESPACE: &str = "moby";
/// Where [`Docker::registry`] listens: a loopback address, for which Docker asks no certificate.
pub const REGISTRY: &str = "127.0.0.1:5000";

/// The first daemon that takes a shim by its name.
const LEAST: u32 = 23;

/// The daemon; it ends with this value.
#[derive(Debug)]
pub struct Docker {
    daemon: Running,
    socket: PathBuf,
    programs: Option<PathBuf>,
    runtime: &'static str,
    loaded: RefCell<BTreeSet<Image>>,
    limit: Duration,
}

impl Docker {
    /// Starts a daemon. `programs` is the folder of `dockerd` and its kind, if not in `PATH`.
    pub(crate) fn start(
        suite: &Suite,
        programs: Option<&Path>,
        run: &Path,
        data: &Path,
    ) -> Outcome<Self> {
        let program = |name: &str| program(programs, name);
        match version(&program("dockerd")) {
            Some(found) if found >= LEAST => {}
            Some(found) => return skip(format!("Docker {found} takes no shim by its name")),
            None => return skip("no Docker (dockerd) on this machine"),
        }
        make_folder(run)?;
        make_folder(data)?;
        let socket = run.join("docker.sock");
        // What has no option of its own lives in folders of the mount namespace.
        let script = "mkdir -p /run/docker; mount -t tmpfs tmpfs /run/docker; mkdir -p /etc/docker; exec \"$@\"";
        let proxy = program("docker-proxy");
        let mut daemon = suite
            .command("sh")
            .args(["-ec", script, "sh", &program("dockerd")])
            .arg("--data-root")
            .arg(data)
            .arg("--exec-root")
            .arg(run.join("exec"))
            .arg("--pidfile")
            .arg(run.join("pid"))
            .arg(format!("--host=unix://{}", socket.display()))
            .arg("--containerd")
            .arg(suite.address())
            .args(["--bip", "10.93.0.1/24", "--ip6tables=false"])
            .args(["--default-address-pool", "base=10.94.0.0/16,size=24"])
            // What `docker build` runs its steps by.
            .args(["--default-runtime", suite.runtime()])
            // Where systemd runs, its driver would want a slice's name as parent.
            .args(["--exec-opt", "native.cgroupdriver=cgroupfs"])
            .arg(format!("--cgroup-parent=/{}", suite.namespace()));
        if let Some(folder) = programs {
            let path = std::env::var("PATH").unwrap_or_default();
            daemon = daemon
                .args(["--userland-proxy-path", &proxy])
                .env("PATH", format!("{}:{path}", folder.display()));
        }
        let daemon = daemon.limit(Duration::from_secs(24 * 3600)).spawn()?;
        let mut docker = Self {
            daemon,
            socket,
            programs: programs.map(Path::to_path_buf),
            runtime: suite.runtime(),
            loaded: RefCell::default(),
            limit: suite.scale.seconds(60),
        };
        docker.wait_until_ready(suite)?;
        Ok(docker)
    }

    /// `docker load` of an image, once.
    pub(crate) fn load(&self, suite: &Suite, image: Image) -> Outcome {
        if self.loaded.borrow().contains(&image) {
            return Ok(());
        }
        let tar = suite.tar_of(image)?.to_string_lossy().into_owned();
        let load = self.call(suite, &["load", "-i", &tar]);
        load.output()?.ok()?;
        self.loaded.borrow_mut().insert(image);
        Ok(())
    }

    /// A registry at [`REGISTRY`] with its images in `folder`; it ends with the value.
    pub fn registry(&self, suite: &Suite, folder: &Path) -> Outcome<Running> {
        let config = folder.join("registry.yml");
        let text = format!(
            "version: 0.1\nstorage:\n  filesystem:\n    rootdirectory: {}\nhttp:\n  addr: {REGISTRY}\n",
            folder.join("registry").display()
        );
        write(&config, text)?;
        let program = program(self.programs.as_deref(), "docker-registry");
        let registry = suite.command(&program).arg("serve").arg(&config);
        registry.limit(Duration::from_secs(3600)).spawn()
    }

    fn wait_until_ready(&mut self, suite: &Suite) -> Outcome {
        let end = Instant::now() + suite.scale.seconds(30);
        while self.call(suite, &["version"]).output()?.status != 0 {
            if Instant::now() > end || self.daemon.has_ended() {
                let log = self.daemon.stderr();
                let log = crate::command::tail(&log, 3000);
                return Err(Failure::Failed(format!("dockerd does not answer: {log}")));
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(())
    }

    /// `docker ARGS…`.
    pub fn call(&self, suite: &Suite, args: &[&str]) -> Invocation {
        suite
            .command(&program(self.programs.as_deref(), "docker"))
            .env("DOCKER_CONFIG", "/nowhere")
            // BuildKit runs the steps of a build itself, by runc.
            .env("DOCKER_BUILDKIT", "0")
            .env("DOCKER_HOST", format!("unix://{}", self.socket.display()))
            .args(args)
            .limit(self.limit)
    }

    /// `docker run` with the runtime under test.
    pub fn run(&self, suite: &Suite, args: &[&str]) -> Invocation {
        let runtime = format!("--runtime={}", self.runtime);
        self.call(suite, &[&["run", &runtime], args].concat())
    }

    /// The daemon's log.
    pub fn log(&self) -> String {
        self.daemon.stderr()
    }

    /// Ends the daemon and its containers.
    pub(crate) fn end(&self) {
        self.daemon.signal(Signal::TERM);
        let end = Instant::now() + Duration::from_secs(10);
        while self.socket.exists() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(50));
        }
        // Made as a mount point; one that is in use is not empty.
        let _ = std::fs::remove_dir("/run/docker");
    }
}

fn program(folder: Option<&Path>, name: &str) -> String {
    match folder {
        Some(folder) => folder.join(name).to_string_lossy().into_owned(),
        None => name.to_owned(),
    }
}

/// `Docker version 26.1.5, build …`
fn version(program: &str) -> Option<u32> {
    let said = Command::new(program).arg("--version").output().ok()?;
    let said = String::from_utf8_lossy(&said.stdout).into_owned();
    said.split(' ').nth(2)?.split('.').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_without_docker_has_no_version() {
        assert_eq!(version("/nowhere/dockerd"), None);
    }
}
