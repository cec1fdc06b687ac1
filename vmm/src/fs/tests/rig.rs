//! A running server with a read-only tree `ro`, a writable tree `rw` and a client at its socket.

use std::ffi::CStr;
use std::io::{IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::fs::CWD;
use rustix::io::Errno;
use rustix::mount::{OpenTreeFlags, open_tree};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags,
    SocketType, recv, send, sendmsg, socketpair,
};

use super::super::abi::{ENTRY_OUT, IN_HEADER, OUT_HEADER, ROOT_ID, init, opcode};
use super::super::inodes::Limits;
use super::super::run::{Config, run_within};
use super::super::server::Budget;
use super::super::worker::prepare;
use crate::limits;

pub struct Rig {
    pub dir: tempfile::TempDir,
    pub sockets: Vec<OwnedFd>,
    pub control: UnixStream,
    pub thread: u32,
    unique: AtomicU64,
    server: JoinHandle<Result<(), super::super::Error>>,
}

pub const BUDGET: Budget = Budget {
    inodes: Limits {
        inodes: 1000,
        descriptors: 500,
    },
    handles: 100,
};

/// A body of 32-bit numbers.
pub fn u32s(values: &[u32]) -> Vec<u8> {
    values
        .iter()
        .flat_map(|value| value.to_ne_bytes())
        .collect()
}

/// A body of 64-bit numbers.
pub fn u64s(values: &[u64]) -> Vec<u8> {
    values
        .iter()
        .flat_map(|value| value.to_ne_bytes())
        .collect()
}

/// The 64-bit number at `offset`.
pub fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    u64::from_ne_bytes(bytes[offset..offset + 8].try_into().unwrap())
}

/// The 32-bit number at `offset`.
pub fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    u32::from_ne_bytes(bytes[offset..offset + 4].try_into().unwrap())
}

/// What a page of READDIR (`skip` 0) or READDIRPLUS (`skip` [`ENTRY_OUT`]) lists: where each entry begins, and its name.
pub fn listed(page: &[u8], skip: usize) -> Vec<(usize, String)> {
    let (mut at, mut entries) = (0, Vec::new());
    while at < page.len() {
        let dirent = at + skip;
        let len = u32_at(page, dirent + 16) as usize;
        let name = String::from_utf8_lossy(&page[dirent + 24..dirent + 24 + len]);
        entries.push((at, name.into_owned()));
        at = dirent + (24 + len).next_multiple_of(8);
    }
    entries
}

/// Writes at the beginning.
pub fn write(rig: &Rig, node: u64, handle: u64, data: &[u8]) -> Result<Vec<u8>, Errno> {
    let mut body = u64s(&[handle, 0]);
    body.extend(u32s(&[
        u32::try_from(data.len()).unwrap(),
        0,
        0,
        0,
        libc::O_RDWR.cast_unsigned(),
        0,
    ]));
    body.extend_from_slice(data);
    rig.call(opcode::WRITE, node, &body)
}

/// A request with a right header.
pub fn message(unique: u64, (uid, gid): (u32, u32), code: u32, node: u64, body: &[u8]) -> Vec<u8> {
    let mut message = u32s(&[u32::try_from(IN_HEADER + body.len()).unwrap(), code]);
    message.extend(u64s(&[unique, node]));
    message.extend(u32s(&[uid, gid, 1, 0]));
    message.extend_from_slice(body);
    message
}

impl Rig {
    /// A server with one worker and a session begun; `None` without root.
    pub fn start() -> Option<Self> {
        Self::start_with(BUDGET, 1)
    }

    pub fn start_with(budget: Budget, workers: usize) -> Option<Self> {
        let rig = Self::start_bare(budget, workers)?;
        rig.add("ro", &rig.path("ro"), r#""readonly":true"#)
            .unwrap();
        rig.add("rw", &rig.path("rw"), r#""readonly":false"#)
            .unwrap();
        rig.begin();
        Some(rig)
    }

    pub fn start_bare(budget: Budget, workers: usize) -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: needs root");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        for folder in ["ro", "rw", "state"] {
            std::fs::create_dir(dir.path().join(folder)).unwrap();
        }
        std::fs::write(dir.path().join("ro/file"), "read only").unwrap();
        std::fs::write(dir.path().join("outside"), "secret").unwrap();
        let (mut sockets, mut theirs) = (Vec::new(), Vec::new());
        for _ in 0..workers {
            let flags = SocketFlags::CLOEXEC;
            let (ours, other) =
                socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
            prepare(&ours).unwrap();
            set_socket_timeout(&ours, Timeout::Recv, Some(Duration::from_secs(60))).unwrap();
            sockets.push(ours);
            theirs.push(other);
        }
        let state_dir = dir.path().join("state");
        let config = Config {
            state_dir: state_dir.clone(),
            workers: theirs,
        };
        let (tell, told) = mpsc::channel();
        let server = std::thread::spawn(move || {
            let thread = rustix::thread::gettid().as_raw_nonzero().get();
            tell.send(thread.cast_unsigned()).unwrap();
            run_within(config, budget)
        });
        let thread = told.recv().unwrap();
        let control = loop {
            assert!(!server.is_finished(), "{:?}", server.join());
            match UnixStream::connect(state_dir.join("fs.sock")) {
                Ok(control) => break control,
                Err(_) => std::thread::sleep(Duration::from_millis(5)),
            }
        };
        Some(Self {
            dir,
            sockets,
            control,
            thread,
            unique: AtomicU64::new(1),
            server,
        })
    }

    /// A host path below the test's folder.
    pub fn path(&self, below: &str) -> PathBuf {
        self.dir.path().join(below)
    }

    /// One control request.
    pub fn request(&self, line: &str, descriptors: &[BorrowedFd<'_>]) -> Result<(), String> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() {
            ancillary.push(SendAncillaryMessage::ScmRights(descriptors));
        }
        let line = format!("{line}\n");
        sendmsg(
            &self.control,
            &[IoSlice::new(line.as_bytes())],
            &mut ancillary,
            SendFlags::NOSIGNAL,
        )
        .unwrap();
        let mut answer = String::new();
        let mut byte = [0];
        while (&self.control).read(&mut byte).unwrap() == 1 && byte[0] != b'\n' {
            answer.push(char::from(byte[0]));
        }
        let answer: serde_json::Value = serde_json::from_str(&answer).unwrap();
        match answer["error"].as_str() {
            Some(error) => Err(error.to_owned()),
            None => {
                assert_eq!(answer["ok"], serde_json::json!({}));
                Ok(())
            }
        }
    }

    /// Adds a host folder as a tree; `keys` are further keys of the request.
    pub fn add(&self, id: &str, path: &Path, keys: &str) -> Result<(), String> {
        let flags = OpenTreeFlags::OPEN_TREE_CLONE
            | OpenTreeFlags::OPEN_TREE_CLOEXEC
            | OpenTreeFlags::AT_RECURSIVE;
        let mount = open_tree(CWD, path, flags).unwrap();
        self.request(
            &format!(r#"{{"op":"add","id":"{id}",{keys}}}"#),
            &[mount.as_fd()],
        )
    }

    /// Begins a session and returns the answer to FUSE_INIT.
    pub fn begin(&self) -> Vec<u8> {
        let mut body = u32s(&[7, 38, 1 << 20, init::SUPPORTED as u32 | 1 << 3, 0]);
        body.resize(64, 0);
        self.call(opcode::INIT, 0, &body).unwrap()
    }

    pub fn send(&self, bytes: &[u8]) {
        send(&self.sockets[0], bytes, SendFlags::NOSIGNAL).unwrap();
    }

    /// The next answer: its unique number, its error, its body.
    pub fn receive(&self) -> (u64, i32, Vec<u8>) {
        let mut buffer = vec![0; limits::FS_MESSAGE];
        let (_, len) =
            recv(&self.sockets[0], buffer.as_mut_slice(), RecvFlags::empty()).expect("an answer");
        buffer.truncate(len);
        assert_eq!(u32_at(&buffer, 0) as usize, len, "length in the header");
        (
            u64_at(&buffer, 8),
            u32_at(&buffer, 4).cast_signed(),
            buffer.split_off(OUT_HEADER),
        )
    }

    /// One FUSE request as root.
    pub fn call(&self, code: u32, node: u64, body: &[u8]) -> Result<Vec<u8>, Errno> {
        self.call_as((0, 0), code, node, body)
    }

    /// One FUSE request.
    pub fn call_as(
        &self,
        who: (u32, u32),
        code: u32,
        node: u64,
        body: &[u8],
    ) -> Result<Vec<u8>, Errno> {
        let unique = self.unique.fetch_add(1, Ordering::Relaxed);
        self.send(&message(unique, who, code, node, body));
        let (answered, error, body) = self.receive();
        assert_eq!(answered, unique);
        if error == 0 {
            Ok(body)
        } else {
            Err(Errno::from_raw_os_error(-error))
        }
    }

    /// A request whose body ends with names.
    pub fn named(
        &self,
        code: u32,
        node: u64,
        mut body: Vec<u8>,
        names: &[&CStr],
    ) -> Result<Vec<u8>, Errno> {
        names
            .iter()
            .for_each(|name| body.extend_from_slice(name.to_bytes_with_nul()));
        self.call(code, node, &body)
    }

    /// Looks a name up: node id and mode. Node 0 is "there is none".
    pub fn lookup(&self, dir: u64, name: &CStr) -> Result<(u64, u32), Errno> {
        let entry = self.named(opcode::LOOKUP, dir, Vec::new(), &[name])?;
        assert_eq!(entry.len(), ENTRY_OUT);
        match u64_at(&entry, 0) {
            0 => Err(Errno::NOENT),
            id => Ok((id, u32_at(&entry, 40 + 60))),
        }
    }

    /// The node of the tree `name`.
    pub fn tree(&self, name: &CStr) -> u64 {
        self.lookup(ROOT_ID, name).unwrap().0
    }

    /// Opens a node: its handle.
    pub fn open(&self, node: u64, flags: i32) -> Result<u64, Errno> {
        let opened = self.call(opcode::OPEN, node, &u32s(&[flags.cast_unsigned(), 0]))?;
        Ok(u64_at(&opened, 0))
    }

    /// Reads from the start.
    pub fn read(&self, node: u64, handle: u64, size: u32) -> Result<Vec<u8>, Errno> {
        let mut body = u64s(&[handle, 0]);
        body.extend(u32s(&[size, 0, 0, 0, 0, 0]));
        self.call(opcode::READ, node, &body)
    }

    /// Closes the client's end and waits for the server's.
    pub fn end(self) -> Result<(), super::super::Error> {
        drop(self.sockets);
        self.server.join().unwrap()
    }
}
