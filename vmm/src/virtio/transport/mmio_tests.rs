//! The registers as a driver sees them, honest or not.

use std::sync::Mutex;

use super::register::*;
use super::*;
use crate::virtio::ActivateError;
use crate::virtio::testing::{MEMORY_SIZE, memory};

/// What the transport did to the device.
#[derive(Default)]
struct Seen {
    activations: Vec<(u64, Vec<Option<u16>>)>,
    interrupt: Option<Arc<dyn Interrupt>>,
    resets: u32,
    config: Vec<(u64, Vec<u8>)>,
    fails: bool,
}

struct Probe(Arc<Mutex<Seen>>);

impl VirtioDevice for Probe {
    fn device_type(&self) -> u32 {
        42
    }
    fn name(&self) -> &'static str {
        "probe"
    }
    fn queue_sizes(&self) -> &[u16] {
        &[16, 8]
    }
    fn features(&self) -> u64 {
        1 << 5
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        for (byte, at) in data.iter_mut().zip(offset..8) {
            *byte = 0x10 + at as u8;
        }
    }
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        self.0.lock().unwrap().config.push((offset, data.to_vec()));
    }
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let mut seen = self.0.lock().unwrap();
        let queues = activation.queues.iter();
        let queues = queues
            .map(|queue| queue.as_ref().map(|queue| queue.layout().next_available))
            .collect();
        seen.activations.push((activation.features, queues));
        seen.interrupt = Some(activation.interrupt);
        if seen.fails {
            return Err(ActivateError::MissingQueue(1));
        }
        Ok(())
    }
    fn reset(&mut self) {
        self.0.lock().unwrap().resets += 1;
    }
}

fn transport() -> (MmioTransport, Arc<Mutex<Seen>>) {
    let seen = Arc::new(Mutex::new(Seen::default()));
    let device = Box::new(Probe(seen.clone()));
    (MmioTransport::new(device, memory().into()).unwrap(), seen)
}

fn read(transport: &mut MmioTransport, offset: u64) -> u32 {
    let mut data = [0xff; 4];
    BusDevice::read(transport, offset, &mut data);
    u32::from_le_bytes(data)
}

fn write(transport: &mut MmioTransport, offset: u64, value: u32) {
    BusDevice::write(transport, offset, &value.to_le_bytes());
}

fn negotiate(transport: &mut MmioTransport) {
    for status in [0, 1, 3] {
        write(transport, STATUS, status);
    }
    for (sel, features) in [(0, 1 << 5), (1, 1)] {
        write(transport, DRIVER_FEATURES_SEL, sel);
        write(transport, DRIVER_FEATURES, features);
    }
    write(transport, STATUS, 11);
    assert_eq!(read(transport, STATUS), 11);
}

fn set_up_queue(transport: &mut MmioTransport, index: u32, size: u32, base: u32) {
    for (offset, value) in [
        (QUEUE_SEL, index),
        (QUEUE_SIZE, size),
        (QUEUE_DESC_LOW, base),
        (QUEUE_DRIVER_LOW, base + 0x1000),
        (QUEUE_DEVICE_LOW, base + 0x2000),
        (QUEUE_READY, 1),
    ] {
        write(transport, offset, value);
    }
}

fn start(transport: &mut MmioTransport) {
    negotiate(transport);
    set_up_queue(transport, 0, 16, 0x10000);
    write(transport, STATUS, 15);
    assert_eq!(read(transport, STATUS), 15);
}

#[test]
fn a_driver_that_follows_the_specification_gets_its_device() {
    let (mut transport, seen) = transport();
    assert_eq!(read(&mut transport, MAGIC_VALUE), 0x7472_6976);
    assert_eq!(read(&mut transport, register::VERSION), 2);
    assert_eq!(read(&mut transport, DEVICE_ID), 42);
    write(&mut transport, DEVICE_FEATURES_SEL, 0);
    assert_ne!(read(&mut transport, DEVICE_FEATURES) & 1 << 5, 0);
    write(&mut transport, DEVICE_FEATURES_SEL, 1);
    assert_eq!(read(&mut transport, DEVICE_FEATURES) & 1, 1);
    start(&mut transport);
    let seen = seen.lock().unwrap();
    assert_eq!(seen.activations, [(1 << 32 | 1 << 5, vec![Some(0), None])]);
}

#[test]
fn queue_registers_cannot_change_after_activation() {
    let (mut transport, seen) = transport();
    start(&mut transport);
    set_up_queue(&mut transport, 1, 8, 0x20000);
    write(&mut transport, QUEUE_SEL, 0);
    write(&mut transport, QUEUE_READY, 0);
    write(&mut transport, QUEUE_SIZE, 4096);
    assert_eq!(read(&mut transport, QUEUE_READY), 1);
    assert_eq!(transport.queues[0].size, 16);
    assert!(!transport.queues[1].ready);
    write(&mut transport, STATUS, 15);
    assert_eq!(seen.lock().unwrap().activations.len(), 1);
}

#[test]
fn a_ready_queue_keeps_its_addresses() {
    let (mut transport, _) = transport();
    negotiate(&mut transport);
    set_up_queue(&mut transport, 0, 16, 0x10000);
    write(&mut transport, QUEUE_SIZE, 8);
    write(&mut transport, QUEUE_DESC_HIGH, 7);
    assert_eq!(transport.queues[0].size, 16);
    assert_eq!(transport.queues[0].descriptors, 0x10000);
}

#[test]
fn features_cannot_change_after_features_ok() {
    let (mut transport, _) = transport();
    negotiate(&mut transport);
    let accepted = transport.accepted;
    write(&mut transport, DRIVER_FEATURES, 0);
    assert_eq!(transport.accepted, accepted);
}

#[test]
fn features_that_were_not_offered_are_refused() {
    for (sel, value) in [(0, 1 << 6), (1, 0), (1, 1 << 30 | 1)] {
        let (mut transport, _) = transport();
        for status in [1, 3] {
            write(&mut transport, STATUS, status);
        }
        write(&mut transport, DRIVER_FEATURES_SEL, 1);
        write(&mut transport, DRIVER_FEATURES, 1);
        write(&mut transport, DRIVER_FEATURES_SEL, sel);
        write(&mut transport, DRIVER_FEATURES, value);
        write(&mut transport, STATUS, 11);
        assert_eq!(read(&mut transport, STATUS), 3);
        // And without FEATURES_OK there is no DRIVER_OK.
        write(&mut transport, STATUS, 7);
        assert_eq!(read(&mut transport, STATUS), 3);
    }
}

#[test]
fn status_bits_come_in_order_and_go_by_reset_alone() {
    let (mut transport, seen) = transport();
    write(&mut transport, STATUS, 2);
    assert_eq!(read(&mut transport, STATUS), 0);
    write(&mut transport, STATUS, 4);
    assert_eq!(read(&mut transport, STATUS), 0);
    start(&mut transport);
    write(&mut transport, STATUS, 3);
    assert_eq!(read(&mut transport, STATUS), 15);
    write(&mut transport, STATUS, 0x8f);
    assert_eq!(read(&mut transport, STATUS), 0x8f);
    write(&mut transport, STATUS, 0);
    assert_eq!(read(&mut transport, STATUS), 0);
    assert_eq!(seen.lock().unwrap().resets, 1);
    start(&mut transport);
    assert_eq!(seen.lock().unwrap().activations.len(), 2);
}

#[test]
fn a_bad_queue_means_needs_reset_and_the_device_never_starts() {
    let end = MEMORY_SIZE as u32;
    let cases = [
        ("no size", 0, 0x10000),
        ("no power of two", 12, 0x10000),
        ("too large", 32, 0x10000),
        ("beyond 16 bits", 0x1_0010, 0x10000),
        ("misaligned", 16, 0x10001),
        ("past memory", 16, end),
        ("across the end of memory", 16, end - 0x80),
    ];
    for (name, size, base) in cases {
        let (mut transport, seen) = transport();
        negotiate(&mut transport);
        set_up_queue(&mut transport, 0, size, base);
        write(&mut transport, STATUS, 15);
        assert_eq!(read(&mut transport, STATUS), 11 | 64, "{name}");
        assert!(seen.lock().unwrap().activations.is_empty(), "{name}");
        assert_eq!(read(&mut transport, INTERRUPT_STATUS), 2, "{name}");
        write(&mut transport, STATUS, 15 | 64);
        assert!(seen.lock().unwrap().activations.is_empty(), "{name}");
        start(&mut transport);
    }
}

#[test]
fn a_device_that_cannot_start_needs_reset() {
    let (mut transport, seen) = transport();
    seen.lock().unwrap().fails = true;
    negotiate(&mut transport);
    set_up_queue(&mut transport, 0, 16, 0x10000);
    write(&mut transport, STATUS, 15);
    assert_eq!(read(&mut transport, STATUS), 11 | 64);
    write(&mut transport, STATUS, 0);
    assert_eq!(seen.lock().unwrap().resets, 1);
}

#[test]
fn interrupts_set_their_bit_until_acknowledged() {
    let (mut transport, seen) = transport();
    start(&mut transport);
    let interrupt = seen.lock().unwrap().interrupt.clone().unwrap();
    let generation = read(&mut transport, CONFIG_GENERATION);
    interrupt.queue_used(0);
    interrupt.config_changed();
    assert_eq!(read(&mut transport, INTERRUPT_STATUS), 3);
    assert_ne!(read(&mut transport, CONFIG_GENERATION), generation);
    assert_eq!(transport.irq().read().unwrap(), 2);
    write(&mut transport, INTERRUPT_ACK, 1);
    assert_eq!(read(&mut transport, INTERRUPT_STATUS), 2);
}

#[test]
fn the_configuration_space_takes_any_width() {
    let (mut transport, seen) = transport();
    for width in [1usize, 2, 4, 8] {
        let mut data = vec![0xff; width];
        BusDevice::read(&mut transport, CONFIG + 1, &mut data);
        assert_eq!(data[0], 0x11);
        assert!(width < 8 || data[7] == 0, "past the end is zero");
    }
    BusDevice::write(&mut transport, CONFIG, &[1]);
    assert!(seen.lock().unwrap().config.is_empty(), "no driver yet");
    negotiate(&mut transport);
    BusDevice::write(&mut transport, CONFIG + 4, &[1, 2]);
    assert_eq!(seen.lock().unwrap().config, [(4, vec![1, 2])]);
}

#[test]
fn no_access_of_any_width_order_or_place_does_harm() {
    let (mut transport, _) = transport();
    // A fixed sequence of pseudo-random numbers.
    let mut state = 0x2545_f491_4f6c_dd1du64;
    let mut next = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    for _ in 0..200_000 {
        let offset = next() % 0x1000;
        let width = [1, 2, 4, 8, 3][next() as usize % 5];
        let value = match next() % 3 {
            0 => next() % 16,
            1 => (next() % 0x200) << 12,
            _ => next(),
        };
        let offset = if next() % 2 == 0 {
            (offset % 0x110) & !3
        } else {
            offset
        };
        let bytes = value.to_le_bytes();
        if next() % 3 == 0 {
            let mut data = [0; 8];
            BusDevice::read(&mut transport, offset, &mut data[..width]);
        } else {
            BusDevice::write(&mut transport, offset, &bytes[..width]);
        }
    }
}

#[test]
fn warnings_about_registers_end() {
    let (mut transport, _) = transport();
    for _ in 0..100 {
        write(&mut transport, MAGIC_VALUE, 1);
    }
    assert_eq!(transport.warnings, limits::REGISTER_WARNINGS);
}

#[test]
fn failed_starts_count_as_warnings() {
    let (mut transport, seen) = transport();
    // No features, then no queue that is sound, then a device that fails.
    for status in [0, 1, 3, 11] {
        write(&mut transport, STATUS, status);
    }
    assert_eq!(transport.warnings, 1);
    negotiate(&mut transport);
    write(&mut transport, QUEUE_SIZE, 3);
    write(&mut transport, QUEUE_READY, 1);
    write(&mut transport, STATUS, 15);
    assert_eq!(transport.warnings, 2);
    seen.lock().unwrap().fails = true;
    for _ in 0..100 {
        negotiate(&mut transport);
        set_up_queue(&mut transport, 0, 16, 0x10000);
        write(&mut transport, STATUS, 15);
    }
    assert_eq!(transport.warnings, limits::REGISTER_WARNINGS);
}

#[test]
fn a_kick_reaches_its_queue_only_while_the_device_runs() {
    let (mut transport, _) = transport();
    write(&mut transport, QUEUE_NOTIFY, 0);
    assert!(transport.kicks()[0].read().is_err());
    start(&mut transport);
    write(&mut transport, QUEUE_NOTIFY, 0);
    write(&mut transport, QUEUE_NOTIFY, 77);
    assert_eq!(transport.kicks()[0].read().unwrap(), 1);
    assert!(transport.kicks()[1].read().is_err());
}
