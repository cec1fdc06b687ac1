//! Messages to the steward and back: a fixed head, then bytes; descriptors beside it.

use rustix::io::Errno;

use crate::limits;

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    SetXattr,
    GetXattr,
    ListXattr,
    RemoveXattr,
    Bare,
    AddMount,
    RemoveMount,
    Keep,
    Open,
    Is,
    Forget,
}

const OPS: [Op; 11] = [
    Op::SetXattr,
    Op::GetXattr,
    Op::ListXattr,
    Op::RemoveXattr,
    Op::Bare,
    Op::AddMount,
    Op::RemoveMount,
    Op::Keep,
    Op::Open,
    Op::Is,
    Op::Forget,
];

/// Bytes before a request's name and value, and before an answer's data.
pub const HEAD: usize = 16;
/// Room for the descriptors of a request.
pub const FILES: usize = rustix::cmsg_space!(ScmRights(limits::FS_ASKED));
/// The longest message either way.
pub const MESSAGE: usize = HEAD + limits::FS_NAME + 1 + limits::FS_XATTR;

/// A request; the number is a kept file's, a mount's or a size.
#[derive(Debug, PartialEq, Eq)]
pub struct Request<'a> {
    pub op: Op,
    pub flags: u32,
    pub number: u64,
    /// A name, NUL, and a value.
    pub rest: &'a [u8],
}

impl<'a> Request<'a> {
    /// As bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEAD.saturating_add(self.rest.len()));
        bytes.extend_from_slice(&(self.op as u32).to_ne_bytes());
        bytes.extend_from_slice(&self.flags.to_ne_bytes());
        bytes.extend_from_slice(&self.number.to_ne_bytes());
        bytes.extend_from_slice(self.rest);
        bytes
    }

    /// From bytes.
    pub fn decode(bytes: &'a [u8]) -> Result<Self, Errno> {
        let (head, rest) = bytes.split_at_checked(HEAD).ok_or(Errno::INVAL)?;
        let (op, head) = head.split_first_chunk().ok_or(Errno::INVAL)?;
        let (flags, head) = head.split_first_chunk().ok_or(Errno::INVAL)?;
        let number = head.first_chunk().ok_or(Errno::INVAL)?;
        let op = usize::try_from(u32::from_ne_bytes(*op)).map_err(|_| Errno::INVAL)?;
        Ok(Self {
            op: *OPS.get(op).ok_or(Errno::NOSYS)?,
            flags: u32::from_ne_bytes(*flags),
            number: u64::from_ne_bytes(*number),
            rest,
        })
    }
}

/// The head of an answer: an error or none, and a number.
pub fn answer_head(errno: Result<(), Errno>, number: u64) -> [u8; HEAD] {
    let mut head = [0; HEAD];
    let code = errno.map_or_else(Errno::raw_os_error, |()| 0);
    let fields = code.to_ne_bytes().into_iter().chain([0; 4]);
    let fields = fields.chain(number.to_ne_bytes());
    head.iter_mut()
        .zip(fields)
        .for_each(|(to, from)| *to = from);
    head
}

/// Reads the head of an answer.
pub fn parse_answer(bytes: &[u8]) -> Result<(u64, &[u8]), Errno> {
    let (head, data) = bytes.split_at_checked(HEAD).ok_or(Errno::IO)?;
    let (code, head) = head.split_first_chunk().ok_or(Errno::IO)?;
    let number = head.last_chunk().ok_or(Errno::IO)?;
    match i32::from_ne_bytes(*code) {
        0 => Ok((u64::from_ne_bytes(*number), data)),
        code => Err(Errno::from_raw_os_error(code)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_come_back_as_they_were_and_short_or_unknown_ones_are_refused() {
        for op in OPS {
            let request = Request {
                op,
                flags: 3,
                number: 1 << 40,
                rest: b"name\0value",
            };
            assert_eq!(Request::decode(&request.encode()), Ok(request));
        }
        assert_eq!(Request::decode(&[0; HEAD - 1]), Err(Errno::INVAL));
        assert_eq!(Request::decode(&[0xff; HEAD]), Err(Errno::NOSYS));
        let mut answer = answer_head(Ok(()), 7).to_vec();
        answer.push(1);
        assert_eq!(parse_answer(&answer), Ok((7, &[1][..])));
        let failed = answer_head(Err(Errno::STALE), 0);
        assert_eq!(parse_answer(&failed), Err(Errno::STALE));
    }
}
