//! How bytes move between a socket of the guest's and a fifo or file of the host's, so that a shim which dies loses none.

use std::{
    fs,
    io::{self, Write},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use bulkhead_protocol::limits::STREAM_BUFFER;
use rustix::{
    event::{PollFd, PollFlags, poll},
    net::{RecvFlags, recv},
    pipe::{SpliceFlags, splice},
};
use tokio::io::{Interest, unix::AsyncFd};

use crate::watch::watch;

/// Whether something can be done with a descriptor now.
fn is_ready(fd: BorrowedFd<'_>, what: PollFlags) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(fd, what)];
    let now = rustix::event::Timespec::default();
    poll(&mut fds, Some(&now)).is_ok_and(|ready| ready > 0)
}

/// Waits until a descriptor can be read from, or written to.
async fn wait_for(fd: &AsyncFd<OwnedFd>, interest: Interest) -> io::Result<()> {
    let what = match interest {
        Interest::READABLE => PollFlags::IN,
        _ => PollFlags::OUT,
    };
    loop {
        let mut ready = fd.ready(interest).await?;
        if is_ready(fd.as_fd(), what) {
            return Ok(());
        }
        ready.clear_ready();
    }
}

/// Moves what there is, at most a buffer's worth, once both ends are ready; 0 at the end.
pub async fn splice_some(from: &AsyncFd<OwnedFd>, to: &AsyncFd<OwnedFd>) -> io::Result<usize> {
    loop {
        wait_for(from, Interest::READABLE).await?;
        wait_for(to, Interest::WRITABLE).await?;
        let flags = SpliceFlags::NONBLOCK | SpliceFlags::MOVE;
        match splice(from, None, to, None, STREAM_BUFFER, flags) {
            Ok(n) => return Ok(n),
            // The one or the other was ready no more.
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {
                tokio::task::yield_now().await;
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// Made ready for [`splice_some`].
pub fn watched(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    rustix::io::ioctl_fionbio(&fd, true)?;
    watch(fd, interest)
}

/// Moves an output until its end. `progress` counts what was moved.
pub async fn output_to_fifo(from: OwnedFd, to: OwnedFd, progress: &AtomicU64) -> io::Result<()> {
    let from = watched(from, Interest::READABLE)?;
    let to = watched(to, Interest::WRITABLE)?;
    while splice_some(&from, &to).await? > 0 {
        progress.fetch_add(1, Ordering::Relaxed);
    }
    Ok(())
}

/// The same for a file.
pub async fn output_to_file(from: OwnedFd, to: OwnedFd, progress: &AtomicU64) -> io::Result<()> {
    let from = Arc::new(watched(from, Interest::READABLE)?);
    let to = Arc::new(fs::File::from(to));
    loop {
        wait_for(&from, Interest::READABLE).await?;
        let (source, file) = (from.clone(), to.clone());
        let copied = tokio::task::spawn_blocking(move || copy_some(&*source, &file));
        match copied.await.map_err(io::Error::other)? {
            Ok(0) => return Ok(()),
            Ok(_) => drop(progress.fetch_add(1, Ordering::Relaxed)),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Err(e) => return Err(e),
        }
    }
}

/// Writes what the socket holds, at most a buffer's worth, and only then takes it out. 0 at the end.
fn copy_some(from: &impl AsFd, mut to: &fs::File) -> io::Result<usize> {
    let mut buffer = vec![0; STREAM_BUFFER];
    let look = RecvFlags::PEEK | RecvFlags::DONTWAIT;
    let (n, _) = recv(from, &mut *buffer, look)?;
    let seen = buffer.get_mut(..n).unwrap_or_default();
    to.write_all(seen)?;
    if n > 0 {
        // Nobody else reads it: it is there.
        recv(from, seen, RecvFlags::DONTWAIT)?;
    }
    Ok(n)
}
