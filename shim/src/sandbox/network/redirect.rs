//! The two-way redirect between an interface and its tap (tc-mirred(8), tc-u32(8)).
//!
//! What arrives at the interface goes out of the tap, to the guest; what the guest sends arrives at the tap and goes out of the
//! interface, if its source is the interface's MAC. Anything else that the guest sends is dropped.
//!
//! Where Docker's resolver is in the namespace, the answers of the servers that it asks itself stay with the namespace's own stack
//! ([`hear_answers`]).
//!
//! `ingress` with `u32` and `mirred` is there on every kernel met. `gact`, which drops, is not: then a frame with a forged source is
//! sent back to the guest that made it.

use std::{collections::BTreeSet, io};

use netlink_packet_core::{DefaultNla, NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::{
    RouteNetlinkMessage,
    tc::{
        TcAction, TcActionAttribute, TcActionGeneric, TcActionMirror, TcActionMirrorOption,
        TcActionOption, TcActionType, TcAttribute, TcFilterU32, TcFilterU32Option, TcHandle,
        TcHeader, TcMessage, TcMirror, TcMirrorActionType, TcOption, TcU32Key, TcU32Selector,
        TcU32SelectorFlags,
    },
};

use super::netlink::Netlink;

/// Priority of our filters, by which they are found again.
const PRIORITY: u16 = 0x6268;
/// That of the tap's filter for frames that the first did not take.
const REST: u16 = PRIORITY + 1;
/// That of the interface's filters for frames that are not, or not only, the guest's.
const OWN: u16 = PRIORITY - 1;
/// Ports from which the namespace's own stack dials once it hears answers: what [`OWN_PORTS_MASK`] describes, outside of the range that
/// the guest's kernel dials from (ip-sysctl: `ip_local_port_range`, 32768 to 60999).
pub const OWN_PORTS: std::ops::RangeInclusive<u16> = 0xf000..=0xffff;
const OWN_PORTS_MASK: u32 = 0xf000;
/// The port of DNS servers.
const DNS: u32 = 53;
/// Handle of an ingress qdisc.
const INGRESS: TcHandle = TcHandle {
    major: 0xffff,
    minor: 0,
};
/// Parent of filters of an ingress qdisc and of clsact alike.
const FILTERS: TcHandle = TcHandle {
    major: 0xffff,
    minor: TcHandle::MIN_INGRESS,
};
/// pkt_cls.h: drop the packet.
const TC_ACT_SHOT: i32 = 2;
/// tc_act/tc_gact.h.
const TCA_GACT_PARMS: u16 = 2;

/// The guest's half: what the tap brings goes out of the interface, if its source is `mac`.
pub fn from_guest(netlink: &mut Netlink, link: u32, tap: u32, mac: [u8; 6]) -> io::Result<()> {
    add_qdisc(netlink, tap)?;
    let [a, b, c, d, e, f] = mac;
    // From the network header, before which the Ethernet header ends: source MAC and type.
    let source = [
        key(-8, u32::from_be_bytes([a, b, c, d]), u32::MAX),
        key(-4, u32::from_be_bytes([e, f, 0, 0]), 0xffff_0000),
    ];
    add_filter(
        netlink,
        tap,
        PRIORITY,
        source.to_vec(),
        Some(redirect(link)),
    )?;
    match add_filter(netlink, tap, REST, every_frame(), Some(drop_frame())) {
        Err(e) if e.raw_os_error() == Some(libc::ENOENT) => {
            add_filter(netlink, tap, REST, every_frame(), Some(redirect(tap)))
        }
        result => result,
    }
}

/// The interface's half: what arrives there goes out of the tap.
pub fn to_guest(netlink: &mut Netlink, link: u32, tap: u32) -> io::Result<()> {
    match add_qdisc(netlink, link) {
        Err(e) if e.raw_os_error() == Some(libc::EEXIST) => {
            remove_filters(netlink, link)?; // Of one that died.
        }
        result => result?,
    }
    add_filter(netlink, link, PRIORITY, every_frame(), Some(redirect(tap)))
}

/// Gives the namespace's own stack what it needs to ask DNS servers beside the guest, with the same addresses: frames from port 53 to
/// [`OWN_PORTS`] are its own alone, answers of neighbours are for both. Done twice it is as done once.
pub fn hear_answers(netlink: &mut Netlink, link: u32, tap: u32) -> io::Result<()> {
    remove_filter(netlink, link, OWN)?;
    // Offsets are from the network header; 2 before it ends the Ethernet header with the type.
    let ports = (DNS << 16) | *OWN_PORTS.start() as u32;
    let ports_mask = (0xffff << 16) | OWN_PORTS_MASK;
    for protocol in [libc::IPPROTO_UDP, libc::IPPROTO_TCP] {
        let protocol = protocol.cast_unsigned();
        // RFC 791, 3.1: no options, no fragment, the protocol; then the ports.
        let v4 = [
            key(-4, libc::ETH_P_IP.cast_unsigned(), 0xffff),
            key(0, 0x4500_0000, 0xff00_0000),
            key(4, 0, 0x3fff),
            key(8, protocol << 16, 0x00ff_0000),
            key(20, ports, ports_mask),
        ];
        // RFC 8200, 3: no extension header.
        let v6 = [
            key(-4, libc::ETH_P_IPV6.cast_unsigned(), 0xffff),
            key(4, protocol << 8, 0xff00),
            key(40, ports, ports_mask),
        ];
        // Without an action a filter that matches lets the frame pass, on kernels without `gact`, too.
        add_filter(netlink, link, OWN, v4.to_vec(), None)?;
        add_filter(netlink, link, OWN, v6.to_vec(), None)?;
    }
    // RFC 826: replies; RFC 4861, 4.4: neighbour advertisements.
    let reply = [
        key(-4, libc::ETH_P_ARP.cast_unsigned(), 0xffff),
        key(4, 2, 0xffff),
    ];
    let advertisement = [
        key(-4, libc::ETH_P_IPV6.cast_unsigned(), 0xffff),
        key(4, libc::IPPROTO_ICMPV6.cast_unsigned() << 8, 0xff00),
        key(40, 136 << 24, 0xff00_0000),
    ];
    add_filter(netlink, link, OWN, reply.to_vec(), Some(mirror(tap)))?;
    add_filter(
        netlink,
        link,
        OWN,
        advertisement.to_vec(),
        Some(mirror(tap)),
    )
}

/// Which part of the kernel is missing for a redirect from one interface to another, both without any.
pub fn missing(netlink: &mut Netlink, from: u32, to: u32) -> Option<(&'static str, io::Error)> {
    let parts: [(&str, io::Result<()>); 3] = [
        ("sch_ingress", add_qdisc(netlink, from)),
        (
            "cls_u32",
            add_filter(netlink, from, REST, every_frame(), None),
        ),
        (
            "act_mirred",
            add_filter(netlink, from, PRIORITY, every_frame(), Some(redirect(to))),
        ),
    ];
    parts
        .into_iter()
        .find_map(|(part, result)| Some((part, result.err()?)))
}

/// The interfaces that have an ingress qdisc (or clsact).
pub fn with_qdisc(netlink: &mut Netlink) -> io::Result<BTreeSet<u32>> {
    let request = RouteNetlinkMessage::GetQueueDiscipline(TcMessage::default());
    let found = netlink.dump(&request)?;
    let ingress = found.iter().filter_map(|message| match message {
        RouteNetlinkMessage::NewQueueDiscipline(qdisc) => {
            (qdisc.header.parent == TcHandle::INGRESS).then_some(qdisc.header.index)
        }
        _ => None,
    });
    Ok(ingress.map(i32::cast_unsigned).collect())
}

/// Whether the filters of both halves are there; a tool may have removed one alone.
pub fn is_whole(netlink: &mut Netlink, link: u32, tap: u32) -> io::Result<bool> {
    let on_link = priorities(netlink, link)?;
    let on_tap = priorities(netlink, tap)?;
    Ok(on_link.contains(&PRIORITY) && on_tap.contains(&PRIORITY) && on_tap.contains(&REST))
}

/// Whether [`hear_answers`] is done.
pub fn hears_answers(netlink: &mut Netlink, link: u32) -> io::Result<bool> {
    Ok(priorities(netlink, link)?.contains(&OWN))
}

/// Priorities of the filters of an interface.
fn priorities(netlink: &mut Netlink, link: u32) -> io::Result<BTreeSet<u16>> {
    let mut message = filter_message(link, 0);
    message.header.info = 0;
    message.attributes.clear();
    let found = netlink.dump(&RouteNetlinkMessage::GetTrafficFilter(message))?;
    let of = |message: &RouteNetlinkMessage| match message {
        RouteNetlinkMessage::NewTrafficFilter(filter) => Some((filter.header.info >> 16) as u16),
        _ => None,
    };
    Ok(found.iter().filter_map(of).collect())
}

/// Takes our half off an interface that stays; with the qdisc if that is ours too.
pub fn disconnect(netlink: &mut Netlink, link: u32, qdisc: bool) -> io::Result<()> {
    let result = match qdisc {
        true => netlink.change(
            RouteNetlinkMessage::DelQueueDiscipline(qdisc_message(link)),
            0,
        ),
        false => remove_filters(netlink, link),
    };
    match result.as_ref().map_err(io::Error::raw_os_error) {
        // The interface or the qdisc is gone.
        Err(Some(libc::ENODEV | libc::ENOENT | libc::EINVAL)) => Ok(()),
        _ => result,
    }
}

fn qdisc_message(link: u32) -> TcMessage {
    let header = TcHeader {
        index: link.cast_signed(),
        handle: INGRESS,
        parent: TcHandle::INGRESS,
        ..TcHeader::default()
    };
    TcMessage::from_parts(header, vec![TcAttribute::Kind("ingress".into())])
}

fn add_qdisc(netlink: &mut Netlink, link: u32) -> io::Result<()> {
    let message = RouteNetlinkMessage::NewQueueDiscipline(qdisc_message(link));
    netlink.change(message, NLM_F_CREATE | NLM_F_EXCL)
}

fn filter_message(link: u32, priority: u16) -> TcMessage {
    // rtnetlink(7): priority in the upper half, the protocol in network order in the lower.
    let all = (libc::ETH_P_ALL as u16).to_be();
    let header = TcHeader {
        index: link.cast_signed(),
        parent: FILTERS,
        info: (u32::from(priority) << 16) | u32::from(all),
        ..TcHeader::default()
    };
    TcMessage::from_parts(header, vec![TcAttribute::Kind(TcFilterU32::KIND.into())])
}

fn add_filter(
    netlink: &mut Netlink,
    link: u32,
    priority: u16,
    keys: Vec<TcU32Key>,
    action: Option<TcAction>,
) -> io::Result<()> {
    let mut selector = TcU32Selector::default();
    selector.flags = TcU32SelectorFlags::Terminal;
    selector.nkeys = keys.len() as u8;
    selector.keys = keys;
    let mut message = filter_message(link, priority);
    let mut options = vec![TcOption::U32(TcFilterU32Option::Selector(selector))];
    options.extend(action.map(|action| TcOption::U32(TcFilterU32Option::Action(vec![action]))));
    message.attributes.push(TcAttribute::Options(options));
    let message = RouteNetlinkMessage::NewTrafficFilter(message);
    netlink.change(message, NLM_F_CREATE | NLM_F_EXCL)
}

fn remove_filters(netlink: &mut Netlink, link: u32) -> io::Result<()> {
    remove_filter(netlink, link, OWN)?;
    remove_filter(netlink, link, PRIORITY)
}

fn remove_filter(netlink: &mut Netlink, link: u32, priority: u16) -> io::Result<()> {
    let message = RouteNetlinkMessage::DelTrafficFilter(filter_message(link, priority));
    match netlink.change(message, 0) {
        Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(()),
        result => result,
    }
}

fn every_frame() -> Vec<TcU32Key> {
    vec![key(0, 0, 0)]
}

fn key(offset: i32, value: u32, mask: u32) -> TcU32Key {
    let mut key = TcU32Key::default();
    key.off = offset;
    key.val = value;
    key.mask = mask;
    key
}

fn action(kind: &str, option: TcActionOption) -> TcAction {
    let mut action = TcAction::default();
    action.attributes = vec![
        TcActionAttribute::Kind(kind.into()),
        TcActionAttribute::Options(vec![option]),
    ];
    action
}

fn redirect(to: u32) -> TcAction {
    mirred(to, TcMirrorActionType::EgressRedir, TcActionType::Stolen)
}

/// The frame goes there too, and on as if nothing had been.
fn mirror(to: u32) -> TcAction {
    mirred(to, TcMirrorActionType::EgressMirror, TcActionType::Ok)
}

fn mirred(to: u32, what: TcMirrorActionType, then: TcActionType) -> TcAction {
    let mut generic = TcActionGeneric::default();
    generic.action = then;
    let mut mirror = TcMirror::default();
    mirror.generic = generic;
    mirror.eaction = what;
    mirror.ifindex = to;
    let option = TcActionOption::Mirror(TcActionMirrorOption::Parms(mirror));
    action(TcActionMirror::KIND, option)
}

fn drop_frame() -> TcAction {
    // struct tc_gact: index, capab, action, refcnt, bindcnt.
    let fields = [0, 0, TC_ACT_SHOT, 0, 0];
    let bytes = fields.iter().flat_map(|f: &i32| f.to_ne_bytes()).collect();
    action(
        "gact",
        TcActionOption::Other(DefaultNla::new(TCA_GACT_PARMS, bytes)),
    )
}
