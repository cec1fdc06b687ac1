//! Registers of the virtio-mmio transport, any order, width and number, without an honest driver's help.
#![no_main]

use std::sync::Mutex;

use bulkhead_fuzz::machine;
use bulkhead_vmm::bus::Bus;
use bulkhead_vmm::virtio::rng::Rng;
use bulkhead_vmm::virtio::transport::mmio::MmioTransport;

libfuzzer_sys::fuzz_target!(|accesses: Vec<(bool, u16, u8, u64)>| {
    let transport = MmioTransport::new(Box::new(Rng::default()), machine().1).unwrap();
    let mut bus = Bus::default();
    bus.insert(0, 0x1000, std::sync::Arc::new(Mutex::new(transport)))
        .unwrap();
    for (write, offset, width, value) in accesses {
        let mut bytes = [0; 255];
        bytes[..8].copy_from_slice(&value.to_le_bytes());
        let data = &mut bytes[..usize::from(width)];
        // Most registers stand in the first 256 bytes.
        let address = u64::from(if value & 1 == 0 {
            offset & 0xff
        } else {
            offset
        });
        match write {
            true => bus.write(address, data),
            false => bus.read(address, data),
        };
    }
});
