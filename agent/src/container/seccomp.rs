//! Step: the seccomp filter. Not there yet: a profile is refused.

use oci_spec::runtime::LinuxSeccomp;

use crate::error::{Error, Result};

/// Checks the profile.
pub fn check(_profile: &LinuxSeccomp) -> Result<()> {
    Err(Error::refused("linux.seccomp"))
}

/// Loads the filter for the calling process.
pub fn load(_profile: &LinuxSeccomp) -> Result<()> {
    Err(Error::refused("linux.seccomp"))
}
