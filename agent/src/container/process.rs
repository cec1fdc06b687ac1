//! Steps that turn the set-up child into the container's process: limits, user, capabilities, folder, executable.

use std::{
    ffi::{CString, OsStr},
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

use oci_spec::runtime::{
    Capabilities, Capability, LinuxCapabilities, PosixRlimitType, Process, User,
};
use rustix::{
    fs::{Access, AtFlags, CWD, FileType, Gid, Mode, Uid},
    io::Errno,
    process::{Resource, Rlimit},
    thread::{CapabilitySet, CapabilitySets},
};

use crate::error::{Context, Error, Result, errno_text};

/// Checks what can be checked without a process; refuses what is not enforced. `field` is the process's path in
/// the spec.
pub fn check(field: &str, process: &Process) -> Result<()> {
    let name = |part: &str| format!("{field}.{part}");
    let args = process.args().as_deref().unwrap_or_default();
    if args.first().is_none_or(String::is_empty) {
        return Err(Error::field(name("args"), "is empty"));
    }
    if !process.cwd().is_absolute() {
        return Err(Error::field(name("cwd"), "is not absolute"));
    }
    for (part, text) in args
        .iter()
        .map(|arg| ("args", arg))
        .chain(process.env().iter().flatten().map(|env| ("env", env)))
    {
        if text.contains('\0') {
            return Err(Error::field(name(part), "holds a zero byte"));
        }
    }
    for (part, set) in [
        ("apparmorProfile", process.apparmor_profile()),
        ("selinuxLabel", process.selinux_label()),
        ("commandLine", process.command_line()),
    ] {
        if set.as_deref().is_some_and(|text| !text.is_empty()) {
            return Err(Error::refused(name(part)));
        }
    }
    if process.io_priority().is_some() {
        return Err(Error::refused(name("ioPriority")));
    }
    if process.scheduler().is_some() {
        return Err(Error::refused(name("scheduler")));
    }
    if process.exec_cpu_affinity().is_some() {
        return Err(Error::refused(name("execCPUAffinity")));
    }
    for rlimit in process.rlimits().iter().flatten() {
        if rlimit.soft() > rlimit.hard() {
            let reason = format!("{:?} has a soft limit above the hard one", rlimit.typ());
            return Err(Error::field(name("rlimits"), reason));
        }
    }
    Ok(())
}

/// Sets `process.rlimits`.
pub fn set_rlimits(process: &Process) -> Result<()> {
    for rlimit in process.rlimits().iter().flatten() {
        let value = |limit: u64| (limit != u64::MAX).then_some(limit);
        let limit = Rlimit {
            current: value(rlimit.soft()),
            maximum: value(rlimit.hard()),
        };
        rustix::process::setrlimit(resource(rlimit.typ()), limit)
            .step(|| format!("process.rlimits: set {}", rlimit.typ()))?;
    }
    Ok(())
}

fn resource(kind: PosixRlimitType) -> Resource {
    use PosixRlimitType as P;
    match kind {
        P::RlimitCpu => Resource::Cpu,
        P::RlimitFsize => Resource::Fsize,
        P::RlimitData => Resource::Data,
        P::RlimitStack => Resource::Stack,
        P::RlimitCore => Resource::Core,
        P::RlimitRss => Resource::Rss,
        P::RlimitNproc => Resource::Nproc,
        P::RlimitNofile => Resource::Nofile,
        P::RlimitMemlock => Resource::Memlock,
        P::RlimitAs => Resource::As,
        P::RlimitLocks => Resource::Locks,
        P::RlimitSigpending => Resource::Sigpending,
        P::RlimitMsgqueue => Resource::Msgqueue,
        P::RlimitNice => Resource::Nice,
        P::RlimitRtprio => Resource::Rtprio,
        P::RlimitRttime => Resource::Rttime,
    }
}

/// Writes `process.oomScoreAdj` for the calling process.
pub fn set_oom_score_adj(value: Option<i32>) -> Result<()> {
    match value {
        Some(value) => std::fs::write("/proc/self/oom_score_adj", value.to_string())
            .step(|| format!("process.oomScoreAdj: set {value}")),
        None => Ok(()),
    }
}

/// Makes the working folder if it is missing, as runc does, and enters it. Called before the user changes; a folder that
/// only the user may enter is tried again after.
pub fn enter_cwd(cwd: &Path, make: bool) -> Result<bool> {
    if make {
        match std::fs::create_dir_all(cwd) {
            Err(error) if error.raw_os_error() != Some(libc::EROFS) => {
                return Err(Error::step(
                    format!("process.cwd: make {}", cwd.display()),
                    error,
                ));
            }
            _ => {}
        }
    }
    match rustix::process::chdir(cwd) {
        Ok(()) => Ok(true),
        Err(Errno::ACCESS | Errno::PERM) if make => Ok(false),
        Err(error) => {
            let what = format!(
                "chdir to cwd ({:?}) set in config.json failed",
                cwd.display().to_string()
            );
            Err(Error::step(what, error))
        }
    }
}

/// Becomes `process.user`. Capabilities are kept over the change and set by [`Sets::apply`] after it.
pub fn set_user(user: &User) -> Result<()> {
    let groups: Vec<Gid> = user
        .additional_gids()
        .iter()
        .flatten()
        .map(|&gid| Gid::from_raw(gid))
        .collect();
    let (uid, gid) = (Uid::from_raw(user.uid()), Gid::from_raw(user.gid()));
    rustix::process::umask(Mode::from_raw_mode(user.umask().unwrap_or(0o022) & 0o777));
    rustix::thread::set_keep_capabilities(true).step(|| "keep capabilities".into())?;
    rustix::thread::set_thread_groups(&groups)
        .step(|| "process.user.additionalGids: setgroups".into())?;
    rustix::thread::set_thread_res_gid(gid, gid, gid)
        .step(|| format!("process.user.gid: setgid {}", user.gid()))?;
    rustix::thread::set_thread_res_uid(uid, uid, uid)
        .step(|| format!("process.user.uid: setuid {}", user.uid()))?;
    rustix::thread::set_keep_capabilities(false).step(|| "drop keep capabilities".into())
}

/// Gives the standard streams to the user, so that `/dev/stdout` can be opened again.
pub fn own_stdio(user: &User) -> Result<()> {
    for fd in [
        rustix::stdio::stdin(),
        rustix::stdio::stdout(),
        rustix::stdio::stderr(),
    ] {
        let stat = rustix::fs::fstat(fd).step(|| "stat the standard streams".into())?;
        let kind = FileType::from_raw_mode(stat.st_mode);
        let null = kind == FileType::CharacterDevice && rustix::fs::major(stat.st_rdev) == 1;
        if !null && stat.st_uid != user.uid() {
            rustix::fs::fchown(fd, Some(Uid::from_raw(user.uid())), None)
                .step(|| "own the standard streams".into())?;
        }
    }
    Ok(())
}

/// The five capability sets of a process.
pub struct Sets {
    bounding: CapabilitySet,
    sets: CapabilitySets,
    ambient: CapabilitySet,
}

impl Sets {
    /// From the spec; a missing set is empty.
    pub fn parse(spec: Option<&LinuxCapabilities>) -> Self {
        let set = |get: fn(&LinuxCapabilities) -> &Option<Capabilities>| {
            spec.and_then(|spec| get(spec).as_ref())
                .into_iter()
                .flatten()
                .fold(CapabilitySet::empty(), |set, &one| set | bit(one))
        };
        Self {
            bounding: set(LinuxCapabilities::bounding),
            sets: CapabilitySets {
                effective: set(LinuxCapabilities::effective),
                permitted: set(LinuxCapabilities::permitted),
                inheritable: set(LinuxCapabilities::inheritable),
            },
            ambient: set(LinuxCapabilities::ambient),
        }
    }

    /// Drops from the bounding set; needs CAP_SETPCAP, so it comes before the rest.
    pub fn apply_bounding(&self) -> Result<()> {
        for number in 0..64 {
            let one = CapabilitySet::from_bits_retain(1 << number);
            match rustix::thread::capability_is_in_bounding_set(one) {
                Ok(true) if !self.bounding.contains(one) => {
                    rustix::thread::remove_capability_from_bounding_set(one)
                        .step(|| format!("process.capabilities.bounding: drop {number}"))?;
                }
                Ok(_) => {}
                // Past the kernel's last capability.
                Err(_) => break,
            }
        }
        Ok(())
    }

    /// Sets the others.
    pub fn apply(&self) -> Result<()> {
        rustix::thread::set_capabilities(None, self.sets)
            .step(|| "process.capabilities: set".into())?;
        rustix::thread::clear_ambient_capability_set()
            .step(|| "process.capabilities.ambient: clear".into())?;
        for one in self.ambient.iter() {
            rustix::thread::configure_capability_in_ambient_set(one, true)
                .step(|| format!("process.capabilities.ambient: raise {one:?}"))?;
        }
        Ok(())
    }
}

fn bit(capability: Capability) -> CapabilitySet {
    // The crate prints `CHOWN`, which is how the flags are named as well.
    CapabilitySet::from_name(&capability.to_string()).unwrap_or(CapabilitySet::empty())
}

/// The process's environment, with HOME of the user's entry in /etc/passwd if it is not set.
pub fn environment(process: &Process) -> Vec<String> {
    let mut env = process.env().clone().unwrap_or_default();
    if !env.iter().any(|entry| entry.starts_with("HOME=")) {
        let passwd = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
        let home = home_of(&passwd, process.user().uid()).unwrap_or("/");
        env.push(format!("HOME={home}"));
    }
    env
}

fn home_of(passwd: &str, uid: u32) -> Option<&str> {
    passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        let id = fields.nth(2)?.parse::<u32>().ok()?;
        let home = fields.nth(2)?;
        (id == uid && !home.is_empty()).then_some(home)
    })
}

/// Finds the executable of `args[0]` as runc does, with its messages: callers know them.
pub fn find_executable(name: &str, env: &[String]) -> Result<PathBuf> {
    let quoted = format!("exec: {name:?}");
    if name.contains('/') {
        return match is_executable(Path::new(name)) {
            Ok(()) => Ok(name.into()),
            Err(Errno::NOENT | Errno::NOTDIR) => Err(Error::Executable(format!(
                "{quoted}: stat {name}: {}",
                errno_text(stat_error(Path::new(name)))
            ))),
            Err(error) => Err(Error::Executable(format!(
                "{quoted}: {}",
                errno_text(error.raw_os_error())
            ))),
        };
    }
    let path = env
        .iter()
        .rev()
        .find_map(|entry| entry.strip_prefix("PATH="))
        .unwrap_or("");
    path.split(':')
        .filter(|folder| folder.starts_with('/'))
        .map(|folder| Path::new(folder).join(name))
        .find(|candidate| is_executable(candidate).is_ok())
        .ok_or_else(|| Error::Executable(format!("{quoted}: executable file not found in $PATH")))
}

fn stat_error(path: &Path) -> i32 {
    rustix::fs::stat(path)
        .err()
        .unwrap_or(Errno::NOENT)
        .raw_os_error()
}

fn is_executable(path: &Path) -> std::result::Result<(), Errno> {
    let stat = rustix::fs::stat(path)?;
    if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
        return Err(Errno::ISDIR);
    }
    // access(X_OK) of root succeeds on any file with one x bit; without any the answer is EACCES.
    rustix::fs::accessat(CWD, path, Access::EXEC_OK, AtFlags::EACCESS)
}

/// A C string; zero bytes were refused by [`check`].
pub fn c_string(text: &OsStr) -> Result<CString> {
    CString::new(text.as_bytes()).map_err(|_| Error::field("process", "holds a zero byte"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn process(json: &str) -> Process {
        serde_json::from_str(json).unwrap()
    }

    const MINIMAL: &str = r#"{"user":{"uid":0,"gid":0},"args":["sh"],"cwd":"/""#;

    #[test]
    fn a_process_needs_args_and_an_absolute_cwd() {
        for (json, field) in [
            (
                r#"{"user":{"uid":0,"gid":0},"cwd":"/"}"#.to_string(),
                "process.args",
            ),
            (
                r#"{"user":{"uid":0,"gid":0},"args":[],"cwd":"/"}"#.to_string(),
                "process.args",
            ),
            (
                r#"{"user":{"uid":0,"gid":0},"args":["x"],"cwd":"x"}"#.to_string(),
                "process.cwd",
            ),
            (
                format!(r#"{MINIMAL},"apparmorProfile":"p"}}"#),
                "process.apparmorProfile",
            ),
            (
                format!(r#"{MINIMAL},"selinuxLabel":"p"}}"#),
                "process.selinuxLabel",
            ),
            (
                format!(r#"{MINIMAL},"rlimits":[{{"type":"RLIMIT_CPU","soft":2,"hard":1}}]}}"#),
                "process.rlimits",
            ),
        ] {
            let error = check("process", &process(&json)).unwrap_err().text();
            assert!(error.contains(field), "{error}");
        }
        check("process", &process(&format!("{MINIMAL}}}"))).unwrap();
    }

    #[test]
    fn every_capability_has_its_bit() {
        for (name, number) in [
            ("CAP_CHOWN", 0),
            ("CAP_SYS_ADMIN", 21),
            ("CAP_NET_RAW", 13),
            ("CAP_SETFCAP", 31),
            ("CAP_BPF", 39),
            ("CAP_CHECKPOINT_RESTORE", 40),
        ] {
            let one: Capability = serde_json::from_str(&format!("\"{name}\"")).unwrap();
            assert_eq!(bit(one).bits(), 1 << number, "{name}");
        }
    }

    #[test]
    fn missing_capabilities_are_none() {
        let sets = Sets::parse(None);
        assert!(sets.bounding.is_empty() && sets.sets.permitted.is_empty());
    }

    #[test]
    fn a_missing_executable_has_runcs_message() {
        let env = ["PATH=/nonexistent:/bin".to_string()];
        let text = |name: &str| find_executable(name, &env).unwrap_err().text();
        assert_eq!(
            text("no-such-command"),
            "unable to start container process: exec: \"no-such-command\": executable file not found in $PATH"
        );
        assert_eq!(
            text("/nope"),
            "unable to start container process: exec: \"/nope\": stat /nope: no such file or directory"
        );
    }

    #[test]
    fn a_file_without_x_is_permission_denied_and_a_folder_is_named_so() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("x");
        std::fs::write(&file, "").unwrap();
        std::fs::set_permissions(&file, PermissionsExt::from_mode(0o644)).unwrap();
        let error = find_executable(file.to_str().unwrap(), &[])
            .unwrap_err()
            .text();
        assert!(error.ends_with("permission denied"), "{error}");
        let error = find_executable(dir.path().to_str().unwrap(), &[])
            .unwrap_err()
            .text();
        assert!(error.ends_with("is a directory"), "{error}");
    }

    #[test]
    fn names_are_found_in_path_order() {
        let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        for dir in [&a, &b] {
            let file = dir.path().join("tool");
            std::fs::write(&file, "").unwrap();
            std::fs::set_permissions(&file, PermissionsExt::from_mode(0o755)).unwrap();
        }
        let env = [format!(
            "PATH={}:{}",
            b.path().display(),
            a.path().display()
        )];
        assert_eq!(
            find_executable("tool", &env).unwrap(),
            b.path().join("tool")
        );
    }

    #[test]
    fn home_comes_from_passwd() {
        let passwd = "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\n";
        assert_eq!(home_of(passwd, 1000), Some("/home/user"));
        assert_eq!(home_of(passwd, 5), None);
    }
}
