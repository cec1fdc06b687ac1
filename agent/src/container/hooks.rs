//! Step: the hooks that run in the guest, `createContainer` and `startContainer`. The guest itself holds no programs, so both are
//! looked up in the container: createContainer when the rootfs has become the root and its paths are masked, startContainer when the
//! program is about to run. They are the image's, so they get no more than the container's program: createContainer hooks run as the
//! container's root with the process's capabilities, startContainer hooks as its user. The others are the shim's.

use std::{
    fs::File,
    io::{self, Read, Seek, SeekFrom, Write},
    os::fd::{AsFd, OwnedFd},
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use oci_spec::runtime::{ContainerState, Hook, LinuxSeccomp, Spec};
use rustix::{
    event::{PollFd, PollFlags, Timespec},
    fs::MemfdFlags,
    process::{Pid, PidfdFlags},
};
use serde::{Deserialize, Serialize};

use super::{capabilities::Sets, seccomp};
use crate::{
    error::{Context, Error, Result},
    sys,
};

/// Bytes of a failed hook's stderr that are told.
const STDERR_MAX: u64 = 1024;

/// What the hooks are told about their container (runtime-spec, "State").
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Identity {
    /// The container's id.
    pub id: String,
    /// Its bundle on the host.
    pub bundle: String,
}

/// Checks both lists.
pub fn check(spec: &Spec) -> Result<()> {
    let Some(hooks) = spec.hooks() else {
        return Ok(());
    };
    for (field, list) in [
        ("hooks.createContainer", hooks.create_container()),
        ("hooks.startContainer", hooks.start_container()),
    ] {
        for (index, hook) in list.iter().flatten().enumerate() {
            let name = |part: &str| format!("{field}[{index}].{part}");
            if !hook.path().is_absolute() {
                return Err(Error::field(name("path"), "is not absolute"));
            }
            if hook.timeout().is_some_and(|timeout| timeout <= 0) {
                return Err(Error::field(name("timeout"), "is not above 0"));
            }
            let strings = hook.args().iter().chain(hook.env()).flatten();
            if strings.into_iter().any(|text| text.contains('\0')) {
                return Err(Error::field(name("args"), "or env holds a zero byte"));
            }
        }
    }
    Ok(())
}

/// Runs createContainer hooks; the rootfs is the root.
pub fn create_container(
    spec: &Spec,
    container: &Identity,
    seccomp: Option<&LinuxSeccomp>,
) -> Result<()> {
    let list = of_create(spec);
    if list.is_empty() {
        return Ok(());
    }
    let process = spec.process().as_ref();
    let bounds = Bounds {
        sets: Sets::parse(process.and_then(|process| process.capabilities().as_ref())),
        no_new_privileges: process.and_then(|process| process.no_new_privileges()) == Some(true),
        seccomp: seccomp.cloned(),
    };
    run(
        "hooks.createContainer",
        list,
        spec,
        container,
        ContainerState::Creating,
        Some(&bounds),
    )
}

/// Runs startContainer hooks; the rootfs is the root.
pub fn start_container(spec: &Spec, container: &Identity) -> Result<()> {
    let hooks = spec.hooks().as_ref();
    let list = hooks.and_then(|hooks| hooks.start_container().as_deref());
    let list = list.unwrap_or_default();
    run(
        "hooks.startContainer",
        list,
        spec,
        container,
        ContainerState::Created,
        None,
    )
}

/// How long the createContainer hooks may take together; `None` if one of them has no limit.
pub fn time_to_create(spec: &Spec) -> Option<Duration> {
    of_create(spec)
        .iter()
        .try_fold(Duration::ZERO, |sum, hook| {
            Some(sum.saturating_add(limit(hook)?))
        })
}

fn of_create(spec: &Spec) -> &[Hook] {
    let hooks = spec.hooks().as_ref();
    let list = hooks.and_then(|hooks| hooks.create_container().as_deref());
    list.unwrap_or_default()
}

fn limit(hook: &Hook) -> Option<Duration> {
    let seconds = u64::try_from(hook.timeout()?).ok()?;
    Some(Duration::from_secs(seconds))
}

fn run(
    field: &str,
    hooks: &[Hook],
    spec: &Spec,
    container: &Identity,
    status: ContainerState,
    bounds: Option<&Bounds>,
) -> Result<()> {
    if hooks.is_empty() {
        return Ok(());
    }
    let state = serde_json::json!({
        "ociVersion": spec.version(),
        "id": container.id,
        "status": status,
        // As the container's own processes see it: the hook is one of them.
        "pid": rustix::process::getpid().as_raw_nonzero().get(),
        "bundle": container.bundle,
        "annotations": spec.annotations().clone().unwrap_or_default(),
    });
    let state = state.to_string();
    for (index, hook) in hooks.iter().enumerate() {
        let field = format!("{field}[{index}] ({})", hook.path().display());
        run_one(&field, hook, &state, bounds)?;
    }
    Ok(())
}

/// What keeps a hook from more than the container's program could do as root.
#[derive(Clone)]
struct Bounds {
    sets: Sets,
    no_new_privileges: bool,
    seccomp: Option<LinuxSeccomp>,
}

impl Bounds {
    /// Sets them for the calling process, in the order in which its program's are set.
    fn apply(&self) -> Result<()> {
        sys::close_on_exec_from(3).step(|| "keep descriptors from the hook".into())?;
        rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
        self.sets.apply_bounding()?;
        // Without no_new_privs a filter needs CAP_SYS_ADMIN.
        if let (Some(profile), false) = (&self.seccomp, self.no_new_privileges) {
            seccomp::load(profile)?;
        }
        self.sets.apply()?;
        if self.no_new_privileges {
            rustix::thread::set_no_new_privs(true).step(|| "set no_new_privs".into())?;
        }
        if let (Some(profile), true) = (&self.seccomp, self.no_new_privileges) {
            seccomp::load(profile)?;
        }
        Ok(())
    }
}

fn run_one(field: &str, hook: &Hook, state: &str, bounds: Option<&Bounds>) -> Result<()> {
    let what = |step: &str| format!("{field}: {step}");
    // Files in memory: neither side can block on the other.
    let stdin = memory_file().step(|| what("make its stdin"))?;
    (&stdin)
        .write_all(state.as_bytes())
        .and_then(|()| (&stdin).seek(SeekFrom::Start(0)))
        .step(|| what("write its stdin"))?;
    let stderr = memory_file().step(|| what("make its stderr"))?;
    let copy = |file: &File| file.try_clone().step(|| what("set up"));
    let mut command = Command::new(hook.path());
    let args = hook.args().as_deref().unwrap_or_default();
    if let Some(first) = args.first() {
        std::os::unix::process::CommandExt::arg0(&mut command, first);
    }
    command
        .args(args.get(1..).unwrap_or_default())
        .env_clear()
        .envs(
            hook.env()
                .iter()
                .flatten()
                .filter_map(|e| e.split_once('=')),
        )
        .stdin(stdin)
        .stdout(Stdio::null())
        .stderr(copy(&stderr)?);
    if let Some(bounds) = bounds.cloned() {
        sys::before_exec(&mut command, move || {
            // Only the number of an error gets out of there.
            bounds.apply().map_err(|error| match error {
                Error::Step { source, .. } => source,
                _ => io::ErrorKind::InvalidInput.into(),
            })
        });
    }
    let mut child = command.spawn().step(|| what("start"))?;
    let limit = limit(hook);
    match wait(&mut child, limit).step(|| what("wait for its end"))? {
        Some(status) if status.success() => Ok(()),
        Some(status) => {
            let said = said(stderr);
            Err(Error::State(format!("{field} failed: {status}{said}")))
        }
        None => {
            let _ = child.kill();
            let _ = child.wait();
            let limit = limit.unwrap_or_default().as_secs();
            Err(Error::State(format!(
                "{field} did not end within {limit} s"
            )))
        }
    }
}

fn memory_file() -> io::Result<File> {
    let fd: OwnedFd = rustix::fs::memfd_create(c"hook", MemfdFlags::CLOEXEC)?;
    Ok(File::from(fd))
}

fn said(mut stderr: File) -> String {
    let mut text = Vec::new();
    let _ = stderr
        .seek(SeekFrom::Start(0))
        .and_then(|_| stderr.take(STDERR_MAX).read_to_end(&mut text));
    match String::from_utf8_lossy(&text).trim() {
        "" => String::new(),
        text => format!(", stderr: {text}"),
    }
}

/// Waits; `None` after the time.
fn wait(child: &mut Child, limit: Option<Duration>) -> io::Result<Option<ExitStatus>> {
    let Some(limit) = limit else {
        return child.wait().map(Some);
    };
    let end = Instant::now().checked_add(limit);
    let pid = Pid::from_child(child);
    let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::empty())?;
    loop {
        let left = end.map_or(limit, |end| end.saturating_duration_since(Instant::now()));
        let left = Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: left.subsec_nanos().into(),
        };
        let mut fds = [PollFd::from_borrowed_fd(pidfd.as_fd(), PollFlags::IN)];
        match rustix::event::poll(&mut fds, Some(&left)) {
            Ok(0) => return child.try_wait(),
            Ok(_) => return child.wait().map(Some),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(hooks: &str) -> Spec {
        let json =
            format!(r#"{{"ociVersion":"1.2.0","annotations":{{"a":"b"}},"hooks":{{{hooks}}}}}"#);
        serde_json::from_str(&json).unwrap()
    }

    fn started(hook: &str) -> std::result::Result<(), String> {
        let spec = spec(&format!(r#""startContainer":[{hook}]"#));
        check(&spec)
            .and_then(|()| start_container(&spec, &identity()))
            .map_err(|e| e.text())
    }

    fn identity() -> Identity {
        Identity {
            id: "c1".into(),
            bundle: "/b".into(),
        }
    }

    #[test]
    fn a_hook_gets_the_state_and_only_its_own_environment() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        let script = format!("cat > {0}; env >> {0}", out.display());
        started(&format!(
            r#"{{"path":"/bin/sh","args":["sh","-c","{script}"],"env":["X=1"],"timeout":10}}"#
        ))
        .unwrap();
        let text = std::fs::read_to_string(out).unwrap();
        for part in [
            r#""id":"c1""#,
            r#""status":"created""#,
            r#""bundle":"/b""#,
            r#""a":"b""#,
            "X=1",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert!(!text.contains("HOME="), "{text}");
    }

    #[test]
    fn a_hook_of_create_has_no_more_than_the_program() {
        // Only root has something to take away.
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        let script = format!(
            "grep -E 'Cap|NoNew|Umask' /proc/self/status > {}",
            out.display()
        );
        let mut spec = spec(&format!(
            r#""createContainer":[{{"path":"/bin/sh","args":["sh","-c","{script}"],"timeout":10}}]"#
        ));
        let caps = r#"["CAP_CHOWN","CAP_KILL"]"#;
        let process = format!(
            r#"{{"user":{{"uid":5,"gid":5}},"args":["x"],"cwd":"/","noNewPrivileges":true,
                "capabilities":{{"bounding":{caps},"permitted":{caps},"effective":{caps}}}}}"#
        );
        spec.set_process(serde_json::from_str(&process).unwrap());
        create_container(&spec, &identity(), None).unwrap();
        let text = std::fs::read_to_string(out).unwrap();
        for (name, value) in [
            ("CapInh", "0000000000000000"),
            ("CapPrm", "0000000000000021"),
            ("CapEff", "0000000000000021"),
            ("CapBnd", "0000000000000021"),
            ("CapAmb", "0000000000000000"),
            ("NoNewPrivs", "1"),
            ("Umask", "0022"),
        ] {
            assert!(
                text.contains(&format!("{name}:\t{value}\n")),
                "{name}: {text}"
            );
        }
    }

    #[test]
    fn a_hook_that_fails_or_hangs_is_told_by_name() {
        let error = started(r#"{"path":"/bin/sh","args":["sh","-c","echo why >&2; exit 3"]}"#);
        let error = error.unwrap_err();
        assert!(
            error.contains("hooks.startContainer[0]") && error.contains("why"),
            "{error}"
        );
        let error = started(r#"{"path":"/bin/sleep","args":["sleep","60"],"timeout":1}"#);
        assert!(error.unwrap_err().contains("did not end within 1 s"));
        assert!(
            started(r#"{"path":"/no/such"}"#)
                .unwrap_err()
                .contains("no such file")
        );
    }

    #[test]
    fn the_hooks_of_create_have_the_time_of_all_or_no_limit() {
        let time = |hooks: &str| time_to_create(&spec(&format!(r#""createContainer":[{hooks}]"#)));
        let (two, none) = (r#"{"path":"/x","timeout":2}"#, r#"{"path":"/x"}"#);
        assert_eq!(time(""), Some(Duration::ZERO));
        assert_eq!(time(&format!("{two},{two}")), Some(Duration::from_secs(4)));
        assert_eq!(time(&format!("{two},{none}")), None);
    }

    #[test]
    fn hooks_that_cannot_be_right_are_refused() {
        assert!(
            started(r#"{"path":"sh"}"#)
                .unwrap_err()
                .contains("[0].path")
        );
        let error = started(r#"{"path":"/bin/true","timeout":0}"#).unwrap_err();
        assert!(error.contains("[0].timeout"), "{error}");
    }
}
