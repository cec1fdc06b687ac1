//! The VMM and the file server.

pub mod arch;
pub mod bus;
pub mod config;
pub mod control;
pub mod engine;
pub mod fs;
pub mod i8042;
pub mod jail;
pub mod limits;
pub mod log;
pub mod machine;
pub mod pids;
pub mod serial;
pub mod virtio;
