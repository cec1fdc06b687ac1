//! How a guest reaches a device.

pub mod mmio;
pub mod vhost_user;
