//! The ports: serial console and keyboard controller, and the console's ring behind them.
#![no_main]

use std::sync::{Arc, Mutex};

use bulkhead_vmm::arch::x86_64::layout;
use bulkhead_vmm::bus::Bus;
use bulkhead_vmm::i8042::I8042;
use bulkhead_vmm::limits;
use bulkhead_vmm::machine::end::end_channel;
use bulkhead_vmm::serial::{ConsoleRing, SerialPort};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

libfuzzer_sys::fuzz_target!(|accesses: Vec<(bool, u16, Vec<u8>)>| {
    let console = ConsoleRing::new();
    let (sender, _receiver) = end_channel();
    let mut bus = Bus::default();
    let serial = SerialPort::new(EventFd::new(EFD_NONBLOCK).unwrap(), console.clone());
    bus.insert(layout::SERIAL_PORT, 8, Arc::new(Mutex::new(serial)))
        .unwrap();
    let keyboard = I8042::new(console.clone(), sender);
    bus.insert(layout::I8042_PORT, 5, Arc::new(Mutex::new(keyboard)))
        .unwrap();
    for (write, port, mut data) in accesses {
        let port = match port & 3 {
            0 => port,
            1 => layout::I8042_PORT as u16 + (port >> 2) % 6,
            _ => layout::SERIAL_PORT as u16 + (port >> 2) % 9,
        };
        match write {
            true => bus.port_write(port, &data),
            false => bus.port_read(port, &mut data),
        };
    }
    assert!(console.tail(usize::MAX).len() <= 3 * limits::CONSOLE_BYTES);
    let piece = console.piece(1, 16);
    assert!(piece.text.len() <= 3 * 16);
    console.panic_line();
    console.restart_announced();
});
