//! The two-way redirect between an interface and its tap (tc-mirred(8), tc-u32(8)).
//!
//! What arrives at the interface goes out of the tap, to the guest; what the guest sends arrives at the tap and goes out of the
//! interface, if its source is the interface's MAC. Anything else that the guest sends is dropped.
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
            remove_filter(netlink, link)?; // Of one that died.
        }
        result => result?,
    }
    add_filter(netlink, link, PRIORITY, every_frame(), Some(redirect(tap)))
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

/// Takes our half off an interface that stays; with the qdisc if that is ours too.
pub fn disconnect(netlink: &mut Netlink, link: u32, qdisc: bool) -> io::Result<()> {
    let result = match qdisc {
        true => netlink.change(
            RouteNetlinkMessage::DelQueueDiscipline(qdisc_message(link)),
            0,
        ),
        false => remove_filter(netlink, link),
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

fn remove_filter(netlink: &mut Netlink, link: u32) -> io::Result<()> {
    let message = RouteNetlinkMessage::DelTrafficFilter(filter_message(link, PRIORITY));
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
    let mut generic = TcActionGeneric::default();
    generic.action = TcActionType::Stolen;
    let mut mirror = TcMirror::default();
    mirror.generic = generic;
    mirror.eaction = TcMirrorActionType::EgressRedir;
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
