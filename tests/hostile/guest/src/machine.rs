//! Memory, ports and the console.

use core::arch::asm;

/// Prints a text. What `core` has for that is more than a KVM without hardware can run.
pub fn print(text: &str) {
    text.bytes().for_each(|byte| out(0x3f8, byte));
}

/// Prints a number.
pub fn print_number(number: u64) {
    if number >= 10 {
        print_number(number / 10);
    }
    out(0x3f8, b'0' + (number % 10) as u8);
}

/// Zeros that the compiler does not know of: it would clear registers of SSE for them.
pub fn zeros<const N: usize>() -> [u8; N] {
    static ZEROS: [u8; 512] = [0; 512];
    // SAFETY: no longer than the array; volatile, so that its value is not known.
    unsafe { core::ptr::read_volatile((&raw const ZEROS).cast::<[u8; N]>()) }
}

/// Writes a byte to a port.
pub fn out(port: u16, byte: u8) {
    // SAFETY: a port of the machine; no memory of ours changes.
    unsafe { asm!("out dx, al", in("dx") port, in("al") byte, options(nomem, nostack)) };
}

/// Writes four bytes to a port.
pub fn out32(port: u16, value: u32) {
    // SAFETY: as above.
    unsafe { asm!("out dx, eax", in("dx") port, in("eax") value, options(nomem, nostack)) };
}

/// Reads four bytes of a port.
pub fn in32(port: u16) -> u32 {
    let value;
    // SAFETY: as above.
    unsafe { asm!("in eax, dx", in("dx") port, out("eax") value, options(nomem, nostack)) };
    value
}

/// Writes many bytes to one port at once.
pub fn out_many(port: u16, from: u64, count: u64) {
    // SAFETY: reads `count` bytes of the machine's memory, which is all mapped.
    unsafe {
        asm!("rep outsb", in("dx") port, inout("rsi") from => _, inout("rcx") count => _, options(nostack));
    }
}

/// A value at an address of the machine, RAM or registers.
pub fn read<T: Copy>(address: u64) -> T {
    // SAFETY: the first 4 GiB are mapped one to one, and nothing of Rust lives where this is used.
    unsafe { core::ptr::read_volatile(address as *const T) }
}

/// Writes a value to an address of the machine.
pub fn write<T>(address: u64, value: T) {
    // SAFETY: as in `read`.
    unsafe { core::ptr::write_volatile(address as *mut T, value) };
}

/// Copies bytes into the machine's memory.
pub fn put(address: u64, bytes: &[u8]) {
    // SAFETY: as in `read`.
    unsafe {
        asm!("rep movsb", inout("rdi") address => _, inout("rsi") bytes.as_ptr() => _,
            inout("rcx") bytes.len() => _, options(nostack));
    }
}

/// Clears memory, eight bytes at a time.
pub fn clear(address: u64, bytes: u64) {
    // SAFETY: as in `read`.
    unsafe {
        asm!("rep stosq", inout("rdi") address => _, in("rax") 0, inout("rcx") bytes / 8 => _, options(nostack));
    }
}

/// The time stamp counter.
pub fn ticks() -> u64 {
    // SAFETY: reads a counter.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Ends the machine: without a table of interrupts the first one is a triple fault.
pub fn triple_fault() -> ! {
    let none = [0u8; 10];
    // SAFETY: nothing runs after it.
    unsafe { asm!("lidt [{}]", "ud2", in(reg) &raw const none, options(noreturn)) }
}

/// xorshift: the same attacks in each run.
pub struct Random(pub u64);

impl Random {
    /// The next number.
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

/// What the compiler calls for copies; the machine has no C library.
mod memory {
    use core::arch::asm;

    #[unsafe(no_mangle)]
    unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, count: usize) -> *mut u8 {
        // SAFETY: the caller's.
        unsafe {
            asm!("rep movsb", inout("rdi") to => _, inout("rsi") from => _, inout("rcx") count => _, options(nostack));
        }
        to
    }

    #[unsafe(no_mangle)]
    unsafe extern "C" fn memset(to: *mut u8, byte: i32, count: usize) -> *mut u8 {
        // SAFETY: the caller's.
        unsafe {
            asm!("rep stosb", inout("rdi") to => _, in("al") byte as u8, inout("rcx") count => _, options(nostack));
        }
        to
    }

    #[unsafe(no_mangle)]
    unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, count: usize) -> *mut u8 {
        for step in 0..count {
            let at = if (to as usize) < from as usize {
                step
            } else {
                count - 1 - step
            };
            // SAFETY: the caller's; volatile, so that this is not made a call of itself.
            unsafe { to.add(at).write_volatile(from.add(at).read_volatile()) };
        }
        to
    }

    #[unsafe(no_mangle)]
    unsafe extern "C" fn memcmp(one: *const u8, other: *const u8, count: usize) -> i32 {
        for at in 0..count {
            // SAFETY: the caller's.
            let (one, other) =
                unsafe { (one.add(at).read_volatile(), other.add(at).read_volatile()) };
            if one != other {
                return i32::from(one) - i32::from(other);
            }
        }
        0
    }

    #[unsafe(no_mangle)]
    extern "C" fn rust_eh_personality() {}
}
