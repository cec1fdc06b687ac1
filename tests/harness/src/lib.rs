//! What the end-to-end tests stand on. It drives binaries (`containerd`, `ctr`, the dist folder) and uses no module of
//! the product. A test case gets a [`Suite`]: a containerd of its own, images, and builders that keep the case
//! on one screen; [`runner`] wraps each case in a [`leaks`] check.

pub mod choice;
pub mod command;
pub mod containerd;
pub mod docker;
pub mod events;
pub mod failure;
pub mod leaks;
pub mod network;
pub mod pod;
pub mod process;
pub mod profile;
pub mod records;
pub mod runner;
pub mod scale;
pub mod smaps;
pub mod spec;
pub mod suite;
pub mod tree;

pub use choice::{Choice, MachineEngine};
pub use command::{Invocation, Keep, Output, Running};
pub use failure::{Context, Failure, Outcome, skip};
pub use pod::{Exec, Pod, Run};
pub use runner::Test;
pub use scale::Scale;
pub use suite::{Engine, Image, Suite};
