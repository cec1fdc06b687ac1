//! What the shim and the agent say to each other: the service, the stdio streams' header, ports and limits; and what both must know
//! of the OCI specification. Used by both, uses nothing of ours.

pub mod debug;
pub mod features;
pub mod fields;
pub mod forward;
pub mod id;
pub mod limits;
pub mod stream;

/// Messages of `proto/agent.proto`.
#[allow(
    missing_docs,
    nonstandard_style,
    unused,
    clippy::all,
    clippy::undocumented_unsafe_blocks
)]
pub mod agent {
    include!(concat!(env!("OUT_DIR"), "/agent.rs"));
}

/// Async client (`AgentClient`), service trait (`Agent`) and `create_agent` of `proto/agent.proto`.
#[allow(
    missing_docs,
    nonstandard_style,
    unused,
    clippy::all,
    clippy::undocumented_unsafe_blocks
)]
pub mod agent_ttrpc {
    include!(concat!(env!("OUT_DIR"), "/agent_ttrpc.rs"));
}

/// Version the agent says in its `ready` line; shim and agent are built together.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
