//! System calls by kind of thread (seccomp(2)). What is in no rule of a thread's kind kills the process: the shim then tells of
//! SIGSYS, and the machine is gone cleanly.
//!
//! The process's own filter is the union of all kinds; each thread puts its kind's on top of it ([`confine`]), so a thread may what
//! both allow. The rules with their reasons are in [`rules`].

pub mod rules;

use std::collections::BTreeMap;
use std::io;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

pub use self::rules::Kind;
use self::rules::{Arguments, Rule};
use super::{Missing, missing};

/// Puts the filter of all kinds on the process, which has one thread, and another that lets libraries know that there is no clone3: its
/// flags are in memory, where no filter sees them.
pub(super) fn confine_process() -> Result<(), Missing> {
    let all = Kind::ALL.iter().flat_map(|kind| kind.rules());
    let failed = missing("make the filter of system calls");
    let filter = program(all).map_err(io::Error::other).map_err(failed)?;
    let no_clone3 = [(libc::SYS_clone3, Vec::new())].into_iter().collect();
    let no_clone3 = SeccompFilter::new(
        no_clone3,
        SeccompAction::Allow,
        SeccompAction::Errno(libc::ENOSYS.cast_unsigned()),
        TargetArch::x86_64,
    );
    let failed = missing("make the filter of clone3");
    let no_clone3 = no_clone3
        .and_then(BpfProgram::try_from)
        .map_err(io::Error::other)
        .map_err(failed)?;
    for filter in [no_clone3, filter] {
        let failed = missing("put on a filter of system calls");
        seccompiler::apply_filter(&filter)
            .map_err(io::Error::other)
            .map_err(failed)?;
    }
    Ok(())
}

/// Puts the filter of `kind` on the calling thread, for good. A thread that cannot be confined must not go on.
pub fn confine(kind: Kind) {
    let confined = program(kind.rules()).and_then(|filter| {
        let applied = seccompiler::apply_filter(&filter);
        applied.map_err(|error| error.to_string())
    });
    if let Err(error) = confined {
        panic!("a thread cannot be confined: {error}");
    }
}

/// The filter that allows what `rules` do and kills the process at any other call.
pub fn program<'a>(rules: impl Iterator<Item = &'a Rule>) -> Result<BpfProgram, String> {
    let mut table: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    // Without conditions, a call is allowed whatever others say of it.
    let mut free = Vec::new();
    for rule in rules {
        let of_call = table.entry(rule.call).or_default();
        match alternatives(&rule.arguments)? {
            None => free.push(rule.call),
            Some(alternatives) => of_call.extend(alternatives),
        }
    }
    for call in free {
        table.insert(call, Vec::new());
    }
    let filter = SeccompFilter::new(
        table,
        SeccompAction::KillProcess,
        SeccompAction::Allow,
        TargetArch::x86_64,
    );
    filter
        .and_then(BpfProgram::try_from)
        .map_err(|error| error.to_string())
}

/// Each alone is enough; `None`: no condition.
fn alternatives(arguments: &Arguments) -> Result<Option<Vec<SeccompRule>>, String> {
    let condition = |index, op, value| {
        SeccompCondition::new(index, SeccompCmpArgLen::Dword, op, value)
            .map_err(|error| error.to_string())
    };
    let one_of = |index, values: &[u64]| {
        let rules = values.iter().map(|value| {
            let condition = condition(index, SeccompCmpOp::Eq, *value)?;
            SeccompRule::new(vec![condition]).map_err(|error| error.to_string())
        });
        rules.collect::<Result<Vec<_>, String>>()
    };
    let without = |index, bits: libc::c_int| {
        let bits = u64::from(bits.cast_unsigned());
        let condition = condition(index, SeccompCmpOp::MaskedEq(bits), 0)?;
        let rule = SeccompRule::new(vec![condition]).map_err(|error| error.to_string())?;
        Ok::<_, String>(vec![rule])
    };
    Ok(Some(match arguments {
        Arguments::Any => return Ok(None),
        Arguments::Is(index, value) => one_of(*index, &[*value])?,
        Arguments::OneOf(index, values) => one_of(*index, values)?,
        Arguments::NotExecutable => without(2, libc::PROT_EXEC)?,
        Arguments::Thread => {
            let bits = u64::from(libc::CLONE_THREAD.cast_unsigned());
            let condition = condition(0, SeccompCmpOp::MaskedEq(bits), bits)?;
            vec![SeccompRule::new(vec![condition]).map_err(|error| error.to_string())?]
        }
    }))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::os::unix::process::ExitStatusExt;
    use std::process::Command;

    use super::*;

    #[test]
    fn the_filters_of_all_kinds_can_be_made() {
        for kind in Kind::ALL {
            assert!(!program(kind.rules()).unwrap().is_empty(), "{kind:?}");
        }
        program(Kind::ALL.iter().flat_map(|kind| kind.rules())).unwrap();
    }

    /// As docs/threat-model.md tells it.
    #[test]
    fn each_kind_has_as_many_distinct_system_calls_as_is_written() {
        let count = |kind: Kind| {
            let calls: BTreeSet<i64> = kind.rules().map(|rule| rule.call).collect();
            (kind, calls.len())
        };
        let told: Vec<_> = Kind::ALL.into_iter().map(count).collect();
        assert_eq!(
            told,
            [
                (Kind::Main, 32),
                (Kind::Starter, 37),
                (Kind::Control, 51),
                (Kind::Vcpu, 42),
                (Kind::Device, 60),
                (Kind::VhostUser, 61),
                (Kind::Emulator, 35),
                (Kind::Pid, 31),
            ]
        );
    }

    #[test]
    fn no_kind_opens_files_makes_processes_or_reaches_the_network() {
        use libc::{
            SYS_accept, SYS_bind, SYS_connect, SYS_execve, SYS_execveat, SYS_fork, SYS_listen,
            SYS_mount, SYS_open, SYS_openat, SYS_openat2, SYS_process_vm_readv, SYS_ptrace,
            SYS_setns, SYS_socket, SYS_unshare, SYS_vfork,
        };
        let never = [
            SYS_open,
            SYS_openat,
            SYS_openat2,
            SYS_execve,
            SYS_execveat,
            SYS_fork,
            SYS_vfork,
            SYS_socket,
            SYS_connect,
            SYS_bind,
            SYS_listen,
            SYS_accept,
            SYS_mount,
            SYS_unshare,
            SYS_setns,
            SYS_ptrace,
            SYS_process_vm_readv,
        ];
        for kind in Kind::ALL {
            for rule in kind.rules() {
                assert!(!never.contains(&rule.call), "{kind:?}: {}", rule.call);
            }
        }
    }

    /// A process of its own, as the filter kills it. `what`: the environment variable that makes a test of this program do it.
    fn status_of(test: &str, what: &str) -> std::process::ExitStatus {
        let program = std::env::current_exe().unwrap();
        let mut command = Command::new(program);
        command.args(["--exact", test, "--nocapture"]);
        command
            .env("BULKHEAD_TEST_SECCOMP", what)
            .output()
            .unwrap()
            .status
    }

    const VICTIM: &str = "jail::seccomp::tests::victim";

    /// Run by the tests below; alone it does nothing.
    #[test]
    fn victim() {
        let Ok(what) = std::env::var("BULKHEAD_TEST_SECCOMP") else {
            return;
        };
        rustix::thread::set_no_new_privs(true).unwrap();
        let thread = std::thread::spawn(move || {
            confine(Kind::Device);
            match what.as_str() {
                "file" => drop(std::fs::File::open("/etc/passwd")),
                "executable" => {
                    let exec = libc::PROT_EXEC | libc::PROT_READ;
                    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
                    // SAFETY: a new mapping anywhere.
                    unsafe { libc::mmap(std::ptr::null_mut(), 4096, exec, flags, -1, 0) };
                }
                "panic" => std::process::abort(),
                _ => {}
            }
        });
        thread.join().unwrap();
    }

    #[test]
    fn a_call_outside_the_rules_kills_the_process() {
        for what in ["file", "executable"] {
            assert_eq!(
                status_of(VICTIM, what).signal(),
                Some(libc::SIGSYS),
                "{what}"
            );
        }
        assert!(status_of(VICTIM, "nothing").success());
    }

    #[test]
    fn an_abort_is_an_abort_under_the_filter_too() {
        assert_eq!(status_of(VICTIM, "panic").signal(), Some(libc::SIGABRT));
    }
}
