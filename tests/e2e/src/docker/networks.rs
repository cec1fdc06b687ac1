//! Docker's networks.

use bulkhead_harness::{
    Outcome, Suite, Test, ensure, ensure_eq,
    network::{HOST, OUTSIDE, OUTSIDE_ADDRESS},
    runner::{ANY, MACHINES},
    test,
};

use super::{Made, NET, TOOLS, names, run, start, text};
use crate::{docker, network::until};

/// The cases of this group.
pub const TESTS: &[Test] = &[
    test!(
        docker::networks::bridge_network_and_published_port,
        NET,
        ANY
    )
    .docker()
    .fast_host(),
    test!(
        docker::networks::user_defined_network_resolves_names,
        NET,
        ANY
    )
    .docker()
    .fast_host(),
    test!(
        docker::networks::user_defined_network_asks_servers_outside,
        NET,
        ANY
    )
    .docker()
    .fast_host(),
    test!(
        docker::networks::are_connected_while_the_container_runs,
        NET,
        ANY
    )
    .docker()
    .fast_host(),
    test!(
        docker::networks::of_another_container_is_refused,
        NET,
        MACHINES
    )
    .docker()
    .fast_host(),
];

fn network<'a>(suite: &'a Suite, name: &str) -> Outcome<Made<'a>> {
    let made = Made::by(suite, &["network", "rm", name]);
    text(suite, &["network", "create", name])?;
    Ok(made)
}

fn bridge_network_and_published_port(suite: &Suite) -> Outcome {
    let network = suite.network()?;
    let made = start(suite, "web", &["-p", "8082:80", TOOLS, "nginx"])?;
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
            TOOLS,
            "nginx",
        ],
    )?;
    let script = "for n in web www; do \
                  until curl -s -m 2 http://$n/; do n2=$((n2 + 1)); [ $n2 -lt 20 ] || exit 1; sleep 0.2; done; done; \
                  grep nameserver /etc/resolv.conf";
    let client = ["--rm", "--network", "names", TOOLS, "sh", "-c", script];
    let seen = run(suite, &client)?.output()?.ok()?.text();
    ensure_eq!(
        "answers by name",
        seen,
        "hello from nginx\nhello from nginx\nnameserver 127.0.0.11"
    );
    drop(web);
    drop(net);
    Ok(())
}

fn user_defined_network_asks_servers_outside(suite: &Suite) -> Outcome {
    let server = names::Server::start(suite)?;
    let net = network(suite, "asking")?;
    // What is large does not fit into a datagram and is asked for by TCP.
    let script = "for n in small large; do ping -c 1 -W 5 $n.test | head -n 1 | cut -d ' ' -f 2,3 | tr -d :; done";
    let client = ["--rm", "--network", "asking", "--dns", OUTSIDE_ADDRESS.0];
    let client = [&client[..], &[TOOLS, "sh", "-c", script]].concat();
    let seen = run(suite, &client)?.output()?.ok()?.text();
    let address = OUTSIDE_ADDRESS.0;
    ensure_eq!(
        "what the names are",
        seen,
        format!("small.test ({address})\nlarge.test ({address})")
    );
    drop(net);
    drop(server);
    Ok(())
}

fn are_connected_while_the_container_runs(suite: &Suite) -> Outcome {
    let second = network(suite, "second")?;
    let made = start(suite, "moving", &[TOOLS, "sleep", "1000000"])?;
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

fn of_another_container_is_refused(suite: &Suite) -> Outcome {
    let first = start(suite, "first", &[TOOLS, "sleep", "1000000"])?;
    let second = Made::by(suite, &["rm", "-f", "second"]);
    let args = [
        "--name",
        "second",
        "--network",
        "container:first",
        TOOLS,
        "true",
    ];
    let refused = run(suite, &args)?.output()?;
    let refused = refused.refused(&["machines share none (no --network container:NAME"])?;
    ensure_eq!("what `docker run` ends with", refused.status, 125);
    let lines = refused.errors().lines().count();
    ensure_eq!("lines of the error", lines, 1);
    drop(second);
    let seen = text(suite, &["exec", "first", "echo", "on"])?;
    ensure_eq!("the first container", seen, "on");
    drop(first);
    Ok(())
}
