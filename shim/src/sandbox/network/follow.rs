//! Following the namespace: the kernel tells of changes by multicast (rtnetlink(7), groups); after a short rest the state is read again.

use std::{
    io,
    sync::{Arc, PoisonError},
    time::Duration,
};

use netlink_sys::{Socket, protocols::NETLINK_ROUTE};
use tokio::{
    io::unix::AsyncFd,
    time::{sleep, timeout},
};

use super::Network;
use crate::sandbox::Pod;

/// How long to wait for more: an interface comes with its addresses and routes, and each tells of itself.
const REST: Duration = Duration::from_millis(30);
/// How long to wait after a failure.
const AFTER_FAILURE: Duration = Duration::from_secs(2);
/// When to look once more: Docker starts its resolver after it has plugged in, and nobody tells of that.
const AGAIN: Duration = Duration::from_secs(1);
/// rtnetlink.h: links, neighbours, addresses and routes of IPv4, the same of IPv6.
const GROUPS: [u32; 6] = [1, 3, 5, 7, 9, 11];

/// The kernel's words.
struct Changes(AsyncFd<Socket>);

/// A socket for changes of the calling thread's namespace.
pub fn socket() -> io::Result<Socket> {
    let mut socket = Socket::new(NETLINK_ROUTE)?;
    socket.bind_auto()?;
    for group in GROUPS {
        socket.add_membership(group)?;
    }
    socket.set_non_blocking(true)?;
    Ok(socket)
}

impl Changes {
    /// In the runtime of the caller.
    fn new(socket: Socket) -> io::Result<Self> {
        // SAFETY: the socket owns its descriptor and gives the same one until it is dropped, which is after the registration.
        let registered = unsafe { AsyncFd::register(socket) };
        Ok(Self(registered?))
    }

    /// Waits for a change.
    async fn next(&self) -> io::Result<()> {
        loop {
            let mut ready = self.0.readable().await?;
            let changed = self.drain()?;
            ready.clear_ready();
            if changed {
                return Ok(());
            }
        }
    }

    /// Reads what there is, and tells whether it was anything.
    fn drain(&self) -> io::Result<bool> {
        let mut changed = false;
        let mut buffer = Vec::with_capacity(8192);
        loop {
            buffer.clear();
            match self.0.get_ref().recv(&mut buffer, 0) {
                Ok(_) => changed = true,
                // More than the socket holds: then something has changed.
                Err(e) if e.raw_os_error() == Some(libc::ENOBUFS) => changed = true,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(changed),
                Err(e) => return Err(e),
            }
        }
    }
}

/// Follows the namespace of a running pod to its end.
pub fn start(pod: &Arc<Pod>, network: &Arc<Network>) {
    let mut changes = network
        .changes
        .lock()
        .unwrap_or_else(PoisonError::into_inner);
    let Some(socket) = changes.take() else { return };
    let (pod, network) = (pod.clone(), network.clone());
    tokio::spawn(async move {
        tokio::select! {
            _ = pod.ended() => {}
            error = follow(&pod, &network, socket) => tracing::error!(%error, "the pod's network is no more followed"),
        }
    });
}

async fn follow(pod: &Pod, network: &Arc<Network>, socket: Socket) -> io::Error {
    let changes = match Changes::new(socket) {
        Ok(changes) => changes,
        Err(error) => return error,
    };
    let mut again = false;
    let mut told = None;
    loop {
        let waited = match again {
            true => timeout(AGAIN, changes.next()).await,
            false => Ok(changes.next().await),
        };
        // Another look is owed to each change, and to each failure.
        again = waited.is_ok();
        if let Ok(Err(error)) = waited {
            return error;
        }
        sleep(REST).await;
        match changes.drain() {
            Ok(more) => again |= more,
            Err(error) => return error,
        }
        let _awake = pod.rest().wake().await;
        let Ok(agent) = pod.agent() else { continue };
        let failure = network.update(Some(agent), false).await.err();
        let failure = failure.map(|error| error.to_string());
        if let Some(error) = &failure {
            if told != failure {
                tracing::error!(error, "following the pod's network");
            }
            again = true;
            sleep(AFTER_FAILURE).await;
        }
        told = failure;
    }
}
