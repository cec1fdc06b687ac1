//! Opens `/dev/kvm` and checks what it can do before anything is built on it.

use std::io;
use std::path::Path;

use kvm_ioctls::{Cap, Kvm};

/// Where KVM is.
pub const DEVICE: &str = "/dev/kvm";

const API_VERSION: i32 = 12;

/// What a machine needs, by the names of the KVM API.
const NEEDED: [(Cap, &str); 11] = [
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::SetIdentityMapAddr, "KVM_CAP_SET_IDENTITY_MAP_ADDR"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::Pit2, "KVM_CAP_PIT2"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::Clocksource, "KVM_CAP_CLOCKSOURCE"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
];

/// Why KVM cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// No such device.
    #[error(
        "{DEVICE} is missing: load kvm_intel or kvm_amd and enable virtualization in the firmware, \
         or configure engine \"emulated\""
    )]
    Missing,
    /// Not allowed to open it.
    #[error("{DEVICE} may not be opened: run as root or join the group that owns it")]
    Denied,
    /// Any other failure to open it.
    #[error("cannot open {DEVICE}")]
    Open(#[source] io::Error),
    /// Another API than the stable one.
    #[error("{DEVICE} speaks API version {0}, not {API_VERSION}")]
    Version(i32),
    /// A capability that a machine needs is not there.
    #[error("{DEVICE} lacks {0}: a newer host kernel is needed")]
    Capability(&'static str),
}

/// Opens KVM and checks its version and capabilities.
pub fn open() -> Result<Kvm, HostError> {
    open_at(Path::new(DEVICE))
}

fn open_at(path: &Path) -> Result<Kvm, HostError> {
    // Asked first, for `open(2)`'s own words.
    if let Err(error) = std::fs::File::options().read(true).write(true).open(path) {
        return Err(match error.kind() {
            io::ErrorKind::NotFound => HostError::Missing,
            io::ErrorKind::PermissionDenied => HostError::Denied,
            _ if error.raw_os_error() == Some(libc::ENODEV) => HostError::Missing,
            _ => HostError::Open(error),
        });
    }
    let kvm = Kvm::new().map_err(|error| HostError::Open(error.into()))?;
    match kvm.get_api_version() {
        API_VERSION => {}
        other => return Err(HostError::Version(other)),
    }
    for (cap, name) in NEEDED {
        if !kvm.check_extension(cap) {
            return Err(HostError::Capability(name));
        }
    }
    Ok(kvm)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_device_says_what_to_do() {
        let error = open_at(Path::new("/nonexistent/kvm")).unwrap_err();
        assert!(matches!(error, HostError::Missing));
        assert!(error.to_string().contains("emulated"));
    }
}
