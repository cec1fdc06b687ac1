//! Slots that are filled and emptied while the driver comes and goes.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};

use super::*;

fn tap_exists() -> bool {
    // SAFETY: a C string.
    unsafe { libc::if_nametoindex(c"tap0".as_ptr()) != 0 }
}

#[test]
fn an_empty_slot_gives_back_what_the_guest_sends() {
    let mut rig = Rig::empty(0);
    for round in 0..4 {
        for head in 0..200 {
            rig.send(head, &arp(1, GUEST));
        }
        rig.sent(200);
        assert_eq!(rig.receive.used(), None, "{round}");
    }
}

#[test]
fn a_tap_comes_and_goes_many_times_and_frames_pass_whenever_it_is_there() {
    let mut rig = Rig::empty(feature::MRG_RXBUF);
    for round in 0..10 {
        let Some(taps) = tap(1) else {
            return;
        };
        rig.slot.attach(attachment(taps, Rate::default())).unwrap();
        rig.offer_buffers(100, 2048);
        assert!(rig.is_answered(0), "round {round}");
        rig.slot.detach().unwrap();
        assert!(!tap_exists(), "round {round}: somebody holds the tap");
        rig.send(1, &arp(1, GUEST));
        rig.sent(2);
        if round % 2 == 0 {
            rig.reset(feature::MRG_RXBUF);
        } else {
            // Buffers that were not used stay the guest's; the test offers the same ones again.
            rig.reset(0);
        }
    }
}

#[test]
fn a_slot_filled_before_the_driver_comes_serves_it_and_serves_it_again_after_a_reset() {
    let mut rig = Rig::empty(0);
    let Some(taps) = tap(1) else {
        return;
    };
    rig.device.reset();
    rig.slot.attach(attachment(taps, Rate::default())).unwrap();
    for _ in 0..3 {
        rig.reset(feature::MRG_RXBUF);
        rig.offer_buffers(100, 2048);
        assert!(rig.is_answered(0));
    }
    rig.device.reset();
    assert!(tap_exists());
    rig.slot.detach().unwrap();
    assert!(!tap_exists());
}

#[test]
fn a_slot_can_change_while_the_guest_floods() {
    let mut rig = Rig::empty(0);
    let slot = rig.slot.clone();
    let over = std::sync::Arc::new(AtomicBool::new(false));
    let done = over.clone();
    let thread = std::thread::spawn(move || {
        let mut rounds = 0;
        while rounds < 20 {
            let Some(taps) = tap(1) else { break };
            slot.attach(attachment(taps, Rate::default())).unwrap();
            std::thread::sleep(Duration::from_millis(5));
            slot.detach().unwrap();
            rounds += 1;
        }
        done.store(true, Ordering::SeqCst);
    });
    let (mut head, mut free) = (0, 256);
    while !over.load(Ordering::SeqCst) {
        while free > 0 {
            rig.send(head, &arp(2, GUEST));
            head = (head + 1) % 256;
            free -= 1;
        }
        while rig.transmit.used().is_some() {
            free += 1;
        }
    }
    thread.join().unwrap();
    rig.sent(256 - free);
}

#[test]
fn what_a_slot_does_not_take_is_refused_by_name_and_closed() {
    let null = || OwnedFd::from(File::open("/dev/null").unwrap());
    let slot = Slot::new("n0", GUEST, 1, true);
    let refused = |slot: &Slot, taps: usize, vhosts: usize, rate: Rate| {
        let attachment = Attachment {
            mac: GUEST,
            rate,
            taps: (0..taps).map(|_| null()).collect(),
            vhosts: (0..vhosts).map(|_| null()).collect(),
        };
        slot.attach(attachment).unwrap_err()
    };
    let none = Rate::default();
    let some = Rate { bytes: 1, ..none };
    assert!(matches!(refused(&slot, 0, 0, none), NetError::Taps { .. }));
    assert!(matches!(refused(&slot, 2, 0, none), NetError::Taps { .. }));
    assert!(matches!(
        refused(&slot, 1, 2, none),
        NetError::Vhosts { .. }
    ));
    assert!(matches!(
        refused(&slot, 1, 1, some),
        NetError::RateWithVhost(_)
    ));
    assert!(matches!(refused(&slot, 1, 0, none), NetError::Tap(_)));
    let emulated = Slot::new("n0", GUEST, 1, false);
    assert!(matches!(
        refused(&emulated, 1, 1, none),
        NetError::NoVhost(_)
    ));
    assert!(matches!(slot.detach(), Err(NetError::Empty(_))));
    let Some(taps) = tap(1) else {
        return;
    };
    slot.attach(attachment(taps, none)).unwrap();
    assert!(matches!(refused(&slot, 1, 0, none), NetError::Taken(_)));
    slot.detach().unwrap();
    assert!(!tap_exists());
}
