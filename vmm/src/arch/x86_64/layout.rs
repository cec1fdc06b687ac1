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

/// Where kernels are linked to stand (CONFIG_PHYSICAL_START); ours fills it.
pub const KERNEL: std::ops::Range<u64> = 0x100_0000..0x200_0000;

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
/// Interrupt lines for virtio devices: above the serial port's, up to the I/O APIC's last pin. Of the old owners of those
/// between, none is in this machine.
pub const VIRTIO_IRQS: std::ops::RangeInclusive<u32> = 5..=23;

/// Memory is added to a running machine in blocks of this size, at multiples of it: Linux' smallest memory block.
pub const MEMORY_BLOCK: u64 = 128 << 20;

/// A huge page.
pub const HUGE_PAGE: u64 = 2 << 20;

/// A range of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryRange {
    /// First address.
    pub address: u64,
    /// Length in bytes.
    pub len: u64,
    /// Where it is in the host's mapping, which has no hole.
    pub offset: u64,
}

impl MemoryRange {
    /// First address after it.
    pub fn end(self) -> u64 {
        self.address.saturating_add(self.len)
    }
}

/// Guest memory at boot: below the hole, and the rest above it.
pub fn memory_ranges(bytes: u64) -> Vec<MemoryRange> {
    ranges(0, bytes)
}

/// What a starting kernel fills, of memory that has `bytes` at boot: its own place; and at the end of low memory the initramfs
/// (8 MiB are enough) with, below it, the kernel's books of pages, 64 bytes for each of 4 KiB, unless they stand above the hole.
pub fn filled_ranges(bytes: u64) -> [MemoryRange; 2] {
    let low_end = bytes.min(HOLE_START);
    let books = if bytes > HOLE_START { 0 } else { bytes / 64 };
    let filled = books.saturating_add(8 << 20);
    let top = low_end.saturating_sub(filled).max(KERNEL.end) & !(HUGE_PAGE - 1);
    [KERNEL.start..KERNEL.end, top..low_end].map(|range| MemoryRange {
        address: range.start,
        len: range.end.min(low_end).saturating_sub(range.start),
        offset: range.start,
    })
}

/// Memory that was added later, after `boot` bytes of the beginning: it starts with the next whole block.
pub fn growth_ranges(boot: u64, added: u64) -> Vec<MemoryRange> {
    ranges(boot.next_multiple_of(MEMORY_BLOCK), added)
}

/// Both, adjacent ranges as one: buffers of a guest may lie across the seam.
pub fn all_ranges(boot: u64, added: u64) -> Vec<MemoryRange> {
    let mut all: Vec<MemoryRange> = Vec::new();
    for range in [memory_ranges(boot), growth_ranges(boot, added)].concat() {
        match all.last_mut() {
            Some(last) if last.end() == range.address => {
                last.len = last.len.saturating_add(range.len);
            }
            _ => all.push(range),
        }
    }
    all
}

/// Bytes of the host's mapping for `boot` bytes and `added` more.
pub fn mapping_len(boot: u64, added: u64) -> u64 {
    match added {
        0 => boot,
        added => boot.next_multiple_of(MEMORY_BLOCK).saturating_add(added),
    }
}

/// `len` bytes of the mapping from `offset` on.
fn ranges(offset: u64, len: u64) -> Vec<MemoryRange> {
    let below = HOLE_START.saturating_sub(offset).min(len);
    let parts = [
        MemoryRange {
            address: offset,
            len: below,
            offset,
        },
        MemoryRange {
            address: (offset.max(HOLE_START) - HOLE_START).saturating_add(HOLE_END),
            len: len - below,
            offset: offset.saturating_add(below),
        },
    ];
    parts.into_iter().filter(|part| part.len > 0).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    const GIB: u64 = 1 << 30;

    fn plain(ranges: Vec<MemoryRange>) -> Vec<(u64, u64)> {
        ranges
            .iter()
            .map(|range| (range.address, range.len))
            .collect()
    }

    #[test]
    fn memory_beyond_the_hole_goes_above_four_gib() {
        assert_eq!(plain(memory_ranges(96 * MIB)), [(0, 96 * MIB)]);
        assert_eq!(plain(memory_ranges(3 * GIB)), [(0, 3 * GIB)]);
        assert_eq!(
            plain(memory_ranges(3 * GIB + 4096)),
            [(0, 3 * GIB), (4 * GIB, 4096)]
        );
        assert_eq!(
            plain(memory_ranges(8 * GIB)),
            [(0, 3 * GIB), (4 * GIB, 5 * GIB)]
        );
    }

    #[test]
    fn growth_starts_with_a_whole_block_and_passes_the_hole() {
        assert_eq!(plain(growth_ranges(512 * MIB, 0)), []);
        assert_eq!(
            plain(growth_ranges(512 * MIB, 256 * MIB)),
            [(512 * MIB, 256 * MIB)]
        );
        assert_eq!(
            plain(growth_ranges(600 * MIB, 128 * MIB)),
            [(640 * MIB, 128 * MIB)]
        );
        assert_eq!(
            plain(growth_ranges(2 * GIB + 1, 2 * GIB)),
            [
                (2 * GIB + 128 * MIB, GIB - 128 * MIB),
                (4 * GIB, GIB + 128 * MIB)
            ]
        );
        // The boot memory ends above the hole, or right at it.
        assert_eq!(
            plain(growth_ranges(4 * GIB + MIB, GIB)),
            [(5 * GIB + 128 * MIB, GIB)]
        );
        assert_eq!(plain(growth_ranges(3 * GIB, GIB)), [(4 * GIB, GIB)]);
    }

    #[test]
    fn all_ranges_are_in_order_apart_and_within_the_mapping() {
        for boot in [
            96 * MIB,
            512 * MIB,
            600 * MIB,
            3 * GIB - MIB,
            3 * GIB,
            5 * GIB + MIB,
        ] {
            for added in [0, 128 * MIB, GIB, 4 * GIB] {
                let all = all_ranges(boot, added);
                assert!(all.len() <= 3, "{all:?}");
                assert_eq!(all.iter().map(|range| range.len).sum::<u64>(), boot + added);
                for pair in all.windows(2) {
                    assert!(pair[0].end() < pair[1].address, "{all:?}");
                    assert!(pair[0].offset + pair[0].len <= pair[1].offset, "{all:?}");
                }
                for range in &all {
                    assert!(range.end() <= HOLE_START || range.address >= HOLE_END);
                    assert!(range.offset + range.len <= mapping_len(boot, added));
                }
            }
        }
        assert_eq!(plain(all_ranges(512 * MIB, GIB)), [(0, 512 * MIB + GIB)]);
    }

    #[test]
    fn filled_ranges_are_whole_huge_pages_apart_and_within_memory() {
        for bytes in [96 * MIB, 512 * MIB, 601 * MIB, 3 * GIB, 5 * GIB] {
            let [kernel, top] = filled_ranges(bytes);
            assert!(kernel.end() <= top.address && top.end() <= bytes.min(HOLE_START));
            assert!(top.len >= 8 * MIB && top.len <= 80 * MIB, "{top:?}");
            assert_eq!((kernel.address | top.address) % HUGE_PAGE, 0);
        }
    }
}
