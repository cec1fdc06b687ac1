//! Ports: published ones by NAT, and the pod's loopback as kubelet's port-forward reaches it.

use std::time::Duration;

use bulkhead_harness::{
    Outcome, Suite, Test,
    command::Input,
    ensure, ensure_eq,
    network::{self as net, GATEWAY, HOST, LAN, OUTSIDE, OUTSIDE_ADDRESS, Plug},
    runner::{ANY, MACHINES},
    test,
};

use super::{NET, run, serve, start, until};
use crate::network;

/// The cases of this group.
pub const TESTS: &[Test] = &[
    test!(
        network::ports::published_port_is_reached_from_everywhere,
        NET,
        ANY
    )
    .networked(),
    test!(
        network::ports::pod_reaches_a_server_outside_through_nat,
        NET,
        ANY
    )
    .networked()
    .fast_host(),
    test!(
        network::ports::loopback_of_the_namespace_leads_into_the_pod,
        NET,
        ANY
    )
    .networked(),
    test!(
        network::ports::forwarding_is_off_by_annotation,
        NET,
        MACHINES
    )
    .networked()
    .fast_host(),
];

fn published_port_is_reached_from_everywhere(suite: &Suite) -> Outcome {
    let network = suite.network()?;
    let plug = network.plug()?.with(&net::pods(), "eth0", &[(8080, 80)])?;
    let pod = serve(suite, network, &plug)?;
    let url = format!("http://{}:8080/who", HOST.0);
    let curl = ["curl", "-s", "-m", "10", &url];
    let seen = network.tool_at(OUTSIDE, &curl).output()?.ok()?;
    ensure_eq!("the client from outside", seen.text(), OUTSIDE_ADDRESS.0);
    network.tool_at(LAN, &curl).output()?.ok()?;
    network.tool(&curl).output()?.ok()?;
    let local = ["curl", "-s", "-m", "10", "http://127.0.0.1:8080/who"];
    let seen = network.tool(&local).output()?.ok()?;
    ensure_eq!("the host by its loopback", seen.text(), GATEWAY.0);
    // By its own published port, through the bridge and back.
    pod.exec(&curl).output()?.ok()?;
    pod.end()?;
    plug.end()?;
    let refused = network.tool_at(OUTSIDE, &["curl", "-s", "-m", "2", &url]);
    ensure!(refused.output()?.status != 0, "the port is still published");
    Ok(())
}

fn pod_reaches_a_server_outside_through_nat(suite: &Suite) -> Outcome {
    let network = suite.network()?;
    let plug = network.pod()?;
    let pod = start(suite, &plug)?;
    let limit = Duration::from_secs(600);
    let server = network.tool_at(OUTSIDE, &["nginx"]).limit(limit).spawn()?;
    for (to, from) in [
        (OUTSIDE_ADDRESS.0.to_owned(), HOST.0),
        (format!("[{}]", OUTSIDE_ADDRESS.1), HOST.1),
    ] {
        let url = format!("http://{to}/who");
        until(
            suite.scale.seconds(10),
            "the server outside answers",
            || {
                let who = pod.exec(&["curl", "-s", "-m", "5", &url]).output()?;
                Ok(who.text() == from)
            },
        )?;
    }
    server.signal(rustix::process::Signal::TERM);
    pod.end()?;
    plug.end()
}

/// As containerd forwards a port: dialled on the loopback of the pod's namespace.
fn dial(plug: &Plug, to: &str, bytes: &[u8]) -> Outcome<String> {
    let socat = plug.tool(&["socat", "-t", "5", "-", to]);
    Ok(socat.input(Input::Bytes(bytes.to_vec())).output()?.text())
}

fn loopback_of_the_namespace_leads_into_the_pod(suite: &Suite) -> Outcome {
    let network = suite.network()?;
    let plug = network.pod()?;
    let pod = start(suite, &plug)?;
    let limit = suite.scale.seconds(10);
    for (listen, to) in [
        (
            "TCP4-LISTEN:7001,bind=127.0.0.1,reuseaddr,fork",
            "TCP4:127.0.0.1:7001",
        ),
        (
            "TCP6-LISTEN:7002,bind=[::1],reuseaddr,fork",
            "TCP6:[::1]:7002",
        ),
        ("TCP4-LISTEN:7003,reuseaddr,fork", "TCP4:127.0.0.1:7003"),
    ] {
        ensure!(dial(&plug, to, b"x")?.is_empty(), "{to} is open too early");
        // The echo ends when the client has said all: half-close passes both ways.
        let server = pod.exec(&["socat", listen, "EXEC:cat"]).spawn()?;
        until(limit, to, || {
            Ok(dial(&plug, to, b"there and back")? == "there and back")
        })?;
        let much = vec![b'm'; 1 << 20];
        let back = dial(&plug, to, &much)?;
        ensure_eq!("bytes that came back", back.len(), much.len());
        pod.sh("kill $(pidof socat)")?;
        server.wait()?;
        until(limit, "the port goes", || {
            Ok(dial(&plug, to, b"x")?.is_empty())
        })?;
    }
    pod.end()?;
    plug.end()
}

fn forwarding_is_off_by_annotation(suite: &Suite) -> Outcome {
    let network = suite.network()?;
    let plug = network.pod()?;
    let pod = run(suite, &plug)
        .flags(&["--annotation", "io.bulkhead.port_forward=off"])
        .args(&["nginx"])
        .detach()?;
    let url = format!("http://{}/", plug.v4()?);
    until(suite.scale.seconds(10), "nginx answers", || {
        let curl = network.tool(&["curl", "-s", "-m", "5", &url]);
        Ok(curl.output()?.status == 0)
    })?;
    std::thread::sleep(suite.scale.seconds(1));
    let curl = plug.tool(&["curl", "-s", "-m", "5", "http://127.0.0.1/"]);
    ensure!(curl.output()?.status != 0, "the port is forwarded");
    pod.end()?;
    plug.end()
}
