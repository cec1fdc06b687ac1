//! Attributes of a process that the agent sets from outside, once all other steps are done and before its execve: rlimits, I/O
//! priority, scheduler, CPU affinity. The agent may raise what a container in a user namespace may not, and no set-up step
//! runs under the container's limits.

use oci_spec::runtime::{
    IOPriorityClass, LinuxIOPriority, LinuxSchedulerFlag, LinuxSchedulerPolicy, PosixRlimitType,
    Process, Scheduler,
};
use rustix::{
    process::{Pid, Resource, Rlimit},
    thread::CpuSet,
};

use crate::{
    error::{Context, Error, Result},
    sys::{self, SchedAttr},
};

/// Descriptors of a process for which the spec sets no limit: what services get from systemd.
const NOFILE: Rlimit = Rlimit {
    current: Some(1024),
    maximum: Some(524_288),
};

/// Checks the fields; `field` is the process's path in the spec.
pub fn check(field: &str, process: &Process) -> Result<()> {
    let mut seen = Vec::new();
    for rlimit in process.rlimits().iter().flatten() {
        let kind = rlimit.typ();
        if rlimit.soft() > rlimit.hard() {
            let (soft, hard) = (rlimit.soft(), rlimit.hard());
            let reason = format!("{kind} has a soft limit ({soft}) above the hard one ({hard})");
            return Err(Error::field(format!("{field}.rlimits"), reason));
        }
        if seen.contains(&kind) {
            let reason = format!("{kind} is listed twice");
            return Err(Error::field(format!("{field}.rlimits"), reason));
        }
        seen.push(kind);
    }
    if let Some(priority) = process.io_priority() {
        io_priority(field, *priority)?;
    }
    if let Some(scheduler) = process.scheduler() {
        self::scheduler(field, scheduler)?;
    }
    if let Some(affinity) = process.exec_cpu_affinity() {
        for (name, list) in [
            ("initial", affinity.initial()),
            ("final", affinity.cpu_affinity_final()),
        ] {
            if let Some(list) = list {
                cpus(&format!("{field}.execCPUAffinity.{name}"), list)?;
            }
        }
    }
    Ok(())
}

/// Sets all of them; `exec` for a process that joins a container.
pub fn apply(pid: u32, process: &Process, exec: bool) -> Result<()> {
    let field = "process";
    let target = Pid::from_raw(pid.cast_signed());
    let set = |kind, limit, name: &str| {
        rustix::process::prlimit(target, kind, limit)
            .map(drop)
            .step(|| format!("process.rlimits: set {name}"))
    };
    set(Resource::Nofile, NOFILE, "the default of RLIMIT_NOFILE")?;
    for rlimit in process.rlimits().iter().flatten() {
        let value = |limit: u64| (limit != u64::MAX).then_some(limit);
        let limit = Rlimit {
            current: value(rlimit.soft()),
            maximum: value(rlimit.hard()),
        };
        set(resource(rlimit.typ()), limit, &rlimit.typ().to_string())?;
    }
    if let Some(priority) = process.io_priority() {
        let value = io_priority(field, *priority)?;
        sys::ioprio_set(pid, value).step(|| "process.ioPriority: set".into())?;
    }
    // Before the scheduler: SCHED_DEADLINE does not allow a change of the CPUs.
    if let (Some(affinity), true) = (process.exec_cpu_affinity(), exec) {
        match (affinity.initial(), affinity.cpu_affinity_final()) {
            (_, Some(list)) => set_affinity("final", target, list)?,
            // The initial one ends where the container begins.
            (Some(_), None) => rustix::thread::sched_setaffinity(target, &all_cpus())
                .step(|| "process.execCPUAffinity: reset".into())?,
            (None, None) => {}
        }
    }
    if let Some(scheduler) = process.scheduler() {
        let attr = self::scheduler(field, scheduler)?;
        sys::sched_setattr(pid, attr).step(|| "process.scheduler: set".into())?;
    }
    Ok(())
}

/// Sets `process.execCPUAffinity.initial` for the caller, whose child the process will be.
pub fn apply_initial_affinity(process: &Process) -> Result<()> {
    let affinity = process.exec_cpu_affinity().as_ref();
    match affinity.and_then(|affinity| affinity.initial().as_ref()) {
        Some(list) => set_affinity("initial", None, list),
        None => Ok(()),
    }
}

fn set_affinity(name: &str, pid: Option<Pid>, list: &str) -> Result<()> {
    let field = format!("process.execCPUAffinity.{name}");
    let set = cpus(&field, list)?;
    rustix::thread::sched_setaffinity(pid, &set)
        .step(|| format!("{field}: run on {list} of the machine's CPUs"))
}

fn all_cpus() -> CpuSet {
    let mut set = CpuSet::new();
    (0..CpuSet::MAX_CPU).for_each(|cpu| set.set(cpu));
    set
}

/// A list such as `0-3,7`.
fn cpus(field: &str, list: &str) -> Result<CpuSet> {
    let wrong = || Error::field(field, format!("\"{list}\" is not a list of CPUs"));
    let mut set = CpuSet::new();
    for part in list.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let number = |text: &str| {
            text.parse::<usize>()
                .ok()
                .filter(|&cpu| cpu < CpuSet::MAX_CPU)
                .ok_or_else(wrong)
        };
        let (first, last) = (number(first)?, number(last)?);
        if first > last {
            return Err(wrong());
        }
        (first..=last).for_each(|cpu| set.set(cpu));
    }
    Ok(set)
}

/// The kernel's form: the class above 13 bits of level.
fn io_priority(field: &str, priority: LinuxIOPriority) -> Result<u32> {
    let class: u32 = match priority.class() {
        IOPriorityClass::IoprioClassRt => 1,
        IOPriorityClass::IoprioClassBe => 2,
        IOPriorityClass::IoprioClassIdle => 3,
    };
    match u32::try_from(priority.priority()) {
        Ok(level @ 0..=7) => Ok(class << 13 | level),
        _ => Err(Error::field(
            format!("{field}.ioPriority.priority"),
            "is not within 0 and 7",
        )),
    }
}

fn scheduler(field: &str, scheduler: &Scheduler) -> Result<SchedAttr> {
    use LinuxSchedulerPolicy as P;
    let wrong =
        |part: &str, reason: &str| Err(Error::field(format!("{field}.scheduler.{part}"), reason));
    let policy = *scheduler.policy();
    let number = match policy {
        P::SchedOther => libc::SCHED_OTHER,
        P::SchedFifo => libc::SCHED_FIFO,
        P::SchedRr => libc::SCHED_RR,
        P::SchedBatch => libc::SCHED_BATCH,
        P::SchedIso => return wrong("policy", "SCHED_ISO is not in the kernel"),
        P::SchedIdle => libc::SCHED_IDLE,
        P::SchedDeadline => libc::SCHED_DEADLINE,
    };
    let nice = scheduler.nice().unwrap_or(0);
    if !(-20..=19).contains(&nice) {
        return wrong("nice", "is not within -20 and 19");
    }
    let priority = scheduler.priority().unwrap_or(0);
    let realtime = matches!(policy, P::SchedFifo | P::SchedRr);
    let Ok(priority) = u32::try_from(priority) else {
        return wrong("priority", "is negative");
    };
    if priority != 0 && !realtime {
        return wrong("priority", "goes with SCHED_FIFO and SCHED_RR only");
    }
    let times = [
        ("runtime", scheduler.runtime()),
        ("deadline", scheduler.deadline()),
        ("period", scheduler.period()),
    ];
    for (name, value) in times {
        if value.is_some_and(|value| value != 0) && policy != P::SchedDeadline {
            return wrong(name, "goes with SCHED_DEADLINE only");
        }
    }
    let [runtime, deadline, period] = times.map(|(_, value)| value.unwrap_or(0));
    let flags = scheduler.flags().iter().flatten();
    Ok(SchedAttr {
        size: 0,
        policy: number.unsigned_abs(),
        flags: flags.fold(0, |bits, &flag| bits | flag_bit(flag)),
        nice,
        priority,
        runtime,
        deadline,
        period,
    })
}

/// linux/sched.h: `SCHED_FLAG_*`.
fn flag_bit(flag: LinuxSchedulerFlag) -> u64 {
    use LinuxSchedulerFlag as F;
    match flag {
        F::SchedResetOnFork => 0x01,
        F::SchedFlagReclaim => 0x02,
        F::SchedFlagDLOverrun => 0x04,
        F::SchedFlagKeepPolicy => 0x08,
        F::SchedFlagKeepParams => 0x10,
        F::SchedFlagUtilClampMin => 0x20,
        F::SchedFlagUtilClampMax => 0x40,
    }
}

fn resource(kind: PosixRlimitType) -> Resource {
    use PosixRlimitType as P;
    match kind {
        P::RlimitCpu => Resource::Cpu,
        P::RlimitFsize => Resource::Fsize,
        P::RlimitData => Resource::Data,
        P::RlimitStack => Resource::Stack,
        P::RlimitCore => Resource::Core,
        P::RlimitRss => Resource::Rss,
        P::RlimitNproc => Resource::Nproc,
        P::RlimitNofile => Resource::Nofile,
        P::RlimitMemlock => Resource::Memlock,
        P::RlimitAs => Resource::As,
        P::RlimitLocks => Resource::Locks,
        P::RlimitSigpending => Resource::Sigpending,
        P::RlimitMsgqueue => Resource::Msgqueue,
        P::RlimitNice => Resource::Nice,
        P::RlimitRtprio => Resource::Rtprio,
        P::RlimitRttime => Resource::Rttime,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checked(field: &str) -> std::result::Result<(), String> {
        let json = format!(r#"{{"user":{{"uid":0,"gid":0}},"args":["sh"],"cwd":"/",{field}}}"#);
        check("process", &serde_json::from_str(&json).unwrap()).map_err(|error| error.text())
    }

    #[test]
    fn an_rlimit_is_refused_if_soft_is_above_hard_or_it_comes_twice() {
        let error = checked(r#""rlimits":[{"type":"RLIMIT_CPU","soft":2,"hard":1}]"#).unwrap_err();
        assert!(
            error.contains("RLIMIT_CPU") && error.contains("(2)"),
            "{error}"
        );
        let one = r#"{"type":"RLIMIT_CPU","soft":1,"hard":1}"#;
        assert!(checked(&format!(r#""rlimits":[{one},{one}]"#)).is_err());
        checked(&format!(r#""rlimits":[{one}]"#)).unwrap();
    }

    #[test]
    fn io_priorities_are_packed_as_the_kernel_wants_them() {
        let of = |json: &str| io_priority("process", serde_json::from_str(json).unwrap());
        assert_eq!(
            of(r#"{"class":"IOPRIO_CLASS_RT","priority":4}"#).unwrap(),
            0x2004
        );
        assert_eq!(
            of(r#"{"class":"IOPRIO_CLASS_IDLE","priority":0}"#).unwrap(),
            0x6000
        );
        let error = of(r#"{"class":"IOPRIO_CLASS_BE","priority":8}"#).unwrap_err();
        assert!(error.text().contains("process.ioPriority.priority"));
    }

    #[test]
    fn a_scheduler_takes_only_what_its_policy_has() {
        checked(r#""scheduler":{"policy":"SCHED_BATCH","nice":5}"#).unwrap();
        checked(r#""scheduler":{"policy":"SCHED_RR","priority":5}"#).unwrap();
        checked(r#""scheduler":{"policy":"SCHED_DEADLINE","runtime":1000000,"deadline":2000000,"period":2000000}"#).unwrap();
        for (json, part) in [
            (r#"{"policy":"SCHED_ISO"}"#, "policy"),
            (r#"{"policy":"SCHED_OTHER","nice":20}"#, "nice"),
            (r#"{"policy":"SCHED_OTHER","priority":1}"#, "priority"),
            (r#"{"policy":"SCHED_FIFO","priority":-1}"#, "priority"),
            (r#"{"policy":"SCHED_IDLE","runtime":1}"#, "runtime"),
        ] {
            let error = checked(&format!(r#""scheduler":{json}"#)).unwrap_err();
            assert!(
                error.contains(&format!("process.scheduler.{part}")),
                "{error}"
            );
        }
    }

    #[test]
    fn lists_of_cpus_are_sets() {
        let set = cpus("f", "0-2,5").unwrap();
        let on: Vec<usize> = (0..8).filter(|&cpu| set.is_set(cpu)).collect();
        assert_eq!(on, [0, 1, 2, 5]);
        for bad in ["", "2-1", "x", "0-", "99999"] {
            assert!(cpus("f", bad).is_err(), "{bad}");
        }
    }
}
