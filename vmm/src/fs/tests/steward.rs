//! What a server that has been taken over cannot get from its steward.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{CWD, Mode, OFlags, StatVfsMountFlags, XattrFlags, fstatvfs, open, setxattr};
use rustix::io::Errno;
use rustix::mount::{OpenTreeFlags, open_tree};

use crate::limits;

use super::super::jail::confine_steward_thread;
use super::super::namespace::Namespace;
use super::super::steward::{Steward, channels, serve};

/// A steward in a thread, and a folder; `None` without root.
fn steward() -> Option<(Arc<Steward>, tempfile::TempDir)> {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: needs root");
        return None;
    }
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("scratch")).unwrap();
    std::fs::create_dir(dir.path().join("tree")).unwrap();
    std::fs::write(dir.path().join("tree/file"), "x").unwrap();
    let (ours, theirs) = channels(2).unwrap();
    let scratch = dir.path().join("scratch");
    std::thread::spawn(move || {
        let _namespace = Namespace::enter(&scratch).unwrap();
        confine_steward_thread().unwrap();
        serve(theirs).unwrap();
    });
    Some((Steward::new(ours), dir))
}

fn detached(path: &std::path::Path) -> OwnedFd {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    open_tree(CWD, path, flags).unwrap()
}

fn path_fd(path: &std::path::Path) -> OwnedFd {
    open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap()
}

#[test]
fn a_mount_is_confined_and_one_in_use_is_not_taken() {
    let Some((steward, dir)) = steward() else {
        return;
    };
    for readonly in [true, false] {
        let mount = detached(&dir.path().join("tree"));
        steward.add_mount(mount.as_fd(), readonly).unwrap();
        let flags = fstatvfs(&mount).unwrap().f_flag;
        let confined =
            StatVfsMountFlags::NOSUID | StatVfsMountFlags::NODEV | StatVfsMountFlags::NOEXEC;
        assert!(flags.contains(confined), "{flags:?}");
        assert_eq!(flags.contains(StatVfsMountFlags::RDONLY), readonly);
    }
    let folder = path_fd(&dir.path().join("tree"));
    assert_eq!(
        steward.add_mount(folder.as_fd(), true).unwrap_err(),
        Errno::INVAL
    );
}

#[test]
fn files_are_told_apart_by_whether_they_have_attributes() {
    let Some((steward, dir)) = steward() else {
        return;
    };
    let names = ["plain", "user.a", "trusted.a", "security.capability"];
    let mut files: Vec<OwnedFd> = names
        .map(|name| {
            let path = dir.path().join(name);
            std::fs::write(&path, "").unwrap();
            // A capability has a form of its own: none, of version 2.
            let value = [&[0, 0, 0, 2], &[0; 16][..]].concat();
            if name != "plain" {
                setxattr(&path, name, &value, XattrFlags::empty()).unwrap();
            }
            path_fd(&path)
        })
        .into();
    files.push(path_fd(&dir.path().join("tree")));
    let ask = |files: &[OwnedFd]| {
        let files: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        steward.bare(&files).map(Iterator::collect::<Vec<_>>)
    };
    assert_eq!(ask(&files), Ok(vec![true, false, false, false, true]));
    assert_eq!(ask(&[]), Ok(vec![]));
    while files.len() < limits::FS_ASKED {
        files.push(path_fd(&dir.path().join("plain")));
    }
    assert_eq!(ask(&files).unwrap().len(), limits::FS_ASKED);
    files.push(path_fd(&dir.path().join("plain")));
    assert_eq!(ask(&files), Err(Errno::INVAL));
}

#[test]
fn a_file_of_another_mount_is_not_kept_and_a_kept_one_comes_back() {
    let Some((steward, dir)) = steward() else {
        return;
    };
    let (one, two) = (detached(&dir.path().join("tree")), detached(dir.path()));
    let mount = steward
        .add_mount(one.as_fd(), false)
        .unwrap()
        .expect("handles");
    let inside = |mount: &OwnedFd, name: &str| {
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        rustix::fs::openat(mount, name, flags, Mode::empty()).unwrap()
    };
    let file = inside(&one, "file");
    let kept = mount.keep(file.as_fd()).unwrap();
    assert!(kept.is(&file));
    assert!(kept.is(kept.open().unwrap()));
    // The same file, but not of this mount: its handle could be any file's.
    let other = inside(&two, "tree/file");
    assert_eq!(mount.keep(other.as_fd()).err(), Some(Errno::XDEV));
    std::fs::remove_file(dir.path().join("tree/file")).unwrap();
    drop(other);
    drop(file);
    assert_eq!(kept.open().unwrap_err(), Errno::STALE);
}

#[test]
fn only_attributes_that_take_the_hosts_capabilities_are_changed() {
    let Some((steward, dir)) = steward() else {
        return;
    };
    let file = path_fd(&dir.path().join("tree/file"));
    let set = |name| steward.set_xattr(file.as_fd(), name, b"v", XattrFlags::empty());
    for name in [c"user.x", c"system.posix_acl_access", c"", c"trusted"] {
        assert_eq!(set(name), Err(Errno::PERM), "{name:?}");
        assert_eq!(steward.remove_xattr(file.as_fd(), name), Err(Errno::PERM));
    }
    set(c"trusted.x").unwrap();
    let mut data = [0; 100];
    assert_eq!(steward.list_xattr(file.as_fd(), &mut data), Ok(10));
    assert_eq!(
        steward.get_xattr(file.as_fd(), c"trusted.x", &mut data),
        Ok(1)
    );
    assert_eq!(data.first(), Some(&b'v'));
    assert_eq!(
        steward.get_xattr(file.as_fd(), c"trusted.x", &mut []),
        Err(Errno::RANGE)
    );
    steward.remove_xattr(file.as_fd(), c"trusted.x").unwrap();
    let gone = steward.get_xattr(file.as_fd(), c"trusted.x", &mut data);
    assert_eq!(gone, Err(Errno::NODATA));
}
