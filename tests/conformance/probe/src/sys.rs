//! The system calls of the probe.

use std::{ffi::CString, io::Write as _, mem::MaybeUninit};

use serde_json::Value;

/// `ok`, or the errno's name.
pub type Answer = String;

/// Prints one line of JSON.
pub fn say(value: &Value) {
    let mut out = std::io::stdout();
    let _ = writeln!(out, "{value}").and_then(|()| out.flush());
}

/// The errno of the last call.
pub fn errno() -> i32 {
    std::io::Error::last_os_error().raw_os_error().unwrap_or(0)
}

/// Name of an errno.
pub fn name(number: i32) -> Answer {
    let known = [
        (libc::EPERM, "EPERM"),
        (libc::ENOENT, "ENOENT"),
        (libc::ESRCH, "ESRCH"),
        (libc::EINTR, "EINTR"),
        (libc::EIO, "EIO"),
        (libc::ENXIO, "ENXIO"),
        (libc::E2BIG, "E2BIG"),
        (libc::EBADF, "EBADF"),
        (libc::EAGAIN, "EAGAIN"),
        (libc::ENOMEM, "ENOMEM"),
        (libc::EACCES, "EACCES"),
        (libc::EFAULT, "EFAULT"),
        (libc::ENOTBLK, "ENOTBLK"),
        (libc::EBUSY, "EBUSY"),
        (libc::EEXIST, "EEXIST"),
        (libc::ENODEV, "ENODEV"),
        (libc::ENOTDIR, "ENOTDIR"),
        (libc::EISDIR, "EISDIR"),
        (libc::EINVAL, "EINVAL"),
        (libc::EMFILE, "EMFILE"),
        (libc::ENOTTY, "ENOTTY"),
        (libc::EFBIG, "EFBIG"),
        (libc::ENOSPC, "ENOSPC"),
        (libc::EROFS, "EROFS"),
        (libc::ENOSYS, "ENOSYS"),
        (libc::ELOOP, "ELOOP"),
        (libc::ENAMETOOLONG, "ENAMETOOLONG"),
        (libc::EOPNOTSUPP, "EOPNOTSUPP"),
        (libc::EAFNOSUPPORT, "EAFNOSUPPORT"),
        (libc::EPROTONOSUPPORT, "EPROTONOSUPPORT"),
        (libc::ESOCKTNOSUPPORT, "ESOCKTNOSUPPORT"),
        (libc::EDQUOT, "EDQUOT"),
    ];
    match known.iter().find(|(n, _)| *n == number) {
        Some((_, text)) => (*text).into(),
        None => format!("errno {number}"),
    }
}

/// How a call ended.
pub fn answer(result: i64) -> Answer {
    if result < 0 {
        name(errno())
    } else {
        "ok".into()
    }
}

/// How an operation of the standard library ended.
pub fn outcome<T>(result: &std::io::Result<T>) -> Answer {
    match result {
        Ok(_) => "ok".into(),
        Err(error) => name(error.raw_os_error().unwrap_or(0)),
    }
}

/// A raw system call.
pub fn call(number: i64, args: [usize; 5]) -> i64 {
    let [a, b, c, d, e] = args;
    // SAFETY: callers pass null, small numbers, or addresses of values that outlive the call.
    unsafe { libc::syscall(number, a, b, c, d, e) }
}

/// Forks; 0 in the child.
pub fn fork() -> i32 {
    // SAFETY: this process has one thread.
    unsafe { libc::fork() }
}

/// Ends at once.
pub fn exit(code: i32) -> ! {
    // SAFETY: takes no memory.
    unsafe { libc::_exit(code) }
}

/// Sends a signal.
pub fn kill(pid: i32, signal: i32) {
    // SAFETY: takes no memory.
    unsafe { libc::kill(pid, signal) };
}

/// Waits for a child: exit code, or 128 + signal.
pub fn wait(pid: i32) -> Option<i32> {
    let mut status = 0;
    // SAFETY: `status` is a valid place.
    let done = unsafe { libc::waitpid(pid, &raw mut status, 0) };
    (done > 0).then(|| {
        if libc::WIFSIGNALED(status) {
            128_i32.wrapping_add(libc::WTERMSIG(status))
        } else {
            libc::WEXITSTATUS(status)
        }
    })
}

/// Ignores a signal.
pub fn ignore(signal: i32) {
    // SAFETY: SIG_IGN needs no handler.
    unsafe { libc::signal(signal, libc::SIG_IGN) };
}

/// Waits for one of the signals, which pid 1 would not get otherwise.
pub fn wait_for(signals: &[i32]) -> i32 {
    let mut set = MaybeUninit::uninit();
    let mut got = 0;
    // SAFETY: sigemptyset makes the set valid before it is used; `got` is a valid place.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        for signal in signals {
            libc::sigaddset(set.as_mut_ptr(), *signal);
        }
        libc::sigprocmask(libc::SIG_BLOCK, set.as_ptr(), std::ptr::null_mut());
        libc::sigwait(set.as_ptr(), &raw mut got);
    }
    got
}

/// Soft and hard value of a resource limit.
pub fn rlimit(resource: u32) -> (u64, u64) {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: `limit` is a valid place.
    unsafe { libc::getrlimit(resource, &raw mut limit) };
    (limit.rlim_cur, limit.rlim_max)
}

/// `prctl` with numbers only.
pub fn prctl(option: i32, argument: usize) -> i32 {
    // SAFETY: the options used here take no memory.
    unsafe { libc::prctl(option, argument, 0, 0, 0) }
}

/// The personality.
pub fn personality() -> i32 {
    // SAFETY: 0xffffffff only asks.
    unsafe { libc::personality(0xffff_ffff) }
}

/// Rows and columns of a terminal.
pub fn window(fd: i32) -> Option<(u16, u16)> {
    let mut size = MaybeUninit::<libc::winsize>::zeroed();
    // SAFETY: the kernel writes a winsize to the place; zeroes are one.
    let (result, size) = unsafe {
        let result = libc::ioctl(fd, libc::TIOCGWINSZ, size.as_mut_ptr());
        (result, size.assume_init())
    };
    (result == 0).then_some((size.ws_row, size.ws_col))
}

/// Node, domain and machine of `uname`.
pub fn uname() -> [String; 3] {
    let mut names = MaybeUninit::<libc::utsname>::zeroed();
    // SAFETY: the kernel fills the place; zeroes are valid strings.
    let names = unsafe {
        libc::uname(names.as_mut_ptr());
        names.assume_init()
    };
    [&names.nodename, &names.domainname, &names.machine].map(|field| {
        let bytes = field.iter().take_while(|&&c| c != 0);
        bytes.map(|&c| char::from(c.cast_unsigned())).collect()
    })
}

/// Makes a node.
pub fn mknod(path: &str, mode: u32, major: u32, minor: u32) -> Answer {
    let Ok(path) = CString::new(path) else {
        return name(libc::EINVAL);
    };
    // SAFETY: the path is a C string that outlives the call.
    let result = unsafe { libc::mknod(path.as_ptr(), mode, libc::makedev(major, minor)) };
    answer(result.into())
}

/// Opens and closes.
pub fn open(path: &str, flags: i32) -> Answer {
    let Ok(path) = CString::new(path) else {
        return name(libc::EINVAL);
    };
    // SAFETY: the path is a C string that outlives the call.
    let fd = unsafe { libc::open(path.as_ptr(), flags | libc::O_CLOEXEC) };
    let answer = answer(fd.into());
    if fd >= 0 {
        // SAFETY: the descriptor is ours.
        unsafe { libc::close(fd) };
    }
    answer
}

/// Seconds of a clock.
pub fn clock(id: i32) -> f64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `time` is a valid place.
    unsafe { libc::clock_gettime(id, &raw mut time) };
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

/// Flags of a descriptor (`F_GETFL`).
pub fn fd_flags(fd: i32) -> i32 {
    // SAFETY: only asks.
    unsafe { libc::fcntl(fd, libc::F_GETFL) }
}
