//! Tests of the whole server, driven by raw FUSE messages over its socket ([`messages`], [`layers`], [`control`]) and by a real
//! mount of the host's kernel ([`mount`]). They need root; without it they say so and pass.

mod control;
mod layers;
mod messages;
mod mount;
mod rig;
mod steward;
