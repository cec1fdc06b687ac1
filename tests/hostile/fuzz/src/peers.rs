//! The devices, and what is on the host's side of each.

use std::fs::File;
use std::io::{IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use bulkhead_vmm::config::BlockConfig;
use bulkhead_vmm::machine::end::end_channel;
use bulkhead_vmm::virtio::fs::Fs;
use bulkhead_vmm::virtio::net::{Attachment, Net, Rate, Slot as NetSlot};
use bulkhead_vmm::virtio::balloon::Balloon;
use bulkhead_vmm::virtio::rng::Rng;
use bulkhead_vmm::virtio::vsock::{Uplink, Vsock};
use bulkhead_vmm::virtio::{VirtioDevice, block};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags, SocketFlags,
    SocketType, recv, recvmsg, send, socketpair,
};
use vmm_sys_util::eventfd::EventFd;

use crate::Kind;

const SECTORS: u64 = 8;

/// The host's side of a device.
pub enum Host {
    /// Nothing.
    None,
    /// The disk behind a device that may only read it.
    Disk(File),
    /// A folder with the device's socket, the shim's end of its uplink, and clients.
    Sockets {
        /// The folder.
        folder: tempfile::TempDir,
        /// The guest's connections to port 1026 come here.
        uplink: OwnedFd,
        /// Everything that is open.
        streams: Vec<UnixStream>,
    },
    /// The file server's side, and the thread that answers.
    Server(Option<std::thread::JoinHandle<()>>, EventFd),
}

/// A device with its other side.
pub fn device(kind: Kind) -> (Box<dyn VirtioDevice>, Host) {
    match kind {
        Kind::Rng => (Box::<Rng>::default(), Host::None),
        Kind::Balloon => (Box::<Balloon>::default(), Host::None),
        Kind::Block => disk(),
        Kind::Net => net(),
        Kind::Vsock => vsock(),
        Kind::FsDevice => fs(),
    }
}

fn memory_file() -> File {
    let flags = rustix::fs::MemfdFlags::CLOEXEC;
    let file = File::from(rustix::fs::memfd_create("disk", flags).expect("a file in memory"));
    file.set_len(SECTORS * 512).expect("its size");
    file
}

fn disk() -> (Box<dyn VirtioDevice>, Host) {
    static TURN: AtomicU64 = AtomicU64::new(0);
    let readonly = TURN.fetch_add(1, Ordering::Relaxed) % 2 == 0;
    let file = memory_file();
    let config = BlockConfig {
        id: "disk".into(),
        path: None,
        readonly,
    };
    let slot = block::Slot::new(&config).expect("a slot");
    slot.attach(file.try_clone().expect("a descriptor"))
        .expect("a disk");
    let host = if readonly {
        Host::Disk(file)
    } else {
        Host::None
    };
    (Box::new(block::Block::new(slot)), host)
}

/// The tap's namespace is that of the fuzzer's thread. Without the right to make one, the slot stays empty.
fn tap() -> Option<OwnedFd> {
    static TAP: OnceLock<Option<OwnedFd>> = OnceLock::new();
    let tap = TAP.get_or_init(|| {
        // SAFETY: CLONE_NEWNET does not part descriptors.
        unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) }.ok()?;
        let file = File::options()
            .read(true)
            .write(true)
            .open("/dev/net/tun")
            .ok()?;
        // SAFETY: plain bytes.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        request.ifr_ifru.ifru_flags = flags as libc::c_short;
        // SAFETY: TUNSETIFF reads and writes one `ifreq`.
        let made = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
        (made == 0).then(|| file.into())
    });
    tap.as_ref()?.try_clone().ok()
}

fn net() -> (Box<dyn VirtioDevice>, Host) {
    let slot = NetSlot::new("n0", [2, 0, 0, 0, 0, 1], 1, false);
    if let Some(tap) = tap() {
        let attachment = Attachment {
            mac: [2, 0, 0, 0, 0, 2],
            rate: Rate::default(),
            taps: vec![tap],
            vhosts: Vec::new(),
        };
        slot.attach(attachment).expect("a tap");
    }
    (Box::new(Net::new(slot)), Host::None)
}

fn vsock() -> (Box<dyn VirtioDevice>, Host) {
    let folder = tempfile::tempdir_in("/dev/shm").expect("a folder");
    let socket = folder.path().join("vsock.sock");
    let flags = SocketFlags::CLOEXEC;
    let (ours, uplink) =
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).expect("sockets");
    let way = Uplink::new(vec![1026], Some(ours));
    let device = Vsock::new(3, &socket, way, Box::new(|| ())).expect("a device");
    let streams = Vec::new();
    (
        Box::new(device),
        Host::Sockets {
            folder,
            uplink,
            streams,
        },
    )
}

fn fs() -> (Box<dyn VirtioDevice>, Host) {
    let (ours, theirs) = socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )
    .expect("sockets");
    let (sender, _receiver) = end_channel();
    let device = Fs::new("pod", vec![ours], sender).expect("a device");
    let says = EventFd::new(vmm_sys_util::eventfd::EFD_NONBLOCK).expect("an event");
    let heard = says.try_clone().expect("an event");
    let thread = std::thread::spawn(move || answer(&theirs, &heard));
    (Box::new(device), Host::Server(Some(thread), says))
}

/// Answers a request with its own bytes behind a header that is right, unless the fuzzer wants it wrong.
fn answer(socket: &OwnedFd, wrong: &EventFd) {
    let mut message = vec![0; 2 << 20];
    while let Ok((_, length)) = recv(socket.as_fd(), message.as_mut_slice(), RecvFlags::empty()) {
        if length == 0 {
            return;
        }
        let body = length.clamp(16, 64);
        let lie = wrong.read().unwrap_or(0) as u32;
        let unique = message[8..16].to_vec();
        message[..4].copy_from_slice(&(body as u32).wrapping_add(lie & 0xff).to_ne_bytes());
        message[4..8].copy_from_slice(&(lie >> 8).to_ne_bytes());
        message[8..16].copy_from_slice(&unique);
        if send(socket.as_fd(), &message[..body], SendFlags::NOSIGNAL).is_err() {
            return;
        }
    }
}

/// A connection of the guest's that has come.
fn arrived(uplink: &OwnedFd) -> Option<UnixStream> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut port = [0; 4];
    let mut parts = [IoSliceMut::new(&mut port)];
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    recvmsg(uplink, &mut parts, &mut ancillary, flags).ok()?;
    let RecvAncillaryMessage::ScmRights(mut sockets) = ancillary.drain().next()? else {
        return None;
    };
    sockets.next().map(UnixStream::from)
}

/// The queue that a device takes requests from.
pub fn request_queue(kind: Kind) -> u8 {
    match kind {
        Kind::Rng | Kind::Block => 0,
        // Reports are buffers that the device may write, which is the room of a request.
        Kind::Balloon => 2,
        Kind::Net | Kind::Vsock | Kind::FsDevice => 1,
    }
}

/// A request whose shape is right; what it asks for is the fuzzer's.
pub fn request(kind: Kind, operation: u8, one: u32, two: u32, data: &[u8]) -> Vec<u8> {
    let mut message = Vec::new();
    match kind {
        Kind::Rng | Kind::Balloon => {}
        // Type, reserved, sector.
        Kind::Block => {
            let kinds = [0, 1, 4, 8, 11, 13, one, two];
            message.extend(kinds[usize::from(operation % 8)].to_le_bytes());
            message.extend([0; 4]);
            message.extend(u64::from(two % 16).to_le_bytes());
            if operation & 8 != 0 {
                message.resize(16 + 512, operation);
            }
        }
        // Flags, kind of segmentation, lengths; then the frame's addresses.
        Kind::Net => {
            message.extend([
                operation & 3,
                [0, 1, 3, 4, 5, 0x81][usize::from(operation >> 2) % 6],
            ]);
            message.extend(one.to_le_bytes());
            message.extend(two.to_le_bytes());
            message.extend([0, 0]);
            message.extend([0xff; 6]);
            message.extend([2, 0, 0, 0, 0, if operation & 0x80 == 0 { 2 } else { 3 }]);
            message
                .extend([[8, 0], [0x86, 0xdd], [0x81, 0], [8, 6]][usize::from(operation >> 5) % 4]);
        }
        Kind::Vsock => {
            let ports = [
                1024,
                1025,
                1026,
                1027,
                1 << 30,
                (1 << 30) + 1,
                (1 << 30) + 2,
                one >> 8,
            ];
            message.extend(3u64.to_le_bytes());
            message.extend(
                if operation & 0x80 == 0 {
                    2u64
                } else {
                    one.into()
                }
                .to_le_bytes(),
            );
            message.extend(ports[(one & 7) as usize].to_le_bytes());
            message.extend(ports[(one >> 3 & 7) as usize].to_le_bytes());
            let length = if one & 64 == 0 {
                data.len() as u32
            } else {
                two
            };
            message.extend(length.to_le_bytes());
            message.extend(if one & 128 == 0 { 1u16 } else { two as u16 }.to_le_bytes());
            message.extend(u16::from(operation & 15).to_le_bytes());
            message.extend((one >> 8 & 3).to_le_bytes());
            message.extend((if one & 1024 == 0 { 1 << 18 } else { two }).to_le_bytes());
            message.extend((if one & 2048 == 0 { 0 } else { two }).to_le_bytes());
        }
        Kind::FsDevice => {
            let length = if one & 7 == 7 {
                two
            } else {
                40 + data.len() as u32
            };
            message.extend(length.to_le_bytes());
            message.extend((one >> 3 & 63).to_le_bytes());
            message.extend(u64::from(two).to_le_bytes());
            message.resize(40, operation);
        }
    }
    message.extend(data);
    message
}

impl Host {
    /// Something happens, chosen by the fuzzer.
    pub fn act(&mut self, what: u8) {
        match self {
            Self::Sockets {
                folder,
                uplink,
                streams,
            } => match what % 6 {
                0 => {
                    streams.extend(arrived(uplink));
                }
                1 if streams.len() < 64 => {
                    if let Ok(mut stream) = UnixStream::connect(folder.path().join("vsock.sock")) {
                        let _ = stream.set_nonblocking(true);
                        let _ = stream.write_all(b"CONNECT 1024\n");
                        streams.push(stream);
                    }
                }
                2 => {
                    for stream in streams {
                        let _ = stream.write(&[what; 300]);
                    }
                }
                3 => {
                    for stream in streams {
                        let _ = stream.read(&mut [0; 4096]);
                    }
                }
                4 => {
                    if let Some(stream) = streams.last() {
                        let _ = stream.shutdown(std::net::Shutdown::Write);
                    }
                }
                _ => drop(streams.pop()),
            },
            Self::Server(_, says) => drop(says.write(u64::from(what) << 4 | 1)),
            Self::None | Self::Disk(_) => {}
        }
    }

    /// What must hold whatever the guest did; the device is gone.
    pub fn check(self) {
        match self {
            Self::Disk(mut file) => {
                let mut bytes = Vec::new();
                std::io::Seek::rewind(&mut file).expect("a file");
                file.read_to_end(&mut bytes).expect("a file");
                assert!(
                    bytes.iter().all(|byte| *byte == 0),
                    "a read-only disk was written"
                );
            }
            Self::Server(thread, _) => {
                let ended = thread.map(std::thread::JoinHandle::join);
                assert!(ended.is_some_and(|end| end.is_ok()), "the peer panicked");
            }
            Self::None | Self::Sockets { .. } => {}
        }
    }
}
