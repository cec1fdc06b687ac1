//! The state that the host wants the pod's network to have: a request, checked. Interfaces are known by their slot from here on, since
//! names can change hands.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    str::FromStr,
};

use bulkhead_protocol::{
    agent::{self, SetNetworkRequest},
    limits::{ADDRESSES_MAX, NEIGHBOURS_MAX, NET_SLOTS, ROUTES_MAX},
};

use crate::error::{Error, Result};

/// `RTPROT_BOOT`: what ip(8) calls a route of nobody in particular.
const PROTOCOL_BOOT: u8 = 3;
/// `RTN_UNICAST`, and the types of routes that lead nowhere: blackhole, unreachable, prohibit.
const UNICAST: u8 = 1;
const NOWHERE: [u8; 3] = [6, 7, 8];
/// What the kernel has for an Ethernet device.
const MTU_MIN: u32 = 68;
const MTU_MAX: u32 = 65535;

/// A MAC address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Mac(pub [u8; 6]);

impl FromStr for Mac {
    type Err = ();

    fn from_str(text: &str) -> std::result::Result<Self, ()> {
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().ok_or(())?;
            if part.len() != 2 || !part.bytes().all(|b| b.is_ascii_hexdigit()) {
                return Err(());
            }
            *byte = u8::from_str_radix(part, 16).map_err(drop)?;
        }
        let unicast = bytes[0] & 1 == 0 && bytes != [0; 6];
        match parts.next() {
            None if unicast => Ok(Self(bytes)),
            _ => Err(()),
        }
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// An address with the length of its network's prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prefix {
    /// The address.
    pub ip: IpAddr,
    /// Bits of the network.
    pub length: u8,
}

impl FromStr for Prefix {
    type Err = ();

    fn from_str(text: &str) -> std::result::Result<Self, ()> {
        let (ip, length) = text.split_once('/').ok_or(())?;
        let ip: IpAddr = ip.parse().map_err(drop)?;
        let length: u8 = length.parse().map_err(drop)?;
        let most = if ip.is_ipv4() { 32 } else { 128 };
        if length > most {
            return Err(());
        }
        Ok(Self { ip, length })
    }
}

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.ip, self.length)
    }
}

/// An interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    /// MAC of its slot.
    pub slot: Mac,
    /// Its name in the pod.
    pub name: String,
    /// Its MAC in the pod.
    pub mac: Mac,
    /// Its MTU.
    pub mtu: u32,
    /// Whether it is up.
    pub up: bool,
}

/// An address of an interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    /// Whose it is.
    pub slot: Mac,
    /// Address and prefix; of a peer the prefix is the peer's.
    pub prefix: Prefix,
    /// The other end of a point-to-point link.
    pub peer: Option<IpAddr>,
    /// Broadcast address.
    pub broadcast: Option<Ipv4Addr>,
    /// As rtnetlink counts.
    pub scope: u8,
}

/// A route of the main table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// Interface; `None` if it leads nowhere.
    pub slot: Option<Mac>,
    /// Where to.
    pub destination: Prefix,
    /// Next hop.
    pub gateway: Option<IpAddr>,
    /// Preferred source.
    pub source: Option<IpAddr>,
    /// Priority; 0 is the kernel's default.
    pub metric: u32,
    /// As rtnetlink counts.
    pub scope: u8,
    /// As rtnetlink counts.
    pub kind: u8,
    /// The gateway is on the link.
    pub onlink: bool,
    /// MTU; 0 for none of its own.
    pub mtu: u32,
    /// As rtnetlink counts.
    pub protocol: u8,
}

/// A permanent neighbour.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Neighbour {
    /// On which interface.
    pub slot: Mac,
    /// Whose.
    pub ip: IpAddr,
    /// Its MAC.
    pub mac: Mac,
}

/// All of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// Interfaces; names and slots are unique.
    pub interfaces: Vec<Interface>,
    /// Addresses of these interfaces.
    pub addresses: Vec<Address>,
    /// Routes, those first that others need: what is on the link before what is behind a gateway.
    pub routes: Vec<Route>,
    /// Neighbours.
    pub neighbours: Vec<Neighbour>,
    /// Whether 127.0.0.11 answers in the pod.
    pub resolver: bool,
}

impl Wanted {
    /// Checks a request.
    pub fn parse(request: &SetNetworkRequest) -> Result<Self> {
        at_most("interfaces", request.interfaces.len(), NET_SLOTS)?;
        at_most("routes", request.routes.len(), ROUTES_MAX)?;
        at_most("neighbours", request.neighbours.len(), NEIGHBOURS_MAX)?;
        let mut wanted = Self {
            resolver: request.resolver,
            ..Self::default()
        };
        for (index, given) in request.interfaces.iter().enumerate() {
            wanted.take_interface(&format!("interfaces[{index}]"), given)?;
        }
        for (index, given) in request.routes.iter().enumerate() {
            let route = wanted.route(&format!("routes[{index}]"), given)?;
            wanted.routes.push(route);
        }
        wanted.routes.sort_by_key(|route| route.gateway.is_some());
        for (index, given) in request.neighbours.iter().enumerate() {
            let field = format!("neighbours[{index}]");
            let neighbour = Neighbour {
                slot: wanted.slot(&field, &given.interface)?,
                ip: value(&field, "ip", &given.ip)?,
                mac: value(&field, "mac", &given.mac)?,
            };
            wanted.neighbours.push(neighbour);
        }
        Ok(wanted)
    }

    fn take_interface(&mut self, field: &str, given: &agent::Interface) -> Result<()> {
        let interface = Interface {
            slot: value(field, "slot_mac", &given.slot_mac)?,
            name: given.name.clone(),
            mac: value(field, "mac", &given.mac)?,
            mtu: given.mtu,
            up: given.up,
        };
        if !is_name(&interface.name) {
            return wrong(field, "name", &interface.name, "is no name of an interface");
        }
        if !(MTU_MIN..=MTU_MAX).contains(&interface.mtu) {
            return wrong(field, "mtu", &interface.mtu.to_string(), "is no MTU");
        }
        for other in &self.interfaces {
            if other.name == interface.name {
                return wrong(field, "name", &interface.name, "is another interface's");
            }
            if other.slot == interface.slot {
                return wrong(field, "slot_mac", &given.slot_mac, "is another interface's");
            }
        }
        at_most(
            &format!("{field}.addresses"),
            given.addresses.len(),
            ADDRESSES_MAX,
        )?;
        for (index, address) in given.addresses.iter().enumerate() {
            let field = format!("{field}.addresses[{index}]");
            let prefix: Prefix = value(&field, "address", &address.address)?;
            let peer: Option<IpAddr> = optional(&field, "peer", &address.peer)?;
            if peer.is_some_and(|peer| peer.is_ipv4() != prefix.ip.is_ipv4()) {
                return wrong(&field, "peer", &address.peer, "is of another family");
            }
            self.addresses.push(Address {
                slot: interface.slot,
                prefix,
                peer,
                broadcast: optional(&field, "broadcast", &address.broadcast)?,
                scope: number(&field, "scope", address.scope)?,
            });
        }
        self.interfaces.push(interface);
        Ok(())
    }

    fn slot(&self, field: &str, name: &str) -> Result<Mac> {
        let mut all = self.interfaces.iter();
        match all.find(|interface| interface.name == name) {
            Some(interface) => Ok(interface.slot),
            None => wrong(field, "interface", name, "is none of the interfaces"),
        }
    }

    fn route(&self, field: &str, given: &agent::Route) -> Result<Route> {
        let gateway: Option<IpAddr> = optional(field, "gateway", &given.gateway)?;
        let source: Option<IpAddr> = optional(field, "source", &given.source)?;
        let destination = match optional(field, "destination", &given.destination)? {
            Some(destination) => destination,
            None => {
                let ipv6 = given.ipv6
                    || gateway.is_some_and(|ip| ip.is_ipv6())
                        && source.is_none_or(|ip| ip.is_ipv6());
                let ip = if ipv6 {
                    Ipv6Addr::UNSPECIFIED.into()
                } else {
                    Ipv4Addr::UNSPECIFIED.into()
                };
                Prefix { ip, length: 0 }
            }
        };
        if destination.ip.is_ipv6() && gateway.is_some_and(|ip| ip.is_ipv4()) {
            return wrong(field, "gateway", &given.gateway, "is of another family");
        }
        if source.is_some_and(|ip| ip.is_ipv4() != destination.ip.is_ipv4()) {
            return wrong(field, "source", &given.source, "is of another family");
        }
        let kind = match number(field, "type", given.type_)? {
            0 | UNICAST => UNICAST,
            kind if NOWHERE.contains(&kind) => kind,
            kind => return wrong(field, "type", &kind.to_string(), "is no type for a pod"),
        };
        let slot = match kind {
            UNICAST => Some(self.slot(field, &given.interface)?),
            _ => None,
        };
        Ok(Route {
            slot,
            destination,
            gateway,
            source,
            metric: given.metric,
            scope: number(field, "scope", given.scope)?,
            kind,
            onlink: given.onlink,
            mtu: given.mtu,
            protocol: match number(field, "protocol", given.protocol)? {
                0 => PROTOCOL_BOOT,
                protocol => protocol,
            },
        })
    }
}

/// As the kernel's `dev_valid_name`; `%` would make it a pattern, and `lo` is there already.
fn is_name(name: &str) -> bool {
    (1..=15).contains(&name.len())
        && !matches!(name, "." | ".." | "lo")
        && !name
            .bytes()
            .any(|b| matches!(b, b'/' | b':' | b'%' | 0) || b.is_ascii_whitespace())
}

fn at_most(field: &str, count: usize, most: usize) -> Result<()> {
    if count <= most {
        return Ok(());
    }
    Err(Error::Limit(format!(
        "{field}: {count} are more than {most}"
    )))
}

fn wrong<T>(field: &str, name: &str, value: &str, reason: &str) -> Result<T> {
    Err(Error::field(
        format!("{field}.{name}"),
        format!("\"{value}\" {reason}"),
    ))
}

fn value<T: FromStr>(field: &str, name: &str, text: &str) -> Result<T> {
    match text.parse() {
        Ok(value) => Ok(value),
        Err(_) => wrong(field, name, text, "is no such address"),
    }
}

fn optional<T: FromStr>(field: &str, name: &str, text: &str) -> Result<Option<T>> {
    if text.is_empty() {
        return Ok(None);
    }
    value(field, name, text).map(Some)
}

fn number(field: &str, name: &str, value: u32) -> Result<u8> {
    match u8::try_from(value) {
        Ok(value) => Ok(value),
        Err(_) => wrong(field, name, &value.to_string(), "is above 255"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn interface(slot: u8, name: &str) -> agent::Interface {
        agent::Interface {
            slot_mac: format!("02:62:6b:00:00:{slot:02x}"),
            name: name.into(),
            mac: format!("02:00:00:00:00:{slot:02x}"),
            mtu: 1500,
            up: true,
            ..Default::default()
        }
    }

    fn request(interfaces: &[agent::Interface]) -> SetNetworkRequest {
        SetNetworkRequest {
            interfaces: interfaces.to_vec(),
            ..Default::default()
        }
    }

    fn error(request: &SetNetworkRequest) -> String {
        Wanted::parse(request).unwrap_err().text()
    }

    #[test]
    fn each_list_has_its_cap() {
        let names: Vec<_> = (0..=NET_SLOTS)
            .map(|n| interface(n as u8, &format!("eth{n}")))
            .collect();
        Wanted::parse(&request(&names[..NET_SLOTS])).unwrap();
        assert!(error(&request(&names)).contains("interfaces"));

        let mut full = interface(0, "eth0");
        full.addresses = vec![
            agent::Address {
                address: "10.0.0.1/8".into(),
                ..Default::default()
            };
            ADDRESSES_MAX
        ];
        Wanted::parse(&request(&[full.clone()])).unwrap();
        full.addresses.push(full.addresses[0].clone());
        assert!(error(&request(&[full])).contains("interfaces[0].addresses"));

        let mut many = request(&[interface(0, "eth0")]);
        let route = agent::Route {
            interface: "eth0".into(),
            ..Default::default()
        };
        many.routes = vec![route; ROUTES_MAX];
        Wanted::parse(&many).unwrap();
        many.routes.push(many.routes[0].clone());
        assert!(error(&many).contains("routes"));

        let mut many = request(&[interface(0, "eth0")]);
        let neighbour = agent::Neighbour {
            ip: "10.0.0.1".into(),
            mac: "02:00:00:00:00:01".into(),
            interface: "eth0".into(),
            ..Default::default()
        };
        many.neighbours = vec![neighbour; NEIGHBOURS_MAX];
        Wanted::parse(&many).unwrap();
        many.neighbours.push(many.neighbours[0].clone());
        assert!(error(&many).contains("neighbours"));
    }

    #[test]
    fn names_that_the_kernel_would_not_take_are_refused() {
        for name in [
            "",
            "lo",
            ".",
            "..",
            "a/b",
            "a b",
            "eth%d",
            "sixteen-letters-",
            "a:1",
        ] {
            let text = error(&request(&[interface(0, name)]));
            assert!(text.contains("interfaces[0].name"), "{name}: {text}");
        }
        Wanted::parse(&request(&[interface(0, "eth0.100@x")])).unwrap();
    }

    #[test]
    fn two_interfaces_share_neither_name_nor_slot() {
        assert!(error(&request(&[interface(0, "a"), interface(1, "a")])).contains("[1].name"));
        assert!(error(&request(&[interface(0, "a"), interface(0, "b")])).contains("slot_mac"));
    }

    #[test]
    fn macs_are_unicast_and_six_bytes() {
        for mac in [
            "",
            "02:00:00:00:00",
            "01:00:00:00:00:01",
            "00:00:00:00:00:00",
            "02:00:00:00:00:01:02",
            "2:0:0:0:0:1",
            "+2:00:00:00:00:01",
        ] {
            assert!(mac.parse::<Mac>().is_err(), "{mac}");
        }
        let mac: Mac = "02:62:6B:00:00:0f".parse().unwrap();
        assert_eq!(mac.to_string(), "02:62:6b:00:00:0f");
    }

    #[test]
    fn a_default_route_has_the_family_of_its_gateway() {
        let mut request = request(&[interface(0, "eth0")]);
        for (gateway, ipv6) in [("10.0.0.1", false), ("fe80::1", false), ("", true)] {
            request.routes.push(agent::Route {
                gateway: gateway.into(),
                interface: "eth0".into(),
                ipv6,
                ..Default::default()
            });
        }
        let routes = Wanted::parse(&request).unwrap().routes;
        // What needs no gateway comes first.
        assert_eq!(routes[0].destination.to_string(), "::/0");
        assert_eq!(routes[1].destination.to_string(), "0.0.0.0/0");
        assert_eq!(routes[2].destination.to_string(), "::/0");
    }

    #[test]
    fn routes_that_make_no_sense_are_refused() {
        let route = |change: fn(&mut agent::Route)| {
            let mut route = agent::Route {
                destination: "10.1.0.0/16".into(),
                interface: "eth0".into(),
                ..Default::default()
            };
            change(&mut route);
            let mut request = request(&[interface(0, "eth0")]);
            request.routes.push(route);
            Wanted::parse(&request).map_err(|error| error.text())
        };
        route(|_| ()).unwrap();
        route(|r| (r.type_, r.interface) = (7, String::new())).unwrap();
        assert!(route(|r| r.interface = "eth1".into()).is_err());
        assert!(route(|r| r.destination = "10.1.0.0/33".into()).is_err());
        assert!(route(|r| r.destination = "10.1.0.0".into()).is_err());
        assert!(route(|r| r.source = "::1".into()).is_err());
        assert!(route(|r| r.type_ = 2).is_err());
        assert!(route(|r| r.scope = 256).is_err());
        let v6 = |r: &mut agent::Route| {
            (r.destination, r.gateway) = ("fd00::/8".into(), "10.0.0.1".into());
        };
        assert!(route(v6).is_err());
    }
}
