//! Limits of resources (getrlimit(2)).

use rustix::process::{Resource, Rlimit, setrlimit};

use super::{Missing, missing};
use crate::limits;

/// Sets them for good. `has_disks`: files without a limit are written.
pub fn set(has_disks: bool) -> Result<(), Missing> {
    let mut wanted = vec![
        (Resource::Core, 0),
        (Resource::Msgqueue, 0),
        (Resource::Nofile, limits::VMM_DESCRIPTORS),
        (Resource::Nproc, limits::VMM_THREADS),
    ];
    if !has_disks {
        wanted.push((Resource::Fsize, limits::VMM_FILE_BYTES));
    }
    for (resource, value) in wanted {
        let limit = Rlimit {
            current: Some(value),
            maximum: Some(value),
        };
        setrlimit(resource, limit).map_err(missing("set a limit of resources"))?;
    }
    Ok(())
}
