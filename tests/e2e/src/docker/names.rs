//! A DNS server on the suite's second host (RFC 1035): any name has that host's address, once, or with `large` as first label so many
//! times that the answer needs TCP.

use std::{
    fs::File,
    io::{Read, Write},
    net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use bulkhead_harness::{
    Context, Outcome, Suite,
    network::{OUTSIDE, OUTSIDE_ADDRESS},
};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

const PORT: u16 = 53;
/// Answers to a `large` name: 16 bytes each, of the 512 that a datagram holds.
const LARGE: u16 = 60;
/// How often a thread looks whether it shall end.
const LOOK: Duration = Duration::from_millis(50);
const HEADER: usize = 12;

/// The server; it ends with the value.
pub struct Server {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Server {
    /// Listens by UDP and TCP.
    pub fn start(suite: &Suite) -> Outcome<Self> {
        let anchor = suite.network()?.pid();
        let path = format!("/proc/{anchor}/root/run/netns/{OUTSIDE}");
        let namespace = File::open(&path).context("the outside's namespace")?;
        let (udp, tcp) = thread::spawn(move || {
            use std::os::fd::AsFd;
            let network = Some(LinkNameSpaceType::Network);
            move_into_link_name_space(namespace.as_fd(), network)?;
            let udp = UdpSocket::bind((OUTSIDE_ADDRESS.0, PORT))?;
            let tcp = TcpListener::bind((OUTSIDE_ADDRESS.0, PORT))?;
            udp.set_read_timeout(Some(LOOK))?;
            tcp.set_nonblocking(true)?;
            Ok::<_, std::io::Error>((udp, tcp))
        })
        .join()
        .map_err(|_| "the thread that listens has died")?
        .context("listening outside")?;
        let stop = Arc::new(AtomicBool::new(false));
        let (stop_udp, stop_tcp) = (stop.clone(), stop.clone());
        let threads = vec![
            thread::spawn(move || {
                let mut query = [0; 512];
                while !stop_udp.load(Ordering::Relaxed) {
                    let Ok((length, from)) = udp.recv_from(&mut query) else {
                        continue;
                    };
                    let answer = answer(&query[..length], false);
                    let _ = answer.map(|answer| udp.send_to(&answer, from));
                }
            }),
            thread::spawn(move || {
                while !stop_tcp.load(Ordering::Relaxed) {
                    match tcp.accept() {
                        Ok((stream, _)) => drop(thread::spawn(move || converse(stream))),
                        Err(_) => thread::sleep(LOOK),
                    }
                }
            }),
        ];
        Ok(Self { stop, threads })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// Section 4.2.2: two bytes of length before each message. Until the client has had enough.
fn converse(mut stream: TcpStream) -> Option<()> {
    stream.set_nonblocking(false).ok()?;
    stream
        .set_read_timeout(Some(Duration::from_secs(10)))
        .ok()?;
    loop {
        let mut length = [0; 2];
        stream.read_exact(&mut length).ok()?;
        let mut query = vec![0; usize::from(u16::from_be_bytes(length))];
        stream.read_exact(&mut query).ok()?;
        let answer = answer(&query, true)?;
        let length = u16::try_from(answer.len()).ok()?.to_be_bytes();
        stream.write_all(&[&length[..], &answer].concat()).ok()?;
    }
}

/// Section 4.1. What is no query has no answer.
fn answer(query: &[u8], tcp: bool) -> Option<Vec<u8>> {
    let name = query.get(HEADER..)?;
    let end = name.iter().position(|&byte| byte == 0)?;
    let question = name.get(..end + 5)?;
    let [_, type_high, type_low, ..] = question.get(end..)? else {
        return None;
    };
    let address = [*type_high, *type_low] == [0, 1];
    let (count, truncated) = match (address, name.starts_with(b"\x05large")) {
        (false, _) => (0, false),
        (true, false) => (1, false),
        (true, true) if tcp => (LARGE, false),
        (true, true) => (0, true),
    };
    let mut message = query.get(..2)?.to_vec();
    // A response, recursion desired and available; section 4.1.1.
    message.extend([0x81 | u8::from(truncated) << 1, 0x80, 0, 1]);
    message.extend(u16::to_be_bytes(count));
    message.extend([0; 4]);
    message.extend(question);
    let ip: Ipv4Addr = OUTSIDE_ADDRESS.0.parse().ok()?;
    for _ in 0..count {
        // The question's name, A, IN, a minute, four bytes.
        message.extend([0xc0, HEADER as u8, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4]);
        message.extend(ip.octets());
    }
    Some(message)
}
