//! A child in its place: the only code between the copy of the shim and the program.
//!
//! With cgroup v2 the child is made inside its cgroup (clone3(2), CLONE_INTO_CGROUP): moving a process there later makes it wait for all
//! CPUs, some 8 ms of a pod's start.

use std::{
    env,
    ffi::{CString, OsStr, c_char, c_int},
    io::{self, Read},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::ffi::{OsStrExt, OsStringExt},
    },
    path::Path,
    ptr,
};

use rustix::{
    pipe::{PipeFlags, pipe_with},
    process::{WaitId, WaitIdOptions, waitid},
    thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space},
};

use super::cgroup::Membership;

/// What is to be started, and where.
pub struct Launch<'a> {
    /// The program's path.
    pub program: &'a Path,
    /// Its arguments without its name.
    pub args: &'a [String],
    /// Descriptors that it inherits under the same numbers.
    pub keep: &'a [OwnedFd],
    /// Its standard input.
    pub stdin: BorrowedFd<'a>,
    /// Its standard output and error.
    pub output: BorrowedFd<'a>,
    /// Its network namespace; without one a new one.
    pub net: Option<BorrowedFd<'a>>,
    /// In a pid namespace of its own, as its first process.
    pub own_pids: bool,
    /// Its cgroups.
    pub cgroups: &'a Membership,
}

/// What the child needs, all of it made before: it allocates nothing, as another thread may have held the allocator's lock.
struct Ready<'a> {
    launch: &'a Launch<'a>,
    argv: Vec<*const c_char>,
    envp: Vec<*const c_char>,
}

/// containerd's environment can hold what a guest that broke its VMM must not find: a proxy's password.
fn is_passed_on(name: &OsStr) -> bool {
    name == "PATH" || name.as_bytes().starts_with(b"BULKHEAD_")
}

/// Starts the program in a session of its own, with the part of our environment that is meant for it: its pidfd and pid.
pub fn launch(launch: &Launch<'_>) -> io::Result<(OwnedFd, i32)> {
    let text = |text: &OsStr| CString::new(text.as_bytes()).map_err(io::Error::from);
    let mut argv = vec![text(launch.program.as_os_str())?];
    for argument in launch.args {
        argv.push(text(OsStr::new(argument))?);
    }
    let variable = |(mut name, value): (std::ffi::OsString, std::ffi::OsString)| {
        name.push("=");
        name.push(value);
        CString::new(name.into_vec()).map_err(io::Error::from)
    };
    let envp = env::vars_os().filter(|(name, _)| is_passed_on(name));
    let envp: Vec<CString> = envp.map(variable).collect::<Result<_, _>>()?;
    let pointers = |list: &[CString]| {
        let list = list.iter().map(|text| text.as_ptr());
        list.chain([ptr::null()]).collect()
    };
    let ready = Ready {
        launch,
        argv: pointers(&argv),
        envp: pointers(&envp),
    };
    let (told, tell) = pipe_with(PipeFlags::CLOEXEC)?;
    let mut pidfd: c_int = -1;
    // SAFETY: a struct of numbers, for which zero is "nothing".
    let mut how: libc::clone_args = unsafe { std::mem::zeroed() };
    how.flags = libc::CLONE_PIDFD as u64;
    how.pidfd = (&raw mut pidfd) as u64;
    how.exit_signal = libc::SIGCHLD as u64;
    if launch.own_pids {
        how.flags |= libc::CLONE_NEWPID as u64;
    }
    if let Some(cgroup) = &launch.cgroups.unified {
        how.flags |= CLONE_INTO_CGROUP;
        how.cgroup = u64::try_from(cgroup.as_raw_fd()).map_err(io::Error::other)?;
    }
    // SAFETY: `how` is live and its size is passed; without CLONE_VM the child has its own memory. It makes system calls only, on
    // what was made before, and ends by exec or _exit.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw mut how, size_of_val(&how)) };
    match pid {
        0 => {
            let error = ready.run();
            let code = error.raw_os_error().unwrap_or(libc::EIO).to_ne_bytes();
            let _ = rustix::io::write(&tell, &code);
            // SAFETY: ends the child without what the shim does at its end.
            unsafe { libc::_exit(127) }
        }
        pid if pid < 0 => return Err(io::Error::last_os_error()),
        _ => {}
    }
    let pid = i32::try_from(pid).map_err(io::Error::other)?;
    // SAFETY: the kernel has made it for us.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    drop(tell);
    let mut code = [0; size_of::<i32>()];
    // The end without a word is the exec's.
    match std::fs::File::from(told).read_exact(&mut code) {
        Err(_) => Ok((pidfd, pid)),
        Ok(()) => {
            let _ = waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED);
            Err(io::Error::from_raw_os_error(i32::from_ne_bytes(code)))
        }
    }
}

/// Linux 5.7, `linux/sched.h`; libc's constant is an int, which cannot hold it.
const CLONE_INTO_CGROUP: u64 = 1 << 33;

impl Ready<'_> {
    /// Becomes the program; comes back only with an error.
    fn run(&self) -> io::Error {
        match self.prepare() {
            Err(error) => error,
            Ok(()) => {
                let [program, ..] = self.argv.as_slice() else {
                    return io::ErrorKind::InvalidInput.into();
                };
                // SAFETY: both lists end with a null pointer, and their strings live in the caller.
                unsafe { libc::execve(*program, self.argv.as_ptr(), self.envp.as_ptr()) };
                io::Error::last_os_error()
            }
        }
    }

    fn prepare(&self) -> io::Result<()> {
        let launch = self.launch;
        // SAFETY: an empty set on the stack is made and installed; SIGPIPE, which the shim ignores, needs no handler.
        unsafe {
            let mut none: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&raw mut none);
            libc::sigprocmask(libc::SIG_SETMASK, &raw const none, ptr::null_mut());
            libc::signal(libc::SIGPIPE, libc::SIG_DFL);
        }
        rustix::process::setsid()?;
        for file in &launch.cgroups.procs {
            // 0 stands for the process that writes (cgroups(7)).
            rustix::io::write(file, b"0")?;
        }
        match launch.net {
            Some(net) => move_into_link_name_space(net, Some(LinkNameSpaceType::Network))?,
            // SAFETY: CLONE_FILES is not passed.
            None => unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET)? },
        }
        rustix::process::chdir("/")?;
        // SAFETY: the shim has 0, 1 and 2 open, so none of these numbers is one of them; the child owns no descriptor by a value.
        unsafe {
            for (from, to) in [(launch.stdin, 0), (launch.output, 1), (launch.output, 2)] {
                if libc::dup2(from.as_raw_fd(), to) < 0 {
                    return Err(io::Error::last_os_error());
                }
            }
            let flags = libc::CLOSE_RANGE_CLOEXEC as c_int;
            if libc::close_range(3, libc::c_uint::MAX, flags) != 0 {
                return Err(io::Error::last_os_error());
            }
        }
        for fd in launch.keep {
            rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::empty())?;
        }
        Ok(())
    }
}
