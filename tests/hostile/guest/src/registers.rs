//! Registers and ports in any order, width and number, and queues where none can be.

use crate::device::{Device, HOLE, avail, ring, used};
use crate::done;
use crate::machine::{Random, in32, out, out_many, out32, read, write};

/// A kilobyte of a message that is as long as a line can be.
const NOISE: u64 = 0x180_0000;

/// All of them.
pub fn attack(device: &Device) {
    let mut random = Random(0x9e37_79b9_7f4a_7c15 ^ device.base);
    // The emulator's own registers are not what is tested.
    if device.ours {
        for _ in 0..10 {
            wild(device, &mut random, 60);
            done(
                device.kind,
                "registers of any width in any order",
                device.lives(),
            );
        }
        for _ in 0..40 {
            device.set(0x70, random.next() as u32 & 0xff);
        }
        done(device.kind, "status in any order", device.lives());
    }
    queues(device);
    rewritten(device);
}

fn wild(device: &Device, random: &mut Random, count: u32) {
    for _ in 0..count {
        let (bits, value) = (random.next(), random.next());
        // Most registers stand in the first 256 bytes.
        let mask = if bits & 1 == 0 { 0xff } else { 0xfff };
        let at = device.base + (bits >> 16 & mask);
        match bits >> 8 & 7 {
            0 => write(at, value as u8),
            1 => write(at & !1, value as u16),
            2 => write(at & !7, value),
            3 => drop(read::<u8>(at)),
            4 => drop(read::<u64>(at & !7)),
            _ => write(at & !3, value as u32),
        }
    }
}

/// Queues of every size, and in places where no memory is.
fn queues(device: &Device) {
    let sizes = [0, 1, 3, 64, 0x8000, 0xffff, 0x1_0000, u32::MAX];
    for size in sizes {
        // What the emulator is given it hands on as it is; its own checks end it.
        if !device.ours && (!size.is_power_of_two() || size > 64) {
            continue;
        }
        device.begin();
        for queue in 0..device.queues() {
            device.queue(queue, size, [ring(queue), avail(queue), used(queue)]);
        }
        device.set(0x70, 15);
        device.set(0x50, 0);
        done(device.kind, "a queue of any size", device.lives());
    }
    let good = [ring(0), avail(0), used(0)];
    let places = [
        HOLE,
        0xf,
        0xffff_ffff_ffff_f000,
        u64::MAX,
        device.base,
        0x1fff_ffff,
    ];
    for place in places {
        if !device.ours {
            break;
        }
        for bad in 0..3 {
            let mut at = good;
            at[bad] = place;
            device.begin();
            for queue in 0..device.queues() {
                device.queue(queue, 64, at);
            }
            device.set(0x70, 15);
            device.set(0x50, 0);
            done(device.kind, "a ring outside of memory", device.lives());
        }
    }
    if device.ours {
        one_place(device);
    }
}

/// All rings in one place: what the device tells would overwrite what it reads. The emulator hands it on, and its machine
/// ends.
pub fn one_place(device: &Device) {
    device.begin();
    for queue in 0..device.queues() {
        device.queue(queue, 64, [ring(0) + 2; 3]);
    }
    device.set(0x70, 15);
    device.set(0x50, 0);
    done(device.kind, "rings that are one", device.lives());
}

/// A queue's registers after DRIVER_OK, and a second DRIVER_OK.
fn rewritten(device: &Device) {
    if !device.ours {
        return;
    }
    device.start();
    device.queue(0, 0x8000, [HOLE; 3]);
    for queue in 0..4 {
        device.set(0x30, queue);
        device.set(0x44, 0);
        device.set(0x38, 0xffff);
        device.set(0x84, u32::MAX);
        device.set(0x44, 1);
        device.set(0x50, queue);
    }
    device.set(0x20, u32::MAX);
    device.set(0x70, 15);
    device.set(0x50, 0);
    done(
        device.kind,
        "queues rewritten after DRIVER_OK",
        device.lives(),
    );
    // Resets while it works.
    for _ in 0..20 {
        device.start();
        device.set(0x50, 0);
        device.set(0x70, 0);
    }
    done(device.kind, "a storm of resets", device.lives());
}

/// Ports that the VMM answers, and such as it does not. The emulator aborts at wide ones; its ports are not ours.
pub fn ports(ours: bool) {
    for port in [0x60, 0x61, 0x80, 0x3f9, 0x3fa, 0x3fb, 0x3fc, 0x3ff, 0x510] {
        out(port, 0xff);
        if ours {
            out32(port, u32::MAX);
            in32(port);
        }
    }
    // The console is no loop, and its line settings are as they were.
    out(0x3fc, 3);
    out(0x3fb, 3);
    for at in 0..1024 {
        write(NOISE + at, b'x');
    }
    for _ in 0..64 {
        out_many(0x3f8, NOISE, 1024);
    }
    out(0x3f8, b'\n');
    done(0, "ports", true);
}
