//! FUSE requests that no kernel makes, to the real file server.

use crate::device::{DATA, Device, FS, ROOM};
use crate::machine::{Random, put, read, write, zeros};
use crate::{breach, done};

const QUEUE: u32 = 1;
const HEADER: u32 = 40;
const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const SETATTR: u32 = 4;
const SYMLINK: u32 = 6;
const MKNOD: u32 = 8;
const MKDIR: u32 = 9;
const UNLINK: u32 = 10;
const OPEN: u32 = 14;
const READ: u32 = 15;
const WRITE: u32 = 16;
const SETXATTR: u32 = 21;
const INIT: u32 = 26;
const OPENDIR: u32 = 27;
const CREATE: u32 = 35;
const BATCH_FORGET: u32 = 42;

/// A request: opcode, node, and a body in pieces. The answer's error, or `None` if there was no answer.
fn call(device: &Device, code: u32, node: u64, body: &[&[u8]]) -> Option<i32> {
    let mut at = DATA + u64::from(HEADER);
    for piece in body {
        put(at, piece);
        at += piece.len() as u64;
    }
    let len = (at - DATA) as u32;
    header(len, code, node);
    sent(device, len)
}

fn header(len: u32, code: u32, node: u64) {
    write(DATA, len);
    write(DATA + 4, code);
    write(DATA + 8, 77u64);
    write(DATA + 16, node);
    write(DATA + 24, 0u64);
    write(DATA + 32, 1u64);
}

fn sent(device: &Device, len: u32) -> Option<i32> {
    put(ROOM, &zeros::<128>());
    device
        .request_at(QUEUE, DATA, len, 0x2_0000)
        .then(|| read(ROOM + 4))
}

/// Begins a session with a device that has been set up.
pub fn begin(device: &Device) -> bool {
    let mut init = zeros::<64>();
    (init[0], init[4]) = (7, 38);
    init[8..16].copy_from_slice(&[0, 0, 16, 0, 0xff, 0xff, 0xff, 0x0f]);
    call(device, INIT, 0, &[&init]) == Some(0)
}

fn lookup(device: &Device, node: u64, name: &[u8]) -> Option<u64> {
    let found = call(device, LOOKUP, node, &[name, b"\0"]) == Some(0);
    let node: u64 = read(ROOM + 16);
    (found && node != 0).then_some(node)
}

/// What must be refused, and was not, or killed the session.
fn refused(device: &Device, name: &str, code: u32, node: u64, body: &[&[u8]]) {
    match call(device, code, node, body) {
        Some(0) => breach(name, node),
        answer => done(FS, name, answer.is_some()),
    }
}

/// Any answer is right, but there must be one.
fn answered(device: &Device, name: &str, code: u32, node: u64, body: &[&[u8]]) -> bool {
    let answer = call(device, code, node, body);
    done(FS, name, answer.is_some());
    answer == Some(0)
}

/// All of them.
pub fn attack(device: &Device) {
    device.start();
    if !begin(device) {
        return done(FS, "the first request", false);
    }
    names(device);
    nodes(device);
    shapes(device);
    for number in 0..4u8 {
        let tree = [b't', b'0' + number];
        if let Some(node) = lookup(device, 1, &tree) {
            inside(device, node);
        }
    }
    done(FS, "all of it", device.lives());
}

fn names(device: &Device) {
    let long = [b'n'; 256];
    let bad: [&[u8]; 9] = [
        b"..",
        b".",
        b"/",
        b"../..",
        b"t0/..",
        b"/etc/passwd",
        b"",
        b"t0\0x",
        &long,
    ];
    for name in bad {
        refused(device, "a name that is none", LOOKUP, 1, &[name, b"\0"]);
    }
    refused(device, "a name without an end", LOOKUP, 1, &[b"t0"]);
    refused(
        device,
        "a file in the root",
        CREATE,
        1,
        &[&[2, 0, 0, 0], &[0; 12], b"x\0"],
    );
    refused(
        device,
        "a folder in the root",
        MKDIR,
        1,
        &[&[0xff; 8], b"x\0"],
    );
}

fn nodes(device: &Device) {
    for node in [
        0,
        2,
        1 << 16,
        1 << 32,
        (1 << 32) + 1,
        u64::MAX - 1,
        u64::MAX,
    ] {
        for code in [
            LOOKUP, 3, SETATTR, 5, OPEN, READ, WRITE, OPENDIR, UNLINK, 28, 45,
        ] {
            let big = [1u8; 160];
            answered(device, "a node that nobody named", code, node, &[&big]);
        }
    }
    for count in [0, 1, u64::MAX] {
        header(HEADER + 8, FORGET, 1);
        write(DATA + 40, count);
        done(
            FS,
            "the root forgotten",
            device.request_at(QUEUE, DATA, HEADER + 8, 0),
        );
    }
    header(HEADER + 8, BATCH_FORGET, 0);
    write(DATA + 40, u64::MAX);
    done(
        FS,
        "more forgotten than told",
        device.request_at(QUEUE, DATA, HEADER + 8, 0),
    );
    answered(device, "the root after that", 3, 1, &[&[0; 16]]);
}

/// Messages of every opcode and of lengths that are lies.
fn shapes(device: &Device) {
    for code in (0..64).chain([100, 4096, u32::MAX]) {
        // These have no answer, and DESTROY ends the session.
        if [FORGET, BATCH_FORGET, 36, 38, 41].contains(&code) {
            continue;
        }
        answered(device, "an opcode with nothing", code, 1, &[]);
        answered(device, "an opcode with too much", code, 1, &[&[0xff; 300]]);
    }
    for said in [0, 1, 39, 41, 0x10_1001, u32::MAX] {
        header(said, 3, 1);
        done(FS, "a length that is a lie", sent(device, HEADER).is_some());
    }
    for len in [1, 16, 39] {
        header(len, 3, 1);
        done(FS, "half a header", sent(device, len).is_some());
    }
    header(0x10_2000, WRITE, 1);
    done(
        FS,
        "more than a message holds",
        sent(device, 0x10_2000).is_some(),
    );
    // No room for the answer, or for half of its header.
    for room in [0, 1, 15] {
        header(HEADER + 16, 3, 1);
        done(
            FS,
            "no room for an answer",
            device.request_at(QUEUE, DATA, HEADER + 16, room),
        );
    }
    let mut random = Random(0x1234_5678_9abc_def1);
    for _ in 0..100 {
        for at in (0..96).step_by(8) {
            write(
                DATA + 40 + at,
                random.next() & random.next() & random.next(),
            );
        }
        let code = (random.next() % 52) as u32;
        if [FORGET, BATCH_FORGET, INIT, 36, 38, 41].contains(&code) {
            continue;
        }
        let len = HEADER + (random.next() % 96) as u32;
        header(len, code, random.next() % 4);
        done(FS, "a message at random", sent(device, len).is_some());
    }
    done(FS, "a session anew", begin(device));
}

/// A tree that the host serves: nothing but the tree may be reached from there.
fn inside(device: &Device, tree: u64) {
    for name in [&b".."[..], b".", b"../beside", b"within/..", b"/etc"] {
        refused(device, "out of a tree", LOOKUP, tree, &[name, b"\0"]);
    }
    // A link is text for the guest; the server follows none.
    if let Some(link) = lookup(device, tree, b"link") {
        refused(device, "through a link", LOOKUP, link, &[b"x\0"]);
        refused(device, "a link opened", OPEN, link, &[&[0; 8]]);
        refused(device, "a link as a folder", OPENDIR, link, &[&[0; 8]]);
    }
    if answered(
        device,
        "a link to the host's root",
        SYMLINK,
        tree,
        &[b"out\0/\0"],
    ) {
        if let Some(out) = lookup(device, tree, b"out") {
            refused(device, "through a link of ours", LOOKUP, out, &[b"etc\0"]);
            refused(device, "a link of ours opened", OPENDIR, out, &[&[0; 8]]);
        }
        answered(device, "the link goes", UNLINK, tree, &[b"out\0"]);
    }
    // S_IFCHR | 0666, the host's memory (1:1); then opened.
    let device_node = [0xb6, 0x21, 0, 0, 0x01, 0x01, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    if answered(
        device,
        "a device node",
        MKNOD,
        tree,
        &[&device_node, b"mem\0"],
    ) {
        if let Some(node) = lookup(device, tree, b"mem") {
            refused(
                device,
                "a device node opened",
                OPEN,
                node,
                &[&[2, 0, 0, 0, 0, 0, 0, 0]],
            );
        }
        answered(device, "the node goes", UNLINK, tree, &[b"mem\0"]);
    }
    let Some(file) = lookup(device, tree, b"within") else {
        return;
    };
    // The canary is read-only for this pod, by every way.
    refused(
        device,
        "written, read-only",
        OPEN,
        file,
        &[&[1, 0, 0, 0, 0, 0, 0, 0]],
    );
    // It may be opened, since a truncation comes as a SETATTR; the canary tells whether it was cut.
    answered(
        device,
        "cut, read-only",
        OPEN,
        file,
        &[&[0, 2, 0, 0, 0, 0, 0, 0]],
    );
    refused(device, "removed, read-only", UNLINK, tree, &[b"within\0"]);
    let mut size = zeros::<88>();
    size[0] = 8;
    refused(device, "shortened, read-only", SETATTR, file, &[&size]);
    size[0] = 1;
    refused(device, "its mode, read-only", SETATTR, file, &[&size]);
    for len in [1u32, 0x1_0000, 0x1_0001, u32::MAX] {
        let head = [&len.to_le_bytes()[..], &[0; 12], b"user.x\0", &[b'v'; 64]];
        refused(device, "an attribute, read-only", SETXATTR, file, &head);
    }
    exhaust(device, file);
}

/// Handles and files until the server has none left, which it must say, and go on.
fn exhaust(device: &Device, file: u64) {
    let mut open = 0u64;
    for _ in 0..300 {
        match call(device, OPEN, file, &[&[0; 8]]) {
            Some(0) => open = read(ROOM + 16),
            Some(_) => break,
            None => return done(FS, "many open files", false),
        }
    }
    done(FS, "many open files", true);
    for handle in [open, 0, 1 << 40, u64::MAX] {
        for size in [0u32, 1 << 20, u32::MAX] {
            let body = [
                &handle.to_le_bytes()[..],
                &u64::MAX.to_le_bytes(),
                &size.to_le_bytes(),
                &[0; 20],
            ];
            answered(device, "a read of anything", READ, file, &body);
            refused(
                device,
                "a write of nothing we hold",
                WRITE,
                file,
                &[body[0], body[1], &[0; 24], b""],
            );
        }
    }
}
