//! Taps: the VMM's end of an interface. Made in the pod's namespace, handed over as descriptors, gone with the last of them.

use std::{
    fs::File,
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
};

use netlink_packet_route::{
    RouteNetlinkMessage,
    link::{AfSpecInet6, AfSpecUnspec, In6AddrGenMode, LinkAttribute, LinkFlags, LinkMessage},
};

use super::{namespace::Namespace, netlink::Netlink};

/// How the names of our taps begin.
pub const PREFIX: &str = "bhtap";
/// The largest MTU of a tap: what IP can say, less an Ethernet header.
pub const MTU_MAX: u32 = 65_521;
/// if_tun.h: `_IOW('T', 202, int)`.
const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
/// vhost.h: `_IOR(0xaf, 0, __u64)`.
const VHOST_GET_FEATURES: libc::c_ulong = 0x8008_af00;

/// A tap.
pub struct Tap {
    /// Its interface.
    pub index: u32,
    /// Its queues.
    pub queues: Vec<OwnedFd>,
}

/// The name of a slot's tap.
pub fn name(slot: usize) -> String {
    format!("{PREFIX}{slot}")
}

/// The tap of a slot, with so many queues, down.
pub fn make(namespace: &Namespace, slot: usize, queues: usize) -> io::Result<Tap> {
    let name = name(slot);
    namespace.run(|| {
        let queues = (0..queues.max(1))
            .map(|number| open_queue(&name, number, queues > 1))
            .collect::<io::Result<_>>()?;
        let index = rustix::net::netdevice::name_to_index(
            rustix::net::socket(
                rustix::net::AddressFamily::UNIX,
                rustix::net::SocketType::DGRAM,
                None,
            )?,
            &name,
        )?;
        Ok(Tap { index, queues })
    })
}

fn open_queue(name: &str, number: usize, several: bool) -> io::Result<OwnedFd> {
    let file = File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun")?;
    let mut flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    if several {
        flags |= libc::IFF_MULTI_QUEUE;
    }
    if number == 0 {
        flags |= libc::IFF_TUN_EXCL; // Never a tap that is there already.
    }
    // SAFETY: all zeroes is a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: the request reads and writes the one ifreq that is given, which lives until it returns.
    if unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, &raw mut request) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(file.into())
}

/// Brings a tap up. The namespace's own stack shall send nothing through it.
pub fn raise(netlink: &mut Netlink, index: u32, mtu: u32) -> io::Result<()> {
    let mut quiet = LinkMessage::default();
    quiet.header.index = index;
    let no_address = AfSpecInet6::AddrGenMode(In6AddrGenMode::None);
    quiet.attributes = vec![LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(
        vec![no_address],
    )])];
    // A host without IPv6 knows nothing of it.
    let _ = netlink.change(RouteNetlinkMessage::SetLink(quiet), 0);
    set_mtu(netlink, index, mtu)?;
    let mut up = LinkMessage::default();
    up.header.index = index;
    up.header.flags = LinkFlags::Up;
    up.header.change_mask = LinkFlags::Up;
    netlink.change(RouteNetlinkMessage::SetLink(up), 0)
}

/// Gives a tap another MTU.
pub fn set_mtu(netlink: &mut Netlink, index: u32, mtu: u32) -> io::Result<()> {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.attributes = vec![LinkAttribute::Mtu(mtu)];
    netlink.change(RouteNetlinkMessage::SetLink(message), 0)
}

/// Descriptors of vhost-net, one for each queue; none where the host has no such thing.
pub fn vhost(queues: usize) -> Vec<OwnedFd> {
    let open = || -> io::Result<OwnedFd> {
        let file = File::options()
            .read(true)
            .write(true)
            .open("/dev/vhost-net")?;
        let mut features = 0_u64;
        // SAFETY: the request writes the eight bytes that are given, which live until it returns.
        if unsafe { libc::ioctl(file.as_raw_fd(), VHOST_GET_FEATURES, &raw mut features) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(file.into())
    };
    (0..queues)
        .map(|_| open())
        .collect::<io::Result<_>>()
        .unwrap_or_default()
}
