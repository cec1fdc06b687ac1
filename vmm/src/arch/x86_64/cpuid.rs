//! CPUID as each vCPU sees it: what KVM supports, with the machine's own topology and without what a pod must not have.
//!
//! Leaf numbers and fields: Intel SDM volume 2A "CPUID", AMD APM volume 3 appendix E.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

const ECX1_VMX: u32 = 1 << 5;
const ECX1_PDCM: u32 = 1 << 15;
const ECX1_TSC_DEADLINE: u32 = 1 << 24;
const ECX1_HYPERVISOR: u32 = 1 << 31;
const EDX1_HTT: u32 = 1 << 28;
const AMD_ECX_CMP_LEGACY: u32 = 1 << 1;
const AMD_ECX_SVM: u32 = 1 << 2;
const AMD_ECX_TOPOLOGY: u32 = 1 << 22;
/// More performance counters: of the core, of the northbridge, of the last cache.
const AMD_ECX_COUNTERS: u32 = 1 << 23 | 1 << 24 | 1 << 28;

/// The list for vCPU `id` of `vcpus`, from what KVM supports. `tsc_deadline`: KVM emulates that timer
/// (it leaves the bit to us).
pub fn for_vcpu(
    supported: &CpuId,
    id: u8,
    vcpus: u8,
    tsc_deadline: bool,
) -> Result<CpuId, vmm_sys_util::fam::Error> {
    let apic_id = u32::from(id);
    let count = u32::from(vcpus);
    let mut entries: Vec<kvm_cpuid_entry2> = supported
        .as_slice()
        .iter()
        .filter(|entry| !matches!(entry.function, 0xb | 0x1f))
        .copied()
        .collect();
    let highest = entries.iter().find(|entry| entry.function == 0);
    let has_topology = highest.is_some_and(|entry| entry.eax >= 0xb);
    for entry in &mut entries {
        match entry.function {
            0x1 => {
                entry.ebx = entry.ebx & 0x0000_ffff | count << 16 | apic_id << 24;
                // No virtual machines within the guest, and no performance counters.
                entry.ecx &= !(ECX1_VMX | ECX1_PDCM);
                entry.ecx |= ECX1_HYPERVISOR;
                set(&mut entry.ecx, ECX1_TSC_DEADLINE, tsc_deadline);
                set(&mut entry.edx, EDX1_HTT, vcpus > 1);
            }
            // Caches: each vCPU is a core with caches of its own; the last level is shared by all.
            0x4 => {
                let level = entry.eax >> 5 & 7;
                let sharing = if level >= 3 { count } else { 1 };
                entry.eax = entry.eax & 0x3fff | (sharing - 1) << 14 | (count.min(64) - 1) << 26;
            }
            // Thermal and power: the host's business.
            0x6 => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0x4, 0, 0, 0),
            // Performance counters, Intel's and AMD's.
            0xa | 0x8000_0022 => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
            0x8000_0001 => {
                entry.ecx &= !(AMD_ECX_SVM | AMD_ECX_TOPOLOGY | AMD_ECX_COUNTERS);
                set(&mut entry.ecx, AMD_ECX_CMP_LEGACY, vcpus > 1);
            }
            0x8000_0008 => {
                entry.ecx = entry.ecx & !0xf0ff | (count - 1) | id_bits(vcpus) << 12;
            }
            // SVM's features, and AMD's own topology leaves.
            0x8000_000a | 0x8000_001d | 0x8000_001e => {
                (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
            }
            _ => {}
        }
    }
    if has_topology {
        entries.extend(topology(apic_id, vcpus));
    }
    CpuId::from_entries(&entries)
}

fn set(register: &mut u32, bit: u32, on: bool) {
    if on {
        *register |= bit;
    } else {
        *register &= !bit;
    }
}

/// Bits of an APIC id that number the cores.
fn id_bits(vcpus: u8) -> u32 {
    u32::from(vcpus).next_power_of_two().trailing_zeros()
}

/// Leaf 0xb: one thread a core, all cores in one package.
fn topology(apic_id: u32, vcpus: u8) -> [kvm_cpuid_entry2; 3] {
    const THREAD: u32 = 1;
    const CORE: u32 = 2;
    let level = |index: u32, shift: u32, count: u32, kind: u32| kvm_cpuid_entry2 {
        function: 0xb,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: count,
        ecx: kind << 8 | index,
        edx: apic_id,
        ..Default::default()
    };
    [
        level(0, 0, 1, THREAD),
        level(1, id_bits(vcpus), u32::from(vcpus), CORE),
        level(2, 0, 0, 0),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn supported() -> CpuId {
        let leaf = |function| kvm_cpuid_entry2 {
            function,
            ..Default::default()
        };
        let mut zero = leaf(0);
        zero.eax = 0xd;
        let mut one = leaf(1);
        one.ebx = 0x1f10_0800;
        one.ecx = ECX1_VMX;
        let mut host_topology = leaf(0xb);
        host_topology.edx = 31;
        let mut svm = leaf(0x8000_0001);
        svm.ecx = AMD_ECX_SVM | AMD_ECX_COUNTERS;
        let (mut counters, mut amd_counters) = (leaf(0xa), leaf(0x8000_0022));
        counters.eax = 0x0730_0402;
        (amd_counters.eax, amd_counters.ebx) = (1, 6);
        let mut kvm = leaf(0x4000_0001);
        kvm.eax = 0xff;
        let amd = [svm, amd_counters];
        CpuId::from_entries(&[&[zero, one, counters, host_topology, kvm][..], &amd].concat())
            .unwrap()
    }

    fn find(list: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
        let found = |entry: &&kvm_cpuid_entry2| entry.function == function && entry.index == index;
        *list.as_slice().iter().find(found).unwrap()
    }

    #[test]
    fn each_vcpu_has_its_own_apic_id_everywhere() {
        for id in 0..4 {
            let list = for_vcpu(&supported(), id, 4, true).unwrap();
            assert_eq!(find(&list, 1, 0).ebx, u32::from(id) << 24 | 4 << 16 | 0x800);
            for index in 0..3 {
                assert_eq!(find(&list, 0xb, index).edx, u32::from(id));
            }
            assert_eq!(find(&list, 0xb, 1).eax, 2);
        }
    }

    #[test]
    fn performance_counters_are_hidden() {
        let list = for_vcpu(&supported(), 0, 1, true).unwrap();
        assert_eq!(find(&list, 0x8000_0001, 0).ecx & AMD_ECX_COUNTERS, 0);
        for function in [0xa, 0x8000_0022] {
            let leaf = find(&list, function, 0);
            assert_eq!([leaf.eax, leaf.ebx, leaf.ecx, leaf.edx], [0; 4]);
        }
    }

    #[test]
    fn nested_virtualization_is_hidden_and_the_hypervisor_shown() {
        let list = for_vcpu(&supported(), 0, 1, true).unwrap();
        let one = find(&list, 1, 0);
        assert_eq!(one.ecx & ECX1_VMX, 0);
        assert_ne!(one.ecx & ECX1_HYPERVISOR, 0);
        assert_ne!(one.ecx & ECX1_TSC_DEADLINE, 0);
        assert_eq!(one.edx & EDX1_HTT, 0);
        assert_eq!(find(&list, 0x8000_0001, 0).ecx & AMD_ECX_SVM, 0);
        assert_eq!(find(&list, 0x4000_0001, 0).eax, 0xff);
    }
}
