//! The system calls of each kind of thread, with the reason for each. Any other kills the process (seccomp(2)).

use seccompiler::{BpfProgram, apply_filter};

use crate::jail::seccomp::program;
use crate::jail::seccomp::rules::{Arguments, Rule, any, with};

/// Whose calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Thread {
    /// Serves a guest's requests.
    Worker,
    /// The server's main thread: the control socket.
    Control,
    /// The other process.
    Steward,
}

/// With this value of an argument.
const fn only(call: libc::c_long, argument: u8, value: i32, why: &'static str) -> Rule {
    with(call, Arguments::Is(argument, value as u64), why)
}

/// What any Rust program does, also when it panics, logs or ends.
const EVERYBODY: &[Rule] = &[
    any(libc::SYS_write, "the log on stderr"),
    any(libc::SYS_close, "descriptors"),
    only(
        libc::SYS_fcntl,
        1,
        libc::F_GETFD,
        "a debug build asks before it closes",
    ),
    any(libc::SYS_mmap, "memory of the allocator; stacks of threads"),
    any(libc::SYS_munmap, "the same"),
    any(libc::SYS_mremap, "the same"),
    any(libc::SYS_mprotect, "the allocator's arenas"),
    any(libc::SYS_madvise, "the allocator gives memory back"),
    any(libc::SYS_brk, "the allocator"),
    any(libc::SYS_futex, "locks"),
    any(libc::SYS_getrandom, "seeds of hash tables"),
    any(
        libc::SYS_clock_gettime,
        "times in the log, where the vDSO has no clock",
    ),
    any(libc::SYS_restart_syscall, "a call goes on after SIGSTOP"),
    any(libc::SYS_rt_sigreturn, "the end of a signal handler"),
    any(libc::SYS_rt_sigprocmask, "abort(3), the end of a thread"),
    any(libc::SYS_rt_sigaction, "abort(3)"),
    any(
        libc::SYS_sched_getaffinity,
        "the allocator makes an arena for a thread",
    ),
    any(libc::SYS_gettid, "abort(3)"),
    any(libc::SYS_getpid, "abort(3)"),
    only(libc::SYS_tgkill, 2, libc::SIGABRT, "abort(3)"),
    any(libc::SYS_sigaltstack, "the end of a thread"),
    any(libc::SYS_exit, "the end of a thread"),
    any(libc::SYS_exit_group, "the end"),
    any(
        libc::SYS_recvmsg,
        "requests with descriptors, the steward's answers",
    ),
    any(libc::SYS_sendmsg, "the same the other way"),
];

/// Both kinds of the server's threads.
const SERVER: &[Rule] = &[
    any(
        libc::SYS_openat,
        "what is held is opened by /fd; a tree's name is made",
    ),
    any(libc::SYS_statx, "attributes"),
    any(libc::SYS_fstat, "attributes; libc asks of a descriptor so"),
    any(libc::SYS_newfstatat, "the same"),
    any(libc::SYS_mkdirat, "MKDIR; a tree's name is made"),
    any(
        libc::SYS_unlinkat,
        "UNLINK, RMDIR; a tree's name is removed",
    ),
    any(libc::SYS_sendto, "answers"),
];

/// The control socket.
const CONTROL: &[Rule] = &[
    any(libc::SYS_poll, "waits for requests and the workers' end"),
    any(libc::SYS_ppoll, "the same"),
    any(libc::SYS_accept4, "the shim connects"),
];

/// FUSE requests.
const WORKER: &[Rule] = &[
    any(libc::SYS_recvfrom, "requests"),
    any(libc::SYS_openat2, "LOOKUP, below a folder and over no link"),
    any(libc::SYS_pread64, "READ"),
    any(libc::SYS_pwritev2, "WRITE"),
    any(libc::SYS_fsync, "FSYNC"),
    any(libc::SYS_fdatasync, "FSYNC"),
    any(libc::SYS_syncfs, "SYNCFS"),
    any(libc::SYS_fallocate, "FALLOCATE"),
    any(
        libc::SYS_lseek,
        "LSEEK; a folder is read from where the guest wants",
    ),
    any(libc::SYS_copy_file_range, "COPY_FILE_RANGE"),
    any(libc::SYS_getdents64, "READDIR"),
    any(libc::SYS_ftruncate, "SETATTR: size"),
    any(libc::SYS_fchownat, "SETATTR: owner"),
    any(libc::SYS_fchmodat, "SETATTR: mode"),
    any(libc::SYS_utimensat, "SETATTR: times"),
    any(libc::SYS_readlinkat, "READLINK"),
    any(libc::SYS_symlinkat, "SYMLINK"),
    any(libc::SYS_linkat, "LINK"),
    any(libc::SYS_mknodat, "MKNOD; devices are refused before"),
    any(libc::SYS_renameat2, "RENAME"),
    any(libc::SYS_fstatfs, "STATFS"),
    any(libc::SYS_setxattr, "SETXATTR, by /fd"),
    any(libc::SYS_getxattr, "GETXATTR, by /fd"),
    any(libc::SYS_removexattr, "REMOVEXATTR, by /fd"),
    any(libc::SYS_umask, "a new node's mode is the caller's"),
    any(libc::SYS_setfsuid, "a new node is the caller's"),
    any(libc::SYS_setfsgid, "the same"),
    any(libc::SYS_capget, "the same"),
    any(libc::SYS_capset, "the same; never more than the thread may"),
    any(libc::SYS_clock_nanosleep, "an answer waits for memory"),
];

/// The kernel's, which rustix sets on every open; libc's is 0 here.
const O_LARGEFILE: i32 = 0o100_000;

/// The steward. `openat` is for a mount's root alone: it opens nothing for writing and makes nothing.
const STEWARD: &[Rule] = &[
    any(libc::SYS_poll, "waits for the server's threads"),
    any(libc::SYS_ppoll, "the same"),
    any(libc::SYS_setxattr, "trusted.* and security.*, by /fd"),
    any(libc::SYS_getxattr, "trusted.*, by /fd"),
    any(libc::SYS_listxattr, "with trusted.*, by /fd"),
    any(libc::SYS_removexattr, "trusted.* and security.*, by /fd"),
    any(libc::SYS_mount_setattr, "confines a tree's mount"),
    only(
        libc::SYS_openat,
        2,
        libc::O_RDONLY | libc::O_DIRECTORY | libc::O_CLOEXEC | O_LARGEFILE,
        "a mount's root, to open handles of the mount",
    ),
    any(libc::SYS_name_to_handle_at, "a file is kept by its handle"),
    only(
        libc::SYS_open_by_handle_at,
        2,
        libc::O_PATH | libc::O_NOFOLLOW | libc::O_CLOEXEC,
        "a kept file comes back",
    ),
    any(libc::SYS_wait4, "the server's end"),
    any(libc::SYS_waitid, "the same"),
];

impl Thread {
    /// All its rules.
    fn rules(self) -> impl Iterator<Item = &'static Rule> {
        let own: [&[Rule]; 2] = match self {
            Self::Worker => [SERVER, WORKER],
            Self::Control => [SERVER, CONTROL],
            Self::Steward => [STEWARD, &[]],
        };
        EVERYBODY.iter().chain(own.into_iter().flatten())
    }

    fn program(self) -> Result<BpfProgram, String> {
        program(self.rules())
    }

    /// Confines the calling thread, and those it starts later, for good.
    pub fn confine(self) -> Result<(), std::io::Error> {
        let program = self.program().map_err(std::io::Error::other)?;
        apply_filter(&program).map_err(std::io::Error::other)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fs::sys;

    /// What ends a copy of this process that is confined and does `act`.
    fn end_of(thread: Thread, act: fn()) -> libc::c_int {
        let program = thread.program().unwrap();
        match sys::fork().unwrap() {
            0 => {
                apply_filter(&program).unwrap();
                act();
                // SAFETY: ends this copy without the test harness's own ends.
                unsafe { libc::_exit(0) }
            }
            pid => {
                let mut status = 0;
                // SAFETY: `status` is live for the call.
                assert_eq!(unsafe { libc::waitpid(pid, &raw mut status, 0) }, pid);
                status
            }
        }
    }

    /// As docs/threat-model.md tells it.
    #[test]
    fn each_thread_has_as_many_distinct_system_calls_as_is_written() {
        let count = |thread: Thread| {
            let calls: std::collections::BTreeSet<i64> =
                thread.rules().map(|rule| rule.call).collect();
            calls.len()
        };
        let told = [Thread::Worker, Thread::Control, Thread::Steward].map(count);
        assert_eq!(told, [62, 35, 37]);
    }

    #[test]
    fn what_is_not_in_the_table_kills() {
        let acts: [fn(); 5] = [
            || drop(rustix::pipe::pipe()),
            || drop(sys::unshare(rustix::thread::UnshareFlags::NEWNS)),
            || _ = rustix::fs::access("/", rustix::fs::Access::EXISTS),
            || _ = rustix::process::chdir("/"),
            || _ = rustix::process::test_kill_process(rustix::process::getpid()),
        ];
        for thread in [Thread::Worker, Thread::Control, Thread::Steward] {
            for (number, act) in acts.into_iter().enumerate() {
                let status = end_of(thread, act);
                assert!(
                    libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGSYS,
                    "{thread:?}, {number}: {status:#x}"
                );
            }
        }
    }

    #[test]
    fn an_abort_is_an_abort_and_a_log_line_goes_out() {
        for thread in [Thread::Worker, Thread::Control, Thread::Steward] {
            let status = end_of(thread, || {
                let _ = rustix::io::write(std::io::stderr(), b"a line before an abort\n");
                std::process::abort();
            });
            assert!(libc::WIFSIGNALED(status), "{thread:?}: {status:#x}");
            assert_eq!(libc::WTERMSIG(status), libc::SIGABRT, "{thread:?}");
            assert_eq!(end_of(thread, || {}), 0, "{thread:?}");
        }
    }
}
