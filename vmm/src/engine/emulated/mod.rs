//! QEMU as a software CPU: runs the guest where there is no usable KVM, on our own devices.
//!
//! `qemu-system-x86_64 -M microvm -accel tcg` gets our devices over vhost-user ([`vhost_user`]), one socketpair
//! each (networks a listening socket, since they come and go), and guest memory is a memfd that it shares with us. It
//! is no wall: a guest that breaks the emulator has this process's rights. Called by the machine's builder when the configuration names the engine.
//!
//! The emulator is a child that dies with us (PR_SET_PDEATHSIG), whatever ends us. That signal follows the thread that
//! made the child: the process's first, which is there to the end. It is made before the jail is entered ([`Emulator::spawn`]) and
//! served from within ([`Spawned::start`]).

mod arguments;
mod output;
mod tsc;

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;

use rustix::io::{FdFlags, fcntl_setfd};
use rustix::mount::{MountPropagationFlags, mount_change};
use rustix::process::{
    Pid, PidfdFlags, Signal, getppid, pidfd_open, pidfd_send_signal,
    set_parent_process_death_signal,
};
use rustix::thread::{CapabilitySet, UnshareFlags, set_no_new_privs, unshare_unsafe};

use self::arguments::{Frontend, Socket};
use self::output::Tail;
use crate::config::MachineConfig;
use crate::jail::seccomp::Kind;
use crate::jail::threads;
use crate::jail::{privileges, rlimits};
use crate::machine::end::{End, EndReason, EndSender};
use crate::serial::ConsoleRing;
use crate::virtio::VirtioDevice;
use crate::virtio::transport::vhost_user;

/// The device whose frontend does not take a socket that is connected already.
const NETWORK: &str = "net";
/// The emulator's root, an empty folder of the state folder.
const ROOT: &str = "root";
/// Older ones corrupt a guest with several vCPUs.
const OLDEST_MAJOR: u32 = 10;

/// Why the emulator could not be started.
#[derive(Debug, thiserror::Error)]
pub enum EmulatedError {
    /// No such program.
    #[error("emulator {} is not installed: install QEMU 10 or newer, or set `qemu`", path.display())]
    Missing {
        /// As configured.
        path: PathBuf,
    },
    /// It is QEMU, but not one that can be used.
    #[error("emulator {} is version {found}: QEMU 10 or newer is needed", path.display())]
    TooOld {
        /// As configured.
        path: PathBuf,
        /// What it says.
        found: String,
    },
    /// It is something else.
    #[error("emulator {} does not tell a QEMU version", path.display())]
    NotQemu {
        /// As configured.
        path: PathBuf,
    },
    /// A device that the emulator has no frontend for.
    #[error("the emulated engine cannot carry device {name} (type {device_type})")]
    Device {
        /// Our name of it.
        name: &'static str,
        /// Its virtio device ID.
        device_type: u32,
    },
    /// A process, thread or socket could not be made.
    #[error("cannot {what}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
}

fn io_error(what: &'static str) -> impl FnOnce(io::Error) -> EmulatedError {
    move |source| EmulatedError::Io { what, source }
}

/// A running emulator. Dropping it ends it.
pub struct Emulator {
    pid: u32,
    pidfd: OwnedFd,
}

/// An emulator that was started and waits for its devices.
pub struct Spawned {
    emulator: Emulator,
    child: Child,
    served: Vec<(Box<dyn VirtioDevice>, Served)>,
}

/// Where a device's frontend speaks.
enum Served {
    Connected(UnixStream),
    Listening(UnixListener),
}

impl Emulator {
    /// Starts the program, confined as far as it can be; it does not come to the guest's first instruction before its devices answer.
    pub fn spawn(
        config: &MachineConfig,
        devices: Vec<Box<dyn VirtioDevice>>,
    ) -> Result<Spawned, EmulatedError> {
        tracing::warn!(
            "engine `emulated`: QEMU runs this guest in software; it is slow and NO security boundary"
        );
        let clock = tsc::Sample::take();
        check_version(&config.qemu)?;

        let mut command = Command::new(&config.qemu);
        let mut sockets = Vec::new();
        let mut frontends = Vec::new();
        let mut served = Vec::new();
        for device in devices {
            let socket_error = "make a vhost-user socket";
            let (socket, way) = if device.name() == NETWORK {
                let name = format!("net{}.sock", frontends.len());
                let path = config.state_dir.join(name);
                let listener = UnixListener::bind(&path).map_err(io_error(socket_error))?;
                (Socket::Listening(path), Served::Listening(listener))
            } else {
                let (ours, theirs) = UnixStream::pair().map_err(io_error(socket_error))?;
                let inherited = Socket::Inherited(theirs.as_raw_fd());
                sockets.push(theirs);
                (inherited, Served::Connected(ours))
            };
            frontends.push(Frontend::new(&*device, socket)?);
            served.push((device, way));
        }
        let root = config.state_dir.join(ROOT);
        std::fs::create_dir_all(&root).map_err(io_error("make the emulator's root"))?;
        command.args(arguments::arguments(
            config,
            &frontends,
            &root,
            clock.khz_until_now(),
        ));
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let child = spawn(&mut command, sockets).map_err(io_error("start the emulator"))?;
        let pid = child.id();
        let gone = || io::Error::other("it has no pid");
        let pidfd = i32::try_from(pid)
            .ok()
            .and_then(Pid::from_raw)
            .ok_or_else(gone)
            .and_then(|pid| Ok(pidfd_open(pid, PidfdFlags::empty())?))
            .map_err(io_error("open the emulator's pidfd"))?;
        Ok(Spawned {
            emulator: Self { pid, pidfd },
            child,
            served,
        })
    }
}

impl Spawned {
    /// Serves its devices; the machine's end is reported to `end`. Guest output goes to `console`.
    pub fn start(
        self,
        console: Arc<ConsoleRing>,
        end: EndSender,
    ) -> Result<Emulator, EmulatedError> {
        // Whatever fails ends the emulator.
        let Self {
            emulator,
            mut child,
            served,
        } = self;
        let thread_error = "start a vhost-user thread";
        for (device, way) in served {
            let thread = match way {
                Served::Connected(socket) => vhost_user::serve(device, socket, end.clone()),
                Served::Listening(listener) => {
                    vhost_user::serve_listener(device, listener, end.clone())
                }
            };
            thread.map_err(io_error(thread_error))?;
        }
        let tail = Tail::default();
        let stdout = output::forward(child.stdout.take(), "console", {
            let console = console.clone();
            move |bytes| console.push(bytes)
        });
        let stderr = output::forward(child.stderr.take(), "emulator-err", {
            let tail = tail.clone();
            move |bytes| tail.push(bytes)
        });
        let readers = [stdout, stderr].map(|reader| reader.map_err(io_error(thread_error)));
        let [stdout, stderr] = readers;
        let readers = [stdout?, stderr?];
        let builder = std::thread::Builder::new().name("emulator".into());
        threads::spawn(Kind::Emulator, builder, move || {
            let status = child.wait();
            // What it said last counts for the reason.
            for reader in readers {
                drop(reader.join());
            }
            end.send(end_of(status, &console, &tail));
        })
        .map_err(io_error("start the emulator's thread"))?;
        Ok(emulator)
    }
}

impl Emulator {
    /// The emulator's process ID.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Stops the vCPUs; the devices go on.
    pub fn pause(&self) -> io::Result<()> {
        self.signal(Signal::STOP)
    }

    /// Lets the vCPUs go on.
    pub fn resume(&self) -> io::Result<()> {
        self.signal(Signal::CONT)
    }

    /// Ends the machine at once, if it has not ended; the end is reported as any other.
    pub fn kill(&self) -> io::Result<()> {
        match self.signal(Signal::KILL) {
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
            result => result,
        }
    }

    fn signal(&self, signal: Signal) -> io::Result<()> {
        Ok(pidfd_send_signal(&self.pidfd, signal)?)
    }
}

impl Drop for Emulator {
    fn drop(&mut self) {
        // Fails only if it is gone already.
        let _ = self.kill();
    }
}

fn spawn(command: &mut Command, sockets: Vec<UnixStream>) -> io::Result<Child> {
    let parent = rustix::process::getpid();
    let child_sockets: Vec<OwnedFd> = sockets.into_iter().map(OwnedFd::from).collect();
    let prepare = move || {
        set_parent_process_death_signal(Some(Signal::KILL))?;
        if getppid() != Some(parent) {
            // Orphaned before the signal was set.
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        for socket in &child_sockets {
            fcntl_setfd(socket, FdFlags::empty())?;
        }
        confine()
    };
    // SAFETY: between fork and exec only system calls are made: nothing is allocated and no lock is taken.
    let child = unsafe { command.pre_exec(prepare) }.spawn()?;
    Ok(child)
}

/// Namespaces and limits of its own, and no more capabilities than its change of root and user takes; these go with the user.
fn confine() -> io::Result<()> {
    let apart =
        UnshareFlags::NEWNS | UnshareFlags::NEWIPC | UnshareFlags::NEWUTS | UnshareFlags::NEWNET;
    // SAFETY: the only unsoundness of unshare is with CLONE_FILES, which is not passed.
    unsafe { unshare_unsafe(apart) }?;
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    mount_change("/", private)?;
    let kept = CapabilitySet::SYS_CHROOT | CapabilitySet::SETUID | CapabilitySet::SETGID;
    privileges::bound(kept)?;
    rlimits::set(&rlimits::OF_MACHINE)?;
    Ok(set_no_new_privs(true)?)
}

fn end_of(status: io::Result<ExitStatus>, console: &ConsoleRing, tail: &Tail) -> End {
    match status {
        // With -no-reboot a reset of the guest, a triple fault included, ends the emulator in good order.
        Ok(status) if status.success() => End::triple_fault(console),
        Ok(status) => {
            let said = tail.text();
            // It warns of much that is as we want it.
            let errors = said.lines().filter(|line| !line.contains(": warning: "));
            let errors = errors.collect::<Vec<_>>().join(" ");
            let detail = format!("the emulator ended with {status}: {}", errors.trim());
            End::new(EndReason::EngineFailed, detail)
        }
        Err(error) => End::new(
            EndReason::EngineFailed,
            format!("cannot wait for the emulator: {error}"),
        ),
    }
}

fn check_version(qemu: &Path) -> Result<(), EmulatedError> {
    let path = qemu.to_owned();
    let output = match Command::new(qemu)
        .arg("--version")
        .stdin(Stdio::null())
        .output()
    {
        Ok(output) => output,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(EmulatedError::Missing { path });
        }
        Err(source) => {
            return Err(EmulatedError::Io {
                what: "ask the emulator's version",
                source,
            });
        }
    };
    let text = String::from_utf8_lossy(&output.stdout);
    let Some((found, major)) = parse_version(&text) else {
        return Err(EmulatedError::NotQemu { path });
    };
    if major < OLDEST_MAJOR {
        return Err(EmulatedError::TooOld {
            path,
            found: found.to_owned(),
        });
    }
    Ok(())
}

/// From `QEMU emulator version 10.0.2 (...)`.
fn parse_version(text: &str) -> Option<(&str, u32)> {
    let version = text
        .strip_prefix("QEMU emulator version ")?
        .split_whitespace()
        .next()?;
    Some((version, version.split('.').next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_is_read_from_the_first_line() {
        let text = "QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds)\nCopyright (c)\n";
        assert_eq!(parse_version(text), Some(("10.0.2", 10)));
        assert_eq!(
            parse_version("QEMU emulator version 7.2.19\n"),
            Some(("7.2.19", 7))
        );
        assert_eq!(parse_version("bash, version 5\n"), None);
        assert_eq!(parse_version("QEMU emulator version \n"), None);
    }

    #[test]
    fn a_missing_old_or_other_program_is_told_apart() {
        assert!(matches!(
            check_version(Path::new("/nonexistent/qemu")),
            Err(EmulatedError::Missing { .. })
        ));
        assert!(matches!(
            check_version(Path::new("true")),
            Err(EmulatedError::NotQemu { .. })
        ));
        let folder = tempfile::tempdir().unwrap();
        let old = folder.path().join("qemu");
        std::fs::write(&old, "#!/bin/sh\necho QEMU emulator version 7.2.1\n").unwrap();
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(&old, mode).unwrap();
        assert!(matches!(
            check_version(&old),
            Err(EmulatedError::TooOld { .. })
        ));
    }
}
