//! A real mount: the requests of this host's kernel come from `/dev/fuse` instead of a virtqueue, in the same form.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;

use rustix::fs::{AtFlags, CWD, Mode, OFlags, SeekFrom, XattrFlags, linkat, open, openat, seek};
use rustix::io::Errno;
use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, unmount,
};
use rustix::net::{RecvFlags, SendFlags, recv, send};
use rustix::thread::UnshareFlags;

use super::super::abi::opcode;
use super::super::inodes::Limits;
use super::super::server::Budget;
use super::super::sys;
use super::rig::{Rig, u32_at};
use crate::limits;

/// Carries requests from the FUSE device to a worker and its answers back.
fn carry(device: &OwnedFd, socket: &OwnedFd) {
    let mut buffer = vec![0; limits::FS_MESSAGE + 4096];
    loop {
        let len = match rustix::io::read(device, buffer.as_mut_slice()) {
            Ok(len) => len,
            Err(Errno::NOENT | Errno::INTR | Errno::AGAIN) => continue,
            // Unmounted.
            Err(_) => return,
        };
        let code = u32_at(&buffer, 4);
        if code == opcode::INTERRUPT {
            continue;
        }
        send(socket, &buffer[..len], SendFlags::NOSIGNAL).unwrap();
        if code != opcode::FORGET && code != opcode::BATCH_FORGET {
            let (_, len) = recv(socket, buffer.as_mut_slice(), RecvFlags::empty()).unwrap();
            // The asking process may be gone.
            let _ = rustix::io::write(device, &buffer[..len]);
        }
    }
}

/// Mounts the rig's trees at `mnt`, in this thread's mount namespace.
fn mount_rig(rig: &mut Rig) -> Option<Vec<JoinHandle<()>>> {
    let Ok(device) = open("/dev/fuse", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()) else {
        eprintln!("skipped: needs /dev/fuse");
        return None;
    };
    rig.add("ro", &rig.path("ro"), r#""readonly":true"#)
        .unwrap();
    rig.add("rw", &rig.path("rw"), r#""readonly":false"#)
        .unwrap();
    rig.add(
        "shared",
        &rig.path("rw"),
        r#""readonly":false,"shared":true"#,
    )
    .unwrap();
    sys::unshare(UnshareFlags::NEWNS).unwrap();
    mount_change(
        "/",
        MountPropagationFlags::REC | MountPropagationFlags::PRIVATE,
    )
    .unwrap();
    std::fs::create_dir(rig.path("mnt")).unwrap();
    let options = format!(
        "fd={},rootmode=40000,user_id=0,group_id=0,default_permissions,allow_other,max_read=1048576",
        device.as_raw_fd()
    );
    let options = CString::new(options).unwrap();
    mount(
        "bulkhead",
        rig.path("mnt"),
        "fuse",
        MountFlags::empty(),
        options.as_c_str(),
    )
    .unwrap();
    let device = Arc::new(device);
    let carriers = std::mem::take(&mut rig.sockets)
        .into_iter()
        .map(|socket| {
            let device = Arc::clone(&device);
            std::thread::spawn(move || carry(&device, &socket))
        })
        .collect();
    Some(carriers)
}

#[test]
fn the_hosts_kernel_works_on_a_mount_of_it() {
    // Few descriptors, so that most files are held by handle.
    let budget = Budget {
        inodes: Limits {
            inodes: 10_000,
            descriptors: 300,
        },
        handles: 100,
    };
    let Some(mut rig) = Rig::start_bare(budget, 3) else {
        return;
    };
    let Some(carriers) = mount_rig(&mut rig) else {
        return;
    };
    let (mounted, host) = (rig.path("mnt/rw"), rig.path("rw"));
    many_files(&mounted, &host);
    links_and_attributes(&mounted, &host);
    sparse_and_anonymous(&mounted, &host);
    random_reads_and_writes(&mounted, &host);
    changes_of_the_host(&rig.path("mnt/shared"), &host);
    overlay(&rig, &host);
    assert_eq!(
        std::fs::write(rig.path("mnt/ro/new"), "")
            .unwrap_err()
            .kind(),
        std::io::ErrorKind::ReadOnlyFilesystem
    );
    unmount(rig.path("mnt"), UnmountFlags::empty()).unwrap();
    carriers
        .into_iter()
        .for_each(|carrier| carrier.join().unwrap());
    rig.end().unwrap();
}

fn many_files(mounted: &Path, host: &Path) {
    std::fs::create_dir(mounted.join("many")).unwrap();
    for number in 0..2000 {
        std::fs::write(mounted.join(format!("many/{number}")), number.to_string()).unwrap();
    }
    for number in (0..2000).step_by(2) {
        let (from, to) = (format!("many/{number}"), format!("many/renamed-{number}"));
        std::fs::rename(mounted.join(from), mounted.join(to)).unwrap();
    }
    let list = |path: &Path| -> BTreeMap<_, _> {
        std::fs::read_dir(path)
            .unwrap()
            .map(Result::unwrap)
            .map(|entry| (entry.file_name(), std::fs::read(entry.path()).unwrap()))
            .collect()
    };
    let seen = list(&mounted.join("many"));
    assert_eq!(seen.len(), 2000);
    assert_eq!(seen, list(&host.join("many")));
    std::fs::remove_dir_all(mounted.join("many")).unwrap();
    assert!(!host.join("many").exists());
}

fn links_and_attributes(mounted: &Path, host: &Path) {
    std::fs::write(mounted.join("file"), "x").unwrap();
    std::fs::hard_link(mounted.join("file"), mounted.join("hard")).unwrap();
    assert_eq!(std::fs::metadata(mounted.join("file")).unwrap().nlink(), 2);
    symlink("/etc/passwd", mounted.join("soft")).unwrap();
    assert_eq!(
        std::fs::read_link(host.join("soft")).unwrap(),
        Path::new("/etc/passwd")
    );
    let path = mounted.join("file");
    rustix::fs::setxattr(&path, c"trusted.overlay.opaque", b"y", XattrFlags::empty()).unwrap();
    rustix::fs::setxattr(&path, c"user.long", &[7; 2000], XattrFlags::CREATE).unwrap();
    let mut buffer = [0; 4000];
    assert_eq!(
        rustix::fs::getxattr(&path, c"user.long", &mut buffer),
        Ok(2000)
    );
    assert_eq!(
        rustix::fs::getxattr(host.join("file"), c"trusted.overlay.opaque", &mut buffer),
        Ok(1)
    );
    rustix::fs::removexattr(&path, c"user.long").unwrap();
    assert_eq!(
        rustix::fs::getxattr(&path, c"user.long", &mut buffer),
        Err(Errno::NODATA)
    );
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o640)).unwrap();
    std::os::unix::fs::chown(&path, Some(1), Some(2)).unwrap();
    std::fs::File::open(&path)
        .unwrap()
        .set_modified(std::time::UNIX_EPOCH)
        .unwrap();
    let there = std::fs::metadata(host.join("file")).unwrap();
    assert_eq!(
        (
            there.mode() & 0o7777,
            there.uid(),
            there.gid(),
            there.mtime()
        ),
        (0o640, 1, 2, 0)
    );
}

fn sparse_and_anonymous(mounted: &Path, host: &Path) {
    let sparse = std::fs::File::create(mounted.join("sparse")).unwrap();
    sparse.set_len(4 << 30).unwrap();
    sparse.write_all_at(b"end", 3 << 30).unwrap();
    assert!(std::fs::metadata(host.join("sparse")).unwrap().blocks() < 1024);
    let sparse = std::fs::File::open(mounted.join("sparse")).unwrap();
    assert_eq!(seek(&sparse, SeekFrom::Data(0)), Ok(3 << 30));
    assert_eq!(seek(&sparse, SeekFrom::Hole(0)), Ok(0));
    let anonymous = openat(CWD, mounted, OFlags::TMPFILE | OFlags::RDWR, Mode::RUSR).unwrap();
    rustix::io::write(&anonymous, b"anonymous").unwrap();
    let path = format!("/proc/self/fd/{}", anonymous.as_raw_fd());
    linkat(
        CWD,
        path,
        CWD,
        mounted.join("named"),
        AtFlags::SYMLINK_FOLLOW,
    )
    .unwrap();
    assert_eq!(std::fs::read(host.join("named")).unwrap(), b"anonymous");
}

fn random_reads_and_writes(mounted: &Path, host: &Path) {
    let mut state = 88_172_645_463_325_252u64;
    let mut random = move |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        usize::try_from(state % below as u64).unwrap()
    };
    let path = mounted.join("random");
    let mut file = std::fs::File::create_new(&path).unwrap();
    let mut model: Vec<u8> = Vec::new();
    for step in 0..1500 {
        let (offset, len) = (random(2 << 20), random(150_000));
        match random(5) {
            0 | 1 => {
                let data: Vec<u8> = (0..len).map(|byte| (byte ^ step) as u8).collect();
                file.write_all_at(&data, offset as u64).unwrap();
                model.resize(model.len().max(offset + len), 0);
                model[offset..offset + len].copy_from_slice(&data);
            }
            2 => {
                file.set_len(offset as u64).unwrap();
                model.resize(offset, 0);
            }
            3 => {
                file = std::fs::File::options()
                    .read(true)
                    .write(true)
                    .open(&path)
                    .unwrap()
            }
            _ => {
                let mut data = vec![0; len];
                let reader = std::fs::File::open(&path).unwrap();
                let got = reader.read_at(&mut data, offset as u64).unwrap();
                let want = model.get(offset..).unwrap_or_default();
                assert_eq!(data[..got], want[..want.len().min(len)], "step {step}");
            }
        }
    }
    assert_eq!(std::fs::read(host.join("random")).unwrap(), model);
}

fn changes_of_the_host(shared: &Path, host: &Path) {
    std::fs::write(host.join("config"), "one").unwrap();
    assert_eq!(std::fs::read(shared.join("config")).unwrap(), b"one");
    std::fs::write(host.join("config.new"), "other").unwrap();
    std::fs::rename(host.join("config.new"), host.join("config")).unwrap();
    assert_eq!(std::fs::read(shared.join("config")).unwrap(), b"other");
    assert!(!shared.join("later").exists());
    std::fs::write(host.join("later"), "").unwrap();
    assert!(shared.join("later").exists());
}

/// An overlay with its lower and upper layers on the mount, as in a guest.
fn overlay(rig: &Rig, host: &Path) {
    for folder in ["lower/sub", "upper", "work"] {
        std::fs::create_dir_all(host.join(folder)).unwrap();
    }
    for file in ["lower/a", "lower/b", "lower/sub/c"] {
        std::fs::write(host.join(file), file).unwrap();
    }
    let layers = rig.path("mnt/rw");
    let options =
        ["lower", "upper", "work"].map(|name| format!("{name}dir={}", layers.join(name).display()));
    let options = CString::new(options.join(",")).unwrap();
    std::fs::create_dir(rig.path("merged")).unwrap();
    let merged = rig.path("merged");
    mount(
        "overlay",
        &merged,
        "overlay",
        MountFlags::empty(),
        options.as_c_str(),
    )
    .unwrap();
    std::fs::remove_file(merged.join("a")).unwrap();
    std::fs::write(merged.join("b"), "changed").unwrap();
    std::fs::rename(merged.join("sub/c"), merged.join("c")).unwrap();
    std::fs::remove_dir_all(merged.join("sub")).unwrap();
    std::fs::create_dir(merged.join("sub")).unwrap();
    assert_eq!(std::fs::read_dir(merged.join("sub")).unwrap().count(), 0);
    let whiteout = std::fs::symlink_metadata(host.join("upper/a")).unwrap();
    assert!(whiteout.file_type().is_char_device() && whiteout.rdev() == 0);
    assert_eq!(std::fs::read(host.join("upper/b")).unwrap(), b"changed");
    assert_eq!(std::fs::read(host.join("lower/b")).unwrap(), b"lower/b");
    assert_eq!(std::fs::read(merged.join("c")).unwrap(), b"lower/sub/c");
    unmount(&merged, UnmountFlags::empty()).unwrap();
}
