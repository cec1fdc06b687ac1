//! Bytes: everybody reaches everybody who should, by every protocol, whole and in order.

use bulkhead_harness::{
    Context, Engine, Invocation, Outcome, Scale, Suite, Test,
    command::Input,
    ensure, ensure_eq,
    network::{GATEWAY, LAN, OUTSIDE, OUTSIDE_ADDRESS},
    runner::ANY,
    test,
};

use serde_json::Value;

use super::{NET, serve, start, until};
use crate::network;

/// The cases of this group.
pub const TESTS: &[Test] = &[
    test!(
        network::traffic::everybody_reaches_everybody_and_the_outside_by_nat,
        NET,
        ANY
    )
    .networked(),
    test!(
        network::traffic::udp_and_multicast_arrive_and_sources_are_kept,
        NET,
        ANY
    )
    .networked()
    .fast_host(),
    test!(
        network::traffic::ten_thousand_requests_with_a_hundred_in_parallel,
        NET,
        ANY
    )
    .networked(),
    test!(
        network::traffic::iperf3_tcp_and_udp_both_ways_v4_and_v6,
        NET,
        ANY
    )
    .networked()
    .fast_host(),
    test!(
        network::traffic::a_large_transfer_comes_back_whole,
        NET,
        ANY
    )
    .networked()
    .fast_host(),
];

fn everybody_reaches_everybody_and_the_outside_by_nat(suite: &Suite) -> Outcome {
    let network = suite.network()?;
    let (one, two) = (network.pod()?, network.pod()?);
    let (first, second) = (start(suite, &one)?, start(suite, &two)?);
    let (v4, v6) = (one.v4()?, one.v6()?);
    let targets = [
        GATEWAY.0,
        GATEWAY.1,
        OUTSIDE_ADDRESS.0,
        OUTSIDE_ADDRESS.1,
        &two.v4()?,
        &two.v6()?,
    ]
    .join(" ");
    // The first frame may wait for the neighbour's answer, so two are sent.
    let script = format!(
        "for to in {targets}; do ping -c 2 -i 0.2 -W 5 $to >/dev/null && echo $to; done; \
         ping -c 1 -W 5 -s 20000 {} >/dev/null && echo fragments",
        GATEWAY.0
    );
    let reached = first.sh(&script)?;
    ensure_eq!(
        "reached from the pod",
        reached,
        format!("{}\nfragments", targets.replace(' ', "\n"))
    );
    for to in [&v4, &v6] {
        let ping = ["ping", "-c", "2", "-i", "0.2", "-W", "5", to];
        network.tool(&ping).output()?.ok()?;
        network.tool_at(LAN, &ping).output()?.ok()?;
        second.exec(&ping).output()?.ok()?;
        // The outside knows no way in.
        let outside = network.tool_at(OUTSIDE, &["ping", "-c", "1", "-W", "1", to]);
        ensure!(outside.output()?.status != 0, "the outside reaches {to}");
    }
    second.end()?;
    first.end()?;
    two.end()?;
    one.end()
}

fn udp_and_multicast_arrive_and_sources_are_kept(suite: &Suite) -> Outcome {
    let network = suite.network()?;
    let plug = network.pod()?;
    let pod = serve(suite, network, &plug)?;
    let (v4, v6) = (plug.v4()?, plug.v6()?);
    let lan = |args: &[&str]| network.tool_at(LAN, args);
    // Who asks is seen as who it is.
    let script = "ip -o address show dev eth0 | grep -v fe80 | awk '{ print $4 }' | cut -d/ -f1";
    let neighbour = lan(&["sh", "-c", script]).output()?.ok()?.text();
    for (to, own) in [v4.clone(), format!("[{v6}]")]
        .iter()
        .zip(neighbour.lines())
    {
        let url = format!("http://{to}/who");
        let seen = lan(&["curl", "-s", "-m", "10", &url]).output()?.ok()?;
        ensure_eq!("the client's address", seen.text(), own);
    }
    // UDP there and back.
    for (listen, to) in [
        ("UDP4-RECVFROM:5353,fork", format!("UDP4:{v4}:5353")),
        ("UDP6-RECVFROM:5354,fork", format!("UDP6:[{v6}]:5354")),
    ] {
        let echo = pod.exec(&["socat", listen, "EXEC:cat"]).spawn()?;
        until(suite.scale.seconds(10), "UDP is answered", || {
            let ask = lan(&["socat", "-t", "1", "-", &to]);
            let ask = ask.input(Input::Bytes(b"over udp".to_vec()));
            Ok(ask.output()?.text() == "over udp")
        })?;
        drop(echo);
    }
    // Multicast on the link: from the neighbour to the pod, and from the pod to the neighbour.
    let member = "UDP4-RECV:5355,bind=239.1.2.3,ip-add-membership=239.1.2.3:eth0,reuseaddr";
    let send = [
        "sh",
        "-c",
        "for n in 1 2 3 4 5 6 7 8 9 10; do echo to all; sleep 0.3; done | \
         socat -u - UDP4-DATAGRAM:239.1.2.3:5355,ip-multicast-if=$(ip -o -4 address show dev eth0 | awk '{ print $4 }' | cut -d/ -f1)",
    ];
    let listen = ["socat", "-u", member, "STDOUT"];
    let listener = pod.exec(&listen).spawn()?;
    let sender = lan(&send).spawn()?;
    listener.wait_for("to all", suite.scale.seconds(10))?;
    drop((sender, listener));
    let listener = lan(&listen).spawn()?;
    let sender = pod.exec(&send).spawn()?;
    listener.wait_for("to all", suite.scale.seconds(10))?;
    drop((sender, listener));
    pod.end()?;
    plug.end()
}

fn ten_thousand_requests_with_a_hundred_in_parallel(suite: &Suite) -> Outcome {
    let network = suite.network()?;
    let plug = network.pod()?;
    let pod = serve(suite, network, &plug)?;
    // Over connections that stay, as `wrk` does it, and each over one of its own.
    let counts = match suite.scale.pods_are_cheap() {
        true => [("10000", &["-k"][..]), ("2000", &[])],
        false => [("1000", &["-k"][..]), ("200", &[])],
    };
    for (count, keep) in counts {
        let url = format!("http://{}/", plug.v4()?);
        let bench = [&["ab", "-q", "-n", count, "-c", "100"], keep, &[&url]].concat();
        let limit = suite.scale.seconds(100);
        let report = network.tool(&bench).limit(limit).output()?.ok()?.text();
        let value = |key: &str| -> Option<u64> {
            let line = report.lines().find_map(|l| l.strip_prefix(key))?;
            line.split_whitespace().next()?.parse().ok()
        };
        ensure_eq!(
            "completed",
            value("Complete requests:"),
            count.parse::<u64>().ok()
        );
        ensure_eq!("failed", value("Failed requests:"), Some(0));
        ensure!(
            !report.contains("Non-2xx"),
            "not every answer was good: {report}"
        );
    }
    pod.end()?;
    plug.end()
}

fn iperf3_tcp_and_udp_both_ways_v4_and_v6(suite: &Suite) -> Outcome {
    let network = suite.network()?;
    let plug = network.pod()?;
    let pod = start(suite, &plug)?;
    let server = pod
        .exec(&["iperf3", "-s", "--forceflush"])
        .seconds(120)
        .spawn()?;
    server.wait_for("Server listening", suite.scale.seconds(20))?;
    for to in [plug.v4()?, plug.v6()?] {
        for way in [&[][..], &["-R"]] {
            for kind in [&["-n", "16M"][..], &["-u", "-b", "20M", "-n", "2M"]] {
                let client = ["iperf3", "-J", "-c", &to, "--connect-timeout", "5000"];
                let client = [&client, way, kind].concat();
                let mut last = String::new();
                // A datagram may be lost, and with it the first one that opens a UDP test.
                let end = until(suite.scale.seconds(20), "bytes arrive", || {
                    let output = network.tool_at(LAN, &client).limit(suite.scale.seconds(60));
                    last = output.output()?.text();
                    let report: Value = serde_json::from_str(&last).context("iperf3's report")?;
                    let sum = match kind.first() {
                        Some(&"-u") => &report["end"]["sum"],
                        _ => &report["end"]["sum_received"],
                    };
                    let lost = sum["lost_percent"].as_f64().unwrap_or(0.0);
                    Ok(sum["bytes"].as_u64() > Some(1_000_000) && lost < 50.0)
                });
                end.map_err(|error| format!("{client:?}: {error}: {last}"))?;
            }
        }
    }
    drop(server);
    pod.end()?;
    plug.end()
}

/// Bytes of the largest transfer: a gigabyte, and less where the guest's CPU is emulated.
fn size(suite: &Suite) -> u64 {
    match suite.engine {
        Engine::Emulated => suite.scale.bulk / 4,
        _ => suite.scale.bulk,
    }
}

fn a_large_transfer_comes_back_whole(suite: &Suite) -> Outcome {
    let network = suite.network()?;
    let plug = network.pod()?;
    let pod = start(suite, &plug)?;
    let size = size(suite);
    println!("         {} there and back", Scale::size(size));
    let echo = [
        "socat",
        "-b",
        "65536",
        "TCP4-LISTEN:9001,reuseaddr",
        "EXEC:cat",
    ];
    let echo = pod.exec(&echo).seconds(200).spawn()?;
    let mut socat = network
        .tool(&["socat", "-b", "65536", "-t", "100", "-"])
        .words();
    socat.push(format!("TCP4:{}:9001,retry=50,interval=0.1", plug.v4()?));
    let script = "exec 3>&1; head -c $0 /dev/urandom | tee >(md5sum >&3) | \"$@\" | md5sum";
    let sums = Invocation::new("bash")
        .args(["-c", script, &size.to_string()])
        .args(socat)
        .limit(suite.scale.seconds(200));
    let sums = sums.output()?.ok()?.text();
    let lines: Vec<&str> = sums.lines().collect();
    ensure!(
        matches!(lines[..], [sent, back] if sent == back),
        "sums of what was sent and what came back: {sums}"
    );
    echo.wait()?.ok()?;
    pod.end()?;
    plug.end()
}
