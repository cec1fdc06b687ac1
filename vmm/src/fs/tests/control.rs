//! The control socket, and what the server can see.

use std::os::fd::AsFd;

use rustix::io::Errno;

use super::super::abi::{ROOT_ID, opcode};
use super::rig::{Rig, u32s, u64_at};

#[test]
fn a_request_that_is_not_right_is_refused_with_the_field() {
    let Some(rig) = Rig::start() else { return };
    let file = std::fs::File::open(rig.path("ro/file")).unwrap();
    let refused = |line: &str, with: &[_], field: &str| {
        let error = rig.request(line, with).unwrap_err();
        assert!(error.starts_with(field), "{line}: {error}");
    };
    for id in ["", ".", "..", "a/b", "../x"] {
        assert!(
            rig.add(id, &rig.path("rw"), r#""readonly":true"#)
                .unwrap_err()
                .starts_with("id:"),
            "{id:?}"
        );
    }
    refused("{", &[], "request:");
    refused("{}", &[], "request:");
    refused(r#"{"op":"format"}"#, &[], "request:");
    refused(
        r#"{"op":"add","id":"x","readwrite":true}"#,
        &[file.as_fd()],
        "request:",
    );
    refused(r#"{"op":"add","id":"x"}"#, &[], "descriptor:");
    refused(
        r#"{"op":"add","id":"x"}"#,
        &[file.as_fd(), file.as_fd()],
        "descriptor:",
    );
    refused(r#"{"op":"add","id":"x"}"#, &[file.as_fd()], "descriptor:");
    refused(r#"{"op":"remove","id":"x"}"#, &[], "id:");
    assert!(
        rig.add("rw", &rig.path("rw"), r#""readonly":true"#)
            .unwrap_err()
            .starts_with("id:")
    );
    // Nothing of the refused is left over.
    rig.add("x", &rig.path("rw"), r#""readonly":true"#).unwrap();
}

#[test]
fn a_file_can_be_a_tree() {
    let Some(rig) = Rig::start() else { return };
    rig.add(
        "f",
        &rig.path("ro/file"),
        r#""readonly":true,"shared":true"#,
    )
    .unwrap();
    let (node, mode) = rig.lookup(ROOT_ID, c"f").unwrap();
    assert_eq!(mode & libc::S_IFMT, libc::S_IFREG);
    let handle = rig.open(node, libc::O_RDONLY).unwrap();
    assert_eq!(rig.read(node, handle, 100).unwrap(), b"read only");
    assert_eq!(rig.open(node, libc::O_WRONLY), Err(Errno::ROFS));
    rig.request(r#"{"op":"remove","id":"f"}"#, &[]).unwrap();
    assert_eq!(rig.lookup(ROOT_ID, c"f"), Err(Errno::NOENT));
}

#[test]
fn trees_have_a_cap() {
    let Some(rig) = Rig::start() else { return };
    let readonly = r#""readonly":true"#;
    let file = rig.path("ro/file");
    // Two are there from the start.
    for number in 2..crate::limits::FS_TREES {
        rig.add(&format!("t{number}"), &file, readonly).unwrap();
    }
    let error = rig.add("more", &file, readonly).unwrap_err();
    assert!(error.contains("no more fit"), "{error}");
    rig.request(r#"{"op":"remove","id":"t2"}"#, &[]).unwrap();
    rig.add("more", &file, readonly).unwrap();
}

#[test]
fn a_removed_tree_is_gone_with_all_that_was_open_in_it() {
    let Some(rig) = Rig::start() else { return };
    let ro = rig.tree(c"ro");
    let (file, _) = rig.lookup(ro, c"file").unwrap();
    let handle = rig.open(file, libc::O_RDONLY).unwrap();
    rig.request(r#"{"op":"remove","id":"ro"}"#, &[]).unwrap();
    assert_eq!(rig.read(file, handle, 10), Err(Errno::BADF));
    assert_eq!(rig.call(opcode::GETATTR, file, &[0; 16]), Err(Errno::STALE));
    assert_eq!(rig.lookup(ro, c"file"), Err(Errno::STALE));
    assert_eq!(rig.lookup(ROOT_ID, c"ro"), Err(Errno::NOENT));
    rig.add("ro", &rig.path("ro"), r#""readonly":false"#)
        .unwrap();
    assert!(rig.lookup(rig.tree(c"ro"), c"file").unwrap().0 > file);
}

#[test]
fn only_trees_the_host_may_change_are_not_cached() {
    let Some(rig) = Rig::start() else { return };
    rig.add("volume", &rig.path("rw"), r#""shared":true"#)
        .unwrap();
    let timeout = |dir, name: &std::ffi::CStr| {
        let entry = rig.named(opcode::LOOKUP, dir, Vec::new(), &[name]);
        entry.map(|entry| (u64_at(&entry, 16), u64_at(&entry, 0) == 0))
    };
    let (ro, volume) = (rig.tree(c"ro"), rig.tree(c"volume"));
    assert_eq!(timeout(ro, c"file"), Ok((86_400, false)));
    assert_eq!(timeout(ro, c"absent"), Ok((86_400, true)));
    assert_eq!(timeout(volume, c"absent"), Err(Errno::NOENT));
    rig.named(opcode::MKDIR, volume, u32s(&[0o755, 0]), &[c"there"])
        .unwrap();
    assert_eq!(timeout(volume, c"there"), Ok((0, false)));
}

#[test]
fn nothing_of_the_host_is_mounted_in_the_namespace() {
    let Some(rig) = Rig::start() else { return };
    let mounts =
        std::fs::read_to_string(format!("/proc/self/task/{}/mountinfo", rig.thread)).unwrap();
    let mut points: Vec<(&str, bool)> = mounts
        .lines()
        .map(|line| line.split(' ').skip(4).take(2))
        .map(|mut fields| {
            (
                fields.next().unwrap(),
                fields.next().unwrap().starts_with("ro,"),
            )
        })
        .collect();
    points.sort_unstable();
    assert_eq!(points, [("/", false), ("/fd", false), ("/trees", true),]);
}

#[test]
fn only_the_capabilities_of_serving_are_kept() {
    let Some(rig) = Rig::start() else { return };
    let status = std::fs::read_to_string(format!("/proc/self/task/{}/status", rig.thread)).unwrap();
    let field = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_whitespace().nth(1).unwrap().to_owned()
    };
    let kept = [0u32, 1, 2, 3, 4, 6, 7]
        .iter()
        .fold(0u64, |set, bit| set | 1 << bit);
    assert_eq!(
        u64::from_str_radix(&field("CapPrm"), 16).unwrap() & !kept,
        0
    );
    assert_eq!(field("CapEff"), field("CapPrm"));
    assert_eq!(u64::from_str_radix(&field("CapBnd"), 16).unwrap(), 0);
    assert_eq!(field("NoNewPrivs"), "1");
}

#[test]
fn the_server_ends_when_the_last_worker_has_no_client() {
    let Some(mut rig) = Rig::start_with(super::rig::BUDGET, 2) else {
        return;
    };
    drop(rig.sockets.pop());
    assert!(rig.lookup(ROOT_ID, c"rw").is_ok());
    rig.end().unwrap();
}

#[test]
fn only_inherited_packet_sockets_are_taken_over() {
    use super::super::sys::inherited_sockets;
    assert!(inherited_sockets(&[0]).is_err());
    assert!(inherited_sockets(&[-1]).is_err());
    assert!(inherited_sockets(&[900_000]).is_err());
    assert!(inherited_sockets(&[5000, 5000]).is_err());
}
