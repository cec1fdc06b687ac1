//! Which TCP ports of the pod a dial to its loopback reaches, and when that changes. Programs on the containers' cgroup wake the agent
//! when a socket was bound or a listening one is closed; then it looks. What they do not see, a socket that listens without
//! having been bound, is found by a slow look.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, BufRead, BufReader, Read},
    os::fd::{AsFd, OwnedFd},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use bulkhead_protocol::{
    agent::{ListeningPort, WatchPortsResponse},
    limits::FORWARD_PORTS_MAX,
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::watch,
};

use super::PodNetwork;
use crate::{
    boot::PODS,
    container::bpf,
    error::{Context, Result},
    sys::{
        self,
        bpf::{Hook, Ring},
    },
};

/// When to look after an event: a program listens right after it has bound, but not at the same moment.
const SOON: [Duration; 3] = [
    Duration::from_millis(100),
    Duration::from_millis(300),
    Duration::from_secs(2),
];
/// When to look without one; with the programs, and without them.
const SLOW: Duration = Duration::from_secs(10);
const SLOW_WITHOUT_EVENTS: Duration = Duration::from_secs(3);
/// Most that is read of a table of sockets: more listeners than there are ports.
const TABLE_MAX: u64 = 16 << 20;

type Ports = BTreeMap<u16, Reach>;

/// What a dial to the port reaches it by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Reach {
    ipv4: bool,
    ipv6: bool,
}

/// Watches the ports of a pod.
pub struct Watcher {
    network: Arc<PodNetwork>,
    events: Option<Events>,
    seen: Mutex<(u64, Ports)>,
    /// Counts the calls: a newer one ends the one that waits.
    calls: watch::Sender<u64>,
}

impl Watcher {
    /// For this network.
    pub fn new(network: Arc<PodNetwork>) -> Self {
        let events = Events::new()
            .inspect_err(|error| eprintln!("watch for listening ports by events: {error}"));
        Self {
            network,
            events: events.ok(),
            seen: Mutex::new((1, Ports::new())),
            calls: watch::Sender::new(0),
        }
    }

    /// Answers once the ports are others than at `generation`.
    pub async fn watch(&self, generation: u64) -> Result<WatchPortsResponse> {
        let mut call = 0;
        self.calls.send_modify(|calls| {
            *calls = calls.wrapping_add(1);
            call = *calls;
        });
        let mut calls = self.calls.subscribe();
        let mut soon = SOON.iter();
        loop {
            let answer = self.look()?;
            if answer.generation != generation || *calls.borrow_and_update() != call {
                return Ok(answer);
            }
            let event = async {
                match &self.events {
                    Some(events) => events.next().await,
                    None => std::future::pending().await,
                }
            };
            let slow = match self.events {
                Some(_) => SLOW,
                None => SLOW_WITHOUT_EVENTS,
            };
            let pause = soon.next().copied().unwrap_or(slow);
            tokio::select! {
                () = event => {
                    // However many events there are, no look comes sooner than this.
                    tokio::time::sleep(SOON[0]).await;
                    soon = SOON.iter();
                }
                () = tokio::time::sleep(pause) => {}
                _ = calls.changed() => {}
            }
        }
    }

    fn look(&self) -> Result<WatchPortsResponse> {
        let tables = self.network.within(|| {
            let open = |name| File::open(format!("/proc/thread-self/net/{name}"));
            Ok((open("tcp")?, open("tcp6").ok()))
        })?;
        let mut ports = Ports::new();
        collect(tables.0, &mut ports).step(|| "read the pod's TCP sockets".into())?;
        if let Some(table) = tables.1 {
            collect(table, &mut ports).step(|| "read the pod's TCP sockets of IPv6".into())?;
        }
        let ports: Ports = ports.into_iter().take(FORWARD_PORTS_MAX).collect();
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        if seen.1 != ports {
            *seen = (seen.0.wrapping_add(1).max(1), ports);
        }
        let port = |(port, reach): (&u16, &Reach)| ListeningPort {
            port: u32::from(*port),
            ipv4: reach.ipv4,
            ipv6: reach.ipv6,
            ..Default::default()
        };
        Ok(WatchPortsResponse {
            generation: seen.0,
            ports: seen.1.iter().map(port).collect(),
            ..Default::default()
        })
    }
}

/// Reads the listening sockets of `/proc/net/tcp` or `tcp6` (proc_net_tcp.rst); the kernel lists them first.
fn collect(table: impl Read, ports: &mut Ports) -> io::Result<()> {
    // By lines, so that the connections of a busy pod are never read.
    for line in BufReader::new(table.take(TABLE_MAX)).lines().skip(1) {
        match listener(&line?) {
            Some((port, reach)) => {
                let known = ports.entry(port).or_default();
                known.ipv4 |= reach.ipv4;
                known.ipv6 |= reach.ipv6;
            }
            None => break,
        }
    }
    // Addresses that loopback does not reach.
    ports.retain(|_, reach| reach.ipv4 || reach.ipv6);
    Ok(())
}

/// Port of a line and what reaches it; `None` if it does not listen.
fn listener(line: &str) -> Option<(u16, Reach)> {
    const LISTEN: &str = "0A";
    // Words of an address are printed as numbers of this machine: little-endian.
    const LOOPBACK4: &str = "0100007F";
    const ANY4: &str = "00000000";
    const LOOPBACK6: &str = "00000000000000000000000001000000";
    const ANY6: &str = "00000000000000000000000000000000";
    const MAPPED: &str = "0000000000000000FFFF0000";
    let mut fields = line.split_whitespace().skip(1);
    let (address, port) = fields.next()?.split_once(':')?;
    if fields.nth(1)? != LISTEN {
        return None;
    }
    let is4 = |address: &str| matches!(address, LOOPBACK4 | ANY4);
    let reach = match address {
        // Of IPv4 too, unless the socket is of IPv6 only, which the table does not tell.
        ANY6 => Reach {
            ipv4: true,
            ipv6: true,
        },
        address => Reach {
            ipv4: is4(address.strip_prefix(MAPPED).unwrap_or(address)),
            ipv6: address == LOOPBACK6,
        },
    };
    Some((u16::from_str_radix(port, 16).ok()?, reach))
}

/// Tells when something may have changed.
struct Events {
    readable: AsyncFd<OwnedFd>,
    ring: Ring,
}

impl Events {
    /// Puts the programs on the cgroup above the containers'.
    fn new() -> io::Result<Self> {
        let cgroup = File::open(PODS)?;
        let ring = Ring::new()?;
        for (hook, program) in [
            (Hook::Inet4Bound, bpf::tell_bound(ring.as_fd())),
            (Hook::Inet6Bound, bpf::tell_bound(ring.as_fd())),
            (Hook::InetReleased, bpf::tell_released(ring.as_fd())),
        ] {
            let program = sys::bpf::load(hook, &program)?;
            sys::bpf::attach(hook, cgroup.as_fd(), program.as_fd(), None)?;
        }
        let readable = sys::watch(ring.as_fd().try_clone_to_owned()?, Interest::READABLE)?;
        Ok(Self { readable, ring })
    }

    /// Answers once there was an event since the last answer.
    async fn next(&self) {
        match self.readable.readable().await {
            Ok(mut ready) => {
                ready.clear_ready();
                self.ring.drain();
            }
            Err(_) => std::future::pending().await,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    fn ports(table: &str) -> Vec<(u16, bool, bool)> {
        let mut ports = Ports::new();
        collect(table.as_bytes(), &mut ports).unwrap();
        let flat = |(port, reach): (u16, Reach)| (port, reach.ipv4, reach.ipv6);
        ports.into_iter().map(flat).collect()
    }

    #[test]
    fn only_listeners_that_loopback_reaches_count() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt\n\
             0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0\n\
             1: 00000000:0050 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0\n\
             2: 0200000A:0051 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0\n\
             3: 0100007F:1F91 0100007F:0050 01 00000000:00000000 00:00000000 00000000     0\n";
        assert_eq!(ports(table), [(80, true, false), (8080, true, false)]);
        let table = "  sl  local_address                         remote_address   st\n\
             0: 00000000000000000000000001000000:0050 00000000000000000000000000000000:0000 0A 0\n\
             1: 00000000000000000000000000000000:0051 00000000000000000000000000000000:0000 0A 0\n\
             2: 0000000000000000FFFF00000100007F:0052 00000000000000000000000000000000:0000 0A 0\n\
             3: 000080FE00000000FF565002BD5C58FE:0053 00000000000000000000000000000000:0000 0A 0\n";
        let expected = [(80, false, true), (81, true, true), (82, true, false)];
        assert_eq!(ports(table), expected);
    }

    #[test]
    fn tables_that_make_no_sense_are_empty() {
        for table in ["", "x", "x\n0:", "x\n0: :: 0 0A", "x\n 0: 00:zz 0 0A"] {
            assert_eq!(ports(table), [], "{table}");
        }
    }

    #[test]
    fn the_kernel_takes_the_programs() {
        let Ok(ring) = Ring::new() else {
            eprintln!("skipped: this machine allows no BPF");
            return;
        };
        let address = super::super::resolver::ADDRESS;
        for (hook, program) in [
            (Hook::Inet4Bound, bpf::tell_bound(ring.as_fd())),
            (Hook::Inet6Bound, bpf::tell_bound(ring.as_fd())),
            (Hook::InetReleased, bpf::tell_released(ring.as_fd())),
            (Hook::Inet4Connect, bpf::change_port(address, 53, 40000)),
            (Hook::Udp4Send, bpf::change_port(address, 53, 40000)),
            (Hook::Udp4Receive, bpf::change_port(address, 40000, 53)),
        ] {
            sys::bpf::load(hook, &program).unwrap();
        }
        ring.drain();
    }

    fn watcher(network: &Arc<PodNetwork>) -> Watcher {
        Watcher {
            network: Arc::clone(network),
            events: None,
            seen: Mutex::new((1, Ports::new())),
            calls: watch::Sender::new(0),
        }
    }

    fn run<F: Future>(test: F) -> F::Output {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build();
        runtime.unwrap().block_on(test)
    }

    #[test]
    fn a_port_that_opens_and_closes_is_told_each_time() {
        run(async {
            let network = Arc::new(PodNetwork::default());
            let watcher = watcher(&network);
            let none = watcher.watch(0).await.unwrap();
            assert!(none.ports.is_empty());
            let waits = watcher.watch(none.generation);
            let listener = async {
                tokio::time::sleep(Duration::from_millis(100)).await;
                network.within(|| TcpListener::bind("[::1]:80")).unwrap()
            };
            let (one, listener) = tokio::join!(waits, listener);
            let one = one.unwrap();
            let port = one.ports.first().unwrap();
            assert_eq!((port.port, port.ipv4, port.ipv6), (80, false, true));
            drop(listener);
            let gone = watcher.watch(one.generation).await.unwrap();
            assert!(gone.ports.is_empty());
        });
    }

    #[test]
    fn a_newer_call_ends_the_older() {
        run(async {
            let network = Arc::new(PodNetwork::default());
            let watcher = watcher(&network);
            let now = watcher.watch(0).await.unwrap().generation;
            let (old, new) = tokio::join!(watcher.watch(now), async {
                tokio::time::sleep(Duration::from_millis(50)).await;
                watcher.watch(0).await
            });
            assert_eq!(old.unwrap().generation, now);
            assert_eq!(new.unwrap().generation, now);
        });
    }

    #[test]
    fn of_too_many_ports_the_lowest_are_told() {
        run(async {
            let network = Arc::new(PodNetwork::default());
            let all: Vec<_> = (0..=FORWARD_PORTS_MAX)
                .map(|n| {
                    let address = ("127.0.0.1", 2000 + n as u16);
                    network.within(|| TcpListener::bind(address)).unwrap()
                })
                .collect();
            let told = watcher(&network).watch(0).await.unwrap().ports;
            assert_eq!(told.len(), FORWARD_PORTS_MAX);
            assert_eq!(told.first().unwrap().port, 2000);
            assert_eq!(told.last().unwrap().port, 2255);
            drop(all);
        });
    }
}
