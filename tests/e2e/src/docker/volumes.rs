//! Volumes that outlive their container, and folders and files of the host.

use bulkhead_harness::{
    Outcome, Suite, Test, ensure_eq,
    failure::{read, write},
    runner::ANY,
    test,
};

use super::{Made, NET, TOOLS, inside, run, start, text};
use crate::docker;

/// The cases of this group.
pub const TESTS: &[Test] = &[test!(docker::volumes::outlive_the_container, NET, ANY)
    .docker()
    .fast_host()];

fn outlive_the_container(suite: &Suite) -> Outcome {
    let folder = suite.folder("bound")?;
    write(folder.join("in"), "of the host\n")?;
    write(folder.join("one"), "read only\n")?;
    let bound = format!("{}:/host", folder.display());
    let one = format!("{}:/one:ro", folder.join("one").display());
    let kept = Made::by(suite, &["volume", "rm", "kept"]);
    let filled = Made::by(suite, &["volume", "rm", "filled"]);
    ensure_eq!(
        "docker volume create",
        text(suite, &["volume", "create", "kept"])?,
        "kept"
    );
    let first = start(
        suite,
        "first",
        &[
            "-v",
            "kept:/data",
            "-v",
            "filled:/srv",
            "-v",
            &bound,
            "-v",
            &one,
            TOOLS,
            "sleep",
            "1000000",
        ],
    )?;
    let script = "echo kept >/data/file; cat /host/in; echo of the guest >/host/out; \
                  echo x >/one; cat /srv/index.html; echo more >>/srv/index.html";
    let output = super::call(suite, &["exec", "first", "sh", "-c", script])?.output()?;
    ensure_eq!(
        "what it reads",
        output.text(),
        "of the host\nhello from nginx"
    );
    output.ok()?;
    ensure_eq!("file of the host", read(folder.join("one"))?, "read only\n");
    ensure_eq!(
        "file of the guest",
        read(folder.join("out"))?,
        "of the guest\n"
    );
    // A file that the host changes while the container runs.
    write(folder.join("in"), "of the host, later and longer\n")?;
    let seen = inside(suite, "first", "cat /host/in")?;
    ensure_eq!("changed on the host", seen, "of the host, later and longer");
    drop(first);

    let second = ["--rm", "-v", "kept:/data:ro", "-v", "filled:/srv", TOOLS];
    let script = "cat /data/file /srv/index.html; echo x >/data/file";
    let output = run(suite, &[&second[..], &["sh", "-c", script]].concat())?.output()?;
    let output = output.refused(&["/data/file: Read-only file system"])?;
    ensure_eq!(
        "in another container",
        output.text(),
        "kept\nhello from nginx\nmore"
    );
    drop(kept);
    drop(filled);
    ensure_eq!("volumes left", text(suite, &["volume", "ls", "-q"])?, "");
    Ok(())
}
