//! x86-64: memory map, what the Linux boot protocol asks for, and a vCPU's first state.
//!
//! A vCPU's first state and the tables are the `kvm` engine's alone; the emulator makes its own.

pub mod boot_params;
pub mod cmdline;
pub mod cpuid;
pub mod images;
pub mod layout;
pub mod mp_table;
pub mod registers;
