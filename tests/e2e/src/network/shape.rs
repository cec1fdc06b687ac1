//! What the container sees: names, addresses, routes; and what is refused.

use std::fs;

use bulkhead_harness::{
    Context, Image, Outcome, Pod, Suite, Test, ensure, ensure_eq,
    network::{self as net, Plug},
    runner::{ANY, MACHINES},
    spec, test,
};
use serde_json::json;

use super::{BUSYBOX, NET, run, start, until};
use crate::network;

/// The cases of this group.
pub const TESTS: &[Test] = &[
    test!(network::shape::no_network_is_loopback_only, NET, ANY)
        .networked()
        .fast_host(),
    test!(
        network::shape::the_hosts_network_is_refused,
        BUSYBOX,
        MACHINES
    )
    .networked(),
    test!(
        network::shape::pod_has_what_the_namespace_has_from_bridge,
        NET,
        ANY
    )
    .networked(),
    test!(
        network::shape::pod_has_what_the_namespace_has_from_ptp_and_macvlan,
        NET,
        ANY
    )
    .networked()
    .fast_host(),
    test!(
        network::shape::hosts_and_resolv_conf_are_the_mounted_files,
        BUSYBOX,
        ANY
    )
    .networked()
    .fast_host(),
    test!(
        network::shape::containers_of_a_pod_share_its_network,
        NET,
        ANY
    )
    .networked()
    .fast_host(),
    test!(network::shape::sysctls_of_the_spec_hold, NET, ANY)
        .networked()
        .fast_host(),
];

/// Links, addresses and routes in words that do not depend on who set them. Links to the machine are no part of it.
pub const SHAPE: &str = r#"
ip -o link | sed -nE 's/^[0-9]+: ([^:@]*).* mtu ([0-9]+) .*link\/([a-z]+) ([^ ]*) .*/link \1 mtu \2 \3 \4/p'
ip -o address | awk '{ print "address", $2, $3, $4 }'
{ ip route; ip -6 route; } |
  sed -E 's/ proto [a-z]+//; s/ pref medium//; s/ expires [0-9]+sec//; s/ *$//; s/^/route /'
"#;

fn lines(text: &str) -> Vec<String> {
    let mut lines: Vec<String> = text
        .lines()
        .filter(|line| !line.contains("bhtap"))
        .map(str::to_owned)
        .collect();
    lines.sort();
    lines
}

/// What the namespace has, without what is not yet settled.
pub fn of_namespace(plug: &Plug) -> Outcome<Vec<String>> {
    Ok(lines(
        &plug.tool(&["sh", "-c", SHAPE]).output()?.ok()?.text(),
    ))
}

/// The pod comes to have what the namespace has.
pub fn same(suite: &Suite, plug: &Plug, pod: &Pod) -> Outcome {
    let (mut wanted, mut got) = (Vec::new(), Vec::new());
    let end = until(suite.scale.seconds(5), "the same", || {
        wanted = of_namespace(plug)?;
        got = lines(&pod.sh(SHAPE)?);
        Ok(wanted == got)
    });
    if end.is_err() {
        ensure_eq!("network of the pod", got, wanted);
    }
    Ok(())
}

fn no_network_is_loopback_only(suite: &Suite) -> Outcome {
    let script = format!(
        "{SHAPE}\nping -c 1 -W 2 127.0.0.1 >/dev/null && echo v4; ping -c 1 -W 2 ::1 >/dev/null && echo v6"
    );
    let text = suite.run(Image::Net).sh(script).output()?.ok()?.text();
    let links = text.lines().filter(|l| l.starts_with("link"));
    ensure_eq!("links", links.count(), 1);
    ensure!(text.contains("link lo mtu 65536"), "no loopback: {text}");
    ensure!(!text.contains("route default"), "a default route: {text}");
    ensure!(text.ends_with("v4\nv6"), "loopback does not answer: {text}");
    Ok(())
}

fn the_hosts_network_is_refused(suite: &Suite) -> Outcome {
    let run = || suite.busybox().args(&["true"]);
    let refused = run().flag("--net-host").output()?;
    refused.refused(&["network"])?;
    let own = format!("network:/proc/{}/ns/net", suite.network()?.pid());
    let refused = run().flags(&["--with-ns", &own]).output()?;
    refused.refused(&["network"])?;
    for wrong in ["/proc/self/ns/uts", "/etc/passwd", "/nowhere"] {
        let wrong = format!("network:{wrong}");
        let refused = run().flags(&["--with-ns", &wrong]).output()?;
        refused.refused(&["network"])?;
    }
    Ok(())
}

fn pod_has_what_the_namespace_has_from_bridge(suite: &Suite) -> Outcome {
    let network = suite.network()?;
    let jumbo = net::bridge("jumbo", "cni9", "10.89.0.0/24", "fd00:89::/64");
    let mut jumbo = jumbo;
    jumbo["plugins"][0]["mtu"] = json!(9000);
    jumbo["plugins"][0]["ipMasq"] = json!(false);
    jumbo["plugins"][0]["ipam"]["routes"] =
        json!([{ "dst": "198.51.100.0/24" }, { "dst": "2001:db8:51::/48" }]);
    let plug = network
        .plug()?
        .with(&net::pods(), "eth0", &[])?
        .with(&jumbo, "net1", &[])?;
    let pod = start(suite, &plug)?;
    same(suite, &plug, &pod)?;
    let text = pod.sh(SHAPE)?;
    for needle in [
        "link net1 mtu 9000",
        "address eth0 inet 10.88.0.",
        "address eth0 inet6 fd00:88::",
        "address net1 inet6 fd00:89::",
        "route default via 10.88.0.1 dev eth0",
        "route default via fd00:88::1 dev eth0",
        "route 198.51.100.0/24 via 10.89.0.1 dev net1",
    ] {
        ensure!(text.contains(needle), "no `{needle}` in {text}");
    }
    // The largest frame passes whole.
    let size = [
        "ping",
        "-c",
        "1",
        "-W",
        "5",
        "-M",
        "do",
        "-s",
        "8972",
        "10.89.0.1",
    ];
    pod.exec(&size).output()?.ok()?;
    pod.end()?;
    plug.end()?;
    // The plugin leaves its bridge.
    network
        .host(&["ip", "link", "delete", "cni9"])
        .output()?
        .ok()?;
    clean_ipam(suite, "jumbo")
}

fn clean_ipam(suite: &Suite, list: &str) -> Outcome {
    let folder = format!("/var/lib/cni/networks/{list}");
    let command = suite.network()?.host(&["rm", "-r", &folder]);
    command.output()?.ok().map(drop)
}

fn pod_has_what_the_namespace_has_from_ptp_and_macvlan(suite: &Suite) -> Outcome {
    let network = suite.network()?;
    let ptp = net::single(
        "ptp",
        json!({ "type": "ptp", "mtu": 1400 }),
        &["10.90.0.0/24", "fd00:90::/64"],
    );
    let macvlan = net::single(
        "macvlan",
        json!({ "type": "macvlan", "master": "cni0", "mode": "bridge" }),
        &["10.91.0.0/24"],
    );
    let mut plug = network.plug()?.with(&ptp, "eth0", &[])?;
    if let Err(error) = plug.add(&macvlan, "mac0", &[]) {
        let text = error.to_string();
        ensure!(
            text.contains("not supported") || text.contains("unknown"),
            "{text}"
        );
        println!("         no macvlan in this kernel");
    }
    let pod = start(suite, &plug)?;
    same(suite, &plug, &pod)?;
    pod.sh("ping -c 1 -W 5 10.90.0.1 && ping -c 1 -W 5 fd00:90::1")?;
    pod.end()?;
    plug.end()?;
    for list in ["ptp", "macvlan"] {
        let _ = clean_ipam(suite, list);
    }
    Ok(())
}

fn hosts_and_resolv_conf_are_the_mounted_files(suite: &Suite) -> Outcome {
    let folder = suite.folder(&suite.name("etc"))?;
    let mut run = suite.busybox();
    for (file, text) in [
        ("hosts", "10.1.2.3 somebody\n"),
        ("resolv.conf", "nameserver 10.88.0.1\n"),
    ] {
        let path = folder.join(file);
        fs::write(&path, text).context("write")?;
        run = run.mount(format!(
            "type=bind,src={},dst=/etc/{file},options=rbind:ro",
            path.display()
        ));
    }
    let script = "cat /etc/hosts /etc/resolv.conf; ping -c 1 -W 1 somebody 2>&1 | head -n 1";
    let text = run.sh(script).output()?.ok()?.text();
    ensure!(
        text.starts_with("10.1.2.3 somebody\nnameserver 10.88.0.1"),
        "{text}"
    );
    ensure!(
        text.contains("PING somebody (10.1.2.3)") || text.contains("unreachable"),
        "the name is not looked up: {text}"
    );
    Ok(())
}

fn containers_of_a_pod_share_its_network(suite: &Suite) -> Outcome {
    let network = suite.network()?;
    let plug = network.pod()?;
    let pod = run(suite, &plug).args(&["nginx"]).detach()?;
    // As CRI does it: the pod's namespace, and the annotation that names the pod.
    let sandbox = format!("io.kubernetes.cri.sandbox-id={}", pod.name());
    let script = "curl -s --retry 20 --retry-connrefused --retry-delay 1 http://127.0.0.1/; ip -o address show dev eth0";
    let second = run(suite, &plug).flags(&["--annotation", &sandbox]);
    let text = second.sh(script).output()?.ok()?.text();
    ensure!(text.starts_with("hello from nginx"), "{text}");
    ensure!(text.contains(&plug.v4()?), "another address: {text}");
    pod.end()?;
    plug.end()
}

fn sysctls_of_the_spec_hold(suite: &Suite) -> Outcome {
    let network = suite.network()?;
    let plug = network.pod()?;
    let script = "cat /proc/sys/net/ipv4/ip_unprivileged_port_start /proc/sys/net/ipv4/ping_group_range; \
                  ip -o link show eth0 | cut -d: -f2";
    let mut spec = spec::default(&suite.rootfs()?, &["sh", "-c", script]);
    spec["linux"]["sysctl"] = json!({
        "net.ipv4.ip_unprivileged_port_start": "80", "net.ipv4.ping_group_range": "0 1000",
    });
    spec["linux"]["namespaces"] = json!([
        { "type": "mount" }, { "type": "pid" }, { "type": "uts" }, { "type": "ipc" },
        { "type": "network", "path": plug.path() },
    ]);
    let text = bulkhead_harness::Run::of_spec(suite, &spec)?
        .output()?
        .ok()?
        .text();
    ensure!(text.starts_with("80\n0\t1000"), "{text}");
    plug.end()
}
