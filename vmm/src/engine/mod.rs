//! What runs the vCPUs.

pub mod emulated;
pub mod kvm;
