//! `linux.cgroupsPath`: the path of a cgroup on the host, from the two forms that container engines write.
//!
//! cgroupfs: `/kubepods/burstable/pod…/<id>`, folders below the hierarchy's root. systemd: `slice:prefix:name`, which stands for
//! the folders of the slice and its parents, and a scope in them: `a-b.slice:cri:x` is `a.slice/a-b.slice/cri-x.scope`
//! (systemd.slice(5)).

use std::path::{Component, Path};

use crate::{
    limits::CGROUP_PATH,
    refusal::{Refusal, wrong},
};

/// The field.
const FIELD: &str = "linux.cgroupsPath";
/// Longest name of a folder (NAME_MAX).
const NAME_MAX: usize = 255;

/// The checked path of a cgroup: one folder or more below the root of every hierarchy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CgroupPath(Vec<String>);

impl CgroupPath {
    /// Of the spec's field.
    pub fn parse(path: &str) -> Result<Self, Refusal> {
        if path.len() > CGROUP_PATH {
            let why = format!("is longer than {CGROUP_PATH} bytes");
            return Err(wrong(FIELD, why));
        }
        let folders = match path.split(':').collect::<Vec<_>>().as_slice() {
            [slice, prefix, name] if !path.contains('/') => scope(slice, prefix, name)?,
            _ => folders(path)?,
        };
        if folders.is_empty() {
            let why = "names the root of the hierarchy: name a cgroup below it";
            return Err(wrong(FIELD, why));
        }
        for name in &folders {
            if name.len() > NAME_MAX || name.contains('\0') {
                let why = format!("a part of it is longer than {NAME_MAX} bytes or holds NUL");
                return Err(wrong(FIELD, why));
            }
        }
        Ok(Self(folders))
    }

    /// Where containerd's clients put a container without being told: `/<namespace>/<id>`, both checked before.
    pub fn of_id(namespace: &str, id: &str) -> Self {
        Self(vec![namespace.into(), id.into()])
    }

    /// Its folders, from the root down.
    pub fn folders(&self) -> &[String] {
        &self.0
    }
}

/// `/a/b`.
impl std::fmt::Display for CgroupPath {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|name| write!(f, "/{name}"))
    }
}

fn folders(path: &str) -> Result<Vec<String>, Refusal> {
    let mut folders = Vec::new();
    for part in Path::new(path).components() {
        match part {
            Component::RootDir | Component::CurDir => {}
            Component::Normal(name) => folders.push(name.to_string_lossy().into_owned()),
            Component::ParentDir | Component::Prefix(_) => {
                let why = "contains \"..\": write the path of the cgroup without it";
                return Err(wrong(FIELD, why));
            }
        }
    }
    Ok(folders)
}

fn scope(slice: &str, prefix: &str, name: &str) -> Result<Vec<String>, Refusal> {
    let slice = match slice {
        "" => "system.slice",
        slice => slice,
    };
    let mut folders = slices(slice)?;
    let unit = match (prefix, name) {
        (_, "") => {
            return Err(wrong(
                FIELD,
                "has the form slice:prefix:name without a name",
            ));
        }
        (_, slice) if slice.ends_with(".slice") => slice.to_owned(),
        ("", name) => format!("{name}.scope"),
        (prefix, name) => format!("{prefix}-{name}.scope"),
    };
    folders.push(unit);
    Ok(folders)
}

/// `a-b.slice` is in `a.slice`; `-.slice` is the root.
fn slices(slice: &str) -> Result<Vec<String>, Refusal> {
    let Some(stem) = slice.strip_suffix(".slice") else {
        let why = format!("{slice:?} does not end in \".slice\", as in slice:prefix:name");
        return Err(wrong(FIELD, why));
    };
    if stem == "-" {
        return Ok(Vec::new());
    }
    let mut folders = Vec::new();
    let mut name = String::new();
    for part in stem.split('-') {
        if part.is_empty() {
            let why =
                format!("{slice:?} is not the name of a slice: a part between \"-\" is empty");
            return Err(wrong(FIELD, why));
        }
        if !name.is_empty() {
            name.push('-');
        }
        name.push_str(part);
        folders.push(format!("{name}.slice"));
    }
    Ok(folders)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(path: &str) -> String {
        CgroupPath::parse(path).unwrap().to_string()
    }

    #[test]
    fn paths_of_folders_stand_as_they_are() {
        assert_eq!(
            shown("/kubepods/burstable/pod1/x"),
            "/kubepods/burstable/pod1/x"
        );
        assert_eq!(shown("//a/./b/"), "/a/b");
        assert_eq!(shown("a/b"), "/a/b");
        assert_eq!(
            CgroupPath::of_id("default", "web").to_string(),
            "/default/web"
        );
    }

    #[test]
    fn systemds_form_becomes_the_folders_of_its_slices_and_a_scope() {
        assert_eq!(
            shown("kubepods-besteffort-pod1_2.slice:cri-containerd:ab"),
            "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod1_2.slice/cri-containerd-ab.scope"
        );
        assert_eq!(shown(":docker:ab"), "/system.slice/docker-ab.scope");
        assert_eq!(shown("-.slice::ab"), "/ab.scope");
        assert_eq!(shown("a.slice:x:b.slice"), "/a.slice/b.slice");
    }

    #[test]
    fn what_leads_elsewhere_or_nowhere_is_refused_by_the_fields_name() {
        let long = format!("/{}", "x".repeat(NAME_MAX + 1));
        let longest = "/x".repeat(CGROUP_PATH);
        for path in [
            "/a/../b",
            "..",
            "/..",
            "/",
            "//.",
            "a--b.slice:x:y",
            "a:x:y",
            "a.slice:x:",
            "-a.slice:x:y",
            "/a\0b",
            &long,
            &longest,
        ] {
            let error = CgroupPath::parse(path).unwrap_err().to_string();
            assert!(error.starts_with("linux.cgroupsPath: "), "{path}: {error}");
        }
    }
}
