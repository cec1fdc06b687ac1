//! The debugging shell (guest port [`DEBUG_PORT`](crate::limits::DEBUG_PORT)): a header line of the host, the agent's answer line as
//! on the forwarding port ([`encode_answer`](crate::forward::encode_answer)), then frames both ways. The operator's command writes
//! the header, the agent parses it; frames are parsed on both sides, and neither trusts the other.

use serde::{Deserialize, Serialize};

use crate::limits::{DEBUG_FRAME_MAX, DEBUG_HEADER_MAX};

/// The parameter on the guest's kernel command line without which the agent offers no shell.
pub const KERNEL_PARAMETER: &str = "bulkhead.debug_shell";
/// Id of the tree with the program that has the shell and its commands (a static busybox): a file.
pub const TREE: &str = "debug";
/// Length of a frame's head.
pub const HEAD: usize = 5;

/// What the host asks for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DebugHeader {
    /// Command and arguments; never empty.
    pub args: Vec<String>,
    /// `TERM` of the terminal to make, with its width and height; without, there are pipes.
    pub terminal: Option<(String, u16, u16)>,
}

/// What a frame holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Standard input, or output.
    Data,
    /// Standard error; never with a terminal.
    Error,
    /// The end of standard input.
    Close,
    /// The terminal's new width and height, two bytes each.
    Size,
    /// The exit status, four bytes: the last frame.
    Exit,
}

/// Why something was not accepted.
#[derive(Debug, thiserror::Error)]
pub enum DebugError {
    /// No end of line within the limit.
    #[error("the header is longer than {DEBUG_HEADER_MAX} bytes")]
    TooLong,
    /// Not the JSON object that is expected.
    #[error("the header is not valid")]
    Json(#[from] serde_json::Error),
    /// No command, or an argument that no program can get.
    #[error("the header has no valid command")]
    Args,
    /// Not a frame.
    #[error("frame of kind {kind} and {length} bytes")]
    Frame {
        /// Its first byte.
        kind: u8,
        /// Its length.
        length: u32,
    },
}

impl DebugHeader {
    /// The header line, with its end of line.
    pub fn encode(&self) -> Result<Vec<u8>, DebugError> {
        let mut line = serde_json::to_vec(self)?;
        line.push(b'\n');
        Self::parse(line.trim_ascii_end())?;
        Ok(line)
    }

    /// Parses a header line without its end of line.
    pub fn parse(line: &[u8]) -> Result<Self, DebugError> {
        if line.len() >= DEBUG_HEADER_MAX {
            return Err(DebugError::TooLong);
        }
        let header: Self = serde_json::from_slice(line)?;
        let term = header.terminal.iter().map(|(term, ..)| term);
        let first = header.args.first().is_some_and(|arg| !arg.is_empty());
        if !first || header.args.iter().chain(term).any(|arg| arg.contains('\0')) {
            return Err(DebugError::Args);
        }
        Ok(header)
    }
}

/// A frame. The caller keeps to [`DEBUG_FRAME_MAX`] bytes; what is more is cut.
pub fn encode(kind: Kind, payload: &[u8]) -> Vec<u8> {
    let payload = payload.get(..DEBUG_FRAME_MAX).unwrap_or(payload);
    let kind = match kind {
        Kind::Data => 0,
        Kind::Error => 1,
        Kind::Close => 2,
        Kind::Size => 3,
        Kind::Exit => 4,
    };
    let mut frame = vec![kind];
    // The cap fits in four bytes.
    frame.extend_from_slice(&(payload.len() as u32).to_be_bytes());
    frame.extend_from_slice(payload);
    frame
}

/// A terminal's size as a frame.
pub fn encode_size(width: u16, height: u16) -> Vec<u8> {
    let ([a, b], [c, d]) = (width.to_be_bytes(), height.to_be_bytes());
    encode(Kind::Size, &[a, b, c, d])
}

/// Width and height of a [`Kind::Size`] frame.
pub fn size(payload: &[u8]) -> Option<(u16, u16)> {
    let [a, b, c, d] = payload.try_into().ok()?;
    Some((u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d])))
}

/// What a frame holds and how many bytes follow its head.
pub fn parse_head(head: [u8; HEAD]) -> Result<(Kind, usize), DebugError> {
    let [kind, length @ ..] = head;
    let length = u32::from_be_bytes(length);
    let (known, most) = match kind {
        0 => (Kind::Data, DEBUG_FRAME_MAX),
        1 => (Kind::Error, DEBUG_FRAME_MAX),
        2 => (Kind::Close, 0),
        3 => (Kind::Size, 4),
        4 => (Kind::Exit, 4),
        _ => return Err(DebugError::Frame { kind, length }),
    };
    match usize::try_from(length) {
        Ok(length) if length <= most => Ok((known, length)),
        _ => Err(DebugError::Frame { kind, length }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(args: &[&str]) -> DebugHeader {
        DebugHeader {
            args: args.iter().map(|arg| arg.to_string()).collect(),
            terminal: Some(("xterm".into(), 80, 24)),
        }
    }

    #[test]
    fn a_header_survives_the_way_and_bad_ones_are_refused() {
        let good = header(&["sh", "-c", "a \"b\"\n"]);
        let line = good.encode().unwrap();
        assert_eq!(line.iter().filter(|&&b| b == b'\n').count(), 1);
        assert_eq!(DebugHeader::parse(line.trim_ascii_end()).unwrap(), good);
        for bad in [header(&[]), header(&[""]), header(&["a\0b"])] {
            assert!(bad.encode().is_err(), "{bad:?}");
        }
        let long = "x".repeat(DEBUG_HEADER_MAX);
        assert!(header(&["sh", &long]).encode().is_err());
        assert!(DebugHeader::parse(br#"{"args":["sh"],"terminal":null,"uid":0}"#).is_err());
    }

    #[test]
    fn frames_survive_the_way_and_bad_heads_are_refused() {
        for kind in [Kind::Data, Kind::Error] {
            let frame = encode(kind, b"bytes");
            let head = frame[..HEAD].try_into().unwrap();
            assert_eq!(parse_head(head).unwrap(), (kind, 5));
        }
        let frame = encode_size(80, 300);
        let head = frame[..HEAD].try_into().unwrap();
        assert_eq!(parse_head(head).unwrap(), (Kind::Size, 4));
        assert_eq!(size(&frame[HEAD..]), Some((80, 300)));
        assert_eq!(size(b"abc"), None);
        for bad in [
            [5, 0, 0, 0, 0],
            [2, 0, 0, 0, 1],
            [0, 0xff, 0, 0, 0],
            [4, 0, 0, 0, 5],
        ] {
            assert!(parse_head(bad).is_err(), "{bad:?}");
        }
    }
}
