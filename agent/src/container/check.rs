//! Refuses, before anything is made, every field of the spec that is not enforced. Fields that concern the host alone are the
//! shim's: `root.path`, `annotations`, `linux.cgroupsPath` (a hint; the cgroup is named by the container), the
//! hooks prestart, createRuntime, poststart and poststop.

use oci_spec::runtime::{LinuxNamespaceType, Spec};

use super::{cgroup, devices, hooks, ids, mounts, namespaces, options, process};
use crate::error::{Error, Result};

/// Checks a container's spec.
pub fn check(spec: &Spec) -> Result<()> {
    let Some(init) = spec.process() else {
        return Err(Error::field("process", "is missing"));
    };
    process::check("process", init)?;
    check_other_systems(spec)?;
    hooks::check(spec)?;
    check_linux(spec)
}

fn check_other_systems(spec: &Spec) -> Result<()> {
    for (field, set) in [
        ("solaris", spec.solaris().is_some()),
        ("windows", spec.windows().is_some()),
        ("vm", spec.vm().is_some()),
        ("zos", spec.zos().is_some()),
        ("uidMappings", spec.uid_mappings().is_some()),
        ("gidMappings", spec.gid_mappings().is_some()),
    ] {
        if set {
            return Err(Error::refused(field));
        }
    }
    Ok(())
}

fn check_linux(spec: &Spec) -> Result<()> {
    let Some(linux) = spec.linux() else {
        return Err(Error::field("linux", "is missing"));
    };
    namespaces::check(linux)?;
    ids::check(spec)?;
    let user_namespace = namespaces::is_new(spec, LinuxNamespaceType::User)
        || namespaces::is_joined(spec, LinuxNamespaceType::User);
    mounts::check(spec.mounts().as_deref().unwrap_or_default(), user_namespace)?;
    if let Some(resources) = linux.resources() {
        cgroup::check(resources)?;
    }
    devices::check(linux.devices().as_deref().unwrap_or_default())?;
    let has = |kind| {
        let list = linux.namespaces().as_deref().unwrap_or_default();
        list.iter().any(|namespace| namespace.typ() == kind)
    };
    for (field, set) in [
        ("hostname", spec.hostname()),
        ("domainname", spec.domainname()),
    ] {
        if set.as_deref().is_some_and(|name| !name.is_empty()) && !has(LinuxNamespaceType::Uts) {
            return Err(Error::field(field, "needs a uts namespace"));
        }
    }
    if let Some(name) = linux
        .rootfs_propagation()
        .as_deref()
        .filter(|n| !n.is_empty())
        && options::propagation(name).is_none()
    {
        return Err(Error::field(
            "linux.rootfsPropagation",
            "is not a propagation",
        ));
    }
    if let Some(personality) = linux.personality() {
        process::check_personality(personality)?;
    }
    for (field, set) in [
        ("linux.intelRdt", linux.intel_rdt().is_some()),
        ("linux.memoryPolicy", linux.memory_policy().is_some()),
        (
            "linux.netDevices",
            linux.net_devices().as_ref().is_some_and(|d| !d.is_empty()),
        ),
        (
            "linux.mountLabel",
            linux.mount_label().as_ref().is_some_and(|l| !l.is_empty()),
        ),
    ] {
        if set {
            return Err(Error::refused(field));
        }
    }
    match linux.seccomp() {
        Some(profile) => super::seccomp::check(profile),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checked(process: &str, linux: &str, rest: &str) -> std::result::Result<(), String> {
        let json = format!(
            r#"{{"ociVersion":"1.0.2",
            "process":{{"user":{{"uid":0,"gid":0}},"args":["sh"],"cwd":"/"{process}}},
            "linux":{{"namespaces":[{{"type":"mount"}},{{"type":"pid"}}]{linux}}}{rest}}}"#
        );
        check(&serde_json::from_str(&json).unwrap()).map_err(|error| error.text())
    }

    #[test]
    fn a_plain_spec_passes() {
        checked("", "", r#","annotations":{"a":"b"}"#).unwrap();
    }

    #[test]
    fn what_is_not_enforced_is_refused_by_name() {
        for (process, linux, rest, field) in [
            ("", r#","intelRdt":{}"#, "", "linux.intelRdt"),
            (
                "",
                r#","mountLabel":"x"}"#.trim_end_matches('}'),
                "",
                "linux.mountLabel",
            ),
            (
                "",
                r#","timeOffsets":{"boottime":{"secs":1}}"#,
                "",
                "linux.timeOffsets",
            ),
            (
                "",
                r#","personality":{"domain":"LINUX32","flags":["x"]}"#,
                "",
                "linux.personality.flags",
            ),
            (
                "",
                r#","uidMappings":[{"hostID":0,"containerID":0,"size":1}]"#,
                "",
                "linux.uidMappings",
            ),
            (
                "",
                r#","rootfsPropagation":"x""#,
                "",
                "linux.rootfsPropagation",
            ),
            (
                "",
                r#","resources":{"network":{"classID":1}}"#,
                "",
                "linux.resources.network",
            ),
            (
                "",
                "",
                r#","hooks":{"createContainer":[{"path":"x"}]}"#,
                "hooks.createContainer",
            ),
            (
                "",
                r#","memoryPolicy":{"mode":"MPOL_BIND"}"#,
                "",
                "linux.memoryPolicy",
            ),
            ("", "", r#","hostname":"h""#, "hostname"),
            (
                r#","scheduler":{"policy":"SCHED_ISO"}"#,
                "",
                "",
                "process.scheduler",
            ),
            (
                r#","apparmorProfile":"p""#,
                "",
                "",
                "process.apparmorProfile",
            ),
        ] {
            let error = checked(process, linux, rest).unwrap_err();
            assert!(error.contains(field), "{field}: {error}");
        }
    }

    #[test]
    fn hooks_of_the_host_are_the_shims() {
        checked(
            "",
            "",
            r#","hooks":{"prestart":[{"path":"/x"}],"poststop":[{"path":"/x"}]}"#,
        )
        .unwrap();
    }

    #[test]
    fn a_spec_without_process_or_mount_namespace_is_refused() {
        let spec: Spec = serde_json::from_str(r#"{"ociVersion":"1.0.2"}"#).unwrap();
        assert!(check(&spec).unwrap_err().text().starts_with("process"));
        let json = r#"{"ociVersion":"1.0.2","process":{"user":{"uid":0,"gid":0},"args":["sh"],"cwd":"/"},
            "linux":{"namespaces":[{"type":"pid"}]}}"#;
        let error = check(&serde_json::from_str(json).unwrap()).unwrap_err();
        assert!(error.text().contains("linux.namespaces"));
    }
}
