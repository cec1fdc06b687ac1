//! The network of pods of CRI.

use bulkhead_cri::{Cri, DnsConfig, PortMapping, forward::Forwarded};
use bulkhead_harness::{
    Context, Image, Outcome, Suite, Test, ensure, ensure_eq,
    network::{OUTSIDE, OUTSIDE_ADDRESS},
    runner::{ANY, MACHINES},
    test,
};

use crate::{cri, network::until};

const IMAGES: &[Image] = &[Image::Pause, Image::Net];

/// The cases of this group.
pub const TESTS: &[Test] = &[
    test!(
        cri::network::containers_of_a_pod_share_localhost_and_names,
        IMAGES,
        ANY
    )
    .cri()
    .fast_host(),
    test!(
        cri::network::pods_talk_and_a_host_port_leads_in,
        IMAGES,
        ANY
    )
    .cri()
    .fast_host(),
    test!(
        cri::network::port_forward_of_containerd_reaches_localhost,
        IMAGES,
        ANY
    )
    .cri()
    .fast_host(),
    test!(
        cri::network::pod_on_the_hosts_network_is_refused,
        IMAGES,
        MACHINES
    )
    .cri()
    .fast_host(),
];

const SERVER: &[&str] = &["nginx"];
const CLIENT: &[&str] = &["sleep", "1000000"];

fn containers_of_a_pod_share_localhost_and_names(suite: &Suite) -> Outcome {
    let cri = Cri::connect(suite, IMAGES)?;
    let mut config = cri.config("shared");
    config.dns_config = Some(DnsConfig {
        servers: vec!["10.88.0.1".into()],
        searches: vec!["cluster.test".into()],
        ..Default::default()
    });
    let pod = cri.run(config)?;
    let server = pod.start("server", Image::Net, SERVER)?;
    let client = pod.start("client", Image::Net, CLIENT)?;
    for to in ["http://localhost/", "http://127.0.0.1/", "http://[::1]/"] {
        until(suite.scale.seconds(10), to, || {
            let said = pod.exec(&client, &["curl", "-s", "-m", "5", to])?;
            Ok(said.stdout == "hello from nginx")
        })?;
    }
    let said = pod.exec(&client, &["cat", "/etc/resolv.conf", "/etc/hostname"])?;
    ensure_eq!(
        "resolv.conf and hostname",
        said.stdout,
        "search cluster.test\nnameserver 10.88.0.1\nshared"
    );
    let said = pod.exec(&client, &["ip", "-o", "address", "show", "dev", "eth0"])?;
    for address in pod.addresses()? {
        let stdout = &said.stdout;
        ensure!(stdout.contains(&address), "no {address} in {stdout}");
    }
    let said = pod.exec(&client, &["sh", "-c", "echo no >&2; exit 3"])?;
    ensure_eq!(
        "an exec's end",
        (said.code, said.stderr.as_str()),
        (3, "no")
    );
    pod.remove(&client)?;
    pod.remove(&server)?;
    pod.end()
}

fn pods_talk_and_a_host_port_leads_in(suite: &Suite) -> Outcome {
    let cri = Cri::connect(suite, IMAGES)?;
    let network = suite.network()?;
    let mut config = cri.config("server");
    config.port_mappings = vec![PortMapping {
        container_port: 80,
        host_port: 8081,
        ..Default::default()
    }];
    let one = cri.run(config)?;
    one.start("server", Image::Net, SERVER)?;
    let two = cri.run(cri.config("client"))?;
    let client = two.start("client", Image::Net, CLIENT)?;
    let mine = two.addresses()?;
    for (to, from) in one.addresses()?.iter().zip(&mine) {
        let to = match to.contains(':') {
            true => format!("http://[{to}]/who"),
            false => format!("http://{to}/who"),
        };
        until(suite.scale.seconds(10), &to, || {
            let said = two.exec(&client, &["curl", "-s", "-m", "5", &to])?;
            Ok(said.stdout == *from)
        })?;
    }
    let url = "http://192.0.2.1:8081/who";
    let curl = network.tool_at(OUTSIDE, &["curl", "-s", "-m", "10", url]);
    let seen = curl.output()?.ok()?.text();
    ensure_eq!("the client from outside", seen, OUTSIDE_ADDRESS.0);
    let stats = cri.received()?;
    let bytes = stats.iter().find(|(id, _)| id == one.id());
    let (_, bytes) = bytes.context(format_args!("no network in the pod's stats: {stats:?}"))?;
    ensure!(*bytes > 500, "the pod received {bytes} bytes");
    // As kubelet does it with a pod that is deleted: whatever it has is stopped with it.
    one.end()?;
    two.end()
}

fn port_forward_of_containerd_reaches_localhost(suite: &Suite) -> Outcome {
    let cri = Cri::connect(suite, IMAGES)?;
    let pod = cri.run(cri.config("forwarded"))?;
    let echo = [
        "socat",
        "TCP4-LISTEN:7000,bind=127.0.0.1,reuseaddr,fork",
        "EXEC:cat",
    ];
    pod.start("echo", Image::Net, &echo)?;
    let limit = suite.scale.seconds(5);
    let mut last = String::new();
    let end = until(suite.scale.seconds(15), "the port answers", || {
        let url = pod.forward(7000)?;
        let mut port = Forwarded::dial(suite.network()?.pid(), &url, limit)?;
        port.send(b"there and back")?;
        match port.wait_for("there and back") {
            Ok(_) => Ok(true),
            Err(error) => {
                last = error.to_string();
                Ok(false)
            }
        }
    });
    end.map_err(|error| format!("{error}: {last}"))?;
    pod.end()
}

fn pod_on_the_hosts_network_is_refused(suite: &Suite) -> Outcome {
    let cri = Cri::connect(suite, IMAGES)?;
    let refused = cri.run(Cri::on_host_network(cri.config("host")));
    let Err(error) = refused else {
        return Err("a pod on the host's network runs".into());
    };
    let error = error.to_string();
    ensure!(error.contains("network"), "the reason is not told: {error}");
    Ok(())
}
