//! The MP table (Intel MultiProcessor Specification 1.4): how a kernel without ACPI finds its processors and the wiring
//! of its interrupts.

use super::layout;

/// I/O APIC pins.
const PINS: u8 = 24;

const ENTRY_PROCESSOR: u8 = 0;
const ENTRY_BUS: u8 = 1;
const ENTRY_IO_APIC: u8 = 2;
const ENTRY_INTERRUPT: u8 = 3;
const ENTRY_LOCAL_INTERRUPT: u8 = 4;

const INT: u8 = 0;
const NMI: u8 = 1;
const EXT_INT: u8 = 3;

const APIC_VERSION: u8 = 0x14;
const SPEC_1_4: u8 = 4;

/// Builds the floating pointer and the table right behind it, to be put at [`layout::MP_TABLE`].
/// `vcpus` was checked to be 1 to 32, those that may come later included; APIC ids are 0 to `vcpus - 1`.
pub fn build(vcpus: u8) -> Vec<u8> {
    let io_apic_id = vcpus;
    let mut entries: Vec<u8> = Vec::new();
    let mut count = 0u16;
    let mut entry = |bytes: &[u8]| {
        entries.extend_from_slice(bytes);
        count += 1;
    };
    for id in 0..vcpus {
        // Enabled; the first is the boot processor. Signature and features are what CPUID says.
        let flags = if id == 0 { 3 } else { 1 };
        let mut processor = [0; 20];
        processor[..4].copy_from_slice(&[ENTRY_PROCESSOR, id, APIC_VERSION, flags]);
        processor[4..8].copy_from_slice(&0x600u32.to_le_bytes());
        // FPU and APIC
        processor[8..12].copy_from_slice(&0x201u32.to_le_bytes());
        entry(&processor);
    }
    entry(&[ENTRY_BUS, 0, b'I', b'S', b'A', b' ', b' ', b' ']);
    let [a, b, c, d] = layout::IO_APIC.to_le_bytes();
    entry(&[ENTRY_IO_APIC, io_apic_id, 0x11, 1, a, b, c, d]);
    for line in 0..PINS {
        // Polarity and trigger as the bus has them: ISA is edge, high.
        entry(&[ENTRY_INTERRUPT, INT, 0, 0, 0, line, io_apic_id, line]);
    }
    entry(&[ENTRY_LOCAL_INTERRUPT, EXT_INT, 0, 0, 0, 0, 0, 0]);
    entry(&[ENTRY_LOCAL_INTERRUPT, NMI, 0, 0, 0, 0, 0xff, 1]);

    let mut header = Vec::with_capacity(44);
    header.extend_from_slice(b"PCMP");
    header.extend_from_slice(&((44 + entries.len()) as u16).to_le_bytes());
    header.extend_from_slice(&[SPEC_1_4, 0]);
    header.extend_from_slice(b"BULKHEADMICROVM     ");
    header.extend_from_slice(&[0; 6]);
    header.extend_from_slice(&count.to_le_bytes());
    header.extend_from_slice(&layout::LOCAL_APIC.to_le_bytes());
    header.extend_from_slice(&[0; 4]);
    let mut table = header;
    table.extend_from_slice(&entries);
    table[7] = checksum(&table);

    let mut pointer = Vec::with_capacity(16 + table.len());
    pointer.extend_from_slice(b"_MP_");
    pointer.extend_from_slice(&(layout::MP_TABLE as u32 + 16).to_le_bytes());
    pointer.extend_from_slice(&[1, SPEC_1_4, 0, 0, 0, 0, 0, 0]);
    pointer[10] = checksum(&pointer);
    pointer.extend_from_slice(&table);
    pointer
}

/// What makes the sum of all bytes zero.
fn checksum(bytes: &[u8]) -> u8 {
    bytes
        .iter()
        .fold(0u8, |sum, byte| sum.wrapping_add(*byte))
        .wrapping_neg()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_for_the_most_vcpus_fits_its_place() {
        for vcpus in 1..=crate::limits::VCPUS {
            let table = build(vcpus);
            assert!(
                table.len() <= layout::MP_TABLE_MAX,
                "{vcpus}: {}",
                table.len()
            );
            assert_eq!(checksum(&table[..16]), 0);
            assert_eq!(checksum(&table[16..]), 0);
            let len = u16::from_le_bytes([table[20], table[21]]);
            assert_eq!(usize::from(len), table.len() - 16);
        }
    }

    #[test]
    fn each_vcpu_has_its_own_apic_id_and_the_first_boots() {
        let table = build(4);
        for id in 0..4usize {
            let entry = &table[16 + 44 + id * 20..][..20];
            assert_eq!(usize::from(entry[1]), id);
            assert_eq!(entry[3], if id == 0 { 3 } else { 1 });
        }
        let count = u16::from_le_bytes([table[16 + 34], table[16 + 35]]);
        assert_eq!(count, 4 + 1 + 1 + 24 + 2);
    }
}
