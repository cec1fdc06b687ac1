//! Where things stand in guest-physical memory and on the interrupt lines.

/// Global descriptor table of the boot vCPU.
pub const GDT: u64 = 0x1000;
/// Top level of the boot page tables; the two levels below follow in the next pages.
pub const PAGE_TABLES: u64 = 0x2000;
/// The zero page of the boot protocol.
pub const BOOT_PARAMS: u64 = 0x7000;
/// Stack of the boot vCPU, growing down.
pub const BOOT_STACK: u64 = 0x9000;
/// Kernel command line.
pub const CMDLINE: u64 = 0x1_0000;
/// Most bytes of the command line, its end mark included.
pub const CMDLINE_MAX: usize = 0x800;
/// The last KiB of the 640 KiB of base memory, one of the places where the kernel looks for the MP table.
pub const MP_TABLE: u64 = 0x9_fc00;
/// Room for the MP table.
pub const MP_TABLE_MAX: usize = 0x400;
/// End of base memory.
pub const BASE_MEMORY_END: u64 = 0xa_0000;
/// First byte above the legacy hole, where kernels may begin.
pub const HIGH_MEMORY: u64 = 0x10_0000;

/// Memory ends here and goes on at [`HOLE_END`].
pub const HOLE_START: u64 = 0xc000_0000;
/// End of the hole for MMIO, APICs and KVM's own pages.
pub const HOLE_END: u64 = 0x1_0000_0000;
/// Registers of the first virtio-mmio device.
pub const VIRTIO_MMIO: u64 = 0xd000_0000;
/// Size of one virtio-mmio device.
pub const VIRTIO_MMIO_SIZE: u64 = 0x1000;
/// I/O APIC.
pub const IO_APIC: u32 = 0xfec0_0000;
/// Local APIC.
pub const LOCAL_APIC: u32 = 0xfee0_0000;
/// One page for KVM on processors without unrestricted guests.
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
/// Three pages for KVM, for the same.
pub const KVM_TSS: u64 = 0xfffb_d000;

/// First serial port.
pub const SERIAL_PORT: u64 = 0x3f8;
/// Interrupt line of the first serial port.
pub const SERIAL_IRQ: u32 = 4;
/// Keyboard controller: its reset line is the machine's.
pub const I8042_PORT: u64 = 0x60;
/// Interrupt lines for virtio devices: above the legacy ones that have an owner, up to the I/O APIC's last pin.
pub const VIRTIO_IRQS: std::ops::RangeInclusive<u32> = 9..=23;

/// Guest memory as ranges of address and length: below the hole, and the rest above it.
pub fn memory_ranges(bytes: u64) -> Vec<(u64, u64)> {
    let below = bytes.min(HOLE_START);
    let mut ranges = vec![(0, below)];
    if bytes > below {
        ranges.push((HOLE_END, bytes - below));
    }
    ranges
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_beyond_the_hole_goes_above_four_gib() {
        assert_eq!(memory_ranges(96 << 20), [(0, 96 << 20)]);
        assert_eq!(memory_ranges(3 << 30), [(0, 3 << 30)]);
        assert_eq!(
            memory_ranges((3 << 30) + 4096),
            [(0, 3 << 30), (4 << 30, 4096)]
        );
        assert_eq!(memory_ranges(8 << 30), [(0, 3 << 30), (4 << 30, 5 << 30)]);
    }
}
