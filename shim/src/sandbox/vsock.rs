//! The host's side of vsock: a unix socket where `CONNECT <port>` leads into the guest, and the socket at which the
//! guest says that it is ready.

use std::{io, path::Path, time::Duration};

use bulkhead_failpoint::patience;
use bulkhead_protocol::{
    limits::STREAM_PORT,
    stream::{StreamHeader, StreamKind},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    sync::mpsc,
    time::timeout,
};

use crate::limits::{READY_CONNECTIONS, VSOCK_LINE};

/// How long the VMM and the guest may take to accept a connection.
const CONNECT: Duration = Duration::from_secs(20);

/// How long the guest may take for its line on the ready port.
const READY_LINE: Duration = Duration::from_secs(1);

/// Connects to a port of the guest.
pub async fn connect(socket: &Path, port: u32) -> io::Result<UnixStream> {
    let connecting = async {
        let mut stream = UnixStream::connect(socket).await?;
        stream
            .write_all(format!("CONNECT {port}\n").as_bytes())
            .await?;
        let line = read_line(&mut stream, VSOCK_LINE).await?;
        if line.starts_with("OK ") {
            return Ok(stream);
        }
        Err(io::Error::new(
            io::ErrorKind::ConnectionRefused,
            format!("guest port {port}: answer {line:?}"),
        ))
    };
    timeout(patience(CONNECT), connecting)
        .await
        .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, format!("guest port {port}")))?
}

/// Connects to a standard stream of a process in the guest.
pub async fn connect_stream(
    socket: &Path,
    container: &str,
    exec: &str,
    stream: StreamKind,
) -> io::Result<UnixStream> {
    let header = StreamHeader {
        container: container.into(),
        exec: exec.into(),
        stream,
    };
    let line = header.encode().map_err(io::Error::other)?;
    let mut connection = connect(socket, STREAM_PORT).await?;
    connection.write_all(&line).await?;
    Ok(connection)
}

/// Waits for the agent's `ready <version>` and gives back the version. A guest that says something else is heard a few times.
pub async fn accept_ready(connections: &mut mpsc::Receiver<UnixStream>) -> io::Result<String> {
    let gone = || io::Error::other("the VMM is gone");
    for _ in 0..READY_CONNECTIONS {
        let mut stream = connections.recv().await.ok_or_else(gone)?;
        let line = match timeout(READY_LINE, read_line(&mut stream, VSOCK_LINE)).await {
            Ok(line) => line.unwrap_or_else(|error| error.to_string()),
            Err(late) => late.to_string(),
        };
        match line.strip_prefix("ready ") {
            Some(version) => return Ok(version.to_owned()),
            None => tracing::warn!(?line, "unexpected line on the ready port"),
        }
    }
    Err(io::Error::other("the guest says other things than `ready`"))
}

/// Reads a short line byte by byte: what follows it belongs to somebody else.
pub async fn read_line(stream: &mut UnixStream, max: usize) -> io::Result<String> {
    let mut line = Vec::new();
    loop {
        match stream.read_u8().await? {
            b'\n' => return Ok(String::from_utf8_lossy(&line).into_owned()),
            byte if line.len() < max => line.push(byte),
            _ => return Err(io::Error::other("line is too long")),
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::UnixListener;

    use super::*;

    #[tokio::test]
    async fn lines_on_the_ready_port_have_an_end() {
        let (tell, mut ready) = mpsc::channel(READY_CONNECTIONS);
        let long = vec![b'x'; VSOCK_LINE + 1];
        let mut guests = Vec::new();
        // One that says nothing holds nobody up.
        for line in [long.as_slice(), b"steady\n", b"", b"ready 1.2.3\n"] {
            let (mut guest, host) = UnixStream::pair().unwrap();
            guest.write_all(line).await.unwrap();
            guests.push(guest);
            tell.send(host).await.unwrap();
        }
        assert_eq!(accept_ready(&mut ready).await.unwrap(), "1.2.3");

        for _ in 0..READY_CONNECTIONS {
            let (mut guest, host) = UnixStream::pair().unwrap();
            guest.write_all(b"steady\n").await.unwrap();
            tell.send(host).await.unwrap();
        }
        assert!(accept_ready(&mut ready).await.is_err());
    }

    #[tokio::test]
    async fn a_stream_says_connect_then_its_header_then_data() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vsock.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let guest = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let connect = read_line(&mut stream, VSOCK_LINE).await.unwrap();
            stream.write_all(b"OK 1025\nfirst").await.unwrap();
            let header = read_line(&mut stream, VSOCK_LINE).await.unwrap();
            (connect, header)
        });
        let mut stream = connect_stream(&path, "web", "e1", StreamKind::Stdout)
            .await
            .unwrap();
        let mut data = [0; 5];
        stream.read_exact(&mut data).await.unwrap();
        assert_eq!(&data, b"first");
        let (connect, header) = guest.await.unwrap();
        assert_eq!(connect, "CONNECT 1025");
        assert_eq!(
            header,
            r#"{"container":"web","exec":"e1","stream":"stdout"}"#
        );
    }

    #[tokio::test]
    async fn a_port_nobody_listens_on_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vsock.sock");
        let listener = UnixListener::bind(&path).unwrap();
        tokio::spawn(async move { listener.accept().await.map(drop) });
        assert!(connect(&path, 7).await.is_err());
    }
}
