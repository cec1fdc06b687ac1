//! Step: namespaces. New ones come with the clone of the init; those named by a path are joined before it; one that the spec
//! does not list is shared with the agent.
//!
//! A path is one of the guest's: `/proc/N/ns/KIND`, where N is the init of a container of this pod. The agent looks N up
//! and opens the file; the copy joins what it was handed. `/proc/1/ns/net` is the pod's network.

use std::{
    fs::{self, File},
    os::fd::{AsFd, OwnedFd},
    path::Path,
};

use oci_spec::runtime::{Linux, LinuxNamespace, LinuxNamespaceType, Spec};
use rustix::thread::{LinkNameSpaceType, UnshareFlags};

use crate::{
    error::{Context, Error, Result},
    sys,
};

/// A namespace to join.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Join {
    /// Its kind.
    pub kind: LinuxNamespaceType,
    /// Init of the container that has it.
    pub pid: u32,
    field: String,
}

impl Join {
    /// Opens it. The caller has made sure of the pid.
    pub fn open(&self) -> Result<OwnedFd> {
        let path = format!("/proc/{}/ns/{}", self.pid, file_name(self.kind));
        File::open(&path)
            .map(OwnedFd::from)
            .step(|| format!("{}: open {path}", self.field))
    }

    /// Whether it is the pod's network.
    pub fn is_pod_network(&self) -> bool {
        self.kind == LinuxNamespaceType::Network && self.pid == 1
    }

    /// The error for a pid that is no container's init.
    pub fn unknown(&self) -> Error {
        let reason = format!("{} is not the init of a container of this pod", self.pid);
        Error::field(&self.field, reason)
    }
}

/// Checks the list, and the fields that depend on it.
pub fn check(linux: &Linux) -> Result<()> {
    let list = linux.namespaces().as_deref().unwrap_or_default();
    let mut seen = Vec::new();
    for (index, namespace) in list.iter().enumerate() {
        let field = format!("linux.namespaces[{index}]");
        let kind = namespace.typ();
        if seen.contains(&kind) {
            return Err(Error::field(field, format!("{kind} is listed twice")));
        }
        seen.push(kind);
        join(index, namespace)?;
    }
    if !seen.contains(&LinuxNamespaceType::Mount) {
        return Err(Error::field("linux.namespaces", "lists no mount namespace"));
    }
    let new_time = list
        .iter()
        .any(|one| one.typ() == LinuxNamespaceType::Time && path(one).is_none());
    for (clock, offset) in linux.time_offsets().iter().flatten() {
        let field = format!("linux.timeOffsets.{clock}");
        if !new_time {
            return Err(Error::field(field, "needs a new time namespace"));
        }
        if !matches!(clock.as_str(), "monotonic" | "boottime") {
            return Err(Error::field(field, "is not a clock of a time namespace"));
        }
        if offset.nanosecs().is_some_and(|n| n >= 1_000_000_000) {
            return Err(Error::field(field, "has a second or more in nanosecs"));
        }
    }
    for (key, value) in linux.sysctl().iter().flatten() {
        check_sysctl(key, value, &seen)?;
    }
    Ok(())
}

fn path(namespace: &LinuxNamespace) -> Option<&Path> {
    namespace
        .path()
        .as_deref()
        .filter(|path| !path.as_os_str().is_empty())
}

fn list(spec: &Spec) -> &[LinuxNamespace] {
    spec.linux()
        .as_ref()
        .and_then(|linux| linux.namespaces().as_deref())
        .unwrap_or_default()
}

/// Name of the kind's file in `/proc/N/ns`.
fn file_name(kind: LinuxNamespaceType) -> &'static str {
    match kind {
        LinuxNamespaceType::Mount => "mnt",
        LinuxNamespaceType::Cgroup => "cgroup",
        LinuxNamespaceType::Uts => "uts",
        LinuxNamespaceType::Ipc => "ipc",
        LinuxNamespaceType::User => "user",
        LinuxNamespaceType::Pid => "pid",
        LinuxNamespaceType::Network => "net",
        LinuxNamespaceType::Time => "time",
    }
}

fn join(index: usize, namespace: &LinuxNamespace) -> Result<Option<Join>> {
    let Some(path) = path(namespace) else {
        return Ok(None);
    };
    let field = format!("linux.namespaces[{index}].path");
    let kind = namespace.typ();
    if kind == LinuxNamespaceType::Mount {
        let reason = "cannot be joined: a container has mounts of its own";
        return Err(Error::field(field, reason));
    }
    let parts: Vec<_> = path.to_str().unwrap_or_default().split('/').collect();
    let pid = match parts.as_slice() {
        ["", "proc", pid, "ns", name] if *name == file_name(kind) => pid.parse().ok(),
        _ => None,
    };
    match pid {
        Some(pid) => Ok(Some(Join { kind, pid, field })),
        None => {
            let reason = format!(
                "{} is not /proc/PID/ns/{} of a container of this pod",
                path.display(),
                file_name(kind)
            );
            Err(Error::field(field, reason))
        }
    }
}

/// What is to be joined: a user namespace comes last, since the rights over the others end with it.
pub fn joins(spec: &Spec) -> Result<Vec<Join>> {
    let mut joins = Vec::new();
    for (index, namespace) in list(spec).iter().enumerate() {
        joins.extend(join(index, namespace)?);
    }
    joins.sort_by_key(|join| join.kind == LinuxNamespaceType::User);
    Ok(joins)
}

/// Whether the spec asks for a new namespace of this kind.
pub fn is_new(spec: &Spec, kind: LinuxNamespaceType) -> bool {
    list(spec)
        .iter()
        .any(|namespace| namespace.typ() == kind && path(namespace).is_none())
}

/// Whether the spec names another container's namespace of this kind.
pub fn is_joined(spec: &Spec, kind: LinuxNamespaceType) -> bool {
    list(spec)
        .iter()
        .any(|namespace| namespace.typ() == kind && path(namespace).is_some())
}

/// If the spec joins the pod's network and has a new user namespace, lets it ask for a new network, to be made the pod's: one that
/// belongs to the user namespace. Answers whether it did.
pub fn own_network(spec: &mut Spec) -> Result<bool> {
    let pod = joins(spec)?.iter().any(Join::is_pod_network);
    if !pod || !is_new(spec, LinuxNamespaceType::User) {
        return Ok(false);
    }
    let linux = spec.linux_mut().as_mut();
    let list = linux.and_then(|linux| linux.namespaces_mut().as_mut());
    for namespace in list.into_iter().flatten() {
        if namespace.typ() == LinuxNamespaceType::Network {
            namespace.set_path(None);
        }
    }
    Ok(true)
}

/// Flags for the clone. A new cgroup namespace is not among them: its root is the cgroup of who makes it, so the init makes
/// it itself, inside its cgroup. Nor is a time namespace: its clocks are set before anything is in it.
pub fn clone_flags(spec: &Spec) -> u64 {
    [
        (LinuxNamespaceType::User, libc::CLONE_NEWUSER),
        (LinuxNamespaceType::Mount, libc::CLONE_NEWNS),
        (LinuxNamespaceType::Pid, libc::CLONE_NEWPID),
        (LinuxNamespaceType::Network, libc::CLONE_NEWNET),
        (LinuxNamespaceType::Ipc, libc::CLONE_NEWIPC),
        (LinuxNamespaceType::Uts, libc::CLONE_NEWUTS),
    ]
    .into_iter()
    .filter(|(kind, _)| is_new(spec, *kind))
    .fold(0, |flags, (_, flag)| flags | flag as u64)
}

/// Joins the namespaces that the agent has opened.
pub fn join_all(files: &[(LinuxNamespaceType, OwnedFd)]) -> Result<()> {
    for (kind, file) in files {
        let name = match kind {
            LinuxNamespaceType::Mount => LinkNameSpaceType::Mount,
            LinuxNamespaceType::Cgroup => LinkNameSpaceType::ControlGroup,
            LinuxNamespaceType::Uts => LinkNameSpaceType::HostNameAndNISDomainName,
            LinuxNamespaceType::Ipc => LinkNameSpaceType::InterProcessCommunication,
            LinuxNamespaceType::User => LinkNameSpaceType::User,
            LinuxNamespaceType::Pid => LinkNameSpaceType::ProcessID,
            LinuxNamespaceType::Network => LinkNameSpaceType::Network,
            LinuxNamespaceType::Time => LinkNameSpaceType::Time,
        };
        rustix::thread::move_into_link_name_space(file.as_fd(), Some(name))
            .step(|| format!("linux.namespaces: join the {kind} namespace"))?;
    }
    Ok(())
}

/// Makes the time namespace that the caller's children will be in, with its clocks set.
pub fn make_time(spec: &Spec) -> Result<()> {
    if !is_new(spec, LinuxNamespaceType::Time) {
        return Ok(());
    }
    sys::unshare(UnshareFlags::NEWTIME).step(|| "make a time namespace".into())?;
    let offsets = spec
        .linux()
        .as_ref()
        .and_then(|l| l.time_offsets().as_ref());
    for (clock, offset) in offsets.into_iter().flatten() {
        let (secs, nanosecs) = (offset.secs().unwrap_or(0), offset.nanosecs().unwrap_or(0));
        fs::write(
            "/proc/self/timens_offsets",
            format!("{clock} {secs} {nanosecs}\n"),
        )
        .step(|| format!("linux.timeOffsets.{clock}: set {secs} s {nanosecs} ns"))?;
    }
    Ok(())
}

/// The init's part: own cgroup namespace, loopback, names, sysctls. `/proc` is still the guest's.
pub fn set_up(spec: &Spec) -> Result<()> {
    if is_new(spec, LinuxNamespaceType::Cgroup) {
        sys::unshare(UnshareFlags::NEWCGROUP).step(|| "make a cgroup namespace".into())?;
    }
    if is_new(spec, LinuxNamespaceType::Network) {
        sys::loopback_up().step(|| "bring loopback up".into())?;
    }
    if let Some(name) = spec.hostname().as_deref().filter(|name| !name.is_empty()) {
        rustix::system::sethostname(name.as_bytes()).step(|| format!("hostname: set {name}"))?;
    }
    if let Some(name) = spec.domainname().as_deref().filter(|name| !name.is_empty()) {
        rustix::system::setdomainname(name.as_bytes())
            .step(|| format!("domainname: set {name}"))?;
    }
    let sysctls = spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.sysctl().as_ref());
    for (key, value) in sysctls.into_iter().flatten() {
        fs::write(sysctl_path(key), value)
            .step(|| format!("linux.sysctl {key}: write \"{value}\""))?;
    }
    Ok(())
}

/// The key with dots, as sysctl(8) reads both forms: whichever of `.` and `/` comes first separates, the other is part
/// of a name (`net/ipv4/conf/eth0.1/forwarding`).
fn dotted(key: &str) -> String {
    if key
        .find(['.', '/'])
        .and_then(|at| key.get(at..)?.chars().next())
        == Some('/')
    {
        swap(key)
    } else {
        key.into()
    }
}

fn swap(key: &str) -> String {
    key.chars()
        .map(|c| match c {
            '.' => '/',
            '/' => '.',
            other => other,
        })
        .collect()
}

fn sysctl_path(key: &str) -> String {
    format!("/proc/sys/{}", swap(&dotted(key)))
}

/// A sysctl must be of a namespace that the container has: another one would change the machine under the pod's other containers.
fn check_sysctl(key: &str, value: &str, namespaces: &[LinuxNamespaceType]) -> Result<()> {
    const IPC: [&str; 8] = [
        "kernel.msgmax",
        "kernel.msgmnb",
        "kernel.msgmni",
        "kernel.sem",
        "kernel.shmall",
        "kernel.shmmax",
        "kernel.shmmni",
        "kernel.shm_rmid_forced",
    ];
    let wrong = |reason: &str| Err(Error::field(format!("linux.sysctl {key:?}"), reason));
    let dotted = dotted(key);
    let plain = key
        .bytes()
        .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-' | b'/' | b'*'));
    if !plain
        || swap(&dotted)
            .split('/')
            .any(|part| matches!(part, "" | "." | ".."))
    {
        return wrong("is not a name");
    }
    if value.contains('\0') {
        return wrong("has a value with a zero byte");
    }
    let (kind, name) = match dotted.as_str() {
        "kernel.hostname" => return wrong("is the field hostname"),
        "kernel.domainname" => (LinuxNamespaceType::Uts, "uts"),
        ipc if IPC.contains(&ipc) || ipc.starts_with("fs.mqueue.") => {
            (LinuxNamespaceType::Ipc, "ipc")
        }
        net if net.starts_with("net.") => (LinuxNamespaceType::Network, "network"),
        _ => return wrong("is not namespaced"),
    };
    if namespaces.contains(&kind) {
        Ok(())
    } else {
        wrong(&format!("needs a {name} namespace"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [LinuxNamespaceType; 3] = [
        LinuxNamespaceType::Uts,
        LinuxNamespaceType::Ipc,
        LinuxNamespaceType::Network,
    ];

    fn checked(linux: &str) -> std::result::Result<(), String> {
        check(&serde_json::from_str(&format!("{{{linux}}}")).unwrap()).map_err(|e| e.text())
    }

    #[test]
    fn new_and_joined_namespaces_are_told_apart() {
        let spec: Spec = serde_json::from_str(
            r#"{"ociVersion":"1.0.2","linux":{"namespaces":[{"type":"mount"},{"type":"pid"},
            {"type":"user","path":"/proc/5/ns/user"},{"type":"ipc","path":"/proc/5/ns/ipc"},{"type":"cgroup"}]}}"#,
        )
        .unwrap();
        assert_eq!(
            clone_flags(&spec),
            (libc::CLONE_NEWNS | libc::CLONE_NEWPID) as u64
        );
        assert!(is_new(&spec, LinuxNamespaceType::Cgroup));
        assert!(!is_new(&spec, LinuxNamespaceType::Ipc));
        let joins = joins(&spec).unwrap();
        assert_eq!(joins.len(), 2);
        assert_eq!(joins.last().unwrap().kind, LinuxNamespaceType::User);
        assert_eq!(joins.last().unwrap().pid, 5);
    }

    #[test]
    fn the_pods_network_belongs_to_the_user_namespace_that_comes_with_it() {
        let spec = |user: &str| -> Spec {
            serde_json::from_str(&format!(
                r#"{{"ociVersion":"1.0.2","linux":{{"namespaces":[{{"type":"mount"}},
                {{"type":"network","path":"/proc/1/ns/net"}}{user}]}}}}"#
            ))
            .unwrap()
        };
        let mut plain = spec("");
        assert!(joins(&plain).unwrap()[0].is_pod_network());
        assert!(!own_network(&mut plain).unwrap());
        assert!(!is_new(&plain, LinuxNamespaceType::Network));
        let mut user = spec(r#",{"type":"user"}"#);
        assert!(own_network(&mut user).unwrap());
        assert!(is_new(&user, LinuxNamespaceType::Network));
        let mut joined = spec(r#",{"type":"user","path":"/proc/5/ns/user"}"#);
        assert!(!own_network(&mut joined).unwrap());
    }

    #[test]
    fn lists_that_make_no_sense_are_refused() {
        for list in [
            r#"{"type":"mount"},{"type":"mount"}"#,
            r#"{"type":"pid"}"#,
            r#"{"type":"mount","path":"/proc/5/ns/mnt"}"#,
            r#"{"type":"mount"},{"type":"ipc","path":"x"}"#,
            r#"{"type":"mount"},{"type":"ipc","path":"/proc/5/ns/net"}"#,
            r#"{"type":"mount"},{"type":"ipc","path":"/proc/self/ns/ipc"}"#,
            r#"{"type":"mount"},{"type":"ipc","path":"/proc/5/../5/ns/ipc"}"#,
            r#"{"type":"mount"},{"type":"ipc","path":"/run/netns/x"}"#,
        ] {
            let error = checked(&format!(r#""namespaces":[{list}]"#)).unwrap_err();
            assert!(error.contains("linux.namespaces"), "{list}: {error}");
        }
    }

    #[test]
    fn time_offsets_need_a_new_time_namespace_and_a_clock_of_it() {
        let offsets = |list: &str, clock: &str| {
            checked(&format!(
                r#""namespaces":[{{"type":"mount"}}{list}],"timeOffsets":{{"{clock}":{{"secs":1}}}}"#
            ))
        };
        offsets(r#",{"type":"time"}"#, "boottime").unwrap();
        assert!(offsets("", "boottime").is_err());
        assert!(offsets(r#",{"type":"time","path":"/proc/5/ns/time"}"#, "boottime").is_err());
        assert!(offsets(r#",{"type":"time"}"#, "realtime").is_err());
    }

    #[test]
    fn sysctls_of_the_machine_are_refused() {
        for key in [
            "net.ipv4.ip_forward",
            "net/ipv4/conf/eth0.1/forwarding",
            "fs.mqueue.msg_max",
            "kernel.shm_rmid_forced",
            "kernel/sem",
            "kernel.domainname",
        ] {
            check_sysctl(key, "1", &ALL).unwrap();
            assert!(check_sysctl(key, "1", &[]).is_err(), "{key}");
        }
        for key in [
            "vm.swappiness",
            "kernel.panic",
            "net.ipv4.\0x",
            "kernel.core_pattern",
            "kernel.hostname",
            "net/../kernel/panic",
            "net..ipv4",
        ] {
            assert!(check_sysctl(key, "1", &ALL).is_err(), "{key}");
        }
    }

    #[test]
    fn both_forms_of_a_sysctl_name_the_same_file() {
        assert_eq!(
            sysctl_path("net.ipv4.ip_forward"),
            sysctl_path("net/ipv4/ip_forward")
        );
        assert_eq!(
            sysctl_path("net/ipv4/conf/eth0.1/forwarding"),
            "/proc/sys/net/ipv4/conf/eth0.1/forwarding"
        );
        assert_eq!(
            sysctl_path("net.ipv4.conf.eth0/1.forwarding"),
            "/proc/sys/net/ipv4/conf/eth0.1/forwarding"
        );
    }
}
