//! A whole file server, and messages to it.

use std::fs;
use std::io::{IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::OnceLock;
use std::time::Duration;

use arbitrary::Arbitrary;
use bulkhead_vmm::fs::{Config, run_in_threads};
use rustix::fs::CWD;
use rustix::mount::{OpenTreeFlags, open_tree};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags,
    SocketType, recv, send, sendmsg, socketpair,
};

/// One message of a guest.
#[derive(Debug, Arbitrary)]
pub struct Message {
    code: u8,
    node: Node,
    caller: u8,
    body: Vec<Part>,
    lie: Option<u16>,
}

/// Which node.
#[derive(Clone, Copy, Debug, Arbitrary)]
enum Node {
    Root,
    /// One that an answer named.
    Seen(u8),
    Any(u64),
}

#[derive(Debug, Arbitrary)]
enum Part {
    Number(u32),
    Long(u64),
    Node(Node),
    Handle(u8),
    Name(Word),
    Bytes(Vec<u8>),
}

/// Names that a guest would try.
#[derive(Clone, Copy, Debug, Arbitrary)]
enum Word {
    ReadOnly,
    Writable,
    File,
    Folder,
    Link,
    New,
    Dot,
    Up,
    Slash,
    Outside,
    Absolute,
    Xattr,
    Empty,
    Long,
}

impl Word {
    fn bytes(self) -> Vec<u8> {
        match self {
            Self::ReadOnly => b"ro".to_vec(),
            Self::Writable => b"rw".to_vec(),
            Self::File => b"file".to_vec(),
            Self::Folder => b"folder".to_vec(),
            Self::Link => b"link".to_vec(),
            Self::New => b"new".to_vec(),
            Self::Dot => b".".to_vec(),
            Self::Up => b"..".to_vec(),
            Self::Slash => b"folder/file".to_vec(),
            Self::Outside => b"../outside".to_vec(),
            Self::Absolute => b"/etc/passwd".to_vec(),
            Self::Xattr => b"user.test".to_vec(),
            Self::Empty => Vec::new(),
            Self::Long => vec![b'n'; 256],
        }
    }
}

struct Server {
    folder: tempfile::TempDir,
    socket: OwnedFd,
    /// The requests for trees: its end does not matter to the server.
    _control: UnixStream,
}

const OPCODES: [u32; 44] = [
    1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 20, 21, 22, 23, 24, 25, 26, 27, 28,
    29, 30, 31, 32, 34, 35, 36, 38, 39, 40, 42, 43, 44, 45, 46, 47, 50, 51,
];
const INIT: u32 = 26;
const LOOKUP: u32 = 1;
const OPEN: [u32; 3] = [14, 27, 35];
/// Nobody answers these: FORGET, BATCH_FORGET, INTERRUPT and the answer to a notification.
const UNANSWERED: [u32; 4] = [2, 42, 36, 41];

fn server() -> &'static Server {
    static SERVER: OnceLock<Server> = OnceLock::new();
    SERVER.get_or_init(|| {
        assert!(
            rustix::process::geteuid().is_root(),
            "the target `fuse` needs root"
        );
        let folder = tempfile::tempdir().expect("a folder");
        let at = |below: &str| folder.path().join(below);
        for name in ["ro", "rw", "state", "ro/folder", "rw/folder"] {
            fs::create_dir(at(name)).expect("a folder");
        }
        for name in ["ro/file", "ro/folder/file", "outside"] {
            fs::write(at(name), "canary").expect("a file");
        }
        std::os::unix::fs::symlink("../outside", at("ro/link")).expect("a link");
        std::os::unix::fs::symlink(at("outside"), at("rw/link")).expect("a link");
        let (socket, theirs) = socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .expect("sockets");
        set_socket_timeout(&socket, Timeout::Recv, Some(Duration::from_secs(20)))
            .expect("a timeout");
        let config = Config {
            state_dir: at("state"),
            workers: vec![theirs],
        };
        std::thread::spawn(move || run_in_threads(config).expect("a server"));
        let control = loop {
            match UnixStream::connect(at("state/fs.sock")) {
                Ok(control) => break control,
                Err(_) => std::thread::sleep(Duration::from_millis(5)),
            }
        };
        add(&control, "ro", &at("ro"), true);
        add(&control, "rw", &at("rw"), false);
        Server {
            folder,
            socket,
            _control: control,
        }
    })
}

fn add(control: &UnixStream, id: &str, path: &Path, readonly: bool) {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_RECURSIVE;
    let mount = open_tree(CWD, path, flags).expect("a tree");
    let line = format!("{{\"op\":\"add\",\"id\":\"{id}\",\"readonly\":{readonly}}}\n");
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let descriptors = [mount.as_fd()];
    ancillary.push(SendAncillaryMessage::ScmRights(&descriptors));
    sendmsg(
        control,
        &[IoSlice::new(line.as_bytes())],
        &mut ancillary,
        SendFlags::NOSIGNAL,
    )
    .expect("a request");
    let mut answer = [0; 256];
    let length = (&*control).read(&mut answer).expect("an answer");
    assert!(
        answer[..length].starts_with(b"{\"ok\""),
        "{}",
        String::from_utf8_lossy(&answer)
    );
}

struct Session {
    server: &'static Server,
    unique: u64,
    nodes: Vec<u64>,
    handles: Vec<u64>,
}

impl Session {
    /// Sends one message. If it needs an answer, that must come, and must be one.
    fn call(
        &mut self,
        code: u32,
        node: u64,
        caller: u32,
        body: &[u8],
        lie: Option<u16>,
    ) -> Option<Vec<u8>> {
        self.unique += 1;
        let length = 40 + body.len();
        let said = lie.map_or(length as u32, u32::from);
        let mut message = Vec::with_capacity(length);
        message.extend(said.to_ne_bytes());
        message.extend(code.to_ne_bytes());
        message.extend(self.unique.to_ne_bytes());
        message.extend(node.to_ne_bytes());
        message.extend(caller.to_ne_bytes());
        message.extend(caller.to_ne_bytes());
        message.extend(1u64.to_ne_bytes());
        message.extend(body);
        send(&self.server.socket, &message, SendFlags::NOSIGNAL).expect("the server lives");
        if UNANSWERED.contains(&code) {
            return None;
        }
        let mut answer = vec![0; 2 << 20];
        let (_, length) = recv(
            &self.server.socket,
            answer.as_mut_slice(),
            RecvFlags::empty(),
        )
        .expect("an answer");
        answer.truncate(length);
        assert!(length >= 16, "an answer of {length} bytes to {code}");
        assert_eq!(
            answer[..4],
            (length as u32).to_ne_bytes(),
            "the answer's length"
        );
        assert_eq!(
            answer[8..16],
            self.unique.to_ne_bytes(),
            "whose answer it is"
        );
        let error = i32::from_ne_bytes(answer[4..8].try_into().expect("four bytes"));
        assert!((-4095..=0).contains(&error), "error {error}");
        let body = answer.split_off(16);
        assert!(error == 0 || body.is_empty(), "an error with a body");
        (error == 0).then_some(body)
    }

    fn node(&self, node: Node) -> u64 {
        match node {
            Node::Root => 1,
            Node::Seen(at) => self.nodes[usize::from(at) % self.nodes.len()],
            Node::Any(id) => id,
        }
    }

    fn body(&self, parts: &[Part]) -> Vec<u8> {
        let mut body = Vec::new();
        for part in parts {
            match part {
                Part::Number(number) => body.extend(number.to_ne_bytes()),
                Part::Long(number) => body.extend(number.to_ne_bytes()),
                Part::Node(node) => body.extend(self.node(*node).to_ne_bytes()),
                Part::Handle(at) => {
                    let handle = self
                        .handles
                        .get(usize::from(*at) % self.handles.len().max(1));
                    body.extend(handle.copied().unwrap_or(1).to_ne_bytes());
                }
                Part::Name(word) => {
                    body.extend(word.bytes());
                    body.push(0);
                }
                Part::Bytes(bytes) => body.extend(bytes),
            }
        }
        body
    }
}

/// Sends a guest's messages in a session of their own, then looks at the files of the host.
pub fn send_all(messages: &[Message]) {
    let mut session = Session {
        server: server(),
        unique: 1,
        nodes: vec![1],
        handles: Vec::new(),
    };
    let mut init = Vec::new();
    for number in [7, 38, 1 << 20, u32::MAX, 0] {
        init.extend(u32::to_ne_bytes(number));
    }
    init.resize(64, 0);
    session.call(INIT, 0, 0, &init, None);
    for name in ["ro\0", "rw\0"] {
        let entry = session
            .call(LOOKUP, 1, 0, name.as_bytes(), None)
            .expect("a tree");
        session
            .nodes
            .push(u64::from_ne_bytes(entry[..8].try_into().expect("a node")));
    }
    for message in messages.iter().take(64) {
        let code = OPCODES[usize::from(message.code) % OPCODES.len()];
        let (node, body) = (session.node(message.node), session.body(&message.body));
        // Sessions of the fuzzer's begin with INIT alone.
        if code == INIT {
            continue;
        }
        let caller = [0, 0, 1000, u32::MAX][usize::from(message.caller) % 4];
        let Some(answer) = session.call(code, node, caller, &body, message.lie) else {
            continue;
        };
        let first = answer
            .first_chunk()
            .map_or(0, |first| u64::from_ne_bytes(*first));
        match code {
            LOOKUP | 6 | 8 | 9 | 13 | 35 if first != 0 && session.nodes.len() < 256 => {
                session.nodes.push(first)
            }
            _ => {}
        }
        if OPEN.contains(&code) && session.handles.len() < 256 {
            let at = if code == 35 {
                answer.len().saturating_sub(16)
            } else {
                0
            };
            let handle = answer.get(at..).and_then(|rest| rest.first_chunk());
            session
                .handles
                .extend(handle.map(|handle| u64::from_ne_bytes(*handle)));
        }
    }
    let at = |below: &str| session.server.folder.path().join(below);
    for name in ["ro/file", "ro/folder/file", "outside"] {
        assert_eq!(
            fs::read(at(name)).ok().as_deref(),
            Some(&b"canary"[..]),
            "{name} has changed"
        );
    }
    assert_eq!(
        fs::read_dir(at("ro")).expect("the tree").count(),
        3,
        "the read-only tree has changed"
    );
    let kept = ["outside", "ro", "rw", "state"];
    for entry in fs::read_dir(session.server.folder.path()).expect("the folder") {
        let name = entry.expect("an entry").file_name();
        assert!(
            kept.iter().any(|kept| *kept == name),
            "{name:?} came out of a tree"
        );
    }
}
