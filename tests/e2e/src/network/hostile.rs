//! Guests that misbehave on the wire harm only themselves.

use bulkhead_harness::{
    Engine, Outcome, Suite, Test, ensure, ensure_eq,
    network::{GATEWAY, Network},
    runner::{ANY, MACHINES},
    test,
};

use super::{NET, run, serve, start};
use crate::network;

/// The cases of this group.
pub const TESTS: &[Test] = &[
    test!(
        network::hostile::forged_source_address_does_not_get_out,
        NET,
        ANY
    )
    .networked(),
    test!(network::hostile::flood_harms_only_itself, NET, MACHINES)
        .networked()
        .fast_host(),
    test!(
        network::hostile::guest_that_takes_no_frames_costs_no_memory,
        NET,
        MACHINES
    )
    .networked()
    .fast_host(),
];

const FORGED: &str = "02:de:ad:be:ef:01";

/// Shell text that sends a frame: broadcast, of a type for experiments, from `source`, with `size` bytes behind the header.
fn frame(source: &str, size: usize) -> String {
    let bytes: String = source.split(':').map(|b| format!("\\x{b}")).collect();
    format!(
        "{{ printf '\\xff\\xff\\xff\\xff\\xff\\xff{bytes}\\x88\\xb5'; head -c {size} /dev/zero; }} | \
         socat -u -b 65000 - INTERFACE:eth0"
    )
}

/// Addresses that the bridge has learned from frames.
fn learned(network: &Network, address: &str) -> Outcome<bool> {
    let table = network.host(&["bridge", "fdb", "show", "br", "cni0"]);
    Ok(table.output()?.ok()?.text().contains(address))
}

fn forged_source_address_does_not_get_out(suite: &Suite) -> Outcome {
    let network = suite.network()?;
    let plug = network.pod()?;
    let pod = run(suite, &plug).flag("--privileged");
    let pod = pod.args(&["sleep", "1000000"]).detach()?;
    let script = "until ip link show eth0 up | grep -q UP; do sleep 0.1; done; cat /sys/class/net/eth0/address";
    let own = match pod.sh(script) {
        Ok(own) => own,
        Err(_) => pod.sh("ip -o link show eth0 | sed 's/.*ether //; s/ .*//'")?,
    };
    pod.sh(&format!("{}; {}", frame(FORGED, 46), frame(&own, 46)))?;
    std::thread::sleep(suite.scale.seconds(1) / 2);
    ensure!(learned(network, &own)?, "the pod's own frame is not seen");
    // A plain namespace has no such wall: it shows that the frame is a good one.
    let forged = learned(network, FORGED)?;
    ensure_eq!(
        "the forged one is seen",
        forged,
        suite.engine == Engine::Runc
    );
    if suite.engine == Engine::Runc {
        let flush = ["bridge", "fdb", "flush", "dev", "cni0"];
        let _ = network.host(&flush).output();
    } else {
        // Another address of the interface itself does not help either.
        pod.sh(&format!(
            "ip link set eth0 down; ip link set eth0 address {FORGED}; ip link set eth0 up; {}; \
             ip link set eth0 down; ip link set eth0 address {own}; ip link set eth0 up",
            frame(FORGED, 46)
        ))?;
        std::thread::sleep(suite.scale.seconds(1) / 2);
        ensure!(!learned(network, FORGED)?, "a changed address gets out");
    }
    pod.end()?;
    plug.end()
}

fn flood_harms_only_itself(suite: &Suite) -> Outcome {
    let network = suite.network()?;
    let (bad_plug, good_plug) = (network.pod()?, network.pod()?);
    let bad = run(suite, &bad_plug).flag("--privileged");
    let bad = bad.args(&["sleep", "1000000"]).detach()?;
    let good = serve(suite, network, &good_plug)?;
    let vmm = bad.process("bulkhead-vmm")?;
    let before = vmm.memory_kib(512)?;
    // Floods, frames of a header only, frames larger than anybody agreed to.
    let own = bad.sh("ip -o link show eth0 | sed 's/.*ether //; s/ .*//'")?;
    let script = format!(
        "ping -f -s 1400 {gateway} >/dev/null & ping -f -b -s 60000 {gateway} >/dev/null & \
         ip link set eth0 mtu 9000; for n in 1 2 3 4 5; do {empty}; {giant}; done 2>/dev/null; sleep 3; kill %1 %2; true",
        gateway = GATEWAY.0,
        empty = frame(&own, 0),
        giant = frame(&own, 8000),
    );
    let flood = bad.exec(&["sh", "-c", &script]).spawn()?;
    std::thread::sleep(suite.scale.seconds(1) / 2);
    let url = format!("http://{}/", good_plug.v4()?);
    let bench = ["ab", "-q", "-s", "60", "-n", "200", "-c", "10", &url];
    let limit = suite.scale.seconds(60);
    let report = network.tool(&bench).limit(limit).output()?.ok()?.text();
    ensure!(
        report.contains("Failed requests:        0"),
        "the neighbour's requests failed: {report}"
    );
    flood.wait()?;
    let grown = vmm.memory_kib(512)?.saturating_sub(before);
    ensure!(grown < 8 << 10, "the VMM has grown by {grown} KiB");
    good.end()?;
    bad.end()?;
    good_plug.end()?;
    bad_plug.end()
}

fn guest_that_takes_no_frames_costs_no_memory(suite: &Suite) -> Outcome {
    let network = suite.network()?;
    let plug = network.pod()?;
    let pod = run(suite, &plug).flag("--privileged");
    let pod = pod.args(&["sleep", "1000000"]).detach()?;
    let vmm = pod.process("bulkhead-vmm")?;
    let before = vmm.memory_kib(512)?;
    pod.sh("ip link set eth0 down")?;
    let v4 = plug.v4()?;
    let mac = [
        "sh",
        "-c",
        "ip -o link show eth0 | sed 's/.*ether //; s/ .*//'",
    ];
    let mac = plug.inside(&mac).output()?.ok()?.text();
    let neighbour = [
        "ip",
        "neighbour",
        "replace",
        &v4,
        "lladdr",
        &mac,
        "dev",
        "cni0",
    ];
    network.host(&neighbour).output()?.ok()?;
    let flood = ["timeout", "3", "ping", "-f", "-s", "60000", &v4];
    network.tool(&flood).output()?;
    let grown = vmm.memory_kib(512)?.saturating_sub(before);
    ensure!(grown < 8 << 10, "the VMM has grown by {grown} KiB");
    ensure_eq!("the pod", pod.sh("echo lives")?, "lives");
    pod.end()?;
    let neighbour = ["ip", "neighbour", "delete", &v4, "dev", "cni0"];
    network.host(&neighbour).output()?;
    // What is done next in the same namespace works.
    let next = start(suite, &plug)?;
    next.sh(&format!("ping -c 2 -i 0.2 -W 5 {}", GATEWAY.0))?;
    next.end()?;
    plug.end()
}
