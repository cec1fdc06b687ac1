//! Against this machine's kernel, in namespaces of the tests' own; the VMM is a thread that keeps the taps it is given.

use std::{
    io::{Read, Write},
    mem::MaybeUninit,
    os::fd::{AsFd, OwnedFd},
    process::Command,
    sync::{Arc, Mutex, PoisonError, mpsc},
    thread,
};

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use serde_json::Value;

use super::*;

/// Runs `script` in the namespace and gives back what it printed.
fn sh(namespace: &Namespace, script: &str) -> String {
    let output = namespace
        .run(|| Command::new("/bin/sh").args(["-ec", script]).output())
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{script}: {text}{errors}");
    text
}

type Taps = Arc<Mutex<Vec<(String, Value, Vec<OwnedFd>)>>>;

/// Answers at `control.sock` as the VMM does; slot, request and descriptors of what is attached.
fn vmm(dir: &Path) -> Taps {
    let listener = std::os::unix::net::UnixListener::bind(dir.join("control.sock")).unwrap();
    let taps = Taps::default();
    let kept = taps.clone();
    thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        loop {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(32))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let mut buffer = [0; 1000];
            let mut iov = [io::IoSliceMut::new(&mut buffer)];
            let got = recvmsg(&stream, &mut iov, &mut control, RecvFlags::CMSG_CLOEXEC).unwrap();
            if got.bytes == 0 {
                return;
            }
            let mut fds = Vec::new();
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(list) = message {
                    fds.extend(list);
                }
            }
            let request: Value = serde_json::from_slice(&buffer[..got.bytes]).unwrap();
            let slot = request["slot"].as_str().unwrap().to_owned();
            let mut taps = kept.lock().unwrap_or_else(PoisonError::into_inner);
            taps.retain(|(id, ..)| *id != slot);
            if request["op"] == "attach-net" {
                taps.push((slot, request, fds));
            }
            writeln!(&stream, "{{\"ok\":{{}}}}").unwrap();
        }
    });
    taps
}

/// A namespace that outlives the pod: it has a path.
struct Kept {
    _dir: tempfile::TempDir,
    thread: Option<(mpsc::Sender<()>, thread::JoinHandle<()>)>,
    path: PathBuf,
}

impl Kept {
    /// Held by a thread; its path is the thread's, which is as good as a mount.
    fn new() -> Self {
        let (stop, stopped) = mpsc::channel();
        let (tell, told) = mpsc::channel();
        let thread = thread::spawn(move || {
            // SAFETY: CLONE_NEWNET does not part descriptors.
            unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) }
                .unwrap();
            let tid = rustix::thread::gettid().as_raw_nonzero();
            tell.send(format!("/proc/self/task/{tid}/ns/net")).unwrap();
            let _ = stopped.recv();
        });
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("net");
        std::os::unix::fs::symlink(told.recv().unwrap(), &path).unwrap();
        Self {
            _dir: dir,
            thread: Some((stop, thread)),
            path,
        }
    }

    fn open(&self) -> Namespace {
        Namespace::open(&self.path).unwrap()
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        if let Some((stop, thread)) = self.thread.take() {
            drop(stop);
            let _ = thread.join();
        }
    }
}

struct Pod {
    dir: tempfile::TempDir,
    taps: Taps,
    network: Arc<Network>,
}

fn pod(namespace: Namespace, vcpus: u64) -> Result<Pod, Error> {
    let dir = tempfile::tempdir().unwrap();
    let taps = vmm(dir.path());
    let control = control::Client::new(dir.path().join("control.sock"));
    let network = Network::new(namespace, dir.path(), control, Engine::Kvm, vcpus)?;
    Ok(Pod { dir, taps, network })
}

impl Pod {
    /// What the agent would be told.
    fn plug(&self) -> (SetNetworkRequest, Option<Error>) {
        let mut served = self.network.served.try_lock().unwrap();
        served.failed.clear();
        self.network.plug(&mut served).unwrap()
    }

    fn attached(&self) -> Vec<String> {
        let taps = self.taps.lock().unwrap();
        let mut all: Vec<String> = taps
            .iter()
            .map(|(slot, request, fds)| {
                let vhost = request["vhost"].as_u64().unwrap() as usize;
                format!(
                    "{slot} {} {}",
                    request["mac"].as_str().unwrap(),
                    fds.len() - vhost
                )
            })
            .collect();
        all.sort();
        all
    }
}

const ETH0: &str = "ip link add eth0 address 02:00:00:00:00:11 mtu 9000 type veth peer name out0
    ip addr add 10.9.0.2/24 dev eth0; ip -6 addr add fd09::2/64 dev eth0 nodad
    ip link set out0 up; ip link set eth0 up; ip route add default via 10.9.0.1
    ip -6 route add default via fd09::1 metric 7; ip route add blackhole 10.77.0.0/16
    ip route add 10.8.0.1/32 dev eth0 scope link mtu 1400
    ip neigh add 10.9.0.9 lladdr 02:00:00:00:00:99 dev eth0 nud permanent
    ip link set out0 netns $OUT";

/// Plugs a cable into `namespace`, as CNI does; the other end is in the namespace that is given back.
fn plug_in(namespace: &Namespace, script: &str) -> Namespace {
    let outside = Namespace::fresh().unwrap();
    let fd = rustix::io::dup(outside.as_fd()).unwrap();
    rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::empty()).unwrap();
    let fd = std::os::fd::AsRawFd::as_raw_fd(&fd);
    let script = script.replace("$OUT", &format!("/proc/$$/fd/{fd}"));
    // `ip` opens it by the shell's number, which inherits it.
    sh(namespace, &script);
    outside
}

#[test]
fn an_interface_of_the_namespace_is_told_with_all_that_it_has() {
    let namespace = Namespace::fresh().unwrap();
    let pod = pod(namespace, 1).unwrap();
    let (request, failure) = pod.plug();
    assert_eq!(
        (request, failure.is_none()),
        (SetNetworkRequest::new(), true)
    );
    let _outside = plug_in(pod.network.namespace(), ETH0);
    let (request, failure) = pod.plug();
    assert!(failure.is_none(), "{failure:?}");
    assert_eq!(pod.attached(), ["n0 02:00:00:00:00:11 1"]);
    let [eth0] = request.interfaces.as_slice() else {
        panic!("{request:?}")
    };
    assert_eq!(
        (
            eth0.slot_mac.as_str(),
            eth0.name.as_str(),
            eth0.mac.as_str(),
            eth0.mtu,
            eth0.up
        ),
        ("02:62:6b:00:00:00", "eth0", "02:00:00:00:00:11", 9000, true)
    );
    let addresses: Vec<_> = eth0.addresses.iter().map(|a| a.address.as_str()).collect();
    assert!(
        addresses.contains(&"10.9.0.2/24") && addresses.contains(&"fd09::2/64"),
        "{addresses:?}"
    );
    assert!(eth0.addresses.iter().all(|a| a.peer.is_empty()));
    let routes: Vec<_> = request
        .routes
        .iter()
        .map(|r| {
            format!(
                "{} {} {} {} {}",
                r.destination, r.gateway, r.interface, r.type_, r.mtu
            )
        })
        .collect();
    for wanted in [
        " 10.9.0.1 eth0 1 0",
        " fd09::1 eth0 1 0",
        "10.77.0.0/16   6 0",
        "10.8.0.1/32  eth0 1 1400",
        "10.9.0.0/24  eth0 1 0",
        "fd09::/64  eth0 1 0",
    ] {
        assert!(
            routes.iter().any(|r| r == wanted),
            "{wanted:?} in {routes:?}"
        );
    }
    assert!(
        !routes
            .iter()
            .any(|r| r.contains("ff00") || r.contains("127.")),
        "{routes:?}"
    );
    let [neighbour] = request.neighbours.as_slice() else {
        panic!("{request:?}")
    };
    assert_eq!(
        (neighbour.ip.as_str(), neighbour.mac.as_str()),
        ("10.9.0.9", "02:00:00:00:00:99")
    );
    // Nothing new is the same request, and our own tap is no interface of the guest.
    assert_eq!(pod.plug().0, request);
}

#[test]
fn frames_pass_both_ways_and_a_forged_source_does_not() {
    let pod = pod(Namespace::fresh().unwrap(), 1).unwrap();
    let outside = plug_in(pod.network.namespace(), ETH0);
    sh(
        &outside,
        "ip link set out0 up; ip neigh add 10.9.0.2 lladdr 02:00:00:00:00:11 dev out0; ip addr add 10.9.0.1/24 dev out0",
    );
    assert!(pod.plug().1.is_none());
    let fd = pod.taps.lock().unwrap()[0].2.remove(0);
    let mut tap = std::fs::File::from(fd);
    let receive = |tap: &mut std::fs::File, wanted: &[u8]| {
        let end = std::time::Instant::now() + Duration::from_secs(3);
        let mut frame = [0; 4096];
        while std::time::Instant::now() < end {
            match tap.read(&mut frame) {
                Ok(n) if frame[..n].windows(wanted.len()).any(|w| w == wanted) => return true,
                Ok(_) => {}
                Err(_) => thread::sleep(Duration::from_millis(5)),
            }
        }
        false
    };
    outside
        .run(|| {
            let socket = std::net::UdpSocket::bind("10.9.0.1:7000")?;
            socket.send_to(b"towards the guest", "10.9.0.2:7001")?;
            Ok(())
        })
        .unwrap();
    assert!(receive(&mut tap, b"towards the guest"));
    // ARP requests of the guest for 10.9.0.1: a virtio-net header of zeroes, then the frame. Who gets one remembers its sender.
    let ask = |mac: [u8; 6], ip: [u8; 4]| {
        let mut frame = vec![0; 10];
        frame.extend([0xff; 6]);
        frame.extend(mac);
        frame.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
        frame.extend(mac);
        frame.extend(ip);
        frame.extend([0; 6]);
        frame.extend([10, 9, 0, 1]);
        frame
    };
    tap.write_all(&ask([2, 0, 0, 0, 0, 0x12], [10, 9, 0, 77]))
        .unwrap();
    tap.write_all(&ask([2, 0, 0, 0, 0, 0x11], [10, 9, 0, 78]))
        .unwrap();
    assert!(receive(&mut tap, &[8, 0, 6, 4, 0, 2]), "no answer");
    let known = sh(&outside, "ip neigh show dev out0");
    assert!(
        known.contains("10.9.0.78") && !known.contains("10.9.0.77"),
        "{known}"
    );
}

#[test]
fn interfaces_that_come_go_and_change_are_followed() {
    let pod = pod(Namespace::fresh().unwrap(), 2).unwrap();
    let namespace = pod.network.namespace();
    let _outside = plug_in(namespace, ETH0);
    pod.plug();
    assert_eq!(pod.attached(), ["n0 02:00:00:00:00:11 2"]);
    sh(
        namespace,
        "ip link add net1 address 02:00:00:00:00:12 type veth peer name out1; ip link set out1 down",
    );
    let (request, _) = pod.plug();
    // The other end is an interface of the namespace like any.
    assert_eq!(request.interfaces.len(), 3);
    sh(namespace, "ip link set eth0 mtu 1400; ip link del net1");
    let (request, _) = pod.plug();
    assert_eq!(pod.attached(), ["n0 02:00:00:00:00:11 2"]);
    assert_eq!(request.interfaces[0].mtu, 1400);
    assert!(sh(namespace, "ip link show dev bhtap0").contains("mtu 1400"));
    sh(
        namespace,
        "ip link set eth0 down; ip link set eth0 address 02:00:00:00:00:13 name lan; ip link set lan up",
    );
    let (request, failure) = pod.plug();
    assert!(failure.is_none(), "{failure:?}");
    assert_eq!(pod.attached(), ["n0 02:00:00:00:00:13 2"]);
    assert_eq!(request.interfaces[0].name, "lan");
    sh(namespace, "ip link del lan");
    let (request, _) = pod.plug();
    assert!(request.interfaces.is_empty() && pod.attached().is_empty());
    assert!(!sh(namespace, "ip link").contains("bhtap"));
}

#[test]
fn an_interface_that_lost_its_redirect_gets_another() {
    let pod = pod(Namespace::fresh().unwrap(), 1).unwrap();
    let namespace = pod.network.namespace();
    let _outside = plug_in(namespace, ETH0);
    pod.plug();
    assert!(traces(namespace).contains("mirred"));
    let of_guest = |namespace| sh(namespace, "tc filter show dev bhtap0 ingress");
    let (ours, rest) = (0x6268, 0x6269);
    for tool in [
        "tc qdisc del dev eth0 ingress".into(),
        format!("tc filter del dev eth0 ingress pref {ours}"),
        format!("tc filter del dev bhtap0 ingress pref {ours}"),
        format!("tc filter del dev bhtap0 ingress pref {rest}"),
    ] {
        sh(namespace, &tool);
        let (request, failure) = pod.plug();
        assert!(failure.is_none(), "{tool}: {failure:?}");
        assert_eq!(request.interfaces.len(), 1, "{tool}");
        assert_eq!(pod.attached(), ["n0 02:00:00:00:00:11 1"], "{tool}");
        assert!(traces(namespace).contains("mirred"), "{tool}");
        let filters = of_guest(namespace);
        for priority in [ours, rest] {
            assert!(
                filters.contains(&format!("pref {priority} ")),
                "{tool}: {filters}"
            );
        }
    }
}

#[test]
fn a_resolver_in_the_namespace_hears_its_servers_and_the_guest_hears_its_own() {
    let pod = pod(Namespace::fresh().unwrap(), 1).unwrap();
    let namespace = pod.network.namespace();
    let outside = plug_in(namespace, ETH0);
    sh(
        &outside,
        "ip link set out0 up; ip addr add 10.9.0.1/24 dev out0; ip -6 addr add fd09::1/64 dev out0 nodad",
    );
    let sleep = || Command::new("sleep").arg("100").spawn();
    let mut vmm = namespace.run(sleep).unwrap();
    pod.network.set_vmm(vmm.id());
    assert!(!pod.plug().0.resolver);
    let before = sh(namespace, "tc filter show dev eth0 ingress");
    let _docker = namespace.run(|| std::net::UdpSocket::bind("127.0.0.11:0"));
    for _ in 0..2 {
        assert!(pod.plug().0.resolver);
    }
    let limit = Some(Duration::from_secs(3));
    for (server, client) in [("10.9.0.1:53", "0.0.0.0:0"), ("[fd09::1]:53", "[::]:0")] {
        let udp = outside.run(|| std::net::UdpSocket::bind(server)).unwrap();
        let tcp = outside.run(|| std::net::TcpListener::bind(server)).unwrap();
        let asks = namespace.run(|| std::net::UdpSocket::bind(client)).unwrap();
        for socket in [&udp, &asks] {
            socket.set_read_timeout(limit).unwrap();
        }
        asks.send_to(b"who", server).unwrap();
        let mut buffer = [0; 10];
        let (_, from) = udp.recv_from(&mut buffer).unwrap();
        assert!(redirect::OWN_PORTS.contains(&from.port()), "{from}");
        udp.send_to(b"me", from).unwrap();
        let (length, _) = asks.recv_from(&mut buffer).unwrap();
        assert_eq!(&buffer[..length], b"me");
        let to = server.parse().unwrap();
        namespace
            .run(|| std::net::TcpStream::connect_timeout(&to, Duration::from_secs(3)))
            .unwrap();
        drop(tcp);
        // An answer to the guest, whose kernel asks from other ports.
        let guests = std::net::SocketAddr::new(from.ip(), 40000);
        udp.send_to(b"towards the guest", guests).unwrap();
    }
    let mut tap = std::fs::File::from(pod.taps.lock().unwrap()[0].2.remove(0));
    let mut seen = Vec::new();
    let mut frame = [0; 4096];
    while let Ok(length) = tap.read(&mut frame) {
        seen.push(frame[..length].to_vec());
    }
    let count = |wanted: &[u8]| {
        let has = |frame: &&Vec<u8>| frame.windows(wanted.len()).any(|w| w == wanted);
        seen.iter().filter(has).count()
    };
    assert_eq!((count(b"towards the guest"), count(b"me")), (2, 0));
    // The gateway's answer, which the guest hears as well.
    assert_eq!(count(&[8, 6, 0, 1, 8, 0, 6, 4, 0, 2]), 1);
    assert!(!before.contains("pref 25191 "), "{before}");
    vmm.kill().unwrap();
    vmm.wait().unwrap();
}

#[test]
fn more_interfaces_than_slots_are_left_out() {
    let pod = pod(Namespace::fresh().unwrap(), 1).unwrap();
    for pair in 0..3 {
        sh(
            pod.network.namespace(),
            &format!("ip link add a{pair} type veth peer name b{pair}"),
        );
    }
    let (request, failure) = pod.plug();
    assert_eq!(
        (request.interfaces.len(), failure.is_none()),
        (NET_SLOTS, true)
    );
    let mut served = pod.network.served.try_lock().unwrap();
    assert_eq!(served.failed.len(), 2);
    // One goes, and one of those that had no slot gets it, without a start.
    sh(pod.network.namespace(), "ip link del a0");
    let (request, _) = pod.network.plug(&mut served).unwrap();
    let names: Vec<_> = request.interfaces.iter().map(|i| i.name.as_str()).collect();
    assert_eq!(names.len(), NET_SLOTS);
    assert!(
        served.failed.is_empty() && names.contains(&"a2") && names.contains(&"b2"),
        "{names:?}"
    );
}

#[test]
fn tunnels_of_the_kernel_and_ports_of_a_bridge_are_not_the_guests() {
    let pod = pod(Namespace::fresh().unwrap(), 1).unwrap();
    let namespace = pod.network.namespace();
    sh(
        namespace,
        "ip link add p0 type veth peer name p1; ip link add br0 type bridge; ip link set p0 master br0",
    );
    let (request, _) = pod.plug();
    let names: Vec<_> = request.interfaces.iter().map(|i| i.name.as_str()).collect();
    assert_eq!(names, ["p1", "br0"]);
}

/// qdiscs, filters and taps.
fn traces(namespace: &Namespace) -> String {
    let all = sh(
        namespace,
        "tc qdisc show; tc filter show dev eth0 ingress; ip link",
    );
    let ours = all.lines().filter(|l| {
        ["ingress", "u32", "mirred", "bhtap"]
            .iter()
            .any(|w| l.contains(w))
    });
    ours.collect()
}

#[test]
fn a_namespace_that_lives_on_keeps_nothing_of_ours() {
    let kept = Kept::new();
    let pod = pod(kept.open(), 1).unwrap();
    let namespace = kept.open();
    let _outside = plug_in(&namespace, ETH0);
    pod.plug();
    assert!(traces(&namespace).contains("mirred"));
    pod.taps.lock().unwrap().clear(); // The VMM is gone.
    pod.network.close();
    assert_eq!(traces(&namespace), "");
    assert!(matches!(
        tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap()
            .block_on(pod.network.update(None, true)),
        Err(Error::Closed)
    ));
}

#[test]
fn after_a_shim_that_died_the_note_cleans_up_and_others_filters_stay() {
    let kept = Kept::new();
    let pod = pod(kept.open(), 1).unwrap();
    let namespace = kept.open();
    let _outside = plug_in(&namespace, ETH0);
    // Somebody else's, before ours.
    sh(&namespace, "tc qdisc add dev eth0 ingress
        tc filter add dev eth0 ingress protocol ip prio 50000 u32 match ip dst 10.99.0.1/32 action mirred egress redirect dev eth0");
    pod.plug();
    pod.taps.lock().unwrap().clear();
    note::clean(pod.dir.path());
    let left = sh(&namespace, "tc filter show dev eth0 ingress");
    assert!(
        left.contains("50000") && !left.contains(&format!("pref {}", 0x6268)),
        "{left}"
    );
    // A second time, and in a namespace that is gone, it is no error.
    note::clean(pod.dir.path());
    drop(kept);
    note::clean(pod.dir.path());
}

#[test]
fn a_namespace_with_another_pods_taps_is_refused() {
    let kept = Kept::new();
    let first = pod(kept.open(), 1).unwrap();
    let _outside = plug_in(&kept.open(), ETH0);
    first.plug();
    let error = pod(kept.open(), 1).err().unwrap();
    assert_eq!(
        error.to_string(),
        "the network namespace belongs to another pod: bhtap0 is in it"
    );
}

#[test]
fn what_fails_is_named_and_leaves_nothing() {
    let kept = Kept::new();
    let pod = pod(kept.open(), 1).unwrap();
    let namespace = kept.open();
    let _outside = plug_in(&namespace, ETH0);
    sh(&namespace, "ip tuntap add bhtap0 mode tun"); // The name is taken, by another kind.
    let (request, failure) = pod.plug();
    let text = failure.unwrap().to_string();
    assert!(text.starts_with("interface eth0: making a tap: "), "{text}");
    assert!(request.interfaces.is_empty());
    sh(&namespace, "ip link del bhtap0");
    assert_eq!(traces(&namespace), "");
    assert!(pod.plug().1.is_none());
}

#[test]
fn a_slot_is_named_as_the_agent_and_the_vmm_know_it() {
    assert_eq!(
        (slot_id(3), slot_mac(3)),
        ("n3".into(), "02:62:6b:00:00:03".into())
    );
}
