//! What a guest may send, right and wrong.

use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};

use rustix::fs::{CWD, FileType, Mode, mknodat};
use rustix::io::Errno;

use super::super::abi::{ROOT_ID, opcode};
use super::super::inodes::Limits;
use super::super::server::Budget;
use super::rig::{BUDGET, Rig, listed, message, u32_at, u32s, u64_at, u64s, write};
use crate::limits;

fn create(rig: &Rig, dir: u64, name: &std::ffi::CStr) -> Result<Vec<u8>, Errno> {
    let flags = (libc::O_CREAT | libc::O_RDWR).cast_unsigned();
    rig.named(
        opcode::CREATE,
        dir,
        u32s(&[flags, 0o100644, 0o022, 0]),
        &[name],
    )
}

#[test]
fn a_session_begins_with_one_mebibyte_messages() {
    let Some(rig) = Rig::start() else { return };
    let answer = rig.begin();
    assert_eq!(answer.len(), 64);
    assert_eq!((u32_at(&answer, 0), u32_at(&answer, 20)), (7, 1 << 20));
    // Bit 3 (ATOMIC_O_TRUNC) was offered and is not taken.
    assert_eq!(u32_at(&answer, 12) & (1 << 3), 0);
    assert_eq!(
        u16::from_ne_bytes([answer[28], answer[29]]),
        256,
        "max_pages"
    );
    rig.end().unwrap();
}

#[test]
fn nothing_is_served_before_a_session_begins() {
    let Some(rig) = Rig::start_bare(BUDGET, 1) else {
        return;
    };
    rig.add("rw", &rig.path("rw"), r#""readonly":false"#)
        .unwrap();
    assert_eq!(rig.lookup(ROOT_ID, c"rw"), Err(Errno::IO));
    rig.begin();
    assert!(rig.lookup(ROOT_ID, c"rw").is_ok());
}

#[test]
fn a_file_is_written_and_read() {
    let Some(rig) = Rig::start() else { return };
    let made = create(&rig, rig.tree(c"rw"), c"new").unwrap();
    let (node, handle) = (u64_at(&made, 0), u64_at(&made, 128));
    let data = vec![7; limits::FS_MESSAGE_DATA];
    assert_eq!(
        u32_at(&write(&rig, node, handle, &data).unwrap(), 0),
        1 << 20
    );
    assert_eq!(rig.read(node, handle, 1 << 20).unwrap(), data);
    // More than a message holds is cut.
    assert_eq!(rig.read(node, handle, u32::MAX).unwrap().len(), 1 << 20);
    assert_eq!(std::fs::read(rig.path("rw/new")).unwrap(), data);
}

#[test]
fn every_change_of_a_read_only_tree_is_refused_by_the_hosts_kernel() {
    let Some(rig) = Rig::start() else { return };
    let ro = rig.tree(c"ro");
    let (file, _) = rig.lookup(ro, c"file").unwrap();
    let refused = |result: Result<Vec<u8>, Errno>| assert_eq!(result, Err(Errno::ROFS));
    refused(create(&rig, ro, c"new"));
    refused(rig.named(opcode::MKDIR, ro, u32s(&[0o755, 0]), &[c"new"]));
    refused(rig.named(
        opcode::MKNOD,
        ro,
        u32s(&[libc::S_IFCHR, 0, 0, 0]),
        &[c"new"],
    ));
    refused(rig.named(opcode::SYMLINK, ro, Vec::new(), &[c"new", c"target"]));
    refused(rig.named(opcode::LINK, ro, u64s(&[file]), &[c"new"]));
    refused(rig.named(opcode::UNLINK, ro, Vec::new(), &[c"file"]));
    refused(rig.named(opcode::RENAME, ro, u64s(&[ro]), &[c"file", c"new"]));
    let mut xattr = u32s(&[1, 0, 0, 0]);
    xattr.extend_from_slice(b"user.a\0v");
    refused(rig.call(opcode::SETXATTR, file, &xattr));
    let mut mode = u32s(&[1, 0]);
    mode.resize(88, 0);
    refused(rig.call(opcode::SETATTR, file, &mode));
    assert_eq!(rig.open(file, libc::O_RDWR), Err(Errno::ROFS));
    let handle = rig.open(file, libc::O_RDONLY).unwrap();
    assert_eq!(write(&rig, file, handle, b"x"), Err(Errno::BADF));
    assert_eq!(rig.read(file, handle, 100).unwrap(), b"read only");
    // The root that holds the trees is as read-only.
    refused(create(&rig, ROOT_ID, c"new"));
    assert!(
        rig.named(opcode::RMDIR, ROOT_ID, Vec::new(), &[c"ro"])
            .is_err()
    );
    assert!(
        rig.named(opcode::RENAME, ROOT_ID, u64s(&[ROOT_ID]), &[c"ro", c"x"])
            .is_err()
    );
}

#[test]
fn names_that_are_not_one_component_are_refused() {
    let Some(rig) = Rig::start() else { return };
    let rw = rig.tree(c"rw");
    for name in [
        &b"..\0"[..],
        b".\0",
        b"../outside\0",
        b"/etc\0",
        b"a/b\0",
        b"a\0b\0",
        b"\0",
        b"unended",
        b"",
    ] {
        assert_eq!(
            rig.call(opcode::LOOKUP, rw, name),
            Err(Errno::INVAL),
            "{name:?}"
        );
        assert_eq!(
            rig.call(opcode::UNLINK, rw, name),
            Err(Errno::INVAL),
            "{name:?}"
        );
    }
    assert_eq!(rig.lookup(ROOT_ID, c".."), Err(Errno::INVAL));
    assert_eq!(rig.lookup(ROOT_ID, c"absent"), Err(Errno::NOENT));
}

#[test]
fn a_symlink_is_read_and_never_followed() {
    let Some(rig) = Rig::start() else { return };
    symlink(rig.path("outside"), rig.path("rw/file")).unwrap();
    symlink(rig.dir.path(), rig.path("rw/folder")).unwrap();
    let rw = rig.tree(c"rw");
    let (file, mode) = rig.lookup(rw, c"file").unwrap();
    assert_eq!(mode & libc::S_IFMT, libc::S_IFLNK);
    assert_eq!(rig.open(file, libc::O_RDONLY), Err(Errno::LOOP));
    assert_eq!(
        rig.call(opcode::READLINK, file, &[]).unwrap(),
        rig.path("outside").as_os_str().as_encoded_bytes()
    );
    let (folder, _) = rig.lookup(rw, c"folder").unwrap();
    assert_eq!(rig.lookup(folder, c"outside"), Err(Errno::NOTDIR));
    assert_eq!(
        rig.call(opcode::OPENDIR, folder, &[0; 8]),
        Err(Errno::NOTDIR)
    );
    // Creating over a link neither follows nor opens it.
    assert_eq!(create(&rig, rw, c"file").unwrap_err(), Errno::LOOP);
    let mut xattr = u32s(&[1, 0, 0, 0]);
    xattr.extend_from_slice(b"trusted.a\0v");
    rig.call(opcode::SETXATTR, file, &xattr).unwrap();
    let mut buffer = [0; 8];
    assert!(rustix::fs::getxattr(rig.path("outside"), c"trusted.a", &mut buffer).is_err());
    assert!(rustix::fs::lgetxattr(rig.path("rw/file"), c"trusted.a", &mut buffer).is_ok());
    assert_eq!(std::fs::read(rig.path("outside")).unwrap(), b"secret");
}

#[test]
fn devices_pipes_and_sockets_are_seen_and_never_opened() {
    let Some(rig) = Rig::start() else { return };
    let rw = rig.tree(c"rw");
    let kinds = [
        (c"pipe", FileType::Fifo, 0),
        (
            c"zero",
            FileType::CharacterDevice,
            rustix::fs::makedev(1, 5),
        ),
        (c"disk", FileType::BlockDevice, rustix::fs::makedev(7, 0)),
        (c"socket", FileType::Socket, 0),
    ];
    for (name, kind, device) in kinds {
        let path = rig.path("rw").join(name.to_str().unwrap());
        mknodat(CWD, path, kind, Mode::from_raw_mode(0o666), device).unwrap();
        let (node, mode) = rig.lookup(rw, name).unwrap();
        assert_eq!(FileType::from_raw_mode(mode), kind);
        for flags in [libc::O_RDONLY, libc::O_WRONLY, libc::O_RDWR] {
            assert_eq!(rig.open(node, flags), Err(Errno::NXIO), "{name:?}");
        }
        assert_eq!(create(&rig, rw, name).unwrap_err(), Errno::NXIO);
        let mut size = u32s(&[1 << 3, 0]);
        size.resize(88, 0);
        assert_eq!(rig.call(opcode::SETATTR, node, &size), Err(Errno::NXIO));
    }
}

#[test]
fn a_whiteout_can_be_made_and_no_other_device() {
    let Some(rig) = Rig::start() else { return };
    let rw = rig.tree(c"rw");
    rig.named(
        opcode::MKNOD,
        rw,
        u32s(&[libc::S_IFCHR, 0, 0, 0]),
        &[c"gone"],
    )
    .unwrap();
    let made = std::fs::symlink_metadata(rig.path("rw/gone")).unwrap();
    assert!(made.file_type().is_char_device() && made.rdev() == 0);
    // 1:3 is /dev/null.
    for kind in [libc::S_IFCHR, libc::S_IFBLK] {
        assert_eq!(
            rig.named(opcode::MKNOD, rw, u32s(&[kind, 0x103, 0, 0]), &[c"d"]),
            Err(Errno::PERM)
        );
    }
    rig.named(
        opcode::MKNOD,
        rw,
        u32s(&[libc::S_IFIFO | 0o600, 0, 0, 0]),
        &[c"pipe"],
    )
    .unwrap();
    assert!(
        std::fs::symlink_metadata(rig.path("rw/pipe"))
            .unwrap()
            .file_type()
            .is_fifo()
    );
}

#[test]
fn rename_replaces_exchanges_and_leaves_whiteouts() {
    let Some(rig) = Rig::start() else { return };
    let rw = rig.tree(c"rw");
    for name in ["a", "b", "c"] {
        std::fs::write(rig.path("rw").join(name), name).unwrap();
    }
    let rename = |flags: u32, from, to| {
        let mut body = u64s(&[rw]);
        body.extend(u32s(&[flags, 0]));
        rig.named(opcode::RENAME2, rw, body, &[from, to]).map(drop)
    };
    let text = |name: &str| std::fs::read_to_string(rig.path("rw").join(name)).unwrap();
    assert_eq!(
        rename(libc::RENAME_NOREPLACE, c"a", c"b"),
        Err(Errno::EXIST)
    );
    rename(libc::RENAME_EXCHANGE, c"a", c"b").unwrap();
    assert_eq!((text("a"), text("b")), ("b".to_owned(), "a".to_owned()));
    rename(libc::RENAME_WHITEOUT, c"a", c"d").unwrap();
    assert_eq!(text("d"), "b");
    let left = std::fs::symlink_metadata(rig.path("rw/a")).unwrap();
    assert!(left.file_type().is_char_device() && left.rdev() == 0);
    rename(0, c"c", c"b").unwrap();
    assert_eq!(text("b"), "c");
    assert_eq!(rename(8, c"b", c"e"), Err(Errno::INVAL));
    // Another tree is another mount.
    let ro = rig.tree(c"ro");
    let across = rig.named(opcode::RENAME, rw, u64s(&[ro]), &[c"b", c"b"]);
    assert_eq!(across, Err(Errno::XDEV));
}

#[test]
fn a_new_node_belongs_to_the_caller_with_the_callers_umask() {
    let Some(rig) = Rig::start() else { return };
    let rw = rig.tree(c"rw");
    let mut body = u32s(&[0o777, 0o027]);
    body.extend_from_slice(b"folder\0");
    rig.call_as((1000, 2000), opcode::MKDIR, rw, &body).unwrap();
    let made = std::fs::metadata(rig.path("rw/folder")).unwrap();
    assert_eq!(
        (made.uid(), made.gid(), made.mode() & 0o7777),
        (1000, 2000, 0o750)
    );
    // Root again, and no id is called -1.
    create(&rig, rw, c"file").unwrap();
    let made = std::fs::metadata(rig.path("rw/file")).unwrap();
    assert_eq!(
        (made.uid(), made.gid(), made.mode() & 0o7777),
        (0, 0, 0o644)
    );
    for who in [(u32::MAX, 0), (0, u32::MAX)] {
        let mut body = u32s(&[0o777, 0]);
        body.extend_from_slice(b"nobodys\0");
        assert_eq!(
            rig.call_as(who, opcode::MKDIR, rw, &body),
            Err(Errno::INVAL)
        );
    }
}

/// CVE-2022-0358: a file made in a set-group-id folder by somebody outside of the group.
#[test]
fn a_caller_outside_the_group_makes_no_setgid_file() {
    let Some(rig) = Rig::start() else { return };
    let rw = rig.tree(c"rw");
    std::os::unix::fs::chown(rig.path("rw"), None, Some(3000)).unwrap();
    std::fs::set_permissions(rig.path("rw"), PermissionsExt::from_mode(0o2777)).unwrap();
    let mut body = u32s(&[
        (libc::O_CREAT | libc::O_RDWR).cast_unsigned(),
        0o102755,
        0,
        0,
    ]);
    body.extend_from_slice(b"file\0");
    rig.call_as((1000, 1000), opcode::CREATE, rw, &body)
        .unwrap();
    let made = std::fs::metadata(rig.path("rw/file")).unwrap();
    assert_eq!((made.gid(), made.mode() & 0o7777), (3000, 0o755));
}

#[test]
fn set_id_bits_go_when_the_guest_says_so() {
    let Some(rig) = Rig::start() else { return };
    let made = create(&rig, rig.tree(c"rw"), c"file").unwrap();
    let (node, handle) = (u64_at(&made, 0), u64_at(&made, 128));
    let set = || {
        std::fs::set_permissions(rig.path("rw/file"), PermissionsExt::from_mode(0o6755)).unwrap()
    };
    let mode = || std::fs::metadata(rig.path("rw/file")).unwrap().mode() & 0o7777;
    set();
    write(&rig, node, handle, b"by root").unwrap();
    assert_eq!(mode(), 0o6755);
    let mut body = u64s(&[handle, 0]);
    body.extend(u32s(&[1, 1 << 2, 0, 0, 0, 0]));
    body.push(b'x');
    rig.call(opcode::WRITE, node, &body).unwrap();
    assert_eq!(mode(), 0o755);
    set();
    let mut body = u32s(&[1 << 3 | 1 << 11, 0]);
    body.resize(88, 0);
    rig.call(opcode::SETATTR, node, &body).unwrap();
    assert_eq!(mode(), 0o755);
}

#[test]
fn forged_nodes_and_handles_find_nothing() {
    let Some(rig) = Rig::start() else { return };
    let rw = rig.tree(c"rw");
    for node in [0, rw + 1, 1 << 32, u64::MAX] {
        assert_eq!(
            rig.call(opcode::GETATTR, node, &[0; 16]),
            Err(Errno::STALE),
            "{node}"
        );
        assert_eq!(rig.lookup(node, c"a"), Err(Errno::STALE));
        assert_eq!(
            rig.named(opcode::RENAME, rw, u64s(&[node]), &[c"a", c"b"]),
            Err(Errno::STALE)
        );
    }
    let made = create(&rig, rw, c"file").unwrap();
    let (node, handle) = (u64_at(&made, 0), u64_at(&made, 128));
    assert_eq!(rig.read(node, handle + 1, 10), Err(Errno::BADF));
    // A handle belongs to the node it was opened from.
    assert_eq!(rig.read(rw, handle, 10), Err(Errno::BADF));
    let mut copy = u64s(&[handle, 0, rw, handle, 0, 10, 0]);
    assert_eq!(
        rig.call(opcode::COPY_FILE_RANGE, node, &copy),
        Err(Errno::BADF)
    );
    copy[16..24].copy_from_slice(&node.to_ne_bytes());
    assert!(rig.call(opcode::COPY_FILE_RANGE, node, &copy).is_ok());
}

#[test]
fn a_forgotten_node_is_gone_and_its_number_is_not_used_again() {
    let Some(rig) = Rig::start() else { return };
    let ro = rig.tree(c"ro");
    let (file, _) = rig.lookup(ro, c"file").unwrap();
    assert_eq!(rig.lookup(ro, c"file").unwrap().0, file);
    rig.send(&message(99, (0, 0), opcode::FORGET, file, &u64s(&[1])));
    assert!(rig.call(opcode::GETATTR, file, &[0; 16]).is_ok());
    let mut forget = u32s(&[2, 0]);
    forget.extend(u64s(&[file, u64::MAX, ROOT_ID, u64::MAX]));
    rig.send(&message(99, (0, 0), opcode::BATCH_FORGET, 0, &forget));
    assert_eq!(rig.call(opcode::GETATTR, file, &[0; 16]), Err(Errno::STALE));
    assert!(rig.call(opcode::GETATTR, ROOT_ID, &[0; 16]).is_ok());
    assert!(rig.lookup(ro, c"file").unwrap().0 > file);
}

#[test]
fn unknown_operations_are_enosys() {
    let Some(rig) = Rig::start() else { return };
    for code in [0, 7, 19, 31, 34, 37, 39, 52, 4096, u32::MAX] {
        assert_eq!(
            rig.call(code, ROOT_ID, &[0; 64]),
            Err(Errno::NOSYS),
            "{code}"
        );
    }
}

#[test]
fn short_long_and_lying_messages_are_refused_and_the_server_serves_on() {
    let Some(rig) = Rig::start() else { return };
    // Without a header there is nobody to answer.
    for len in [1, 4, 39] {
        rig.send(&vec![0xff; len]);
    }
    let whole = message(5, (0, 0), opcode::LOOKUP, ROOT_ID, b"rw\0");
    rig.send(&whole[..whole.len() - 1]);
    assert_eq!(rig.receive(), (5, -libc::EINVAL, Vec::new()));
    let mut longer = whole.clone();
    longer.push(0);
    rig.send(&longer);
    assert_eq!(rig.receive(), (5, -libc::EINVAL, Vec::new()));
    let huge = message(
        6,
        (0, 0),
        opcode::WRITE,
        ROOT_ID,
        &vec![0; limits::FS_MESSAGE],
    );
    rig.send(&huge);
    assert_eq!(rig.receive(), (6, -libc::EINVAL, Vec::new()));
    assert!(rig.lookup(ROOT_ID, c"rw").is_ok());
}

#[test]
fn a_guest_at_its_limits_is_refused_and_others_names_still_work() {
    let budget = Budget {
        inodes: Limits {
            inodes: 4,
            descriptors: 4,
        },
        handles: 2,
    };
    let Some(rig) = Rig::start_with(budget, 1) else {
        return;
    };
    let (ro, rw) = (rig.tree(c"ro"), rig.tree(c"rw"));
    let (file, _) = rig.lookup(ro, c"file").unwrap();
    create(&rig, rw, c"a").unwrap();
    assert_eq!(create(&rig, rw, c"b").unwrap_err(), Errno::NFILE);
    assert!(!rig.path("rw/b").exists(), "refused before it is made");
    rig.open(file, libc::O_RDONLY).unwrap();
    assert_eq!(rig.open(file, libc::O_RDONLY), Err(Errno::NFILE));
    // A listing still works: entries without room come as names only.
    rig.send(&message(7, (0, 0), opcode::FORGET, file, &u64s(&[1])));
    assert!(rig.lookup(ro, c"file").is_ok());
}

#[test]
fn a_file_that_is_open_and_forgotten_has_one_descriptor() {
    let Some(rig) = Rig::start() else {
        return;
    };
    let rw = rig.tree(c"rw");
    // A name that no other test's descriptor has.
    std::fs::write(rig.path("rw/forgotten"), "").unwrap();
    for _ in 0..50 {
        let (file, _) = rig.lookup(rw, c"forgotten").unwrap();
        rig.open(file, libc::O_RDONLY).unwrap();
        rig.send(&message(7, (0, 0), opcode::FORGET, file, &u64s(&[1])));
    }
    // Answered after what was sent before.
    rig.call(opcode::GETATTR, rw, &[0; 16]).unwrap();
    let folder = format!("/proc/self/task/{}/fd", rig.thread);
    let open = std::fs::read_dir(folder).unwrap().flatten();
    let links = open.filter_map(|fd| std::fs::read_link(fd.path()).ok());
    assert_eq!(links.filter(|to| to.ends_with("forgotten")).count(), 50);
}

#[test]
fn beyond_its_descriptors_the_server_holds_files_by_handle() {
    let budget = Budget {
        inodes: Limits {
            inodes: 1000,
            descriptors: 4,
        },
        handles: 10,
    };
    let Some(rig) = Rig::start_with(budget, 1) else {
        return;
    };
    let rw = rig.tree(c"rw");
    let name = |number: usize| std::ffi::CString::new(format!("f{number}")).unwrap();
    for number in 0..50 {
        std::fs::write(rig.path(&format!("rw/f{number}")), number.to_string()).unwrap();
    }
    let nodes: Vec<u64> = (0..50)
        .map(|number| rig.lookup(rw, &name(number)).unwrap().0)
        .collect();
    for (number, node) in nodes.iter().enumerate() {
        assert_eq!(rig.lookup(rw, &name(number)).unwrap().0, *node);
        let handle = rig.open(*node, libc::O_RDONLY).unwrap();
        assert_eq!(
            rig.read(*node, handle, 10).unwrap(),
            number.to_string().as_bytes()
        );
        let mut release = u64s(&[handle]);
        release.extend([0; 16]);
        rig.call(opcode::RELEASE, *node, &release).unwrap();
    }
    // Another file in the place of one held by handle is another node, even under the same inode number.
    std::fs::remove_file(rig.path("rw/f49")).unwrap();
    std::fs::write(rig.path("rw/f49"), "new").unwrap();
    assert_ne!(rig.lookup(rw, c"f49").unwrap().0, nodes[49]);
    assert_eq!(
        rig.call(opcode::GETATTR, nodes[49], &[0; 16]),
        Err(Errno::STALE)
    );
}

#[test]
fn a_file_held_by_handle_lives_on_unlinked_while_it_is_open() {
    let budget = Budget {
        inodes: Limits {
            inodes: 1000,
            descriptors: 3,
        },
        handles: 10,
    };
    let Some(rig) = Rig::start_with(budget, 1) else {
        return;
    };
    let rw = rig.tree(c"rw");
    rig.tree(c"ro");
    create(&rig, rw, c"last-descriptor").unwrap();
    let made = create(&rig, rw, c"file").unwrap();
    let (node, handle) = (u64_at(&made, 0), u64_at(&made, 128));
    write(&rig, node, handle, b"data").unwrap();
    rig.named(opcode::UNLINK, rw, Vec::new(), &[c"file"])
        .unwrap();
    assert_eq!(
        u64_at(&rig.call(opcode::GETATTR, node, &[0; 16]).unwrap(), 24),
        4
    );
    write(&rig, node, handle, b"longer").unwrap();
    assert_eq!(rig.read(node, handle, 100).unwrap(), b"longer");
    rig.open(node, libc::O_RDONLY).unwrap();
}

#[test]
fn a_folder_is_listed_page_by_page_with_types() {
    let Some(rig) = Rig::start() else { return };
    for number in 0..100 {
        std::fs::write(rig.path(&format!("rw/file-{number:03}")), "").unwrap();
    }
    let rw = rig.tree(c"rw");
    let handle = u64_at(&rig.call(opcode::OPENDIR, rw, &[0; 8]).unwrap(), 0);
    for (code, skip) in [(opcode::READDIR, 0), (opcode::READDIRPLUS, 128)] {
        let (mut names, mut offset) = (Vec::new(), 0);
        loop {
            let mut body = u64s(&[handle, offset]);
            body.extend(u32s(&[1024, 0, 0, 0, 0, 0]));
            let page = rig.call(code, rw, &body).unwrap();
            if page.is_empty() {
                break;
            }
            for (at, name) in listed(&page, skip) {
                let dirent = at + skip;
                if skip > 0 && name.starts_with("file") {
                    assert_ne!(u64_at(&page, at), 0);
                    assert_eq!(
                        u64_at(&page, at + 40),
                        u64_at(&page, dirent),
                        "st_ino is d_ino"
                    );
                    assert_eq!(u32_at(&page, dirent + 20), u32::from(libc::DT_REG));
                }
                names.push(name);
                offset = u64_at(&page, dirent + 8);
            }
        }
        names.sort();
        names.dedup();
        assert_eq!(names.len(), 102);
    }
    let mut body = u64s(&[handle, 0]);
    body.extend(u32s(&[10, 0, 0, 0, 0, 0]));
    assert_eq!(rig.call(opcode::READDIR, rw, &body), Err(Errno::INVAL));
}

#[test]
fn the_small_operations_answer() {
    let Some(rig) = Rig::start() else { return };
    let rw = rig.tree(c"rw");
    let made = create(&rig, rw, c"file").unwrap();
    let (node, handle) = (u64_at(&made, 0), u64_at(&made, 128));
    let statfs = rig.call(opcode::STATFS, rw, &[]).unwrap();
    assert_eq!(statfs.len(), 80);
    assert_eq!(u32_at(&statfs, 44), 255, "longest name");
    rig.call(opcode::SYNCFS, ROOT_ID, &[0; 8]).unwrap();
    write(&rig, node, handle, b"data").unwrap();
    let mut fsync = u64s(&[handle]);
    fsync.extend(u32s(&[1, 0]));
    rig.call(opcode::FSYNC, node, &fsync).unwrap();
    let mut fallocate = u64s(&[handle, 0, 8192]);
    fallocate.extend(u32s(&[0, 0]));
    rig.call(opcode::FALLOCATE, node, &fallocate).unwrap();
    assert_eq!(std::fs::metadata(rig.path("rw/file")).unwrap().len(), 8192);
    fallocate[24..28].copy_from_slice(&8u32.to_ne_bytes());
    assert_eq!(
        rig.call(opcode::FALLOCATE, node, &fallocate),
        Err(Errno::OPNOTSUPP)
    );
    for (whence, answer) in [
        (libc::SEEK_DATA, true),
        (libc::SEEK_HOLE, true),
        (libc::SEEK_SET, false),
    ] {
        let mut seek = u64s(&[handle, 0]);
        seek.extend(u32s(&[whence.cast_unsigned(), 0]));
        assert_eq!(rig.call(opcode::LSEEK, node, &seek).is_ok(), answer);
    }
    let mut value = u32s(&[3, 0, 0, 0]);
    value.extend_from_slice(b"user.k\0abc");
    rig.call(opcode::SETXATTR, node, &value).unwrap();
    let get = |size: u32| rig.named(opcode::GETXATTR, node, u32s(&[size, 0]), &[c"user.k"]);
    assert_eq!(get(0).unwrap(), u32s(&[3, 0]));
    assert_eq!(get(2), Err(Errno::RANGE));
    assert_eq!(get(100).unwrap(), b"abc");
    assert_eq!(
        rig.call(opcode::LISTXATTR, node, &u32s(&[100, 0])).unwrap(),
        b"user.k\0"
    );
    rig.named(opcode::LINK, rw, u64s(&[node]), &[c"again"])
        .unwrap();
    assert_eq!(std::fs::metadata(rig.path("rw/again")).unwrap().nlink(), 2);
    rig.call(opcode::DESTROY, 0, &[]).unwrap();
    assert_eq!(rig.call(opcode::GETATTR, node, &[0; 16]), Err(Errno::STALE));
}

#[test]
fn random_messages_never_end_the_server() {
    let Some(rig) = Rig::start() else { return };
    create(&rig, rig.tree(c"rw"), c"file").unwrap();
    // xorshift: the same messages each time.
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    for _ in 0..20_000 {
        let code = (random() % 56) as u32;
        // A new session would take the nodes away, and these three have no answer.
        if [
            opcode::INIT,
            opcode::DESTROY,
            opcode::FORGET,
            opcode::BATCH_FORGET,
        ]
        .contains(&code)
            || [opcode::INTERRUPT, opcode::NOTIFY_REPLY].contains(&code)
        {
            continue;
        }
        let mut body: Vec<u8> = (0..random() % 14)
            .flat_map(|_| match random() % 4 {
                0 => random().to_ne_bytes(),
                1 => (random() % 6).to_ne_bytes(),
                2 => u64::MAX.to_ne_bytes(),
                _ => *b"file\0a\0b",
            })
            .collect();
        if random() % 2 == 0 {
            body.extend_from_slice(b"file\0");
        }
        let _ = rig.call(code, random() % 6, &body);
    }
    assert!(rig.lookup(ROOT_ID, c"rw").is_ok());
    assert_eq!(std::fs::read(rig.path("ro/file")).unwrap(), b"read only");
    assert_eq!(std::fs::read(rig.path("outside")).unwrap(), b"secret");
    rig.end().unwrap();
}
