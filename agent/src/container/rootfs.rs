//! The rootfs: an overlay of trees, a read-only bind of one, or a writable bind of one. Made in the container's own
//! mount namespace, so it goes when its last process goes.

use std::{
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Component, Path},
};

use rustix::{
    fs::{CWD, Mode, OFlags},
    mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags},
};
use serde::{Deserialize, Serialize};

use super::path::open_beneath;
use crate::{
    boot::{ROOTFS, TREES},
    error::{Context, Error, Result},
    sys::{MountAttr, attr, mount_setattr},
};

/// What the rootfs is made of; the checked form of the request's `Rootfs`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Rootfs {
    /// Overlay; the topmost lower layer comes first.
    Overlay {
        /// Lower layers, tree-relative.
        lower: Vec<String>,
        /// Upper and work folder, tree-relative.
        upper: Option<(String, String)>,
        /// Checked overlay options.
        options: Vec<(String, Option<String>)>,
    },
    /// An empty folder.
    Empty,
    /// Bind of one tree.
    Bind {
        /// Tree-relative path.
        tree: String,
        /// Whether it is read-only.
        readonly: bool,
    },
}

impl Rootfs {
    /// Checks the rootfs of a pause, which may have none.
    pub fn parse_of_pause(request: &bulkhead_protocol::agent::Rootfs) -> Result<Self> {
        match request.lower.is_empty() && request.bind.is_empty() && request.upper.is_empty() {
            true => Ok(Self::Empty),
            false => Self::parse(request),
        }
    }

    /// Checks the request.
    pub fn parse(request: &bulkhead_protocol::agent::Rootfs) -> Result<Self> {
        for (field, path) in request
            .lower
            .iter()
            .map(|path| ("rootfs.lower", path))
            .chain([("rootfs.upper", &request.upper)])
            .chain([("rootfs.work", &request.work)])
            .chain([("rootfs.bind", &request.bind)])
        {
            check_tree_path(field, path)?;
        }
        if request.lower.iter().any(String::is_empty) {
            return Err(Error::field("rootfs.lower", "has an empty path"));
        }
        let options = overlay_options("rootfs.options", &request.options)?;
        if !request.bind.is_empty() {
            if !request.lower.is_empty() || !request.upper.is_empty() || !request.work.is_empty() {
                return Err(Error::field(
                    "rootfs.bind",
                    "excludes lower, upper and work",
                ));
            }
            return Ok(Self::Bind {
                tree: request.bind.clone(),
                readonly: false,
            });
        }
        match (request.lower.as_slice(), request.upper.is_empty()) {
            ([], _) => Err(Error::field("rootfs", "is empty")),
            _ if request.upper.is_empty() != request.work.is_empty() => {
                Err(Error::field("rootfs.work", "goes with rootfs.upper"))
            }
            ([one], true) => Ok(Self::Bind {
                tree: one.clone(),
                readonly: true,
            }),
            (lower, no_upper) => Ok(Self::Overlay {
                lower: lower.to_vec(),
                upper: (!no_upper).then(|| (request.upper.clone(), request.work.clone())),
                options,
            }),
        }
    }

    /// Opens it as a detached mount. `trees` is where the host's trees are.
    pub fn open(&self, trees: BorrowedFd<'_>) -> Result<OwnedFd> {
        match self {
            Self::Overlay {
                lower,
                upper,
                options,
            } => overlay(trees, lower, upper.as_ref(), options),
            Self::Empty => empty(),
            Self::Bind { tree, readonly } => bind(trees, tree, *readonly),
        }
    }
}

/// Attaches an opened rootfs on [`ROOTFS`] in the current mount namespace; answers its root.
pub fn mount(tree: &OwnedFd) -> Result<OwnedFd> {
    rustix::mount::move_mount(
        tree,
        "",
        CWD,
        ROOTFS,
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
    )
    .step(|| "mount the rootfs".into())?;
    rustix::fs::open(
        ROOTFS,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .step(|| "open the rootfs".into())
}

fn check_tree_path(field: &str, path: &str) -> Result<()> {
    let plain = Path::new(path)
        .components()
        .all(|component| matches!(component, Component::Normal(_)));
    if plain && !path.contains('\0') {
        Ok(())
    } else {
        Err(Error::field(field, "is not a path below the trees"))
    }
}

/// The closed list of overlay options that a snapshotter, or a mount, may have.
pub fn overlay_options(field: &str, options: &[String]) -> Result<Vec<(String, Option<String>)>> {
    let mut checked = Vec::new();
    for option in options {
        let known = matches!(
            option.as_str(),
            "index=on"
                | "index=off"
                | "userxattr"
                | "volatile"
                | "metacopy=on"
                | "metacopy=off"
                | "redirect_dir=on"
                | "redirect_dir=off"
                | "redirect_dir=follow"
                | "redirect_dir=nofollow"
                | "nfs_export=on"
                | "nfs_export=off"
                | "xino=on"
                | "xino=off"
                | "xino=auto"
                | "uuid=on"
                | "uuid=off"
                | "uuid=null"
                | "uuid=auto"
        );
        match (known, option.as_str()) {
            (true, _) => checked.push(match option.split_once('=') {
                Some((key, value)) => (key.to_string(), Some(value.to_string())),
                None => (option.clone(), None),
            }),
            (false, "rw" | "") => {}
            (false, _) => return Err(Error::refused(format!("{field} \"{option}\""))),
        }
    }
    Ok(checked)
}

/// An overlay of tree-relative folders, as a detached mount.
pub fn overlay(
    trees: BorrowedFd<'_>,
    lower: &[String],
    upper: Option<&(String, String)>,
    options: &[(String, Option<String>)],
) -> Result<OwnedFd> {
    let context = rustix::mount::fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)
        .step(|| "open overlayfs".into())?;
    // One fsconfig call a layer: the options of mount(2) have to fit into a page, 128 layers do not.
    for layer in lower {
        set_folder(trees, &context, "lowerdir+", layer)?;
    }
    if let Some((upper, work)) = upper {
        set_folder(trees, &context, "upperdir", upper)?;
        set_folder(trees, &context, "workdir", work)?;
    }
    for (key, value) in options {
        match value {
            Some(value) => rustix::mount::fsconfig_set_string(&context, key, value),
            None => rustix::mount::fsconfig_set_flag(&context, key),
        }
        .map_err(|error| fs_error(&context, format!("overlay option {key}"), error))?;
    }
    if upper.is_none() {
        rustix::mount::fsconfig_set_flag(&context, "ro")
            .step(|| "make the overlay read-only".into())?;
    }
    rustix::mount::fsconfig_create(&context).map_err(|error| {
        let layers = lower.len();
        fs_error(
            &context,
            format!("mount an overlay of {layers} layers"),
            error,
        )
    })?;
    rustix::mount::fsmount(
        &context,
        FsMountFlags::FSMOUNT_CLOEXEC,
        MountAttrFlags::empty(),
    )
    .step(|| "mount the overlay".into())
}

fn set_folder(trees: BorrowedFd<'_>, context: &OwnedFd, key: &str, layer: &str) -> Result<()> {
    // The path is checked for links here; the trees are the host's, the guest cannot swap one in between.
    open_beneath(trees, Path::new(layer), OFlags::PATH | OFlags::DIRECTORY)
        .step(|| format!("open tree {layer}"))?;
    rustix::mount::fsconfig_set_string(context, key, format!("{TREES}/{layer}"))
        .map_err(|error| fs_error(context, format!("overlay {key} {layer}"), error))
}

fn empty() -> Result<OwnedFd> {
    let what = || "mount an empty rootfs".to_string();
    let context = rustix::mount::fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC).step(what)?;
    rustix::mount::fsconfig_create(&context).step(what)?;
    rustix::mount::fsmount(
        &context,
        FsMountFlags::FSMOUNT_CLOEXEC,
        MountAttrFlags::empty(),
    )
    .step(what)
}

fn bind(trees: BorrowedFd<'_>, tree: &str, readonly: bool) -> Result<OwnedFd> {
    let root = open_beneath(trees, Path::new(tree), OFlags::PATH | OFlags::DIRECTORY)
        .step(|| format!("open tree {tree}"))?;
    let clone = rustix::mount::open_tree(
        &root,
        "",
        OpenTreeFlags::OPEN_TREE_CLONE
            | OpenTreeFlags::OPEN_TREE_CLOEXEC
            | OpenTreeFlags::AT_EMPTY_PATH,
    )
    .step(|| format!("bind tree {tree}"))?;
    if readonly {
        let change = MountAttr {
            set: attr::RDONLY,
            ..MountAttr::default()
        };
        mount_setattr(clone.as_fd(), false, change)
            .step(|| format!("make tree {tree} read-only"))?;
    }
    Ok(clone)
}

/// Adds the file system's own message, which the kernel keeps on the context's descriptor.
pub fn fs_error(context: &OwnedFd, what: String, error: rustix::io::Errno) -> Error {
    let mut message = [0; 512];
    let mut said = String::new();
    while let Ok(length) = rustix::io::read(context, &mut message) {
        let line = String::from_utf8_lossy(message.get(..length).unwrap_or_default());
        if let Some(text) = line.trim().strip_prefix("e ") {
            said = format!(" ({text})");
        }
        if length == 0 {
            break;
        }
    }
    Error::step(format!("{what}{said}"), error)
}

#[cfg(test)]
mod tests {
    use super::*;
    use bulkhead_protocol::agent;

    fn request(lower: &[&str], upper: &str, work: &str) -> agent::Rootfs {
        agent::Rootfs {
            lower: lower.iter().map(ToString::to_string).collect(),
            upper: upper.into(),
            work: work.into(),
            ..Default::default()
        }
    }

    #[test]
    fn an_empty_rootfs_is_refused() {
        assert!(Rootfs::parse(&request(&[], "", "")).is_err());
        assert!(Rootfs::parse(&request(&[], "t1/u", "t1/w")).is_err());
    }

    #[test]
    fn one_lower_layer_alone_is_a_read_only_bind() {
        assert_eq!(
            Rootfs::parse(&request(&["t1"], "", "")).unwrap(),
            Rootfs::Bind {
                tree: "t1".into(),
                readonly: true
            }
        );
    }

    #[test]
    fn layers_with_upper_are_an_overlay() {
        let parsed = Rootfs::parse(&request(&["t2/fs", "t1/fs"], "t3/fs", "t3/work")).unwrap();
        assert!(matches!(parsed, Rootfs::Overlay { upper: Some(_), .. }));
    }

    #[test]
    fn paths_that_leave_the_trees_are_refused() {
        for path in ["../x", "/etc", "t1/../../x", ".", "t1\0"] {
            assert!(Rootfs::parse(&request(&[path], "", "")).is_err(), "{path}");
            assert!(
                Rootfs::parse(&request(&["t1"], path, "w")).is_err(),
                "{path}"
            );
        }
    }

    #[test]
    fn upper_needs_work() {
        assert!(Rootfs::parse(&request(&["t1"], "t2", "")).is_err());
        assert!(Rootfs::parse(&request(&["t1"], "", "t2")).is_err());
    }

    #[test]
    fn overlay_options_outside_the_list_are_refused() {
        let mut request = request(&["t1"], "t2", "t3");
        request.options = vec!["index=off".into(), "userxattr".into()];
        assert!(Rootfs::parse(&request).is_ok());
        for option in [
            "lowerdir=/etc",
            "upperdir=/x",
            "index=maybe",
            "default_permissions",
        ] {
            request.options = vec![option.into()];
            let error = Rootfs::parse(&request).unwrap_err().text();
            assert!(error.contains(option), "{error}");
        }
    }
}
