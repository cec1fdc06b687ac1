//! Puts kernel and initramfs into guest memory. Both files come from the operator; a broken one is an error that
//! names the file.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use linux_loader::loader::{Elf, KernelLoader};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use super::boot_params::Initramfs;
use super::layout;

/// Why an image could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The file cannot be opened or read.
    #[error("cannot read {what} {}", path.display())]
    Read {
        /// `kernel` or `initramfs`.
        what: &'static str,
        /// Which file.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// The file is empty or ends early.
    #[error("{what} {} is truncated", path.display())]
    Truncated {
        /// `kernel` or `initramfs`.
        what: &'static str,
        /// Which file.
        path: PathBuf,
    },
    /// The kernel is something else.
    #[error("kernel {} is not an ELF file; an uncompressed vmlinux is needed", path.display())]
    NotElf {
        /// Which file.
        path: PathBuf,
    },
    /// The kernel is for another processor.
    #[error("kernel {} is an ELF file for machine {machine}, class {class}; x86-64 (62, class 2) is needed",
        path.display())]
    WrongMachine {
        /// Which file.
        path: PathBuf,
        /// `e_machine`.
        machine: u16,
        /// `EI_CLASS`.
        class: u8,
    },
    /// The kernel's headers make no sense, or it does not fit into memory.
    #[error("cannot load kernel {}", path.display())]
    Load {
        /// Which file.
        path: PathBuf,
        /// The loader's reason.
        #[source]
        source: linux_loader::loader::Error,
    },
    /// No room for the initramfs beside the kernel.
    #[error("initramfs {} of {len} bytes does not fit into memory beside the kernel", path.display())]
    NoRoom {
        /// Which file.
        path: PathBuf,
        /// Its length.
        len: u64,
    },
}

/// Where the kernel begins and ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kernel {
    /// First instruction.
    pub entry: GuestAddress,
    /// First byte after its last segment.
    pub end: u64,
}

/// A file being loaded.
struct Image<'a> {
    what: &'static str,
    path: &'a Path,
    file: File,
    len: u64,
}

impl<'a> Image<'a> {
    fn open(what: &'static str, path: &'a Path) -> Result<Self, ImageError> {
        let opened = File::open(path).and_then(|file| Ok((file.metadata()?, file)));
        match opened {
            Ok((metadata, file)) if metadata.len() > 0 || !metadata.is_file() => Ok(Self {
                what,
                path,
                file,
                len: metadata.len(),
            }),
            Ok(_) => Err(ImageError::Truncated {
                what,
                path: path.to_owned(),
            }),
            Err(source) => Err(ImageError::Read {
                what,
                path: path.to_owned(),
                source,
            }),
        }
    }

    fn read_error(&self, source: io::Error) -> ImageError {
        let (what, path) = (self.what, self.path.to_owned());
        if source.kind() == io::ErrorKind::UnexpectedEof {
            ImageError::Truncated { what, path }
        } else {
            ImageError::Read { what, path, source }
        }
    }

    fn read_at<const N: usize>(&mut self, offset: u64) -> Result<[u8; N], ImageError> {
        let mut bytes = [0; N];
        self.file
            .seek(SeekFrom::Start(offset))
            .and_then(|_| self.file.read_exact(&mut bytes))
            .map_err(|source| self.read_error(source))?;
        Ok(bytes)
    }
}

/// Loads an ELF kernel at its own addresses.
pub fn load_kernel(memory: &GuestMemoryMmap, path: &Path) -> Result<Kernel, ImageError> {
    let mut image = Image::open("kernel", path)?;
    check_elf(&mut image)?;
    let highest = Some(GuestAddress(layout::HIGH_MEMORY));
    let loaded =
        Elf::load(memory, None, &mut image.file, highest).map_err(|source| ImageError::Load {
            path: path.to_owned(),
            source,
        })?;
    Ok(Kernel {
        entry: loaded.kernel_load,
        end: loaded.kernel_end,
    })
}

/// What the loader does not tell apart: another kind of file, another machine, a file cut short.
fn check_elf(image: &mut Image) -> Result<(), ImageError> {
    let path = || image.path.to_owned();
    let magic: [u8; 4] = image.read_at(0)?;
    if magic != *b"\x7fELF" {
        return Err(ImageError::NotElf { path: path() });
    }
    let header: [u8; 64] = image.read_at(0)?;
    let class = header[4];
    let machine = u16::from_le_bytes([header[18], header[19]]);
    if (class, machine) != (ELF_CLASS_64, ELF_MACHINE_X86_64) {
        let path = path();
        return Err(ImageError::WrongMachine {
            path,
            machine,
            class,
        });
    }
    let table = u64::from_le_bytes(header[32..40].try_into().unwrap_or_default());
    let count = u16::from_le_bytes([header[56], header[57]]);
    for index in 0..u64::from(count) {
        let entry: [u8; 56] = image.read_at(table.saturating_add(index * 56))?;
        let field = |at: usize| {
            let bytes = entry.get(at..at + 8).and_then(|b| b.try_into().ok());
            u64::from_le_bytes(bytes.unwrap_or_default())
        };
        if field(8).saturating_add(field(32)) > image.len {
            return Err(ImageError::Truncated {
                what: image.what,
                path: image.path.to_owned(),
            });
        }
    }
    Ok(())
}

const ELF_CLASS_64: u8 = 2;
const ELF_MACHINE_X86_64: u16 = 62;

/// Loads the initramfs as high in low memory as it goes.
pub fn load_initramfs(
    memory: &GuestMemoryMmap,
    kernel: &Kernel,
    path: &Path,
) -> Result<Initramfs, ImageError> {
    let mut image = Image::open("initramfs", path)?;
    let len = image.len;
    let no_room = || ImageError::NoRoom {
        path: path.to_owned(),
        len,
    };
    let low_end = memory.iter().next().map_or(0, |region| region.len());
    let address = low_end.checked_sub(len).ok_or_else(no_room)? & !0xfff;
    if address < kernel.end {
        return Err(no_room());
    }
    let bytes = usize::try_from(len).map_err(|_| no_room())?;
    memory
        .read_exact_volatile_from(GuestAddress(address), &mut image.file, bytes)
        .map_err(|error| image.read_error(io::Error::other(error)))?;
    Ok(Initramfs {
        // Below the hole, hence below 4 GiB.
        address: u32::try_from(address).map_err(|_| no_room())?,
        len: u32::try_from(len).map_err(|_| no_room())?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory() -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 32 << 20)]).unwrap()
    }

    fn elf(machine: u16, class: u8, filesz: u64) -> Vec<u8> {
        let mut file = vec![0; 64 + 56];
        file[..4].copy_from_slice(b"\x7fELF");
        file[4] = class;
        file[5] = 1;
        file[18..20].copy_from_slice(&machine.to_le_bytes());
        file[24..32].copy_from_slice(&0x20_0000u64.to_le_bytes());
        file[32..40].copy_from_slice(&64u64.to_le_bytes());
        file[54..56].copy_from_slice(&56u16.to_le_bytes());
        file[56..58].copy_from_slice(&1u16.to_le_bytes());
        file[64..68].copy_from_slice(&1u32.to_le_bytes());
        file[64 + 8..64 + 16].copy_from_slice(&120u64.to_le_bytes());
        file[64 + 24..64 + 32].copy_from_slice(&0x20_0000u64.to_le_bytes());
        file[64 + 32..64 + 40].copy_from_slice(&filesz.to_le_bytes());
        file[64 + 40..64 + 48].copy_from_slice(&0x2000u64.to_le_bytes());
        file.extend_from_slice(&[0x90; 16]);
        file
    }

    fn load(bytes: &[u8]) -> Result<Kernel, ImageError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vmlinux");
        std::fs::write(&path, bytes).unwrap();
        load_kernel(&memory(), &path)
    }

    #[test]
    fn an_elf_kernel_is_loaded_where_it_says() {
        let kernel = load(&elf(62, 2, 16)).unwrap();
        assert_eq!(kernel.entry, GuestAddress(0x20_0000));
        assert_eq!(kernel.end, 0x20_2000);
    }

    #[test]
    fn each_bad_kernel_has_its_error() {
        use ImageError::*;
        assert!(matches!(load(b""), Err(Truncated { .. })));
        assert!(matches!(load(b"\x7fELF"), Err(Truncated { .. })));
        assert!(matches!(load(&[0; 4096]), Err(NotElf { .. })));
        assert!(matches!(
            load(&elf(183, 2, 16)),
            Err(WrongMachine { machine: 183, .. })
        ));
        assert!(matches!(
            load(&elf(3, 1, 16)),
            Err(WrongMachine { class: 1, .. })
        ));
        assert!(matches!(load(&elf(62, 2, 17)), Err(Truncated { .. })));
        assert!(matches!(load(&elf(62, 2, u64::MAX)), Err(Truncated { .. })));
        let missing = load_kernel(&memory(), Path::new("/nonexistent/vmlinux"));
        assert!(matches!(missing, Err(Read { .. })));
    }

    #[test]
    fn the_initramfs_stands_at_the_end_of_low_memory_or_not_at_all() {
        let memory = memory();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("initramfs");
        std::fs::write(&path, vec![7; 5000]).unwrap();
        let mut kernel = Kernel {
            entry: GuestAddress(0x20_0000),
            end: 0x40_0000,
        };
        let place = load_initramfs(&memory, &kernel, &path).unwrap();
        assert_eq!(place.address, (32 << 20) - 8192);
        assert_eq!(place.len, 5000);
        let byte: u8 = memory
            .read_obj(GuestAddress(u64::from(place.address) + 4999))
            .unwrap();
        assert_eq!(byte, 7);
        kernel.end = u64::from(place.address) + 1;
        assert!(matches!(
            load_initramfs(&memory, &kernel, &path),
            Err(ImageError::NoRoom { .. })
        ));
    }
}
