//! The VMM and the file server.
pub mod limits;
pub mod virtio;
