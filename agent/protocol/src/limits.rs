//! The limits table of shim and agent: everything the other side can fill has its cap here.

/// Guest port of the agent's ttrpc service.
pub const AGENT_PORT: u32 = 1024;
/// Guest port of the stdio streams.
pub const STREAM_PORT: u32 = 1025;
/// Host port the agent dials once it serves.
pub const READY_PORT: u32 = 1026;
/// Guest port that leads to TCP ports of the pod's loopback.
pub const FORWARD_PORT: u32 = 1027;
/// Host port that leads to the resolver on 127.0.0.11 of the pod's namespace.
pub const RESOLVER_PORT: u32 = 1028;
/// Guest port of the debugging shell, where the machine allows one.
pub const DEBUG_PORT: u32 = 1029;
/// Debugging shells at one time.
/// Test: `shells_above_the_cap_are_refused`.
pub const DEBUG_SESSIONS_MAX: usize = 8;
/// Longest header line of a debugging shell, in bytes.
/// Test: `a_header_survives_the_way_and_bad_ones_are_refused`.
pub const DEBUG_HEADER_MAX: usize = 64 * 1024;
/// Bytes in one frame of a debugging shell.
/// Test: `frames_survive_the_way_and_bad_heads_are_refused`.
pub const DEBUG_FRAME_MAX: usize = 32 * 1024;
/// Empty network devices that a machine has at boot.
/// Test: `more_interfaces_than_slots_are_left_out`.
pub const NET_SLOTS: usize = 4;
/// Addresses of one interface.
/// Test: `each_list_has_its_cap`.
pub const ADDRESSES_MAX: usize = 64;
/// Routes of the pod's network.
/// Test: `each_list_has_its_cap`.
pub const ROUTES_MAX: usize = 1024;
/// Permanent neighbours of the pod's network.
/// Test: `each_list_has_its_cap`.
pub const NEIGHBOURS_MAX: usize = 1024;
/// TCP ports that are told to the host; of more the lowest.
/// Test: `of_too_many_ports_the_lowest_are_told`.
pub const FORWARD_PORTS_MAX: usize = 256;
/// Connections to the pod's loopback at one time.
/// Test: `connections_above_the_cap_are_refused_and_room_comes_back`.
pub const FORWARD_CONNECTIONS_MAX: usize = 256;
/// Longest header or answer line of a connection to [`FORWARD_PORT`], in bytes.
/// Test: `headers_that_lead_nowhere_are_refused`.
pub const FORWARD_LINE_MAX: usize = 256;
/// Bytes a forwarded connection holds at most in one direction.
pub const FORWARD_BUFFER: usize = 16 * 1024;
/// Queries to the resolver at one time.
/// Test: `queries_above_the_cap_are_lost`.
pub const RESOLVER_QUERIES_MAX: usize = 64;
/// vCPUs of a machine.
/// Test: `nonsense_is_refused_by_its_field`.
pub const VCPUS_MAX: u32 = 32;
/// Bytes of one range of memory that a machine is given after its start.
/// Test: `nonsense_is_refused_by_its_field`.
pub const GROWTH_MAX: u64 = 1 << 40;
/// Longest header line of a stdio stream, in bytes.
/// Test: `a_header_without_end_is_refused_at_the_cap`.
pub const STREAM_HEADER_MAX: usize = 1024;
/// Longest container or exec id, in bytes.
/// Test: `paths_dots_and_long_ids_are_not`.
pub const ID_MAX: usize = 128;
/// Largest `config.json` accepted, in bytes (a ttrpc message holds 4 MiB).
/// Test: `a_spec_that_is_too_large_or_no_json_names_the_file`.
pub const SPEC_MAX: usize = 3 * 1024 * 1024;
/// Largest number of containers in a pod.
/// Test: `a_pod_that_is_full_takes_no_container`.
pub const CONTAINERS_MAX: usize = 256;
/// Largest number of execs of one container that are not deleted yet.
/// Test: `execs_have_a_cap`.
pub const EXECS_MAX: usize = 1024;
/// Bytes a stdio pump holds at most in one direction.
/// Test: `a_stuck_reader_stops_the_guest_and_is_cut_off_after_the_process_ended`.
pub const STREAM_BUFFER: usize = 64 * 1024;
