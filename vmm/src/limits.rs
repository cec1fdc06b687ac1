//! The limits table of the VMM: everything a guest can fill has its cap here.

/// Most buffers in one descriptor chain, indirect tables included: one less than a system call takes.
pub const CHAIN_BUFFERS: usize = 1023;

/// Most bytes of `machine.json`.
pub const CONFIG_BYTES: u64 = 64 << 10;

/// Most vCPUs of a machine. The MP table of 1 KiB holds no more.
pub const VCPUS: u8 = 32;

/// Least memory of a machine in MiB.
pub const MEMORY_MIB_MIN: u32 = 96;

/// Most memory of a machine in MiB.
pub const MEMORY_MIB_MAX: u32 = 1 << 20;

/// Most worker sockets to the file server.
pub const FS_WORKERS: usize = 16;

/// Most slots for block devices.
pub const BLOCK_SLOTS: usize = 8;

/// Bytes of console output kept; older ones are dropped.
pub const CONSOLE_BYTES: usize = 64 << 10;

/// Longest console line looked at for a panic message.
pub const CONSOLE_LINE_BYTES: usize = 1024;

/// Bytes of console output in `exit.json` and in a report.
pub const CONSOLE_TAIL_BYTES: usize = 4 << 10;

/// Longest control request.
pub const CONTROL_LINE_BYTES: usize = 4 << 10;

/// How long vCPUs may take to stop for a pause. One that resets a device waits until that has finished its requests.
pub const PAUSE_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(5);

/// Most pids on the host for a pod's containers.
pub const PIDS: usize = 256;

/// Most connections to the control socket at once.
pub const CONTROL_CONNECTIONS: usize = 8;

/// Warnings about one device's registers before it is only counted.
pub const REGISTER_WARNINGS: u32 = 8;

/// Requests that a device serves before it looks whether it is to stop: a guest can refill a queue for ever.
pub const REQUESTS_AT_ONCE: usize = 16;

/// Largest data of one block request.
pub const BLOCK_REQUEST_BYTES: usize = 4 << 20;

/// Most descriptors with one control request: a tap's queues, and a vhost for each.
pub const CONTROL_DESCRIPTORS: usize = 2 * NET_PAIRS;

/// Most slots for network interfaces.
pub const NET_SLOTS: usize = 4;

/// Most pairs of queues of a network device.
pub const NET_PAIRS: usize = 8;

/// Least time between two changes of the number of pairs that a guest uses.
pub const NET_PAIRS_REST: std::time::Duration = std::time::Duration::from_millis(50);

/// Largest frame with its header: 64 KiB still to be segmented, two VLAN tags.
pub const NET_FRAME: usize = 12 + 14 + 8 + 65535;

/// Most buffers of the guest that one received frame is spread over.
pub const NET_BUFFERS: usize = 64;

/// Frames in one direction before the other has its turn.
pub const NET_FRAMES_AT_ONCE: usize = 64;

/// Dropped frames of a pair of queues in the log before they are only counted.
pub const NET_WARNINGS: u64 = 16;

/// Random bytes given to the guest for one request.
pub const RNG_REQUEST_BYTES: usize = 4 << 10;

/// Random bytes given to the guest in a second.
pub const RNG_BYTES_PER_SECOND: usize = 1 << 20;

/// Most vsock connections of a guest at once, those that still drain included.
pub const VSOCK_CONNECTIONS: usize = 4096;

/// Most of them that the guest asked for: each can hold a buffer, and none but the agent's call is expected.
pub const VSOCK_GUEST_CONNECTIONS: usize = 64;

/// Buffer of one vsock connection towards the host: the credit that a guest gets.
pub const VSOCK_BUFFER: usize = 256 << 10;

/// Largest data of a vsock packet in either direction.
pub const VSOCK_PACKET: usize = 64 << 10;

/// Most RSTs that wait for the guest; more are not sent.
pub const VSOCK_PENDING_RESETS: usize = 1024;

/// Longest `CONNECT` line.
pub const VSOCK_CONNECT_LINE: usize = 32;

/// Most host clients at once that have not sent their `CONNECT` line.
pub const VSOCK_PENDING_CONNECTS: usize = 256;

/// How long a host client may take for its `CONNECT` line.
pub const VSOCK_CONNECT_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(5);

/// Largest data of one FUSE message: `max_write` and the largest read.
pub const FS_MESSAGE_DATA: usize = 1 << 20;

/// Largest FUSE message: the data, and a page for its headers.
pub const FS_MESSAGE: usize = FS_MESSAGE_DATA + 4096;

/// Longest name in a folder and of an extended attribute (`NAME_MAX`, `XATTR_NAME_MAX`).
pub const FS_NAME: usize = 255;

/// Longest value or list of extended attributes (`XATTR_SIZE_MAX`, `XATTR_LIST_MAX`).
pub const FS_XATTR: usize = 64 << 10;

/// Most inodes the file server holds for the guest.
pub const FS_INODES: usize = 512 << 10;

/// Most files and folders the guest has open at once.
pub const FS_HANDLES: usize = 64 << 10;

/// Descriptors the file server keeps for itself.
pub const FS_DESCRIPTORS_KEPT: usize = 1024;

/// Most trees of a pod.
pub const FS_TREES: usize = 1024;

/// Longest id of a tree.
pub const FS_TREE_ID: usize = 64;

/// Most file systems whose inode numbers are told apart.
pub const FS_DEVICES: usize = 4096;

/// Most bytes read of a folder at once.
pub const FS_DIR_BUFFER: usize = 32 << 10;

/// Most bytes of one `copy_file_range`, so that no worker is held for long.
pub const FS_COPY: usize = 64 << 20;

/// Lines in the log about malformed messages before they are only answered.
pub const FS_WARNINGS: u32 = 32;

/// Bytes of the log of the VMM, and of that of the file server.
pub const LOG_BYTES: usize = 1 << 20;
