//! Guest memory: one private anonymous mapping with room for all that the machine can ever have.
//!
//! What the guest was not given is neither accessible to us nor known to KVM, so it costs an entry in the process's list
//! of mappings and nothing else. Growth opens the next part of the mapping, gives it to KVM as a slot of its own, and puts
//! a new map into [`GrowingMemory`], in which adjacent ranges are one region. The mapping lives as long as the
//! process, which is the machine's.

use std::io;
use std::ptr::{NonNull, null_mut};
use std::sync::PoisonError;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use vm_memory::mmap::{MmapRegion, MmapRegionError};
use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemoryMmap, GuestRegionMmap};

use crate::arch::x86_64::layout::{self, MemoryRange};
use crate::config::MachineConfig;
use crate::virtio::{GrowingMemory, SharedMemory};

const PROTECTION: libc::c_int = libc::PROT_READ | libc::PROT_WRITE;
const FLAGS: libc::c_int = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;

/// Why memory is not there.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// No address space for it.
    #[error("cannot reserve {mib} MiB of addresses for guest memory")]
    Reserve {
        /// All that the machine could ever have.
        mib: u64,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// The host does not give it.
    #[error("the host does not give {mib} MiB of guest memory")]
    Open {
        /// How much.
        mib: u64,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// Not a map.
    #[error("cannot map guest memory at {address:#x}")]
    Map {
        /// Guest-physical.
        address: u64,
        /// Why.
        #[source]
        source: MmapRegionError,
    },
    /// Ranges that do not fit together.
    #[error("cannot make a map of guest memory")]
    Regions(#[source] vm_memory::GuestRegionCollectionError),
    /// KVM refused it.
    #[error("KVM does not take guest memory")]
    Kvm(#[source] kvm_ioctls::Error),
}

/// The memory of a machine.
pub struct GuestMemory {
    mapping: NonNull<u8>,
    boot: u64,
    added: u64,
    slots: u32,
    shared: GrowingMemory,
}

// SAFETY: the pointer is to a mapping that lives as long as the process; it is only handed to system calls and to
// `MmapRegion`, which is made for memory that others write at any time.
unsafe impl Send for GuestMemory {}

impl GuestMemory {
    /// Reserves what the machine can have and gives it what it starts with.
    pub fn new(vm: &VmFd, config: &MachineConfig) -> Result<Self, MemoryError> {
        let (boot, reserve) = (config.memory_bytes(), config.reserve_bytes());
        let mapping = reserve_addresses(layout::mapping_len(boot, reserve))?;
        let ranges = layout::memory_ranges(boot);
        open(mapping, &ranges)?;
        prefer_huge_pages(mapping, &layout::filled_ranges(boot));
        let mut memory = Self {
            mapping,
            boot,
            added: 0,
            slots: 0,
            shared: GrowingMemory::new(map(mapping, &ranges)?),
        };
        memory.give(vm, &ranges)?;
        Ok(memory)
    }

    /// As the devices share it.
    pub fn shared(&self) -> &GrowingMemory {
        &self.shared
    }

    /// Makes what was added after the start `added` bytes, whole blocks within the reserve. On an error the guest has
    /// what it had.
    pub fn grow(&mut self, vm: &VmFd, added: u64) -> Result<(), MemoryError> {
        let more = added.saturating_sub(self.added);
        let from = layout::mapping_len(self.boot, self.added);
        let new = layout::growth_ranges(from, more);
        open(self.mapping, &new)?;
        let map = map(self.mapping, &layout::all_ranges(self.boot, added))?;
        self.give(vm, &new)?;
        self.added = added;
        // Devices know the memory before the guest can use it: it hears of it after this.
        let now = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        now.replace(map);
        Ok(())
    }

    /// The map of what there is now.
    pub fn map(&self) -> SharedMemory {
        self.shared.memory().into_inner()
    }

    /// A slot of KVM's for each range; all or none.
    fn give(&mut self, vm: &VmFd, ranges: &[MemoryRange]) -> Result<(), MemoryError> {
        let first = self.slots;
        for range in ranges {
            let slot = self.slots;
            if let Err(error) = self.set_slot(vm, slot, *range) {
                for (slot, range) in (first..slot).zip(ranges) {
                    let none = MemoryRange { len: 0, ..*range };
                    if let Err(error) = self.set_slot(vm, slot, none) {
                        tracing::warn!(%error, slot, "cannot take guest memory back");
                    }
                }
                self.slots = first;
                return Err(MemoryError::Kvm(error));
            }
            self.slots = slot.saturating_add(1);
        }
        Ok(())
    }

    fn set_slot(&self, vm: &VmFd, slot: u32, range: MemoryRange) -> Result<(), kvm_ioctls::Error> {
        let region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: range.address,
            memory_size: range.len,
            userspace_addr: address(self.mapping, range.offset).as_ptr() as u64,
        };
        // SAFETY: the range lies within our mapping, which lives as long as the process and is used for nothing else.
        unsafe { vm.set_user_memory_region(region) }
    }
}

/// `offset` lies within the mapping.
fn address(mapping: NonNull<u8>, offset: u64) -> NonNull<u8> {
    // SAFETY: all offsets come from `layout`, whose ranges lie within `mapping_len`, the length of the mapping.
    unsafe { mapping.add(offset as usize) }
}

/// The address is a multiple of a huge page's, as guest-physical addresses are: else KVM could not map one by one entry.
fn reserve_addresses(len: u64) -> Result<NonNull<u8>, MemoryError> {
    let with_slack = len.saturating_add(layout::HUGE_PAGE) as usize;
    // SAFETY: a new mapping at an address of the kernel's choice.
    let mapping = unsafe { libc::mmap(null_mut(), with_slack, libc::PROT_NONE, FLAGS, -1, 0) };
    let failed = mapping == libc::MAP_FAILED;
    let mapping = NonNull::new(mapping.cast()).filter(|_| !failed);
    let mapping: NonNull<u8> = mapping.ok_or_else(|| MemoryError::Reserve {
        mib: len >> 20,
        source: io::Error::last_os_error(),
    })?;
    let slack = mapping.align_offset(layout::HUGE_PAGE as usize);
    // SAFETY: less than a huge page, which the mapping is longer by.
    Ok(unsafe { mapping.add(slack) })
}

/// Huge pages where each byte is used anyway: a fault in place of 512. What else the guest takes is up to the host's policy; a
/// host without huge pages refuses, and nothing is lost.
fn prefer_huge_pages(mapping: NonNull<u8>, ranges: &[MemoryRange]) {
    for range in ranges {
        let start = address(mapping, range.offset).as_ptr();
        // SAFETY: the range lies within our mapping; advice changes no content.
        let _ = unsafe { libc::madvise(start.cast(), range.len as usize, libc::MADV_HUGEPAGE) };
    }
}

/// Makes ranges of the mapping memory.
fn open(mapping: NonNull<u8>, ranges: &[MemoryRange]) -> Result<(), MemoryError> {
    for range in ranges {
        let start = address(mapping, range.offset);
        // SAFETY: the range lies within our mapping; access only widens.
        let opened =
            unsafe { libc::mprotect(start.as_ptr().cast(), range.len as usize, PROTECTION) };
        if opened < 0 {
            return Err(MemoryError::Open {
                mib: range.len >> 20,
                source: io::Error::last_os_error(),
            });
        }
    }
    Ok(())
}

fn map(mapping: NonNull<u8>, ranges: &[MemoryRange]) -> Result<GuestMemoryMmap, MemoryError> {
    let region = |range: &MemoryRange| {
        let error = |source| MemoryError::Map {
            address: range.address,
            source,
        };
        let start = address(mapping, range.offset).as_ptr();
        // SAFETY: the range lies within a mapping that lives as long as the process, and was opened.
        let region = unsafe { MmapRegion::build_raw(start, range.len as usize, PROTECTION, FLAGS) };
        GuestRegionMmap::new(region.map_err(error)?, GuestAddress(range.address))
            .ok_or_else(|| error(MmapRegionError::InvalidOffsetLength))
    };
    let regions = ranges.iter().map(region).collect::<Result<_, _>>()?;
    GuestMemoryMmap::from_regions(regions).map_err(MemoryError::Regions)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_memory_is_aligned_to_huge_pages_and_takes_them_where_a_kernel_fills_them() {
        let boot = 96 << 20;
        let mapping = reserve_addresses(boot).unwrap();
        assert_eq!(mapping.as_ptr() as u64 % layout::HUGE_PAGE, 0);
        open(mapping, &layout::memory_ranges(boot)).unwrap();
        prefer_huge_pages(mapping, &layout::filled_ranges(boot));
        if !std::path::Path::new("/sys/kernel/mm/transparent_hugepage").exists() {
            return;
        }
        let start = format!(
            "{:x}-",
            address(mapping, layout::KERNEL.start).as_ptr() as u64
        );
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mut after = smaps.lines().skip_while(|line| !line.starts_with(&start));
        let flags = after.find(|line| line.starts_with("VmFlags:")).unwrap();
        assert!(flags.contains(" hg"), "{flags}");
    }
}
