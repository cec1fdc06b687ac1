//! The shim: containerd's Task service in front of one machine, and what the operator's command shares with it.
//!
//! containerd (root, trusted) calls the binary `containerd-shim-bulkhead-v1`; everything that comes from the guest
//! through the agent or the VMM is data with a limit.

pub mod args;
pub mod bootstrap;
pub mod check;
pub mod config;
pub mod delete;
pub mod events;
pub mod features;
pub mod hooks;
pub mod keeper;
pub mod limits;
pub mod logging;
pub mod mounts;
pub mod operator;
pub mod refusal;
pub mod sandbox;
pub mod sandbox_api;
pub mod spec;
pub mod stdio;
pub mod task;
pub mod watch;
