//! The connection to the agent with a cap on its frames: a message can take over a hundred times its bytes once it is decoded
//! (protobuf keeps unknown fields), and the shim does not live in the pod's cgroup.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::UnixStream,
};

use crate::limits::AGENT_FRAME;

/// Bytes of a ttrpc header; the first four are the length of what follows it, big-endian.
const HEADER: usize = 10;

/// A stream from which no frame above [`AGENT_FRAME`] can be read: the connection ends there.
pub struct Capped {
    stream: UnixStream,
    header: [u8; HEADER],
    /// Bytes of `header` that have come.
    seen: usize,
    /// Bytes of the frame's body that have not.
    body: usize,
}

impl Capped {
    /// From the stream's beginning on.
    pub fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            header: [0; HEADER],
            seen: 0,
            body: 0,
        }
    }

    /// Follows the frames through `bytes`.
    fn check(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let part = if self.seen == HEADER {
                self.body
            } else {
                HEADER - self.seen
            };
            let (now, later) = bytes.split_at(part.min(bytes.len()));
            bytes = later;
            if self.seen == HEADER {
                self.body -= now.len();
            } else {
                self.header[self.seen..self.seen + now.len()].copy_from_slice(now);
                self.seen += now.len();
                if self.seen < HEADER {
                    return Ok(());
                }
                let [a, b, c, d, ..] = self.header;
                self.body = usize::try_from(u32::from_be_bytes([a, b, c, d])).unwrap_or(usize::MAX);
                if self.body > AGENT_FRAME {
                    let why = format!(
                        "the agent's answer has {} bytes, {AGENT_FRAME} is the most",
                        self.body
                    );
                    return Err(io::Error::new(io::ErrorKind::InvalidData, why));
                }
            }
            if self.body == 0 {
                self.seen = 0;
            }
        }
        Ok(())
    }
}

impl AsyncRead for Capped {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(cx, buf))?;
        let checked = self.check(&buf.filled()[before..]);
        if checked.is_err() {
            buf.set_filled(before);
        }
        Poll::Ready(checked)
    }
}

impl AsyncWrite for Capped {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    fn frame(len: usize) -> Vec<u8> {
        let mut frame = vec![7; HEADER + len];
        frame[..4].copy_from_slice(&u32::try_from(len).unwrap().to_be_bytes());
        frame
    }

    #[tokio::test]
    async fn a_frame_above_the_cap_ends_the_connection_before_its_body() {
        let (agent, ours) = UnixStream::pair().unwrap();
        let (mut agent, mut ours) = (agent, Capped::new(ours));
        // In pieces that straddle headers and bodies, and an empty one between.
        let good = [frame(3), frame(0), frame(AGENT_FRAME), frame(1)].concat();
        let sent = good.clone();
        let bad = frame(AGENT_FRAME + 1);
        let writer = tokio::spawn(async move {
            for piece in sent.chunks(7777) {
                agent.write_all(piece).await.unwrap();
            }
            let _ = agent.write_all(&bad[..HEADER]).await;
            agent
        });
        let mut read = vec![0; good.len()];
        for piece in read.chunks_mut(4099) {
            ours.read_exact(piece).await.unwrap();
        }
        assert!(read == good);
        let error = ours.read(&mut [0; 64]).await.unwrap_err().to_string();
        assert!(error.contains(&AGENT_FRAME.to_string()), "{error}");
        drop(writer.await.unwrap());
    }
}
