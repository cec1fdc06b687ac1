//! How the file server is confined: two processes, of which the one that talks to the guest has no rights in the host's user namespace.
//!
//! ```text
//!  bulkhead-fs (steward)                      started by the shim; few capabilities, few system calls, an empty root
//!    `-- bulkhead-fs (server)                 user namespace of its own with every id as it is on the host (files keep
//!          fuse-0 ... fuse-N                  their owners), pid, ipc, uts, mount namespace, no network
//! ```
//!
//! Trees are detached mounts that are served as they are, so nobody mounts anything. Landlock is of no use: it takes no rule later,
//! and trees come while the server runs; its root is empty without.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;

use rustix::io::{read, write};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::process::{
    DumpableBehavior, Pid, Resource, Rlimit, Signal, WaitOptions, set_dumpable_behavior,
    set_parent_process_death_signal, setrlimit, waitpid,
};
use rustix::thread::UnshareFlags;

use super::filter::Thread;
use super::{creds, sys};

/// A step of the confinement failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A system call.
    #[error("{step}")]
    Step {
        /// What was tried.
        step: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// The other process ended first.
    #[error("the file server's other process ended: {0}")]
    Other(String),
}

fn at<E: Into<io::Error>>(step: &'static str) -> impl FnOnce(E) -> Error {
    move |source| Error::Step {
        step,
        source: source.into(),
    }
}

/// Which of the two processes this is.
pub enum Role {
    /// The child.
    Server(Way),
    /// The process that was started.
    Steward(Child),
}

/// The server's way into its confinement.
pub struct Way(OwnedFd);

/// The server, as the steward sees it, on its way.
pub struct Child {
    pid: Pid,
    way: OwnedFd,
}

/// The server in its confinement.
pub struct Confined(Pid);

/// The answer to "has a user namespace been made".
const MADE: u8 = 1;
const NOT_MADE: u8 = 0;

/// Parts the process in two. It must have one thread.
pub fn split() -> Result<Role, Error> {
    let flags = SocketFlags::CLOEXEC;
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
        .map_err(at("making a socket"))?;
    let apart = UnshareFlags::NEWPID | UnshareFlags::NEWIPC | UnshareFlags::NEWUTS;
    sys::unshare(apart).map_err(at("making pid, ipc and uts namespaces"))?;
    match sys::fork().map_err(at("forking"))? {
        0 => Ok(Role::Server(Way(theirs))),
        pid => {
            let pid = Pid::from_raw(pid).ok_or_else(|| Error::Other("no pid".into()))?;
            Ok(Role::Steward(Child { pid, way: ours }))
        }
    }
}

impl Way {
    /// Takes the server into a user namespace of its own, if the host has such, and leaves it the capabilities of serving.
    pub fn enter(self) -> Result<(), Error> {
        let made = sys::unshare(UnshareFlags::NEWUSER);
        if let Err(error) = &made {
            tracing::warn!(%error, "no user namespace: the file server's capabilities are in the host's");
        }
        let word = if made.is_ok() { MADE } else { NOT_MADE };
        write(&self.0, &[word]).map_err(at("telling the steward"))?;
        let mut answer = [0];
        // Without an answer the steward has ended.
        match read(&self.0, &mut answer) {
            Ok(1) => {}
            Ok(_) => return Err(Error::Other("the steward".into())),
            Err(error) => return Err(at("hearing the steward")(error)),
        }
        creds::drop_all_but(creds::SERVER).map_err(at("dropping capabilities"))?;
        leave_no_image()?;
        // The last: a change of credentials takes it back. A steward that ended before closes its sockets, which ends the server as well.
        set_parent_process_death_signal(Some(Signal::KILL)).map_err(at("tying it to the steward"))
    }
}

impl Child {
    /// Gives the server's user namespace every id of this process's own, as it is.
    pub fn map_ids(self) -> Result<Confined, Error> {
        let mut word = [NOT_MADE];
        match read(&self.way, &mut word) {
            Ok(1) => {}
            _ => return Err(Error::Other(self.ending())),
        }
        if word == [MADE] {
            for map in ["uid_map", "gid_map"] {
                let ours = fs::read_to_string(format!("/proc/self/{map}"));
                let ours = ours.map_err(at("reading the map of ids"))?;
                let theirs = format!("/proc/{}/{map}", self.pid);
                fs::write(theirs, identity(&ours)).map_err(at("mapping ids"))?;
            }
        }
        write(&self.way, &[MADE]).map_err(at("telling the server"))?;
        Ok(Confined(self.pid))
    }

    fn ending(&self) -> String {
        let status = waitpid(Some(self.pid), WaitOptions::empty());
        format!("{status:?}")
    }
}

impl Confined {
    /// Waits for the server's end, which has begun.
    pub fn end(self) -> Result<(), Error> {
        match waitpid(Some(self.0), WaitOptions::empty()).map_err(at("waiting for the server"))? {
            // One that failed has said why.
            Some((_, status)) if status.exit_status().is_some() => Ok(()),
            Some((_, status)) => Err(Error::Other(format!("{status:?}"))),
            None => Err(Error::Other("unknown".into())),
        }
    }
}

/// Each range of a map (user_namespaces(7)) to itself: inside as outside.
fn identity(map: &str) -> String {
    let ranges = map.lines().filter_map(|line| {
        let mut fields = line.split_whitespace();
        let (first, count) = (fields.next()?, fields.nth(1)?);
        Some(format!("{first} {first} {count}\n"))
    });
    ranges.collect()
}

/// Leaves the steward, in its namespace, what it needs.
pub fn confine_steward() -> Result<(), Error> {
    leave_no_image()?;
    confine_steward_thread()
}

/// No core file, and nobody looks into the memory.
fn leave_no_image() -> Result<(), Error> {
    let none = Rlimit {
        current: Some(0),
        maximum: Some(0),
    };
    setrlimit(Resource::Core, none).map_err(at("limiting core files"))?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(at("being not dumpable"))
}

/// What of that is the calling thread's own.
pub fn confine_steward_thread() -> Result<(), Error> {
    creds::drop_all_but(creds::STEWARD).map_err(at("dropping capabilities"))?;
    Thread::Steward
        .confine()
        .map_err(at("filtering system calls"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_range_of_ids_is_mapped_to_itself() {
        assert_eq!(
            identity("         0          0 4294967295\n"),
            "0 0 4294967295\n"
        );
        assert_eq!(
            identity("0 100000 65536\n70000 5 1\n"),
            "0 0 65536\n70000 70000 1\n"
        );
    }
}
