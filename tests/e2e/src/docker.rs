//! Docker's networks, and the walk that everybody knows.

use bulkhead_harness::{
    Image, Invocation, Outcome, Suite, Test,
    docker::IMAGE,
    ensure, ensure_eq,
    network::{HOST, OUTSIDE, OUTSIDE_ADDRESS},
    runner::ANY,
    test,
};

use crate::{docker, network::until};

const IMAGES: &[Image] = &[];

/// The cases of this group.
pub const TESTS: &[Test] = &[
    test!(docker::the_common_walk, IMAGES, ANY)
        .docker()
        .fast_host(),
    test!(docker::bridge_network_and_published_port, IMAGES, ANY)
        .docker()
        .fast_host(),
    test!(docker::user_defined_network_resolves_names, IMAGES, ANY)
        .docker()
        .fast_host(),
    test!(
        docker::networks_are_connected_while_the_container_runs,
        IMAGES,
        ANY
    )
    .docker()
    .fast_host(),
];

/// A container or a network that is removed at the case's end, however it ends.
struct Made<'a>(&'a Suite, Vec<String>);

impl Drop for Made<'_> {
    fn drop(&mut self) {
        let words: Vec<&str> = self.1.iter().map(String::as_str).collect();
        if let Ok(command) = call(self.0, &words) {
            let _ = command.output();
        }
    }
}

fn call(suite: &Suite, args: &[&str]) -> Outcome<Invocation> {
    Ok(suite.docker()?.call(suite, args))
}

fn text(suite: &Suite, args: &[&str]) -> Outcome<String> {
    Ok(call(suite, args)?.output()?.ok()?.text())
}

/// `docker run -d --name NAME ARGS…`; removed with the value.
fn start<'a>(suite: &'a Suite, name: &str, args: &[&str]) -> Outcome<Made<'a>> {
    let made = Made(suite, ["rm", "-f", name].map(str::to_owned).to_vec());
    let run = [&["-d", "--name", name], args].concat();
    suite.docker()?.run(suite, &run).output()?.ok()?;
    Ok(made)
}

fn network<'a>(suite: &'a Suite, name: &str) -> Outcome<Made<'a>> {
    let words = ["network", "rm", name].map(str::to_owned);
    let made = Made(suite, words.to_vec());
    text(suite, &["network", "create", name])?;
    Ok(made)
}

fn the_common_walk(suite: &Suite) -> Outcome {
    let docker = suite.docker()?;
    let run = docker.run(
        suite,
        &["--rm", IMAGE, "sh", "-c", "echo out; echo err >&2; exit 7"],
    );
    let output = run.output()?.expect(7)?;
    ensure_eq!(
        "output",
        (output.text(), output.errors()),
        ("out".into(), "err".into())
    );
    let made = start(
        suite,
        "walk",
        &[IMAGE, "sh", "-c", "echo began; exec sleep 1000000"],
    )?;
    let ps = text(suite, &["ps", "--format", "{{.Names}} {{.State}}"])?;
    ensure_eq!("docker ps", ps, "walk running");
    until(suite.scale.seconds(10), "the log", || {
        Ok(text(suite, &["logs", "walk"])? == "began")
    })?;
    let hostname = text(suite, &["exec", "walk", "hostname"])?;
    let id = text(suite, &["inspect", "-f", "{{.Id}}", "walk"])?;
    ensure!(id.starts_with(&hostname), "host name {hostname} of {id}");
    let exec = call(suite, &["exec", "walk", "sh", "-c", "exit 5"])?;
    exec.output()?.expect(5)?;
    text(suite, &["stop", "-t", "1", "walk"])?;
    let state = text(
        suite,
        &[
            "inspect",
            "-f",
            "{{.State.Status}} {{.State.ExitCode}}",
            "walk",
        ],
    )?;
    ensure_eq!("after stop", state, "exited 137");
    text(suite, &["start", "walk"])?;
    let seen = text(suite, &["exec", "walk", "echo", "again"])?;
    ensure_eq!("after a second start", seen, "again");
    drop(made);
    ensure_eq!("after rm", text(suite, &["ps", "-aq"])?, "");
    Ok(())
}

fn bridge_network_and_published_port(suite: &Suite) -> Outcome {
    let network = suite.network()?;
    let made = start(suite, "web", &["-p", "8082:80", IMAGE, "nginx"])?;
    let url = format!("http://{}:8082/who", HOST.0);
    let mut seen = String::new();
    until(suite.scale.seconds(10), "the port answers", || {
        let curl = network.tool_at(OUTSIDE, &["curl", "-s", "-m", "5", &url]);
        seen = curl.output()?.text();
        Ok(!seen.is_empty())
    })?;
    ensure_eq!("the client from outside", seen, OUTSIDE_ADDRESS.0);
    let local = ["curl", "-s", "-m", "5", "http://127.0.0.1:8082/"];
    let seen = network.tool(&local).output()?.ok()?.text();
    ensure_eq!("by the host's loopback", seen, "hello from nginx");
    let script = format!(
        "ping -c 2 -i 0.2 -W 5 {} >/dev/null && echo reached",
        OUTSIDE_ADDRESS.0
    );
    let seen = text(suite, &["exec", "web", "sh", "-c", &script])?;
    ensure_eq!("the outside by NAT", seen, "reached");
    drop(made);
    Ok(())
}

fn user_defined_network_resolves_names(suite: &Suite) -> Outcome {
    let net = network(suite, "names")?;
    let web = start(
        suite,
        "web",
        &[
            "--network",
            "names",
            "--network-alias",
            "www",
            IMAGE,
            "nginx",
        ],
    )?;
    let script = "for n in web www; do \
                  until curl -s -m 2 http://$n/; do n2=$((n2 + 1)); [ $n2 -lt 20 ] || exit 1; sleep 0.2; done; done; \
                  grep nameserver /etc/resolv.conf";
    let client = ["--rm", "--network", "names", IMAGE, "sh", "-c", script];
    let seen = suite.docker()?.run(suite, &client).output()?.ok()?.text();
    ensure_eq!(
        "answers by name",
        seen,
        "hello from nginx\nhello from nginx\nnameserver 127.0.0.11"
    );
    drop(web);
    drop(net);
    Ok(())
}

fn networks_are_connected_while_the_container_runs(suite: &Suite) -> Outcome {
    let second = network(suite, "second")?;
    let made = start(suite, "moving", &[IMAGE, "sleep", "1000000"])?;
    let addresses = || text(suite, &["exec", "moving", "ip", "-o", "-4", "address"]);
    let limit = suite.scale.seconds(10);
    until(limit, "the bridge's address", || {
        Ok(addresses()?.contains("10.93.0."))
    })?;
    for _ in 0..2 {
        text(suite, &["network", "connect", "second", "moving"])?;
        until(limit, "the second network", || {
            Ok(addresses()?.contains("10.94."))
        })?;
        text(suite, &["network", "disconnect", "second", "moving"])?;
        until(limit, "its end", || Ok(!addresses()?.contains("10.94.")))?;
    }
    ensure!(
        addresses()?.contains("10.93.0."),
        "the first network is gone"
    );
    drop(made);
    drop(second);
    Ok(())
}
