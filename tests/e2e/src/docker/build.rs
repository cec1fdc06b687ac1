//! An image from a Dockerfile, into a registry and back.

use bulkhead_harness::{
    Engine, Outcome, Suite, Test,
    docker::REGISTRY,
    ensure, ensure_eq,
    failure::{read, write},
    runner::ANY,
    test,
};

use super::{BUSYBOX, Made, call, run, text};
use crate::{docker, network::until};

/// The cases of this group.
pub const TESTS: &[Test] = &[
    test!(docker::build::built_pushed_pulled_and_run, BUSYBOX, ANY)
        .docker()
        .fast_host(),
];

const DOCKERFILE: &str = r#"FROM localhost/bulkhead/busybox
ENV GREETING=hello
COPY made.txt /srv/
RUN uname -r >/srv/kernel && echo "$GREETING by $(id -un)" >/srv/said && mkdir /srv/mine && chown user /srv/mine
USER user
RUN echo "$(id -un) after $(cat /srv/said)" >/srv/mine/said
WORKDIR /srv
CMD ["cat", "made.txt", "mine/said", "kernel"]
"#;

fn built_pushed_pulled_and_run(suite: &Suite) -> Outcome {
    let folder = suite.folder("build")?;
    let context = folder.to_string_lossy().into_owned();
    write(folder.join("Dockerfile"), DOCKERFILE)?;
    write(folder.join("made.txt"), "made here\n")?;
    let name = format!("{REGISTRY}/greeter:1");
    let made = Made::by(suite, &["rmi", "-f", &name]);
    let said = text(suite, &["build", "-t", &name, &context])?;
    ensure!(
        said.ends_with(&format!("Successfully tagged {name}")),
        "docker build: {said}"
    );

    write(
        folder.join("Dockerfile.fails"),
        "FROM localhost/bulkhead/busybox\nRUN echo before; exit 3\n",
    )?;
    let file = folder.join("Dockerfile.fails");
    let build = [
        "build",
        "--rm",
        "--force-rm",
        "-f",
        &file.to_string_lossy(),
        &context,
    ];
    let failed = call(suite, &build)?.output()?;
    let failed = failed.refused(&["returned a non-zero code: 3"])?;
    ensure!(
        failed.text().contains("before"),
        "a step's output: {}",
        failed.text()
    );

    let docker = suite.docker()?;
    let registry = docker.registry(suite, &suite.folder("registry")?)?;
    let catalog = || -> Outcome<String> {
        let url = format!("http://{REGISTRY}/v2/_catalog");
        let seen = suite
            .network()?
            .tool(&["curl", "-s", "-m", "5", &url])
            .output()?;
        Ok(seen.text())
    };
    until(suite.scale.seconds(10), "the registry answers", || {
        Ok(catalog()? == "{\"repositories\":[]}")
    })?;
    let pushed = text(suite, &["push", &name])?;
    ensure!(
        pushed.contains("1: digest: sha256:"),
        "docker push: {pushed}"
    );
    ensure_eq!(
        "the registry's list",
        catalog()?,
        "{\"repositories\":[\"greeter\"]}"
    );

    let removed = text(suite, &["rmi", &name])?;
    ensure!(
        removed.contains(&format!("Untagged: {name}")),
        "docker rmi: {removed}"
    );
    ensure_eq!(
        "images after rmi",
        text(suite, &["images", "-q", &name])?,
        ""
    );
    let pulled = text(suite, &["pull", &name])?;
    ensure!(
        pulled.contains("Downloaded newer image"),
        "docker pull: {pulled}"
    );
    let seen = run(suite, &["--rm", &name])?.output()?.ok()?.text();
    let kernel = seen.lines().last().unwrap_or_default();
    ensure_eq!(
        "output",
        seen,
        format!("made here\nuser after hello by root\n{kernel}")
    );
    // The steps ran in a machine of their own as well.
    let host = read("/proc/sys/kernel/osrelease")?;
    ensure_eq!(
        "a step had the host's kernel",
        kernel == host.trim_end(),
        suite.engine == Engine::Runc
    );
    registry.signal(rustix::process::Signal::TERM);
    drop(made);
    Ok(())
}
