//! The kernel's data path, where the host has it.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::*;

/// An open `/dev/vhost-net`; `None` where this host has none.
fn vhost() -> Option<OwnedFd> {
    let opened = File::options()
        .read(true)
        .write(true)
        .open("/dev/vhost-net");
    match opened {
        Ok(file) => Some(file.into()),
        Err(error) => {
            eprintln!("skipped: /dev/vhost-net: {error}");
            None
        }
    }
}

fn with_vhost() -> Option<Attachment> {
    let vhosts = vec![vhost()?];
    Some(Attachment {
        vhosts,
        ..attachment(tap(1)?, Rate::default())
    })
}

#[test]
fn the_kernel_serves_the_rings_and_hands_them_back_where_it_stopped() {
    let features = feature::MRG_RXBUF | crate::virtio::F_VERSION_1;
    let mut rig = Rig::empty(features);
    rig.offer_buffers(250, 2048);
    for round in 0..8u16 {
        let attachment = match round % 3 {
            0 | 1 => with_vhost(),
            _ => tap(1).map(|taps| attachment(taps, Rate::default())),
        };
        let Some(attachment) = attachment else {
            return;
        };
        rig.slot.attach(attachment).unwrap();
        assert!(rig.is_answered(round * 2), "round {round}");
        rig.slot.detach().unwrap();
        // The empty slot goes on with the same ring.
        rig.send(round * 2 + 1, &arp(1, GUEST));
        rig.sent(2);
    }
}

#[test]
fn the_kernel_stops_at_a_reset_and_serves_the_new_rings() {
    let features = crate::virtio::F_VERSION_1;
    let mut rig = Rig::empty(0);
    rig.device.reset();
    let Some(attachment) = with_vhost() else {
        return;
    };
    rig.slot.attach(attachment).unwrap();
    for _ in 0..3 {
        rig.reset(features);
        rig.offer_buffers(100, 2048);
        assert!(rig.is_answered(0));
    }
    // Nobody touches the rings any more.
    rig.device.reset();
    rig.send(9, &arp(1, GUEST));
    std::thread::sleep(Duration::from_millis(100));
    assert!(!rig.received(Duration::from_millis(100), |_| true));
    rig.slot.detach().unwrap();
}

#[test]
fn the_kernel_goes_on_when_the_machine_grows() {
    let features = crate::virtio::F_VERSION_1;
    let mut rig = Rig::empty(features);
    let Some(attachment) = with_vhost() else {
        return;
    };
    rig.slot.attach(attachment).unwrap();
    rig.offer_buffers(250, 2048);
    assert!(rig.is_answered(0));
    let address = vm_memory::GuestAddress(4 << 30);
    let more = vm_memory::GuestRegionMmap::from_range(address, 1 << 20, None).unwrap();
    let larger = rig.memory.insert_region(Arc::new(more)).unwrap();
    rig.slot.memory_grew(&Arc::new(larger)).unwrap();
    assert!(rig.is_answered(2));
    rig.slot.detach().unwrap();
}

#[test]
fn a_device_that_is_no_vhost_is_refused_and_the_slot_stays_empty() {
    let mut rig = Rig::empty(0);
    let Some(taps) = tap(1) else {
        return;
    };
    let null = File::open("/dev/null").unwrap();
    let attachment = Attachment {
        vhosts: vec![null.into()],
        ..attachment(taps, Rate::default())
    };
    let error = rig.slot.attach(attachment).unwrap_err();
    assert!(matches!(error, NetError::Vhost(_)), "{error}");
    rig.send(0, &arp(1, GUEST));
    rig.sent(1);
    assert!(matches!(rig.slot.detach(), Err(NetError::Empty(_))));
}
