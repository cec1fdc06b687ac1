//! Instructions in front of a seccomp filter: a system call newer than any that the profile names gets ENOSYS instead of the default
//! action, as with runc. A C library tries new system calls first and takes the old way only on ENOSYS.

use libseccomp::{ScmpArch, ScmpSyscall};
use oci_spec::runtime::{Arch, LinuxSeccomp, LinuxSeccompAction};

// linux/bpf_common.h
const LOAD: u16 = 0x20;
const JUMP_EQUAL: u16 = 0x15;
const JUMP_GREATER: u16 = 0x25;
const JUMP_SET: u16 = 0x45;
const RETURN: u16 = 0x06;

// struct seccomp_data
const NUMBER: u32 = 0;
const ARCH: u32 = 4;

const AUDIT_ARCH_I386: u32 = 0x4000_0003;
const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
/// Set in the number of a system call of the x32 ABI.
const X32_BIT: u32 = 1 << 30;
/// SECCOMP_RET_ERRNO with ENOSYS.
const RETURN_ENOSYS: u32 = 0x0005_0000 | libc::ENOSYS as u32;

/// The instructions, none if the default action lets calls through or is ENOSYS already.
pub fn stub(profile: &LinuxSeccomp) -> Vec<u8> {
    use LinuxSeccompAction as A;
    let mut program = Vec::new();
    let through = matches!(
        profile.default_action(),
        A::ScmpActAllow | A::ScmpActLog | A::ScmpActTrace
    );
    if through || profile.default_errno_ret() == Some(libc::ENOSYS as u32) {
        return program;
    }
    let mut done = Vec::new();
    for &arch in profile.architectures().iter().flatten() {
        let (audit, x32, scmp) = match arch {
            Arch::ScmpArchNative | Arch::ScmpArchX86_64 => {
                (AUDIT_ARCH_X86_64, Some(false), ScmpArch::X8664)
            }
            Arch::ScmpArchX32 => (AUDIT_ARCH_X86_64, Some(true), ScmpArch::X32),
            Arch::ScmpArchX86 => (AUDIT_ARCH_I386, None, ScmpArch::X86),
            _ => continue,
        };
        let last = last_call(profile, scmp);
        if last > 0 && !done.contains(&scmp) {
            done.push(scmp);
            section(&mut program, audit, x32, last.unsigned_abs());
        }
    }
    program
}

/// Number of the newest system call named, 0 if none is known.
fn last_call(profile: &LinuxSeccomp, arch: ScmpArch) -> i32 {
    let rules = profile.syscalls().iter().flatten();
    rules
        .flat_map(|rule| rule.names())
        .filter_map(|name| ScmpSyscall::from_name_by_arch(name, arch).ok())
        .map(ScmpSyscall::as_raw_syscall)
        .fold(0, i32::max)
}

fn section(program: &mut Vec<u8>, audit: u32, x32: Option<bool>, last: u32) {
    let mut push = |code: u16, yes: u8, no: u8, value: u32| {
        program.extend(code.to_ne_bytes());
        program.extend([yes, no]);
        program.extend(value.to_ne_bytes());
    };
    let rest = if x32.is_some() { 4 } else { 3 };
    push(LOAD, 0, 0, ARCH);
    push(JUMP_EQUAL, 0, rest, audit);
    push(LOAD, 0, 0, NUMBER);
    match x32 {
        Some(false) => push(JUMP_SET, 2, 0, X32_BIT),
        Some(true) => push(JUMP_SET, 0, 2, X32_BIT),
        None => {}
    }
    push(JUMP_GREATER, 0, 1, last);
    push(RETURN, 0, 0, RETURN_ENOSYS);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the stub answers: whether it returns ENOSYS.
    fn run(program: &[u8], arch: u32, number: u32) -> bool {
        let code: Vec<(u16, u8, u8, u32)> = program
            .chunks(8)
            .map(|b| {
                let k = u32::from_ne_bytes([b[4], b[5], b[6], b[7]]);
                (u16::from_ne_bytes([b[0], b[1]]), b[2], b[3], k)
            })
            .collect();
        let (mut pc, mut value) = (0, 0);
        while pc < code.len() {
            let (op, yes, no, k) = code[pc];
            let holds = match op {
                LOAD => {
                    value = if k == ARCH { arch } else { number };
                    pc += 1;
                    continue;
                }
                JUMP_EQUAL => value == k,
                JUMP_GREATER => value > k,
                JUMP_SET => value & k != 0,
                RETURN => return k == RETURN_ENOSYS,
                _ => panic!("{op:#x}"),
            };
            pc += 1 + usize::from(if holds { yes } else { no });
        }
        assert_eq!(pc, code.len(), "it ends where the filter begins");
        false
    }

    fn of(json: &str) -> Vec<u8> {
        stub(&serde_json::from_str(json).unwrap())
    }

    #[test]
    fn calls_newer_than_the_profile_do_not_exist() {
        let stub = of(
            r#"{"defaultAction":"SCMP_ACT_ERRNO","architectures":["SCMP_ARCH_X86_64","SCMP_ARCH_X86","SCMP_ARCH_X32"],
            "syscalls":[{"names":["read","clone3","no_such_call"],"action":"SCMP_ACT_ALLOW"}]}"#,
        );
        assert!(!run(&stub, AUDIT_ARCH_X86_64, 0));
        assert!(!run(&stub, AUDIT_ARCH_X86_64, 435));
        assert!(run(&stub, AUDIT_ARCH_X86_64, 436));
        assert!(!run(&stub, AUDIT_ARCH_X86_64, X32_BIT | 435));
        assert!(run(&stub, AUDIT_ARCH_X86_64, X32_BIT | 9999));
        assert!(!run(&stub, AUDIT_ARCH_I386, 435));
        assert!(run(&stub, AUDIT_ARCH_I386, 436));
        assert!(!run(&stub, 1, 9999));
    }

    #[test]
    fn a_permissive_default_has_no_stub() {
        for default in [
            r#""SCMP_ACT_ALLOW""#,
            r#""SCMP_ACT_LOG""#,
            r#""SCMP_ACT_ERRNO","defaultErrnoRet":38"#,
        ] {
            let json = format!(
                r#"{{"defaultAction":{default},"architectures":["SCMP_ARCH_X86_64"],
                "syscalls":[{{"names":["read"],"action":"SCMP_ACT_KILL"}}]}}"#
            );
            assert!(of(&json).is_empty());
        }
    }
}
