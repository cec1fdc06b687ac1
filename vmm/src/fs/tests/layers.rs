//! What nobody changes: the marks in its attributes, and handle 0.

use std::os::unix::fs::symlink;

use rustix::fs::{XattrFlags, setxattr};
use rustix::io::Errno;

use super::super::abi::{ENTRY_OUT, opcode};
use super::rig::{Rig, listed, u32_at, u32s, u64_at, u64s, write};

#[test]
fn what_nobody_changes_is_read_without_an_open() {
    let Some(rig) = Rig::start() else { return };
    let (ro, rw) = (rig.tree(c"ro"), rig.tree(c"rw"));
    std::fs::write(rig.path("rw/file"), "").unwrap();
    std::fs::create_dir(rig.path("rw/folder")).unwrap();
    symlink("file", rig.path("ro/link")).unwrap();
    let lookup = |dir, name| {
        let entry = rig.named(opcode::LOOKUP, dir, Vec::new(), &[name]).unwrap();
        (u64_at(&entry, 0), u32_at(&entry, 124) & (1 << 31) != 0)
    };
    let (file, stateless) = lookup(ro, c"file");
    assert!(stateless);
    assert_eq!(rig.read(file, 0, 100).unwrap(), b"read only");
    let list = |node| {
        let mut body = u64s(&[0, 0]);
        body.extend(u32s(&[1024, 0, 0, 0, 0, 0]));
        rig.call(opcode::READDIR, node, &body)
    };
    assert!(!list(ro).unwrap().is_empty());
    let mut fsync = u64s(&[0]);
    fsync.extend(u32s(&[0, 0]));
    rig.call(opcode::FSYNC, file, &fsync).unwrap();
    rig.call(opcode::FSYNCDIR, ro, &fsync).unwrap();
    let mut lseek = u64s(&[0, 0]);
    lseek.extend(u32s(&[libc::SEEK_HOLE.cast_unsigned(), 0]));
    assert_eq!(
        u64_at(&rig.call(opcode::LSEEK, file, &lseek).unwrap(), 0),
        9
    );

    // Handle 0 is of nothing else: not to write, not what is no file, not where somebody writes.
    assert_eq!(write(&rig, file, 0, b"x"), Err(Errno::BADF));
    assert_eq!(rig.call(opcode::RELEASE, file, &[0; 24]), Err(Errno::BADF));
    assert_eq!(rig.read(lookup(ro, c"link").0, 0, 1), Err(Errno::LOOP));
    assert_eq!(rig.read(ro, 0, 1), Err(Errno::ISDIR));
    assert_eq!(list(file), Err(Errno::NOTDIR));
    for name in [c"file", c"folder"] {
        let (node, stateless) = lookup(rw, name);
        assert!(!stateless);
        assert_eq!(rig.read(node, 0, 1), Err(Errno::BADF));
        assert_eq!(list(node), Err(Errno::BADF));
    }
}

#[test]
fn what_has_no_attributes_and_gets_none_is_told_so() {
    let Some(rig) = Rig::start() else { return };
    let flags = XattrFlags::empty();
    for tree in ["ro", "rw"] {
        for number in 0..40 {
            let path = rig.path(&format!("{tree}/{number}"));
            std::fs::write(&path, "").unwrap();
            if number == 7 {
                setxattr(&path, "trusted.overlay.opaque", b"y", flags).unwrap();
            }
        }
    }
    for (tree, constant) in [(c"ro", true), (c"rw", false)] {
        let tree = rig.tree(tree);
        for (name, bare) in [(c"6", constant), (c"7", false)] {
            let entry = rig
                .named(opcode::LOOKUP, tree, Vec::new(), &[name])
                .unwrap();
            assert_eq!(u32_at(&entry, 124) & (1 << 30) != 0, bare);
        }
        // More than are asked about at once.
        let handle = u64_at(&rig.call(opcode::OPENDIR, tree, &[0; 8]).unwrap(), 0);
        let mut body = u64s(&[handle, 0]);
        body.extend(u32s(&[64 << 10, 0, 0, 0, 0, 0]));
        let page = rig.call(opcode::READDIRPLUS, tree, &body).unwrap();
        let mut seen = 0;
        for (at, name) in listed(&page, ENTRY_OUT) {
            if let Ok(number) = name.parse::<u32>() {
                let bare = u32_at(&page, at + 124) & (1 << 30) != 0;
                assert_eq!(bare, constant && number != 7, "{name}");
                seen += 1;
            }
        }
        assert_eq!(seen, 40);
    }
}
