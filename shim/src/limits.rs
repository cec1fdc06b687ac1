//! The limits table of the shim: what containerd, its clients, the guest and the VMM can make it hold. What shim and agent
//! agree on stands in `bulkhead_protocol::limits`.

/// Bytes of one connection of containerd's that wait for one side before the other is not read any more (and one frame more).
/// Test: `a_client_that_writes_and_a_worker_that_does_not_read_stop_each_other`.
pub const CLIENT_WAITING: usize = 64 << 10;

/// Calls without an answer that the keeper remembers for the next worker; one beyond ends with its worker.
/// Test: `calls_beyond_the_caps_are_passed_on_and_not_remembered`.
pub const CLIENT_CALLS: usize = 16 << 10;

/// Bytes of such calls on one connection.
/// Test: `calls_beyond_the_caps_are_passed_on_and_not_remembered`.
pub const CLIENT_CALL_BYTES: usize = 32 << 20;

/// A call that so many workers have not outlived is answered with an error: it may be what kills them.
/// Test: `a_call_that_no_worker_outlives_is_given_up`.
pub const CLIENT_TRIES: u32 = 4;

/// Longest body of a ttrpc frame in bytes (ttrpc's own limit).
/// Test: `a_frame_that_is_too_long_is_an_error`.
pub const FRAME_BODY: usize = 4 << 20;

/// Descriptors that the keeper has copies of: of streams, and one of a pod that goes.
pub const KEEPER_STREAMS: usize = 16 << 10;

/// Most events that wait while containerd is away.
pub const EVENTS: usize = 4096;

/// Longest answer of the VMM or the file server, in bytes.
/// Test: `an_answer_without_end_is_refused`.
pub const CONTROL_ANSWER: usize = 64 << 10;

/// Descriptors of one control request at most.
pub const CONTROL_DESCRIPTORS: usize = 32;

/// Longest `exit.json` that is read, in bytes.
pub const EXIT_JSON: u64 = 64 << 10;

/// Longest line that begins a vsock connection, in bytes.
/// Test: `lines_on_the_ready_port_have_an_end`.
pub const VSOCK_LINE: usize = 128;

/// Connections of the guest to the ready port that are heard before the start fails.
/// Test: `lines_on_the_ready_port_have_an_end`.
pub const READY_CONNECTIONS: usize = 8;

/// Longest body of a frame of the agent's, in bytes. The longest that is meant lists the processes of a pod, some 150 bytes each.
/// Test: `a_frame_above_the_cap_ends_the_connection_before_its_body`.
pub const AGENT_FRAME: usize = 256 << 10;

/// Queries to the resolver that connect at once: each takes one of the worker's 8 threads for what blocks.
pub const RESOLVER_CONNECTS: usize = 4;

/// Longest text of the agent's that is passed on, in bytes.
/// Test: `what_the_agent_says_is_cut_and_has_no_control_characters`.
pub const AGENT_TEXT: usize = 2000;

/// Longest line of the log in bytes: what a pipe takes in one piece.
/// Test: `a_line_goes_out_in_one_piece_and_never_longer_than_a_pipe_takes`.
pub const LOG_LINE: usize = 4096;

/// Lines that the log takes at once.
/// Test: `a_flood_of_lines_is_cut_and_counted`.
pub const LOG_BURST: u32 = 512;

/// Lines of the log in a second over time.
/// Test: `a_flood_of_lines_is_cut_and_counted`.
pub const LOG_LINES_PER_SECOND: u32 = 32;

/// Most trees of one container (overlayfs takes 500 layers).
/// Test: `more_sources_than_a_container_may_have_are_refused`.
pub const TREES: usize = 600;

/// Longest `linux.cgroupsPath`, in bytes.
/// Test: `what_leads_elsewhere_or_nowhere_is_refused_by_the_fields_name`.
pub const CGROUP_PATH: usize = 1024;

/// Bytes of a hook's stderr that are kept.
/// Test: `of_a_hooks_stderr_only_the_beginning_is_kept`.
pub const HOOK_STDERR: usize = 4096;
