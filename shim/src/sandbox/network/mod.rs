//! The pod's network: what stands in its namespace is given to the guest, and followed.
//!
//! ```text
//!   namespace of the pod (CNI, Docker, `ip netns` plug in)            guest
//!   eth0 ── ingress: redirect ──► bhtap0 ── VMM ── slot n0 ──► eth0: same MAC, MTU, addresses, routes
//!        ◄── redirect (own MAC) ── ingress
//! ```
//!
//! The VMM runs in the namespace, so whoever plugs in by the task's pid finds it. Each interface but loopback gets a free slot of the
//! machine, a tap and the redirect between both; then the agent is told the whole state. The same is done again when the kernel tells of
//! a change, and before a container starts. `namespace.rs` opens it, `links.rs` reads it, `tap.rs` and `redirect.rs` change it, `note.rs`
//! remembers for `delete` what was changed, `follow.rs` waits for changes. `forward.rs` and `resolver.rs` carry what a namespace's loopback
//! cannot: port-forward and Docker's resolver.

pub mod follow;
pub mod forward;
pub mod links;
pub mod namespace;
mod netlink;
pub mod note;
mod redirect;
mod resolver;
mod tap;
#[cfg(test)]
mod tests;

use std::{
    collections::BTreeSet,
    io,
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
    time::Duration,
};

use bulkhead_protocol::{
    agent::SetNetworkRequest,
    agent_ttrpc::AgentClient,
    limits::{ADDRESSES_MAX, NEIGHBOURS_MAX, NET_SLOTS, ROUTES_MAX},
};
use netlink_packet_route::{
    RouteNetlinkMessage,
    link::{LinkFlags, LinkMessage},
};
use netlink_sys::Socket;
use serde_json::json;
use tokio::{
    net::UnixStream,
    sync::{Mutex, Notify, OwnedMutexGuard},
};

use self::{
    links::{Link, State},
    namespace::Namespace,
    netlink::Netlink,
    note::Noted,
};
use super::{control, deadline, machine::printable};
use crate::{config::Engine, limits::AGENT_TEXT};

/// Queue pairs of a slot at most.
const PAIRS_MAX: usize = 8;
/// How long the agent may take to set the network.
const SET: Duration = Duration::from_secs(30);
/// What is tried when an interface and its tap are connected.
const REDIRECTING: &str = "redirecting it (tc: ingress, u32, mirred)";
/// Ports that the calling thread's namespace dials from.
const PORT_RANGE: &str = "/proc/sys/net/ipv4/ip_local_port_range";
/// Number of `lo` in every namespace.
const LOOPBACK: u32 = 1;

/// Why a pod has not the network of its namespace.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The namespace itself.
    #[error("the pod's network namespace: {0}")]
    Namespace(#[source] io::Error),
    /// Other taps are there.
    #[error("the network namespace belongs to another pod: {0} is in it")]
    Taken(String),
    /// Reading what is in it.
    #[error("reading the pod's network namespace: {0}")]
    Read(#[source] io::Error),
    /// Something cannot be done to one of its interfaces.
    #[error("interface {link}: {what}: {source}")]
    Link {
        /// Its name.
        link: String,
        /// What was tried.
        what: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// The VMM does not take it.
    #[error("interface {link}: {source}")]
    Slot {
        /// Its name.
        link: String,
        /// Why not.
        source: control::Error,
    },
    /// More than a guest gets.
    #[error("the pod's network namespace has more than {max} {what}")]
    Limit {
        /// Of what.
        what: &'static str,
        /// The limit.
        max: usize,
    },
    /// The guest does not take it, and says why.
    #[error("setting the guest's network: {0}")]
    Agent(String),
    /// The pod is over.
    #[error("the pod's network is closed")]
    Closed,
}

/// The boot MAC of a slot, by which the guest finds its interface.
pub fn slot_mac(slot: usize) -> String {
    links::mac_text(&[0x02, 0x62, 0x6b, 0, 0, slot as u8])
}

/// The name of a slot.
pub fn slot_id(slot: usize) -> String {
    format!("n{slot}")
}

/// The network of a pod.
pub struct Network {
    namespace: Arc<Namespace>,
    dir: PathBuf,
    control: control::Client,
    engine: Engine,
    pairs: usize,
    served: Arc<Mutex<Served>>,
    /// What the kernel tells, until somebody follows it.
    changes: std::sync::Mutex<Option<Socket>>,
    /// Told once the guest has an interface.
    plugged: Notify,
    vmm: OnceLock<u32>,
    queries: resolver::Queries,
}

/// What is done so far. Whoever holds it is the only one who changes anything.
struct Served {
    netlink: Netlink,
    slots: [Option<Slot>; NET_SLOTS],
    /// Interfaces that were tried in vain: told once, tried again at a start only.
    failed: BTreeSet<u32>,
    /// What the guest has; none if a call failed, so that nobody knows.
    sent: Option<SetNetworkRequest>,
    closed: bool,
}

/// An interface in its slot.
struct Slot {
    link: Link,
    tap: u32,
    noted: Noted,
}

impl Network {
    /// Of a pod in `namespace` with state folder `dir`, whose machine has so many vCPUs.
    pub fn new(
        namespace: Namespace,
        dir: &Path,
        control: control::Client,
        engine: Engine,
        vcpus: u64,
    ) -> Result<Arc<Self>, Error> {
        let network = Self::open(namespace, dir, control, engine, vcpus)?;
        let mut served = network.served.try_lock().map_err(|_| Error::Closed)?;
        let netlink = &mut served.netlink;
        if network.namespace.path().is_none() {
            raise_loopback(netlink).map_err(Error::Namespace)?;
        } else {
            let state = State::read(netlink).map_err(Error::Read)?;
            if let Some((tap, _)) = state.taps.into_iter().next() {
                return Err(Error::Taken(tap));
            }
        }
        drop(served);
        Ok(network)
    }

    /// That of a pod which another shim has left: what it has noted is in its slots already.
    pub fn adopt(
        namespace: Namespace,
        dir: &Path,
        control: control::Client,
        engine: Engine,
        vcpus: u64,
    ) -> Result<Arc<Self>, Error> {
        let network = Self::open(namespace, dir, control, engine, vcpus)?;
        let mut served = network.served.try_lock().map_err(|_| Error::Closed)?;
        let served = &mut *served;
        let state = State::read(&mut served.netlink).map_err(Error::Read)?;
        for noted in note::load(dir, &network.namespace) {
            let link = state.links.get(&noted.index);
            let tap = state.taps.get(&tap::name(noted.slot));
            if let (Some(link), Some(&tap), true) = (link, tap, noted.whole)
                && let Some(slot) = served.slots.get_mut(noted.slot)
            {
                *slot = Some(Slot {
                    link: link.clone(),
                    tap,
                    noted,
                });
                continue;
            }
            // Half of it, or it is gone: plugged in anew, if it is there.
            let request = json!({ "op": "detach-net", "slot": slot_id(noted.slot) });
            if let Err(error) = network.control.request_blocking(&request, &[]) {
                tracing::debug!(%error, "detaching");
            }
            if link.is_some()
                && let Err(error) =
                    redirect::disconnect(&mut served.netlink, noted.index, noted.qdisc)
            {
                tracing::warn!(%error, "half of a redirect stays");
            }
        }
        // What the guest has been told is not known.
        served.sent = None;
        Ok(network.clone())
    }

    fn open(
        namespace: Namespace,
        dir: &Path,
        control: control::Client,
        engine: Engine,
        vcpus: u64,
    ) -> Result<Arc<Self>, Error> {
        let opened = namespace.run(|| {
            // Before anything is read, so that no change is lost.
            let changes = follow::socket()?;
            Ok((Netlink::open()?, changes))
        });
        let (netlink, changes) = opened.map_err(Error::Namespace)?;
        Ok(Arc::new(Self {
            namespace: Arc::new(namespace),
            dir: dir.to_owned(),
            control,
            engine,
            pairs: match engine {
                Engine::Kvm => usize::try_from(vcpus).map_or(PAIRS_MAX, |n| n.clamp(1, PAIRS_MAX)),
                Engine::Emulated => 1,
            },
            served: Arc::new(Mutex::new(Served {
                netlink,
                slots: std::array::from_fn(|_| None),
                failed: BTreeSet::new(),
                sent: Some(SetNetworkRequest::new()),
                closed: false,
            })),
            changes: std::sync::Mutex::new(Some(changes)),
            plugged: Notify::new(),
            vmm: OnceLock::new(),
            queries: resolver::Queries::default(),
        }))
    }

    /// The process that is in it for the pod.
    pub fn set_vmm(&self, pid: u32) {
        let _ = self.vmm.set(pid);
    }

    /// Answers a query of the guest's to Docker's resolver.
    pub fn answer(self: &Arc<Self>, query: UnixStream) {
        self.queries.answer(query, self.clone());
    }

    /// Its namespace.
    pub fn namespace(&self) -> &Arc<Namespace> {
        &self.namespace
    }

    /// Brings slots and guest to what the namespace holds. Without an agent (it is not ready yet) the slots alone; `all`: also what
    /// failed before, and the first failure is the answer.
    pub async fn update(
        self: &Arc<Self>,
        agent: Option<&AgentClient>,
        all: bool,
    ) -> Result<(), Error> {
        let mut served = self.served.clone().lock_owned().await;
        if served.closed {
            return Err(Error::Closed);
        }
        bulkhead_failpoint::reach("create.network").map_err(Error::Read)?;
        if all {
            served.failed.clear();
        }
        let this = self.clone();
        let plugged = tokio::task::spawn_blocking(move || {
            let result = this.plug(&mut served);
            (served, result)
        });
        let (mut served, result) = plugged
            .await
            .map_err(|e| Error::Read(io::Error::other(e)))?;
        let (request, failure) = result?;
        if let Some(agent) = agent {
            if !request.interfaces.is_empty() {
                self.plugged.notify_one();
            }
            tell(&mut served, agent, request).await?;
        }
        match failure {
            Some(error) if all => Err(error),
            _ => Ok(()),
        }
    }

    /// Slots, taps and redirects; then what the agent shall know, and the first interface that could not be served.
    fn plug(&self, served: &mut Served) -> Result<(SetNetworkRequest, Option<Error>), Error> {
        let state = State::read(&mut served.netlink).map_err(Error::Read)?;
        let redirected = redirect::with_qdisc(&mut served.netlink).map_err(Error::Read)?;
        let mut failure = None;
        for slot in 0..NET_SLOTS {
            if self.unplug_changed(served, slot, &state, &redirected) {
                served.failed.clear(); // There is room again.
            }
        }
        for link in state.links.values() {
            let has_slot = served
                .slots
                .iter()
                .flatten()
                .any(|s| s.link.index == link.index);
            if has_slot || served.failed.contains(&link.index) {
                continue;
            }
            let Some(free) = served.slots.iter().position(Option::is_none) else {
                tracing::error!(
                    link = link.name,
                    "not in the guest: a machine has {NET_SLOTS} interfaces"
                );
                served.failed.insert(link.index);
                continue;
            };
            if let Err(error) = self.attach(served, free, link) {
                tracing::error!(%error, "an interface is not in the guest");
                served.failed.insert(link.index);
                failure.get_or_insert(error);
            }
        }
        served
            .failed
            .retain(|index| state.links.contains_key(index));
        let taken = served.slots.iter().enumerate();
        let taken: Vec<_> = taken
            .filter_map(|(n, slot)| Some((slot.as_ref()?.link.index, slot_mac(n))))
            .collect();
        let mut request = state.request(&taken);
        request.resolver = self.vmm.get().is_some_and(|&pid| resolver::is_there(pid));
        if request.resolver {
            self.hear_answers(served);
        }
        check_limits(&request)?;
        Ok((request, failure))
    }

    /// Docker's resolver asks other servers from inside the namespace: their answers are for it, not for the guest.
    fn hear_answers(&self, served: &mut Served) {
        let Served { netlink, slots, .. } = served;
        for slot in slots.iter().flatten() {
            let index = slot.link.index;
            let heard = redirect::hears_answers(netlink, index).and_then(|heard| match heard {
                true => Ok(()),
                false => {
                    let (from, to) = (redirect::OWN_PORTS.start(), redirect::OWN_PORTS.end());
                    let range = format!("{from} {to}");
                    self.namespace.run(|| std::fs::write(PORT_RANGE, range))?;
                    redirect::hear_answers(netlink, index, slot.tap)
                }
            });
            if let Err(error) = heard {
                tracing::warn!(link = slot.link.name, %error, "127.0.0.11 hears no other server");
            }
        }
    }

    /// Follows an interface that is gone or changed, and tells whether its slot is free now. One that lost its qdisc (`redirected`: who
    /// has one) was in another namespace meanwhile, or a tool took it or a filter off.
    fn unplug_changed(
        &self,
        served: &mut Served,
        number: usize,
        state: &State,
        redirected: &BTreeSet<u32>,
    ) -> bool {
        let Some(slot) = served.slots.get_mut(number).and_then(Option::as_mut) else {
            return false;
        };
        let (index, tap) = (slot.link.index, slot.tap);
        let whole = redirected.contains(&index)
            && redirect::is_whole(&mut served.netlink, index, tap).unwrap_or(false);
        match state.links.get(&index) {
            Some(link) if link.mac == slot.link.mac && whole => {
                if link.mtu != slot.link.mtu
                    && let Err(error) = tap::set_mtu(&mut served.netlink, slot.tap, link.mtu)
                {
                    tracing::warn!(link = link.name, mtu = link.mtu, %error, "setting a tap's MTU");
                }
                slot.link = link.clone();
                false
            }
            still => {
                let stays = still.is_some();
                self.detach(served, number, stays);
                true
            }
        }
    }

    fn attach(&self, served: &mut Served, number: usize, link: &Link) -> Result<(), Error> {
        let at = |what| {
            let link = link.name.clone();
            move |source| Error::Link { link, what, source }
        };
        let netlink = &mut served.netlink;
        let others = redirect::with_qdisc(netlink).map_err(at("reading its qdiscs"))?;
        let noted = Noted {
            index: link.index,
            slot: number,
            whole: false,
            qdisc: !others.contains(&link.index),
        };
        self.note(served, Some(noted)).map_err(at("noting it"))?;
        let tap = match tap::make(&self.namespace, number, self.pairs) {
            Ok(tap) => tap,
            Err(error) => {
                self.note_what_is(served); // Nothing was done to it.
                return Err(at("making a tap")(error));
            }
        };
        let index = tap.index;
        served.slots[number] = Some(Slot {
            link: link.clone(),
            tap: index,
            noted,
        });
        let netlink = &mut served.netlink;
        // The wall against forged sources stands before the guest can send anything.
        let done = redirect::from_guest(netlink, link.index, index, link.mac)
            .map_err(at(REDIRECTING))
            .and_then(|()| {
                let up = tap::raise(netlink, index, link.mtu);
                up.map_err(at("bringing its tap up"))
            })
            .and_then(|()| self.hand_over(number, link, tap))
            .and_then(|()| {
                let redirected = redirect::to_guest(netlink, link.index, index);
                redirected.map_err(at(REDIRECTING))
            });
        match &done {
            Ok(()) => {
                if let Some(slot) = served.slots.get_mut(number).and_then(Option::as_mut) {
                    slot.noted.whole = true;
                }
                self.note_what_is(served);
                tracing::info!(link = link.name, slot = number, mtu = link.mtu, "attached");
            }
            Err(_) => self.detach(served, number, true),
        }
        done
    }

    /// Gives the tap to the VMM, with vhost-net where there is one.
    fn hand_over(&self, number: usize, link: &Link, tap: tap::Tap) -> Result<(), Error> {
        let queues = tap.queues.len();
        let vhost = match self.engine {
            Engine::Kvm => tap::vhost(queues),
            Engine::Emulated => Vec::new(),
        };
        let request = |vhost: usize| json!({ "op": "attach-net", "slot": slot_id(number), "mac": links::mac_text(&link.mac), "vhost": vhost });
        let mut fds = tap.queues;
        let with = vhost.len();
        fds.extend(vhost);
        let mut result = self.control.request_blocking(&request(with), &fds);
        if with > 0
            && let Err(control::Error::Refused { message, .. }) = &result
        {
            tracing::warn!(link = link.name, message, "not by vhost-net");
            fds.truncate(queues);
            result = self.control.request_blocking(&request(0), &fds);
        }
        result.map(drop).map_err(|source| Error::Slot {
            link: link.name.clone(),
            source,
        })
    }

    /// Takes an interface out of its slot; `stays`: it is still in the namespace.
    fn detach(&self, served: &mut Served, number: usize, stays: bool) {
        let Some(slot) = served.slots.get_mut(number).and_then(Option::take) else {
            return;
        };
        let request = json!({ "op": "detach-net", "slot": slot_id(number) });
        match self.control.request_blocking(&request, &[]) {
            Ok(_) => tracing::info!(link = slot.link.name, slot = number, "detached"),
            // Never attached, or the machine is gone: then the tap is, too.
            Err(error) => tracing::debug!(link = slot.link.name, %error, "detaching"),
        }
        if stays {
            take_off(&mut served.netlink, &slot);
        }
        self.note_what_is(served);
    }

    fn note_what_is(&self, served: &Served) {
        if let Err(error) = self.note(served, None) {
            tracing::warn!(%error, "noting what is on the interfaces");
        }
    }

    fn note(&self, served: &Served, more: Option<Noted>) -> io::Result<()> {
        let all = served.slots.iter().flatten().map(|slot| slot.noted);
        note::write(&self.dir, &self.namespace, all.chain(more).collect())
    }

    /// Takes everything off the interfaces that stay. The VMM is gone, and with it the taps. Blocking.
    pub fn close(&self) {
        self.control.end();
        let mut served = self.served.blocking_lock();
        served.closed = true;
        let served = &mut *served;
        for slot in served.slots.iter_mut().filter_map(Option::take) {
            take_off(&mut served.netlink, &slot);
        }
    }
}

async fn tell(
    served: &mut OwnedMutexGuard<Served>,
    agent: &AgentClient,
    request: SetNetworkRequest,
) -> Result<(), Error> {
    if served.sent.as_ref() == Some(&request) {
        return Ok(());
    }
    served.sent = None;
    let told = agent.set_network(deadline(SET), &request).await;
    told.map_err(|error| Error::Agent(printable(&error.to_string(), AGENT_TEXT)))?;
    served.sent = Some(request);
    Ok(())
}

fn check_limits(request: &SetNetworkRequest) -> Result<(), Error> {
    let addresses = request.interfaces.iter().map(|i| i.addresses.len()).max();
    for (what, count, max) in [
        (
            "addresses on an interface",
            addresses.unwrap_or(0),
            ADDRESSES_MAX,
        ),
        ("routes", request.routes.len(), ROUTES_MAX),
        (
            "permanent neighbours",
            request.neighbours.len(),
            NEIGHBOURS_MAX,
        ),
    ] {
        if count > max {
            return Err(Error::Limit { what, max });
        }
    }
    Ok(())
}

fn take_off(netlink: &mut Netlink, slot: &Slot) {
    let Noted { index, qdisc, .. } = slot.noted;
    if let Err(error) = redirect::disconnect(netlink, index, qdisc) {
        tracing::warn!(link = slot.link.name, %error, "the redirect stays");
    }
}

/// Tries out what a pod's network needs of the host, in a namespace that goes again: what is missing, by name.
pub fn missing() -> Option<String> {
    let with = |what: &'static str| move |error: io::Error| format!("{what}: {error}");
    let probe = || -> Result<(), String> {
        let namespace = Namespace::fresh().map_err(with("a network namespace"))?;
        let tun = with("/dev/net/tun");
        let from = tap::make(&namespace, 0, 1).map_err(tun)?;
        let to = tap::make(&namespace, 1, 1).map_err(tun)?;
        let mut netlink = namespace.run(Netlink::open).map_err(with("rtnetlink"))?;
        match redirect::missing(&mut netlink, from.index, to.index) {
            Some((part, error)) => Err(with(part)(error)),
            None => Ok(()),
        }
    };
    probe().err()
}

/// Whether the host has vhost-net.
pub fn has_vhost() -> bool {
    !tap::vhost(1).is_empty()
}

fn raise_loopback(netlink: &mut Netlink) -> io::Result<()> {
    let mut message = LinkMessage::default();
    message.header.index = LOOPBACK;
    message.header.flags = LinkFlags::Up;
    message.header.change_mask = LinkFlags::Up;
    netlink.change(RouteNetlinkMessage::SetLink(message), 0)
}
