//! Connections of the host to TCP ports of the pod's loopback (vsock port FORWARD_PORT): a header line, an answer line, then bytes both
//! ways. The end of one direction is passed on, the other goes on.

use std::{
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use bulkhead_protocol::{
    forward::{ForwardHeader, encode_answer},
    limits::{FORWARD_BUFFER, FORWARD_CONNECTIONS_MAX, FORWARD_LINE_MAX},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
    sync::Semaphore,
    time::timeout,
};

use super::PodNetwork;
use crate::{
    error::{Context, Error, Result},
    streams::read_line,
};

/// How long a connection may take to send its header, and a port to take a connection.
const PATIENCE: Duration = Duration::from_secs(10);

/// Carries connections into a pod's network.
pub struct Forwarder {
    network: Arc<PodNetwork>,
    slots: Semaphore,
}

impl Forwarder {
    /// For this network.
    pub fn new(network: Arc<PodNetwork>) -> Self {
        Self {
            network,
            slots: Semaphore::new(FORWARD_CONNECTIONS_MAX),
        }
    }

    /// Serves one connection of the host to its end.
    pub async fn serve(&self, mut host: impl AsyncRead + AsyncWrite + Unpin) {
        let Ok(_slot) = self.slots.try_acquire() else {
            let text = format!("the pod has {FORWARD_CONNECTIONS_MAX} connections");
            let _ = host.write_all(encode_answer(Err(&text)).as_bytes()).await;
            return;
        };
        let connected = match timeout(PATIENCE, read_header(&mut host)).await {
            Ok(Some(header)) => self.connect(header).await,
            _ => return,
        };
        let (answer, pod) = match connected {
            Ok(pod) => (encode_answer(Ok(())), Some(pod)),
            Err(error) => (encode_answer(Err(&error.text())), None),
        };
        if host.write_all(answer.as_bytes()).await.is_err() {
            return;
        }
        if let Some(mut pod) = pod {
            let size = FORWARD_BUFFER;
            let _ = tokio::io::copy_bidirectional_with_sizes(&mut host, &mut pod, size, size).await;
        }
    }

    async fn connect(&self, header: ForwardHeader) -> Result<TcpStream> {
        let port = header.port.get();
        let (address, socket) = if header.ipv6 {
            let address = SocketAddr::from((Ipv6Addr::LOCALHOST, port));
            (address, self.network.within(TcpSocket::new_v6)?)
        } else {
            let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
            (address, self.network.within(TcpSocket::new_v4)?)
        };
        match timeout(PATIENCE, socket.connect(address)).await {
            Ok(connected) => connected.step(|| format!("connect to {address}")),
            Err(_) => Err(Error::State(format!("connect to {address}: no answer"))),
        }
    }
}

/// Reads the header; what follows it is the port's.
async fn read_header(host: &mut (impl AsyncRead + Unpin)) -> Option<ForwardHeader> {
    ForwardHeader::parse(&read_line(host, FORWARD_LINE_MAX).await?).ok()
}

#[cfg(test)]
mod tests {
    use bulkhead_protocol::forward::parse_answer;
    use tokio::{
        io::{AsyncReadExt, DuplexStream},
        net::TcpListener,
    };

    use super::*;

    fn run<F: Future>(test: impl FnOnce(Arc<Forwarder>, Arc<PodNetwork>) -> F) -> F::Output {
        let network = Arc::new(PodNetwork::default());
        let forwarder = Arc::new(Forwarder::new(Arc::clone(&network)));
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(test(forwarder, network))
    }

    fn listen(network: &PodNetwork, ipv6: bool) -> (TcpListener, u16) {
        let listener = network
            .within(|| std::net::TcpListener::bind(if ipv6 { "[::1]:0" } else { "127.0.0.1:0" }))
            .unwrap();
        listener.set_nonblocking(true).unwrap();
        let port = listener.local_addr().unwrap().port();
        (TcpListener::from_std(listener).unwrap(), port)
    }

    fn dial(forwarder: &Arc<Forwarder>) -> DuplexStream {
        let (ours, theirs) = tokio::io::duplex(1024);
        let forwarder = Arc::clone(forwarder);
        tokio::spawn(async move { forwarder.serve(theirs).await });
        ours
    }

    async fn ask(
        host: &mut DuplexStream,
        port: u16,
        ipv6: bool,
    ) -> std::result::Result<(), String> {
        let port = port.try_into().unwrap();
        let header = ForwardHeader { port, ipv6 };
        host.write_all(header.encode().as_bytes()).await.unwrap();
        answer(host).await
    }

    async fn answer(host: &mut DuplexStream) -> std::result::Result<(), String> {
        let mut line = Vec::new();
        loop {
            match host.read_u8().await.map_err(|error| error.to_string())? {
                b'\n' => break,
                byte => line.push(byte),
            }
        }
        parse_answer(&line).map_err(|error| error.to_string())
    }

    #[test]
    fn bytes_go_both_ways_and_each_direction_ends_by_itself() {
        for ipv6 in [false, true] {
            run(|forwarder, network| async move {
                let (listener, port) = listen(&network, ipv6);
                let mut host = dial(&forwarder);
                ask(&mut host, port, ipv6).await.unwrap();
                let (mut pod, _) = listener.accept().await.unwrap();
                host.write_all(b"question").await.unwrap();
                host.shutdown().await.unwrap();
                let mut text = String::new();
                pod.read_to_string(&mut text).await.unwrap();
                assert_eq!(text, "question");
                // The other direction still works.
                let reply = vec![b'x'; 100_000];
                let sent = reply.clone();
                tokio::spawn(async move { pod.write_all(&sent).await });
                let mut got = Vec::new();
                host.read_to_end(&mut got).await.unwrap();
                assert!(got == reply);
            });
        }
    }

    #[test]
    fn a_port_without_listener_is_an_error_in_words() {
        run(|forwarder, network| async move {
            let (listener, port) = listen(&network, false);
            drop(listener);
            let error = ask(&mut dial(&forwarder), port, false).await.unwrap_err();
            assert_eq!(
                error,
                format!("connect to 127.0.0.1:{port}: connection refused")
            );
        });
    }

    #[test]
    fn a_header_that_is_none_ends_the_connection() {
        run(|forwarder, _| async move {
            for line in [
                "{\"port\":0,\"ipv6\":false}\n".to_string(),
                "x".repeat(FORWARD_LINE_MAX),
            ] {
                let mut host = dial(&forwarder);
                host.write_all(line.as_bytes()).await.unwrap();
                assert!(answer(&mut host).await.is_err());
            }
        });
    }

    #[test]
    fn connections_above_the_cap_are_refused_and_room_comes_back() {
        run(|forwarder, network| async move {
            let (listener, port) = listen(&network, false);
            let mut open = Vec::new();
            for _ in 0..FORWARD_CONNECTIONS_MAX {
                let mut host = dial(&forwarder);
                ask(&mut host, port, false).await.unwrap();
                open.push((host, listener.accept().await.unwrap()));
            }
            let error = answer(&mut dial(&forwarder)).await.unwrap_err();
            assert!(error.contains("256 connections"), "{error}");
            drop(open.pop());
            // The task of the connection that ended needs a turn or two.
            let mut again = Err(String::new());
            for _ in 0..100 {
                tokio::time::sleep(Duration::from_millis(5)).await;
                again = ask(&mut dial(&forwarder), port, false).await;
                if again.is_ok() {
                    break;
                }
            }
            again.unwrap();
        });
    }
}
