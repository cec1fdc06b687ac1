//! The file server behind virtio-fs: a FUSE passthrough server in a process of its own.
//!
//! The binary `bulkhead-fs` calls [`run`]. The VMM forwards the guest's FUSE requests as datagrams over SEQPACKET
//! sockets and never shares guest memory; the shim hands in detached mounts over the control socket. The shim is
//! trusted; every byte of a FUSE message is the guest's and is parsed in [`parse`] before anything acts on it.
//!
//! ```text
//!  VMM  -- SEQPACKET --> worker --> parse --> server --> (attr, create, dir, file, name, xattr)
//!  shim -- fs.sock ----> control --> trees (attach, detach)
//! ```
//!
//! The server reaches the host only through the mounts it was given: it runs in a mount namespace whose root is an
//! empty tmpfs. It resolves one name at a time below a held descriptor, follows no link and opens nothing but
//! regular files and folders. Whether a tree is read-only is decided by the mount, so the host kernel enforces it.

mod abi;
mod attr;
mod control;
mod create;
mod creds;
mod dir;
mod file;
mod filter;
mod handles;
mod inodes;
mod jail;
mod name;
mod namespace;
mod parse;
mod reply;
mod request;
mod run;
mod server;
mod steward;
mod sys;
#[cfg(test)]
mod tests;
mod trees;
mod worker;
mod xattr;

#[cfg(fuzzing)]
pub use run::run_in_threads;
pub use run::{Config, Error, run};
pub use sys::{inherited, inherited_sockets};
