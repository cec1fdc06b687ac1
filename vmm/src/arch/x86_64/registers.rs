//! A vCPU's first state: what the 64-bit boot protocol wants of the boot vCPU (Linux `boot.rst`, "64-bit boot
//! protocol"), and the MSRs and local interrupt lines that every vCPU gets. The other vCPUs wait for the kernel's INIT
//! and SIPI, so they need no registers.

use kvm_bindings::{CpuId, Msrs, kvm_lapic_state, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::layout;

/// Which part of a vCPU's state could not be set.
#[derive(Debug, thiserror::Error)]
pub enum RegisterError {
    /// KVM refused.
    #[error("cannot set {what} of vCPU {id}")]
    Kvm {
        /// Which state.
        what: &'static str,
        /// Which vCPU.
        id: u8,
        /// KVM's answer.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// KVM took only some of the MSRs.
    #[error("KVM refused MSR {0:#x}")]
    Msr(u32),
    /// Guest memory is too small for the boot tables.
    #[error("cannot write boot tables into guest memory")]
    Memory(#[source] vm_memory::GuestMemoryError),
}

// Selectors of the boot protocol: code 0x10, data 0x18. A task segment is needed to enter long mode.
const GDT: [u64; 6] = [
    0,
    0,
    0x00af_9b00_0000_ffff, // 0x10: 64-bit code
    0x00cf_9300_0000_ffff, // 0x18: data
    0x008f_8b00_0000_ffff, // 0x20: task, busy
    0,
];
const CODE: u16 = 0x10;
const DATA: u16 = 0x18;
const TASK: u16 = 0x20;

const CR0_PE: u64 = 1;
const CR0_MP: u64 = 1 << 1;
const CR0_ET: u64 = 1 << 4;
const CR0_NE: u64 = 1 << 5;
const CR0_WP: u64 = 1 << 16;
const CR0_AM: u64 = 1 << 18;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

const PAGE_PRESENT_WRITABLE: u64 = 0b11;
const PAGE_LARGE: u64 = 1 << 7;

/// Writes GDT and page tables: the first GiB, identity mapped.
pub fn write_boot_tables(memory: &GuestMemoryMmap) -> Result<(), RegisterError> {
    let (top, middle, bottom) = (
        layout::PAGE_TABLES,
        layout::PAGE_TABLES + 0x1000,
        layout::PAGE_TABLES + 0x2000,
    );
    let write = |address: u64, value: u64| {
        memory
            .write_obj(value, GuestAddress(address))
            .map_err(RegisterError::Memory)
    };
    for (entry, at) in GDT.iter().zip((layout::GDT..).step_by(8)) {
        write(at, *entry)?;
    }
    write(top, middle | PAGE_PRESENT_WRITABLE)?;
    write(middle, bottom | PAGE_PRESENT_WRITABLE)?;
    for index in 0..512 {
        write(
            bottom + index * 8,
            index << 21 | PAGE_PRESENT_WRITABLE | PAGE_LARGE,
        )?;
    }
    Ok(())
}

/// Gives every vCPU its CPUID, MSRs and local interrupt lines, and the boot vCPU (id 0) its registers.
pub fn set_up(
    fd: &VcpuFd,
    id: u8,
    cpuid: &CpuId,
    entry: GuestAddress,
) -> Result<(), RegisterError> {
    let failed = |what| move |source| RegisterError::Kvm { what, id, source };
    fd.set_cpuid2(cpuid).map_err(failed("CPUID"))?;
    set_msrs(fd, id)?;
    let mut lapic = fd.get_lapic().map_err(failed("local APIC"))?;
    wire_local_interrupts(&mut lapic);
    fd.set_lapic(&lapic).map_err(failed("local APIC"))?;
    if id == 0 {
        let mut sregs = fd.get_sregs().map_err(failed("system registers"))?;
        long_mode(&mut sregs);
        fd.set_sregs(&sregs).map_err(failed("system registers"))?;
        fd.set_regs(&kvm_regs {
            rip: entry.0,
            rsi: layout::BOOT_PARAMS,
            rsp: layout::BOOT_STACK,
            rbp: layout::BOOT_STACK,
            rflags: 2,
            ..Default::default()
        })
        .map_err(failed("registers"))?;
    }
    Ok(())
}

fn segment(selector: u16) -> kvm_segment {
    let descriptor = GDT
        .get(usize::from(selector / 8))
        .copied()
        .unwrap_or_default();
    let bit = |at: u32| (descriptor >> at & 1) as u8;
    kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_: (descriptor >> 40 & 0xf) as u8,
        s: bit(44),
        dpl: 0,
        present: bit(47),
        l: bit(53),
        db: bit(54),
        g: bit(55),
        ..Default::default()
    }
}

fn long_mode(sregs: &mut kvm_sregs) {
    sregs.cs = segment(CODE);
    for data in [
        &mut sregs.ds,
        &mut sregs.es,
        &mut sregs.fs,
        &mut sregs.gs,
        &mut sregs.ss,
    ] {
        *data = segment(DATA);
    }
    sregs.tr = segment(TASK);
    sregs.gdt.base = layout::GDT;
    sregs.gdt.limit = (size_of_val(&GDT) - 1) as u16;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    sregs.cr0 = CR0_PE | CR0_MP | CR0_ET | CR0_NE | CR0_WP | CR0_AM | CR0_PG;
    sregs.cr3 = layout::PAGE_TABLES;
    sregs.cr4 = CR4_PAE;
    sregs.efer = EFER_LME | EFER_LMA;
}

const MSR_MISC_ENABLE: u32 = 0x1a0;
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
const MISC_ENABLE_FAST_STRING: u64 = 1;
/// MTRRs on, default write-back: all memory is cached.
const MTRR_WRITE_BACK: u64 = 1 << 11 | 6;

fn set_msrs(fd: &VcpuFd, id: u8) -> Result<(), RegisterError> {
    let entry = |index, data| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    };
    let list = [
        entry(MSR_MISC_ENABLE, MISC_ENABLE_FAST_STRING),
        entry(MSR_MTRR_DEF_TYPE, MTRR_WRITE_BACK),
    ];
    // Two entries are far below the most that the list may have.
    let Ok(msrs) = Msrs::from_entries(&list) else {
        return Ok(());
    };
    let set = fd.set_msrs(&msrs).map_err(|source| RegisterError::Kvm {
        what: "MSRs",
        id,
        source,
    })?;
    match list.get(set) {
        Some(refused) => Err(RegisterError::Msr(refused.index)),
        None => Ok(()),
    }
}

const LAPIC_LINT0: usize = 0x350;
const LAPIC_LINT1: usize = 0x360;
const DELIVERY_MODE_MASK: u32 = 0x700;
const DELIVERY_NMI: u32 = 0x400;
const DELIVERY_EXT_INT: u32 = 0x700;

/// LINT0 takes the 8259's interrupts and LINT1 NMIs, as the MP table says.
fn wire_local_interrupts(lapic: &mut kvm_lapic_state) {
    for (register, mode) in [(LAPIC_LINT0, DELIVERY_EXT_INT), (LAPIC_LINT1, DELIVERY_NMI)] {
        if let Some(bytes) = lapic.regs.get_mut(register..register + 4) {
            let mut value = [0; 4];
            for (to, from) in value.iter_mut().zip(bytes.iter()) {
                *to = *from as u8;
            }
            let value = u32::from_le_bytes(value) & !DELIVERY_MODE_MASK | mode;
            for (to, from) in bytes.iter_mut().zip(value.to_le_bytes()) {
                *to = from as _;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_boot_vcpu_starts_in_long_mode_with_flat_segments() {
        let mut sregs = kvm_sregs::default();
        long_mode(&mut sregs);
        assert_eq!((sregs.cs.l, sregs.cs.db, sregs.cs.type_), (1, 0, 0xb));
        assert_eq!((sregs.ds.db, sregs.ds.type_, sregs.ds.s), (1, 3, 1));
        assert_eq!((sregs.tr.type_, sregs.tr.s, sregs.tr.present), (0xb, 0, 1));
        assert_eq!(sregs.gdt.limit, 47);
    }

    #[test]
    fn the_first_gib_is_mapped_to_itself() {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        write_boot_tables(&memory).unwrap();
        let read = |at: u64| memory.read_obj::<u64>(GuestAddress(at)).unwrap();
        assert_eq!(read(0x2000), 0x3003);
        assert_eq!(read(0x3000), 0x4003);
        assert_eq!(read(0x4000 + 511 * 8), 511 << 21 | 0x83);
        assert_eq!(read(layout::GDT + 0x10), 0x00af_9b00_0000_ffff);
    }

    #[test]
    fn local_interrupt_lines_keep_their_other_bits() {
        let mut lapic = kvm_lapic_state::default();
        lapic.regs[LAPIC_LINT0 + 2] = 1;
        wire_local_interrupts(&mut lapic);
        assert_eq!(lapic.regs[LAPIC_LINT0 + 1], 7);
        assert_eq!(lapic.regs[LAPIC_LINT0 + 2], 1);
        assert_eq!(lapic.regs[LAPIC_LINT1 + 1], 4);
    }
}
