//! The header line of a connection to a TCP port of the pod's loopback (port [`FORWARD_PORT`](crate::limits::FORWARD_PORT)), and the
//! agent's answer to it. The shim writes the header, the agent parses it; the shim parses the answer; neither trusts the other.

use serde::{Deserialize, Serialize};

use crate::limits::FORWARD_LINE_MAX;

/// Where a connection leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ForwardHeader {
    /// TCP port; never 0.
    pub port: std::num::NonZeroU16,
    /// To ::1; else to 127.0.0.1.
    pub ipv6: bool,
}

/// Why a line was not accepted.
#[derive(Debug, thiserror::Error)]
pub enum ForwardError {
    /// No end of line within the limit.
    #[error("forward line is longer than {FORWARD_LINE_MAX} bytes")]
    TooLong,
    /// Not the JSON object that is expected.
    #[error("forward header is not valid")]
    Json(#[from] serde_json::Error),
    /// Neither `ok` nor `error`.
    #[error("forward answer is not valid")]
    Answer,
    /// The port could not be reached; the agent says why.
    #[error("{0}")]
    Refused(String),
}

impl ForwardHeader {
    /// The header line, with its end of line.
    pub fn encode(&self) -> String {
        format!("{{\"port\":{},\"ipv6\":{}}}\n", self.port, self.ipv6)
    }

    /// Parses a header line without its end of line.
    pub fn parse(line: &[u8]) -> Result<Self, ForwardError> {
        if line.len() >= FORWARD_LINE_MAX {
            return Err(ForwardError::TooLong);
        }
        Ok(serde_json::from_slice(line)?)
    }
}

/// The answer line of the agent, with its end of line: `Ok` if bytes follow.
pub fn encode_answer(answer: Result<(), &str>) -> String {
    match answer {
        Ok(()) => "ok\n".into(),
        Err(text) => {
            let text: String = text
                .chars()
                .map(|c| if c.is_control() { ' ' } else { c })
                .collect();
            let mut line = format!("error {text}");
            let mut end = line.len().min(FORWARD_LINE_MAX - 1);
            while !line.is_char_boundary(end) {
                end -= 1;
            }
            line.truncate(end);
            line.push('\n');
            line
        }
    }
}

/// Parses an answer line without its end of line.
pub fn parse_answer(line: &[u8]) -> Result<(), ForwardError> {
    if line.len() >= FORWARD_LINE_MAX {
        return Err(ForwardError::TooLong);
    }
    match line {
        b"ok" => Ok(()),
        _ => match line.strip_prefix(b"error ") {
            Some(text) => Err(ForwardError::Refused(
                String::from_utf8_lossy(text).into_owned(),
            )),
            None => Err(ForwardError::Answer),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_survives_the_way() {
        let header = ForwardHeader {
            port: 8080.try_into().unwrap(),
            ipv6: true,
        };
        let line = header.encode();
        assert_eq!(
            ForwardHeader::parse(line.trim().as_bytes()).unwrap(),
            header
        );
        let documented = ForwardHeader::parse(br#"{"port":8080,"ipv6":false}"#).unwrap();
        assert_eq!((documented.port.get(), documented.ipv6), (8080, false));
    }

    #[test]
    fn headers_that_lead_nowhere_are_refused() {
        for line in [
            r#"{"port":0,"ipv6":false}"#,
            r#"{"port":65536,"ipv6":false}"#,
            r#"{"port":80}"#,
            r#"{"port":80,"ipv6":false,"host":"10.0.0.1"}"#,
            "",
        ] {
            assert!(ForwardHeader::parse(line.as_bytes()).is_err(), "{line}");
        }
        let long = vec![b' '; FORWARD_LINE_MAX];
        assert!(matches!(
            ForwardHeader::parse(&long),
            Err(ForwardError::TooLong)
        ));
    }

    #[test]
    fn answers_survive_the_way_and_are_one_short_line() {
        assert!(parse_answer(encode_answer(Ok(())).trim().as_bytes()).is_ok());
        let line = encode_answer(Err("no\nsuch"));
        let error = parse_answer(line.trim().as_bytes()).unwrap_err();
        assert_eq!(error.to_string(), "no such");
        let long = encode_answer(Err(&"é".repeat(FORWARD_LINE_MAX)));
        assert!(long.len() <= FORWARD_LINE_MAX);
        assert!(matches!(parse_answer(b"x"), Err(ForwardError::Answer)));
    }
}
