//! A queue of a tap, as the device reads and writes frames. Made by who starts us: we get a descriptor, never a name.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use super::{HEADER, feature};

/// Why a descriptor is no tap for us.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// Not a queue of a tap.
    #[error("descriptor {0} is not a tap")]
    NoTap(RawFd, #[source] io::Error),
    /// A tap that was made with other flags.
    #[error("descriptor {0} must be a tap made with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR")]
    Flags(RawFd),
    /// It refused a setting.
    #[error("cannot set {what} of the tap")]
    Set {
        /// Which.
        what: &'static str,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
}

/// One queue of a tap, not blocking.
#[derive(Debug)]
pub struct Tap(OwnedFd);

impl Tap {
    /// Checks and sets the descriptor up.
    pub fn new(fd: OwnedFd) -> Result<Self, TapError> {
        let number = fd.as_raw_fd();
        let mut request = empty_request();
        // SAFETY: TUNGETIFF fills one `ifreq`, which is ours.
        let got = unsafe { libc::ioctl(number, libc::TUNGETIFF, &raw mut request) };
        if got < 0 {
            return Err(TapError::NoTap(number, io::Error::last_os_error()));
        }
        // SAFETY: the kernel filled this member.
        let flags = libc::c_int::from(unsafe { request.ifr_ifru.ifru_flags });
        let wanted = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        if flags & (wanted | libc::IFF_TUN) != wanted {
            return Err(TapError::Flags(number));
        }
        let header = HEADER as libc::c_int;
        // SAFETY: TUNSETVNETHDRSZ reads one int, which is ours.
        let set = unsafe { libc::ioctl(number, libc::TUNSETVNETHDRSZ, &raw const header) };
        checked(set, "the header's size")?;
        rustix::io::ioctl_fionbio(&fd, true).map_err(|error| TapError::Set {
            what: "non-blocking",
            source: error.into(),
        })?;
        Ok(Self(fd))
    }

    /// What the guest takes in received frames, by the features it accepted.
    pub fn set_offload(&self, features: u64) -> Result<(), TapError> {
        let pairs = [
            (feature::GUEST_CSUM, libc::TUN_F_CSUM),
            (feature::GUEST_TSO4, libc::TUN_F_TSO4),
            (feature::GUEST_TSO6, libc::TUN_F_TSO6),
        ];
        let accepted = pairs.iter().filter(|(ours, _)| features & ours != 0);
        let mut offload = accepted.fold(0, |all, (_, theirs)| all | theirs);
        // The kernel refuses segments without checksums; a driver that asks for that gets neither.
        if offload & libc::TUN_F_CSUM == 0 {
            offload = 0;
        }
        // SAFETY: TUNSETOFFLOAD takes its argument by value.
        let set = unsafe {
            libc::ioctl(
                self.0.as_raw_fd(),
                libc::TUNSETOFFLOAD,
                libc::c_ulong::from(offload),
            )
        };
        checked(set, "the offloads")
    }

    /// Whether frames may come to this queue.
    pub fn enable(&self, on: bool) -> Result<(), TapError> {
        let mut request = empty_request();
        let flag = if on {
            libc::IFF_ATTACH_QUEUE
        } else {
            libc::IFF_DETACH_QUEUE
        };
        request.ifr_ifru.ifru_flags = flag as libc::c_short;
        // SAFETY: TUNSETQUEUE reads one `ifreq`, which is ours.
        let set = unsafe { libc::ioctl(self.0.as_raw_fd(), libc::TUNSETQUEUE, &raw const request) };
        match checked(set, "a queue") {
            // It is as asked already, or the tap has one queue only.
            Err(TapError::Set { source, .. }) if source.raw_os_error() == Some(libc::EINVAL) => {
                Ok(())
            }
            result => result,
        }
    }

    /// The next frame with its header; `None` when there is none.
    pub fn receive(&self, frame: &mut [u8]) -> io::Result<Option<usize>> {
        match rustix::io::read(&self.0, frame) {
            Ok(len) => Ok(Some(len)),
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Sends a frame with its header.
    pub fn send(&self, frame: &[u8]) -> io::Result<()> {
        rustix::io::write(&self.0, frame)?;
        Ok(())
    }

    /// The descriptor's number, for the kernel's data path.
    pub fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }

    /// A second descriptor of the same queue.
    pub fn try_clone(&self) -> io::Result<OwnedFd> {
        self.0.try_clone()
    }
}

fn empty_request() -> libc::ifreq {
    // SAFETY: an `ifreq` is plain bytes, for which zero is a value.
    unsafe { std::mem::zeroed() }
}

fn checked(result: libc::c_int, what: &'static str) -> Result<(), TapError> {
    if result < 0 {
        return Err(TapError::Set {
            what,
            source: io::Error::last_os_error(),
        });
    }
    Ok(())
}
