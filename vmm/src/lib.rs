//! The VMM and the file server.

pub mod bus;
pub mod config;
pub mod limits;
pub mod machine;
pub mod serial;
pub mod virtio;
