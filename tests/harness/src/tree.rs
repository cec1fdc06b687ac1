//! The same listing of a file tree in a container and on the host.

use std::path::Path;

use crate::{
    command::Invocation,
    failure::{Failure, Outcome},
};

/// Shell text that lists the folders named by its arguments: kind, mode, owner, size, links, time, link target and
/// content of every entry, sorted. Sizes and link counts of folders are the file system's own affair.
pub const LIST: &str = r#"
list() {
  find "$@" -xdev -print0 | sort -z | xargs -0 stat -c '%N|%F|%a|%u:%g|%s|%h|%Y' |
    sed -E 's/(\|directory\|[^|]*\|[^|]*)\|[^|]*\|[^|]*/\1/; s/regular empty file/regular file/'
  find "$@" -xdev -type f -size -20000k -print0 | sort -z | xargs -0 sha256sum
}
"#;

/// Lists folders of the tree at `root` with its own shell, on the host.
pub fn list_on_host(root: &Path, folders: &[&str]) -> Outcome<String> {
    let script = format!("{LIST}\nlist {}", folders.join(" "));
    let command = Invocation::new("chroot")
        .arg(root)
        .args(["/bin/sh", "-c", &script]);
    Ok(command
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .output()?
        .ok()?
        .text())
}

/// Fails with the first lines that differ.
pub fn same(what: &str, got: &str, expected: &str) -> Outcome {
    if got == expected {
        return Ok(());
    }
    let only = |a: &str, b: &str| -> Vec<String> {
        let b: std::collections::HashSet<&str> = b.lines().collect();
        a.lines()
            .filter(|line| !b.contains(line))
            .take(8)
            .map(str::to_owned)
            .collect()
    };
    Err(Failure::Failed(format!(
        "{what} differs ({} and {} lines)\n  only in the container: {:#?}\n  only on the host: {:#?}",
        got.lines().count(),
        expected.lines().count(),
        only(got, expected),
        only(expected, got)
    )))
}
