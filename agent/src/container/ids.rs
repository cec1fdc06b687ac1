//! User and group ids of a container with a user namespace: the mappings of the spec, checked, written to a process, and as
//! a namespace of their own for mounts whose owners are mapped.

use std::{
    fs::{self, File},
    os::fd::OwnedFd,
};

use oci_spec::runtime::{LinuxIdMapping, LinuxIdMappingBuilder, LinuxNamespaceType, Spec};
use rustix::process::{Pid, Signal, WaitOptions};
use serde::{Deserialize, Serialize};

use super::namespaces;
use crate::{
    error::{Context, Error, Result},
    sys,
};

/// The kernel's limit of lines in a mapping.
const LINES_MAX: usize = 340;

/// Mappings of user and group ids; both empty without a user namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ids {
    /// Of users.
    pub uid: Vec<LinuxIdMapping>,
    /// Of groups.
    pub gid: Vec<LinuxIdMapping>,
}

impl Ids {
    /// Those of `linux.uidMappings` and `linux.gidMappings`.
    pub fn of(spec: &Spec) -> Self {
        let linux = spec.linux().as_ref();
        let list = |list: Option<&Option<Vec<LinuxIdMapping>>>| {
            list.cloned().flatten().unwrap_or_default()
        };
        Self {
            uid: list(linux.map(|linux| linux.uid_mappings())),
            gid: list(linux.map(|linux| linux.gid_mappings())),
        }
    }

    /// Those of a process's user namespace.
    pub fn of_process(pid: u32) -> Result<Self> {
        let read = |name: &str| {
            let path = format!("/proc/{pid}/{name}");
            fs::read_to_string(&path)
                .step(|| format!("read {path}"))
                .map(|text| parse(&text))
        };
        Ok(Self {
            uid: read("uid_map")?,
            gid: read("gid_map")?,
        })
    }

    /// Whether there is no mapping.
    pub fn is_empty(&self) -> bool {
        self.uid.is_empty() && self.gid.is_empty()
    }

    /// The user id outside; `None` if it is not mapped.
    pub fn outer_uid(&self, uid: u32) -> Option<u32> {
        outer(&self.uid, uid)
    }

    /// The group id outside; `None` if it is not mapped.
    pub fn outer_gid(&self, gid: u32) -> Option<u32> {
        outer(&self.gid, gid)
    }

    /// Gives a process's new user namespace its mappings.
    pub fn write(&self, pid: u32) -> Result<()> {
        for (name, field, list) in [
            ("uid_map", "uidMappings", &self.uid),
            ("gid_map", "gidMappings", &self.gid),
        ] {
            fs::write(format!("/proc/{pid}/{name}"), lines(list))
                .step(|| format!("linux.{field}: write {name}"))?;
        }
        Ok(())
    }

    /// A user namespace with these mappings and no process in it.
    pub fn namespace(&self) -> Result<OwnedFd> {
        let number = sys::clone_idle_in_user_namespace().step(|| "make a user namespace".into())?;
        let made = self.write(number).and_then(|()| {
            let path = format!("/proc/{number}/ns/user");
            File::open(&path).step(|| format!("open {path}"))
        });
        if let Some(pid) = Pid::from_raw(number.cast_signed()) {
            let _ = rustix::process::kill_process(pid, Signal::KILL);
            let _ = rustix::process::waitpid(Some(pid), WaitOptions::empty());
        }
        made.map(OwnedFd::from)
    }
}

fn outer(list: &[LinuxIdMapping], id: u32) -> Option<u32> {
    if list.is_empty() {
        return Some(id);
    }
    list.iter().find_map(|map| {
        let offset = id.checked_sub(map.container_id())?;
        if offset < map.size() {
            map.host_id().checked_add(offset)
        } else {
            None
        }
    })
}

fn lines(list: &[LinuxIdMapping]) -> String {
    list.iter()
        .map(|map| format!("{} {} {}\n", map.container_id(), map.host_id(), map.size()))
        .collect()
}

fn parse(text: &str) -> Vec<LinuxIdMapping> {
    text.lines()
        .filter_map(|line| {
            let mut numbers = line.split_whitespace().map(str::parse::<u32>);
            let mut next = || numbers.next()?.ok();
            let (container, host, size) = (next()?, next()?, next()?);
            LinuxIdMappingBuilder::default()
                .container_id(container)
                .host_id(host)
                .size(size)
                .build()
                .ok()
        })
        .collect()
}

/// Checks a list of mappings, of the field given.
pub fn check_list(field: &str, list: &[LinuxIdMapping]) -> Result<()> {
    if list.len() > LINES_MAX {
        let reason = format!("has more than {LINES_MAX} entries");
        return Err(Error::field(field, reason));
    }
    for map in list {
        if map.size() == 0 {
            return Err(Error::field(field, "has an entry of size 0"));
        }
        let end = |first: u32| first.checked_add(map.size());
        if end(map.container_id()).is_none() || end(map.host_id()).is_none() {
            return Err(Error::field(field, "has an entry that passes the last id"));
        }
    }
    Ok(())
}

/// Checks the container's mappings against its user namespace, as runc does.
pub fn check(spec: &Spec) -> Result<()> {
    let ids = Ids::of(spec);
    let new = namespaces::is_new(spec, LinuxNamespaceType::User);
    let joined = namespaces::is_joined(spec, LinuxNamespaceType::User);
    for (field, list) in [
        ("linux.uidMappings", &ids.uid),
        ("linux.gidMappings", &ids.gid),
    ] {
        if !list.is_empty() && !new && !joined {
            return Err(Error::field(field, "needs a user namespace"));
        }
        if list.is_empty() && new {
            return Err(Error::field(field, "is empty, with a new user namespace"));
        }
        check_list(field, list)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn maps(json: &str) -> Vec<LinuxIdMapping> {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn ids_are_found_outside() {
        let list = maps(
            r#"[{"containerID":0,"hostID":100000,"size":1000},{"containerID":5000,"hostID":7,"size":1}]"#,
        );
        assert_eq!(outer(&list, 0), Some(100_000));
        assert_eq!(outer(&list, 999), Some(100_999));
        assert_eq!(outer(&list, 1000), None);
        assert_eq!(outer(&list, 5000), Some(7));
        assert_eq!(outer(&[], 42), Some(42));
    }

    #[test]
    fn mappings_are_read_back_from_the_kernels_form() {
        let list = parse("         0     100000      65536\n");
        assert_eq!(lines(&list), "0 100000 65536\n");
    }

    #[test]
    fn empty_and_overlong_entries_are_refused() {
        for json in [
            r#"[{"containerID":0,"hostID":0,"size":0}]"#,
            r#"[{"containerID":4294967295,"hostID":0,"size":2}]"#,
        ] {
            assert!(check_list("linux.uidMappings", &maps(json)).is_err());
        }
    }
}
