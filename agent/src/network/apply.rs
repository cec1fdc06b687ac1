//! Gives the pod's network namespace the wanted state. The machine's slots wait in the guest's first namespace; an interface of the pod
//! is a slot that was moved. What an earlier call set and the new state does not have is taken away first, then all of the new
//! state is set: what is there already is no error. What a container made by itself is not touched.

use std::{
    collections::HashMap,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
};

use netlink_packet_core::{Emitable, NLM_F_APPEND, NLM_F_CREATE, NLM_F_REPLACE};
use netlink_packet_route::{
    address::{AddressAttribute, AddressFlags, AddressMessage},
    link::{AfSpecInet6, AfSpecUnspec, In6AddrGenMode, LinkAttribute, LinkFlags, LinkMessage},
    neighbour::{NeighbourAttribute, NeighbourMessage, NeighbourState},
    route::{RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric, RouteVia},
};

use super::{
    namespace::Namespace,
    netlink::{Link, Netlink},
    wanted::{Address, Interface, Mac, Neighbour, Route, Wanted},
};
use crate::error::{Context, Error, Result};

/// Name of a slot that is back in the first namespace; the kernel counts.
const FREE: &str = "slot%d";

/// The pod's network namespace, and what was set in it.
pub struct Network {
    root: Namespace,
    root_link: Netlink,
    pod: Namespace,
    pod_link: Netlink,
    /// Index in the pod of each slot that is there.
    slots: HashMap<Mac, u32>,
    /// What may be set; more than what is wanted if a call failed half-way.
    set: Wanted,
}

impl Network {
    /// For a namespace in which nothing is set. The caller is in the one where the slots wait.
    pub fn new(pod: Namespace) -> io::Result<Self> {
        Ok(Self {
            root: Namespace::current()?,
            root_link: Netlink::open()?,
            pod_link: pod.within(Netlink::open)?,
            pod,
            slots: HashMap::new(),
            set: Wanted::default(),
        })
    }

    /// The namespace.
    pub fn namespace(&self) -> &Namespace {
        &self.pod
    }

    /// Sets the wanted state.
    pub fn apply(&mut self, wanted: &Wanted) -> Result<()> {
        let old = std::mem::take(&mut self.set);
        self.set = union(&old, wanted);
        self.forget_lost()?;
        self.take_away(&old, wanted)?;
        self.place(wanted)?;
        self.add(wanted)?;
        self.set = wanted.clone();
        Ok(())
    }

    /// A container with the right to may have moved an interface away, or removed it.
    fn forget_lost(&mut self) -> Result<()> {
        let links = links(&mut self.pod_link)?;
        self.slots
            .retain(|_, index| links.iter().any(|link| link.index == *index));
        Ok(())
    }

    fn take_away(&mut self, old: &Wanted, new: &Wanted) -> Result<()> {
        for neighbour in gone(&old.neighbours, &new.neighbours) {
            let Some(index) = self.slots.get(&neighbour.slot) else {
                continue;
            };
            let message = neighbour_message(neighbour, *index);
            let what = || format!("remove neighbour {}", neighbour.ip);
            remove(&mut self.pod_link, libc::RTM_DELNEIGH, &message, what)?;
        }
        for route in gone(&old.routes, &new.routes) {
            let Some(message) = route_message(route, &self.slots) else {
                continue;
            };
            let what = || format!("remove route {}", route.destination);
            remove(&mut self.pod_link, libc::RTM_DELROUTE, &message, what)?;
        }
        for address in gone(&old.addresses, &new.addresses) {
            let Some(index) = self.slots.get(&address.slot) else {
                continue;
            };
            let message = address_message(address, *index);
            let what = || format!("remove address {}", address.prefix);
            remove(&mut self.pod_link, libc::RTM_DELADDR, &message, what)?;
        }
        let wanted = |slot: &Mac| new.interfaces.iter().any(|one| one.slot == *slot);
        let free: Vec<Mac> = self.slots.keys().copied().filter(|s| !wanted(s)).collect();
        for slot in free {
            if let Some(index) = self.slots.remove(&slot) {
                let what = || format!("take the interface of slot {slot} out of the pod");
                let change = [
                    LinkAttribute::NetNsFd(raw(self.root.as_fd())),
                    LinkAttribute::IfName(FREE.into()),
                    LinkAttribute::Address(slot.0.to_vec()),
                ];
                let mut message = link_message(index, &change);
                message.header.change_mask = LinkFlags::Up;
                self.pod_link
                    .request(libc::RTM_SETLINK, 0, &message)
                    .step(what)?;
            }
        }
        Ok(())
    }

    /// Moves, names and configures the interfaces.
    fn place(&mut self, wanted: &Wanted) -> Result<()> {
        let here = links(&mut self.pod_link)?;
        let named = |slots: &HashMap<Mac, u32>, interface: &Interface| {
            let index = slots.get(&interface.slot)?;
            here.iter()
                .any(|link| link.index == *index && link.name == interface.name)
                .then_some(())
        };
        // Names may change hands: all that change are freed first.
        for (number, interface) in wanted.interfaces.iter().enumerate() {
            if let Some(index) = self.slots.get(&interface.slot)
                && named(&self.slots, interface).is_none()
            {
                let name = format!("renamed{number}");
                set_link(
                    &mut self.pod_link,
                    *index,
                    &[LinkAttribute::IfName(name)],
                    || format!("interface {}: free its name", interface.name),
                )?;
            }
        }
        for interface in &wanted.interfaces {
            let name = &interface.name;
            match self.slots.get(&interface.slot) {
                Some(_) if named(&self.slots, interface).is_some() => {}
                Some(index) => set_link(
                    &mut self.pod_link,
                    *index,
                    &[LinkAttribute::IfName(name.clone())],
                    || format!("interface {name}: rename"),
                )?,
                None => self.bring_in(interface)?,
            }
        }
        let here = links(&mut self.pod_link)?;
        for interface in &wanted.interfaces {
            let name = &interface.name;
            let Some(link) = here.iter().find(|link| link.name == *name) else {
                return Err(Error::State(format!("interface {name}: is gone")));
            };
            self.slots.insert(interface.slot, link.index);
            self.configure(interface, link)?;
        }
        Ok(())
    }

    fn bring_in(&mut self, interface: &Interface) -> Result<()> {
        let slot = interface.slot;
        let is_slot = |link: &&Link| link.permanent_mac == slot.0 || link.mac == slot.0;
        let links = links(&mut self.root_link)?;
        let Some(link) = links.iter().find(is_slot) else {
            return Err(Error::NotFound(format!(
                "interface {}: a free slot with MAC {slot}",
                interface.name
            )));
        };
        let change = [
            LinkAttribute::NetNsFd(raw(self.pod.as_fd())),
            LinkAttribute::IfName(interface.name.clone()),
        ];
        set_link(&mut self.root_link, link.index, &change, || {
            format!(
                "interface {}: bring slot {slot} into the pod",
                interface.name
            )
        })
    }

    fn configure(&mut self, interface: &Interface, link: &Link) -> Result<()> {
        let Interface { name, mac, mtu, .. } = interface;
        // The host's addresses are all that the interface has; a second link-local one would be the kernel's.
        let none = AfSpecInet6::AddrGenMode(In6AddrGenMode::None);
        let change = [LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(
            vec![none],
        )])];
        set_link(&mut self.pod_link, link.index, &change, || {
            format!("interface {name}: leave its link-local address to the host")
        })?;
        if link.mac != mac.0 {
            let change = [LinkAttribute::Address(mac.0.to_vec())];
            set_link(&mut self.pod_link, link.index, &change, || {
                format!("interface {name}: set MAC {mac}")
            })?;
        }
        if link.mtu != *mtu {
            let change = [LinkAttribute::Mtu(*mtu)];
            set_link(&mut self.pod_link, link.index, &change, || {
                format!("interface {name}: set MTU {mtu}")
            })?;
        }
        let mut message = link_message(link.index, &[]);
        message.header.change_mask = LinkFlags::Up;
        if interface.up {
            message.header.flags = LinkFlags::Up;
        }
        self.pod_link
            .request(libc::RTM_SETLINK, 0, &message)
            .step(|| format!("interface {name}: set it up or down"))
    }

    fn add(&mut self, wanted: &Wanted) -> Result<()> {
        let interface = |slot: &Mac| wanted.interfaces.iter().find(|one| one.slot == *slot);
        let name = |slot: &Mac| interface(slot).map_or("", |one| one.name.as_str());
        let is_up = |slot: &Mac| interface(slot).is_some_and(|one| one.up);
        for address in &wanted.addresses {
            let Some(index) = self.slots.get(&address.slot) else {
                continue;
            };
            let message = address_message(address, *index);
            let flags = NLM_F_CREATE | NLM_F_REPLACE;
            let what = || {
                let name = name(&address.slot);
                format!("interface {name}: set address {}", address.prefix)
            };
            add(&mut self.pod_link, libc::RTM_NEWADDR, flags, &message, what)?;
        }
        // The kernel takes neither routes nor neighbours of an interface that is down.
        for route in &wanted.routes {
            if route.slot.is_some_and(|slot| !is_up(&slot)) {
                continue;
            }
            let Some(message) = route_message(route, &self.slots) else {
                continue;
            };
            // Not REPLACE: two interfaces may have a route to the same network.
            let flags = NLM_F_CREATE | NLM_F_APPEND;
            let what = || {
                let name = route.slot.as_ref().map_or("none", name);
                let gateway = route.gateway.map(|ip| format!(" via {ip}"));
                let gateway = gateway.unwrap_or_default();
                format!("interface {name}: set route {}{gateway}", route.destination)
            };
            add(
                &mut self.pod_link,
                libc::RTM_NEWROUTE,
                flags,
                &message,
                what,
            )?;
        }
        for neighbour in wanted.neighbours.iter().filter(|one| is_up(&one.slot)) {
            let Some(index) = self.slots.get(&neighbour.slot) else {
                continue;
            };
            let message = neighbour_message(neighbour, *index);
            let flags = NLM_F_CREATE | NLM_F_REPLACE;
            let what = || {
                let name = name(&neighbour.slot);
                format!("interface {name}: set neighbour {}", neighbour.ip)
            };
            add(
                &mut self.pod_link,
                libc::RTM_NEWNEIGH,
                flags,
                &message,
                what,
            )?;
        }
        Ok(())
    }
}

fn gone<'a, T: PartialEq>(old: &'a [T], new: &'a [T]) -> impl Iterator<Item = &'a T> {
    old.iter().filter(|one| !new.contains(one))
}

fn union(a: &Wanted, b: &Wanted) -> Wanted {
    fn both<T: Clone + PartialEq>(a: &[T], b: &[T]) -> Vec<T> {
        b.iter().chain(gone(a, b)).cloned().collect()
    }
    Wanted {
        interfaces: both(&a.interfaces, &b.interfaces),
        addresses: both(&a.addresses, &b.addresses),
        routes: both(&a.routes, &b.routes),
        neighbours: both(&a.neighbours, &b.neighbours),
        resolver: b.resolver,
    }
}

fn links(netlink: &mut Netlink) -> Result<Vec<Link>> {
    netlink.links().step(|| "list the interfaces".into())
}

fn set_link(
    netlink: &mut Netlink,
    index: u32,
    attributes: &[LinkAttribute],
    what: impl FnOnce() -> String,
) -> Result<()> {
    let message = link_message(index, attributes);
    netlink.request(libc::RTM_SETLINK, 0, &message).step(what)
}

fn add(
    netlink: &mut Netlink,
    kind: u16,
    flags: u16,
    message: &impl Emitable,
    what: impl FnOnce() -> String,
) -> Result<()> {
    match netlink.request(kind, flags, message) {
        Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(()),
        other => other.step(what),
    }
}

/// What the kernel, or a container, has removed already is no error.
fn remove(
    netlink: &mut Netlink,
    kind: u16,
    message: &impl Emitable,
    what: impl FnOnce() -> String,
) -> Result<()> {
    const MISSING: [i32; 4] = [libc::ESRCH, libc::ENOENT, libc::EADDRNOTAVAIL, libc::ENODEV];
    match netlink.request(kind, 0, message) {
        Err(error) if error.raw_os_error().is_some_and(|e| MISSING.contains(&e)) => Ok(()),
        other => other.step(what),
    }
}

fn raw(fd: BorrowedFd<'_>) -> i32 {
    fd.as_raw_fd()
}

fn link_message(index: u32, attributes: &[LinkAttribute]) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.attributes = attributes.to_vec();
    message
}

fn address_message(address: &Address, index: u32) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = address.prefix.ip.into();
    message.header.prefix_len = address.prefix.length;
    message.header.scope = address.scope.into();
    message.header.index = index;
    message.attributes = vec![
        AddressAttribute::Local(address.prefix.ip),
        AddressAttribute::Address(address.peer.unwrap_or(address.prefix.ip)),
        // The host has made sure that it is unique, and names its routes.
        AddressAttribute::Flags(AddressFlags::Nodad | AddressFlags::Noprefixroute),
    ];
    let broadcast = address.broadcast.map(AddressAttribute::Broadcast);
    message.attributes.extend(broadcast);
    message
}

/// `None` if its interface is not in the pod.
fn route_message(route: &Route, slots: &HashMap<Mac, u32>) -> Option<RouteMessage> {
    let mut message = RouteMessage::default();
    message.header.address_family = route.destination.ip.into();
    message.header.destination_prefix_length = route.destination.length;
    message.header.table = RouteHeader::RT_TABLE_MAIN;
    message.header.protocol = route.protocol.into();
    message.header.scope = route.scope.into();
    message.header.kind = route.kind.into();
    if route.onlink {
        message.header.flags = RouteFlags::Onlink;
    }
    let attributes = &mut message.attributes;
    if route.destination.length > 0 {
        attributes.push(RouteAttribute::Destination(route.destination.ip.into()));
    }
    if let Some(slot) = route.slot {
        attributes.push(RouteAttribute::Oif(*slots.get(&slot)?));
    }
    if let Some(gateway) = route.gateway {
        attributes.push(if gateway.is_ipv4() == route.destination.ip.is_ipv4() {
            RouteAttribute::Gateway(gateway.into())
        } else {
            RouteAttribute::Via(RouteVia::from(gateway))
        });
    }
    if let Some(source) = route.source {
        attributes.push(RouteAttribute::PrefSource(source.into()));
    }
    if route.metric > 0 {
        attributes.push(RouteAttribute::Priority(route.metric));
    }
    if route.mtu > 0 {
        attributes.push(RouteAttribute::Metrics(vec![RouteMetric::Mtu(route.mtu)]));
    }
    Some(message)
}

fn neighbour_message(neighbour: &Neighbour, index: u32) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = neighbour.ip.into();
    message.header.ifindex = index;
    message.header.state = NeighbourState::Permanent;
    message.attributes = vec![
        NeighbourAttribute::Destination(neighbour.ip.into()),
        NeighbourAttribute::LinkLayerAddress(neighbour.mac.0.to_vec()),
    ];
    message
}

#[cfg(test)]
#[path = "apply_tests.rs"]
mod tests;
