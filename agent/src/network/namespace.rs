//! A network namespace, held by a descriptor. The agent stays in the guest's first one and enters another only for as long as it takes
//! to open something in there: it works on one thread and none of this awaits.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space};

use crate::sys;

/// A network namespace.
pub struct Namespace(OwnedFd);

impl Namespace {
    /// The one that the caller is in.
    pub fn current() -> io::Result<Self> {
        Self::open("/proc/thread-self/ns/net")
    }

    /// The one that a process is in.
    pub fn of_process(pid: u32) -> io::Result<Self> {
        Self::open(&format!("/proc/{pid}/ns/net"))
    }

    fn open(path: &str) -> io::Result<Self> {
        File::open(path).map(|file| Self(file.into()))
    }

    /// A fresh one, with loopback up.
    pub fn new() -> io::Result<Self> {
        let home = Self::current()?;
        sys::unshare(UnshareFlags::NEWNET)?;
        let made = Self::current().and_then(|made| sys::loopback_up().map(|()| made));
        home.enter_or_die();
        made
    }

    /// Does something inside it.
    pub fn within<T>(&self, act: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        let home = Self::current()?;
        self.enter()?;
        let done = act();
        home.enter_or_die();
        done
    }

    fn enter(&self) -> io::Result<()> {
        move_into_link_name_space(self.0.as_fd(), Some(LinkNameSpaceType::Network))?;
        Ok(())
    }

    /// An agent that stays in a namespace of a container would set up the wrong one from then on.
    fn enter_or_die(&self) {
        if let Err(error) = self.enter() {
            eprintln!("return to the first network namespace: {error}");
            std::process::abort();
        }
    }

    /// Another descriptor of it.
    pub fn try_clone(&self) -> io::Result<OwnedFd> {
        self.0.try_clone()
    }
}

impl AsFd for Namespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
