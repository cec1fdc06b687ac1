//! A connection of containerd, passed on to the worker frame by frame, with the calls that have no answer yet.

use std::{
    collections::BTreeMap,
    io::{self, Read, Write},
    os::unix::net::UnixStream,
    time::{Duration, Instant},
};

use rustix::event::{PollFd, PollFlags};

use super::{
    frame::{Cutter, Frame},
    stream_pair,
};
use crate::limits::{CLIENT_CALL_BYTES, CLIENT_CALLS, CLIENT_TRIES, CLIENT_WAITING};

/// How long the worker's death may take to be seen after one of its connections ended; a connection that it closed alone is closed.
const DEATH: Duration = Duration::from_secs(1);

/// A call without an answer.
struct Call {
    frame: Frame,
    since: Instant,
    /// Workers that died before they answered.
    tries: u32,
}

/// One connection.
pub struct Client {
    outer: UnixStream,
    inner: UnixStream,
    asked: Cutter,
    answered: Cutter,
    to_worker: Vec<u8>,
    to_client: Vec<u8>,
    /// By stream.
    calls: BTreeMap<u32, Call>,
    /// What they take.
    call_bytes: usize,
    /// Since when the worker's end is closed.
    lost: Option<Instant>,
    over: bool,
}

impl Client {
    /// A new connection, and the worker's end of it.
    pub fn new(outer: UnixStream) -> io::Result<(Self, UnixStream)> {
        outer.set_nonblocking(true)?;
        let (inner, theirs) = stream_pair()?;
        let client = Self {
            outer,
            inner,
            asked: Cutter::default(),
            answered: Cutter::default(),
            to_worker: Vec::new(),
            to_client: Vec::new(),
            calls: BTreeMap::new(),
            call_bytes: 0,
            lost: None,
            over: false,
        };
        Ok((client, theirs))
    }

    /// Whether it has ended.
    pub fn is_over(&self) -> bool {
        self.over || self.lost.is_some_and(|at| at.elapsed() > DEATH)
    }

    /// Whether something is still on its way to containerd.
    pub fn has_words(&self) -> bool {
        !self.over && (self.lost.is_none() || !self.to_client.is_empty())
    }

    /// When it wants to be looked at even if nothing happens.
    pub fn timeout(&self) -> Option<Duration> {
        self.lost.map(|_| DEATH / 4)
    }

    /// Since when the oldest of its calls has no answer.
    pub fn unanswered(&self) -> Option<Instant> {
        self.calls.values().map(|call| call.since).min()
    }

    /// What it waits for.
    pub fn interests<'a>(&'a self, fds: &mut Vec<PollFd<'a>>) {
        let mut outer = PollFlags::empty();
        outer.set(PollFlags::IN, self.takes_calls());
        outer.set(PollFlags::OUT, !self.to_client.is_empty());
        // Without an interest only its end would be told, again and again.
        if !outer.is_empty() {
            fds.push(PollFd::new(&self.outer, outer));
        }
        if self.lost.is_none() {
            let mut inner = PollFlags::empty();
            inner.set(PollFlags::IN, self.to_client.len() < CLIENT_WAITING);
            inner.set(PollFlags::OUT, !self.to_worker.is_empty());
            fds.push(PollFd::new(&self.inner, inner));
        }
    }

    fn takes_calls(&self) -> bool {
        self.to_worker.len() < CLIENT_WAITING
    }

    /// Moves what can be moved.
    pub fn pump(&mut self) {
        if self.over {
            return;
        }
        let outer = self.take_calls().and_then(|open| {
            self.take_answers()?;
            write(&mut self.outer, &mut self.to_client)?;
            Ok(open)
        });
        self.over = !outer.unwrap_or(false);
        // A worker that is gone is seen by reading, after its last answers.
        if self.lost.is_none() {
            let _ = write(&mut self.inner, &mut self.to_worker);
        }
    }

    /// From containerd; false at its end.
    fn take_calls(&mut self) -> io::Result<bool> {
        while self.takes_calls() {
            let mut buffer = [0; 16 << 10];
            let Some(n) = read(&mut self.outer, &mut buffer)? else {
                return Ok(true);
            };
            if n == 0 {
                return Ok(false);
            }
            self.asked.push(buffer.get(..n).unwrap_or_default());
            while let Some(frame) = self.asked.next()? {
                self.to_worker.extend_from_slice(frame.bytes());
                self.remember(frame);
            }
        }
        Ok(true)
    }

    fn remember(&mut self, frame: Frame) {
        let bytes = self.call_bytes.saturating_add(frame.bytes().len());
        if frame.is_request() && self.calls.len() < CLIENT_CALLS && bytes <= CLIENT_CALL_BYTES {
            self.forget(frame.stream());
            self.call_bytes = self.call_bytes.saturating_add(frame.bytes().len());
            let call = Call {
                frame,
                since: Instant::now(),
                tries: 0,
            };
            self.calls.insert(call.frame.stream(), call);
        }
    }

    fn forget(&mut self, stream: u32) {
        if let Some(call) = self.calls.remove(&stream) {
            self.call_bytes = self.call_bytes.saturating_sub(call.frame.bytes().len());
        }
    }

    /// From the worker.
    fn take_answers(&mut self) -> io::Result<()> {
        while self.lost.is_none() && self.to_client.len() < CLIENT_WAITING {
            let mut buffer = [0; 16 << 10];
            match read(&mut self.inner, &mut buffer) {
                Ok(None) => return Ok(()),
                Ok(Some(0)) | Err(_) => self.lost = Some(Instant::now()),
                Ok(Some(n)) => self.answered.push(buffer.get(..n).unwrap_or_default()),
            }
            while let Some(frame) = self.answered.next()? {
                if frame.is_response() {
                    self.forget(frame.stream());
                }
                self.to_client.extend_from_slice(frame.bytes());
            }
        }
        Ok(())
    }

    /// Connects it to a new worker: gives back that one's end. The calls without an answer are sent again; one that was sent too often
    /// is answered with an error, unless it only waits.
    pub fn reconnect(&mut self) -> io::Result<UnixStream> {
        // Answers that were on their way are answers.
        if self.lost.is_none() {
            let _ = self.take_answers();
        }
        let (inner, theirs) = stream_pair()?;
        self.inner = inner;
        self.lost = None;
        self.answered.clear();
        self.to_worker.clear();
        let (to_worker, to_client) = (&mut self.to_worker, &mut self.to_client);
        self.calls.retain(|&stream, call| {
            call.tries = call.tries.saturating_add(1);
            let again = call.tries <= CLIENT_TRIES || call.frame.waits();
            match again {
                true => to_worker.extend_from_slice(call.frame.bytes()),
                false => to_client.extend_from_slice(Frame::lost(stream).bytes()),
            }
            again
        });
        let left = self.calls.values().map(|call| call.frame.bytes().len());
        self.call_bytes = left.sum();
        Ok(theirs)
    }
}

/// None if there is nothing to read now.
fn read(from: &mut UnixStream, buffer: &mut [u8]) -> io::Result<Option<usize>> {
    loop {
        match from.read(buffer) {
            Ok(n) => return Ok(Some(n)),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(e) => return Err(e),
        }
    }
}

/// Writes what goes without waiting.
fn write(to: &mut UnixStream, waiting: &mut Vec<u8>) -> io::Result<()> {
    while !waiting.is_empty() {
        match to.write(waiting) {
            Ok(n) => drop(waiting.drain(..n)),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(e) => return Err(e),
        }
    }
    waiting.shrink_to(CLIENT_WAITING);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A frame without a body.
    fn frame(stream: u8, kind: u8) -> [u8; 10] {
        [0, 0, 0, 0, 0, 0, 0, stream, kind, 0]
    }

    fn take(stream: &mut UnixStream, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        stream.set_nonblocking(false).unwrap();
        stream.read_exact(&mut bytes).unwrap();
        bytes
    }

    #[test]
    fn calls_without_an_answer_go_to_the_next_worker_and_half_an_answer_goes_nowhere() {
        let (mut containerd, outer) = UnixStream::pair().unwrap();
        let (mut client, mut worker) = Client::new(outer).unwrap();
        let asked = [frame(1, 1), frame(3, 1), frame(5, 1)].concat();
        containerd.write_all(&asked).unwrap();
        client.pump();
        assert_eq!(take(&mut worker, 30), asked);
        worker.write_all(&frame(3, 2)).unwrap();
        worker.write_all(&frame(5, 2)[..4]).unwrap();
        client.pump();
        assert_eq!(take(&mut containerd, 10), frame(3, 2));
        drop(worker);
        client.pump();
        assert!(!client.is_over());
        let mut next = client.reconnect().unwrap();
        client.pump();
        assert_eq!(take(&mut next, 20), [frame(1, 1), frame(5, 1)].concat());
        next.write_all(&frame(5, 2)).unwrap();
        client.pump();
        assert_eq!(take(&mut containerd, 10), frame(5, 2));
    }

    #[test]
    fn an_answer_that_was_on_its_way_when_the_worker_died_arrives() {
        let (mut containerd, outer) = UnixStream::pair().unwrap();
        let (mut client, mut worker) = Client::new(outer).unwrap();
        containerd.write_all(&frame(1, 1)).unwrap();
        client.pump();
        worker.write_all(&frame(1, 2)).unwrap();
        drop(worker);
        let next = client.reconnect().unwrap();
        client.pump();
        assert_eq!(take(&mut containerd, 10), frame(1, 2));
        next.set_nonblocking(true).unwrap();
        let again = read(&mut { next }, &mut [0; 10]).unwrap();
        assert_eq!(again, None);
    }

    #[test]
    fn a_call_that_no_worker_outlives_is_given_up() {
        let (mut containerd, outer) = UnixStream::pair().unwrap();
        let (mut client, _worker) = Client::new(outer).unwrap();
        containerd.write_all(&frame(1, 1)).unwrap();
        client.pump();
        for _ in 0..CLIENT_TRIES {
            client.reconnect().unwrap();
            assert_eq!(client.calls.len(), 1);
        }
        client.reconnect().unwrap();
        assert!(client.calls.is_empty());
        client.pump();
        let mut said = [0; 10];
        containerd.read_exact(&mut said).unwrap();
        assert_eq!(&said[7..9], &[1, 2]);
    }

    #[test]
    fn calls_beyond_the_caps_are_passed_on_and_not_remembered() {
        let (_containerd, outer) = UnixStream::pair().unwrap();
        let (mut client, _worker) = Client::new(outer).unwrap();
        let call = |stream: u32, body: usize| {
            let mut bytes = (body as u32).to_be_bytes().to_vec();
            bytes.extend(stream.to_be_bytes());
            bytes.extend([1, 0]);
            bytes.resize(10 + body, 0);
            let mut cutter = Cutter::default();
            cutter.push(&bytes);
            cutter.next().unwrap().unwrap()
        };
        for stream in 0..CLIENT_CALLS as u32 + 10 {
            client.remember(call(stream, 0));
        }
        assert_eq!(client.calls.len(), CLIENT_CALLS);
        for stream in 0..CLIENT_CALLS as u32 {
            client.forget(stream);
        }
        assert_eq!(client.call_bytes, 0);
        for stream in 0..20 {
            client.remember(call(stream, 4 << 20));
        }
        assert_eq!(client.calls.len(), CLIENT_CALL_BYTES / ((4 << 20) + 10));
    }

    #[test]
    fn a_client_that_writes_and_a_worker_that_does_not_read_stop_each_other() {
        let (mut containerd, outer) = UnixStream::pair().unwrap();
        let (mut client, _worker) = Client::new(outer).unwrap();
        containerd.set_nonblocking(true).unwrap();
        let flood = frame(1, 1).repeat(1 << 20);
        let mut sent = 0;
        for _ in 0..1000 {
            while let Ok(n) = containerd.write(&flood[sent..]) {
                sent += n;
            }
            client.pump();
        }
        assert!(sent < flood.len(), "all of it was taken");
        assert!(client.to_worker.len() <= CLIENT_WAITING + (16 << 10));
    }

    #[test]
    fn a_client_that_goes_is_over() {
        let (containerd, outer) = UnixStream::pair().unwrap();
        let (mut client, _worker) = Client::new(outer).unwrap();
        client.pump();
        assert!(!client.is_over());
        drop(containerd);
        client.pump();
        assert!(client.is_over());
    }
}
