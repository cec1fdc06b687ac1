//! The steward: a second process of the file server that does the few things which take capabilities in the host's own user namespace, so that
//! the server itself has none there.
//!
//! Linux asks for CAP_SYS_ADMIN there for `trusted.*` attributes (an overlay's marks) and most of `security.*`, and for
//! CAP_DAC_READ_SEARCH to open a file by its handle. A server with these could open every file of the host by a forged handle. The steward never
//! takes a handle or a path from the server: handles stay with it and go by numbers, files come as descriptors that the server has anyway.
//!
//! ```text
//!  server (user namespace of its own) -- SEQPACKET, one a thread --> steward (no path, no socket, no other file)
//! ```
//!
//! The server talks to a guest, so what it says is checked as the guest's: numbers that nobody gave out, attributes of other name spaces
//! and handles of other mounts are refused.

mod client;
mod message;
mod service;

pub use client::{Kept, Mount, Steward, channels};
pub use service::{needs_steward, serve};
