//! The credentials a worker takes on for one operation: a new node belongs to the guest's caller.
//!
//! Workers run as root. Permissions were checked by the guest's kernel (`default_permissions`), so a worker keeps
//! CAP_DAC_OVERRIDE when it takes on another user; without it an overlay's work folder could not be written for
//! that user. CAP_FSETID goes with the user, so the host drops the set-id bits a caller may not have (CVE-2022-0358).

use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::process::umask;
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, clear_ambient_capability_set, set_capabilities,
    set_no_new_privs, set_thread_groups,
};

use super::request::Caller;
use super::sys;
use crate::jail::privileges::bound;

/// All that serving takes: the file-system capabilities and the change of file-system ids. In a user namespace of the server's own they
/// count for the files of its trees and for nothing else of the host.
pub const SERVER: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::DAC_READ_SEARCH)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::SETGID);

/// What the steward needs in the host's user namespace: `trusted.*` and `security.*` attributes (SYS_ADMIN, and SETFCAP for file
/// capabilities as images have them), mounts' attributes (SYS_ADMIN), files by their handles (DAC_READ_SEARCH).
pub const STEWARD: CapabilitySet = CapabilitySet::SYS_ADMIN
    .union(CapabilitySet::SETFCAP)
    .union(CapabilitySet::DAC_READ_SEARCH);

/// Gives up every capability but `kept` and all supplementary groups, for this thread and those it starts later. With root's
/// groups a caller would be a member of theirs: set-group-id bits would stay that must go (CVE-2022-0358).
pub fn drop_all_but(kept: CapabilitySet) -> Result<(), Errno> {
    set_no_new_privs(true)?;
    set_thread_groups(&[])?;
    clear_ambient_capability_set()?;
    bound(CapabilitySet::empty())?;
    let mut sets = capabilities(None)?;
    sets.effective &= kept;
    sets.permitted &= kept;
    sets.inheritable = CapabilitySet::empty();
    set_capabilities(None, sets)
}

/// A worker thread's own capabilities. Not shared: capabilities, umask and file-system ids belong to the thread.
pub struct Identity {
    full: CapabilitySets,
}

impl Identity {
    /// Notes what the calling thread has. The thread must have its own umask (`unshare(CLONE_FS)`).
    pub fn of_this_thread() -> Result<Self, Errno> {
        Ok(Self {
            full: capabilities(None)?,
        })
    }

    /// Runs `make` as `caller` with the caller's umask.
    pub fn create<T>(
        &self,
        caller: Caller,
        mask: u32,
        make: impl FnOnce() -> Result<T, Errno>,
    ) -> Result<T, Errno> {
        // No id is called -1; for the kernel it would mean "leave as it is", which is root.
        if caller.uid == u32::MAX || caller.gid == u32::MAX {
            return Err(Errno::INVAL);
        }
        umask(Mode::from_raw_mode(mask & 0o777));
        if caller.uid == 0 && caller.gid == 0 {
            return make();
        }
        let restore = Restore;
        if !sys::set_fsgid(caller.gid) || !sys::set_fsuid(caller.uid) {
            return Err(Errno::OVERFLOW);
        }
        if caller.uid != 0 {
            // Leaving root took the file-system capabilities out of the effective set; return to it brings them back.
            let mut sets = capabilities(None)?;
            sets.effective |= self.full.effective & CapabilitySet::DAC_OVERRIDE;
            set_capabilities(None, sets)?;
        }
        let result = make();
        drop(restore);
        result
    }

    /// Runs `change` so that the host removes set-id bits as it does for an ordinary user, if `kill` says so.
    pub fn without_fsetid<T>(
        &self,
        kill: bool,
        change: impl FnOnce() -> Result<T, Errno>,
    ) -> Result<T, Errno> {
        if !kill {
            return change();
        }
        let mut sets = self.full;
        sets.effective -= CapabilitySet::FSETID;
        set_capabilities(None, sets)?;
        let result = change();
        if set_capabilities(None, self.full).is_err() {
            std::process::abort();
        }
        result
    }
}

/// Makes the thread root again; a worker that cannot must not serve on.
struct Restore;

impl Drop for Restore {
    fn drop(&mut self) {
        if !sys::set_fsuid(0) || !sys::set_fsgid(0) {
            std::process::abort();
        }
    }
}

#[cfg(test)]
mod tests {
    use rustix::process::{Gid, geteuid, getgroups};
    use rustix::thread::set_thread_groups;

    use super::*;

    #[test]
    fn a_worker_is_in_no_group_but_its_callers() {
        if !geteuid().is_root() {
            return eprintln!("skipped: needs root");
        }
        // Credentials belong to the thread.
        let groups = std::thread::spawn(|| {
            set_thread_groups(&[Gid::ROOT, Gid::from_raw(4242)]).unwrap();
            drop_all_but(SERVER).unwrap();
            getgroups().unwrap()
        });
        assert_eq!(groups.join().unwrap(), []);
    }
}
