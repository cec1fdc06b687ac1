//! Each test has a network namespace of its own in the role of the guest's first one, with veth ends as slots.

use std::process::Command;

use bulkhead_protocol::agent::{self, SetNetworkRequest};

use super::*;
use crate::sys;

struct Guest {
    network: Network,
}

fn ip(arguments: &str) -> String {
    let output = Command::new("ip")
        .args(arguments.split_whitespace())
        .output()
        .unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "ip {arguments}: {errors}");
    String::from_utf8(output.stdout).unwrap()
}

fn slot(number: u8) -> String {
    format!("02:62:6b:00:00:{number:02x}")
}

/// Runs a test in a thread that has a network namespace with so many slots.
fn guest(slots: u8, test: fn(Guest)) {
    let thread = std::thread::spawn(move || {
        sys::unshare(rustix::thread::UnshareFlags::NEWNET).unwrap();
        for number in 0..slots {
            let mac = slot(number);
            ip(&format!(
                "link add eth{number} address {mac} type veth peer name host{number}"
            ));
            ip(&format!("link set host{number} up"));
        }
        let network = Network::new(Namespace::new().unwrap()).unwrap();
        test(Guest { network });
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

impl Guest {
    fn apply(&mut self, request: &SetNetworkRequest) -> std::result::Result<(), String> {
        let wanted = Wanted::parse(request).map_err(|error| error.text())?;
        self.network.apply(&wanted).map_err(|error| error.text())
    }

    fn inside(&self, arguments: &str) -> String {
        let run = || Ok(ip(arguments));
        self.network.namespace().within(run).unwrap()
    }

    /// Names of the interfaces in the pod.
    fn names(&self) -> Vec<String> {
        let text = self.inside("-o link");
        let name = |line: &str| {
            let name = line.split(": ").nth(1).unwrap();
            name.split('@').next().unwrap().to_string()
        };
        let mut names: Vec<_> = text.lines().map(name).collect();
        names.sort();
        names
    }
}

fn interface(number: u8, name: &str, addresses: &[&str]) -> agent::Interface {
    let address = |address: &&str| agent::Address {
        address: (*address).into(),
        scope: if address.starts_with("fe80") { 253 } else { 0 },
        ..Default::default()
    };
    agent::Interface {
        slot_mac: slot(number),
        name: name.into(),
        mac: format!("0a:58:0a:00:00:{number:02x}"),
        mtu: 1450,
        up: true,
        addresses: addresses.iter().map(address).collect(),
        ..Default::default()
    }
}

fn route(interface: &str, destination: &str, gateway: &str) -> agent::Route {
    agent::Route {
        destination: destination.into(),
        gateway: gateway.into(),
        interface: interface.into(),
        scope: if gateway.is_empty() { 253 } else { 0 },
        ..Default::default()
    }
}

/// What a bridge of CNI gives.
fn bridged() -> SetNetworkRequest {
    SetNetworkRequest {
        interfaces: vec![interface(
            0,
            "eth0",
            &["10.0.0.2/24", "fd00::2/64", "fe80::858:aff:fe00:0/64"],
        )],
        // The default route first: the agent finds the order itself.
        routes: vec![
            route("eth0", "", "10.0.0.1"),
            route("eth0", "10.0.0.0/24", ""),
            route("eth0", "", "fd00::1"),
            route("eth0", "fd00::/64", ""),
            route("eth0", "fe80::/64", ""),
        ],
        neighbours: vec![agent::Neighbour {
            ip: "10.0.0.1".into(),
            mac: "02:00:00:00:00:99".into(),
            interface: "eth0".into(),
            ..Default::default()
        }],
        ..Default::default()
    }
}

#[test]
fn a_pod_has_what_the_request_says_and_nothing_else() {
    guest(2, |mut guest| {
        guest.apply(&bridged()).unwrap();
        assert_eq!(guest.names(), ["eth0", "lo"]);
        let link = guest.inside("link show eth0");
        assert!(link.contains("0a:58:0a:00:00:00"), "{link}");
        assert!(link.contains("mtu 1450"), "{link}");
        assert!(link.contains(",UP"), "{link}");
        let addresses = guest.inside("-o addr show eth0");
        for address in [
            "10.0.0.2/24",
            "fd00::2/64 scope global nodad",
            "fe80::858:aff:fe00:0/64 scope link nodad",
        ] {
            assert!(addresses.contains(address), "{address}: {addresses}");
        }
        assert_eq!(addresses.lines().count(), 3, "{addresses}");
        assert!(!addresses.contains("tentative"), "{addresses}");
        let routes = guest.inside("route");
        assert!(routes.contains("default via 10.0.0.1 dev eth0"), "{routes}");
        assert!(
            routes.contains("10.0.0.0/24 dev eth0 scope link"),
            "{routes}"
        );
        assert_eq!(routes.lines().count(), 2, "{routes}");
        let routes = guest.inside("-6 route");
        assert!(routes.contains("default via fd00::1 dev eth0"), "{routes}");
        assert_eq!(routes.lines().count(), 3, "{routes}");
        let neighbours = guest.inside("neigh show nud permanent");
        assert!(neighbours.contains("10.0.0.1 dev eth0 lladdr 02:00:00:00:00:99"));
        let loopback = guest.inside("addr show lo");
        assert!(loopback.contains("127.0.0.1/8") && loopback.contains("UP"));
        // The slot that nobody asked for stays outside.
        assert!(ip("-o link").contains("eth1"));
    });
}

#[test]
fn the_same_state_twice_changes_nothing() {
    guest(1, |mut guest| {
        guest.apply(&bridged()).unwrap();
        let all = |guest: &Guest| {
            ["-o addr", "route", "-6 route", "neigh show nud permanent"]
                .map(|what| guest.inside(what))
        };
        let before = all(&guest);
        guest.apply(&bridged()).unwrap();
        assert_eq!(all(&guest), before);
    });
}

#[test]
fn what_the_next_state_lacks_goes_away_and_the_pods_own_stays() {
    guest(2, |mut guest| {
        let mut request = bridged();
        request
            .interfaces
            .push(interface(1, "net1", &["10.1.0.2/24"]));
        request.routes.push(route("net1", "10.1.0.0/24", ""));
        guest.apply(&request).unwrap();
        assert_eq!(guest.names(), ["eth0", "lo", "net1"]);
        guest.inside("addr add 192.168.7.7/24 dev eth0");
        guest.inside("route add 172.16.0.0/12 via 10.0.0.9");

        request.interfaces[0].addresses.truncate(1);
        request.interfaces.pop();
        request.routes.truncate(2);
        request.neighbours.clear();
        guest.apply(&request).unwrap();
        assert_eq!(guest.names(), ["eth0", "lo"]);
        let addresses = guest.inside("-o addr show eth0");
        assert_eq!(addresses.lines().count(), 2, "{addresses}");
        assert!(addresses.contains("192.168.7.7"), "{addresses}");
        let routes = guest.inside("route");
        assert!(routes.contains("172.16.0.0/12 via 10.0.0.9"), "{routes}");
        assert!(!routes.contains("10.1.0.0"), "{routes}");
        assert_eq!(guest.inside("-6 route"), "");
        assert_eq!(guest.inside("neigh show nud permanent"), "");
        // The slot is free again: it can be another interface.
        let free = ip("-o link");
        assert!(free.contains(&slot(1)), "{free}");
        request
            .interfaces
            .push(interface(1, "eth7", &["10.2.0.2/24"]));
        guest.apply(&request).unwrap();
        assert_eq!(guest.names(), ["eth0", "eth7", "lo"]);

        guest.apply(&SetNetworkRequest::default()).unwrap();
        assert_eq!(guest.names(), ["lo"]);
    });
}

#[test]
fn interfaces_exchange_their_names() {
    guest(2, |mut guest| {
        let first = interface(0, "eth0", &["10.0.0.2/24"]);
        let second = interface(1, "eth1", &["10.1.0.2/24"]);
        let mut request = SetNetworkRequest {
            interfaces: vec![first, second],
            routes: vec![
                route("eth0", "10.0.0.0/24", ""),
                route("eth1", "10.1.0.0/24", ""),
            ],
            ..Default::default()
        };
        guest.apply(&request).unwrap();
        request.interfaces[0].name = "eth1".into();
        request.interfaces[1].name = "eth0".into();
        request.routes[0].interface = "eth1".into();
        request.routes[1].interface = "eth0".into();
        guest.apply(&request).unwrap();
        assert_eq!(guest.names(), ["eth0", "eth1", "lo"]);
        assert!(guest.inside("addr show eth1").contains("10.0.0.2/24"));
        let routes = guest.inside("route");
        assert!(routes.contains("10.0.0.0/24 dev eth1"), "{routes}");
        assert!(routes.contains("10.1.0.0/24 dev eth0"), "{routes}");
    });
}

#[test]
fn routes_of_every_kind_are_set() {
    guest(2, |mut guest| {
        let mut request = SetNetworkRequest {
            // As the ptp plugin leaves it: a route to the gateway, and the network by it.
            interfaces: vec![
                interface(0, "eth0", &["10.0.0.2/24", "fd00::2/64"]),
                interface(1, "eth1", &["10.0.0.3/24"]),
            ],
            routes: vec![
                route("eth0", "10.0.0.1/32", ""),
                route("eth0", "10.0.0.0/24", "10.0.0.1"),
                // A second interface on the same network.
                route("eth1", "10.0.0.0/24", ""),
                route("eth0", "", "169.254.1.1"),
                route("eth0", "10.9.0.0/16", "fd00::9"),
                route("eth0", "10.8.0.0/16", "10.0.0.1"),
                route("", "10.7.0.0/16", ""),
                route("", "fd07::/16", ""),
                route("eth0", "fd00::/64", ""),
            ],
            ..Default::default()
        };
        request.routes[0].source = "10.0.0.2".into();
        request.routes[3].onlink = true;
        request.routes[5].metric = 77;
        request.routes[5].mtu = 1300;
        request.routes[6].type_ = 6;
        (request.routes[6].scope, request.routes[7].scope) = (0, 0);
        request.routes[7].type_ = 7;
        guest.apply(&request).unwrap();
        guest.apply(&request).unwrap();
        let routes = guest.inside("route");
        for route in [
            "default via 169.254.1.1 dev eth0 onlink",
            "10.0.0.0/24 via 10.0.0.1 dev eth0",
            "10.0.0.0/24 dev eth1 scope link",
            "10.0.0.1 dev eth0 scope link src 10.0.0.2",
            "10.9.0.0/16 via inet6 fd00::9 dev eth0",
            "10.8.0.0/16 via 10.0.0.1 dev eth0 metric 77 mtu 1300",
            "blackhole 10.7.0.0/16",
        ] {
            assert!(routes.contains(route), "{route}: {routes}");
        }
        assert_eq!(routes.lines().count(), 7, "{routes}");
        assert!(guest.inside("-6 route").contains("unreachable fd07::/16"));
        request.routes.clear();
        guest.apply(&request).unwrap();
        assert_eq!(guest.inside("route"), "");
        assert_eq!(guest.inside("-6 route"), "");
    });
}

#[test]
fn an_interface_that_is_down_comes_up_with_its_routes() {
    guest(1, |mut guest| {
        let mut request = bridged();
        request.interfaces[0].up = false;
        guest.apply(&request).unwrap();
        assert!(!guest.inside("link show eth0").contains(",UP"));
        assert_eq!(guest.inside("route"), "");
        request.interfaces[0].up = true;
        guest.apply(&request).unwrap();
        assert_eq!(guest.inside("route").lines().count(), 2);
        assert_eq!(
            guest.inside("-6 addr show eth0").matches("inet6").count(),
            2
        );
        request.interfaces[0].up = false;
        guest.apply(&request).unwrap();
        assert_eq!(guest.inside("route"), "");
    });
}

#[test]
fn errors_name_the_interface_and_what_was_tried() {
    guest(1, |mut guest| {
        let mut request = bridged();
        request.interfaces[0].slot_mac = slot(9);
        let error = guest.apply(&request).unwrap_err();
        assert!(error.contains("interface eth0: a free slot with MAC 02:62:6b:00:00:09"));

        let mut request = bridged();
        request
            .routes
            .push(route("eth0", "10.5.0.0/16", "172.16.0.1"));
        let error = guest.apply(&request).unwrap_err();
        let expected = "interface eth0: set route 10.5.0.0/16 via 172.16.0.1: ";
        assert!(error.starts_with(expected), "{error}");
        // What was set until then is taken back by the next call.
        guest.apply(&SetNetworkRequest::default()).unwrap();
        assert_eq!(guest.names(), ["lo"]);

        guest.inside("link add eth0 type veth peer name other");
        let error = guest.apply(&bridged()).unwrap_err();
        assert!(error.starts_with("interface eth0: bring slot"), "{error}");
        assert!(error.ends_with("exists"), "{error}");
    });
}

#[test]
fn an_interface_that_the_pod_removed_is_no_reason_to_fail_for_the_others() {
    guest(2, |mut guest| {
        let mut request = bridged();
        request
            .interfaces
            .push(interface(1, "eth1", &["10.1.0.2/24"]));
        guest.apply(&request).unwrap();
        guest.inside("link del eth1");
        request.interfaces.pop();
        guest.apply(&request).unwrap();
        assert_eq!(guest.names(), ["eth0", "lo"]);
    });
}

#[test]
fn the_network_of_the_first_container_becomes_the_pods_with_all_that_was_set() {
    guest(1, |_| {
        let pod = crate::network::PodNetwork::default();
        pod.set(&bridged()).unwrap();
        let mut container = Command::new("unshare")
            .args(["--net", "--map-root-user", "sleep", "30"])
            .spawn()
            .unwrap();
        std::thread::sleep(std::time::Duration::from_millis(500));
        let adopted = pod.adopt(container.id());
        let inside = Namespace::of_process(container.id()).unwrap();
        let addresses = inside.within(|| Ok(ip("-o addr show eth0"))).unwrap();
        let again = pod.adopt(container.id()).is_err();
        container.kill().unwrap();
        container.wait().unwrap();
        adopted.unwrap();
        assert!(addresses.contains("10.0.0.2/24"), "{addresses}");
        assert!(again && !pod.is_unused());
    });
}
