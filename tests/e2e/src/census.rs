//! The leak check itself: what each kind of thing in containerd looks like when it is left.

use std::{os::unix::net::UnixStream, time::Duration};

use bulkhead_harness::{
    Context, Image, Outcome, Suite, Test, ensure_eq, leaks::Snapshot, runner::ANY, test,
};

use crate::{census, network::until};

/// The cases of this group.
pub const TESTS: &[Test] = &[test!(census::what_is_left_is_seen, &[Image::Busybox], ANY)];

/// Idle ones to containerd.
const CONNECTIONS: usize = 8;

fn what_is_left_is_seen(suite: &Suite) -> Outcome {
    let (container, lease) = (suite.name("left"), suite.name("lease"));
    let scope = suite.scope();
    let before = Snapshot::take(&scope);
    let image = Image::Busybox.reference();
    let ctr = |args: &[&str]| suite.ctr(args).output()?.ok();
    ctr(&["container", "create", &image, &container])?;
    ctr(&["leases", "create", "--id", &lease])?;
    // Some of an earlier client may go meanwhile, which would hide as many.
    let connections = (0..CONNECTIONS)
        .map(|_| UnixStream::connect(suite.address()).context("connect to containerd"))
        .collect::<Outcome<Vec<_>>>()?;
    let wanted = [
        format!("containerd: container {container} "),
        format!("containerd: snapshot {container} "),
        format!("containerd: lease {lease} "),
        "containerd: descriptor socket".into(),
        "containerd: goroutine google.golang.org/grpc".into(),
    ];
    // containerd accepts a connection in its own time.
    let mut left = Vec::new();
    let seen = until(suite.settle(), "the leak check sees all of it", || {
        left = before.leaks(&scope, Duration::ZERO);
        let is_seen = |one: &String| left.iter().any(|leak| leak.starts_with(one));
        Ok(wanted.iter().all(is_seen))
    });
    seen.map_err(|_| format!("the leak check does not see all of {wanted:#?}, only {left:#?}"))?;
    drop(connections);
    ctr(&["container", "delete", &container])?;
    ctr(&["leases", "delete", "--sync", &lease])?;
    ensure_eq!("left", before.leaks(&scope, suite.settle()), [""; 0]);
    Ok(())
}
