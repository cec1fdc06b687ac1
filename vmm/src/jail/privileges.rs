//! A user of the pod's own, and no capability.

use rustix::io::Errno;
use rustix::process::{DumpableBehavior, Gid, Uid, set_dumpable_behavior};
use rustix::thread::{
    CapabilitySet, CapabilitySets, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities, set_no_new_privs, set_thread_groups,
    set_thread_res_gid, set_thread_res_uid,
};

use super::{Missing, missing};

/// Becomes `uid` and `gid`, without groups and without capabilities in any set (capabilities(7)). For the calling thread and those it starts.
pub(super) fn drop(uid: u32, gid: u32) -> Result<(), Missing> {
    clear_ambient_capability_set().map_err(missing("clear ambient capabilities"))?;
    bound(CapabilitySet::empty()).map_err(missing("empty the capability bounding set"))?;
    let (user, group) = (Uid::from_raw(uid), Gid::from_raw(gid));
    set_thread_groups(&[]).map_err(missing("leave all groups"))?;
    set_thread_res_gid(group, group, group).map_err(missing("take on the pod's group"))?;
    set_thread_res_uid(user, user, user).map_err(missing("take on the pod's user"))?;
    let none = CapabilitySets {
        effective: CapabilitySet::empty(),
        permitted: CapabilitySet::empty(),
        inheritable: CapabilitySet::empty(),
    };
    set_capabilities(None, none).map_err(missing("drop capabilities"))
}

/// Leaves `kept` in the bounding set. It allocates nothing, so a child may call it before its program.
pub fn bound(kept: CapabilitySet) -> Result<(), Errno> {
    for one in (CapabilitySet::all() - kept).iter() {
        match remove_capability_from_bounding_set(one) {
            // One that this kernel does not know is in no set.
            Ok(()) | Err(Errno::INVAL) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// No program gives rights back, and no other process of this user looks in.
pub fn seal() -> Result<(), Errno> {
    set_no_new_privs(true)?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable)
}
