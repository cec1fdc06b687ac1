//! FUSE messages to a whole file server with a read-only and a writable tree. What is outside of the trees, and the
//! read-only one, never change.
#![no_main]

libfuzzer_sys::fuzz_target!(|messages: Vec<bulkhead_fuzz::files::Message>| {
    bulkhead_fuzz::files::send_all(&messages)
});
