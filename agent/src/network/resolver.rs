//! Docker's resolver: in a user-defined network a container asks 127.0.0.11, where dockerd listens in the pod's namespace on the host. In
//! the guest the agent listens there, on a port of the kernel's choice, so that port 53 is free for the pod; programs on the
//! containers' cgroup lead queries to port 53 of that address to it. Each query goes to the host (vsock port RESOLVER_PORT) as
//! DNS over TCP has it: two bytes of length, then the message (RFC 1035, 4.2.2).

use std::{
    fs::File,
    io,
    net::{Ipv4Addr, SocketAddr, TcpListener as StdTcpListener, UdpSocket as StdUdpSocket},
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
    time::Duration,
};

use bulkhead_protocol::limits::{RESOLVER_PORT, RESOLVER_QUERIES_MAX};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpListener, UdpSocket},
    sync::Semaphore,
    task::JoinSet,
    time::timeout,
};
use tokio_vsock::{VMADDR_CID_HOST, VsockAddr, VsockStream};

use crate::{
    boot::PODS,
    container::bpf,
    sys::{self, bpf::Hook},
};

/// Where containers ask.
pub const ADDRESS: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 11);
/// The port they ask at.
pub const PORT: u16 = 53;
/// How long the host may take for an answer; resolvers ask again after 5 s.
const PATIENCE: Duration = Duration::from_secs(15);
/// Longest query taken by UDP; what is longer comes by TCP.
const QUERY_MAX: usize = 4096;
/// Answer by UDP to a query that does not say how much it takes (RFC 1035, 4.2.1).
const ANSWER_MIN: usize = 512;
const HEADER: usize = 12;

/// The programs that lead queries to the resolver. They stay on the cgroup; a later resolver's replace them.
#[derive(Default)]
pub struct Detour(Vec<(Hook, OwnedFd)>);

impl Detour {
    /// Leads queries to a port.
    fn lead_to(&mut self, port: u16) -> io::Result<()> {
        let cgroup = File::open(PODS)?;
        let (there, back) = (
            bpf::change_port(ADDRESS, PORT, port),
            bpf::change_port(ADDRESS, port, PORT),
        );
        for (hook, program) in [
            (Hook::Inet4Connect, &there),
            (Hook::Udp4Send, &there),
            (Hook::Udp4Receive, &back),
        ] {
            let program = sys::bpf::load(hook, program)?;
            let old = self.0.iter().position(|(of, _)| *of == hook);
            let old = old.map(|at| self.0.swap_remove(at).1);
            let replaced = old.as_ref().map(AsFd::as_fd);
            sys::bpf::attach(hook, cgroup.as_fd(), program.as_fd(), replaced)?;
            self.0.push((hook, program));
        }
        Ok(())
    }
}

/// A resolver that runs until it is dropped.
pub struct Resolver {
    _tasks: JoinSet<()>,
}

/// Its sockets, opened in the pod's network.
pub struct Sockets {
    udp: StdUdpSocket,
    tcp: StdTcpListener,
}

impl Sockets {
    /// Binds both to one port.
    pub fn bind() -> io::Result<Self> {
        const ATTEMPTS: usize = 16;
        let mut attempts = 0;
        loop {
            attempts += 1;
            let udp = StdUdpSocket::bind((ADDRESS, 0))?;
            match StdTcpListener::bind(udp.local_addr()?) {
                Ok(tcp) => {
                    udp.set_nonblocking(true)?;
                    tcp.set_nonblocking(true)?;
                    return Ok(Self { udp, tcp });
                }
                Err(_) if attempts < ATTEMPTS => {}
                Err(error) => return Err(error),
            }
        }
    }
}

impl Resolver {
    /// Serves the sockets.
    pub fn start(sockets: Sockets, detour: &mut Detour) -> io::Result<Self> {
        detour.lead_to(sockets.udp.local_addr()?.port())?;
        let udp = Arc::new(UdpSocket::from_std(sockets.udp)?);
        let tcp = TcpListener::from_std(sockets.tcp)?;
        let slots = Arc::new(Semaphore::new(RESOLVER_QUERIES_MAX));
        let mut tasks = JoinSet::new();
        tasks.spawn(serve_udp(udp, Arc::clone(&slots), dial));
        tasks.spawn(serve_tcp(tcp, slots, dial));
        Ok(Self { _tasks: tasks })
    }
}

async fn dial() -> io::Result<VsockStream> {
    VsockStream::connect(VsockAddr::new(VMADDR_CID_HOST, RESOLVER_PORT)).await
}

/// Queries by UDP. One that finds all places taken is lost, as a datagram may be.
async fn serve_udp<S, F>(socket: Arc<UdpSocket>, slots: Arc<Semaphore>, dial: fn() -> F)
where
    S: AsyncRead + AsyncWrite + Unpin + Send,
    F: Future<Output = io::Result<S>> + Send + 'static,
{
    let mut buffer = vec![0; QUERY_MAX];
    loop {
        // An error is that of an earlier answer (ICMP).
        let Ok((length, from)) = socket.recv_from(&mut buffer).await else {
            continue;
        };
        let Ok(slot) = Arc::clone(&slots).try_acquire_owned() else {
            continue;
        };
        let query = buffer.get(..length).unwrap_or_default().to_vec();
        let socket = Arc::clone(&socket);
        tokio::spawn(async move {
            let _slot = slot;
            let asked = async { ask(dial().await?, &query).await };
            if let Ok(Ok(answer)) = timeout(PATIENCE, asked).await {
                reply(&socket, from, &query, answer).await;
            }
        });
    }
}

async fn ask(mut host: impl AsyncRead + AsyncWrite + Unpin, query: &[u8]) -> io::Result<Vec<u8>> {
    let length = u16::try_from(query.len()).map_err(io::Error::other)?;
    let mut message = length.to_be_bytes().to_vec();
    message.extend_from_slice(query);
    host.write_all(&message).await?;
    let length = host.read_u16().await?;
    let mut answer = vec![0; usize::from(length)];
    host.read_exact(&mut answer).await?;
    Ok(answer)
}

async fn reply(socket: &UdpSocket, to: SocketAddr, query: &[u8], mut answer: Vec<u8>) {
    if answer.len() > room(query) {
        answer = truncated(&answer);
    }
    let _ = socket.send_to(&answer, to).await;
}

/// Connections: the framing is the host's already.
async fn serve_tcp<S, F>(listener: TcpListener, slots: Arc<Semaphore>, dial: fn() -> F)
where
    S: AsyncRead + AsyncWrite + Unpin + Send,
    F: Future<Output = io::Result<S>> + Send + 'static,
{
    loop {
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else {
            return;
        };
        let Ok((mut client, _)) = listener.accept().await else {
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        tokio::spawn(async move {
            let _slot = slot;
            let carried = async {
                let mut host = dial().await?;
                tokio::io::copy_bidirectional_with_sizes(&mut client, &mut host, 4096, 4096).await
            };
            let _ = timeout(PATIENCE, carried).await;
        });
    }
}

/// End of the first question.
fn question_end(message: &[u8]) -> Option<usize> {
    let mut at = HEADER;
    loop {
        let label = usize::from(*message.get(at)?);
        at = at.checked_add(1)?;
        match label {
            0 => break,
            1..=63 => at = at.checked_add(label)?,
            _ => return None, // no pointers in a first name
        }
    }
    at.checked_add(4).filter(|end| *end <= message.len())
}

/// How long an answer to the query may be: what its OPT record says (RFC 6891, 6.1.2), which follows the only question.
fn room(query: &[u8]) -> usize {
    const OPT: [u8; 3] = [0, 0, 41]; // the root's name, the type
    let one_question = query.get(4..10) == Some(&[0, 1, 0, 0, 0, 0]);
    let size = question_end(query)
        .filter(|_| one_question)
        .and_then(|end| query.get(end..)?.strip_prefix(&OPT)?.first_chunk())
        .map_or(0, |size| usize::from(u16::from_be_bytes(*size)));
    size.max(ANSWER_MIN)
}

/// The answer's header and question alone, with the bit that says: ask by TCP.
fn truncated(answer: &[u8]) -> Vec<u8> {
    const TRUNCATED: u8 = 2;
    let end = question_end(answer).unwrap_or(HEADER);
    let mut short = answer.get(..end).unwrap_or_default().to_vec();
    if let Some(flags) = short.get_mut(2) {
        *flags |= TRUNCATED;
    }
    // No answers, no authorities, no additional records.
    if let Some(counts) = short.get_mut(6..HEADER) {
        counts.fill(0);
    }
    if end == HEADER
        && let Some(questions) = short.get_mut(4..6)
    {
        questions.fill(0);
    }
    short
}

#[cfg(test)]
mod tests {
    use tokio::io::DuplexStream;

    use super::*;
    use crate::network::namespace::Namespace;

    /// A query for `a.b`; with an OPT record if it takes more than the least.
    fn query(size: u16) -> Vec<u8> {
        let mut query = vec![7, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        query.extend_from_slice(b"\x01a\x01b\0\0\x01\0\x01");
        if size > 0 {
            query[11] = 1;
            query.extend_from_slice(&[0, 0, 41]);
            query.extend_from_slice(&size.to_be_bytes());
            query.extend_from_slice(&[0; 6]);
        }
        query
    }

    #[test]
    fn an_answer_has_the_room_that_the_query_gives() {
        assert_eq!(room(&query(0)), 512);
        assert_eq!(room(&query(1232)), 1232);
        assert_eq!(room(&query(100)), 512);
        for end in 0..query(1232).len() - 8 {
            assert_eq!(room(&query(1232)[..end]), 512, "{end}");
        }
        assert_eq!(room(&[0xff; 64]), 512);
    }

    #[test]
    fn a_long_answer_becomes_its_question_and_a_hint() {
        let mut answer = query(0);
        (answer[2], answer[7]) = (0x81, 40);
        let question = answer.len();
        answer.resize(2000, 9);
        let short = truncated(&answer);
        assert_eq!(short.len(), question);
        assert_eq!(short[..4], [7, 7, 0x83, 0]);
        assert_eq!(short[4..12], [0, 1, 0, 0, 0, 0, 0, 0]);
        assert_eq!(truncated(&[0xff; 600])[4..12], [0; 8]);
    }

    /// A host that answers each query with itself, 600 bytes longer.
    async fn echo() -> io::Result<DuplexStream> {
        let (ours, mut theirs) = tokio::io::duplex(4096);
        tokio::spawn(async move {
            while let Ok(length) = theirs.read_u16().await {
                let mut message = vec![0; usize::from(length)];
                theirs.read_exact(&mut message).await.unwrap();
                message.resize(message.len() + 600, 0);
                theirs.write_u16(message.len() as u16).await.unwrap();
                theirs.write_all(&message).await.unwrap();
            }
        });
        Ok(ours)
    }

    async fn silent() -> io::Result<DuplexStream> {
        std::future::pending().await
    }

    fn run<F: Future>(test: impl FnOnce(Namespace, Sockets) -> F) -> F::Output {
        let pod = Namespace::new().unwrap();
        let sockets = pod.within(Sockets::bind).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(test(pod, sockets))
    }

    async fn client(pod: &Namespace, server: SocketAddr) -> UdpSocket {
        let socket = pod.within(|| StdUdpSocket::bind("127.0.0.1:0")).unwrap();
        socket.set_nonblocking(true).unwrap();
        let socket = UdpSocket::from_std(socket).unwrap();
        socket.connect(server).await.unwrap();
        socket
    }

    #[test]
    fn queries_by_udp_and_tcp_are_answered_by_the_host() {
        run(|pod, sockets| async move {
            let server = sockets.udp.local_addr().unwrap();
            let slots = Arc::new(Semaphore::new(RESOLVER_QUERIES_MAX));
            let udp = Arc::new(UdpSocket::from_std(sockets.udp).unwrap());
            tokio::spawn(serve_udp(udp, Arc::clone(&slots), echo));
            let tcp = TcpListener::from_std(sockets.tcp).unwrap();
            tokio::spawn(serve_tcp(tcp, slots, echo));

            let socket = client(&pod, server).await;
            let mut answer = vec![0; 4096];
            socket.send(&query(1232)).await.unwrap();
            let length = socket.recv(&mut answer).await.unwrap();
            assert_eq!(length, query(1232).len() + 600);
            // Without room for it the client is told to use TCP.
            socket.send(&query(0)).await.unwrap();
            let length = socket.recv(&mut answer).await.unwrap();
            assert_eq!((length, answer[2] & 2), (query(0).len(), 2));

            let stream = pod.within(tokio::net::TcpSocket::new_v4).unwrap();
            let mut stream = stream.connect(server).await.unwrap();
            let answer = ask(&mut stream, &query(0)).await.unwrap();
            assert_eq!(answer.len(), query(0).len() + 600);
        });
    }

    #[test]
    fn queries_above_the_cap_are_lost() {
        run(|pod, sockets| async move {
            let server = sockets.udp.local_addr().unwrap();
            let slots = Arc::new(Semaphore::new(RESOLVER_QUERIES_MAX));
            let udp = Arc::new(UdpSocket::from_std(sockets.udp).unwrap());
            tokio::spawn(serve_udp(udp, Arc::clone(&slots), silent));
            let socket = client(&pod, server).await;
            for _ in 0..=RESOLVER_QUERIES_MAX {
                socket.send(&query(0)).await.unwrap();
            }
            while slots.available_permits() > 0 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            // One more: the server still reads, and takes nothing on.
            socket.send(&query(0)).await.unwrap();
            tokio::time::sleep(Duration::from_millis(20)).await;
            assert_eq!(slots.available_permits(), 0);
        });
    }
}
