//! x86-64: memory map, what the Linux boot protocol asks for, and a vCPU's first state.
//!
//! Called by the `kvm` engine alone; the emulator does this for itself.

pub mod boot_params;
pub mod cmdline;
pub mod cpuid;
pub mod images;
pub mod layout;
pub mod mp_table;
pub mod registers;
