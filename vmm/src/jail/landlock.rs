//! No file, no port and nothing outside by name, for whatever comes later (landlock(7)). What is open stays open.

use std::io;

use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, Ruleset, RulesetAttr, RulesetStatus,
    Scope,
};

use super::{Missing, missing};

/// As much as this kernel knows of it; `signals` to processes outside stay allowed.
pub fn deny_all(signals: bool) -> Result<(), Missing> {
    let abi = ABI::V6;
    let scope = match signals {
        true => Scope::AbstractUnixSocket.into(),
        false => Scope::from_all(abi),
    };
    let restricted = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(abi))
        .and_then(|ruleset| ruleset.handle_access(AccessNet::from_all(abi)))
        .and_then(|ruleset| ruleset.scope(scope))
        .and_then(Ruleset::create)
        .and_then(|ruleset| ruleset.restrict_self());
    match restricted {
        Ok(status) if status.ruleset != RulesetStatus::NotEnforced => Ok(()),
        Ok(_) => Err(missing("restrict files and ports by Landlock")(
            io::Error::from(io::ErrorKind::Unsupported),
        )),
        Err(error) => Err(missing("restrict files and ports by Landlock")(
            io::Error::other(error),
        )),
    }
}
