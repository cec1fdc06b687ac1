//! Descriptor chains that no driver makes.

use crate::device::{
    DATA, Device, HOLE, INDIRECT, NEXT, ROOM, SIZE, WRITE, avail, descriptor, ring, used,
};
use crate::done;
use crate::machine::{clear, read, write};

const TABLE: u64 = 0x178_0000;
/// The emulator and our VMM have that much.
const MEMORY: u64 = 512 << 20;

type Chain = (&'static str, fn(&Device, u32));

const CHAINS: [Chain; 19] = [
    ("a descriptor that follows itself", |d, q| {
        d.descriptor(q, 0, DATA, 16, NEXT, 0)
    }),
    ("a loop of two", |d, q| {
        d.descriptor(q, 0, DATA, 16, NEXT, 1);
        d.descriptor(q, 1, DATA, 16, NEXT | WRITE, 0);
    }),
    ("a next outside of the table", |d, q| {
        d.descriptor(q, 0, DATA, 16, NEXT, SIZE)
    }),
    ("the farthest next", |d, q| {
        d.descriptor(q, 0, DATA, 16, NEXT, u16::MAX)
    }),
    ("a buffer that wraps", |d, q| {
        d.descriptor(q, 0, u64::MAX - 10, 100, WRITE, 0)
    }),
    ("a buffer in the hole", |d, q| {
        d.descriptor(q, 0, HOLE, 4096, WRITE, 0)
    }),
    ("a buffer of registers", |d, q| {
        d.descriptor(q, 0, d.base, 256, WRITE, 0)
    }),
    ("a buffer across the end of memory", |d, q| {
        d.descriptor(q, 0, MEMORY - 8, 1 << 30, WRITE, 0)
    }),
    ("a buffer of four gigabytes", |d, q| {
        d.descriptor(q, 0, DATA, u32::MAX, WRITE, 0)
    }),
    ("an empty buffer", |d, q| d.descriptor(q, 0, DATA, 0, 0, 0)),
    ("an empty buffer in the hole", |d, q| {
        d.descriptor(q, 0, HOLE, 0, WRITE, 0)
    }),
    ("to be read after to be written", |d, q| {
        d.descriptor(q, 0, ROOM, 64, NEXT | WRITE, 1);
        d.descriptor(q, 1, DATA, 64, 0, 0);
    }),
    ("the ring itself as room", |d, q| {
        d.descriptor(q, 0, ring(q), 0x8000, WRITE, 0)
    }),
    ("an indirect table in an indirect table", |d, q| {
        descriptor(TABLE, TABLE, 16, INDIRECT, 0);
        d.descriptor(q, 0, TABLE, 16, INDIRECT, 0);
    }),
    ("an indirect table of no whole length", |d, q| {
        descriptor(TABLE, ROOM, 64, WRITE, 0);
        d.descriptor(q, 0, TABLE, 17, INDIRECT, 0);
    }),
    ("an indirect table of nothing", |d, q| {
        d.descriptor(q, 0, TABLE, 0, INDIRECT, 0)
    }),
    ("an indirect table in the hole", |d, q| {
        d.descriptor(q, 0, HOLE, 160, INDIRECT, 0)
    }),
    ("an indirect table with a next", |d, q| {
        descriptor(TABLE, ROOM, 64, WRITE, 0);
        d.descriptor(q, 0, TABLE, 16, INDIRECT | NEXT, 1);
        d.descriptor(q, 1, ROOM, 64, WRITE, 0);
    }),
    ("an indirect table with a loop", |d, q| {
        for index in 0..8u16 {
            descriptor(
                TABLE + u64::from(index) * 16,
                ROOM,
                64,
                WRITE | NEXT,
                (index + 1) % 8,
            );
        }
        d.descriptor(q, 0, TABLE, 128, INDIRECT, 0);
    }),
];

/// All of them, on each queue.
pub fn attack(device: &Device) {
    for queue in 0..device.queues().min(3) {
        for (name, chain) in CHAINS {
            device.start();
            chain(device, queue);
            device.offer(queue, 0);
            done(device.kind, name, device.lives());
        }
        heads(device, queue);
        moving(device, queue);
    }
}

fn heads(device: &Device, queue: u32) {
    for head in [SIZE, 0x7fff, u16::MAX] {
        device.start();
        device.offer(queue, head);
        done(device.kind, "a head outside of the table", device.lives());
    }
    device.start();
    device.descriptor(queue, 0, ROOM, 64, WRITE, 0);
    for slot in 0..u64::from(SIZE) {
        write(avail(queue) + 4 + slot * 2, 0u16);
    }
    write(avail(queue) + 2, SIZE);
    device.set(0x50, queue);
    done(
        device.kind,
        "one head as often as the ring holds",
        device.lives(),
    );
    for jump in [SIZE + 1, 0x7fff, 0xffff] {
        device.start();
        write(avail(queue) + 2, jump);
        device.set(0x50, queue);
        done(device.kind, "an index that claims too much", device.lives());
    }
    // A ring of nothing but bad chains.
    device.start();
    for slot in 0..SIZE {
        device.descriptor(queue, slot, HOLE, 64, WRITE, 0);
        write(avail(queue) + 4 + u64::from(slot) * 2, slot);
    }
    write(avail(queue) + 2, SIZE);
    device.set(0x50, queue);
    done(device.kind, "nothing but bad chains", device.lives());
}

/// Descriptors, lengths and indices change while the device reads them.
fn moving(device: &Device, queue: u32) {
    device.start();
    for round in 0..60u16 {
        let index: u16 = read(avail(queue) + 2);
        device.descriptor(queue, round % SIZE, DATA, 64, NEXT, (round + 1) % SIZE);
        device.descriptor(queue, (round + 1) % SIZE, ROOM, 64, WRITE, 0);
        write(avail(queue) + 4 + u64::from(index % SIZE) * 2, round % SIZE);
        write(avail(queue) + 2, index.wrapping_add(1));
        device.set(0x50, queue);
        for flip in 0..6u64 {
            write(
                ring(queue) + u64::from((round + 1) % SIZE) * 16,
                if flip & 1 == 0 { HOLE } else { ROOM },
            );
            write(
                ring(queue) + u64::from(round % SIZE) * 16 + 8,
                if flip & 1 == 0 { u32::MAX } else { 64 },
            );
            write(
                ring(queue) + u64::from(round % SIZE) * 16 + 14,
                round.wrapping_mul(7) % SIZE,
            );
            write(DATA + flip * 8, u64::MAX * (flip & 1));
        }
    }
    clear(used(queue), 0x200);
    done(
        device.kind,
        "chains that change while they are read",
        device.lives(),
    );
}
