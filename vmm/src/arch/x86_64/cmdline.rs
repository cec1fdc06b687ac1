//! The kernel command line, built in one place.

use super::layout;

/// What every guest is told; a file, because the benchmark starts the same guest in virtual time.
///
/// - `console=ttyS0 quiet`: the serial port is for panics; each byte is an exit.
/// - `panic=-1 reboot=k`: a panic restarts at once, and a restart is the keyboard controller's reset line: one exit
///   that cannot be taken for a crash.
/// - `tsc=reliable no_timer_check`: KVM's clock needs no watchdog, and its timer interrupt no test.
/// - `8250.nr_uarts=1`: the other three ports are not probed.
/// - `random.trust_cpu=on`: do not wait for interrupts to seed the random pool.
/// - `swiotlb=noforce`: no device needs bounce buffers; with memory above 4 GiB they would take 64 MiB.
/// - `noreplace-smp`: lock prefixes stay. To take each of 9,000 out of a kernel that starts on one CPU, and to put it back
///   when a second comes, costs more than they do.
/// - `rcupdate.rcu_expedited=1`: whoever waits for readers (mounts, namespaces, cgroups: all that makes a container) asks
///   the few CPUs at once, and does not wait for ticks.
/// - `percpu_alloc=page`: memory of CPUs in units of what they need. With the default unit of 1 to 2 MiB the kernel keeps twice as
///   much in books of it once containers have used up the first.
/// - `page_reporting.page_reporting_order=5`: free memory is told to the host from 128 KiB on. The default is a huge page, and what
///   a start has used and freed is in smaller pieces.
pub const BASE: &str = include_str!("cmdline.txt").trim_ascii();

/// Tells the agent to offer a debugging shell: a parameter with a dot goes to nobody else.
pub const DEBUG_SHELL: &str = " bulkhead.debug_shell";

/// One virtio-mmio device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MmioSlot {
    /// First register.
    pub address: u64,
    /// Interrupt line.
    pub irq: u32,
}

/// `maxcpus` for a machine with `vcpus` of the `most` that its kernel finds: the others stay off until they are granted.
pub fn held_back(vcpus: u8, most: u8) -> String {
    if vcpus < most {
        format!(" maxcpus={vcpus}")
    } else {
        String::new()
    }
}

/// The line for a machine with these CPUs and these devices, in this order.
pub fn build(vcpus: u8, most_vcpus: u8, slots: &[MmioSlot], debug_shell: bool) -> String {
    let mut line = BASE.to_owned();
    line.push_str(&held_back(vcpus, most_vcpus));
    if debug_shell {
        line.push_str(DEBUG_SHELL);
    }
    line.push_str(bulkhead_failpoint::kernel_parameter().as_ref());
    for slot in slots {
        line.push_str(&format!(
            " virtio_mmio.device={}K@{:#x}:{}",
            layout::VIRTIO_MMIO_SIZE >> 10,
            slot.address,
            slot.irq
        ));
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_follow_the_base_and_all_slots_fit() {
        let slots: Vec<MmioSlot> = layout::VIRTIO_IRQS
            .zip(0u64..)
            .map(|(irq, index)| MmioSlot {
                address: layout::VIRTIO_MMIO + index * layout::VIRTIO_MMIO_SIZE,
                irq,
            })
            .collect();
        let line = build(2, 32, &slots, false);
        assert!(!line.contains("bulkhead"));
        let line = build(2, 32, &slots, true);
        assert!(line.contains(" bulkhead.debug_shell virtio_mmio"));
        assert!(line.starts_with("console=ttyS0"));
        assert!(line.contains(" maxcpus=2 "));
        assert!(!build(2, 2, &slots, false).contains("maxcpus"));
        assert!(
            line.contains(" virtio_mmio.device=4K@0xd0000000:5 virtio_mmio.device=4K@0xd0001000:6")
        );
        assert!(line.len() < layout::CMDLINE_MAX);
    }
}
