//! The probe: the program of every conformance case's container. It prints as JSON what a process of the container sees
//! (`see`), or does one thing and prints how it ended (`act`). The suite runs it under both runtimes and compares.
//!
//! It has no Rust runtime around `main`: that would change the signals and descriptors it is asked about.
#![no_main]

use std::ffi::{c_char, c_int};

mod act;
mod devices;
mod disk;
mod see;
mod sys;
mod syscalls;

/// Called by the C library.
// SAFETY: no other symbol of this program is called main.
#[unsafe(no_mangle)]
pub extern "C" fn main(_count: c_int, _arguments: *const *const c_char) -> c_int {
    let args: Vec<String> = std::env::args_os()
        .map(|arg| arg.to_string_lossy().into_owned())
        .collect();
    let words: Vec<&str> = args.iter().skip(1).map(String::as_str).collect();
    match words.split_first() {
        Some((&"see", rest)) => {
            let (sections, paths) = rest.split_first().map_or(("", rest), |(s, p)| (*s, p));
            sys::say(&see::see(sections, paths));
            0
        }
        Some((&"hold", rest)) => act::hold(rest.first().copied().unwrap_or("")),
        Some((&"loop", rest)) => disk::hold(rest.first().and_then(|w| w.parse().ok()).unwrap_or(1)),
        Some((&action, rest)) => act::act(action, rest),
        None => 2,
    }
}
