//! Tests of the whole server, driven by raw FUSE messages over its socket ([`messages`], [`control`]) and by a real
//! mount of the host's kernel ([`mount`]). They need root; without it they say so and pass.

mod control;
mod messages;
mod mount;
mod rig;
mod steward;
