//! Docker's resolver: in user-defined networks resolv.conf names 127.0.0.11, where dockerd listens inside the pod's namespace. The guest's
//! agent takes the queries there and brings each to host port `RESOLVER_PORT`; from here it goes to 127.0.0.11:53 in the namespace, by TCP,
//! and to nothing else.

use std::{
    fs, io,
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use bulkhead_protocol::limits::{FORWARD_BUFFER, RESOLVER_QUERIES_MAX};
use tokio::{
    io::copy_bidirectional_with_sizes,
    net::{TcpStream, UnixStream},
    sync::Semaphore,
    time::timeout,
};

use super::Network;
use crate::limits::RESOLVER_CONNECTS;

/// Where dockerd listens; iptables of the namespace leads port 53 to the port it really has.
const ADDRESS: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 11);
const PORT: u16 = 53;
/// How long one query may take.
const QUERY: Duration = Duration::from_secs(30);
/// How long dockerd may take to accept.
const CONNECT: Duration = Duration::from_secs(5);

/// Whether somebody listens on 127.0.0.11 in the namespace of the process.
pub fn is_there(pid: u32) -> bool {
    ["udp", "tcp"].iter().any(|table| {
        let text = fs::read_to_string(format!("/proc/{pid}/net/{table}"));
        text.is_ok_and(|text| listens(&text))
    })
}

/// proc_net(5): the second column is the local address, in the byte order of the machine.
fn listens(table: &str) -> bool {
    let address = format!("{:08X}:", u32::from_ne_bytes(ADDRESS.octets()));
    let mut local = table.lines().filter_map(|l| l.split_whitespace().nth(1));
    local.any(|l| l.starts_with(&address))
}

/// The queries of a pod that are under way.
pub struct Queries {
    all: Arc<Semaphore>,
    /// Those that still connect, which takes a thread.
    connecting: Arc<Semaphore>,
}

impl Default for Queries {
    fn default() -> Self {
        Self {
            all: Arc::new(Semaphore::new(RESOLVER_QUERIES_MAX)),
            connecting: Arc::new(Semaphore::new(RESOLVER_CONNECTS)),
        }
    }
}

impl Queries {
    /// Answers one of the guest's; one too many is closed, and the guest asks again.
    pub fn answer(&self, stream: UnixStream, network: Arc<Network>) {
        self.answer_by(stream, network, PORT);
    }

    fn answer_by(&self, stream: UnixStream, network: Arc<Network>, port: u16) {
        let Ok(permit) = self.all.clone().try_acquire_owned() else {
            return;
        };
        let connecting = self.connecting.clone();
        tokio::spawn(async move {
            let answered = timeout(QUERY, ask(stream, network, port, connecting)).await;
            if let Ok(Err(error)) = answered {
                tracing::debug!(%error, "a query to 127.0.0.11");
            }
            drop(permit);
        });
    }
}

async fn ask(
    mut guest: UnixStream,
    network: Arc<Network>,
    port: u16,
    connecting: Arc<Semaphore>,
) -> io::Result<()> {
    let turn = connecting.acquire_owned().await.map_err(io::Error::other)?;
    let connected = tokio::task::spawn_blocking(move || {
        let to = SocketAddr::from((ADDRESS, port));
        let connect = || std::net::TcpStream::connect_timeout(&to, CONNECT);
        let connected = network.namespace().run(connect);
        // Also when nobody waits for it any more.
        drop(turn);
        connected
    });
    let stream = connected.await.map_err(io::Error::other)??;
    stream.set_nonblocking(true)?;
    let mut resolver = TcpStream::from_std(stream)?;
    copy_bidirectional_with_sizes(&mut guest, &mut resolver, FORWARD_BUFFER, FORWARD_BUFFER)
        .await
        .map(drop)
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;
    use crate::{
        config::Engine,
        sandbox::{control, network::namespace::Namespace},
    };

    #[test]
    fn a_listener_on_its_address_is_seen() {
        let head = "  sl  local_address rem_address   st\n";
        assert!(listens(&format!(
            "{head}   0: 0B00007F:9C40 00000000:0000 07\n"
        )));
        assert!(!listens(&format!(
            "{head}   0: 0100007F:0035 0B00007F:0035 07\n"
        )));
    }

    #[tokio::test]
    async fn a_query_reaches_what_listens_in_the_namespace() {
        let dir = tempfile::tempdir().unwrap();
        let control = control::Client::new(dir.path().join("control.sock"));
        let namespace = Namespace::fresh().unwrap();
        let network = Network::new(namespace, dir.path(), control, Engine::Emulated, 1).unwrap();
        let docker = network
            .namespace()
            .run(|| std::net::TcpListener::bind((ADDRESS, 0)));
        let docker = docker.unwrap();
        docker.set_nonblocking(true).unwrap();
        let docker = tokio::net::TcpListener::from_std(docker).unwrap();
        let port = docker.local_addr().unwrap().port();
        let (mut guest, host) = UnixStream::pair().unwrap();
        Queries::default().answer_by(host, network, port);
        guest.write_all(b"\0\x03who").await.unwrap();
        let (mut stream, _) = docker.accept().await.unwrap();
        let mut query = [0; 5];
        stream.read_exact(&mut query).await.unwrap();
        assert_eq!(&query, b"\0\x03who");
        stream.write_all(b"\0\x02me").await.unwrap();
        let mut answer = [0; 4];
        guest.read_exact(&mut answer).await.unwrap();
        assert_eq!(&answer, b"\0\x02me");
    }
}
