//! The network over a pod's life: plugged in late, changed while it runs, gone with the pod however that ends.

use bulkhead_harness::{
    Context, Engine, Image, Outcome, Suite, Test, ensure, ensure_eq,
    network::{self as net, GATEWAY},
    runner::{ANY, MACHINES},
    test,
};
use rustix::process::Signal;

use super::{NET, shape, start, until};
use crate::network;

/// The cases of this group.
pub const TESTS: &[Test] = &[
    test!(network::life::ctr_run_with_cni_has_a_network, NET, ANY)
        .networked()
        .fast_host(),
    test!(
        network::life::interfaces_that_come_and_go_are_followed,
        NET,
        ANY
    )
    .networked(),
    test!(
        network::life::fresh_namespace_is_plugged_in_by_the_tasks_pid,
        NET,
        ANY
    )
    .networked()
    .fast_host(),
    test!(network::life::many_pods_leave_nothing, NET, ANY)
        .networked()
        .fast_host(),
    test!(network::life::shim_killed_under_load, NET, MACHINES)
        .networked()
        .fast_host(),
    test!(network::life::vmm_killed_under_load, NET, MACHINES).networked(),
    test!(network::life::file_server_killed_under_load, NET, MACHINES)
        .networked()
        .fast_host(),
    test!(
        network::life::emulator_killed_under_load,
        NET,
        &[Engine::Emulated]
    )
    .networked()
    .fast_host(),
];

fn ctr_run_with_cni_has_a_network(suite: &Suite) -> Outcome {
    let script = format!(
        "ip -o address show dev eth0; ping -c 2 -i 0.2 -W 5 {} >/dev/null && echo reached",
        GATEWAY.0
    );
    let network = suite.network()?;
    let firewall = |script: &str| network.host(&["sh", "-ec", script]).output()?.ok();
    firewall("iptables-save >/run/netns/.v4; ip6tables-save >/run/netns/.v6")?;
    let run = suite.run(Image::Net).flag("--cni").sh(script);
    let text = run.output()?.ok()?.text();
    // `ctr` names no namespace when it takes the network away, and the plugin then leaves its NAT rules.
    firewall(
        "iptables-restore </run/netns/.v4; ip6tables-restore </run/netns/.v6; rm /run/netns/.v?",
    )?;
    ensure!(
        text.contains("inet 10.88.0.") && text.contains("inet6 fd00:88::"),
        "{text}"
    );
    ensure!(text.ends_with("reached"), "{text}");
    Ok(())
}

fn interfaces_that_come_and_go_are_followed(suite: &Suite) -> Outcome {
    let network = suite.network()?;
    let mut plug = network.pod()?;
    let pod = start(suite, &plug)?;
    shape::same(suite, &plug, &pod)?;
    let second = net::single(
        "second",
        serde_json::json!({ "type": "ptp" }),
        &["10.92.0.0/24"],
    );
    for _ in 0..2 {
        plug.add(&second, "net1", &[])?;
        shape::same(suite, &plug, &pod)?;
        pod.sh("ping -c 2 -i 0.2 -W 5 10.92.0.1")?;
        plug.remove("net1")?;
        shape::same(suite, &plug, &pod)?;
    }
    ensure!(!pod.sh("ip -o link")?.contains("net1"), "net1 stayed");
    for change in [
        "ip address add 10.88.0.77/24 dev eth0",
        "ip link set eth0 mtu 1300",
        "ip route add 203.0.113.0/24 via 10.88.0.1",
        "ip route delete 203.0.113.0/24",
        "ip address delete 10.88.0.77/24 dev eth0",
    ] {
        let words: Vec<&str> = change.split(' ').collect();
        plug.inside(&words).output()?.ok()?;
        shape::same(suite, &plug, &pod)?;
    }
    pod.end()?;
    plug.end()?;
    let folder = "/var/lib/cni/networks/second";
    let remove = network.host(&["rm", "-r", folder]);
    remove.output()?.ok().map(drop)
}

fn fresh_namespace_is_plugged_in_by_the_tasks_pid(suite: &Suite) -> Outcome {
    let network = suite.network()?;
    let pod = suite.run(Image::Net).args(&["sleep", "1000000"]).detach()?;
    let (pid, _) = pod.status()?.context("the task's pid")?;
    let path = format!("/proc/{pid}/ns/net");
    let plug = network.plug_into(pod.name(), &path);
    let mut plug = plug.with(&net::pods(), "eth0", &[])?;
    shape::same(suite, &plug, &pod)?;
    let ping = format!("ping -c 2 -i 0.2 -W 5 {}", GATEWAY.0);
    pod.sh(&ping)?;
    plug.remove("eth0")?;
    shape::same(suite, &plug, &pod)?;
    pod.end()?;
    plug.end()
}

/// How many pods come and go: a handful, or what the variable says (the product's promise is 200).
fn pods(suite: &Suite) -> u32 {
    let asked = std::env::var("BULKHEAD_E2E_PODS").ok();
    asked
        .and_then(|text| text.parse().ok())
        .unwrap_or(match () {
            () if suite.scale.pods_are_cheap() => 8,
            () => 2,
        })
}

fn many_pods_leave_nothing(suite: &Suite) -> Outcome {
    let network = suite.network()?;
    let enter = network.enter();
    let before = net::Network::state(&enter);
    let count = pods(suite);
    println!("         {count} pods");
    for round in 0..count {
        let plug = network.plug()?.with(&net::pods(), "eth0", &[(8080, 80)])?;
        let script = format!("ping -c 1 -W 5 {} >/dev/null && echo {round}", GATEWAY.0);
        let output = super::run(suite, &plug).sh(script).output()?.ok()?;
        ensure_eq!("output", output.text(), round.to_string());
        plug.end()?;
    }
    let mut left = Vec::new();
    let end = until(suite.settle(), "nothing is left", || {
        left = net::Network::state(&enter)
            .difference(&before)
            .cloned()
            .collect();
        Ok(left.is_empty())
    });
    end.map_err(|_| format!("left: {left:?}").into())
}

/// Kills a process while frames pass both ways; the runner looks for what it leaves.
fn killed_under_load(suite: &Suite, victim: &str) -> Outcome {
    let network = suite.network()?;
    let plug = network.pod()?;
    let pod = start(suite, &plug)?;
    let load = pod.exec(&["ping", "-f", "-s", "1400", GATEWAY.0]).spawn()?;
    let v4 = plug.v4()?;
    let flood = network.tool(&["ping", "-f", "-s", "1400", &v4]).spawn()?;
    std::thread::sleep(suite.scale.seconds(1) / 2);
    pod.process(victim)?.signal(Signal::KILL)?;
    let end = std::time::Instant::now() + suite.scale.seconds(10);
    while !pod.processes().is_empty() {
        // The shim reports the pod's end and lives until it is deleted.
        let left = pod.processes();
        if left.iter().all(|p| p.name.starts_with("containerd-shim")) {
            break;
        }
        ensure!(std::time::Instant::now() < end, "still there: {left:?}");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    drop((load, flood));
    pod.delete_by_force()?;
    // What was put beside CNI's interface is gone before CNI takes its own away.
    let mut left = String::new();
    let clean = until(suite.settle(), "the namespace is clean", || {
        left = plug
            .inside(&["sh", "-c", "ip -o link; tc qdisc show dev eth0"])
            .output()?
            .text();
        Ok(!left.contains("bhtap") && !left.contains("ingress"))
    });
    clean.map_err(|_| format!("left in the namespace: {left}"))?;
    plug.end()?;
    // The namespace's next pod works.
    let plug = network.pod()?;
    let next = start(suite, &plug)?;
    next.sh(&format!("ping -c 2 -i 0.2 -W 5 {}", GATEWAY.0))?;
    next.end()?;
    plug.end()
}

fn shim_killed_under_load(suite: &Suite) -> Outcome {
    killed_under_load(suite, "containerd-shim")
}

fn vmm_killed_under_load(suite: &Suite) -> Outcome {
    killed_under_load(suite, "bulkhead-vmm")
}

fn file_server_killed_under_load(suite: &Suite) -> Outcome {
    killed_under_load(suite, "bulkhead-fs")
}

fn emulator_killed_under_load(suite: &Suite) -> Outcome {
    killed_under_load(suite, "qemu-system")
}
