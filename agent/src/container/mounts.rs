//! Step: the mounts of the spec. All are made detached, get their attributes and are then moved onto a descriptor that was resolved
//! inside the rootfs: no path is resolved twice. Binds and overlays were opened before the container's namespaces existed
//! (`sources`); the others are made here, in the namespaces they belong to.

use std::{
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use oci_spec::runtime::Mount;
use rustix::{
    fs::OFlags,
    io::Errno,
    mount::{FsMountFlags, FsOpenFlags, MoveMountFlags, OpenTreeFlags},
};

use super::{
    copyup, ids,
    options::Options,
    path::{PointKind, clean, kind_of, make_in_root, open_beneath, open_in_root},
    rootfs::fs_error,
};
use crate::{
    boot::{ROOTFS, TREES},
    error::{Context, Error, Result},
    sys::{MountAttr, mount_setattr},
};

/// What a mount is, by its type and options.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A bind of one of the host's trees.
    Bind,
    /// An overlay of some.
    Overlay,
    /// A file system of the kernel, by its name.
    New(&'static str),
    /// A change of what is mounted already.
    Remount,
}

/// Checks what can be checked without mounting.
pub fn check(mounts: &[Mount], user_namespace: bool) -> Result<()> {
    for (index, mount) in mounts.iter().enumerate() {
        let field = format!("mounts[{index}]");
        if clean(mount.destination()).as_os_str().is_empty() {
            let reason = "is the root of the container";
            return Err(Error::field(format!("{field}.destination"), reason));
        }
        let (kind, options) = parse(&field, mount)?;
        if kind == Kind::Bind && !mount.source().as_deref().is_some_and(Path::is_absolute) {
            return Err(Error::field(format!("{field}.source"), "is not absolute"));
        }
        if options.copy_up && kind != Kind::New("tmpfs") {
            let reason = "\"tmpcopyup\" goes with a tmpfs only";
            return Err(Error::field(format!("{field}.options"), reason));
        }
        check_idmap(&field, mount, kind, &options, user_namespace)?;
    }
    Ok(())
}

fn check_idmap(
    field: &str,
    mount: &Mount,
    kind: Kind,
    options: &Options,
    user_namespace: bool,
) -> Result<()> {
    let (uid, gid) = (
        mount.uid_mappings().as_deref().unwrap_or_default(),
        mount.gid_mappings().as_deref().unwrap_or_default(),
    );
    let mapped = !uid.is_empty() || !gid.is_empty();
    if !mapped && options.idmap.is_none() {
        return Ok(());
    }
    let name = |part: &str| format!("{field}.{part}");
    if kind != Kind::Bind {
        return Err(Error::field(name("uidMappings"), "goes with a bind only"));
    }
    if uid.is_empty() != gid.is_empty() {
        let reason = "goes with gidMappings, and the other way round";
        return Err(Error::field(name("uidMappings"), reason));
    }
    if !mapped && !user_namespace {
        let reason = "\"idmap\" needs uidMappings, or a user namespace";
        return Err(Error::field(name("options"), reason));
    }
    ids::check_list(&name("uidMappings"), uid)?;
    ids::check_list(&name("gidMappings"), gid)
}

/// Kind and options of a mount.
pub fn parse(field: &str, mount: &Mount) -> Result<(Kind, Options)> {
    let none = Vec::new();
    let options = mount.options().as_ref().unwrap_or(&none);
    let typ = mount.typ().as_deref().unwrap_or_default();
    let options = Options::parse(field, typ == "bind", options)?;
    let kind = match typ {
        _ if options.remount => Kind::Remount,
        _ if options.bind.is_some() => Kind::Bind,
        "overlay" => Kind::Overlay,
        "proc" => Kind::New("proc"),
        "sysfs" => Kind::New("sysfs"),
        "tmpfs" => Kind::New("tmpfs"),
        "devpts" => Kind::New("devpts"),
        "mqueue" => Kind::New("mqueue"),
        "cgroup" | "cgroup2" => Kind::New("cgroup2"),
        "ramfs" => Kind::New("ramfs"),
        "hugetlbfs" => Kind::New("hugetlbfs"),
        "bpf" => Kind::New("bpf"),
        other => return Err(Error::refused(format!("{field}.type \"{other}\""))),
    };
    Ok((kind, options))
}

/// Makes the spec's mounts in their order; `sources` are those opened before, one a mount.
pub fn mount_all(
    root: BorrowedFd<'_>,
    mounts: &[Mount],
    sources: Vec<Option<OwnedFd>>,
) -> Result<()> {
    for (index, (mount, source)) in mounts.iter().zip(sources).enumerate() {
        let field = format!("mounts[{index}]");
        let (kind, options) = parse(&field, mount)?;
        let at = mount.destination().display();
        let what = |step: &str| format!("{field} ({at}): {step}");
        check_path(
            &field,
            mount,
            kind,
            &Path::new(ROOTFS).join(clean(mount.destination())),
        )?;
        if kind == Kind::Remount {
            let point = open_in_root(root, mount.destination(), OFlags::PATH)
                .step(|| what("open the mount point"))?;
            check_place(&field, mount, kind, &point)?;
            remount(&point, &options, &what)?;
            continue;
        }
        let (tree, point) = match source {
            Some(tree) => {
                let file = kind_of(&tree).step(|| what("stat"))?;
                let point = make_in_root(root, mount.destination(), file, 0o755)
                    .step(|| what("make the mount point"))?;
                check_place(&field, mount, kind, &point)?;
                (tree, point)
            }
            None => {
                let Kind::New(name) = kind else {
                    return Err(Error::State(what("was not opened")));
                };
                let existed = open_in_root(root, mount.destination(), OFlags::PATH).ok();
                let point = point_of(root, mount, name).step(|| what("make the mount point"))?;
                check_place(&field, mount, kind, &point)?;
                let tree = new_fs(name, mount, &options, existed.as_ref(), &what)?;
                if options.copy_up
                    && let Some(covered) = &existed
                {
                    copyup::copy(covered, &tree, &field)?;
                    mount_setattr(tree.as_fd(), false, options.own)
                        .step(|| what("set attributes"))?;
                }
                mount_setattr(tree.as_fd(), true, options.recursive)
                    .step(|| what("set recursive attributes"))?;
                (tree, point)
            }
        };
        attach(&tree, &point).step(|| what("attach"))?;
        // A mount takes its propagation where it was attached, so this comes last.
        set_propagation(&tree, &options).step(|| what("set propagation"))?;
    }
    Ok(())
}

/// The mount point of a new file system. proc and sysfs want a folder that is no link, as with runc: later steps go by
/// their names.
fn point_of(
    root: BorrowedFd<'_>,
    mount: &Mount,
    name: &str,
) -> std::result::Result<OwnedFd, Errno> {
    let point = make_in_root(root, mount.destination(), PointKind::Folder, 0o755)?;
    if kind_of(&point)? != PointKind::Folder {
        return Err(Errno::NOTDIR);
    }
    if matches!(name, "proc" | "sysfs") {
        let flags = OFlags::PATH | OFlags::DIRECTORY;
        return open_beneath(root, &clean(mount.destination()), flags);
    }
    Ok(point)
}

/// Files in /proc that a container may have replaced by its own (as with runc; LXCFS does it).
const PROC_FILES: [&str; 11] = [
    "cpuinfo",
    "diskstats",
    "meminfo",
    "stat",
    "swaps",
    "uptime",
    "loadavg",
    "slabinfo",
    "net/dev",
    "sys/kernel/ns_last_pid",
    "sys/crypto/fips_enabled",
];

/// Checks where the mount point really is: links may have led to the root, or into /proc, from which later steps and the
/// programs of the container learn what they are.
fn check_place(field: &str, mount: &Mount, kind: Kind, point: &OwnedFd) -> Result<()> {
    let name = format!("/proc/self/fd/{}", point.as_fd().as_raw_fd());
    let place = std::fs::read_link(name).step(|| format!("{field}: find the mount point"))?;
    check_path(field, mount, kind, &place)
}

fn check_path(field: &str, mount: &Mount, kind: Kind, place: &Path) -> Result<()> {
    let wrong = |reason: String| Err(Error::field(format!("{field}.destination"), reason));
    let at = mount.destination().display();
    let Ok(inside) = place.strip_prefix(ROOTFS) else {
        return wrong(format!("{at} is not in the rootfs any more"));
    };
    if inside.as_os_str().is_empty() && kind != Kind::Remount {
        return wrong(format!("{at} is the root of the container"));
    }
    let Ok(in_proc) = inside.strip_prefix("proc") else {
        return Ok(());
    };
    if in_proc.as_os_str().is_empty() {
        return match kind {
            Kind::New("proc") | Kind::Remount => Ok(()),
            _ => wrong(format!(
                "{at} cannot be mounted because it is not of type proc"
            )),
        };
    }
    if PROC_FILES.iter().any(|file| in_proc == Path::new(file)) {
        Ok(())
    } else {
        wrong(format!("{at} cannot be mounted because it is inside /proc"))
    }
}

fn remount(point: &OwnedFd, options: &Options, what: &dyn Fn(&str) -> String) -> Result<()> {
    mount_setattr(point.as_fd(), false, options.own).step(|| what("remount"))?;
    mount_setattr(point.as_fd(), true, options.recursive).step(|| what("remount recursively"))?;
    if options.bind.is_none() && !(options.flags.is_empty() && options.data.is_empty()) {
        let context = rustix::mount::fspick(
            point,
            "",
            rustix::mount::FsPickFlags::FSPICK_CLOEXEC
                | rustix::mount::FsPickFlags::FSPICK_EMPTY_PATH,
        )
        .step(|| what("open the file system"))?;
        configure(&context, options, what)?;
        rustix::mount::fsconfig_reconfigure(&context)
            .map_err(|error| fs_error(&context, what("change the file system"), error))?;
    }
    set_propagation(point, options).step(|| what("set propagation"))
}

fn set_propagation(tree: &OwnedFd, options: &Options) -> std::io::Result<()> {
    let Some((propagation, recursive)) = options.propagation else {
        return Ok(());
    };
    let change = MountAttr {
        propagation,
        ..MountAttr::default()
    };
    mount_setattr(tree.as_fd(), recursive, change)
}

fn configure(context: &OwnedFd, options: &Options, what: &dyn Fn(&str) -> String) -> Result<()> {
    let failed = |step: String| {
        let text = what(&step);
        |error| fs_error(context, text, error)
    };
    for flag in &options.flags {
        rustix::mount::fsconfig_set_flag(context, flag)
            .map_err(failed(format!("option {flag}")))?;
    }
    for (key, value) in &options.data {
        match value {
            Some(value) => rustix::mount::fsconfig_set_string(context, key, value),
            None => rustix::mount::fsconfig_set_flag(context, key),
        }
        .map_err(failed(format!("option {key}")))?;
    }
    Ok(())
}

fn new_fs(
    name: &str,
    mount: &Mount,
    options: &Options,
    existed: Option<&OwnedFd>,
    what: &dyn Fn(&str) -> String,
) -> Result<OwnedFd> {
    let context = rustix::mount::fsopen(name, FsOpenFlags::FSOPEN_CLOEXEC)
        .step(|| what(&format!("open {name}")))?;
    let failed = |step: String| {
        let text = what(&step);
        |error| fs_error(&context, text, error)
    };
    let source = mount.source().as_deref().and_then(Path::to_str);
    let source = source.filter(|source| !source.is_empty()).unwrap_or(name);
    rustix::mount::fsconfig_set_string(&context, "source", source)
        .map_err(failed("set the source".into()))?;
    configure(&context, options, what)?;
    // Like runc: a tmpfs without a mode takes that of the folder it covers.
    if let ("tmpfs", false, Some(folder)) = (name, options.has_data("mode"), existed) {
        let mode = rustix::fs::fstat(folder).step(|| what("stat"))?.st_mode & 0o7777;
        rustix::mount::fsconfig_set_string(&context, "mode", format!("{mode:o}"))
            .map_err(failed("option mode".into()))?;
    }
    rustix::mount::fsconfig_create(&context).map_err(failed(format!("mount {name}")))?;
    // What has to be filled first becomes read-only after.
    let mut attributes = options.fsmount_attr();
    if options.copy_up {
        attributes.remove(rustix::mount::MountAttrFlags::MOUNT_ATTR_RDONLY);
    }
    rustix::mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
        .map_err(failed(format!("mount {name}")))
}

/// A detached copy of the mount at `path`.
pub fn clone_tree(
    at: impl AsFd,
    path: &Path,
    recursive: bool,
) -> std::result::Result<OwnedFd, Errno> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    if recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    if path.as_os_str().is_empty() {
        flags |= OpenTreeFlags::AT_EMPTY_PATH;
    }
    rustix::mount::open_tree(at, path, flags)
}

/// Attaches a detached mount on a resolved mount point.
pub fn attach(tree: &OwnedFd, point: &OwnedFd) -> std::result::Result<(), Errno> {
    rustix::mount::move_mount(
        tree,
        "",
        point,
        "",
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH,
    )
}

/// The part of `path` below the trees.
pub fn below_trees(path: &Path) -> Option<PathBuf> {
    let inside = path.strip_prefix(TREES).ok()?;
    let plain = inside
        .components()
        .all(|part| matches!(part, std::path::Component::Normal(_)));
    (plain && !inside.as_os_str().is_empty()).then(|| inside.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mounts(json: &str) -> Vec<Mount> {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn containerds_default_mounts_pass() {
        let list = mounts(
            r#"[{"destination":"/proc","type":"proc","source":"proc","options":["nosuid","noexec","nodev"]},
            {"destination":"/dev","type":"tmpfs","source":"tmpfs","options":["nosuid","strictatime","mode=755","size=65536k"]},
            {"destination":"/dev/pts","type":"devpts","source":"devpts","options":["nosuid","noexec","newinstance","ptmxmode=0666","mode=0620","gid=5"]},
            {"destination":"/dev/shm","type":"tmpfs","source":"shm","options":["nosuid","noexec","nodev","mode=1777","size=65536k"]},
            {"destination":"/dev/mqueue","type":"mqueue","source":"mqueue","options":["nosuid","noexec","nodev"]},
            {"destination":"/sys","type":"sysfs","source":"sysfs","options":["nosuid","noexec","nodev","ro"]},
            {"destination":"/run","type":"tmpfs","source":"tmpfs","options":["nosuid","strictatime","mode=755","size=65536k"]},
            {"destination":"/sys/fs/cgroup","type":"cgroup","source":"cgroup","options":["ro","nosuid","noexec","nodev"]},
            {"destination":"/etc/hosts","type":"bind","source":"/run/bulkhead/trees/t2","options":["rbind","rprivate","ro"]}]"#,
        );
        check(&list, false).unwrap();
    }

    #[test]
    fn bad_mounts_are_refused_by_field() {
        for (json, field) in [
            (
                r#"{"destination":"/","type":"proc"}"#,
                "mounts[0].destination",
            ),
            (
                r#"{"destination":"/x/..","type":"proc"}"#,
                "mounts[0].destination",
            ),
            (r#"{"destination":"/a","type":"ext4"}"#, "mounts[0].type"),
            (r#"{"destination":"/a"}"#, "mounts[0].type"),
            (
                r#"{"destination":"/a","type":"bind","source":"x"}"#,
                "mounts[0].source",
            ),
            (r#"{"destination":"/a","type":"bind"}"#, "mounts[0].source"),
            (
                r#"{"destination":"/a","type":"proc","options":["tmpcopyup"]}"#,
                "mounts[0].options",
            ),
            (
                r#"{"destination":"/a","type":"bind","source":"/x","options":["idmap"]}"#,
                "mounts[0].options",
            ),
            (
                r#"{"destination":"/a","type":"tmpfs","options":["idmap"]}"#,
                "mounts[0].uidMappings",
            ),
            (
                r#"{"destination":"/a","type":"bind","source":"/x","uidMappings":[{"size":1}]}"#,
                "mounts[0].uidMappings",
            ),
        ] {
            let error = check(&mounts(&format!("[{json}]")), false)
                .unwrap_err()
                .text();
            assert!(error.contains(field), "{error}");
        }
    }

    #[test]
    fn where_a_mount_really_lands_decides() {
        let bind = &mounts(r#"[{"destination":"/etc","type":"bind","source":"/x"}]"#)[0];
        let at = |place: &str, kind| {
            check_path("mounts[0]", bind, kind, &Path::new(ROOTFS).join(place)).is_ok()
        };
        assert!(at("etc", Kind::Bind) && at("procedure", Kind::Bind));
        assert!(at("proc", Kind::New("proc")) && at("proc/meminfo", Kind::Bind));
        assert!(!at("", Kind::Bind) && !at("proc", Kind::Bind) && !at("proc", Kind::New("tmpfs")));
        assert!(!at("proc/sys", Kind::Bind) && !at("proc/self/attr", Kind::New("tmpfs")));
        assert!(check_path("mounts[0]", bind, Kind::Bind, Path::new("/etc")).is_err());
    }

    #[test]
    fn only_plain_paths_are_below_the_trees() {
        assert_eq!(
            below_trees(Path::new("/run/bulkhead/trees/t1/x")),
            Some("t1/x".into())
        );
        for path in ["/run/bulkhead/trees", "/run/bulkhead/trees/../x", "/etc"] {
            assert_eq!(below_trees(Path::new(path)), None, "{path}");
        }
    }
}
