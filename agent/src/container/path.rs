//! Paths inside a container's rootfs. Every lookup goes through `openat2` with RESOLVE_IN_ROOT: a link of the image
//! resolves inside the rootfs, whatever it says, and never through magic links of /proc.

use std::{
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Component, Path, PathBuf},
};

use rustix::{
    fs::{FileType, Mode, OFlags, ResolveFlags},
    io::Errno,
};

/// Links followed at most while a missing path is made; the kernel's own limit.
const LINKS_MAX: u32 = 40;

/// Lookups tried again at most while somebody renames what they pass.
const RETRIES_MAX: u32 = 1000;

/// What a mount point has to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PointKind {
    /// A folder.
    Folder,
    /// An empty regular file.
    File,
}

/// `path` without `.`, `..` and double slashes, relative to the root. `..` at the root stays there.
pub fn clean(path: &Path) -> PathBuf {
    let mut cleaned = PathBuf::new();
    for component in path.components() {
        match component {
            Component::Normal(name) => cleaned.push(name),
            Component::ParentDir => {
                cleaned.pop();
            }
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    cleaned
}

/// Opens `path` inside `root`, following links inside it.
pub fn open_in_root(root: BorrowedFd<'_>, path: &Path, flags: OFlags) -> Result<OwnedFd, Errno> {
    let relative = clean(path);
    let relative = if relative.as_os_str().is_empty() {
        Path::new(".")
    } else {
        &relative
    };
    retried(|| {
        rustix::fs::openat2(
            root,
            relative,
            flags | OFlags::CLOEXEC,
            Mode::empty(),
            ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS,
        )
    })
}

/// The kernel answers EAGAIN if something was renamed or mounted while it looked at a `..`: it cannot tell whether that
/// left the root.
fn retried(open: impl Fn() -> Result<OwnedFd, Errno>) -> Result<OwnedFd, Errno> {
    for _ in 0..RETRIES_MAX {
        match open() {
            Err(Errno::AGAIN) => {}
            other => return other,
        }
    }
    open()
}

/// Opens `path` beneath `root` without following any link: for names that must be what they say.
pub fn open_beneath(root: BorrowedFd<'_>, path: &Path, flags: OFlags) -> Result<OwnedFd, Errno> {
    retried(|| {
        rustix::fs::openat2(
            root,
            path,
            flags | OFlags::CLOEXEC,
            Mode::empty(),
            ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS,
        )
    })
}

/// The folder or file `path` inside `root`; what is missing of it is made.
pub fn make_in_root(
    root: BorrowedFd<'_>,
    path: &Path,
    kind: PointKind,
    mode: u32,
) -> Result<OwnedFd, Errno> {
    match open_in_root(root, path, OFlags::PATH) {
        Err(Errno::NOENT) => {}
        other => return other,
    }
    let mut path = clean(path);
    for _ in 0..=LINKS_MAX {
        match walk(root, &path, kind, mode)? {
            Walked::There(fd) => return Ok(fd),
            Walked::Link(target) => path = clean(&target),
        }
    }
    Err(Errno::LOOP)
}

enum Walked {
    There(OwnedFd),
    /// A link was met; this is the whole path with the link resolved.
    Link(PathBuf),
}

/// Goes down from the root, name by name, and makes what is missing. No link is followed: where one is met, `..` in its
/// target goes up from a path that holds no links.
fn walk(root: BorrowedFd<'_>, path: &Path, kind: PointKind, mode: u32) -> Result<Walked, Errno> {
    let mut at = open_in_root(root, Path::new("/"), OFlags::PATH)?;
    let mut done = PathBuf::new();
    let mut names = path.components().peekable();
    while let Some(name) = names.next() {
        let name = Path::new(name.as_os_str());
        let (kind, mode) = match names.peek() {
            Some(_) => (PointKind::Folder, 0o755),
            None => (kind, mode),
        };
        at = match open_beneath(at.as_fd(), name, OFlags::PATH) {
            Err(Errno::NOENT) => {
                make(&at, name, kind, mode)?;
                open_beneath(at.as_fd(), name, OFlags::PATH)?
            }
            Err(Errno::LOOP) => {
                let target = rustix::fs::readlinkat(&at, name, Vec::new())?;
                let target = PathBuf::from(target.into_string().map_err(|_| Errno::ILSEQ)?);
                return Ok(Walked::Link(
                    done.join(target).join(names.collect::<PathBuf>()),
                ));
            }
            other => other?,
        };
        done.push(name);
    }
    Ok(Walked::There(at))
}

fn make(folder: &OwnedFd, name: &Path, kind: PointKind, mode: u32) -> Result<(), Errno> {
    let mode = Mode::from_raw_mode(mode);
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let made = match kind {
        PointKind::Folder => rustix::fs::mkdirat(folder, name, mode),
        PointKind::File => rustix::fs::openat(folder, name, flags, mode).map(drop),
    };
    match made {
        // Somebody else was quicker.
        Err(Errno::EXIST) => Ok(()),
        other => other,
    }
}

/// The kind of mount point that fits `file`.
pub fn kind_of(file: impl AsFd) -> Result<PointKind, Errno> {
    let stat = rustix::fs::fstat(file)?;
    Ok(match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => PointKind::Folder,
        _ => PointKind::File,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs, os::unix::fs::symlink};

    fn root() -> (tempfile::TempDir, OwnedFd) {
        let dir = tempfile::tempdir().unwrap();
        let fd = rustix::fs::open(dir.path(), OFlags::PATH, Mode::empty()).unwrap();
        (dir, fd)
    }

    #[test]
    fn cleaning_never_leaves_the_root() {
        for (path, expected) in [
            ("/a/b", "a/b"),
            ("../../etc", "etc"),
            ("/a/../../b/./c//d", "b/c/d"),
            ("/", ""),
        ] {
            assert_eq!(clean(Path::new(path)), Path::new(expected), "{path}");
        }
    }

    #[test]
    fn links_resolve_inside_the_root() {
        let (dir, fd) = root();
        fs::create_dir(dir.path().join("real")).unwrap();
        symlink("/real", dir.path().join("link")).unwrap();
        symlink("../../../../../../etc", dir.path().join("out")).unwrap();
        make_in_root(fd.as_fd(), Path::new("/link/x/y"), PointKind::Folder, 0o755).unwrap();
        assert!(dir.path().join("real/x/y").is_dir());
        make_in_root(fd.as_fd(), Path::new("/out/f"), PointKind::File, 0o644).unwrap();
        assert!(dir.path().join("etc/f").is_file());
    }

    #[test]
    fn the_target_of_a_dangling_link_is_made_inside_the_root() {
        let (dir, fd) = root();
        fs::create_dir(dir.path().join("var")).unwrap();
        symlink("/run", dir.path().join("var/run")).unwrap();
        make_in_root(
            fd.as_fd(),
            Path::new("/var/run/secrets"),
            PointKind::Folder,
            0o755,
        )
        .unwrap();
        assert!(dir.path().join("run/secrets").is_dir());
    }

    #[test]
    fn a_circle_of_links_is_an_error() {
        let (dir, fd) = root();
        symlink("b", dir.path().join("a")).unwrap();
        symlink("a", dir.path().join("b")).unwrap();
        let made = make_in_root(fd.as_fd(), Path::new("/a/x"), PointKind::Folder, 0o755);
        assert_eq!(made.unwrap_err(), Errno::LOOP);
    }

    #[test]
    fn parents_of_a_link_are_those_of_its_target() {
        let (dir, fd) = root();
        fs::create_dir_all(dir.path().join("a/b")).unwrap();
        symlink("a/b", dir.path().join("l")).unwrap();
        symlink("../c/d", dir.path().join("a/b/up")).unwrap();
        make_in_root(fd.as_fd(), Path::new("/l/up/x"), PointKind::Folder, 0o755).unwrap();
        assert!(dir.path().join("a/c/d/x").is_dir());
    }

    #[test]
    fn a_very_deep_path_is_made_in_one_go() {
        let (dir, fd) = root();
        let path = "/d".repeat(1500);
        make_in_root(fd.as_fd(), Path::new(&path), PointKind::File, 0o644).unwrap();
        assert!(dir.path().join("d/d/d").is_dir());
    }

    #[test]
    fn beneath_refuses_links_and_parents() {
        let (dir, fd) = root();
        fs::create_dir(dir.path().join("d")).unwrap();
        symlink("d", dir.path().join("l")).unwrap();
        assert!(open_beneath(fd.as_fd(), Path::new("d"), OFlags::PATH).is_ok());
        assert!(open_beneath(fd.as_fd(), Path::new("l"), OFlags::PATH).is_err());
        assert!(open_beneath(fd.as_fd(), Path::new("../x"), OFlags::PATH).is_err());
        assert!(open_beneath(fd.as_fd(), Path::new("/etc"), OFlags::PATH).is_err());
    }
}
