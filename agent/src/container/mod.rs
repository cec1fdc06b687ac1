//! Making a container, a file a step.
//!
//! `launch` runs in the agent; it starts the single-threaded copy whose entry is `enter`, which does the other steps in the
//! order that `enter::create` reads. `check` refuses what no step enforces. `cgroup` is the agent's.

pub mod attributes;
pub mod bpf;
pub mod capabilities;
pub mod cgroup;
pub mod check;
pub mod control;
pub mod copyup;
pub mod devices;
pub mod enosys;
pub mod enter;
pub mod hooks;
pub mod ids;
pub mod launch;
pub mod limits;
pub mod masks;
pub mod mounts;
pub mod namespaces;
pub mod options;
pub mod parse;
pub mod path;
pub mod pause;
pub mod process;
pub mod rootfs;
pub mod seccomp;
pub mod sources;
pub mod tty;
