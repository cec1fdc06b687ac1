//! Dispatch of port and MMIO accesses to devices.
//!
//! Called by the vCPU loop with whatever the guest did: any address, any width. Nothing here can panic. An access that
//! no device claims, or that crosses the end of a device's range, reads as all ones and writes nothing.

use std::sync::{Arc, Mutex, PoisonError};

/// A device on a bus. `offset` lies in the device's range, and so does the end of `data`.
pub trait BusDevice: Send {
    /// Fills `data`, which holds all ones: what the device does not answer stays so.
    fn read(&mut self, offset: u64, data: &mut [u8]);
    /// Takes `data`.
    fn write(&mut self, offset: u64, data: &[u8]);
}

/// A range that overlaps another or wraps.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("bus range {base:#x} of {len:#x} overlaps another or wraps")]
pub struct BusError {
    base: u64,
    len: u64,
}

struct Range {
    base: u64,
    last: u64,
    device: Arc<Mutex<dyn BusDevice>>,
}

/// Ports or MMIO addresses. Filled while the machine is built, then only looked up.
#[derive(Default)]
pub struct Bus {
    ranges: Vec<Range>,
}

impl Bus {
    /// Puts a device at `base`.
    pub fn insert(
        &mut self,
        base: u64,
        len: u64,
        device: Arc<Mutex<dyn BusDevice>>,
    ) -> Result<(), BusError> {
        let refused = BusError { base, len };
        let last = len
            .checked_sub(1)
            .and_then(|len| base.checked_add(len))
            .ok_or(refused)?;
        let at = self.ranges.partition_point(|range| range.base < base);
        let before = at.checked_sub(1).and_then(|at| self.ranges.get(at));
        let after = self.ranges.get(at);
        if before.is_some_and(|range| range.last >= base)
            || after.is_some_and(|range| range.base <= last)
        {
            return Err(BusError { base, len });
        }
        self.ranges.insert(at, Range { base, last, device });
        Ok(())
    }

    fn find(&self, address: u64, len: usize) -> Option<(&Mutex<dyn BusDevice>, u64)> {
        let end = address.checked_add((len as u64).checked_sub(1)?)?;
        let at = self.ranges.partition_point(|range| range.base <= address);
        let range = self.ranges.get(at.checked_sub(1)?)?;
        (end <= range.last).then(|| (&*range.device, address.saturating_sub(range.base)))
    }

    /// A read of the guest. `false` if no device claims it.
    pub fn read(&self, address: u64, data: &mut [u8]) -> bool {
        data.fill(0xff);
        let Some((device, offset)) = self.find(address, data.len()) else {
            return false;
        };
        device
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .read(offset, data);
        true
    }

    /// A write of the guest. `false` if no device claims it.
    pub fn write(&self, address: u64, data: &[u8]) -> bool {
        let Some((device, offset)) = self.find(address, data.len()) else {
            return false;
        };
        device
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .write(offset, data);
        true
    }

    /// A port access of the guest: a wide or repeated one counts at its port, as `ins` and `outs` do.
    ///
    /// KVM gives `rep outsb` to one port as one buffer of many bytes.
    pub fn port_read(&self, port: u16, data: &mut [u8]) -> bool {
        data.fill(0xff);
        match self.find(u64::from(port), 1) {
            Some((device, offset)) => {
                let mut device = device.lock().unwrap_or_else(PoisonError::into_inner);
                device.read(offset, data);
                true
            }
            None => false,
        }
    }

    /// See [`Self::port_read`].
    pub fn port_write(&self, port: u16, data: &[u8]) -> bool {
        match self.find(u64::from(port), 1) {
            Some((device, offset)) => {
                let mut device = device.lock().unwrap_or_else(PoisonError::into_inner);
                device.write(offset, data);
                true
            }
            None => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Memory {
        last_write: Option<(u64, Vec<u8>)>,
    }

    impl BusDevice for Memory {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }

        fn write(&mut self, offset: u64, data: &[u8]) {
            self.last_write = Some((offset, data.to_vec()));
        }
    }

    fn bus() -> (Bus, Arc<Mutex<Memory>>) {
        let mut bus = Bus::default();
        let device = Arc::new(Mutex::new(Memory::default()));
        bus.insert(0x1000, 0x10, device.clone()).unwrap();
        bus.insert(u64::MAX - 0xf, 0x10, device.clone()).unwrap();
        (bus, device)
    }

    #[test]
    fn an_access_reaches_its_device_at_its_offset() {
        let (bus, device) = bus();
        let mut data = [0; 4];
        assert!(bus.read(0x1004, &mut data));
        assert_eq!(data, [4; 4]);
        assert!(bus.write(0x100f, &[7]));
        assert_eq!(device.lock().unwrap().last_write, Some((0xf, vec![7])));
    }

    #[test]
    fn unclaimed_reads_are_all_ones() {
        let (bus, device) = bus();
        for address in [0, 0xfff, 0x1010, 0x100d, u64::MAX - 2, u64::MAX] {
            for len in [0, 1, 2, 3, 4, 8, 64] {
                let end = address.checked_add(len as u64);
                if len == 0 || end.is_some_and(|end| (0x1000..=0x1010).contains(&end)) {
                    continue;
                }
                let mut data = vec![0; len];
                if !bus.read(address, &mut data) {
                    assert!(data.iter().all(|byte| *byte == 0xff));
                    assert!(!bus.write(address, &data));
                }
            }
        }
        let mut empty = [];
        assert!(!bus.read(0x1000, &mut empty));
        assert_eq!(device.lock().unwrap().last_write, None);
    }

    #[test]
    fn ranges_do_not_overlap_or_wrap() {
        let (mut bus, device) = bus();
        for (base, len) in [(0x1000, 1), (0xfff, 2), (0x100f, 9), (0, 0), (u64::MAX, 2)] {
            assert!(bus.insert(base, len, device.clone()).is_err(), "{base:#x}");
        }
        bus.insert(0x1010, 1, device.clone()).unwrap();
        bus.insert(0xff0, 0x10, device).unwrap();
    }
}
