//! kubelet's port-forward over WebSocket, as containerd's streaming server speaks it (`v4.channel.k8s.io`): a channel for
//! data and one for errors, named by the first byte of each message; the first message of each tells the port.

use std::{net::TcpStream, time::Duration};

use bulkhead_harness::{Context, Outcome};
use tungstenite::{Message, WebSocket};

use crate::stream::web_socket;

/// A forwarded connection.
#[derive(Debug)]
pub struct Forwarded {
    socket: WebSocket<TcpStream>,
    got: Vec<u8>,
}

impl Forwarded {
    /// Dials the streaming server at `url` from the network namespace of the process `pid`.
    pub fn dial(pid: u32, url: &str, limit: Duration) -> Outcome<Self> {
        Ok(Self {
            socket: web_socket(pid, url, limit)?,
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
