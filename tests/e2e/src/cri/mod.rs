//! Pods as kubelet makes them, by CRI: a file a theme.

mod containers;
mod many;
mod network;
mod rights;
mod streams;
mod volumes;

use bulkhead_harness::{Image, Test};

/// The least that a pod needs.
const IMAGES: &[Image] = &[Image::Pause, Image::Busybox];

/// The cases of this group.
pub fn tests() -> Vec<Test> {
    [
        network::TESTS,
        containers::TESTS,
        rights::TESTS,
        volumes::TESTS,
        streams::TESTS,
        many::TESTS,
    ]
    .concat()
}
