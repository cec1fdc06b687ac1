//! What the host's kernel and its installed programs can do.

use std::{
    fs::{self, File},
    io::{self, Read},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use rustix::{
    fs::{CWD, Mode, OFlags, ResolveFlags},
    mount::{OpenTreeFlags, open_tree},
};

/// Whether `open_tree` gives detached mounts here.
pub fn open_tree_works() -> io::Result<()> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    open_tree(CWD, "/", flags).map(drop)?;
    Ok(())
}

/// Whether `openat2` resolves beneath a folder.
pub fn openat2_works() -> io::Result<()> {
    let root = rustix::fs::open("/", OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    rustix::fs::openat2(root, "proc", flags, Mode::empty(), ResolveFlags::BENEATH).map(drop)?;
    Ok(())
}

/// Whether seccomp filters can be installed.
pub fn has_seccomp() -> bool {
    Path::new("/proc/sys/kernel/seccomp/actions_avail").exists()
}

/// Whether a process may make a user namespace (user_namespaces(7)).
pub fn has_user_namespaces() -> bool {
    let most = std::fs::read_to_string("/proc/sys/user/max_user_namespaces");
    most.is_ok_and(|most| most.trim() != "0")
}

/// Version of Landlock's ABI.
pub fn landlock_abi() -> Option<i64> {
    const CREATE_RULESET_VERSION: libc::c_ulong = 1;
    // SAFETY: with this flag the call takes a null attribute of size 0 and only gives back a number.
    let abi = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            std::ptr::null::<u8>(),
            0_usize,
            CREATE_RULESET_VERSION,
        )
    };
    (abi > 0).then_some(abi)
}

/// Release of the running kernel, as text and as numbers.
pub fn kernel_release() -> (String, (u32, u32)) {
    let text = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let text = text.trim().to_owned();
    let mut numbers = text
        .split(|c: char| !c.is_ascii_digit())
        .map(|n| n.parse().unwrap_or(0));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    (text, version)
}

/// Whether a file is a kernel that the VMM loads.
pub fn check_kernel(path: &Path) -> Result<String, String> {
    let (head, size) = head::<64>(path)?;
    // System V ABI, ELF header: class at 4, data at 5, machine at 18; program headers' offset at 32.
    if head.get(..4) != Some(b"\x7fELF".as_slice()) {
        return Err("is not an ELF file: it must be the uncompressed vmlinux".into());
    }
    if head.get(4..6) != Some([2, 1].as_slice()) || head.get(18..20) != Some([62, 0].as_slice()) {
        return Err("is not an ELF file for x86-64".into());
    }
    let (offset, entry_size, count) = (u64_at(&head, 32), u16_at(&head, 54), u16_at(&head, 56));
    let end = offset.saturating_add(u64::from(entry_size) * u64::from(count));
    if count == 0 || end > size {
        return Err("is truncated: its program headers are not in the file".into());
    }
    segments_end(path, offset, entry_size, count).and_then(|end| {
        if end > size {
            return Err("is truncated: a segment reaches behind the end of the file".into());
        }
        Ok(format!("{} MiB, ELF for x86-64", size >> 20))
    })
}

fn program_headers(
    path: &Path,
    offset: u64,
    entry_size: u16,
    count: u16,
) -> Result<Vec<u8>, String> {
    use std::os::unix::fs::FileExt;
    let mut headers = vec![0; usize::from(entry_size) * usize::from(count)];
    File::open(path)
        .and_then(|f| f.read_exact_at(&mut headers, offset))
        .map_err(|e| e.to_string())?;
    Ok(headers)
}

fn segments_end(path: &Path, offset: u64, entry_size: u16, count: u16) -> Result<u64, String> {
    let headers = program_headers(path, offset, entry_size, count)?;
    let ends = headers
        .chunks(usize::from(entry_size).max(1))
        .filter(|header| header.get(..4) == Some([1, 0, 0, 0].as_slice()))
        .map(|header| u64_at(header, 8).saturating_add(u64_at(header, 32)));
    Ok(ends.max().unwrap_or(0))
}

/// Whether a file is an initramfs.
pub fn check_initramfs(path: &Path) -> Result<String, String> {
    let (head, size) = head::<6>(path)?;
    if &head != b"070701" {
        return Err("is not a cpio archive of the \"newc\" format, uncompressed".into());
    }
    Ok(format!("{} KiB, cpio", size >> 10))
}

/// Whether a file is a program of ours.
pub fn check_program(path: &Path) -> Result<String, String> {
    let data = fs::metadata(path).map_err(|e| e.to_string())?;
    if !data.is_file() || data.permissions().mode() & 0o111 == 0 {
        return Err("is not an executable file".into());
    }
    Ok(format!("{} KiB", data.len() >> 10))
}

/// Whether a program needs no other file to run.
pub fn check_static(path: &Path) -> Result<(), String> {
    check_program(path)?;
    let (head, _) = head::<64>(path)?;
    if head.get(..4) != Some(b"\x7fELF".as_slice()) {
        return Err("is not an ELF file".into());
    }
    let (offset, entry_size, count) = (u64_at(&head, 32), u16_at(&head, 54), u16_at(&head, 56));
    // A program header of type PT_INTERP names the loader.
    let interpreter = program_headers(path, offset, entry_size, count)?
        .chunks(usize::from(entry_size).max(1))
        .any(|header| header.get(..4) == Some([3, 0, 0, 0].as_slice()));
    if interpreter {
        return Err("is not statically linked".into());
    }
    Ok(())
}

fn head<const N: usize>(path: &Path) -> Result<([u8; N], u64), String> {
    let mut bytes = [0; N];
    let size = fs::metadata(path).map_err(|e| e.to_string())?.len();
    let read = File::open(path).and_then(|mut f| f.read_exact(&mut bytes));
    match read {
        Ok(()) => Ok((bytes, size)),
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => {
            Err(format!("is truncated: {size} bytes"))
        }
        Err(e) => Err(e.to_string()),
    }
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    let field = bytes.get(at..at.saturating_add(2));
    field
        .and_then(|b| b.try_into().ok())
        .map_or(0, u16::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let field = bytes.get(at..at.saturating_add(8));
    field
        .and_then(|b| b.try_into().ok())
        .map_or(0, u64::from_le_bytes)
}

/// The version that `program --version` prints, and its first two numbers.
pub fn version_of(program: &str) -> Result<(String, (u32, u32)), String> {
    let output = Command::new(program)
        .arg("--version")
        .stdin(Stdio::null())
        .output()
        .map_err(|e| match e.kind() {
            io::ErrorKind::NotFound => format!("{program} is not installed"),
            _ => format!("{program}: {e}"),
        })?;
    let text = String::from_utf8_lossy(&output.stdout);
    parse_version(&text).ok_or_else(|| format!("{program} --version says nothing of a version"))
}

/// The first version in a text, with its first two numbers.
pub fn parse_version(text: &str) -> Option<(String, (u32, u32))> {
    text.split_whitespace().find_map(|word| {
        let word = word.strip_prefix('v').unwrap_or(word);
        let mut parts = word.split('.');
        let major = parts.next()?.parse().ok()?;
        let minor = parts.next()?;
        let digits = minor.find(|c: char| !c.is_ascii_digit());
        let minor = minor.get(..digits.unwrap_or(minor.len()))?.parse().ok()?;
        Some((word.to_owned(), (major, minor)))
    })
}

/// A program by its path, or by its name in `PATH`.
pub fn find_program(program: &str) -> Option<PathBuf> {
    if program.contains('/') {
        return check_program(Path::new(program))
            .is_ok()
            .then(|| program.into());
    }
    in_path(program)
}

/// Where a program is in `PATH`.
pub fn in_path(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|dir| dir.join(program))
        .find(|file| check_program(file).is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_found_in_what_programs_print() {
        let version = |text| parse_version(text).unwrap().1;
        assert_eq!(
            version("QEMU emulator version 10.0.2 (Debian 1:10)"),
            (10, 0)
        );
        assert_eq!(
            version("containerd github.com/containerd/containerd 1.6.20~ds1 x"),
            (1, 6)
        );
        assert_eq!(version("containerd x v2.1.4 75cb2b7"), (2, 1));
        assert!(parse_version("no version").is_none());
    }

    #[test]
    fn kernels_that_are_missing_truncated_or_no_elf_are_told_apart() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let path = file.path();
        let why = |bytes: &[u8]| {
            fs::write(path, bytes).unwrap();
            check_kernel(path).unwrap_err()
        };
        assert!(why(b"\x7fELF").contains("truncated: 4 bytes"));
        assert!(why(&[b'x'; 100]).contains("not an ELF"));
        let mut elf = [0; 64 + 56];
        elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
        elf[18] = 62;
        elf[32] = 64;
        elf[54] = 56;
        elf[56] = 1;
        assert!(why(&elf[..100]).contains("program headers"));
        elf[64] = 1;
        elf[64 + 32] = 200;
        assert!(why(&elf).contains("a segment"));
        assert!(check_kernel(Path::new("/no/such")).is_err());
    }

    #[test]
    fn programs_that_need_a_loader_are_told_from_static_ones() {
        assert!(
            check_static(&std::env::current_exe().unwrap())
                .unwrap_err()
                .contains("statically")
        );
        assert!(check_static(Path::new("/etc/passwd")).is_err());
        assert!(check_static(Path::new("/no/such")).is_err());
    }

    #[test]
    fn a_compressed_initramfs_is_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), b"\x1f\x8b more").unwrap();
        assert!(check_initramfs(file.path()).is_err());
        fs::write(file.path(), b"070701 more").unwrap();
        assert!(check_initramfs(file.path()).is_ok());
    }
}
