//! `start`: finds the shim of the pod or makes one, and tells containerd its address (runtime v2, "start").

use std::{
    env, fs, io,
    os::{
        fd::{AsFd, FromRawFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::{Path, PathBuf},
};

use bulkhead_failpoint::reach;
use serde_json::json;
use sha2::{Digest, Sha256};

use crate::{
    args::Args,
    keeper::{INHERITED_FD, Starter, spawn_with},
    sandbox::state::{check_id, hex, make_private_dir, remove_file},
    spec,
};

/// Folder of the shims' sockets, mode 0700.
const SOCKETS: &str = "/run/containerd/s";

/// Why no shim was started.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An id that cannot be one.
    #[error(transparent)]
    Id(#[from] crate::sandbox::state::IdError),
    /// The bundle's spec.
    #[error(transparent)]
    Spec(#[from] spec::Error),
    /// The pod's shim does not answer.
    #[error("the shim of pod {pod} does not answer on {path}: {source}")]
    NoSandbox {
        /// The pod.
        pod: String,
        /// Its socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file or socket.
    #[error("{path}: {source}")]
    Path {
        /// Which one.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The daemon.
    #[error("starting the shim's daemon: {0}")]
    Daemon(#[source] io::Error),
}

/// The socket of a pod's shim, where every shim has it: named by a hash of containerd's address, namespace and id.
pub fn socket_path(address: &str, namespace: &str, pod: &str) -> PathBuf {
    let name = Path::new(address).join(namespace).join(pod);
    let hash = Sha256::digest(name.as_os_str().as_encoded_bytes());
    Path::new(SOCKETS).join(hex(&hash, 64))
}

/// What `start` prints: JSON where containerd says that it knows version 3 (2.x), else the address alone.
pub fn answer(socket: &Path, max_version: Option<&str>) -> String {
    let address = format!("unix://{}", socket.display());
    match max_version.and_then(|v| v.parse::<u32>().ok()) {
        Some(version) if version >= 3 => {
            json!({ "version": 3, "address": address, "protocol": "ttrpc" }).to_string()
        }
        _ => address,
    }
}

/// The command `start`, with the bundle as working folder: gives back what is to be printed.
pub fn start(args: &Args) -> Result<String, Error> {
    check_id("namespace", &args.namespace)?;
    check_id("id", &args.id)?;
    let max_version = env::var("MAX_SHIM_VERSION").ok();
    let sandbox = spec::sandbox_of(Path::new("."), &args.id)?;
    let pod = sandbox.as_deref().unwrap_or(&args.id);
    check_id("sandbox-id", pod)?;
    let socket = socket_path(&args.address, &args.namespace, pod);
    // Before there is a daemon that would have to end.
    write_address(&socket)?;
    match UnixStream::connect(&socket) {
        // The shim is there: it serves this container as well.
        Ok(_) => {}
        Err(source) if sandbox.is_some() => {
            return Err(Error::NoSandbox {
                pod: pod.into(),
                path: socket,
                source,
            });
        }
        Err(_) => spawn_daemon(args, &socket)?,
    }
    Ok(answer(&socket, max_version.as_deref()))
}

/// Starts the daemon, which listens once this is back. containerd calls no `delete` after a `start` that failed.
fn spawn_daemon(args: &Args, socket: &Path) -> Result<(), Error> {
    let path_error = |path: &Path| {
        let path = path.to_owned();
        move |source| Error::Path { path, source }
    };
    reach("start.socket").map_err(path_error(socket))?;
    make_private_dir(Path::new(SOCKETS)).map_err(path_error(Path::new(SOCKETS)))?;
    let listens = Starter::pair().and_then(|(starter, theirs)| {
        spawn_with(&env::current_exe()?, theirs.as_fd(), args, None)?;
        drop(theirs);
        reach("start.daemon")?;
        starter.wait()
    });
    if listens.is_err() {
        // A daemon that was killed could not.
        let _ = remove_socket(socket);
    }
    listens.map_err(Error::Daemon)
}

/// Removes a socket unless somebody listens on it: that is the next pod of this name.
pub fn remove_socket(socket: &Path) -> io::Result<()> {
    match UnixStream::connect(socket) {
        Ok(_) => Ok(()),
        Err(_) => remove_file(socket),
    }
}

/// What a shim's process was started with.
pub fn inherited() -> io::Result<OwnedFd> {
    // SAFETY: F_GETFD only asks; a number that is not open gives EBADF.
    if unsafe { libc::fcntl(INHERITED_FD, libc::F_GETFD) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is open, and nothing else in this process owns it: this is called once, first.
    let fd = unsafe { OwnedFd::from_raw_fd(INHERITED_FD) };
    rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::CLOEXEC)?;
    Ok(fd)
}

/// containerd 1.6 reads the address from the bundle when it comes back.
fn write_address(socket: &Path) -> Result<(), Error> {
    let text = format!("unix://{}", socket.display());
    let temporary = Path::new(".address");
    fs::write(temporary, text)
        .and_then(|()| fs::rename(temporary, "address"))
        .map_err(|source| Error::Path {
            path: "address".into(),
            source,
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_address_depends_on_containerd_namespace_and_pod() {
        let path = socket_path;
        let one = path("/run/containerd/containerd.sock", "default", "web");
        // sha256 of "/run/containerd/containerd.sock/default/web"
        let hash = "2cde4450fa38c74f53603e01d2afd903b315a27a596f12a151414cd59897d883";
        assert_eq!(one, Path::new("/run/containerd/s").join(hash));
        assert_ne!(one, path("/run/other.sock", "default", "web"));
        assert_ne!(
            one,
            path("/run/containerd/containerd.sock", "k8s.io", "web")
        );
        assert_ne!(
            one,
            path("/run/containerd/containerd.sock", "default", "db")
        );
        assert_eq!(
            one,
            path("/run/containerd/containerd.sock", "default", "web")
        );
    }

    #[test]
    fn the_answer_is_an_address_for_1_x_and_json_for_2_x() {
        let socket = Path::new("/run/containerd/s/abc");
        for version in [None, Some("2"), Some("x")] {
            assert_eq!(answer(socket, version), "unix:///run/containerd/s/abc");
        }
        let value: serde_json::Value = serde_json::from_str(&answer(socket, Some("3"))).unwrap();
        let expected =
            json!({ "version": 3, "address": "unix:///run/containerd/s/abc", "protocol": "ttrpc" });
        assert_eq!(value, expected);
    }
}
