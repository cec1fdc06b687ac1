//! The device over plain memory, with a file server made of a few lines.

use std::io;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair,
};
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::machine::end::{End, EndReason, end_channel};
use crate::virtio::SharedMemory;
use crate::virtio::testing::{self, CountingInterrupt, DriverQueue};

const REQUEST: u64 = 0x20_0000;
const REPLY: u64 = 0x60_0000;
const GETATTR: u32 = 3;

struct Bench {
    device: Fs,
    memory: SharedMemory,
    queues: [DriverQueue; 2],
    servers: Vec<OwnedFd>,
    ends: Receiver<End>,
}

impl Bench {
    fn new(workers: usize) -> Self {
        let flags = SocketFlags::CLOEXEC;
        let pair = || {
            let (ours, theirs) =
                socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
            prepare(&theirs).unwrap();
            (ours, theirs)
        };
        let (ours, servers) = (0..workers).map(|_| pair()).unzip();
        let (sender, ends) = end_channel();
        let mut device = Fs::new("pod", ours, sender).unwrap();
        let memory = testing::memory();
        let interrupt = CountingInterrupt::new();
        let (hiprio, hiprio_device) = DriverQueue::new(&memory, 0, 0x1_0000, 64, interrupt.clone());
        let (request, request_device) =
            DriverQueue::new(&memory, 1, 0x2_0000, 64, interrupt.clone());
        let queues = vec![Some(hiprio_device), Some(request_device)];
        device
            .activate(Activation {
                features: 0,
                queues,
                interrupt,
            })
            .unwrap();
        Self {
            device,
            memory,
            queues: [hiprio, request],
            servers,
            ends,
        }
    }

    /// Offers a request with room for `room` bytes of reply.
    fn offer(&mut self, queue: usize, slot: u16, request: &[u8], room: u32) {
        let at = u64::from(slot) * 0x20_0000;
        self.memory
            .write_slice(request, GuestAddress(REQUEST + at))
            .unwrap();
        let mut buffers = vec![(REQUEST + at, request.len() as u32, false)];
        if room > 0 {
            buffers.push((REPLY + at, room, true));
        }
        self.queues[queue].offer_chain(slot * 2, &buffers);
        self.queues[queue].kick();
    }

    fn used(&mut self, queue: usize) -> (u16, u32) {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            if let Some(used) = self.queues[queue].used() {
                return used;
            }
            assert!(Instant::now() < deadline, "waited in vain");
            std::thread::sleep(Duration::from_micros(100));
        }
    }

    fn reply(&self, slot: u16, len: u32) -> Vec<u8> {
        let mut reply = vec![0; len as usize];
        let at = GuestAddress(REPLY + u64::from(slot) * 0x20_0000);
        self.memory.read_slice(&mut reply, at).unwrap();
        reply
    }

    fn error_of(&self, slot: u16) -> i32 {
        let reply = self.reply(slot, 16);
        i32::from_le_bytes([reply[4], reply[5], reply[6], reply[7]])
    }
}

fn request(opcode: u32, unique: u64, body: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; message::IN_HEADER];
    bytes[0..4].copy_from_slice(&((message::IN_HEADER + body.len()) as u32).to_le_bytes());
    bytes[4..8].copy_from_slice(&opcode.to_le_bytes());
    bytes[8..16].copy_from_slice(&unique.to_le_bytes());
    bytes.extend_from_slice(body);
    bytes
}

fn reply(unique: u64, body: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; message::OUT_HEADER];
    bytes[0..4].copy_from_slice(&((message::OUT_HEADER + body.len()) as u32).to_le_bytes());
    bytes[8..16].copy_from_slice(&unique.to_le_bytes());
    bytes.extend_from_slice(body);
    bytes
}

fn take(server: &OwnedFd) -> Vec<u8> {
    let mut buffer = vec![0; limits::FS_MESSAGE];
    let (n, _) = recv(server, buffer.as_mut_slice(), RecvFlags::empty()).unwrap();
    buffer.truncate(n);
    buffer
}

fn answer(server: &OwnedFd, bytes: &[u8]) {
    assert_eq!(
        send(server, bytes, SendFlags::NOSIGNAL).unwrap(),
        bytes.len()
    );
}

#[test]
fn a_request_and_its_reply_pass_whole() {
    let mut bench = Bench::new(1);
    let body: Vec<u8> = (0..1 << 20_u32).map(|i: u32| (i % 251) as u8).collect();
    let sent = request(16, 7, &body);
    bench.offer(1, 0, &sent, 1 << 20);
    assert_eq!(take(&bench.servers[0]), sent);
    let expected = reply(7, &body[..(1 << 20) - message::OUT_HEADER]);
    answer(&bench.servers[0], &expected);
    assert_eq!(bench.used(1), (0, 1 << 20));
    assert!(bench.reply(0, 1 << 20) == expected);
}

#[test]
fn a_slow_request_does_not_stop_others() {
    let mut bench = Bench::new(2);
    bench.offer(1, 0, &request(GETATTR, 1, b""), 64);
    bench.offer(1, 1, &request(GETATTR, 2, b""), 64);
    let requests: Vec<Vec<u8>> = bench.servers.iter().map(take).collect();
    let second = requests.iter().position(|request| request[8] == 2).unwrap();
    answer(&bench.servers[second], &reply(2, b"x"));
    assert_eq!(bench.used(1), (2, 17));
    answer(&bench.servers[1 - second], &reply(1, b""));
    assert_eq!(bench.used(1), (0, 16));
}

#[test]
fn forgets_are_sent_without_a_reply_and_interrupts_not_at_all() {
    let mut bench = Bench::new(1);
    bench.offer(0, 0, &request(36, 8, &[0; 8]), 0);
    assert_eq!(bench.used(0), (0, 0));
    let forget = request(2, 9, &[0; 8]);
    bench.offer(0, 1, &forget, 0);
    assert_eq!(bench.used(0), (2, 0));
    assert_eq!(take(&bench.servers[0]), forget);
}

#[test]
fn a_request_that_the_file_server_never_answers_does_not_hold_a_thread() {
    let mut bench = Bench::new(1);
    // NOTIFY_REPLY has no reply, whatever room there is for one.
    bench.offer(1, 0, &request(41, 8, &[0; 40]), 64);
    assert_eq!(bench.used(1), (0, 0));
    bench.offer(1, 1, &request(GETATTR, 9, b""), 64);
    assert_eq!(take(&bench.servers[0])[8], 9);
    answer(&bench.servers[0], &reply(9, b""));
    assert_eq!(bench.used(1), (2, 16));
}

#[test]
fn a_reply_that_the_guest_left_no_room_for_is_the_guests_error() {
    let mut bench = Bench::new(1);
    for room in [16, 79] {
        bench.offer(1, 0, &request(GETATTR, 5, b""), room);
        take(&bench.servers[0]);
        answer(&bench.servers[0], &reply(5, &[0; 64]));
        assert_eq!(bench.used(1), (0, 16));
        assert_eq!(bench.error_of(0), -libc::EIO);
    }
    assert!(bench.ends.try_recv().is_err());
}

#[test]
fn a_request_too_large_for_the_socket_fails_alone() {
    let mut bench = Bench::new(1);
    set_socket_send_buffer_size(&*bench.device.sockets[0], 4096).unwrap();
    bench.offer(1, 0, &request(16, 5, &[0; 64 << 10]), 64);
    assert_eq!(bench.used(1), (0, 16));
    assert_eq!(bench.error_of(0), -libc::ENOMEM);
    bench.offer(0, 0, &request(42, 5, &[0; 64 << 10]), 0);
    assert_eq!(bench.used(0), (0, 0));
    assert!(bench.ends.try_recv().is_err());
}

#[test]
fn malformed_requests_are_answered_without_the_file_server() {
    let mut bench = Bench::new(1);
    let mut lying = request(GETATTR, 5, b"");
    lying[0] += 1;
    bench.offer(1, 0, &lying, 64);
    assert_eq!(bench.used(1), (0, 16));
    assert_eq!(bench.error_of(0), -libc::EINVAL);
    assert_eq!(bench.reply(0, 16)[8], 5);
    // Too short for a header, and without room for an answer.
    bench.offer(1, 1, &[0; 39], 64);
    assert_eq!(bench.used(1), (2, 16));
    bench.offer(1, 2, &request(GETATTR, 5, b""), 0);
    assert_eq!(bench.used(1), (4, 0));
    bench.offer(1, 0, &request(16, 5, &vec![0; limits::FS_MESSAGE]), 64);
    assert_eq!(bench.used(1), (0, 16));
    assert!(bench.ends.try_recv().is_err());
}

#[test]
fn a_file_server_that_dies_at_work_ends_the_machine() {
    let mut bench = Bench::new(1);
    bench.offer(1, 0, &request(GETATTR, 5, b""), 64);
    take(&bench.servers[0]);
    bench.servers.clear();
    assert_eq!(bench.used(1), (0, 16));
    assert_eq!(bench.error_of(0), -libc::EIO);
    let end = bench.ends.recv_timeout(Duration::from_secs(10)).unwrap();
    assert_eq!(end.reason, EndReason::FileServerDied);
}

#[test]
fn a_file_server_that_dies_idle_ends_the_machine() {
    let mut bench = Bench::new(2);
    bench.servers.pop();
    let end = bench.ends.recv_timeout(Duration::from_secs(10)).unwrap();
    assert_eq!(end.reason, EndReason::FileServerDied);
}

#[test]
fn a_reply_that_lies_ends_the_machine() {
    let lies: [Vec<u8>; 4] = [
        reply(6, b""),
        vec![0; 8],
        reply(6, &[0; 64]),
        [reply(5, b""), vec![0]].concat(),
    ];
    for lie in lies {
        let mut bench = Bench::new(1);
        bench.offer(1, 0, &request(GETATTR, 5, b""), 64);
        take(&bench.servers[0]);
        answer(&bench.servers[0], &lie);
        assert_eq!(bench.used(1), (0, 16));
        assert_eq!(bench.error_of(0), -libc::EIO);
        assert_eq!(bench.ends.recv().unwrap().reason, EndReason::FileServerDied);
    }
}

#[test]
fn requests_of_every_length_do_no_harm() {
    let mut bench = Bench::new(1);
    let whole = request(GETATTR, 5, &[7; 64]);
    for len in 0..whole.len() {
        for room in [0, 1, 15, 16, 64] {
            let sent = &whole[..len];
            if len == 0 && room == 0 {
                continue;
            }
            bench.offer(1, 0, sent, room);
            let (head, written) = bench.used(1);
            assert_eq!(head, 0);
            // An answer needs the request's unique number, and room.
            let expected = if len >= 16 && room >= 16 { 16 } else { 0 };
            assert_eq!(written, expected, "{len} bytes, room for {room}");
        }
    }
    bench.offer(1, 0, &whole, 64);
    assert_eq!(take(&bench.servers[0]), whole);
    answer(&bench.servers[0], &reply(5, b""));
    assert_eq!(bench.used(1), (0, 16));
}

#[test]
fn a_reset_ends_the_threads() {
    let mut bench = Bench::new(4);
    bench.device.reset();
    assert!(bench.device.running.is_none());
}

#[test]
fn a_reset_leaves_requests_that_were_not_taken() {
    let mut bench = Bench::new(1);
    bench.offer(1, 0, &request(GETATTR, 1, b""), 64);
    bench.offer(1, 1, &request(GETATTR, 2, b""), 64);
    assert_eq!(take(&bench.servers[0])[8], 1);
    let mut device = bench.device;
    let reset = std::thread::spawn(move || device.reset());
    std::thread::sleep(Duration::from_millis(100));
    answer(&bench.servers[0], &reply(1, b""));
    let deadline = Instant::now() + Duration::from_secs(5);
    while !reset.is_finished() {
        assert!(Instant::now() < deadline, "it waits for the second");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn the_configuration_space_holds_tag_and_queues() -> io::Result<()> {
    let bench = Bench::new(1);
    let mut config = [0; 44];
    bench.device.read_config(0, &mut config);
    assert_eq!(&config[..4], b"pod\0");
    assert_eq!(config[36..], [1, 0, 0, 0, 0, 0, 0, 0]);
    Ok(())
}
