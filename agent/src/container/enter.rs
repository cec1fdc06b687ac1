//! The set-up copy of the agent: single-threaded, started as `/proc/self/exe container-init CONTROL WORK CGROUP [PIDFD]` (descriptor
//! numbers; standard streams are the container process's). It clones the process as the agent's child, tells its pid and
//! ends; the process does its steps, reports, waits for the start byte and becomes the program.

use std::{
    io::Read,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use nix::sched::CloneFlags;
use oci_spec::runtime::{LinuxSeccomp, Process, Spec};
use rustix::{
    mount::{MountPropagationFlags, UnmountFlags},
    process::DumpableBehavior,
};

use super::{
    control::{Report, Work, send},
    devices, mounts, namespaces, options,
    process::{self, Sets},
    seccomp,
    tty::{Pty, own_root},
};
use crate::{
    error::{Context, Error, Result},
    sys::{self, Cloned, MountAttr, attr, mount_setattr},
};

/// Exit codes of a process that could not become its program, as shells have them.
const NOT_FOUND: i32 = 127;
const NOT_EXECUTABLE: i32 = 126;

/// Entry of the copy; `args` are those after `container-init`.
pub fn main(args: &[String]) -> ! {
    let mut fds = args
        .iter()
        .filter_map(|number| number.parse().ok())
        .map_while(|number| sys::inherited_fd(number).ok());
    let (Some(control), Some(work), Some(cgroup)) = (fds.next(), fds.next(), fds.next()) else {
        std::process::exit(1);
    };
    let target = fds.next();
    let code = match run(&control, work, cgroup, target) {
        Ok(()) => 0,
        Err(error) => {
            let _ = send(control.as_fd(), &Report::from(&error), None);
            1
        }
    };
    std::process::exit(code);
}

fn run(control: &OwnedFd, work: OwnedFd, cgroup: OwnedFd, target: Option<OwnedFd>) -> Result<()> {
    // Nothing of the container may look into this process.
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .step(|| "make the set-up process unreadable".into())?;
    let mut json = Vec::new();
    std::fs::File::from(work)
        .read_to_end(&mut json)
        .step(|| "read the work".into())?;
    let work: Work = serde_json::from_slice(&json)
        .map_err(|error| Error::step("parse the work", std::io::Error::from(error)))?;
    let flags = match (&work, target) {
        (Work::Create { spec, .. }, _) => {
            let process = spec.process().as_ref();
            process::set_oom_score_adj(process.and_then(Process::oom_score_adj))?;
            namespaces::join_by_path(spec)?;
            namespaces::clone_flags(spec)
        }
        (Work::Exec { process, .. }, Some(target)) => {
            process::set_oom_score_adj(process.oom_score_adj())?;
            join_container(target.as_fd())?;
            0
        }
        (Work::Exec { .. }, None) => return Err(Error::State("no container to join".into())),
    };
    match sys::clone_sibling(flags, cgroup.as_fd()).step(|| "clone the process".into())? {
        Cloned::Parent(pid) => {
            send(control.as_fd(), &Report::Pid(pid), None).step(|| "report the pid".into())
        }
        Cloned::Child => {
            drop(cgroup);
            become_process(control, &work)
        }
    }
}

fn join_container(init: BorrowedFd<'_>) -> Result<()> {
    let all = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWPID
        | CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWCGROUP;
    nix::sched::setns(init, all).step(|| "join the container's namespaces".into())
}

fn become_process(control: &OwnedFd, work: &Work) -> ! {
    let error = match work {
        Work::Create {
            spec,
            rootfs,
            terminal,
        } => create(control, spec, rootfs, *terminal),
        Work::Exec {
            process,
            seccomp,
            terminal,
        } => exec(control, process, seccomp.as_ref(), *terminal),
    };
    let (error, code) = match error {
        Err(error) => (error, NOT_FOUND),
        Ok(failed) => failed,
    };
    let _ = send(control.as_fd(), &Report::from(&error), None);
    std::process::exit(code)
}

/// Why the process did not become its program, and its exit code.
type Failed = (Error, i32);

fn create(
    control: &OwnedFd,
    spec: &Spec,
    rootfs: &super::rootfs::Rootfs,
    terminal: bool,
) -> Result<Failed> {
    let (Some(process), Some(linux)) = (spec.process(), spec.linux()) else {
        return Err(Error::field("process", "is missing"));
    };
    rustix::process::setsid().step(|| "make a session".into())?;
    rustix::mount::mount_change(
        "/",
        MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC,
    )
    .step(|| "cut the mounts off from the guest's".into())?;
    // Modes of nodes and folders are the ones asked for.
    rustix::process::umask(rustix::fs::Mode::empty());
    namespaces::set_up(spec)?;
    let root = rootfs.mount()?;
    let root = root.as_fd();
    let list = spec.mounts().as_deref().unwrap_or_default();
    mounts::mount_all(root, list)?;
    devices::make_all(root, list, linux.devices().as_deref().unwrap_or_default())?;
    let pty = match terminal {
        true => {
            let pty = Pty::open(root, console_size(process))?;
            pty.bind_console(root)?;
            Some(pty)
        }
        false => None,
    };
    make_cwd(root, process)?;
    mounts::make_readonly(root, linux.readonly_paths().as_deref().unwrap_or_default())?;
    mounts::mask(root, linux.masked_paths().as_deref().unwrap_or_default())?;
    if spec.root().as_ref().and_then(|root| root.readonly()) == Some(true) {
        let readonly = MountAttr {
            set: attr::RDONLY,
            ..MountAttr::default()
        };
        mount_setattr(root, false, readonly).step(|| "root.readonly: set".into())?;
    }
    pivot(root, linux.rootfs_propagation().as_deref())?;
    finish(control, process, pty, linux.seccomp().as_ref())
}

fn exec(
    control: &OwnedFd,
    process: &Process,
    seccomp: Option<&LinuxSeccomp>,
    terminal: bool,
) -> Result<Failed> {
    rustix::process::setsid().step(|| "make a session".into())?;
    let pty = match terminal {
        true => Some(Pty::open(own_root()?.as_fd(), console_size(process))?),
        false => None,
    };
    finish(control, process, pty, seccomp)
}

fn console_size(process: &Process) -> Option<(u64, u64)> {
    process
        .console_size()
        .as_ref()
        .map(|size| (size.width(), size.height()))
}

/// runc makes a missing working folder; a read-only rootfs cannot take one, and entering it fails then by name.
fn make_cwd(root: BorrowedFd<'_>, process: &Process) -> Result<()> {
    use super::path::{PointKind, make_in_root};
    match make_in_root(root, process.cwd(), PointKind::Folder, 0o755) {
        Ok(_) | Err(rustix::io::Errno::ROFS) => Ok(()),
        Err(error) => Err(Error::step(
            format!("process.cwd: make {}", process.cwd().display()),
            error,
        )),
    }
}

/// Makes `root` the root of the mount namespace; the guest's mounts go.
fn pivot(root: BorrowedFd<'_>, propagation: Option<&str>) -> Result<()> {
    rustix::process::fchdir(root).step(|| "enter the rootfs".into())?;
    // Both "." at once: the old root lands on top of the new one and is taken off there.
    rustix::process::pivot_root(".", ".").step(|| "pivot into the rootfs".into())?;
    rustix::mount::unmount(".", UnmountFlags::DETACH).step(|| "leave the guest's root".into())?;
    rustix::process::chdir("/").step(|| "enter the new root".into())?;
    let kind = propagation.filter(|name| !name.is_empty());
    if let Some((propagation, recursive)) = kind.and_then(options::propagation) {
        let change = MountAttr {
            propagation,
            ..MountAttr::default()
        };
        mount_setattr(own_root()?.as_fd(), recursive, change)
            .step(|| "linux.rootfsPropagation: set".into())?;
    }
    Ok(())
}

/// The steps that containers and execs share, in the container's namespaces and root.
fn finish(
    control: &OwnedFd,
    process: &Process,
    pty: Option<Pty>,
    seccomp: Option<&LinuxSeccomp>,
) -> Result<Failed> {
    if let Some(pty) = pty {
        let master = pty.become_stdio()?;
        send(control.as_fd(), &Report::Pty, Some(master.as_fd()))
            .step(|| "hand the pty over".into())?;
    }
    process::set_rlimits(process)?;
    process::own_stdio(process.user())?;
    let entered = process::enter_cwd(process.cwd(), true)?;
    let sets = Sets::parse(process.capabilities().as_ref());
    sets.apply_bounding()?;
    // Without no_new_privs a filter needs CAP_SYS_ADMIN, which goes with the user.
    let no_new_privileges = process.no_new_privileges() == Some(true);
    if let (Some(profile), false) = (seccomp, no_new_privileges) {
        seccomp::load(profile)?;
    }
    process::set_user(process.user())?;
    sets.apply()?;
    if !entered {
        process::enter_cwd(process.cwd(), false)?;
    }
    if no_new_privileges {
        rustix::thread::set_no_new_privs(true).step(|| "process.noNewPrivileges: set".into())?;
    }
    let env = process::environment(process);
    let name = process.args().as_ref().and_then(|args| args.first());
    let path = process::find_executable(name.map_or("", String::as_str), &env)?;
    let path_c = process::c_string(path.as_os_str())?;
    let strings = |list: &[String]| -> Result<Vec<_>> {
        list.iter()
            .map(|text| process::c_string(text.as_ref()))
            .collect()
    };
    let args_c = strings(process.args().as_deref().unwrap_or_default())?;
    let env_c = strings(&env)?;
    sys::default_sigpipe();
    sys::close_on_exec_from(3).step(|| "keep descriptors from the program".into())?;
    send(control.as_fd(), &Report::Ready, None).step(|| "report readiness".into())?;
    let mut go = [0];
    match rustix::io::read(control, &mut go) {
        Ok(1) => {}
        // The agent gave the container up.
        _ => std::process::exit(1),
    }
    if let (Some(profile), true) = (seccomp, no_new_privileges) {
        seccomp::load(profile)?;
    }
    let error = sys::execve(&path_c, &args_c, &env_c);
    let code = match error.raw_os_error() {
        Some(libc::ENOENT) => NOT_FOUND,
        _ => NOT_EXECUTABLE,
    };
    let text = crate::error::errno_text(error.raw_os_error().unwrap_or(libc::EIO));
    let name = name.map_or("", String::as_str);
    Ok((Error::Executable(format!("exec: {name:?}: {text}")), code))
}
