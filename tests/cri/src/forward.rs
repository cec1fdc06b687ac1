//! kubelet's port-forward over WebSocket, as containerd's streaming server speaks it (`v4.channel.k8s.io`): a channel for
//! data and one for errors, named by the first byte of each message; the first message of each tells the port.

use std::{net::TcpStream, time::Duration};

use bulkhead_harness::{Context, Failure, Outcome};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use tungstenite::{Message, WebSocket, client::IntoClientRequest, http::HeaderValue};

const PROTOCOL: &str = "v4.channel.k8s.io";

/// A forwarded connection.
#[derive(Debug)]
pub struct Forwarded {
    socket: WebSocket<TcpStream>,
    got: Vec<u8>,
}

impl Forwarded {
    /// Dials the streaming server at `url` from the network namespace of the process `pid`.
    pub fn dial(pid: u32, url: &str, limit: Duration) -> Outcome<Self> {
        let (_, rest) = url
            .split_once("://")
            .context("the streaming server's URL")?;
        let (address, _) = rest.split_once('/').context("the streaming server's URL")?;
        let stream = connect_in(pid, address.to_owned())?;
        stream
            .set_read_timeout(Some(limit))
            .context("set a limit")?;
        let request = url.replacen("http", "ws", 1).into_client_request();
        let mut request = request.context("a request")?;
        let protocol = HeaderValue::from_static(PROTOCOL);
        request
            .headers_mut()
            .insert("Sec-WebSocket-Protocol", protocol);
        let (socket, _) = tungstenite::client(request, stream)
            .map_err(|error| Failure::Failed(format!("WebSocket to {url}: {error}")))?;
        Ok(Self {
            socket,
            got: Vec::new(),
        })
    }

    /// Sends bytes to the port.
    pub fn send(&mut self, bytes: &[u8]) -> Outcome {
        let message = [&[0], bytes].concat();
        let sent = self.socket.send(Message::binary(message));
        sent.context("send to the port")
    }

    /// What the port has said, as soon as it holds `needle`.
    pub fn wait_for(&mut self, needle: &str) -> Outcome<String> {
        // Each channel's first message is the port's number.
        let mut first = [true, true];
        loop {
            let text = String::from_utf8_lossy(&self.got);
            if text.contains(needle) {
                return Ok(text.into_owned());
            }
            let message = self.socket.read();
            let message =
                message.context(format_args!("no `{needle}` from the port, but {text:?}"))?;
            let Message::Binary(bytes) = message else {
                continue;
            };
            let Some((&channel, bytes)) = bytes.split_first() else {
                continue;
            };
            match first.get_mut(usize::from(channel)) {
                Some(first) if *first => *first = false,
                _ if channel == 0 => self.got.extend_from_slice(bytes),
                _ => return Err(format!("error: {}", String::from_utf8_lossy(bytes)).into()),
            }
        }
    }
}

/// A thread enters the namespace; the socket stays there.
fn connect_in(pid: u32, address: String) -> Outcome<TcpStream> {
    let namespace = std::fs::File::open(format!("/proc/{pid}/ns/net")).context("the namespace")?;
    let dial = std::thread::spawn(move || -> Outcome<TcpStream> {
        let kind = Some(LinkNameSpaceType::Network);
        move_into_link_name_space(std::os::fd::AsFd::as_fd(&namespace), kind)
            .context("enter the namespace")?;
        TcpStream::connect(&address).context(format_args!("connect to {address}"))
    });
    dial.join()
        .unwrap_or_else(|_| Err("the dialling thread panicked".into()))
}
