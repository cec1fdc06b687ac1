//! From containerd's mounts to trees: what of the host a container gets, as detached mounts for the file server.
//!
//! Pure planning, except for [`Tree::open`]: it clones the mount of a path (`open_tree`), so that nothing appears in
//! the host's mount table; and for the mount points that a read-only root lacks.

mod points;
mod trees;

use std::{
    fs, io,
    os::unix::fs::FileTypeExt,
    path::{Path, PathBuf},
};

use bulkhead_protocol::agent::Rootfs;
use containerd_shim_protos::types::mount::Mount;
use serde_json::Value;

use crate::{
    refusal::{self, Refusal},
    spec::Spec,
};

pub use trees::{Table, Tree};

/// Where the agent mounts the trees.
const GUEST_TREES: &str = "/run/bulkhead/trees";
/// Mount types that name nothing of the host.
const GUEST_TYPES: [&str; 13] = [
    "proc",
    "sysfs",
    "tmpfs",
    "ramfs",
    "devpts",
    "mqueue",
    "cgroup",
    "cgroup2",
    "securityfs",
    "debugfs",
    "tracefs",
    "bpf",
    "hugetlbfs",
];

/// Why a mount is refused.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A mount that cannot be made.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The host refuses.
    #[error("opening {path} for the file server: {source}")]
    Open {
        /// Which path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// The trees of a container and its rootfs made of them.
#[derive(Debug, Default)]
pub struct Plan {
    /// What is to be served.
    pub trees: Vec<Tree>,
    /// Layers by tree-relative paths.
    pub rootfs: Rootfs,
}

impl Plan {
    /// Plans rootfs and bind mounts, and rewrites the sources in `spec`.
    pub fn new(rootfs: &[Mount], spec: &mut Spec, table: &mut Table) -> Result<Self, Error> {
        let mut plan = Planner {
            trees: Vec::new(),
            table,
        };
        let made = plan.rootfs(rootfs, spec).and_then(|rootfs| {
            plan.binds(spec)?;
            Ok(rootfs)
        });
        match made {
            Ok(rootfs) => Ok(Self {
                trees: plan.trees,
                rootfs,
            }),
            Err(error) => {
                plan.table.release(&plan.trees);
                Err(error)
            }
        }
    }
}

struct Planner<'a> {
    trees: Vec<Tree>,
    table: &'a mut Table,
}

impl Planner<'_> {
    /// A source that is this container's alone.
    fn add(
        &mut self,
        field: &str,
        path: &Path,
        readonly: bool,
        recursive: bool,
    ) -> Result<String, Error> {
        let id = self.table.number();
        self.push(
            field,
            Tree {
                id: id.clone(),
                path: path.to_owned(),
                readonly,
                recursive,
                shared: false,
                fresh: true,
            },
        )?;
        Ok(id)
    }

    /// A source that is no snapshot of containerd's: it may be in use elsewhere.
    fn add_shared(
        &mut self,
        field: &str,
        path: &Path,
        readonly: bool,
        recursive: bool,
    ) -> Result<String, Error> {
        let path = fs::canonicalize(path).map_err(|source| Error::Open {
            path: path.to_owned(),
            source,
        })?;
        let (id, fresh) = self.table.acquire(&path, readonly, recursive);
        self.push(
            field,
            Tree {
                id: id.clone(),
                path,
                readonly,
                recursive,
                shared: true,
                fresh,
            },
        )?;
        Ok(id)
    }

    fn push(&mut self, field: &str, tree: Tree) -> Result<(), Error> {
        self.trees.push(tree);
        if self.trees.len() > crate::limits::TREES {
            return Err(wrong(field, "more trees than a container may have"));
        }
        Ok(())
    }

    fn rootfs(&mut self, mounts: &[Mount], spec: &Spec) -> Result<Rootfs, Error> {
        match mounts {
            // The agent holds it without any file.
            [] if spec.is_pause() => Ok(Rootfs::new()),
            [] => self.bundle_rootfs(spec),
            [mount] if !mount.target.is_empty() => Err(unsupported(
                "rootfs",
                format!(
                    "a mount at {:?} in the rootfs is not supported",
                    mount.target
                ),
            )),
            [mount] => match mount.type_.as_str() {
                "bind" => self.single(mount),
                "overlay" => self.overlay(mount),
                other => Err(unsupported(
                    "rootfs",
                    format!(
                        "mount type {other:?} is not supported; use the overlayfs or native snapshotter"
                    ),
                )),
            },
            _ => Err(unsupported(
                "rootfs",
                format!(
                    "{} mounts are not supported; use the overlayfs or native snapshotter",
                    mounts.len()
                ),
            )),
        }
    }

    /// No mounts: the bundle's own folder, which must hold something.
    fn bundle_rootfs(&mut self, spec: &Spec) -> Result<Rootfs, Error> {
        let path = &spec.root;
        let mut entries = fs::read_dir(path).map_err(|e| {
            wrong(
                "rootfs",
                format!("no mounts were given, and {}: {e}", path.display()),
            )
        })?;
        if entries.next().is_none() {
            return Err(wrong(
                "rootfs",
                format!(
                    "no mounts were given, and {} is empty: {:?} is not found there",
                    path.display(),
                    spec.program()
                ),
            ));
        }
        // A read-only root is the agent's mount flag; the tree as well, so that it holds outside the guest.
        if spec.root_readonly {
            points::make(path, &spec.value);
        }
        let id = self.add_shared("rootfs", path, spec.root_readonly, true)?;
        Ok(single(id, spec.root_readonly))
    }

    fn single(&mut self, mount: &Mount) -> Result<Rootfs, Error> {
        let path = Path::new(&mount.source);
        check_dir("rootfs", path)?;
        let readonly = mount.options.iter().any(|o| o == "ro");
        let recursive = mount.options.iter().any(|o| o == "rbind");
        let id = self.add("rootfs", path, readonly, recursive)?;
        Ok(single(id, readonly))
    }

    fn overlay(&mut self, mount: &Mount) -> Result<Rootfs, Error> {
        let options: Vec<&str> = mount.options.iter().map(String::as_str).collect();
        self.layers("rootfs", &options, false)
    }

    /// The layers that an overlay's options name, as trees; the options that name none are kept. Snapshots are the container's
    /// alone, other folders may be `shared`.
    fn layers(&mut self, field: &str, options: &[&str], shared: bool) -> Result<Rootfs, Error> {
        let (mut lower, mut upper, mut work) = (Vec::new(), None, None);
        let mut made = Rootfs::new();
        for option in options {
            match option.split_once('=') {
                Some(("lowerdir", value)) => lower = split_lower(value),
                Some(("upperdir", value)) => upper = Some(PathBuf::from(value)),
                Some(("workdir", value)) => work = Some(PathBuf::from(value)),
                _ => made.options.push((*option).to_owned()),
            }
        }
        if lower.is_empty() {
            return Err(wrong(field, "the overlay mount has no lowerdir"));
        }
        let mut add = |field: &str, path: &Path, readonly| match shared {
            true => self.add_shared(field, path, readonly, false),
            false => self.add(field, path, readonly, false),
        };
        let (lower_field, upper_field) = (format!("{field}.lowerdir"), format!("{field}.upperdir"));
        for path in &lower {
            check_dir(&lower_field, path)?;
            made.lower.push(add(&lower_field, path, true)?);
        }
        match (upper, work) {
            (None, None) => {}
            (Some(upper), Some(work)) => {
                let work_field = format!("{field}.workdir");
                check_dir(&upper_field, &upper)?;
                check_dir(&work_field, &work)?;
                let (parent, upper_name) = split_last(&upper_field, &upper)?;
                let (work_parent, work_name) = split_last(&work_field, &work)?;
                // overlayfs renames from work to upper: both must be in one mount.
                if parent != work_parent {
                    let (upper, work) = (upper.display(), work.display());
                    let why = format!("upperdir {upper} and workdir {work} are not in one folder");
                    return Err(unsupported(field, why));
                }
                let id = add(&upper_field, parent, false)?;
                made.upper = format!("{id}/{upper_name}");
                made.work = format!("{id}/{work_name}");
            }
            _ => {
                let why = "upperdir and workdir come together or not at all";
                return Err(wrong(field, why));
            }
        }
        Ok(made)
    }

    /// An overlay among the spec's mounts: its layers are folders of the host.
    fn overlay_mount(&mut self, field: &str, options: &[&str]) -> Result<Value, Error> {
        let made = self.layers(field, options, true)?;
        let at = |path: &String| format!("{GUEST_TREES}/{path}");
        let lower: Vec<String> = made.lower.iter().map(at).collect();
        let mut options = vec![format!("lowerdir={}", lower.join(":"))];
        if !made.upper.is_empty() {
            options.push(format!("upperdir={}", at(&made.upper)));
            options.push(format!("workdir={}", at(&made.work)));
        }
        options.extend(made.options);
        Ok(options.into())
    }

    fn binds(&mut self, spec: &mut Spec) -> Result<(), Error> {
        let mounts = spec.value.get_mut("mounts").and_then(Value::as_array_mut);
        for (index, mount) in mounts.into_iter().flatten().enumerate() {
            let destination = text(mount, "destination");
            let field = format!("mounts[{index}] ({destination})");
            let options: Vec<&str> = mount
                .get("options")
                .and_then(Value::as_array)
                .map(|list| list.iter().filter_map(Value::as_str).collect())
                .unwrap_or_default();
            let kind = text(mount, "type");
            let recursive = options.contains(&"rbind");
            if kind != "bind" && !recursive && !options.contains(&"bind") {
                if kind == "overlay" {
                    let options = self.overlay_mount(&field, &options)?;
                    if let Some(mount) = mount.as_object_mut() {
                        mount.insert("options".into(), options);
                    }
                    continue;
                }
                if !GUEST_TYPES.contains(&kind) {
                    return Err(unsupported(
                        &field,
                        format!("mount type {kind:?} is not supported"),
                    ));
                }
                continue;
            }
            // As mount(8): the last of both counts.
            let readonly = options
                .iter()
                .rfind(|o| matches!(**o, "ro" | "rw" | "rro"))
                .is_some_and(|o| *o != "rw");
            let source = PathBuf::from(text(mount, "source"));
            check_source(&format!("{field}.source"), &source)?;
            let id = self.add_shared(&field, &source, readonly, recursive)?;
            if let Some(mount) = mount.as_object_mut() {
                mount.insert("source".into(), format!("{GUEST_TREES}/{id}").into());
            }
        }
        Ok(())
    }
}

/// One read-only lower layer is a read-only bind for the agent.
fn single(id: String, readonly: bool) -> Rootfs {
    let mut rootfs = Rootfs::new();
    if readonly {
        rootfs.lower.push(id);
    } else {
        rootfs.bind = id;
    }
    rootfs
}

/// Splits `lowerdir=` at colons; a backslash makes the next character ordinary (overlayfs's own rule).
fn split_lower(value: &str) -> Vec<PathBuf> {
    let mut list = Vec::new();
    let mut current = String::new();
    let mut chars = value.chars();
    while let Some(c) = chars.next() {
        match c {
            '\\' => current.extend(chars.next()),
            ':' => list.push(std::mem::take(&mut current)),
            _ => current.push(c),
        }
    }
    list.push(current);
    list.into_iter()
        .filter(|path| !path.is_empty())
        .map(PathBuf::from)
        .collect()
}

fn split_last<'a>(field: &str, path: &'a Path) -> Result<(&'a Path, &'a str), Error> {
    match (path.parent(), path.file_name().and_then(|n| n.to_str())) {
        (Some(parent), Some(name)) if parent != Path::new("/") => Ok((parent, name)),
        _ => Err(wrong(
            field,
            format!("{} has no folder of its own", path.display()),
        )),
    }
}

fn check_dir(field: &str, path: &Path) -> Result<(), Error> {
    check_source(field, path)?;
    if path.is_dir() {
        return Ok(());
    }
    Err(wrong(field, format!("{} is not a folder", path.display())))
}

fn check_source(field: &str, path: &Path) -> Result<(), Error> {
    if !path.is_absolute() {
        return Err(wrong(
            field,
            format!("{:?} is not an absolute path", path.display().to_string()),
        ));
    }
    let kind = fs::metadata(path)
        .map_err(|e| wrong(field, format!("{}: {e}", path.display())))?
        .file_type();
    let name = if kind.is_socket() {
        "a socket"
    } else if kind.is_fifo() {
        "a fifo"
    } else if kind.is_char_device() || kind.is_block_device() {
        "a device"
    } else {
        return Ok(());
    };
    Err(unsupported(
        field,
        format!(
            "{} is {name}: only folders and files reach the guest",
            path.display()
        ),
    ))
}

fn text<'a>(mount: &'a Value, key: &str) -> &'a str {
    mount.get(key).and_then(Value::as_str).unwrap_or_default()
}

fn wrong(field: &str, why: impl Into<String>) -> Error {
    refusal::wrong(field, why).into()
}

fn unsupported(field: &str, why: impl Into<String>) -> Error {
    refusal::unsupported(field, why).into()
}

#[cfg(test)]
#[path = "mounts_tests.rs"]
mod tests;
