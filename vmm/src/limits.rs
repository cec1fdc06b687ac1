//! The limits table of the VMM: everything a guest can fill has its cap here.

/// Most buffers in one descriptor chain, indirect tables included: one less than a system call takes.
/// Test: `malformed_chains_are_refused_and_the_queue_goes_on`.
pub const CHAIN_BUFFERS: usize = 1023;

/// Most bytes of `machine.json`.
/// Test: `of_a_file_without_end_no_more_than_the_cap_is_read`.
pub const CONFIG_BYTES: u64 = 64 << 10;

/// Most vCPUs of a machine. The MP table of 1 KiB holds no more.
/// Test: `each_value_out_of_range_is_refused_by_name`.
pub const VCPUS: u8 = 32;

/// Least memory of a machine in MiB.
/// Test: `each_value_out_of_range_is_refused_by_name`.
pub const MEMORY_MIB_MIN: u32 = 96;

/// Most memory of a machine in MiB.
/// Test: `each_value_out_of_range_is_refused_by_name`.
pub const MEMORY_MIB_MAX: u32 = 1 << 20;

/// Most worker sockets to the file server.
/// Test: `each_value_out_of_range_is_refused_by_name`.
pub const FS_WORKERS: usize = 16;

/// Most slots for block devices.
/// Test: `each_value_out_of_range_is_refused_by_name`.
pub const BLOCK_SLOTS: usize = 8;

/// Bytes of console output kept; older ones are dropped.
/// Test: `the_ring_is_bounded_and_keeps_the_newest`.
pub const CONSOLE_BYTES: usize = 64 << 10;

/// Longest console line looked at for a panic message.
/// Test: `the_first_panic_line_survives_a_flood`.
pub const CONSOLE_LINE_BYTES: usize = 1024;

/// Bytes of console output in `exit.json` and in a report.
pub const CONSOLE_TAIL_BYTES: usize = 4 << 10;

/// Longest control request.
/// Test: `control_lines_and_connections_are_capped`.
pub const CONTROL_LINE_BYTES: usize = 4 << 10;

/// How long vCPUs may take to stop for a pause. One that resets a device waits until that has finished its requests.
pub const PAUSE_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(5);

/// Most pids on the host for a pod's containers.
/// Test: `there_is_a_most`.
pub const PIDS: usize = 256;

/// Most connections to the control socket at once.
/// Test: `control_lines_and_connections_are_capped`.
pub const CONTROL_CONNECTIONS: usize = 8;

/// Warnings about one device's registers and failed starts before there are no more.
/// Test: `warnings_about_registers_end`.
pub const REGISTER_WARNINGS: u32 = 8;

/// Lines about broken queues, of all devices, before there are no more.
/// Test: `lines_about_broken_queues_end`.
pub const BROKEN_QUEUE_WARNINGS: u64 = 64;

/// Requests that a device serves before it looks whether it is to stop: a guest can refill a queue for ever.
/// Test: `a_reset_does_not_wait_for_a_queue_full_of_requests`.
pub const REQUESTS_AT_ONCE: usize = 16;

/// Largest data of one block request.
/// Test: `requests_beyond_the_disk_fail_and_touch_nothing`.
pub const BLOCK_REQUEST_BYTES: usize = 4 << 20;

/// Most descriptors with one control request: a tap's queues, and a vhost for each.
/// Test: `descriptors_come_whole_and_too_many_end_the_connection`.
pub const CONTROL_DESCRIPTORS: usize = 2 * NET_PAIRS;

/// Most slots for network interfaces.
/// Test: `each_value_out_of_range_is_refused_by_name`.
pub const NET_SLOTS: usize = 4;

/// Most pairs of queues of a network device.
/// Test: `pairs_of_queues_are_turned_on_by_the_control_queue`.
pub const NET_PAIRS: usize = 8;

/// Least time between two changes of the tap's queues that a guest causes: by the number of pairs that it uses, by a reset.
/// Test: `resets_without_end_leave_the_hosts_network_alone_in_between`.
pub const NET_PAIRS_REST: std::time::Duration = std::time::Duration::from_millis(50);

/// Largest frame with its header: 64 KiB still to be segmented, two VLAN tags.
/// Test: `a_frame_of_the_largest_size_passes_with_its_segments_still_to_be_cut`.
pub const NET_FRAME: usize = 12 + 14 + 8 + 65535;

/// Most buffers of the guest that one received frame is spread over.
/// Test: `receive_buffers_that_hold_nothing_lose_the_frame_and_end_nothing`.
pub const NET_BUFFERS: usize = 64;

/// Frames in one direction before the other has its turn.
pub const NET_FRAMES_AT_ONCE: usize = 64;

/// Dropped frames of a pair of queues in the log before they are only counted.
pub const NET_WARNINGS: u64 = 16;

/// Pieces of free memory taken back for one report of the guest's: Linux names no more.
/// Test: `of_a_report_no_more_than_the_cap_is_taken`.
pub const BALLOON_REPORT_BUFFERS: usize = 32;

/// What a request for random bytes counts for at least.
/// Test: `requests_for_nothing_are_no_gift_and_a_reset_renews_no_budget`.
pub const RNG_REQUEST_COST: usize = 64;

/// Random bytes given to the guest for one request.
/// Test: `a_buffer_is_filled_up_to_the_cap`.
pub const RNG_REQUEST_BYTES: usize = 4 << 10;

/// Random bytes given to the guest in a second.
/// Test: `a_seconds_bytes_are_used_up_and_come_back`.
pub const RNG_BYTES_PER_SECOND: usize = 1 << 20;

/// Most vsock connections of a guest at once, those that still drain included.
/// Test: `connections_of_the_host_have_a_cap`.
pub const VSOCK_CONNECTIONS: usize = 4096;

/// Most of them that the guest asked for: each can hold a buffer, and none but the agent's call is expected.
/// Test: `a_connection_storm_is_capped`.
pub const VSOCK_GUEST_CONNECTIONS: usize = 64;

/// Connections that the guest may ask for at once after a rest: the shim does work for each, even if the guest ends it at once.
/// Test: `connections_that_come_and_go_have_a_rate`.
pub const VSOCK_CONNECTS_AT_ONCE: u64 = 1024;

/// Connections that the guest may ask for in a second, over time: one for each query to the resolver.
/// Test: `connections_that_come_and_go_have_a_rate`.
pub const VSOCK_CONNECTS_PER_SECOND: u64 = 1024;

/// Buffer of one vsock connection towards the host: the credit that a guest gets.
/// Test: `more_data_than_credit_resets_the_connection`.
pub const VSOCK_BUFFER: usize = 256 << 10;

/// Largest data of a vsock packet in either direction.
/// Test: `a_packet_that_announces_more_than_it_holds_resets_the_connection`.
pub const VSOCK_PACKET: usize = 64 << 10;

/// Most RSTs that wait for the guest; more are not sent.
/// Test: `resets_for_a_guest_that_takes_none_have_a_cap`.
pub const VSOCK_PENDING_RESETS: usize = 1024;

/// Longest `CONNECT` line.
/// Test: `garbage_long_lines_and_end_of_file_are_refused`.
pub const VSOCK_CONNECT_LINE: usize = 32;

/// Most host clients at once that have not sent their `CONNECT` line.
/// Test: `clients_that_do_not_say_connect_have_a_cap`.
pub const VSOCK_PENDING_CONNECTS: usize = 256;

/// How long a host client may take for its `CONNECT` line.
/// Test: `a_client_that_never_says_connect_is_closed`.
pub const VSOCK_CONNECT_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(5);

/// Largest data of one FUSE message: `max_write` and the largest read.
pub const FS_MESSAGE_DATA: usize = 1 << 20;

/// Largest FUSE message: the data, and a page for its headers.
/// Test: `short_long_and_lying_messages_are_refused_and_the_server_serves_on`.
pub const FS_MESSAGE: usize = FS_MESSAGE_DATA + 4096;

/// Longest name in a folder and of an extended attribute (`NAME_MAX`, `XATTR_NAME_MAX`).
/// Test: `a_name_of_256_bytes_is_too_long`.
pub const FS_NAME: usize = 255;

/// Longest value or list of extended attributes (`XATTR_SIZE_MAX`, `XATTR_LIST_MAX`).
pub const FS_XATTR: usize = 64 << 10;

/// Most inodes the file server holds for the guest.
/// Test: `a_guest_at_its_limits_is_refused_and_others_names_still_work`.
pub const FS_INODES: usize = 512 << 10;

/// Most files and folders the guest has open at once.
/// Test: `a_guest_at_its_limits_is_refused_and_others_names_still_work`.
pub const FS_HANDLES: usize = 64 << 10;

/// Descriptors the file server keeps for itself.
/// Test: `beyond_its_descriptors_the_server_holds_files_by_handle`.
pub const FS_DESCRIPTORS_KEPT: usize = 1024;

/// Most trees of a pod.
/// Test: `trees_have_a_cap`.
pub const FS_TREES: usize = 1024;

/// Longest id of a tree.
/// Test: `an_id_is_one_plain_name`.
pub const FS_TREE_ID: usize = 64;

/// Most file systems whose inode numbers are told apart.
pub const FS_DEVICES: usize = 4096;

/// Most bytes read of a folder at once.
pub const FS_DIR_BUFFER: usize = 32 << 10;

/// Most files that the steward is asked about at once.
/// Test: `files_are_told_apart_by_whether_they_have_attributes`.
pub const FS_ASKED: usize = 32;

/// Most bytes of one `copy_file_range`, so that no worker is held for long.
pub const FS_COPY: usize = 64 << 20;

/// Lines in the log about malformed messages before they are only answered.
pub const FS_WARNINGS: u32 = 32;

/// Most descriptors that the VMM has, and the emulator: two for each vsock connection, and what devices have.
/// Test: `the_jail_is_as_written`.
pub const VMM_DESCRIPTORS: u64 = 16384;

/// Most threads of the pod's user: vCPUs, devices, containers' pids, the emulator's.
/// Test: `the_jail_is_as_written`.
pub const VMM_THREADS: u64 = 1024;

/// Longest file that the VMM writes, in bytes, where the machine has no disk: its log and `exit.json`.
/// Test: `the_jail_is_as_written`.
pub const VMM_FILE_BYTES: u64 = 2 << 20;

/// Bytes of the log of the VMM, and of that of the file server.
/// Test: `a_flood_of_lines_ends_at_the_cap`.
pub const LOG_BYTES: usize = 1 << 20;
