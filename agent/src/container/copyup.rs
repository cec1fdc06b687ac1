//! Step: `tmpcopyup`. A tmpfs takes over what the folder that it covers holds: folders, files, links, nodes, with owners, modes
//! and times. The folder is the image's: nothing in it is followed, and what is written is charged to the container.

use std::{
    ffi::OsStr,
    fs::File,
    io,
    os::{fd::OwnedFd, unix::ffi::OsStrExt},
    path::{Path, PathBuf},
};

use rustix::{
    fs::{AtFlags, Dir, FileType, Gid, Mode, OFlags, Stat, Timespec, Timestamps, Uid},
    io::Errno,
};

use crate::error::{Context, Error, Result};

/// Deepest nesting copied: a path of 4096 bytes has no more folders.
const DEPTH_MAX: usize = 2048;

/// Copies all in `from` to `to`. `field` names the mount.
pub fn copy(from: &OwnedFd, to: &OwnedFd, field: &str) -> Result<()> {
    let what = |path: &Path| format!("{field}: tmpcopyup: copy {}", path.display());
    let stat = rustix::fs::fstat(from).step(|| what(Path::new(".")))?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
        return Ok(());
    }
    // Folders to do, by path below both roots. Each is opened again from the roots without following links.
    let mut todo = vec![PathBuf::new()];
    while let Some(path) = todo.pop() {
        if path.components().count() > DEPTH_MAX {
            return Err(Error::field(what(&path), "is nested too deep"));
        }
        let folder = open(from, &path, OFlags::RDONLY | OFlags::DIRECTORY).step(|| what(&path))?;
        let target = open(to, &path, OFlags::RDONLY | OFlags::DIRECTORY).step(|| what(&path))?;
        for entry in Dir::read_from(&folder).step(|| what(&path))? {
            let entry = entry.step(|| what(&path))?;
            let name = OsStr::from_bytes(entry.file_name().to_bytes());
            if name == "." || name == ".." {
                continue;
            }
            let at = path.join(name);
            if copy_entry(&folder, &target, name).step(|| what(&at))? {
                todo.push(at);
            }
        }
    }
    Ok(())
}

fn open(root: &OwnedFd, path: &Path, flags: OFlags) -> std::result::Result<OwnedFd, Errno> {
    let path = match path.as_os_str().is_empty() {
        true => Path::new("."),
        false => path,
    };
    super::path::open_beneath(std::os::fd::AsFd::as_fd(root), path, flags)
}

/// Copies one entry; answers whether it is a folder, whose content is still to come.
fn copy_entry(from: &OwnedFd, to: &OwnedFd, name: &OsStr) -> io::Result<bool> {
    let stat = rustix::fs::statat(from, name, AtFlags::SYMLINK_NOFOLLOW)?;
    let kind = FileType::from_raw_mode(stat.st_mode);
    let mode = Mode::from_raw_mode(stat.st_mode & 0o7777);
    match kind {
        FileType::Directory => rustix::fs::mkdirat(to, name, mode)?,
        FileType::Symlink => {
            let target = rustix::fs::readlinkat(from, name, Vec::new())?;
            rustix::fs::symlinkat(target, to, name)?;
        }
        FileType::RegularFile => {
            let read = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
            let mut source = File::from(rustix::fs::openat(from, name, read, Mode::empty())?);
            let write = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
            let mut target = File::from(rustix::fs::openat(to, name, write, mode)?);
            io::copy(&mut source, &mut target)?;
        }
        _ => rustix::fs::mknodat(to, name, kind, mode, stat.st_rdev)?,
    }
    give(to, name, &stat, kind, mode)?;
    Ok(kind == FileType::Directory)
}

/// Owner, mode (a change of owner takes set-user-id bits) and times.
fn give(to: &OwnedFd, name: &OsStr, stat: &Stat, kind: FileType, mode: Mode) -> io::Result<()> {
    let (uid, gid) = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
    rustix::fs::chownat(to, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
    if kind != FileType::Symlink {
        rustix::fs::chmodat(to, name, mode, AtFlags::empty())?;
    }
    let time = |secs: i64, nsecs: u64| Timespec {
        tv_sec: secs,
        tv_nsec: i64::try_from(nsecs).unwrap_or(0),
    };
    let times = Timestamps {
        last_access: time(stat.st_atime, stat.st_atime_nsec),
        last_modification: time(stat.st_mtime, stat.st_mtime_nsec),
    };
    rustix::fs::utimensat(to, name, &times, AtFlags::SYMLINK_NOFOLLOW)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        fs,
        os::unix::fs::{MetadataExt, PermissionsExt, symlink},
    };

    fn folder() -> (tempfile::TempDir, OwnedFd) {
        let dir = tempfile::tempdir().unwrap();
        let fd = rustix::fs::open(dir.path(), OFlags::PATH, Mode::empty()).unwrap();
        (dir, fd)
    }

    #[test]
    fn folders_files_and_links_are_copied_with_modes_and_nothing_is_followed() {
        let ((from, a), (to, b)) = (folder(), folder());
        let (f, t) = (from.path(), to.path());
        fs::create_dir_all(f.join("d/e")).unwrap();
        fs::write(f.join("d/e/file"), "text").unwrap();
        fs::set_permissions(f.join("d/e/file"), PermissionsExt::from_mode(0o4750)).unwrap();
        symlink("/etc", f.join("out")).unwrap();
        copy(&a, &b, "mounts[0]").unwrap();
        assert_eq!(fs::read_to_string(t.join("d/e/file")).unwrap(), "text");
        let (old, new) = (
            fs::metadata(f.join("d/e/file")),
            fs::metadata(t.join("d/e/file")),
        );
        let (old, new) = (old.unwrap(), new.unwrap());
        assert_eq!(new.permissions().mode() & 0o7777, 0o4750);
        assert_eq!(
            (new.mtime(), new.mtime_nsec()),
            (old.mtime(), old.mtime_nsec())
        );
        assert_eq!(fs::read_link(t.join("out")).unwrap(), Path::new("/etc"));
    }

    #[test]
    fn a_file_under_the_mount_point_is_no_content() {
        let ((_from, _), (to, b)) = (folder(), folder());
        let file = tempfile::NamedTempFile::new().unwrap();
        let fd = rustix::fs::open(file.path(), OFlags::PATH, Mode::empty()).unwrap();
        copy(&fd, &b, "mounts[0]").unwrap();
        assert_eq!(fs::read_dir(to.path()).unwrap().count(), 0);
    }
}
