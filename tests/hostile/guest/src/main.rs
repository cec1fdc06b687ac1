//! A kernel that does nothing but attack the devices of its machine: registers, rings, and what goes through them. It
//! prints what it did as if it panicked, so that the end is told on the host, and then triple-faults.
//!
//! After each attack the device is reset and must answer an honest request: what does not counts as unanswered. What a
//! guest must never be given counts as a breach.
#![no_std]
#![no_main]

mod device;
mod files;
mod machine;
mod registers;
mod rings;
mod sockets;

use core::sync::atomic::{AtomicU32, Ordering};

use machine::{print, print_number, triple_fault};

core::arch::global_asm!(include_str!("start.s"), options(att_syntax));

/// Which attacks: the harness writes the last byte.
#[used]
static SET: [u8; 16] = *b"hostile machine0";

static ATTACKS: AtomicU32 = AtomicU32::new(0);
static UNANSWERED: AtomicU32 = AtomicU32::new(0);
static BREACHES: AtomicU32 = AtomicU32::new(0);

/// An attack was made, and the device answered afterwards or not.
pub fn done(device: u32, name: &str, answers: bool) {
    ATTACKS.fetch_add(1, Ordering::Relaxed);
    if !answers {
        UNANSWERED.fetch_add(1, Ordering::Relaxed);
        print("device ");
        print_number(device.into());
        print(" does not answer after: ");
        print(name);
        print("\n");
    }
}

/// Something that must not be.
pub fn breach(name: &str, value: u64) {
    BREACHES.fetch_add(1, Ordering::Relaxed);
    print("breach: ");
    print(name);
    print(": ");
    print_number(value);
    print("\n");
}

#[unsafe(no_mangle)]
extern "C" fn kernel_main() -> ! {
    // SAFETY: a byte of our own; volatile, as the file's is not the compiler's.
    let set = unsafe { core::ptr::read_volatile(&raw const SET[15]) };
    let (mut devices, mut ours) = (0, false);
    for device in device::all() {
        devices += 1;
        ours = device.ours;
        print("device ");
        print_number(device.kind.into());
        print("\n");
        match set {
            b'1' => registers::attack(&device),
            b'2' => rings::attack(&device),
            b'3' if device.kind == device::VSOCK => sockets::attack(&device),
            b'4' if device.kind == device::FS => files::attack(&device),
            b'5' => registers::one_place(&device),
            _ => {}
        }
    }
    if set == b'1' {
        registers::ports(ours);
    }
    print("Kernel panic - not syncing: ");
    for (count, what) in [
        (devices, " devices, "),
        (ATTACKS.load(Ordering::Relaxed), " attacks, "),
        (UNANSWERED.load(Ordering::Relaxed), " unanswered, "),
        (BREACHES.load(Ordering::Relaxed), " breaches\n"),
    ] {
        print_number(count.into());
        print(what);
    }
    triple_fault()
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo) -> ! {
    print("Kernel panic - not syncing: a mistake of the attacker, line ");
    print_number(info.location().map_or(0, |at| at.line()).into());
    print("\n");
    triple_fault()
}
