//! The set-up copy of the agent: single-threaded, started as `/proc/self/exe container-init CONTROL WORK CGROUP [FD ...]` (descriptor
//! numbers: the namespaces to join, or the pidfd of an exec's init; standard streams are the container process's). It opens
//! what the container's mounts are made of, clones the process as the agent's child, tells its pid, writes the mappings of
//! its user namespace and ends; the process does its steps, reports, waits for the start byte and becomes the program.

use std::{
    io::Read,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use bulkhead_failpoint::reach;
use nix::sched::CloneFlags;
use oci_spec::runtime::{LinuxNamespaceType, Process, Spec};
use rustix::{
    mount::{MountPropagationFlags, UnmountFlags},
    pipe::{PipeFlags, pipe_with},
    process::DumpableBehavior,
};

use super::{
    attributes,
    capabilities::Sets,
    control::{Report, Shared, Work, send},
    devices,
    hooks::{self, Identity},
    masks, mounts, namespaces, options, pause, process, rootfs, seccomp,
    sources::Sources,
    tty::{Pty, own_root},
};
use crate::{
    error::{Context, Error, Result},
    sys::{self, Cloned, MountAttr, attr, mount_setattr},
};

/// Not among the constants of nix.
const CLONE_NEWTIME: libc::c_int = 0x80;

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
    let others: Vec<OwnedFd> = fds.collect();
    let code = match run(&control, work, cgroup, others) {
        Ok(()) => 0,
        Err(error) => {
            let _ = send(control.as_fd(), &Report::from(&error), None);
            1
        }
    };
    std::process::exit(code);
}

/// What the child of the copy has to know.
struct Child<'a> {
    control: &'a OwnedFd,
    /// Opened mounts of a container; `None` for an exec.
    sources: Option<Sources>,
    /// Cgroup namespace to join, which the copy cannot: it still has to reach the container's cgroup.
    join: Vec<(LinuxNamespaceType, OwnedFd)>,
    /// Pidfd of the init whose cgroup namespace an exec joins.
    init: Option<OwnedFd>,
}

fn run(control: &OwnedFd, work: OwnedFd, cgroup: OwnedFd, others: Vec<OwnedFd>) -> Result<()> {
    // Nothing of the container may look into this process.
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .step(|| "make the set-up process unreadable".into())?;
    // Modes of nodes and folders are the ones asked for.
    rustix::process::umask(rustix::fs::Mode::empty());
    let mut json = Vec::new();
    std::fs::File::from(work)
        .read_to_end(&mut json)
        .step(|| "read the work".into())?;
    let work: Work = serde_json::from_slice(&json)
        .map_err(|error| Error::step("parse the work", std::io::Error::from(error)))?;
    if let (Some(process), _) = work.process() {
        process::set_oom_score_adj(process.oom_score_adj())?;
        let ids = &work.shared().ids;
        let uid = process.user().uid();
        process::own_stdio(ids.outer_uid(uid).unwrap_or(uid))?;
    }
    let mut child = Child {
        control,
        sources: None,
        join: Vec::new(),
        init: None,
    };
    let flags = match &work {
        Work::Create {
            spec,
            rootfs,
            shared,
            joins,
            ..
        } => {
            let joins = joins.iter().copied().zip(others);
            let (late, early) =
                joins.partition::<Vec<_>, _>(|(kind, _)| *kind == LinuxNamespaceType::Cgroup);
            child.join = late;
            child.sources = Some(Sources::open(spec, rootfs, &shared.ids)?);
            namespaces::make_time(spec)?;
            namespaces::join_all(&early)?;
            namespaces::clone_flags(spec)
        }
        Work::Exec { process, .. } => {
            let Some(target) = others.first() else {
                return Err(Error::State("no container to join".into()));
            };
            attributes::apply_initial_affinity(process)?;
            child.init = Some(target.try_clone().step(|| "hold the init".into())?);
            join_container(target.as_fd(), !work.shared().ids.is_empty())?;
            0
        }
    };
    // The child of a new user namespace waits for its mappings.
    let (wait, mapped) = pipe_with(PipeFlags::CLOEXEC).step(|| "make a pipe".into())?;
    match sys::clone_sibling(flags, cgroup.as_fd()).step(|| "clone the process".into())? {
        Cloned::Parent(pid) => {
            send(control.as_fd(), &Report::Pid(pid), None).step(|| "report the pid".into())?;
            if flags & libc::CLONE_NEWUSER as u64 != 0 {
                work.shared().ids.write(pid)?;
            }
            rustix::io::write(&mapped, b"m")
                .map(drop)
                .step(|| "tell that the ids are mapped".into())
        }
        Cloned::Child => {
            drop((cgroup, mapped));
            // Without the byte the copy has failed, and reported it.
            if !matches!(rustix::io::read(&wait, &mut [0; 1]), Ok(1)) {
                std::process::exit(1);
            }
            drop(wait);
            become_process(child, &work)
        }
    }
}

fn join_container(init: BorrowedFd<'_>, user_namespace: bool) -> Result<()> {
    let mut all = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWPID
        | CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::from_bits_retain(CLONE_NEWTIME);
    // A process cannot join the user namespace it is in.
    if user_namespace {
        all |= CloneFlags::CLONE_NEWUSER;
    }
    nix::sched::setns(init, all).step(|| "join the container's namespaces".into())
}

fn become_process(child: Child<'_>, work: &Work) -> ! {
    let control = child.control;
    let error = match work {
        Work::Create {
            spec,
            terminal,
            pause,
            container,
            shared,
            ..
        } => create(child, spec, container, shared, (*terminal, *pause)),
        Work::Exec {
            process,
            shared,
            terminal,
        } => exec(child, process, shared, *terminal),
    };
    let (error, code) = match error {
        Err(error) => (error, NOT_FOUND),
        Ok(failed) => failed,
    };
    let _ = send(control.as_fd(), &Report::from(&error), None);
    std::process::exit(code)
}

/// What the process becomes.
enum Program {
    /// What its arguments name.
    Args,
    /// The pod's pause.
    Pause,
}

/// Why the process did not become its program, and its exit code.
type Failed = (Error, i32);

fn create(
    child: Child<'_>,
    spec: &Spec,
    container: &Identity,
    shared: &Shared,
    (terminal, pause): (bool, bool),
) -> Result<Failed> {
    let (Some(process), Some(linux)) = (spec.process(), spec.linux()) else {
        return Err(Error::field("process", "is missing"));
    };
    let Some(sources) = child.sources else {
        return Err(Error::State("no mounts were opened".into()));
    };
    rustix::process::setsid().step(|| "make a session".into())?;
    namespaces::join_all(&child.join)?;
    if !shared.ids.is_empty() {
        process::become_inner_root()?;
    }
    // Keys are not for other containers. Without room for the keyring, or keys in the kernel, it goes without.
    let _ = sys::join_session_keyring();
    rustix::mount::mount_change(
        "/",
        MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC,
    )
    .step(|| "cut the mounts off from the guest's".into())?;
    namespaces::set_up(spec)?;
    reach("agent.rootfs").step(|| "rootfs: mount".into())?;
    let root = rootfs::mount(&sources.rootfs)?;
    let root = root.as_fd();
    let list = spec.mounts().as_deref().unwrap_or_default();
    mounts::mount_all(root, list, sources.mounts)?;
    let devices = linux.devices().as_deref().unwrap_or_default();
    devices::make_all(root, list, devices, sources.nodes)?;
    let pty = match terminal {
        true => {
            let pty = Pty::open(root, console_size(process))?;
            pty.bind_console(root)?;
            Some(pty)
        }
        false => None,
    };
    make_cwd(root, process)?;
    masks::make_readonly(root, linux.readonly_paths().as_deref().unwrap_or_default())?;
    masks::mask(root, linux.masked_paths().as_deref().unwrap_or_default())?;
    reach("agent.pivot").step(|| "pivot".into())?;
    pivot(root, linux.rootfs_propagation().as_deref())?;
    // The programs are the image's: what is masked must be so, and the guest's root must be out of reach.
    hooks::create_container(spec, container, shared.seccomp.as_ref())?;
    // After the hooks, which may write into the rootfs.
    if spec.root().as_ref().and_then(|root| root.readonly()) == Some(true) {
        let readonly = MountAttr {
            set: attr::RDONLY,
            ..MountAttr::default()
        };
        mount_setattr(root, false, readonly).step(|| "root.readonly: set".into())?;
    }
    let hooks = || hooks::start_container(spec, container);
    let program = match pause {
        true => Program::Pause,
        false => Program::Args,
    };
    finish(child.control, process, (pty, program), shared, &hooks)
}

fn exec(child: Child<'_>, process: &Process, shared: &Shared, terminal: bool) -> Result<Failed> {
    rustix::process::setsid().step(|| "make a session".into())?;
    if let (Some(init), true) = (&child.init, shared.cgroup_namespace) {
        nix::sched::setns(init, CloneFlags::CLONE_NEWCGROUP)
            .step(|| "join the container's cgroup namespace".into())?;
    }
    if !shared.ids.is_empty() {
        process::become_inner_root()?;
    }
    let pty = match terminal {
        true => Some(Pty::open(own_root()?.as_fd(), console_size(process))?),
        false => None,
    };
    drop(child.init);
    make_cwd(own_root()?.as_fd(), process)?;
    let pty = (pty, Program::Args);
    finish(child.control, process, pty, shared, &|| Ok(()))
}

fn console_size(process: &Process) -> Option<(u64, u64)> {
    process
        .console_size()
        .as_ref()
        .map(|size| (size.width(), size.height()))
}

/// Makes a missing working folder: of a container as runc does, of an exec as well. A read-only rootfs cannot take one, and entering
/// it fails then by name.
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
    (pty, program): (Option<Pty>, Program),
    shared: &Shared,
    hooks: &dyn Fn() -> Result<()>,
) -> Result<Failed> {
    let seccomp = shared.seccomp.as_ref();
    if let Some(pty) = pty {
        let master = pty.become_stdio()?;
        send(control.as_fd(), &Report::Pty, Some(master.as_fd()))
            .step(|| "hand the pty over".into())?;
        process::own_stdio(process.user().uid())?;
    }
    process::reopen_null()?;
    process::set_personality(shared.personality.as_ref())?;
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
    let path_c = match program {
        Program::Args => {
            let path = process::find_executable(name.map_or("", String::as_str), &env)?;
            Some(process::c_string(path.as_os_str())?)
        }
        Program::Pause => None,
    };
    let strings = |list: &[String]| -> Result<Vec<_>> {
        list.iter()
            .map(|text| process::c_string(text.as_ref()))
            .collect()
    };
    let args_c = strings(process.args().as_deref().unwrap_or_default())?;
    let env_c = strings(&env)?;
    sys::default_signals();
    sys::close_on_exec_from(3).step(|| "keep descriptors from the program".into())?;
    send(control.as_fd(), &Report::Ready, None).step(|| "report readiness".into())?;
    let mut go = [0];
    match rustix::io::read(control, &mut go) {
        Ok(1) => {}
        // The agent gave the container up.
        _ => std::process::exit(1),
    }
    hooks()?;
    if let (Some(profile), true) = (seccomp, no_new_privileges) {
        seccomp::load(profile)?;
    }
    let Some(path_c) = path_c else {
        pause::hold();
    };
    let error = sys::execve(&path_c, &args_c, &env_c);
    let code = match error.raw_os_error() {
        Some(libc::ENOENT) => NOT_FOUND,
        _ => NOT_EXECUTABLE,
    };
    let text = crate::error::errno_text(error.raw_os_error().unwrap_or(libc::EIO));
    let name = name.map_or("", String::as_str);
    Ok((Error::Executable(format!("exec: {name:?}: {text}")), code))
}
