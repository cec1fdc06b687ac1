//! The limits table of the VMM: everything a guest can fill has its cap here.

/// Most buffers in one descriptor chain, indirect tables included.
pub const CHAIN_BUFFERS: usize = 1024;
