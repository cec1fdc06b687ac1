//! Throughput, requests a second and latency between a pod and a neighbour on its bridge. With the engine `kvm`, Bulkhead
//! stands twice where the host has vhost-net: with it, and without.

use std::path::Path;

use bulkhead_harness::{
    Engine, Image, Invocation, Pod, Suite,
    command::Running,
    ensure,
    failure::{Context, Outcome, skip},
    network::{LAN, Network, Plug},
};
use serde_json::Value;

use crate::{
    Plan,
    figure::{Figure, measure},
    subject::{RUNC, RUNC_AGAIN, Subject},
};

const VHOST: &str = "/dev/vhost-net";

/// A pod that serves.
struct Server<'a> {
    subject: Subject,
    plug: Plug<'a>,
    pod: Pod<'a>,
    iperf: Running,
}

/// `network::*`.
pub fn figures(suite: &Suite, plan: &Plan) -> Outcome<Vec<Figure>> {
    let ids = [
        "network::in",
        "network::out",
        "network::requests",
        "network::latency",
    ];
    if !ids.iter().any(|id| plan.wants(id)) {
        return Ok(Vec::new());
    }
    let suite = suite.networked()?;
    suite.import(Image::Net)?;
    let network = suite.network()?;
    let mut subjects = vec![RUNC, RUNC_AGAIN, Subject::bulkhead(suite.engine)];
    if suite.engine == Engine::Kvm && Path::new(VHOST).exists() {
        subjects.push(Subject::without_vhost());
    }
    let servers: Vec<Server<'_>> = subjects
        .iter()
        .map(|&subject| Server::start(suite, network, subject))
        .collect::<Outcome<_>>()?;
    let server = |subject| {
        let found = servers.iter().find(|server| server.subject == subject);
        found.context("no pod of it")
    };
    let rounds = plan.rounds.div_ceil(3);
    let seconds = if suite.scale.pods_are_cheap() {
        "2"
    } else {
        "5"
    };
    let throughput = |id: &str, title: &str| Figure::new(id, title, "Mbit/s").more_is_better();
    let mut found = measure(
        [
            throughput(
                "network::in",
                "TCP from a neighbour on the bridge into the pod (iperf3)",
            ),
            throughput(
                "network::out",
                "TCP from the pod to a neighbour on the bridge (iperf3)",
            ),
        ],
        rounds,
        &subjects,
        |subject| {
            let to = server(subject)?.plug.v4()?;
            let client = |more: &[&str]| {
                let words = [&["iperf3", "-J", "-c", &to, "-t", seconds][..], more].concat();
                megabits(network.tool_at(LAN, &words).limit(suite.scale.seconds(30)))
            };
            Ok([client(&[])?, client(&["-R"])?])
        },
    );
    let count = if suite.scale.pods_are_cheap() {
        "3000"
    } else {
        "300"
    };
    found.extend(measure(
        [
            Figure::new(
                "network::requests",
                "HTTP requests to nginx in the pod, 50 at once, a connection each (ab)",
                "1/s",
            )
            .more_is_better(),
            Figure::new(
                "network::latency",
                "an HTTP request to nginx in the pod on an open connection, one after another (ab)",
                "ms",
            ),
        ],
        rounds,
        &subjects,
        |subject| {
            let url = format!("http://{}/", server(subject)?.plug.v4()?);
            let ab = |more: &[&str]| {
                let words = [&["ab", "-q", "-n", count][..], more, &[&url]].concat();
                network.tool_at(LAN, &words).limit(suite.scale.seconds(60))
            };
            Ok([
                value(ab(&["-c", "50"]), "Requests per second:")?,
                value(ab(&["-c", "1", "-k"]), "Time per request:")?,
            ])
        },
    ));
    for server in servers {
        drop(server.iperf);
        server.pod.end()?;
        server.plug.end()?;
    }
    Ok(found)
}

impl<'a> Server<'a> {
    fn start(suite: &'a Suite, network: &'a Network, subject: Subject) -> Outcome<Self> {
        let plug = network.pod()?;
        // What a shim opens when its pod starts; only the suite's own mount namespace sees it covered.
        let covered = subject == Subject::without_vhost();
        if covered {
            network
                .host(&["mount", "--bind", "/dev/null", VHOST])
                .output()?
                .ok()?;
        }
        let [flag, path] = plug.flag();
        let run = subject.run(suite, Image::Net).flag(flag).flag(path);
        let started = run.args(&["nginx"]).detach();
        if covered {
            network.host(&["umount", VHOST]).output()?.ok()?;
        }
        let pod = started?;
        let exec = pod.exec(&["iperf3", "-s", "--forceflush"]);
        let iperf = exec.seconds(24 * 3600).spawn()?;
        iperf.wait_for("Server listening", suite.scale.seconds(20))?;
        Ok(Self {
            subject,
            plug,
            pod,
            iperf,
        })
    }
}

/// What the receiver counted.
fn megabits(client: Invocation) -> Outcome<f64> {
    let report = client.output()?.ok()?.text();
    let report: Value = serde_json::from_str(&report).context("iperf3's report")?;
    let bits = report["end"]["sum_received"]["bits_per_second"].as_f64();
    Ok(bits.context("iperf3 says no rate")? / 1e6)
}

/// A value of ab's report, of a run in which every request was answered.
fn value(ab: Invocation, key: &str) -> Outcome<f64> {
    let report = ab.output()?.ok()?.text();
    let of = |key: &str| {
        let line = report.lines().find_map(|line| line.strip_prefix(key))?;
        line.split_whitespace().next()?.parse::<f64>().ok()
    };
    ensure!(
        of("Failed requests:") == Some(0.0),
        "requests failed: {report}"
    );
    match of(key) {
        Some(value) => Ok(value),
        None => skip(format!("ab says no {key:?}")),
    }
}
