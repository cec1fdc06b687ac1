//! A pod's network namespace: made fresh or opened by the spec's path, and entered by short-lived threads only, so that no thread of
//! the runtime ever is in another namespace than the shim's.
//!
//! The path comes from containerd's client. What it leads to is checked: it must be a network namespace, not the host's, and not one
//! in which other processes were put before.

use std::{
    fs::{self, File},
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::fs::{MetadataExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
    thread,
};

use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space};

use crate::{
    refusal::{Refusal, unsupported, wrong},
    sandbox::machine::printable,
};

/// The field of the spec that names it.
const FIELD: &str = "linux.namespaces[network].path";
/// Longest path that an error quotes.
const QUOTE_MAX: usize = 200;
/// magic.h: file system of namespaces.
const NSFS_MAGIC: i64 = 0x6e73_6673;
/// ioctl_ns(2): `_IO(0xb7, 3)`.
const NS_GET_NSTYPE: libc::c_ulong = 0xb703;

/// Device and inode: which namespace it is.
pub type Identity = (u64, u64);

/// A network namespace.
#[derive(Debug)]
pub struct Namespace {
    file: OwnedFd,
    path: Option<PathBuf>,
    identity: Identity,
}

impl Namespace {
    /// A new one with nothing but loopback.
    pub fn fresh() -> io::Result<Self> {
        let file = on_thread(|| {
            // SAFETY: the only unsoundness of unshare is with CLONE_FILES, which is not passed; the thread ends with this.
            unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }?;
            File::open("/proc/thread-self/ns/net")
        })?;
        let identity = identity_of(&file)?;
        Ok(Self {
            file: file.into(),
            path: None,
            identity,
        })
    }

    /// The one that a spec names for a new pod.
    pub fn for_pod(path: &Path) -> Result<Self, Refusal> {
        let shown = printable(&path.display().to_string(), QUOTE_MAX);
        let namespace = Self::open(path).map_err(|e| wrong(FIELD, format!("{shown}: {e}")))?;
        for host in ["/proc/self/ns/net", "/proc/1/ns/net"] {
            if fs::metadata(host).is_ok_and(|m| (m.dev(), m.ino()) == namespace.identity) {
                let why = format!(
                    "{shown} is the host's network: a pod has a network of its own (no hostNetwork, no --net-host)"
                );
                return Err(unsupported(FIELD, why));
            }
        }
        if namespace.is_of_process() || path.starts_with("/proc") {
            let why = format!(
                "{shown} is the network of another process, and machines share none (no --network container:NAME; a user-defined network connects both): leave the path empty, or name one made for the pod"
            );
            return Err(unsupported(FIELD, why));
        }
        Ok(namespace)
    }

    /// The one at `path`, if it is a network namespace.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = File::options()
            .read(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
            .open(path)?;
        let no = || io::Error::other("is no network namespace");
        #[allow(
            clippy::useless_conversion,
            reason = "the type differs between C libraries"
        )]
        if i64::from(rustix::fs::fstatfs(&file)?.f_type) != NSFS_MAGIC {
            return Err(no());
        }
        // SAFETY: the request takes no argument and only gives back a number.
        let kind = unsafe { libc::ioctl(file.as_raw_fd(), NS_GET_NSTYPE) };
        if kind != libc::CLONE_NEWNET {
            return Err(no());
        }
        let identity = identity_of(&file)?;
        Ok(Self {
            file: file.into(),
            path: Some(path.to_owned()),
            identity,
        })
    }

    /// The one that a process of the pod is in; `path` is where it can be found without us.
    pub fn of_process(pid: u32, path: Option<PathBuf>) -> io::Result<Self> {
        let namespace = Self::open(Path::new(&format!("/proc/{pid}/ns/net")))?;
        Ok(Self { path, ..namespace })
    }

    /// Whether it was reached through a process (`/proc/<pid>/ns/net`, also by a symbolic link), not at a mount: proc_pid_fd(5) then
    /// shows `net:[inode]` instead of a path.
    fn is_of_process(&self) -> bool {
        let shown = fs::read_link(format!("/proc/self/fd/{}", self.file.as_raw_fd()));
        !shown.is_ok_and(|path| path.is_absolute())
    }

    /// Where it can be found without us; none for a fresh one.
    pub fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }

    /// Which one it is.
    pub fn identity(&self) -> Identity {
        self.identity
    }

    /// Refuses a path of another container of the pod that leads elsewhere.
    pub fn check_member(&self, path: &Path) -> Result<(), Refusal> {
        if fs::metadata(path).is_ok_and(|m| (m.dev(), m.ino()) == self.identity) {
            return Ok(());
        }
        let shown = printable(&path.display().to_string(), QUOTE_MAX);
        let why = format!(
            "{shown} is not the network namespace of the pod; leave the path empty for one without network"
        );
        Err(unsupported(FIELD, why))
    }

    /// Runs `job` in it, on a thread of its own.
    pub fn run<T: Send>(&self, job: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
        on_thread(|| {
            move_into_link_name_space(self.as_fd(), Some(LinkNameSpaceType::Network))?;
            job()
        })
    }
}

impl AsFd for Namespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn identity_of(file: &File) -> io::Result<Identity> {
    let data = file.metadata()?;
    Ok((data.dev(), data.ino()))
}

fn on_thread<T: Send>(job: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    thread::scope(|scope| {
        let thread = thread::Builder::new()
            .name("netns".into())
            .stack_size(256 << 10)
            .spawn_scoped(scope, job)?;
        let lost = |_| Err(io::Error::other("a thread panicked"));
        thread.join().unwrap_or_else(lost)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(path: &str) -> String {
        Namespace::for_pod(Path::new(path)).unwrap_err().to_string()
    }

    #[test]
    fn a_fresh_namespace_is_another_and_its_threads_leave_no_trace() {
        let before = fs::read_link("/proc/self/ns/net").unwrap();
        let namespace = Namespace::fresh().unwrap();
        let inside = namespace.run(|| fs::read_link("/proc/thread-self/ns/net"));
        assert_ne!(inside.unwrap(), before);
        assert_eq!(fs::read_link("/proc/thread-self/ns/net").unwrap(), before);
        let inode = namespace.identity().1;
        let path = namespace
            .run(|| fs::read_link("/proc/thread-self/ns/net"))
            .unwrap();
        assert_eq!(path, PathBuf::from(format!("net:[{inode}]")));
    }

    #[test]
    fn the_hosts_network_another_processs_and_what_is_no_namespace_are_refused_by_name() {
        let text = refused("/proc/self/ns/net");
        assert!(
            text.starts_with(FIELD) && text.contains("the host's network"),
            "{text}"
        );
        assert!(refused("/no/such").contains("No such file"));
        assert!(refused("/dev/null").contains("is no network namespace"));
        assert!(refused("/etc/hostname").contains("is no network namespace"));
        let other = on_thread(|| {
            // SAFETY: CLONE_NEWNET does not part descriptors; the thread ends with this.
            unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }?;
            let thread = rustix::thread::gettid().as_raw_nonzero();
            let path = format!("/proc/self/task/{thread}/ns/net");
            let dir = tempfile::tempdir()?;
            let link = dir.path().join("net");
            std::os::unix::fs::symlink(&path, &link)?;
            Ok([refused(&path), refused(link.to_str().unwrap())])
        });
        for text in other.unwrap() {
            assert!(text.contains("of another process"), "{text}");
        }
        // A mount of the host's own, as `ip netns attach` makes it, in a mount namespace that nobody else sees.
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("net");
        fs::write(&file, "").unwrap();
        let text = on_thread(|| {
            // SAFETY: CLONE_NEWNS does not part descriptors; the thread ends with this.
            unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS | UnshareFlags::FS) }?;
            let flags = rustix::mount::MountPropagationFlags::PRIVATE
                | rustix::mount::MountPropagationFlags::REC;
            rustix::mount::mount_change("/", flags)?;
            rustix::mount::mount_bind("/proc/self/ns/net", &file)?;
            let host = refused(file.to_str().unwrap());
            rustix::mount::unmount(&file, rustix::mount::UnmountFlags::empty())?;
            rustix::mount::mount_bind("/proc/self/ns/uts", &file)?;
            let uts = refused(file.to_str().unwrap());
            rustix::mount::unmount(&file, rustix::mount::UnmountFlags::empty())?;
            // One made for the pod, as CNI's users and `ip netns add` leave it.
            // SAFETY: CLONE_NEWNET does not part descriptors; the thread ends with this.
            unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }?;
            rustix::mount::mount_bind("/proc/thread-self/ns/net", &file)?;
            let made = Namespace::for_pod(&file).map(drop);
            made.map_err(io::Error::other)?;
            Ok((host, uts))
        });
        let (host, uts) = text.unwrap();
        assert!(host.contains("is the host's network"), "{host}");
        assert!(uts.contains("is no network namespace"), "{uts}");
    }
}
