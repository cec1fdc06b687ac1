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
use ttrpc::proto::MESSAGE_TYPE_RESPONSE;

use crate::limits::AGENT_FRAME;

/// Bytes of a ttrpc header; the first four are the length of what follows it, big-endian.
const HEADER: usize = 10;

/// Frames in one direction.
#[derive(Default)]
struct Frames {
    header: [u8; HEADER],
    /// Bytes of `header` that have come.
    seen: usize,
    /// Bytes of the frame's body that have not.
    body: usize,
}

impl Frames {
    /// Follows the frames through `bytes`; `begins` sees the type of each and the length of its body.
    fn follow(
        &mut self,
        mut bytes: &[u8],
        mut begins: impl FnMut(u8, usize) -> io::Result<()>,
    ) -> io::Result<()> {
        while !bytes.is_empty() {
            let missing = HEADER - self.seen;
            let part = if missing == 0 { self.body } else { missing };
            let (now, later) = bytes.split_at(part.min(bytes.len()));
            bytes = later;
            if missing == 0 {
                self.body -= now.len();
            } else {
                self.header[self.seen..self.seen + now.len()].copy_from_slice(now);
                self.seen += now.len();
                if self.seen < HEADER {
                    return Ok(());
                }
                let [a, b, c, d, _, _, _, _, kind, _] = self.header;
                self.body = usize::try_from(u32::from_be_bytes([a, b, c, d])).unwrap_or(usize::MAX);
                begins(kind, self.body)?;
            }
            if self.body == 0 {
                self.seen = 0;
            }
        }
        Ok(())
    }
}

/// A client's stream: from it come answers alone, each to a request, and none above [`AGENT_FRAME`]. With anything else the
/// connection ends: ttrpc keeps a stream's end for ever, and reads what nobody asked for.
pub struct Capped {
    stream: UnixStream,
    requests: Frames,
    answers: Frames,
    /// Requests without an answer.
    open: u64,
}

impl Capped {
    /// From the stream's beginning on.
    pub fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            requests: Frames::default(),
            answers: Frames::default(),
            open: 0,
        }
    }

    fn check(&mut self, bytes: &[u8]) -> io::Result<()> {
        let open = &mut self.open;
        self.answers.follow(bytes, |kind, len| {
            let why = if len > AGENT_FRAME {
                format!("the agent's answer has {len} bytes, {AGENT_FRAME} is the most")
            } else if kind != MESSAGE_TYPE_RESPONSE {
                format!("the agent sends a frame of type {kind}")
            } else if let Some(rest) = open.checked_sub(1) {
                *open = rest;
                return Ok(());
            } else {
                "the agent answers what nobody asked".to_owned()
            };
            Err(io::Error::new(io::ErrorKind::InvalidData, why))
        })
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
        let written = ready!(Pin::new(&mut self.stream).poll_write(cx, buf))?;
        let Self { requests, open, .. } = &mut *self;
        requests.follow(&buf[..written], |_, _| {
            *open += 1;
            Ok(())
        })?;
        Poll::Ready(Ok(written))
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
    use ttrpc::proto::{MESSAGE_TYPE_DATA, MESSAGE_TYPE_REQUEST};

    use super::*;

    fn frame(kind: u8, len: usize) -> Vec<u8> {
        let mut frame = vec![7; HEADER + len];
        frame[..4].copy_from_slice(&u32::try_from(len).unwrap().to_be_bytes());
        frame[8] = kind;
        frame
    }

    fn answer(len: usize) -> Vec<u8> {
        frame(MESSAGE_TYPE_RESPONSE, len)
    }

    /// A connection on which so many requests are open, and the agent's end of it.
    async fn asked(requests: usize) -> (Capped, UnixStream) {
        let (mut agent, ours) = UnixStream::pair().unwrap();
        let mut ours = Capped::new(ours);
        let all = vec![frame(MESSAGE_TYPE_REQUEST, 5); requests].concat();
        // In pieces that straddle headers and bodies.
        for piece in all.chunks(7) {
            ours.write_all(piece).await.unwrap();
        }
        let mut read = vec![0; all.len()];
        agent.read_exact(&mut read).await.unwrap();
        assert!(read == all);
        (ours, agent)
    }

    async fn refused(bad: &[u8], why: &str) {
        let (mut ours, mut agent) = asked(1).await;
        agent.write_all(bad).await.unwrap();
        let mut all = Vec::new();
        let error = ours.read_to_end(&mut all).await.unwrap_err().to_string();
        assert!(error.contains(why), "{error}");
    }

    #[tokio::test]
    async fn a_frame_above_the_cap_ends_the_connection_before_its_body() {
        let (mut ours, mut agent) = asked(5).await;
        let good = [answer(3), answer(0), answer(AGENT_FRAME), answer(1)].concat();
        let (sent, bad) = (good.clone(), answer(AGENT_FRAME + 1));
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

    #[tokio::test]
    async fn what_is_no_answer_or_answers_nothing_ends_the_connection() {
        refused(&frame(MESSAGE_TYPE_DATA, 1), "type 3").await;
        refused(&[answer(1), answer(0)].concat(), "nobody asked").await;
    }
}
