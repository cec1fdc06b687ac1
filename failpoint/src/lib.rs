//! Named points at which tests make a process of ours fail, `tests/fault/`.
//!
//! The product is built without the feature `armed`: then a point is nothing, and no name of one is in the programs. With it, a process
//! reads once which point is set, and how: on the host from the file that [`FILE`] names, in the guest from the kernel's command line.

#[cfg(feature = "armed")]
mod armed;
#[cfg(feature = "armed")]
pub use armed::*;

/// Passes the point `name`: fails if it is set to `error`, and does not come back if it is set to `kill`.
#[cfg(not(feature = "armed"))]
#[inline(always)]
pub fn reach(_name: &'static str) -> std::io::Result<()> {
    Ok(())
}

/// How long is waited for somebody who may be stuck; tests that show the end of such waits have them at a tenth.
#[cfg(not(feature = "armed"))]
#[inline(always)]
pub fn patience(limit: std::time::Duration) -> std::time::Duration {
    limit
}

/// What the guest's kernel is told so that its agent knows.
#[cfg(not(feature = "armed"))]
#[inline(always)]
pub fn kernel_parameter() -> &'static str {
    ""
}
