//! What the shim and the agent say to each other. Used by both, uses nothing of ours.

pub mod limits;
