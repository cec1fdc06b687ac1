//! A loop device over memory, and transfers to and from it past the page cache.

use std::{
    fs::{File, OpenOptions},
    io,
    os::{
        fd::{AsRawFd, RawFd},
        unix::fs::{FileExt, OpenOptionsExt},
    },
    time::Instant,
};

use serde_json::{Value, json};

use crate::sys;

/// `LOOP_CTL_GET_FREE` and `LOOP_CONFIGURE` of `<linux/loop.h>`.
const GET_FREE: usize = 0x4c82;
const CONFIGURE: usize = 0x4c0a;
/// `LO_FLAGS_AUTOCLEAR`: the device goes with its last opener.
const AUTOCLEAR: u32 = 4;
/// `struct loop_config`, and where its `fd` and `info.lo_flags` are.
const CONFIG_SIZE: usize = 304;
const FD: usize = 0;
const FLAGS: usize = 60;
/// What direct transfers are aligned to.
const ALIGNMENT: usize = 4096;

/// Makes a loop device of `mib` MiB, prints its number, and keeps it until it is told to end.
pub fn hold(mib: u64) -> i32 {
    match make(mib) {
        Ok((minor, _device)) => {
            sys::say(&json!({ "minor": minor }));
            sys::wait_for(&[libc::SIGTERM, libc::SIGINT]);
            0
        }
        Err(error) => {
            sys::say(&json!({ "error": error.to_string() }));
            1
        }
    }
}

fn make(mib: u64) -> io::Result<(u32, File)> {
    let control = node("/dev/loop-control", libc::S_IFCHR, 10, 237, 0)?;
    let minor = sys::call(
        libc::SYS_ioctl,
        [descriptor(control.as_raw_fd()), GET_FREE, 0, 0, 0],
    );
    let minor = u32::try_from(minor).map_err(|_| io::Error::last_os_error())?;
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .open("/dev/shm/disk")?;
    file.set_len(mib << 20)?;
    let device = node("/dev/disk", libc::S_IFBLK, 7, minor, 0)?;
    let mut config = [0_u8; CONFIG_SIZE];
    for (place, value) in [(FD, file.as_raw_fd().cast_unsigned()), (FLAGS, AUTOCLEAR)] {
        config[place..place + 4].copy_from_slice(&value.to_ne_bytes());
    }
    let device_fd = descriptor(device.as_raw_fd());
    let configured = sys::call(
        libc::SYS_ioctl,
        [device_fd, CONFIGURE, config.as_ptr().addr(), 0, 0],
    );
    match configured {
        0 => Ok((minor, device)),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Seconds that `count` blocks of `size` bytes take, to or from a loop device.
pub fn transfer(direction: &str, size: u64, count: u64, minor: u64) -> Value {
    match time(direction == "write", size, count, minor) {
        Ok(seconds) => json!({ "seconds": seconds }),
        Err(error) => json!({ "error": error.to_string() }),
    }
}

fn time(writes: bool, size: u64, count: u64, minor: u64) -> io::Result<f64> {
    let minor = u32::try_from(minor).map_err(io::Error::other)?;
    let device = node("/dev/disk", libc::S_IFBLK, 7, minor, libc::O_DIRECT)?;
    let length = usize::try_from(size).map_err(io::Error::other)?;
    let mut room = vec![0; length + ALIGNMENT];
    let start = room.as_ptr().align_offset(ALIGNMENT);
    let block = &mut room[start..start + length];
    let begin = Instant::now();
    for place in (0..count).map(|n| n * size) {
        if writes {
            device.write_all_at(block, place)?;
        } else {
            device.read_exact_at(block, place)?;
        }
    }
    Ok(begin.elapsed().as_secs_f64())
}

/// Makes a node and opens it.
fn node(path: &str, kind: u32, major: u32, minor: u32, flags: i32) -> io::Result<File> {
    let made = sys::mknod(path, kind | 0o600, major, minor);
    if made != "ok" {
        return Err(io::Error::other(format!("make {path}: {made}")));
    }
    let opened = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(flags)
        .open(path);
    opened.map_err(|error| io::Error::new(error.kind(), format!("open {path}: {error}")))
}

fn descriptor(fd: RawFd) -> usize {
    usize::try_from(fd).unwrap_or(usize::MAX)
}
