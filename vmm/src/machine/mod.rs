//! One machine: how it is built, and why it ended.

pub mod end;
