//! Step: the seccomp filter of the spec, built by libseccomp and preceded by a few instructions of `enosys`. System calls that this
//! libseccomp does not know are passed over, as runc does: the default action covers them.

use std::{
    fs::File,
    io::{Read, Seek, SeekFrom},
};

use libseccomp::{
    ScmpAction, ScmpArch, ScmpArgCompare, ScmpCompareOp, ScmpFilterContext, ScmpSyscall,
};
use oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompFilterFlag,
    LinuxSeccompOperator,
};
use rustix::fs::MemfdFlags;

use crate::{
    error::{Context, Error, Result},
    sys,
};

/// Checks the profile by building its filter.
pub fn check(profile: &LinuxSeccomp) -> Result<()> {
    flags(profile)?;
    build(profile).map(drop)
}

/// Loads the filter for the calling process.
pub fn load(profile: &LinuxSeccomp) -> Result<()> {
    let what = || "linux.seccomp: load the filter".to_string();
    let file = rustix::fs::memfd_create(c"filter", MemfdFlags::CLOEXEC).step(what)?;
    build(profile)?
        .export_bpf(&file)
        .map_err(|error| failed("make the filter", &error))?;
    let mut file = File::from(file);
    let mut program = super::enosys::stub(profile);
    file.seek(SeekFrom::Start(0))
        .and_then(|_| file.read_to_end(&mut program))
        .step(what)?;
    sys::seccomp_load(&program, flags(profile)?).step(what)
}

/// Flags of the system call, linux/seccomp.h. Without any in the spec, runc keeps speculation as it is.
fn flags(profile: &LinuxSeccomp) -> Result<u32> {
    use LinuxSeccompFilterFlag as F;
    let Some(list) = profile.flags() else {
        return Ok(SPEC_ALLOW);
    };
    list.iter().try_fold(0, |bits, flag| {
        Ok(bits
            | match flag {
                F::SeccompFilterFlagTsync => 1,
                F::SeccompFilterFlagLog => 2,
                F::SeccompFilterFlagSpecAllow => SPEC_ALLOW,
                F::SeccompFilterFlagWaitKillableRecv => {
                    let field = "linux.seccomp.flags SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV";
                    return Err(Error::field(field, "goes with a listener"));
                }
            })
    })
}

const SPEC_ALLOW: u32 = 4;

fn failed(what: &str, error: &libseccomp::error::SeccompError) -> Error {
    Error::field("linux.seccomp", format!("{what}: {error}"))
}

fn build(profile: &LinuxSeccomp) -> Result<ScmpFilterContext> {
    if profile
        .listener_path()
        .as_ref()
        .is_some_and(|path| !path.as_os_str().is_empty())
    {
        return Err(Error::refused("linux.seccomp.listenerPath"));
    }
    let default = action(profile.default_action(), profile.default_errno_ret())?;
    let mut filter =
        ScmpFilterContext::new(default).map_err(|error| failed("make a filter", &error))?;
    // noNewPrivileges is a field of its own; libseccomp would set it.
    filter
        .set_ctl_nnp(false)
        .map_err(|error| failed("keep privileges", &error))?;
    for &wanted in profile.architectures().iter().flatten() {
        filter
            .add_arch(arch(wanted)?)
            .map_err(|error| failed("architectures", &error))?;
    }
    for rule in profile.syscalls().iter().flatten() {
        let action = action(rule.action(), rule.errno_ret())?;
        if action == default {
            continue;
        }
        let groups = conditions(rule.args().as_deref().unwrap_or_default());
        for name in rule.names() {
            let Ok(call) = ScmpSyscall::from_name(name) else {
                continue;
            };
            for group in &groups {
                filter
                    .add_rule_conditional(action, call, group)
                    .map_err(|error| failed(name, &error))?;
            }
        }
    }
    Ok(filter)
}

/// The conditions of a rule, as groups of which one has to hold. A rule compares an argument once, so several conditions on the
/// same argument become alternatives, as in runc.
fn conditions(args: &[LinuxSeccompArg]) -> Vec<Vec<ScmpArgCompare>> {
    let all: Vec<ScmpArgCompare> = args.iter().map(compare).collect();
    let twice = args.iter().enumerate().any(|(position, arg)| {
        args.iter()
            .skip(position.saturating_add(1))
            .any(|other| other.index() == arg.index())
    });
    if twice {
        all.into_iter().map(|one| vec![one]).collect()
    } else {
        vec![all]
    }
}

fn compare(arg: &LinuxSeccompArg) -> ScmpArgCompare {
    use LinuxSeccompOperator as O;
    let index = u32::try_from(arg.index()).unwrap_or(u32::MAX);
    let (operator, value) = match arg.op() {
        O::ScmpCmpNe => (ScmpCompareOp::NotEqual, arg.value()),
        O::ScmpCmpLt => (ScmpCompareOp::Less, arg.value()),
        O::ScmpCmpLe => (ScmpCompareOp::LessOrEqual, arg.value()),
        O::ScmpCmpEq => (ScmpCompareOp::Equal, arg.value()),
        O::ScmpCmpGe => (ScmpCompareOp::GreaterEqual, arg.value()),
        O::ScmpCmpGt => (ScmpCompareOp::Greater, arg.value()),
        // The spec's `value` is the mask, `valueTwo` what is compared.
        O::ScmpCmpMaskedEq => (
            ScmpCompareOp::MaskedEqual(arg.value()),
            arg.value_two().unwrap_or(0),
        ),
    };
    ScmpArgCompare::new(index, operator, value)
}

fn action(action: LinuxSeccompAction, errno: Option<u32>) -> Result<ScmpAction> {
    use LinuxSeccompAction as A;
    let number = errno
        .map_or(Ok(libc::EPERM), i32::try_from)
        .map_err(|_| Error::field("linux.seccomp.errnoRet", "is out of range"))?;
    Ok(match action {
        A::ScmpActKill | A::ScmpActKillThread => ScmpAction::KillThread,
        A::ScmpActKillProcess => ScmpAction::KillProcess,
        A::ScmpActTrap => ScmpAction::Trap,
        A::ScmpActErrno => ScmpAction::Errno(number),
        A::ScmpActTrace => ScmpAction::Trace(
            u16::try_from(number)
                .map_err(|_| Error::field("linux.seccomp.errnoRet", "is out of range"))?,
        ),
        A::ScmpActAllow => ScmpAction::Allow,
        A::ScmpActLog => ScmpAction::Log,
        A::ScmpActNotify => return Err(Error::refused("linux.seccomp SCMP_ACT_NOTIFY")),
    })
}

/// Architectures that this machine does not have are let in as runc does: no system call comes from them.
fn arch(arch: Arch) -> Result<ScmpArch> {
    use Arch as A;
    Ok(match arch {
        A::ScmpArchNative => ScmpArch::Native,
        A::ScmpArchX86 => ScmpArch::X86,
        A::ScmpArchX86_64 => ScmpArch::X8664,
        A::ScmpArchX32 => ScmpArch::X32,
        A::ScmpArchArm => ScmpArch::Arm,
        A::ScmpArchAarch64 => ScmpArch::Aarch64,
        A::ScmpArchMipsel => ScmpArch::Mipsel,
        A::ScmpArchMipsel64 => ScmpArch::Mipsel64,
        A::ScmpArchMipsel64n32 => ScmpArch::Mipsel64N32,
        A::ScmpArchPpc64le => ScmpArch::Ppc64Le,
        A::ScmpArchRiscv64 => ScmpArch::Riscv64,
        other => {
            let field = format!("linux.seccomp.architectures {other}");
            return Err(Error::refused(field));
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checked(json: &str) -> std::result::Result<(), String> {
        check(&serde_json::from_str(json).unwrap()).map_err(|error| error.text())
    }

    #[test]
    fn a_profile_like_containerds_builds() {
        checked(
            r#"{"defaultAction":"SCMP_ACT_ERRNO","architectures":["SCMP_ARCH_X86_64","SCMP_ARCH_X86","SCMP_ARCH_X32"],
            "syscalls":[{"names":["read","write","no_such_call"],"action":"SCMP_ACT_ALLOW"},
            {"names":["personality"],"action":"SCMP_ACT_ALLOW","args":[{"index":0,"value":0,"op":"SCMP_CMP_EQ"}]},
            {"names":["clone"],"action":"SCMP_ACT_ALLOW","args":[{"index":0,"value":2114060288,"op":"SCMP_CMP_MASKED_EQ"}]},
            {"names":["clone3"],"action":"SCMP_ACT_ERRNO","errnoRet":38}]}"#,
        )
        .unwrap();
    }

    #[test]
    fn several_conditions_on_one_argument_are_alternatives() {
        let args: Vec<LinuxSeccompArg> = serde_json::from_str(
            r#"[{"index":0,"value":0,"op":"SCMP_CMP_EQ"},{"index":0,"value":8,"op":"SCMP_CMP_EQ"}]"#,
        )
        .unwrap();
        assert_eq!(conditions(&args).len(), 2);
        assert_eq!(conditions(&args[..1]).len(), 1);
        assert_eq!(conditions(&[]), [Vec::new()]);
    }

    #[test]
    fn without_flags_speculation_is_left_alone() {
        let flags = |json: &str| {
            let json = format!(r#"{{"defaultAction":"SCMP_ACT_ALLOW"{json}}}"#);
            flags(&serde_json::from_str(&json).unwrap())
        };
        assert_eq!(flags("").unwrap(), SPEC_ALLOW);
        assert_eq!(flags(r#","flags":[]"#).unwrap(), 0);
        assert_eq!(
            flags(r#","flags":["SECCOMP_FILTER_FLAG_LOG","SECCOMP_FILTER_FLAG_TSYNC"]"#).unwrap(),
            3
        );
        assert!(flags(r#","flags":["SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"]"#).is_err());
    }

    #[test]
    fn architectures_of_other_machines_are_let_in() {
        checked(
            r#"{"defaultAction":"SCMP_ACT_ERRNO","architectures":["SCMP_ARCH_X86_64","SCMP_ARCH_AARCH64","SCMP_ARCH_ARM"],
            "syscalls":[{"names":["read"],"action":"SCMP_ACT_ALLOW"}]}"#,
        )
        .unwrap();
        let error =
            checked(r#"{"defaultAction":"SCMP_ACT_ERRNO","architectures":["SCMP_ARCH_PARISC"]}"#);
        assert!(error.unwrap_err().contains("SCMP_ARCH_PARISC"));
    }

    #[test]
    fn notification_is_refused() {
        let error = checked(r#"{"defaultAction":"SCMP_ACT_NOTIFY"}"#).unwrap_err();
        assert!(error.contains("SCMP_ACT_NOTIFY"), "{error}");
        let error = checked(r#"{"defaultAction":"SCMP_ACT_ALLOW","listenerPath":"/x"}"#);
        assert!(error.unwrap_err().contains("listenerPath"));
    }
}
