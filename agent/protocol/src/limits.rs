//! The limits table of shim and agent: everything the other side can fill has its cap here.

/// Guest port of the agent's ttrpc service.
pub const AGENT_PORT: u32 = 1024;
/// Guest port of the stdio streams.
pub const STREAM_PORT: u32 = 1025;
/// Host port the agent dials once it serves.
pub const READY_PORT: u32 = 1026;
/// Longest header line of a stdio stream, in bytes.
pub const STREAM_HEADER_MAX: usize = 1024;
/// Longest container or exec id, in bytes.
pub const ID_MAX: usize = 128;
/// Largest `config.json` accepted, in bytes (a ttrpc message holds 4 MiB).
pub const SPEC_MAX: usize = 2 * 1024 * 1024;
/// Largest number of containers in a pod.
pub const CONTAINERS_MAX: usize = 256;
/// Largest number of execs of one container that are not deleted yet.
pub const EXECS_MAX: usize = 1024;
/// Bytes a stdio pump holds at most in one direction.
pub const STREAM_BUFFER: usize = 64 * 1024;
