//! Step: namespaces. New ones come with the clone of the init, those named by a path (guest paths such as
//! `/proc/<pid>/ns/ipc`) are joined before it; one that the spec does not list is shared with the agent.

use std::{
    os::fd::{AsFd, OwnedFd},
    path::PathBuf,
};

use oci_spec::runtime::{LinuxNamespace, LinuxNamespaceType, Spec};
use rustix::{
    fs::{Mode, OFlags},
    thread::{LinkNameSpaceType, UnshareFlags},
};

use crate::{
    error::{Context, Error, Result},
    sys,
};

/// Checks the list: a new mount namespace is needed, user and time namespaces are not there yet.
pub fn check(namespaces: &[LinuxNamespace]) -> Result<()> {
    let mut seen = Vec::new();
    for (index, namespace) in namespaces.iter().enumerate() {
        let field = format!("linux.namespaces[{index}]");
        let kind = namespace.typ();
        if seen.contains(&kind) {
            return Err(Error::field(field, format!("{kind} is listed twice")));
        }
        seen.push(kind);
        match kind {
            LinuxNamespaceType::User | LinuxNamespaceType::Time => {
                return Err(Error::refused(format!("{field} \"{kind}\"")));
            }
            LinuxNamespaceType::Mount if path(namespace).is_some() => {
                return Err(Error::refused(format!("{field}.path of a mount namespace")));
            }
            _ => {}
        }
        if path(namespace).is_some_and(|path| !path.is_absolute()) {
            return Err(Error::field(format!("{field}.path"), "is not absolute"));
        }
    }
    if !seen.contains(&LinuxNamespaceType::Mount) {
        return Err(Error::field("linux.namespaces", "lists no mount namespace"));
    }
    Ok(())
}

fn path(namespace: &LinuxNamespace) -> Option<&PathBuf> {
    namespace
        .path()
        .as_ref()
        .filter(|path| !path.as_os_str().is_empty())
}

fn list(spec: &Spec) -> &[LinuxNamespace] {
    spec.linux()
        .as_ref()
        .and_then(|linux| linux.namespaces().as_deref())
        .unwrap_or_default()
}

/// Whether the spec asks for a new namespace of this kind.
pub fn is_new(spec: &Spec, kind: LinuxNamespaceType) -> bool {
    list(spec)
        .iter()
        .any(|namespace| namespace.typ() == kind && path(namespace).is_none())
}

/// Flags for the clone. A new cgroup namespace is not among them: its root is the cgroup of who makes it, so the init makes
/// it itself, inside its cgroup.
pub fn clone_flags(spec: &Spec) -> u64 {
    [
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

/// Joins the namespaces that are named by a path.
pub fn join_by_path(spec: &Spec) -> Result<()> {
    for (index, namespace) in list(spec).iter().enumerate() {
        let Some(path) = path(namespace) else {
            continue;
        };
        let kind = match namespace.typ() {
            LinuxNamespaceType::Pid => LinkNameSpaceType::ProcessID,
            LinuxNamespaceType::Network => LinkNameSpaceType::Network,
            LinuxNamespaceType::Ipc => LinkNameSpaceType::InterProcessCommunication,
            LinuxNamespaceType::Uts => LinkNameSpaceType::HostNameAndNISDomainName,
            LinuxNamespaceType::Cgroup => LinkNameSpaceType::ControlGroup,
            other => return Err(Error::refused(format!("linux.namespaces \"{other}\""))),
        };
        let what = || format!("linux.namespaces[{index}].path: join {}", path.display());
        let file: OwnedFd =
            rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).step(what)?;
        rustix::thread::move_into_link_name_space(file.as_fd(), Some(kind)).step(what)?;
    }
    Ok(())
}

/// The init's part: own cgroup namespace, loopback, names, sysctls. `/proc` is still the guest's.
pub fn set_up(spec: &Spec) -> Result<()> {
    if is_new(spec, LinuxNamespaceType::Cgroup) {
        // SAFETY: the set-up child has one thread, which shares nothing with another process.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWCGROUP) }
            .step(|| "make a cgroup namespace".into())?;
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
        std::fs::write(sysctl_path(key), value)
            .step(|| format!("linux.sysctl {key}: write \"{value}\""))?;
    }
    Ok(())
}

fn sysctl_path(key: &str) -> String {
    format!("/proc/sys/{}", key.replace('.', "/"))
}

/// A sysctl must be namespaced: another one would change the machine under the pod's other containers.
pub fn check_sysctl(key: &str, value: &str) -> Result<()> {
    const NAMESPACED: [&str; 10] = [
        "kernel.msgmax",
        "kernel.msgmnb",
        "kernel.msgmni",
        "kernel.sem",
        "kernel.shmall",
        "kernel.shmmax",
        "kernel.shmmni",
        "kernel.shm_rmid_forced",
        "kernel.hostname",
        "kernel.domainname",
    ];
    let dotted = key.replace('/', ".");
    let plain = key
        .bytes()
        .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-' | b'/'));
    let known = NAMESPACED.contains(&dotted.as_str())
        || dotted.starts_with("net.")
        || dotted.starts_with("fs.mqueue.");
    if !plain || value.contains('\0') {
        return Err(Error::field(
            format!("linux.sysctl {key:?}"),
            "is not a name",
        ));
    }
    if !known {
        return Err(Error::field(
            format!("linux.sysctl {key}"),
            "is not namespaced",
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn namespaces(json: &str) -> Vec<LinuxNamespace> {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn new_and_joined_namespaces_are_told_apart() {
        let spec: Spec = serde_json::from_str(
            r#"{"ociVersion":"1.0.2","linux":{"namespaces":[{"type":"mount"},{"type":"pid"},
            {"type":"ipc","path":"/proc/5/ns/ipc"},{"type":"cgroup"}]}}"#,
        )
        .unwrap();
        assert_eq!(
            clone_flags(&spec),
            (libc::CLONE_NEWNS | libc::CLONE_NEWPID) as u64
        );
        assert!(is_new(&spec, LinuxNamespaceType::Cgroup));
        assert!(!is_new(&spec, LinuxNamespaceType::Ipc));
    }

    #[test]
    fn user_time_and_double_namespaces_are_refused() {
        for json in [
            r#"[{"type":"mount"},{"type":"user"}]"#,
            r#"[{"type":"mount"},{"type":"time"}]"#,
            r#"[{"type":"mount"},{"type":"mount"}]"#,
            r#"[{"type":"mount","path":"/x"}]"#,
            r#"[{"type":"mount"},{"type":"ipc","path":"x"}]"#,
        ] {
            assert!(check(&namespaces(json)).is_err(), "{json}");
        }
    }

    #[test]
    fn sysctls_of_the_machine_are_refused() {
        check_sysctl("net.ipv4.ip_forward", "1").unwrap();
        check_sysctl("fs.mqueue.msg_max", "1").unwrap();
        for key in [
            "vm.swappiness",
            "kernel.panic",
            "net.ipv4.\0x",
            "kernel.core_pattern",
        ] {
            assert!(check_sysctl(key, "1").is_err(), "{key}");
        }
    }

    #[test]
    fn a_sysctl_cannot_leave_its_folder() {
        assert!(!sysctl_path("net.../../x").contains(".."));
    }
}
