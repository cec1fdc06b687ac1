//! The header line of a stdio stream (port [`STREAM_PORT`](crate::limits::STREAM_PORT)). The shim writes it, the
//! agent parses it; the agent trusts nothing in it.

use serde::{Deserialize, Serialize};

use crate::{id, limits::STREAM_HEADER_MAX};

/// Which of a process's standard streams a connection carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum StreamKind {
    /// Host to process.
    Stdin,
    /// Process to host.
    Stdout,
    /// Process to host; none with a terminal.
    Stderr,
}

/// Names the stream that a connection carries.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StreamHeader {
    /// Container id.
    pub container: String,
    /// Exec id, empty for the container's init process.
    #[serde(default)]
    pub exec: String,
    /// Which stream.
    pub stream: StreamKind,
}

/// Why a header was not accepted.
#[derive(Debug, thiserror::Error)]
pub enum HeaderError {
    /// No end of line within the limit.
    #[error("stream header is longer than {STREAM_HEADER_MAX} bytes")]
    TooLong,
    /// Not the JSON object that is expected.
    #[error("stream header is not valid")]
    Json(#[from] serde_json::Error),
    /// An id with characters that ids do not have.
    #[error("stream header has an invalid {field} id")]
    Id {
        /// `container` or `exec`.
        field: &'static str,
    },
}

impl StreamHeader {
    /// The header line, with its end of line.
    pub fn encode(&self) -> Result<Vec<u8>, HeaderError> {
        self.check()?;
        let mut line = serde_json::to_vec(self)?;
        line.push(b'\n');
        if line.len() > STREAM_HEADER_MAX {
            return Err(HeaderError::TooLong);
        }
        Ok(line)
    }

    /// Parses the header at the start of `bytes`: the header and the number of bytes it takes (what follows
    /// is the stream's data), or `None` when the end of the line has not arrived yet.
    pub fn parse(bytes: &[u8]) -> Result<Option<(Self, usize)>, HeaderError> {
        let head = bytes.get(..STREAM_HEADER_MAX).unwrap_or(bytes);
        let Some(end) = head.iter().position(|&b| b == b'\n') else {
            return if head.len() == STREAM_HEADER_MAX {
                Err(HeaderError::TooLong)
            } else {
                Ok(None)
            };
        };
        let header: Self = serde_json::from_slice(head.get(..end).unwrap_or_default())?;
        header.check()?;
        Ok(Some((header, end.saturating_add(1))))
    }

    fn check(&self) -> Result<(), HeaderError> {
        if !id::is_valid(&self.container) {
            return Err(HeaderError::Id { field: "container" });
        }
        if !self.exec.is_empty() && !id::is_valid(&self.exec) {
            return Err(HeaderError::Id { field: "exec" });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> StreamHeader {
        StreamHeader {
            container: "web".into(),
            exec: "e1".into(),
            stream: StreamKind::Stdout,
        }
    }

    #[test]
    fn a_header_survives_the_way_and_leaves_the_data() {
        let mut bytes = header().encode().unwrap();
        let taken = bytes.len();
        bytes.extend_from_slice(b"data\n");
        assert_eq!(
            StreamHeader::parse(&bytes).unwrap(),
            Some((header(), taken))
        );
    }

    #[test]
    fn the_documented_form_is_accepted() {
        let line = b"{\"container\":\"c\",\"exec\":\"\",\"stream\":\"stdin\"}\n";
        let (parsed, taken) = StreamHeader::parse(line).unwrap().unwrap();
        assert_eq!((parsed.stream, taken), (StreamKind::Stdin, line.len()));
    }

    #[test]
    fn a_partial_header_asks_for_more() {
        let bytes = header().encode().unwrap();
        for n in 0..bytes.len() {
            assert!(StreamHeader::parse(&bytes[..n]).unwrap().is_none());
        }
    }

    #[test]
    fn a_header_without_end_is_refused_at_the_cap() {
        let bytes = vec![b'x'; STREAM_HEADER_MAX];
        assert!(
            StreamHeader::parse(&bytes[..STREAM_HEADER_MAX - 1])
                .unwrap()
                .is_none()
        );
        assert!(matches!(
            StreamHeader::parse(&bytes),
            Err(HeaderError::TooLong)
        ));
    }

    #[test]
    fn unknown_streams_fields_and_bad_ids_are_refused() {
        for line in [
            "{\"container\":\"c\",\"exec\":\"\",\"stream\":\"x\"}\n",
            "{\"container\":\"c\",\"exec\":\"\",\"stream\":\"stdin\",\"more\":1}\n",
            "{\"container\":\"../c\",\"exec\":\"\",\"stream\":\"stdin\"}\n",
            "{\"container\":\"c\",\"exec\":\"a/b\",\"stream\":\"stdin\"}\n",
            "\n",
        ] {
            assert!(StreamHeader::parse(line.as_bytes()).is_err(), "{line}");
        }
    }
}
