//! The cases, by what they are about. A name is `group::claim`.

use crate::case::Case;

mod bites;
mod cgroups;
mod devices;
mod disks;
mod hooks;
mod hostile;
mod mounts;
mod namespaces;
mod paths;
mod process;
mod refused;
mod seccomp;
mod unruly;

/// Every case, in the order in which they run.
pub fn all() -> Vec<Case> {
    [
        process::all(),
        namespaces::all(),
        mounts::all(),
        paths::all(),
        devices::all(),
        cgroups::all(),
        seccomp::all(),
        hooks::all(),
        refused::all(),
        bites::all(),
        disks::all(),
        unruly::all(),
        hostile::all(),
    ]
    .concat()
}

/// Every section of the probe.
const EVERYTHING: &str = "identity,capabilities,rlimits,oom,scheduling,mounts,namespaces,devices,access,syscalls,\
process,environment,descriptors,signals,personality,terminal,names,network";

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    #[test]
    fn names_are_unique_and_there_are_enough() {
        let all = super::all();
        let names: BTreeSet<&str> = all.iter().map(|c| c.name.as_str()).collect();
        assert_eq!(names.len(), all.len());
        assert!(all.len() >= 150, "{}", all.len());
    }
}
