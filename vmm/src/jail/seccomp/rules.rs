//! The rules: a kind of thread has those of all threads and its own, each with its reason.

/// What a thread is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Waits for the machine's end and records it.
    Main,
    /// Starts the other threads, which is why its filter is the process's.
    Starter,
    /// Answers the shim.
    Control,
    /// Runs a vCPU, and the devices' registers.
    Vcpu,
    /// Serves queues of a device: rng, balloon, block, net, vsock, fs.
    Device,
    /// Talks vhost-user to the emulator, and sets devices up for it.
    VhostUser,
    /// Reads the emulator's output, waits for its end.
    Emulator,
    /// Is a container's pid on the host, and only waits.
    Pid,
}

impl Kind {
    /// All kinds.
    pub const ALL: [Self; 8] = [
        Self::Main,
        Self::Starter,
        Self::Control,
        Self::Vcpu,
        Self::Device,
        Self::VhostUser,
        Self::Emulator,
        Self::Pid,
    ];

    /// What it may.
    pub fn rules(self) -> impl Iterator<Item = &'static Rule> {
        let own: Vec<&'static [Rule]> = match self {
            Self::Main => vec![EMULATOR_SIGNALS],
            Self::Starter => vec![THREADS],
            Self::Control => vec![CONTROL, EVENTS, DEVICE_SETUP, KVM_GROWTH, EMULATOR_SIGNALS],
            Self::Vcpu => vec![KVM_RUN, EVENTS, DEVICE_SETUP],
            Self::Device => vec![EVENTS, DEVICE, DEVICE_SETUP],
            Self::VhostUser => vec![EVENTS, DEVICE, DEVICE_SETUP, VHOST_USER],
            Self::Emulator => vec![EMULATOR],
            Self::Pid => vec![],
        };
        ALWAYS.iter().chain(own.into_iter().flatten())
    }
}

/// A system call that is allowed.
pub struct Rule {
    /// Its number.
    pub call: i64,
    /// With what.
    pub arguments: Arguments,
    /// What it is for.
    pub reason: &'static str,
}

/// What the arguments of a call may be.
pub enum Arguments {
    /// Anything.
    Any,
    /// The argument with this index is this (its lower 32 bits: the high half of an int's register is nobody's).
    Is(u8, u64),
    /// The same, one of these.
    OneOf(u8, &'static [u64]),
    /// mmap and mprotect without PROT_EXEC: nothing that was written is ever run.
    NotExecutable,
    /// clone of a thread, not of a process.
    Thread,
}

/// With any arguments.
pub const fn any(call: i64, reason: &'static str) -> Rule {
    Rule {
        call,
        arguments: Arguments::Any,
        reason,
    }
}

/// With these arguments.
pub const fn with(call: i64, arguments: Arguments, reason: &'static str) -> Rule {
    Rule {
        call,
        arguments,
        reason,
    }
}

/// What every thread of a Rust program does, with an end in any way.
static ALWAYS: &[Rule] = &[
    any(libc::SYS_futex, "locks, channels"),
    any(libc::SYS_sched_yield, "contended locks"),
    any(
        libc::SYS_clock_gettime,
        "time, where the vDSO cannot tell it",
    ),
    any(libc::SYS_clock_nanosleep, "waiting a while"),
    any(libc::SYS_nanosleep, "waiting a while"),
    any(libc::SYS_getrandom, "keys of hash maps"),
    with(libc::SYS_mmap, Arguments::NotExecutable, "memory"),
    with(
        libc::SYS_mprotect,
        Arguments::NotExecutable,
        "memory of the allocator",
    ),
    any(libc::SYS_munmap, "memory"),
    any(libc::SYS_mremap, "memory of the allocator"),
    any(
        libc::SYS_madvise,
        "memory of the allocator, stacks; what the guest reports as free",
    ),
    any(libc::SYS_brk, "memory of the allocator"),
    any(libc::SYS_read, "descriptors that it has"),
    any(libc::SYS_write, "descriptors that it has, the log"),
    any(libc::SYS_writev, "the log"),
    any(libc::SYS_close, "descriptors"),
    with(
        libc::SYS_fcntl,
        Arguments::OneOf(1, &[1]),
        "F_GETFD: a debug build looks before it closes",
    ),
    any(libc::SYS_pwrite64, "exit.json, by whichever thread panics"),
    any(libc::SYS_ftruncate, "exit.json"),
    any(
        libc::SYS_rt_sigprocmask,
        "signals at the end of a thread, aborts",
    ),
    any(libc::SYS_rt_sigaction, "aborts"),
    any(libc::SYS_rt_sigreturn, "the end of a signal's handler"),
    any(libc::SYS_sigaltstack, "the end of a thread"),
    any(
        libc::SYS_restart_syscall,
        "a wait that a stop has interrupted",
    ),
    any(libc::SYS_gettid, "aborts"),
    any(libc::SYS_getpid, "aborts"),
    any(libc::SYS_tgkill, "aborts; kicks of vCPUs"),
    any(libc::SYS_exit, "the end of a thread"),
    any(libc::SYS_exit_group, "the end of the process"),
    with(
        libc::SYS_prctl,
        Arguments::OneOf(0, PRCTL),
        "the name of a new thread, and its filter",
    ),
    any(
        libc::SYS_seccomp,
        "a thread's own filter, on top of this one",
    ),
];

/// Making threads.
static THREADS: &[Rule] = &[
    with(libc::SYS_clone, Arguments::Thread, "a thread"),
    any(
        libc::SYS_clone3,
        "answered with ENOSYS by a filter of its own",
    ),
    any(libc::SYS_set_robust_list, "a new thread"),
    any(libc::SYS_rseq, "a new thread"),
    any(libc::SYS_sched_getaffinity, "the stack of a new thread"),
    any(libc::SYS_prlimit64, "the stack of a new thread"),
];

/// Waiting for events.
static EVENTS: &[Rule] = &[
    any(libc::SYS_epoll_wait, "kicks and sockets"),
    any(libc::SYS_epoll_pwait, "kicks and sockets"),
    any(libc::SYS_epoll_ctl, "what is waited for"),
    any(libc::SYS_poll, "sockets"),
    any(libc::SYS_ppoll, "sockets"),
];

/// Setting up a device when its driver asks for it, and taking it down.
static DEVICE_SETUP: &[Rule] = &[
    any(libc::SYS_eventfd2, "a device's events"),
    any(libc::SYS_timerfd_create, "rates of a network"),
    any(libc::SYS_timerfd_settime, "rates of a network"),
    any(libc::SYS_epoll_create1, "a device's events"),
    any(libc::SYS_epoll_ctl, "a device's events"),
    with(
        libc::SYS_fcntl,
        Arguments::OneOf(1, DESCRIPTOR_FLAGS),
        "copies and modes of descriptors",
    ),
    with(
        libc::SYS_ioctl,
        Arguments::OneOf(1, NET_REQUESTS),
        "taps and vhost-net",
    ),
    any(libc::SYS_dup, "copies of descriptors"),
];

/// Serving queues.
static DEVICE: &[Rule] = &[
    any(libc::SYS_readv, "frames into the guest's buffers"),
    any(libc::SYS_preadv, "a disk into the guest's buffers"),
    any(libc::SYS_pread64, "a disk"),
    any(libc::SYS_pwritev, "a disk"),
    any(libc::SYS_fdatasync, "a disk"),
    any(libc::SYS_fsync, "a disk"),
    any(libc::SYS_fallocate, "a disk"),
    any(libc::SYS_lseek, "a disk"),
    any(libc::SYS_fstat, "a disk's size"),
    any(libc::SYS_statx, "a disk's size"),
    any(libc::SYS_accept4, "clients of vsock"),
    with(
        libc::SYS_socketpair,
        Arguments::OneOf(0, &[1]),
        "connections of the guest to the shim (AF_UNIX)",
    ),
    any(libc::SYS_sendmsg, "FUSE requests; connections to the shim"),
    any(libc::SYS_recvmsg, "FUSE replies"),
    any(libc::SYS_sendto, "vsock"),
    any(libc::SYS_recvfrom, "vsock"),
    any(libc::SYS_shutdown, "half-closed vsock connections"),
    any(libc::SYS_getsockopt, "errors of sockets"),
];

/// The vCPU loop.
static KVM_RUN: &[Rule] = &[with(
    libc::SYS_ioctl,
    Arguments::OneOf(1, VCPU_REQUESTS),
    "running the guest",
)];

/// A machine that grows.
static KVM_GROWTH: &[Rule] = &[with(
    libc::SYS_ioctl,
    Arguments::OneOf(1, GROWTH_REQUESTS),
    "CPUs and memory that come later",
)];

/// The shim's requests.
static CONTROL: &[Rule] = &[
    any(libc::SYS_accept4, "the shim's connections"),
    any(libc::SYS_recvmsg, "requests with descriptors"),
    any(libc::SYS_sendto, "answers"),
    any(libc::SYS_setsockopt, "how long an answer may wait"),
    any(libc::SYS_getsockopt, "kinds of descriptors that came"),
    any(libc::SYS_fstat, "kinds of descriptors that came"),
    any(libc::SYS_statx, "kinds of descriptors that came"),
    any(libc::SYS_lseek, "the size of a disk that came"),
];

/// vhost-user, engine `emulated`.
static VHOST_USER: &[Rule] = &[
    any(libc::SYS_accept4, "the emulator's connection"),
    any(libc::SYS_setsockopt, "its socket"),
    any(libc::SYS_fstat, "the size of the emulator's memory"),
];

/// Stopping, continuing and ending the emulator.
static EMULATOR_SIGNALS: &[Rule] = &[any(
    libc::SYS_pidfd_send_signal,
    "the emulator, by its pidfd",
)];

/// The emulator's output and end.
static EMULATOR: &[Rule] = &[
    any(libc::SYS_wait4, "its end"),
    any(libc::SYS_waitid, "its end"),
    any(libc::SYS_pidfd_send_signal, "its end"),
    any(libc::SYS_poll, "its output"),
];

/// PR_SET_NAME, PR_SET_NO_NEW_PRIVS.
const PRCTL: &[u64] = &[15, 38];

/// fcntl(2): F_DUPFD_CLOEXEC, F_GETFD, F_SETFD, F_GETFL, F_SETFL.
const DESCRIPTOR_FLAGS: &[u64] = &[1030, 1, 2, 3, 4];

/// FIONBIO; TUNSETOFFLOAD, TUNSETVNETHDRSZ, TUNGETIFF, TUNGETFEATURES, TUNSETQUEUE; BLKGETSIZE64; vhost's (linux/vhost.h): owner, features,
/// memory, rings, backend.
const NET_REQUESTS: &[u64] = &[
    0x5421,
    0x4004_54d0,
    0x4004_54d8,
    0x8004_54d2,
    0x8004_54cf,
    0x4004_54d9,
    0x8008_1272,
    0x8008_af00,
    0x4008_af00,
    0xaf01,
    0xaf02,
    0x4008_af03,
    0x4008_af10,
    0x4028_af11,
    0x4008_af12,
    0xc008_af12,
    0x4008_af20,
    0x4008_af21,
    0x4008_af22,
    0x4008_af30,
    0x8008_af26,
    0x4008_af25,
];

/// KVM_RUN, KVM_KVMCLOCK_CTRL, KVM_GET_REGS.
const VCPU_REQUESTS: &[u64] = &[0xae80, 0xaead, 0x8090_ae81];

/// KVM_CREATE_VCPU, KVM_SET_USER_MEMORY_REGION, KVM_SET_CPUID2, KVM_SET_MSRS, KVM_SET_REGS, KVM_GET_SREGS, KVM_SET_SREGS,
/// KVM_SET_FPU, KVM_GET_LAPIC, KVM_SET_LAPIC, KVM_SET_MP_STATE, KVM_GET_MP_STATE, KVM_CHECK_EXTENSION, KVM_GET_VCPU_MMAP_SIZE.
const GROWTH_REQUESTS: &[u64] = &[
    0xae41,
    0x4020_ae46,
    0x4008_ae90,
    0x4008_ae89,
    0x4090_ae82,
    0x8138_ae83,
    0x4138_ae84,
    0x41a0_ae8d,
    0x8400_ae8e,
    0x4400_ae8f,
    0x4004_ae99,
    0x8004_ae98,
    0xae03,
    0xae04,
];
