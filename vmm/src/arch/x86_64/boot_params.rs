//! The zero page (Linux `Documentation/arch/x86/zero-page.rst` and `boot.rst`).

use super::layout;

/// Size of the page.
pub const SIZE: usize = 4096;

const E820_RAM: u32 = 1;

// Offsets within the page.
const E820_ENTRIES: usize = 0x1e8;
const BOOT_FLAG: usize = 0x1fe;
const HEADER_MAGIC: usize = 0x202;
const VERSION: usize = 0x206;
const TYPE_OF_LOADER: usize = 0x210;
const LOADFLAGS: usize = 0x211;
const RAMDISK_IMAGE: usize = 0x218;
const RAMDISK_SIZE: usize = 0x21c;
const CMD_LINE_PTR: usize = 0x228;
const CMDLINE_SIZE: usize = 0x238;
const E820_TABLE: usize = 0x2d0;

/// Where the initramfs was put.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Initramfs {
    /// Guest-physical address.
    pub address: u32,
    /// Length in bytes.
    pub len: u32,
}

/// Memory that the guest may use: all of it but the legacy hole and the MP table.
pub fn e820(memory_bytes: u64) -> Vec<(u64, u64)> {
    let mut map = vec![(0, layout::MP_TABLE)];
    for range in layout::memory_ranges(memory_bytes) {
        let base = range.address.max(layout::HIGH_MEMORY);
        map.push((base, range.end().saturating_sub(base)));
    }
    map
}

/// Builds the page. `cmdline_len` counts no end mark.
pub fn build(memory_bytes: u64, initramfs: Option<Initramfs>, cmdline_len: usize) -> [u8; SIZE] {
    let mut page = [0; SIZE];
    let mut put = |at: usize, bytes: &[u8]| page[at..at + bytes.len()].copy_from_slice(bytes);
    put(BOOT_FLAG, &0xaa55u16.to_le_bytes());
    put(HEADER_MAGIC, b"HdrS");
    put(VERSION, &0x020cu16.to_le_bytes());
    put(TYPE_OF_LOADER, &[0xff]);
    // LOADED_HIGH
    put(LOADFLAGS, &[1]);
    if let Some(initramfs) = initramfs {
        put(RAMDISK_IMAGE, &initramfs.address.to_le_bytes());
        put(RAMDISK_SIZE, &initramfs.len.to_le_bytes());
    }
    put(CMD_LINE_PTR, &(layout::CMDLINE as u32).to_le_bytes());
    put(CMDLINE_SIZE, &(cmdline_len as u32).to_le_bytes());
    let map = e820(memory_bytes);
    put(E820_ENTRIES, &[map.len() as u8]);
    for (index, (base, len)) in map.into_iter().enumerate() {
        let at = E820_TABLE + index * 20;
        put(at, &base.to_le_bytes());
        put(at + 8, &len.to_le_bytes());
        put(at + 16, &E820_RAM.to_le_bytes());
    }
    page
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_map_covers_memory_but_the_holes() {
        assert_eq!(
            e820(96 << 20),
            [(0, 0x9fc00), (0x100000, (96 << 20) - 0x100000)]
        );
        assert_eq!(
            e820(4 << 30),
            [
                (0, 0x9fc00),
                (0x100000, (3 << 30) - 0x100000),
                (4 << 30, 1 << 30)
            ]
        );
    }

    #[test]
    fn the_page_says_where_things_are() {
        let initramfs = Initramfs {
            address: 0x1234_5000,
            len: 77,
        };
        let page = build(512 << 20, Some(initramfs), 33);
        assert_eq!(page[0x1fe..0x200], [0x55, 0xaa]);
        assert_eq!(&page[0x202..0x206], b"HdrS");
        assert_eq!(page[0x218..0x21c], 0x1234_5000u32.to_le_bytes());
        assert_eq!(page[0x21c..0x220], 77u32.to_le_bytes());
        assert_eq!(page[0x228..0x22c], 0x1_0000u32.to_le_bytes());
        assert_eq!(page[0x1e8], 2);
        assert_eq!(page[0x2d0 + 20..0x2d0 + 28], 0x100000u64.to_le_bytes());
    }
}
