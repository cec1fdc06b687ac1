//! Exec and Attach over WebSocket, as containerd's streaming server speaks them (`v4.channel.k8s.io`): the first byte of a message
//! names its channel. What the process ended with comes as a status of Kubernetes on the channel for errors.

use std::{net::TcpStream, time::Duration};

use bulkhead_harness::{Context, Failure, Outcome};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde_json::Value;
use tungstenite::{Message, WebSocket, client::IntoClientRequest, http::HeaderValue};

const PROTOCOL: &str = "v4.channel.k8s.io";

const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const ERROR: u8 = 3;
const RESIZE: u8 = 4;

/// A connection to a process's streams.
#[derive(Debug)]
pub struct Stream {
    socket: WebSocket<TcpStream>,
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    end: Option<Value>,
}

impl Stream {
    /// Dials the streaming server at `url` from the network namespace of the process `pid`.
    pub fn dial(pid: u32, url: &str, limit: Duration) -> Outcome<Self> {
        Ok(Self {
            socket: web_socket(pid, url, limit)?,
            stdout: Vec::new(),
            stderr: Vec::new(),
            end: None,
        })
    }

    /// Types something.
    pub fn send(&mut self, bytes: &[u8]) -> Outcome {
        self.message(STDIN, bytes)
    }

    /// Sets the terminal's size.
    pub fn resize(&mut self, columns: u16, rows: u16) -> Outcome {
        let size = format!("{{\"Width\":{columns},\"Height\":{rows}}}");
        self.message(RESIZE, size.as_bytes())
    }

    fn message(&mut self, channel: u8, bytes: &[u8]) -> Outcome {
        let message = [&[channel], bytes].concat();
        let sent = self.socket.send(Message::binary(message));
        sent.context("send to the process")
    }

    /// Reads until stdout holds `needle`.
    pub fn wait_for(&mut self, needle: &str) -> Outcome {
        while !String::from_utf8_lossy(&self.stdout).contains(needle) {
            if !self.read()? {
                let text = String::from_utf8_lossy(&self.stdout);
                return Err(format!("the end without {needle:?}, but with {text:?}").into());
            }
        }
        Ok(())
    }

    /// Reads to the end: stdout, stderr and the exit code.
    pub fn end(mut self) -> Outcome<(String, String, i64)> {
        while self.read()? {}
        let end = self.end.context("no status at the end")?;
        let code = match end["status"].as_str() {
            Some("Success") => 0,
            _ => {
                let cause = end["details"]["causes"][0]["message"].as_str();
                let code = cause.and_then(|code| code.parse().ok());
                code.context(format_args!("exit code in {end}"))?
            }
        };
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Ok((text(&self.stdout), text(&self.stderr), code))
    }

    /// One message; false at the end.
    fn read(&mut self) -> Outcome<bool> {
        use tungstenite::Error;
        let bytes = match self.socket.read() {
            Ok(Message::Binary(bytes)) => bytes,
            Ok(Message::Close(_)) | Err(Error::ConnectionClosed | Error::AlreadyClosed) => {
                return Ok(false);
            }
            Ok(_) => return Ok(true),
            // The server closes without a word once it has told the status.
            Err(_) if self.end.is_some() => return Ok(false),
            Err(error) => {
                let text = String::from_utf8_lossy(&self.stdout);
                return Err(Failure::Failed(format!("{error}; stdout so far: {text:?}")));
            }
        };
        match bytes.split_first() {
            Some((&STDOUT, bytes)) => self.stdout.extend_from_slice(bytes),
            Some((&STDERR, bytes)) => self.stderr.extend_from_slice(bytes),
            Some((&ERROR, bytes)) if !bytes.is_empty() => {
                self.end = Some(serde_json::from_slice(bytes).context("the status")?);
            }
            _ => {}
        }
        Ok(true)
    }
}

/// Opens a WebSocket from the network namespace of the process `pid`.
pub(crate) fn web_socket(pid: u32, url: &str, limit: Duration) -> Outcome<WebSocket<TcpStream>> {
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
    Ok(socket)
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
