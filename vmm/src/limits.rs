//! The limits table of the VMM: everything a guest can fill has its cap here.

/// Most buffers in one descriptor chain, indirect tables included.
pub const CHAIN_BUFFERS: usize = 1024;

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

/// Most connections to the control socket at once.
pub const CONTROL_CONNECTIONS: usize = 8;

/// Warnings about one device's registers before it is only counted.
pub const REGISTER_WARNINGS: u32 = 8;

/// Largest data of one block request.
pub const BLOCK_REQUEST_BYTES: usize = 4 << 20;

/// Random bytes given to the guest for one request.
pub const RNG_REQUEST_BYTES: usize = 4 << 10;

/// Random bytes given to the guest in a second.
pub const RNG_BYTES_PER_SECOND: usize = 1 << 20;
