//! Memory balloon (virtio 1.3 section 5.5) with free page reporting (section 5.5.6.7) and nothing else: the guest names
//! memory that it has no use for, and the host has it back until the guest touches it again. The balloon itself stays
//! empty: the host asks for no page.

mod device;

pub use device::Balloon;
