//! A worker: receives a request from its socket, has it answered, sends the answer.

use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::sockopt::{set_socket_send_buffer_size, set_socket_send_buffer_size_force};
use rustix::net::{RecvFlags, SendFlags, recv, send};
use rustix::thread::UnshareFlags;

use super::abi::OUT_HEADER;
use super::creds::Identity;
use super::filter::Thread;
use super::reply::Reply;
use super::server::Server;
use super::sys;
use crate::limits;

/// How often a send is tried again while the kernel has no memory for it.
const SEND_RETRIES: u32 = 100;

/// Makes the socket take answers of the largest size.
pub fn prepare(socket: impl AsFd) -> Result<(), Errno> {
    let size = limits::FS_MESSAGE.saturating_mul(2);
    // Past `wmem_max` only with CAP_NET_ADMIN.
    set_socket_send_buffer_size_force(&socket, size)
        .or_else(|_| set_socket_send_buffer_size(&socket, size))
}

/// Serves `socket` until its other end is closed; confines the calling thread for good.
pub fn serve(server: &Server, socket: &OwnedFd) -> std::io::Result<()> {
    // The umask belongs to the fs_struct: this thread needs its own.
    sys::unshare(UnshareFlags::FS)?;
    let identity = Identity::of_this_thread()?;
    Thread::Worker.confine()?;
    let mut request = vec![0; limits::FS_MESSAGE];
    let mut answer = vec![0; limits::FS_MESSAGE];
    loop {
        let length = match recv(socket, request.as_mut_slice(), RecvFlags::TRUNC) {
            Ok((_, 0)) | Err(Errno::CONNRESET) => return Ok(()),
            Ok((_, length)) => length,
            Err(Errno::INTR) => continue,
            Err(errno) => return Err(errno.into()),
        };
        let message = request.get(..length).unwrap_or(&request);
        let Some(reply) = server.handle(&identity, message, length, &mut answer) else {
            continue;
        };
        match transmit(socket, reply) {
            Ok(()) => {}
            Err(Errno::PIPE | Errno::CONNRESET) => return Ok(()),
            Err(Errno::MSGSIZE | Errno::NOBUFS | Errno::NOMEM) => {
                let unique = reply
                    .get(8..OUT_HEADER)
                    .and_then(|bytes| bytes.try_into().ok())
                    .unwrap_or_default();
                let mut short = [0; OUT_HEADER];
                transmit(
                    socket,
                    Reply::new(&mut short).finish(u64::from_ne_bytes(unique), Err(Errno::NOMEM)),
                )?;
            }
            Err(errno) => return Err(errno.into()),
        }
    }
}

fn transmit(socket: &OwnedFd, message: &[u8]) -> Result<(), Errno> {
    let mut left = SEND_RETRIES;
    loop {
        match send(socket, message, SendFlags::NOSIGNAL) {
            Ok(_) => return Ok(()),
            Err(Errno::INTR) => {}
            // A datagram of 1 MiB asks the kernel for one large piece of memory.
            Err(Errno::NOBUFS | Errno::NOMEM) if left > 0 => {
                left = left.saturating_sub(1);
                std::thread::sleep(Duration::from_millis(1));
            }
            Err(errno) => return Err(errno),
        }
    }
}
