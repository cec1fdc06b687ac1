//! The leak check itself: what each kind of thing in containerd looks like when it is left.

use std::{os::unix::net::UnixStream, time::Duration};

use bulkhead_harness::{
    Context, Image, Outcome, Suite, Test, ensure, ensure_eq, leaks::Snapshot, runner::ANY, test,
};

use crate::census;

/// The cases of this group.
pub const TESTS: &[Test] = &[test!(census::what_is_left_is_seen, &[Image::Busybox], ANY)];

fn what_is_left_is_seen(suite: &Suite) -> Outcome {
    let (container, lease) = (suite.name("left"), suite.name("lease"));
    let scope = suite.scope();
    let before = Snapshot::take(&scope);
    let image = Image::Busybox.reference();
    let ctr = |args: &[&str]| suite.ctr(args).output()?.ok();
    ctr(&["container", "create", &image, &container])?;
    ctr(&["leases", "create", "--id", &lease])?;
    let connection = UnixStream::connect(suite.address()).context("connect to containerd")?;
    let wanted = [
        format!("containerd: container {container} "),
        format!("containerd: snapshot {container} "),
        format!("containerd: lease {lease} "),
        "containerd: descriptor socket".into(),
        "containerd: goroutine google.golang.org/grpc".into(),
    ];
    let left = before.leaks(&scope, Duration::ZERO);
    for one in wanted {
        ensure!(
            left.iter().any(|leak| leak.starts_with(&one)),
            "the leak check does not see {one:?}, only {left:#?}"
        );
    }
    drop(connection);
    ctr(&["container", "delete", &container])?;
    ctr(&["leases", "delete", "--sync", &lease])?;
    ensure_eq!("left", before.leaks(&scope, suite.settle()), [""; 0]);
    Ok(())
}
