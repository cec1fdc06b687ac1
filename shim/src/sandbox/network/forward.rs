//! Port-forward: what listens on the guest's loopback is reached on the loopback of the pod's namespace, where kubelet's port-forward
//! dials. The agent tells which ports listen; for each there is a socket on 127.0.0.1 or ::1 in the namespace, and each connection to it is
//! carried by vsock, with half-close.
//!
//! The ports are the guest's word: at most [`FORWARD_PORTS_MAX`], and only on the loopback of a namespace that is the pod's own.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener},
    num::NonZeroU16,
    path::PathBuf,
    pin::pin,
    sync::Arc,
    time::Duration,
};

use bulkhead_protocol::{
    agent::{WatchPortsRequest, WatchPortsResponse},
    forward::{ForwardHeader, parse_answer},
    limits::{
        FORWARD_BUFFER, FORWARD_CONNECTIONS_MAX, FORWARD_LINE_MAX, FORWARD_PORT, FORWARD_PORTS_MAX,
    },
};
use tokio::{
    io::{AsyncWriteExt, copy_bidirectional_with_sizes},
    net::{TcpStream, UnixStream},
    sync::Semaphore,
    task::JoinSet,
    time::{sleep, timeout},
};
use ttrpc::context;

use super::{Network, namespace::Namespace};
use crate::sandbox::{Pod, vsock};

/// How long the guest may take to connect.
const CONNECT: Duration = Duration::from_secs(20);
/// How long to wait after an answer: the guest does not say how busy the shim is.
const PAUSE: Duration = Duration::from_millis(100);
/// How long to wait after a failure. Most often it is the machine's end, which is seen meanwhile.
const AFTER_FAILURE: Duration = Duration::from_secs(2);
/// How long to wait before ports that could not be opened are tried again.
const RETRY: Duration = Duration::from_secs(5);
/// How long to wait when the shim is out of descriptors.
const EXHAUSTED: Duration = Duration::from_millis(200);

/// Where a socket listens: port, and whether it is on ::1.
type Place = (NonZeroU16, bool);

/// Forwards ports to the end of the pod. Begins when the pod has an interface: before that nobody can want it.
pub fn start(pod: &Arc<Pod>, network: &Arc<Network>) {
    let (pod, network) = (pod.clone(), network.clone());
    tokio::spawn(async move {
        // What it has open ends with it.
        tokio::select! {
            _ = pod.ended() => {}
            () = forward(&pod, &network) => {}
        }
    });
}

async fn forward(pod: &Pod, network: &Network) {
    network.plugged.notified().await;
    let mut open = Open::new(pod.vsock());
    let mut generation = 0;
    let mut told = false;
    loop {
        let Ok(agent) = pod.agent() else { return };
        let mut request = WatchPortsRequest::new();
        request.generation = generation;
        // A long poll: without a limit.
        let mut poll = pin!(agent.watch_ports(context::Context::default(), &request));
        let answer = loop {
            tokio::select! {
                answer = &mut poll => break answer,
                () = sleep(RETRY), if !open.missing.is_empty() => open.retry(network.namespace()).await,
            }
        };
        let failure = match answer {
            Ok(answer) if answer.generation != generation => {
                generation = answer.generation;
                let wanted = places(&answer);
                // It can be large, and the next may be long in coming.
                drop(answer);
                if let Some(wanted) = wanted {
                    open.change(network.namespace(), &wanted).await;
                    sleep(PAUSE).await;
                    continue;
                }
                format!("more than {FORWARD_PORTS_MAX} ports")
            }
            Ok(_) => "an answer without a change".to_owned(),
            Err(error) => error.to_string(),
        };
        sleep(AFTER_FAILURE).await;
        if !told {
            tracing::warn!(failure, "following the guest's ports");
            told = true;
        }
    }
}

/// None of more than the agent may tell.
fn places(answer: &WatchPortsResponse) -> Option<BTreeSet<Place>> {
    if answer.ports.len() > FORWARD_PORTS_MAX {
        return None;
    }
    let places = answer
        .ports
        .iter()
        .filter_map(|p| Some((NonZeroU16::new(u16::try_from(p.port).ok()?)?, p)))
        .flat_map(|(port, p)| {
            let v4 = p.ipv4.then_some((port, false));
            v4.into_iter().chain(p.ipv6.then_some((port, true)))
        });
    Some(places.collect())
}

/// The sockets that listen.
struct Open {
    vsock: PathBuf,
    sockets: BTreeMap<Place, JoinSet<()>>,
    /// What is wanted and could not be opened.
    missing: BTreeSet<Place>,
    connections: Arc<Semaphore>,
}

impl Open {
    fn new(vsock: PathBuf) -> Self {
        Self {
            vsock,
            sockets: BTreeMap::new(),
            missing: BTreeSet::new(),
            connections: Arc::new(Semaphore::new(FORWARD_CONNECTIONS_MAX)),
        }
    }

    /// Closes what is not wanted any more and opens what is new.
    async fn change(&mut self, namespace: &Arc<Namespace>, wanted: &BTreeSet<Place>) {
        self.sockets.retain(|place, _| wanted.contains(place));
        self.missing.retain(|place| wanted.contains(place));
        let new = wanted.iter().copied();
        let new: Vec<Place> = new.filter(|p| !self.sockets.contains_key(p)).collect();
        self.open(namespace, new).await;
    }

    /// Tries once more what could not be opened.
    async fn retry(&mut self, namespace: &Arc<Namespace>) {
        let missing = self.missing.iter().copied().collect();
        self.open(namespace, missing).await;
    }

    async fn open(&mut self, namespace: &Arc<Namespace>, new: Vec<Place>) {
        if new.is_empty() {
            return;
        }
        let (inside, places) = (namespace.clone(), new.clone());
        let listen = move || inside.run(|| Ok(places.into_iter().map(listen).collect::<Vec<_>>()));
        let listeners = tokio::task::spawn_blocking(listen).await;
        let listeners = match listeners.map_err(io::Error::other).flatten() {
            Ok(listeners) => listeners,
            Err(error) => {
                tracing::debug!(%error, "opening ports to forward");
                self.missing.extend(new);
                return;
            }
        };
        for (place, listener) in new.into_iter().zip(listeners) {
            match listener.and_then(tokio::net::TcpListener::from_std) {
                Ok(listener) => {
                    self.missing.remove(&place);
                    self.add(place, listener);
                }
                Err(error) => {
                    if self.missing.insert(place) {
                        tracing::debug!(port = place.0, ipv6 = place.1, %error, "a port is not forwarded yet");
                    }
                }
            }
        }
    }

    fn add(&mut self, place: Place, listener: tokio::net::TcpListener) {
        let mut tasks = JoinSet::new();
        tasks.spawn(accept(
            listener,
            place,
            self.vsock.clone(),
            self.connections.clone(),
        ));
        self.sockets.insert(place, tasks);
    }
}

fn listen((port, ipv6): Place) -> io::Result<TcpListener> {
    let address: IpAddr = match ipv6 {
        false => Ipv4Addr::LOCALHOST.into(),
        true => Ipv6Addr::LOCALHOST.into(),
    };
    let listener = TcpListener::bind(SocketAddr::new(address, port.get()))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Connections live on when the port closes: the program in the guest decides on them.
async fn accept(
    listener: tokio::net::TcpListener,
    (port, ipv6): Place,
    vsock: PathBuf,
    connections: Arc<Semaphore>,
) {
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            sleep(EXHAUSTED).await;
            continue;
        };
        let Ok(permit) = connections.clone().try_acquire_owned() else {
            tracing::warn!(
                port,
                "more than {FORWARD_CONNECTIONS_MAX} forwarded connections"
            );
            continue;
        };
        let vsock = vsock.clone();
        tokio::spawn(async move {
            if let Err(error) = carry(stream, &vsock, ForwardHeader { port, ipv6 }).await {
                tracing::debug!(port, ipv6, %error, "a forwarded connection");
            }
            drop(permit);
        });
    }
}

/// To the end of both directions. When the machine ends, so does its end of vsock.
async fn carry(
    mut stream: TcpStream,
    vsock: &std::path::Path,
    to: ForwardHeader,
) -> io::Result<()> {
    let connected = timeout(CONNECT, connect(vsock, to)).await;
    let mut guest = match connected.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
        Ok(guest) => guest,
        Err(error) => {
            // As if nobody listened: a reset.
            let _ = rustix::net::sockopt::set_socket_linger(&stream, Some(Duration::ZERO));
            return Err(error);
        }
    };
    copy_bidirectional_with_sizes(&mut stream, &mut guest, FORWARD_BUFFER, FORWARD_BUFFER)
        .await
        .map(drop)
}

async fn connect(vsock: &std::path::Path, to: ForwardHeader) -> io::Result<UnixStream> {
    let mut guest = vsock::connect(vsock, FORWARD_PORT).await?;
    guest.write_all(to.encode().as_bytes()).await?;
    let line = vsock::read_line(&mut guest, FORWARD_LINE_MAX).await?;
    parse_answer(line.as_bytes()).map_err(io::Error::other)?;
    Ok(guest)
}

#[cfg(test)]
mod tests {
    use bulkhead_protocol::agent::ListeningPort;
    use tokio::{
        io::AsyncReadExt,
        net::{UnixListener, unix::OwnedWriteHalf},
    };

    use super::*;

    fn answer(ports: &[(u32, bool, bool)]) -> Option<BTreeSet<Place>> {
        let mut answer = WatchPortsResponse::new();
        for &(number, ipv4, ipv6) in ports {
            let mut port = ListeningPort::new();
            (port.port, port.ipv4, port.ipv6) = (number, ipv4, ipv6);
            answer.ports.push(port);
        }
        places(&answer)
    }

    /// Connects in the namespace.
    fn dial(namespace: &Namespace, port: u16, ipv6: bool) -> io::Result<TcpStream> {
        let address = match ipv6 {
            true => SocketAddr::from((Ipv6Addr::LOCALHOST, port)),
            false => SocketAddr::from((Ipv4Addr::LOCALHOST, port)),
        };
        let stream = namespace.run(|| std::net::TcpStream::connect(address))?;
        stream.set_nonblocking(true)?;
        TcpStream::from_std(stream)
    }

    /// A namespace whose loopback is up.
    fn namespace() -> Arc<Namespace> {
        let namespace = Namespace::fresh().unwrap();
        namespace
            .run(|| super::super::raise_loopback(&mut super::super::netlink::Netlink::open()?))
            .unwrap();
        Arc::new(namespace)
    }

    /// The guest: answers the header with `line`, then sends back what it gets; it tells the headers.
    async fn guest(listener: &UnixListener, line: &str) -> (String, OwnedWriteHalf, Vec<u8>) {
        let (mut stream, _) = listener.accept().await.unwrap();
        let connect = vsock::read_line(&mut stream, 100).await.unwrap();
        assert_eq!(connect, "CONNECT 1027");
        stream.write_all(b"OK 1027\n").await.unwrap();
        let header = vsock::read_line(&mut stream, 300).await.unwrap();
        stream.write_all(line.as_bytes()).await.unwrap();
        let (mut from, to) = stream.into_split();
        let mut all = Vec::new();
        from.read_to_end(&mut all).await.unwrap();
        (header, to, all)
    }

    #[test]
    fn ports_that_are_none_are_left_out_and_too_many_are_refused() {
        assert!(
            answer(&[(0, true, true), (70_000, true, true)])
                .unwrap()
                .is_empty()
        );
        let both = answer(&[(81, false, true), (80, true, true), (80, true, false)]).unwrap();
        let both: Vec<_> = both.iter().map(|(p, v6)| (p.get(), *v6)).collect();
        assert_eq!(both, [(80, false), (80, true), (81, true)]);
        let many: Vec<_> = (1..1000).map(|port| (port, true, false)).collect();
        assert!(answer(&many).is_none());
        let all = answer(&many[..FORWARD_PORTS_MAX]).unwrap();
        assert_eq!(all.len(), FORWARD_PORTS_MAX);
    }

    #[tokio::test]
    async fn bytes_pass_both_ways_with_half_close_and_closed_ports_go_away() {
        let namespace = namespace();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vsock.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let mut open = Open::new(path);
        open.change(&namespace, &answer(&[(8080, true, true)]).unwrap())
            .await;
        for (ipv6, header) in [
            (false, r#"{"port":8080,"ipv6":false}"#),
            (true, r#"{"port":8080,"ipv6":true}"#),
        ] {
            let mut stream = dial(&namespace, 8080, ipv6).unwrap();
            stream.write_all(b"to the guest").await.unwrap();
            stream.shutdown().await.unwrap();
            let (got, mut to, all) = guest(&listener, "ok\n").await;
            assert_eq!(
                (got.as_str(), all.as_slice()),
                (header, b"to the guest".as_slice())
            );
            to.write_all(b"and back").await.unwrap();
            drop(to);
            let mut back = String::new();
            stream.read_to_string(&mut back).await.unwrap();
            assert_eq!(back, "and back");
        }
        open.change(&namespace, &answer(&[(9090, true, false)]).unwrap())
            .await;
        tokio::task::yield_now().await;
        let refused = |port, ipv6| {
            let error = dial(&namespace, port, ipv6).unwrap_err();
            error.kind() == io::ErrorKind::ConnectionRefused
        };
        assert!(refused(8080, false) && refused(8080, true) && refused(9090, true));
        assert!(dial(&namespace, 9090, false).is_ok());
    }

    #[tokio::test]
    async fn a_port_that_is_taken_is_opened_once_it_is_free() {
        let namespace = namespace();
        let dir = tempfile::tempdir().unwrap();
        let mut open = Open::new(dir.path().join("vsock.sock"));
        let wanted = answer(&[(8080, true, false)]).unwrap();
        let other = namespace.run(|| std::net::TcpListener::bind(("127.0.0.1", 8080)));
        open.change(&namespace, &wanted).await;
        assert_eq!((open.sockets.len(), &open.missing), (0, &wanted));
        drop(other);
        open.retry(&namespace).await;
        assert!(open.missing.is_empty() && dial(&namespace, 8080, false).is_ok());
    }

    #[tokio::test]
    async fn a_port_that_the_guest_does_not_reach_is_reset() {
        let namespace = namespace();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vsock.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let mut open = Open::new(path);
        open.change(&namespace, &answer(&[(8080, true, false)]).unwrap())
            .await;
        let mut stream = dial(&namespace, 8080, false).unwrap();
        let (mut buffer, guest) = ([0; 10], guest(&listener, "error refused\n"));
        let (read, _) = tokio::join!(stream.read(&mut buffer), guest);
        assert_eq!(read.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    }

    #[tokio::test]
    async fn connections_have_a_cap() {
        let namespace = namespace();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vsock.sock");
        let _listener = UnixListener::bind(&path).unwrap();
        let mut open = Open::new(path);
        open.change(&namespace, &answer(&[(8080, true, false)]).unwrap())
            .await;
        open.connections.forget_permits(FORWARD_CONNECTIONS_MAX - 1);
        let _first = dial(&namespace, 8080, false).unwrap();
        let mut second = dial(&namespace, 8080, false).unwrap();
        let mut buffer = [0; 1];
        let read = timeout(Duration::from_secs(5), second.read(&mut buffer)).await;
        assert!(matches!(read.unwrap(), Ok(0) | Err(_)));
    }
}
