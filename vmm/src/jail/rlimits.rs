//! Limits of resources (getrlimit(2)).

use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::limits;

/// Those of the processes that run a guest.
pub const OF_MACHINE: [(Resource, u64); 4] = [
    (Resource::Core, 0),
    (Resource::Msgqueue, 0),
    (Resource::Nofile, limits::VMM_DESCRIPTORS),
    (Resource::Nproc, limits::VMM_THREADS),
];

/// Where no file without a limit is written.
pub const OF_FILES: [(Resource, u64); 1] = [(Resource::Fsize, limits::VMM_FILE_BYTES)];

/// Sets them for good; where the host gives less already, that stays. It allocates nothing, so a child may call it before its program.
pub fn set(limits: &[(Resource, u64)]) -> Result<(), Errno> {
    limits.iter().try_for_each(|&(resource, value)| {
        // Beyond it only with CAP_SYS_RESOURCE, which the emulator's child has no more.
        let most = getrlimit(resource).maximum.unwrap_or(value);
        let value = Some(value.min(most));
        let limit = Rlimit {
            current: value,
            maximum: value,
        };
        setrlimit(resource, limit)
    })
}
