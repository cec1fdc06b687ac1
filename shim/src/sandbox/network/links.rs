//! What a pod's namespace holds, as the guest shall have it: interfaces, addresses, routes and permanent neighbours.
//!
//! Read at create, at start and whenever the kernel tells of a change. Left out: loopback and our taps, interfaces that are not
//! Ethernet or have no MAC of a station (the fallback tunnels that a kernel puts into every namespace), ports of a bridge or bond in the
//! namespace, and routing tables other than main.

use std::{
    collections::BTreeMap,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use bulkhead_protocol::agent;
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    address::{AddressAttribute, AddressFlags, AddressMessage},
    link::{LinkAttribute, LinkFlags, LinkLayerType, LinkMessage},
    neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState},
    route::{
        RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric, RouteType,
    },
};

use super::{netlink::Netlink, tap};

/// A MAC.
pub type Mac = [u8; 6];

/// The smallest MTU of IPv4 (RFC 791).
const MTU_MIN: u32 = 68;

/// An interface that the guest shall have.
#[derive(Clone, Debug, PartialEq)]
pub struct Link {
    /// Its number in the namespace.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Its MAC.
    pub mac: Mac,
    /// Its MTU.
    pub mtu: u32,
    /// Whether it is up.
    pub up: bool,
}

/// All of it; addresses, routes and neighbours with the number of their interface.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct State {
    /// In the order of their numbers.
    pub links: BTreeMap<u32, Link>,
    /// Taps of ours (of whatever pod), with their numbers.
    pub taps: BTreeMap<String, u32>,
    addresses: Vec<(u32, agent::Address)>,
    routes: Vec<(Option<u32>, agent::Route)>,
    neighbours: Vec<(u32, agent::Neighbour)>,
}

impl State {
    /// Reads the namespace of the socket.
    pub fn read(netlink: &mut Netlink) -> io::Result<Self> {
        let mut state = Self::default();
        for message in netlink.dump(&RouteNetlinkMessage::GetLink(LinkMessage::default()))? {
            if let RouteNetlinkMessage::NewLink(link) = message {
                state.add_link(&link);
            }
        }
        if state.links.is_empty() {
            return Ok(state);
        }
        for request in [
            RouteNetlinkMessage::GetAddress(AddressMessage::default()),
            routes_of(AddressFamily::Inet),
            routes_of(AddressFamily::Inet6),
            RouteNetlinkMessage::GetNeighbour(NeighbourMessage::default()),
        ] {
            for message in netlink.dump(&request)? {
                match message {
                    RouteNetlinkMessage::NewAddress(address) => {
                        state.addresses.extend(self::address(&address));
                    }
                    RouteNetlinkMessage::NewRoute(route) => {
                        state.routes.extend(self::route(&route))
                    }
                    RouteNetlinkMessage::NewNeighbour(neighbour) => {
                        state.neighbours.extend(self::neighbour(&neighbour));
                    }
                    _ => {}
                }
            }
        }
        Ok(state)
    }

    fn add_link(&mut self, message: &LinkMessage) {
        let mut link = Link {
            index: message.header.index,
            name: String::new(),
            mac: Mac::default(),
            mtu: 0,
            up: message.header.flags.contains(LinkFlags::Up),
        };
        let mut port = false;
        for attribute in &message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name.clone_from(name),
                LinkAttribute::Address(mac) => {
                    link.mac = mac.as_slice().try_into().unwrap_or_default();
                }
                LinkAttribute::Mtu(mtu) => link.mtu = (*mtu).clamp(MTU_MIN, tap::MTU_MAX),
                LinkAttribute::Controller(of) => port = *of != 0,
                _ => {}
            }
        }
        if link.name.starts_with(tap::PREFIX) {
            self.taps.insert(link.name, link.index);
        } else if message.header.link_layer_type == LinkLayerType::Ether
            && is_station(link.mac)
            && !port
        {
            self.links.insert(link.index, link);
        }
    }

    /// What the agent is told, for the interfaces that have a slot: their numbers and the boot MACs of the slots.
    pub fn request(&self, served: &[(u32, String)]) -> agent::SetNetworkRequest {
        let mut request = agent::SetNetworkRequest::new();
        let name = |index: u32| -> Option<String> {
            served.iter().find(|(link, _)| *link == index)?;
            self.links.get(&index).map(|link| link.name.clone())
        };
        for (index, slot_mac) in served {
            let Some(link) = self.links.get(index) else {
                continue;
            };
            let mut interface = agent::Interface::new();
            interface.slot_mac.clone_from(slot_mac);
            interface.name.clone_from(&link.name);
            interface.mac = mac_text(&link.mac);
            interface.mtu = link.mtu;
            interface.up = link.up;
            let own = self.addresses.iter().filter(|(on, _)| on == index);
            interface.addresses = own.map(|(_, address)| address.clone()).collect();
            request.interfaces.push(interface);
        }
        for (through, route) in &self.routes {
            let mut route = route.clone();
            if let Some(index) = through {
                let Some(name) = name(*index) else { continue };
                route.interface = name;
            }
            request.routes.push(route);
        }
        for (on, neighbour) in &self.neighbours {
            if let Some(name) = name(*on) {
                let mut neighbour = neighbour.clone();
                neighbour.interface = name;
                request.neighbours.push(neighbour);
            }
        }
        request
    }
}

/// Neither all zero, as gretap0 and erspan0 have it, nor of a group (IEEE 802: the lowest bit of the first byte).
fn is_station(mac: Mac) -> bool {
    mac != Mac::default() && mac.first().is_some_and(|first| first & 1 == 0)
}

/// `02:62:6b:00:00:00`.
pub fn mac_text(mac: &[u8]) -> String {
    let bytes: Vec<String> = mac.iter().map(|b| format!("{b:02x}")).collect();
    bytes.join(":")
}

fn address(message: &AddressMessage) -> Option<(u32, agent::Address)> {
    let (mut local, mut address, mut broadcast) = (None, None, None);
    let mut flags = AddressFlags::empty();
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(ip) => local = Some(*ip),
            AddressAttribute::Address(ip) => address = Some(*ip),
            AddressAttribute::Broadcast(ip) => broadcast = Some(*ip),
            AddressAttribute::Flags(all) => flags = *all,
            _ => {}
        }
    }
    if flags.contains(AddressFlags::Dadfailed) {
        return None;
    }
    // if_addr.h: IFA_ADDRESS is the peer's on a point-to-point interface, and the same as IFA_LOCAL otherwise.
    let own = local.or(address)?;
    let mut result = agent::Address::new();
    result.address = format!("{own}/{}", message.header.prefix_len);
    if let Some(peer) = address.filter(|peer| *peer != own) {
        result.peer = peer.to_string();
    }
    result.broadcast = broadcast.map_or_else(String::new, |ip| ip.to_string());
    result.scope = u32::from(u8::from(message.header.scope));
    Some((message.header.index, result))
}

fn routes_of(family: AddressFamily) -> RouteNetlinkMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = family;
    RouteNetlinkMessage::GetRoute(message)
}

/// A route of the main table that the guest shall have, with the number of its interface. Of several next hops it gets the first.
fn route(message: &RouteMessage) -> Option<(Option<u32>, agent::Route)> {
    let header = &message.header;
    let mut route = agent::Route::new();
    let mut table = u32::from(header.table);
    let mut through = None;
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Table(number) => table = *number,
            RouteAttribute::Oif(index) => through = Some(*index),
            RouteAttribute::MultiPath(hops) => {
                if let Some(hop) = hops.first() {
                    through = Some(hop.interface_index);
                    set_gateway(&mut route, &hop.attributes);
                }
            }
            RouteAttribute::Destination(to) => {
                if let Some(ip) = ip(to) {
                    route.destination = format!("{ip}/{}", header.destination_prefix_length);
                }
            }
            RouteAttribute::PrefSource(from) => route.source = text(from),
            RouteAttribute::Priority(metric) => route.metric = *metric,
            RouteAttribute::Metrics(metrics) => {
                for metric in metrics {
                    if let RouteMetric::Mtu(mtu) = metric {
                        route.mtu = *mtu;
                    }
                }
            }
            _ => {}
        }
    }
    set_gateway(&mut route, &message.attributes);
    route.scope = u32::from(u8::from(header.scope));
    route.type_ = u32::from(u8::from(header.kind));
    route.protocol = u32::from(u8::from(header.protocol));
    route.onlink = header.flags.contains(RouteFlags::Onlink);
    route.ipv6 = header.address_family == AddressFamily::Inet6;
    let main = table == u32::from(RouteHeader::RT_TABLE_MAIN);
    let cached = header.flags.contains(RouteFlags::Cloned);
    match header.kind {
        _ if !main || cached => None,
        RouteType::Unicast => through.map(|index| (Some(index), route)),
        RouteType::BlackHole | RouteType::Unreachable | RouteType::Prohibit => Some((None, route)),
        _ => None,
    }
}

fn set_gateway(route: &mut agent::Route, attributes: &[RouteAttribute]) {
    for attribute in attributes {
        match attribute {
            RouteAttribute::Gateway(to) => route.gateway = text(to),
            RouteAttribute::Via(netlink_packet_route::route::RouteVia::Inet6(ip)) => {
                route.gateway = ip.to_string();
            }
            _ => {}
        }
    }
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(ip) => Some((*ip).into()),
        RouteAddress::Inet6(ip) => Some((*ip).into()),
        _ => None,
    }
}

fn text(address: &RouteAddress) -> String {
    ip(address).map_or_else(String::new, |ip| ip.to_string())
}

fn neighbour(message: &NeighbourMessage) -> Option<(u32, agent::Neighbour)> {
    if message.header.state != NeighbourState::Permanent {
        return None;
    }
    let mut result = agent::Neighbour::new();
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(ip)) => {
                result.ip = Ipv4Addr::to_string(ip);
            }
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(ip)) => {
                result.ip = Ipv6Addr::to_string(ip);
            }
            NeighbourAttribute::LinkLayerAddress(mac) if mac.len() == 6 => {
                result.mac = mac_text(mac);
            }
            _ => {}
        }
    }
    let whole = !result.ip.is_empty() && !result.mac.is_empty();
    whole.then_some((message.header.ifindex, result))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ethernet_interface_without_a_stations_mac_is_left_out() {
        let mut state = State::default();
        for (index, mac) in [
            (1, vec![0; 6]),
            (2, vec![0x33, 0x33, 0, 0, 0, 1]),
            (3, vec![2, 0, 0, 0, 0, 1]),
            (4, vec![2, 0, 0, 0]),
        ] {
            let mut message = LinkMessage::default();
            message.header.index = index;
            message.header.link_layer_type = LinkLayerType::Ether;
            message.attributes = vec![
                LinkAttribute::IfName(format!("gretap{index}")),
                LinkAttribute::Address(mac),
                LinkAttribute::Mtu(1462),
            ];
            state.add_link(&message);
        }
        assert_eq!(state.links.keys().copied().collect::<Vec<_>>(), [3]);
    }
}
