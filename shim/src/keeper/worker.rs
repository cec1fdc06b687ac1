//! The worker's side: what was kept for it, what it wants kept, and containerd's connections.

use std::{
    collections::HashMap,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

use tokio::{
    io::Interest,
    net::UnixStream,
    sync::{Notify, mpsc},
};

use super::channel::{self, End, Message};
use crate::watch::watch;

/// Connections that wait for the server at most.
const WAITING_MAX: usize = 64;

/// The keeper, as the worker sees it. Cheap to clone.
#[derive(Clone)]
pub struct Kept(Arc<Shared>);

struct Shared {
    channel: Option<OwnedFd>,
    restored: Mutex<HashMap<String, HashMap<String, OwnedFd>>>,
    first: bool,
    gone: Notify,
}

/// The connections that are there already, and those to come.
pub struct Connections {
    waiting: Vec<OwnedFd>,
}

impl Kept {
    /// Takes over from a worker before, if there was one: reads what the keeper has, up to its word to begin.
    pub fn receive(channel: OwnedFd) -> io::Result<(Self, Connections)> {
        let mut restored: HashMap<String, HashMap<String, OwnedFd>> = HashMap::new();
        let mut waiting = Vec::new();
        let first = loop {
            match channel::receive(channel.as_fd(), true)? {
                Some((Message::Store { process, role }, Some(fd))) => {
                    restored.entry(process).or_default().insert(role, fd);
                }
                Some((Message::Client, Some(fd))) => waiting.push(fd),
                Some((Message::Go { first }, _)) => break first,
                _ => {}
            }
        };
        let shared = Shared {
            channel: Some(channel),
            restored: Mutex::new(restored),
            first,
            gone: Notify::new(),
        };
        Ok((Self(Arc::new(shared)), Connections { waiting }))
    }

    /// One that keeps nothing.
    pub fn nothing() -> Self {
        Self(Arc::new(Shared {
            channel: None,
            restored: Mutex::default(),
            first: true,
            gone: Notify::new(),
        }))
    }

    /// Whether there was a worker before this one.
    pub fn takes_over(&self) -> bool {
        !self.0.first
    }

    /// What was kept of a process, by role.
    pub fn take(&self, process: &str) -> HashMap<String, OwnedFd> {
        let mut restored = self
            .0
            .restored
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        restored.remove(process).unwrap_or_default()
    }

    /// Lets go of what nobody took: it belongs to something that was given up.
    pub fn forget_the_rest(&self) {
        let rest = std::mem::take(
            &mut *self
                .0
                .restored
                .lock()
                .unwrap_or_else(PoisonError::into_inner),
        );
        for process in rest.into_keys() {
            self.forget(&process, None);
        }
    }

    /// Has a copy of a descriptor kept.
    pub fn store(&self, process: &str, role: &str, fd: BorrowedFd<'_>) {
        let (process, role) = (process.to_owned(), role.to_owned());
        self.tell(&Message::Store { process, role }, Some(fd));
    }

    /// Opens these ends of a fifo so that they are kept from the first moment.
    pub async fn open(&self, process: &str, path: &Path, ends: &[End]) -> io::Result<Vec<OwnedFd>> {
        let here = || ends.iter().map(|end| end.open(path)).collect();
        if self.0.channel.is_none() {
            return here();
        }
        let (answers, theirs) = channel::pair()?;
        let message = Message::Open {
            process: process.to_owned(),
            path: path.to_owned(),
            ends: ends.to_vec(),
        };
        self.tell(&message, Some(theirs.as_fd()));
        drop(theirs);
        let answers = watch(answers, Interest::READABLE)?;
        let mut fds = Vec::new();
        while fds.len() < ends.len() {
            let mut ready = answers.readable().await?;
            match channel::receive(answers.as_fd(), false) {
                Ok(Some((Message::Store { .. }, Some(fd)))) => fds.push(fd),
                Ok(Some((Message::Refused { errno }, _))) => {
                    return Err(io::Error::from_raw_os_error(errno));
                }
                Ok(Some(_)) => {}
                Ok(None) => ready.clear_ready(),
                // A keeper from before an upgrade does not know the message, or it has no descriptor left.
                Err(_) => {
                    let fds: Vec<OwnedFd> = here()?;
                    for (end, fd) in ends.iter().zip(&fds) {
                        self.store(process, &end.role, fd.as_fd());
                    }
                    return Ok(fds);
                }
            }
        }
        Ok(fds)
    }

    /// Has it closed; without a role, all of the process.
    pub fn forget(&self, process: &str, role: Option<&str>) {
        let (process, role) = (process.to_owned(), role.map(str::to_owned));
        self.tell(&Message::Forget { process, role }, None);
    }

    /// The pod is over: nobody shall take over.
    pub fn end(&self) {
        self.tell(&Message::End, None);
    }

    /// Ends this process so that another takes over. Nothing is closed on the way: what would be let go of, the next one needs.
    pub fn replace(&self) -> ! {
        self.tell(&Message::Replace, None);
        std::process::exit(0)
    }

    /// Answers once the keeper is gone, and containerd's connections with it.
    pub async fn gone(&self) {
        self.0.gone.notified().await;
    }

    fn tell(&self, message: &Message, fd: Option<BorrowedFd<'_>>) {
        if let Some(channel) = &self.0.channel
            && let Err(error) = channel::send(channel.as_fd(), message, fd)
        {
            tracing::debug!(%error, "telling the keeper");
        }
    }

    /// Serves containerd's connections as they come. In the runtime of the caller.
    pub fn connections(
        &self,
        connections: Connections,
    ) -> io::Result<mpsc::Receiver<io::Result<UnixStream>>> {
        let Some(channel) = &self.0.channel else {
            return Err(io::ErrorKind::NotConnected.into());
        };
        let channel = watch(channel.try_clone()?, Interest::READABLE)?;
        let (queue, incoming) = mpsc::channel(WAITING_MAX);
        let this = self.clone();
        tokio::spawn(async move {
            for fd in connections.waiting {
                let _ = queue.send(stream(fd)).await;
            }
            loop {
                let Ok(mut ready) = channel.readable().await else {
                    break;
                };
                match channel::receive(channel.as_fd(), false) {
                    Ok(Some((Message::Client, Some(fd)))) => {
                        let _ = queue.send(stream(fd)).await;
                    }
                    Ok(Some((Message::Ping, _))) => this.tell(&Message::Pong, None),
                    Ok(Some(_)) => {}
                    Ok(None) => ready.clear_ready(),
                    Err(_) => break,
                }
            }
            this.0.gone.notify_one();
        });
        Ok(incoming)
    }
}

fn stream(fd: OwnedFd) -> io::Result<UnixStream> {
    UnixStream::from_std(std::os::unix::net::UnixStream::from(fd))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A worker, and the keeper's end of its channel.
    fn worker() -> (Kept, OwnedFd) {
        let (keeper, channel) = channel::pair().unwrap();
        channel::send(keeper.as_fd(), &Message::Go { first: true }, None).unwrap();
        (Kept::receive(channel).unwrap().0, keeper)
    }

    fn next(keeper: &OwnedFd) -> (Message, Option<OwnedFd>) {
        channel::receive(keeper.as_fd(), true).unwrap().unwrap()
    }

    #[tokio::test]
    async fn what_the_keeper_says_of_a_fifo_is_the_error() {
        let (kept, keeper) = worker();
        let answer = std::thread::spawn(move || {
            let (Message::Open { path, ends, .. }, Some(answers)) = next(&keeper) else {
                panic!("not asked to open")
            };
            assert_eq!((path.to_str(), ends.len()), (Some("/a/fifo"), 2));
            let refused = Message::Refused {
                errno: libc::ENFILE,
            };
            channel::send(answers.as_fd(), &refused, None).unwrap();
        });
        let ends = [End::reader("in"), End::writer("out")];
        let opened = kept.open("web/", Path::new("/a/fifo"), &ends).await;
        assert_eq!(opened.unwrap_err().raw_os_error(), Some(libc::ENFILE));
        answer.join().unwrap();
    }

    #[tokio::test]
    async fn without_an_answer_it_is_opened_here_and_then_kept() {
        let (kept, keeper) = worker();
        // As a keeper from before an upgrade.
        let answer = std::thread::spawn(move || {
            drop(next(&keeper));
            next(&keeper)
        });
        let path = Path::new("/dev/null");
        let opened = kept.open("web/", path, &[End::both("stdout")]).await;
        assert_eq!(opened.unwrap().len(), 1);
        let (message, fd) = answer.join().unwrap();
        let (process, role) = ("web/".into(), "stdout".into());
        assert!(message == Message::Store { process, role } && fd.is_some());
    }
}
