//! Between `start` and the keeper that it has started: each hears that the other has come through, or is gone.

use std::{
    io::{self, BufRead, BufReader, Read, Write},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
};

/// Longest reason that is heard.
const REASON_MAX: u64 = 1024;
/// All is well.
const WELL: &[u8] = b"\n";

/// One end.
pub struct Starter(UnixStream);

impl From<OwnedFd> for Starter {
    fn from(fd: OwnedFd) -> Self {
        Self(fd.into())
    }
}

impl AsFd for Starter {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Starter {
    /// Both ends, of `start` and of the keeper.
    pub fn pair() -> io::Result<(Self, Self)> {
        let (ours, theirs) = UnixStream::pair()?;
        Ok((Self(ours), Self(theirs)))
    }

    /// `start` waits until the keeper listens; why it does not is the error.
    pub fn wait(&self) -> io::Result<()> {
        let mut said = Vec::new();
        BufReader::new((&self.0).take(REASON_MAX)).read_until(b'\n', &mut said)?;
        match String::from_utf8_lossy(&said).trim_end() {
            _ if said.ends_with(WELL) => (&self.0).write_all(WELL),
            "" => Err(io::Error::other("it died before it listened")),
            reason => Err(io::Error::other(reason)),
        }
    }

    /// The keeper says that it listens. Without `start` nobody knows that, and containerd never comes.
    pub fn listens(&self) -> io::Result<()> {
        (&self.0).write_all(WELL)?;
        (&self.0).read_exact(&mut [0; WELL.len()])
    }

    /// The keeper says why it does not.
    pub fn fail(&self, why: &io::Error) {
        // Whoever is gone needs no reason.
        let _ = (&self.0).write_all(why.to_string().replace('\n', " ").as_bytes());
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn each_hears_of_the_other() {
        let (start, keeper) = Starter::pair().unwrap();
        let listens = thread::spawn(move || keeper.listens());
        start.wait().unwrap();
        listens.join().unwrap().unwrap();
    }

    #[test]
    fn a_reason_is_heard_and_so_is_a_death() {
        let (start, keeper) = Starter::pair().unwrap();
        keeper.fail(&io::Error::other("no\nroom"));
        drop(keeper);
        assert_eq!(start.wait().unwrap_err().to_string(), "no room");
        let (start, keeper) = Starter::pair().unwrap();
        drop(keeper);
        assert!(start.wait().is_err());
        let (start, keeper) = Starter::pair().unwrap();
        drop(start);
        assert!(keeper.listens().is_err());
    }
}
