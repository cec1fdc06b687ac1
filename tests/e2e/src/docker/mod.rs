//! What a person does with Docker and `--runtime io.containerd.bulkhead.v1`: the commands that they type, and what they
//! read. A file a theme.

mod build;
mod life;
mod limits;
mod logs;
mod names;
mod networks;
mod security;
mod volumes;
mod walk;

use bulkhead_harness::{Image, Invocation, Outcome, Suite, Test};

const NET: &[Image] = &[Image::Net];
const BUSYBOX: &[Image] = &[Image::Busybox];
/// The image with the network's tools, as one names it in `docker run`.
const TOOLS: &str = "localhost/bulkhead/net";
/// The one with nothing but busybox.
const SMALL: &str = "localhost/bulkhead/busybox";

/// The cases of this group.
pub fn tests() -> Vec<Test> {
    [
        walk::TESTS,
        build::TESTS,
        life::TESTS,
        limits::TESTS,
        security::TESTS,
        volumes::TESTS,
        logs::TESTS,
        networks::TESTS,
    ]
    .concat()
}

/// A container, a network or a volume that is removed at the case's end, however it ends.
struct Made<'a>(&'a Suite, Vec<String>);

impl Drop for Made<'_> {
    fn drop(&mut self) {
        let words: Vec<&str> = self.1.iter().map(String::as_str).collect();
        if let Ok(command) = call(self.0, &words) {
            let _ = command.output();
        }
    }
}

impl<'a> Made<'a> {
    /// Removed by `docker ARGS…`.
    fn by(suite: &'a Suite, args: &[&str]) -> Self {
        Self(suite, args.iter().map(|&word| word.to_owned()).collect())
    }
}

/// `docker ARGS…`, yet to be run.
fn call(suite: &Suite, args: &[&str]) -> Outcome<Invocation> {
    Ok(suite.docker()?.call(suite, args))
}

/// What `docker ARGS…` prints; it must succeed.
fn text(suite: &Suite, args: &[&str]) -> Outcome<String> {
    Ok(call(suite, args)?.output()?.ok()?.text())
}

/// What `docker exec NAME sh -c SCRIPT` prints; it must succeed.
fn inside(suite: &Suite, name: &str, script: &str) -> Outcome<String> {
    text(suite, &["exec", name, "sh", "-c", script])
}

/// `docker inspect -f FORMAT NAME`.
fn inspect(suite: &Suite, name: &str, format: &str) -> Outcome<String> {
    text(suite, &["inspect", "-f", format, name])
}

/// `docker run ARGS…` with the runtime under test, yet to be run.
fn run(suite: &Suite, args: &[&str]) -> Outcome<Invocation> {
    Ok(suite.docker()?.run(suite, args))
}

/// `docker run -d --name NAME ARGS…`; removed with the value.
fn start<'a>(suite: &'a Suite, name: &str, args: &[&str]) -> Outcome<Made<'a>> {
    let made = Made::by(suite, &["rm", "-f", "-v", name]);
    let detached = [&["-d", "--name", name], args].concat();
    run(suite, &detached)?.output()?.ok()?;
    Ok(made)
}
