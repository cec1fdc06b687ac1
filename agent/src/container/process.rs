//! Steps that turn the set-up child into the container's process: limits, user, capabilities, folder, executable.

use std::{
    collections::HashMap,
    ffi::{CString, OsStr},
    fs::File,
    io::Read,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

use oci_spec::runtime::{LinuxPersonality, LinuxPersonalityDomain, Process, User};
use rustix::{
    fs::{Access, AtFlags, CWD, FileType, Gid, Mode, OFlags, Uid},
    io::Errno,
};

use super::attributes;
use crate::{
    error::{Context, Error, Result, errno_text},
    sys,
};

/// AppArmor profiles that containerd and Docker set where their host has AppArmor, and the one that means none.
const UNASKED_PROFILES: [&str; 5] = [
    "",
    "unconfined",
    "cri-containerd.apparmor.d",
    "docker-default",
    "nerdctl-default",
];

/// Bytes of an `/etc/passwd` that is read; a larger one counts as missing.
const PASSWD_MAX: u64 = 1024 * 1024;

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
        ("selinuxLabel", process.selinux_label()),
        ("commandLine", process.command_line()),
        ("user.username", process.user().username()),
    ] {
        if set.as_deref().is_some_and(|text| !text.is_empty()) {
            return Err(Error::refused(name(part)));
        }
    }
    // The guest has no AppArmor. What containerd and Docker set unasked is passed over; somebody's own profile is not.
    let profile = process.apparmor_profile().as_deref().unwrap_or_default();
    if !UNASKED_PROFILES.contains(&profile) {
        return Err(Error::refused(format!(
            "{} \"{profile}\"",
            name("apparmorProfile")
        )));
    }
    for entry in process.env().iter().flatten() {
        if entry.find('=').unwrap_or(0) == 0 {
            let shown: String = entry.chars().take(40).collect();
            return Err(Error::field(
                name("env"),
                format!("{shown:?} is not NAME=VALUE"),
            ));
        }
    }
    if process
        .oom_score_adj()
        .is_some_and(|n| !(-1000..=1000).contains(&n))
    {
        return Err(Error::field(
            name("oomScoreAdj"),
            "is not within -1000 and 1000",
        ));
    }
    attributes::check(field, process)
}

/// Writes `process.oomScoreAdj` for the calling process.
pub fn set_oom_score_adj(value: Option<i32>) -> Result<()> {
    match value {
        Some(value) => std::fs::write("/proc/self/oom_score_adj", value.to_string())
            .step(|| format!("process.oomScoreAdj: set {value}")),
        None => Ok(()),
    }
}

/// Enters the working folder; answers whether it could. With `again`, before the user changes, a folder that only the user may
/// enter is no error: it is tried again after.
pub fn enter_cwd(cwd: &Path, again: bool) -> Result<bool> {
    match rustix::process::chdir(cwd) {
        // A way of /proc/self/fd could lead to a folder that is not in the container.
        Ok(()) => match rustix::process::getcwd(Vec::new()) {
            Ok(inside) if inside.to_bytes().starts_with(b"/") => Ok(true),
            _ => Err(Error::field("process.cwd", "is outside of the container")),
        },
        Err(Errno::ACCESS | Errno::PERM) if again => Ok(false),
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

/// Gives the standard streams to the user, so that `/dev/stdout` can be opened again. Streams that cannot be given stay as they
/// are, as with runc.
pub fn own_stdio(uid: u32) -> Result<()> {
    for fd in [
        rustix::stdio::stdin(),
        rustix::stdio::stdout(),
        rustix::stdio::stderr(),
    ] {
        let stat = rustix::fs::fstat(fd).step(|| "stat the standard streams".into())?;
        let kind = FileType::from_raw_mode(stat.st_mode);
        let null = kind == FileType::CharacterDevice && rustix::fs::major(stat.st_rdev) == 1;
        if null || stat.st_uid == uid {
            continue;
        }
        match rustix::fs::fchown(fd, Some(Uid::from_raw(uid)), None) {
            Ok(()) | Err(Errno::PERM | Errno::INVAL | Errno::ROFS) => {}
            Err(error) => return Err(Error::step("own the standard streams", error)),
        }
    }
    Ok(())
}

/// Puts the container's null device in the place of the guest's: whoever holds that as a stream could change mode and owner of a
/// node that all containers are masked with. Where `/dev/null` is something else, the streams stay.
pub fn reopen_null() -> Result<()> {
    let is_null = |stat: rustix::fs::Stat| {
        FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice
            && stat.st_rdev == rustix::fs::makedev(1, 3)
    };
    let [stdin, stdout, stderr] = [
        rustix::stdio::stdin(),
        rustix::stdio::stdout(),
        rustix::stdio::stderr(),
    ]
    .map(|fd| rustix::fs::fstat(fd).is_ok_and(is_null));
    // Looked at before it is opened: to open another device may do something.
    if !(stdin || stdout || stderr) || !rustix::fs::stat("/dev/null").is_ok_and(is_null) {
        return Ok(());
    }
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    let null = match rustix::fs::open("/dev/null", flags, Mode::empty()) {
        Ok(null) if rustix::fs::fstat(&null).is_ok_and(is_null) => null,
        _ => return Ok(()),
    };
    let what = || "open /dev/null as a standard stream".to_string();
    if stdin {
        rustix::stdio::dup2_stdin(&null).step(what)?;
    }
    if stdout {
        rustix::stdio::dup2_stdout(&null).step(what)?;
    }
    if stderr {
        rustix::stdio::dup2_stderr(&null).step(what)?;
    }
    Ok(())
}

/// Becomes root of the user namespace that the process is in. Until then its files would belong to nobody there.
pub fn become_inner_root() -> Result<()> {
    let what = || "become root of the user namespace".to_string();
    rustix::thread::set_thread_groups(&[]).step(what)?;
    let (uid, gid) = (Uid::ROOT, Gid::ROOT);
    rustix::thread::set_thread_res_gid(gid, gid, gid).step(what)?;
    rustix::thread::set_thread_res_uid(uid, uid, uid).step(what)
}

/// Checks `linux.personality`: the spec has no flags yet.
pub fn check_personality(personality: &LinuxPersonality) -> Result<()> {
    match personality.flags().as_ref().is_some_and(|f| !f.is_empty()) {
        true => Err(Error::refused("linux.personality.flags")),
        false => Ok(()),
    }
}

/// Sets `linux.personality`.
pub fn set_personality(personality: Option<&LinuxPersonality>) -> Result<()> {
    // linux/personality.h: PER_LINUX, PER_LINUX32.
    let domain = match personality.map(LinuxPersonality::domain) {
        None => return Ok(()),
        Some(LinuxPersonalityDomain::PerLinux) => 0,
        Some(LinuxPersonalityDomain::PerLinux32) => 8,
    };
    sys::personality(domain).step(|| "linux.personality: set".into())
}

/// The process's environment: the last of several values of a name counts; with HOME of the user's entry in /etc/passwd if it is
/// not set.
pub fn environment(process: &Process) -> Vec<String> {
    let mut env: Vec<String> = Vec::new();
    let mut places = HashMap::new();
    for entry in process.env().iter().flatten() {
        let name = entry.split('=').next().unwrap_or_default();
        match places
            .get(name)
            .and_then(|&place: &usize| env.get_mut(place))
        {
            Some(place) => place.clone_from(entry),
            None => {
                places.insert(name, env.len());
                env.push(entry.clone());
            }
        }
    }
    let home = places.get("HOME").copied();
    if home.is_none_or(|place| env.get(place).is_some_and(|entry| entry == "HOME=")) {
        let passwd = read_passwd(Path::new("/etc/passwd")).unwrap_or_default();
        let folder = home_of(&passwd, process.user().uid()).unwrap_or("/");
        let entry = format!("HOME={folder}");
        match home.and_then(|place| env.get_mut(place)) {
            Some(place) => *place = entry,
            None => env.push(entry),
        }
    }
    env
}

/// The file is the container's, and may be a pipe that nobody writes or a device without end: only a regular file is read.
fn read_passwd(path: &Path) -> Option<String> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = File::from(rustix::fs::open(path, flags, Mode::empty()).ok()?);
    let about = file.metadata().ok()?;
    if !about.is_file() || about.len() > PASSWD_MAX {
        return None;
    }
    let mut text = String::new();
    // Files of /proc tell no length.
    file.take(PASSWD_MAX).read_to_string(&mut text).ok()?;
    Some(text)
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
    // By /proc the agent itself could be run, whose file is not the container's.
    let own = rustix::fs::stat("/proc/self/exe");
    if own.is_ok_and(|own| (own.st_dev, own.st_ino) == (stat.st_dev, stat.st_ino)) {
        return Err(Errno::ACCESS);
    }
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
            (format!(r#"{MINIMAL},"env":["X"]}}"#), "process.env"),
            (format!(r#"{MINIMAL},"env":["=1"]}}"#), "process.env"),
            (
                format!(r#"{MINIMAL},"oomScoreAdj":1001}}"#),
                "process.oomScoreAdj",
            ),
        ] {
            let error = check("process", &process(&json)).unwrap_err().text();
            assert!(error.contains(field), "{error}");
        }
        check("process", &process(&format!("{MINIMAL}}}"))).unwrap();
    }

    #[test]
    fn profiles_that_nobody_asked_for_are_passed_over() {
        for profile in UNASKED_PROFILES {
            let json = format!(r#"{MINIMAL},"apparmorProfile":"{profile}"}}"#);
            check("process", &process(&json)).unwrap();
        }
    }

    #[test]
    fn of_two_values_the_last_counts_and_home_is_never_empty() {
        let json = format!(r#"{MINIMAL},"env":["A=1","HOME=","A=2=3","B=x"]}}"#);
        let mut json = process(&json);
        json.set_user(serde_json::from_str(r#"{"uid":4294967294,"gid":0}"#).unwrap());
        assert_eq!(environment(&json), ["A=2=3", "HOME=/", "B=x"]);
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
    fn the_agent_itself_is_no_program_of_a_container() {
        let error = find_executable("/proc/self/exe", &[]).unwrap_err().text();
        assert!(error.ends_with("permission denied"), "{error}");
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
    fn null_streams_become_the_containers_and_others_stay() {
        let mut command = std::process::Command::new("grep");
        command
            .args(["flags", "/proc/self/fdinfo/0"])
            .stdin(std::process::Stdio::null());
        sys::before_exec(&mut command, || {
            reopen_null().map_err(std::io::Error::other)
        });
        let output = command.output().unwrap();
        // It was opened to read; the other one is for both.
        let flags = String::from_utf8(output.stdout).unwrap();
        assert!(flags.trim_end().ends_with('2'), "{flags}");
    }

    #[test]
    fn a_passwd_that_is_no_file_or_has_no_end_is_none() {
        use std::os::unix::fs::symlink;
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        rustix::fs::mkfifoat(CWD, at("pipe"), Mode::from_raw_mode(0o600)).unwrap();
        symlink("/dev/zero", at("zero")).unwrap();
        File::create(at("large"))
            .unwrap()
            .set_len(PASSWD_MAX + 1)
            .unwrap();
        for name in ["pipe", "zero", "large", ".", "missing"] {
            assert_eq!(read_passwd(&at(name)), None, "{name}");
        }
        std::fs::write(at("passwd"), "x").unwrap();
        assert_eq!(read_passwd(&at("passwd")).as_deref(), Some("x"));
    }

    #[test]
    fn home_comes_from_passwd() {
        let passwd = "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\n";
        assert_eq!(home_of(passwd, 1000), Some("/home/user"));
        assert_eq!(home_of(passwd, 5), None);
    }
}
