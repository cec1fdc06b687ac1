//! Frames of ttrpc: ten bytes of header (length of the body, stream, type, flags; big-endian), then the body. Only the header is read here.

use std::io;

use protobuf::Message;
use ttrpc::proto::{Code, Request, Response, Status};

use crate::limits::FRAME_BODY;

/// Bytes of a header.
const HEADER: usize = 10;
/// Type of a frame that asks.
const REQUEST: u8 = 1;
/// Type of a frame that answers.
const RESPONSE: u8 = 2;

/// A whole frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame(Vec<u8>);

impl Frame {
    /// Header and body.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// The number of the call on its connection.
    pub fn stream(&self) -> u32 {
        number(&self.0, 4)
    }

    /// Whether it asks.
    pub fn is_request(&self) -> bool {
        self.0.get(8) == Some(&REQUEST)
    }

    /// Whether it asks for the end of something, which can take for ever.
    pub fn waits(&self) -> bool {
        let request = Request::parse_from_bytes(self.0.get(HEADER..).unwrap_or_default());
        request.is_ok_and(|request| matches!(request.method.as_str(), "Wait" | "WaitSandbox"))
    }

    /// Whether it answers.
    pub fn is_response(&self) -> bool {
        self.0.get(8) == Some(&RESPONSE)
    }

    /// The answer to call `stream` that it is lost.
    pub fn lost(stream: u32) -> Self {
        let mut status = Status::new();
        status.set_code(Code::UNAVAILABLE);
        status.message = "the shim died during this call; another has taken over: try again".into();
        let mut response = Response::new();
        response.set_status(status);
        let body = response.write_to_bytes().unwrap_or_default();
        let mut bytes = Vec::with_capacity(HEADER.saturating_add(body.len()));
        bytes.extend_from_slice(&u32::try_from(body.len()).unwrap_or(0).to_be_bytes());
        bytes.extend_from_slice(&stream.to_be_bytes());
        bytes.extend_from_slice(&[RESPONSE, 0]);
        bytes.extend_from_slice(&body);
        Self(bytes)
    }
}

fn number(bytes: &[u8], at: usize) -> u32 {
    let four = bytes.get(at..).and_then(|rest| rest.first_chunk());
    four.map_or(0, |four| u32::from_be_bytes(*four))
}

/// Cuts a connection's bytes into frames.
#[derive(Default)]
pub struct Cutter(Vec<u8>);

impl Cutter {
    /// More bytes.
    pub fn push(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    /// The next whole frame.
    pub fn next(&mut self) -> io::Result<Option<Frame>> {
        if self.0.len() < HEADER {
            return Ok(None);
        }
        let body = number(&self.0, 0) as usize;
        if body > FRAME_BODY {
            return Err(io::Error::other("a frame is longer than ttrpc allows"));
        }
        let length = HEADER.saturating_add(body);
        if self.0.len() < length {
            return Ok(None);
        }
        let rest = self.0.split_off(length);
        Ok(Some(Frame(std::mem::replace(&mut self.0, rest))))
    }

    /// Forgets what is no whole frame: its writer is gone.
    pub fn clear(&mut self) {
        self.0 = Vec::new();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(stream: u32, kind: u8, body: &[u8]) -> Vec<u8> {
        let mut bytes = (body.len() as u32).to_be_bytes().to_vec();
        bytes.extend(stream.to_be_bytes());
        bytes.extend([kind, 0]);
        bytes.extend(body);
        bytes
    }

    #[test]
    fn frames_come_out_whole_wherever_the_bytes_are_cut() {
        let all = [frame(1, 1, b"ask"), frame(3, 1, b""), frame(1, 2, b"told")].concat();
        for cut in 1..all.len() {
            let mut cutter = Cutter::default();
            let mut seen = Vec::new();
            for part in [&all[..cut], &all[cut..]] {
                cutter.push(part);
                while let Some(frame) = cutter.next().unwrap() {
                    seen.push(frame);
                }
            }
            let streams: Vec<u32> = seen.iter().map(Frame::stream).collect();
            assert_eq!(streams, [1, 3, 1]);
            assert!(seen[0].is_request() && seen[2].is_response());
            let bytes: Vec<u8> = seen.iter().flat_map(|f| f.bytes().to_vec()).collect();
            assert_eq!(bytes, all);
        }
    }

    #[test]
    fn a_frame_that_is_too_long_is_an_error() {
        let mut cutter = Cutter::default();
        cutter.push(&[0xff; 10]);
        assert!(cutter.next().is_err());
    }

    #[test]
    fn a_wait_is_told_from_other_calls() {
        for (method, waits) in [("Wait", true), ("WaitSandbox", true), ("Kill", false)] {
            let mut request = Request::new();
            request.method = method.into();
            let body = request.write_to_bytes().unwrap();
            let mut cutter = Cutter::default();
            cutter.push(&frame(1, REQUEST, &body));
            assert_eq!(cutter.next().unwrap().unwrap().waits(), waits);
        }
    }

    #[test]
    fn a_lost_call_is_answered_with_a_status() {
        let mut cutter = Cutter::default();
        cutter.push(Frame::lost(7).bytes());
        let frame = cutter.next().unwrap().unwrap();
        assert_eq!(frame.stream(), 7);
        assert!(frame.is_response());
        let response = Response::parse_from_bytes(&frame.bytes()[HEADER..]).unwrap();
        assert_eq!(response.status().code(), Code::UNAVAILABLE);
    }
}
