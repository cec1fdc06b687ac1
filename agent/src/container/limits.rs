//! `linux.resources` as settings of cgroup v2 files. Pure: what is written where.

use oci_spec::runtime::{LinuxBlockIo, LinuxCpu, LinuxMemory, LinuxResources};

use crate::error::{Error, Result};

/// One write to a file of the cgroup.
#[derive(Debug, PartialEq, Eq)]
pub struct Setting {
    /// Field of the spec it comes from.
    pub field: String,
    /// File name.
    pub file: String,
    /// What to write.
    pub value: String,
}

type Settings = Vec<Setting>;

/// Files of the cgroup core that are limits; the others control processes, which is the agent's business.
const CORE_FILES: [&str; 3] = [
    "cgroup.max.depth",
    "cgroup.max.descendants",
    "cgroup.pressure",
];

fn push(settings: &mut Settings, field: &str, file: &str, value: impl ToString) {
    settings.push(Setting {
        field: format!("linux.resources.{field}"),
        file: file.into(),
        value: value.to_string(),
    });
}

fn refused<T>(field: &str) -> Result<T> {
    Err(Error::refused(format!("linux.resources.{field}")))
}

fn wrong<T>(field: &str, reason: &str) -> Result<T> {
    Err(Error::field(format!("linux.resources.{field}"), reason))
}

/// All settings, in the order to write them. `exists` tells which files the kernel has.
pub fn settings(resources: &LinuxResources, exists: &dyn Fn(&str) -> bool) -> Result<Settings> {
    let mut settings = Vec::new();
    if let Some(value) = resources.cpu() {
        cpu(value, &mut settings)?;
    }
    if let Some(value) = resources.memory() {
        memory(value, exists, &mut settings)?;
    }
    if let Some(value) = resources.pids() {
        // Nothing is what 0 meant to Docker and is what runc makes of it.
        push(
            &mut settings,
            "pids.limit",
            "pids.max",
            max_or(value.limit(), 1),
        );
    }
    if let Some(value) = resources.block_io() {
        block_io(value, exists, &mut settings)?;
    }
    for limit in resources.hugepage_limits().iter().flatten() {
        let size = limit.page_size();
        if !size.bytes().all(|b| b.is_ascii_alphanumeric()) {
            return wrong("hugepageLimits.pageSize", "is not a size");
        }
        let file = format!("hugetlb.{size}.max");
        if !exists(&file) {
            return wrong(
                "hugepageLimits.pageSize",
                &format!("{size} is no size of the machine's pages"),
            );
        }
        let reserved = format!("hugetlb.{size}.rsvd.max");
        for file in [file, reserved] {
            if exists(&file) {
                push(
                    &mut settings,
                    "hugepageLimits.limit",
                    &file,
                    max_or(limit.limit(), 0),
                );
            }
        }
    }
    let mut unified: Vec<_> = resources.unified().iter().flatten().collect();
    unified.sort();
    for (file, value) in unified {
        let plain = file.contains('.')
            && file
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_'))
            && (!file.starts_with("cgroup.") || CORE_FILES.contains(&file.as_str()));
        if !plain {
            return wrong("unified", &format!("\"{file}\" is not a controller's file"));
        }
        if !exists(file) {
            return wrong(
                "unified",
                &format!("\"{file}\" is not a file of the guest's cgroups"),
            );
        }
        push(&mut settings, &format!("unified.{file}"), file, value);
    }
    Ok(settings)
}

/// A limit, where less than `least` means none.
fn max_or(limit: i64, least: i64) -> String {
    if limit < least {
        "max".into()
    } else {
        limit.to_string()
    }
}

fn cpu(cpu: &LinuxCpu, settings: &mut Settings) -> Result<()> {
    if cpu.realtime_runtime().is_some_and(|v| v != 0) {
        return refused("cpu.realtimeRuntime");
    }
    if cpu.realtime_period().is_some_and(|v| v != 0) {
        return refused("cpu.realtimePeriod");
    }
    if let Some(idle) = cpu.idle() {
        push(settings, "cpu.idle", "cpu.idle", idle);
    }
    if let Some(shares) = cpu.shares().filter(|&shares| shares != 0) {
        push(settings, "cpu.shares", "cpu.weight", weight(shares));
    }
    // A burst must not be above the quota at any time: it goes first and comes back last.
    if cpu.burst().is_some() {
        push(settings, "cpu.burst", "cpu.max.burst", 0);
    }
    let quota = cpu.quota().filter(|&quota| quota != 0);
    if quota.is_some() || cpu.period().is_some_and(|period| period != 0) {
        let quota = quota.map_or("max".into(), |quota| max_or(quota, 1));
        let value = match cpu.period().filter(|&period| period != 0) {
            Some(period) => format!("{quota} {period}"),
            None => quota,
        };
        push(settings, "cpu.quota", "cpu.max", value);
    }
    if let Some(burst) = cpu.burst().filter(|&burst| burst != 0) {
        push(settings, "cpu.burst", "cpu.max.burst", burst);
    }
    for (field, file, value) in [
        ("cpu.cpus", "cpuset.cpus", cpu.cpus()),
        ("cpu.mems", "cpuset.mems", cpu.mems()),
    ] {
        if let Some(value) = value.as_ref().filter(|value| !value.is_empty()) {
            push(settings, field, file, value);
        }
    }
    Ok(())
}

/// cpu.shares (2 to 262144) to cpu.weight (1 to 10000), as runc and systemd do it.
fn weight(shares: u64) -> u64 {
    let shares = shares.clamp(2, 262_144);
    1 + (shares - 2) * 9999 / 262_142
}

fn memory(
    memory: &LinuxMemory,
    exists: &dyn Fn(&str) -> bool,
    settings: &mut Settings,
) -> Result<()> {
    if memory.kernel().is_some_and(|v| v > 0) {
        return refused("memory.kernel");
    }
    if memory.kernel_tcp().is_some_and(|v| v > 0) {
        return refused("memory.kernelTCP");
    }
    if memory.swappiness().is_some() {
        return refused("memory.swappiness");
    }
    if memory.disable_oom_killer() == Some(true) {
        return refused("memory.disableOOMKiller");
    }
    if memory.use_hierarchy() == Some(false) {
        return refused("memory.useHierarchy");
    }
    let limit = memory.limit().filter(|&limit| limit != 0);
    if let Some(limit) = limit {
        push(settings, "memory.limit", "memory.max", max_or(limit, 0));
    }
    if let Some(low) = memory.reservation().filter(|&low| low != 0) {
        push(settings, "memory.reservation", "memory.low", max_or(low, 0));
    }
    // The spec counts memory and swap together, v2 counts swap alone. A kernel without swap has no such file, and
    // keeps every limit on it.
    let swap = match (memory.swap(), limit) {
        // No limit on memory means none on swap, unless one is given.
        (None | Some(0), Some(..=-1)) => Some(-1),
        (total, _) => total.filter(|&total| total != 0),
    };
    if let Some(total) = swap
        && exists("memory.swap.max")
    {
        let swap = match (total, limit) {
            (..=-1, _) => "max".into(),
            (total, Some(limit)) if limit > 0 => match total.checked_sub(limit) {
                Some(swap @ 0..) => swap.to_string(),
                _ => return wrong("memory.swap", "is below memory.limit"),
            },
            _ => return wrong("memory.swap", "needs memory.limit"),
        };
        push(settings, "memory.swap", "memory.swap.max", swap);
    }
    Ok(())
}

/// Weights of groups under the scheduler BFQ.
pub const BFQ_WEIGHT: &str = "io.bfq.weight";

/// The devices that `linux.resources.blockIO` names, with the field of each.
pub fn block_devices(resources: &LinuxResources) -> Vec<(&'static str, i64, i64)> {
    let Some(io) = resources.block_io() else {
        return Vec::new();
    };
    let weights = io.weight_device().iter().flatten();
    let weights = weights.map(|device| ("weightDevice", device.major(), device.minor()));
    let throttles = [
        ("throttleReadBpsDevice", io.throttle_read_bps_device()),
        ("throttleWriteBpsDevice", io.throttle_write_bps_device()),
        ("throttleReadIOPSDevice", io.throttle_read_iops_device()),
        ("throttleWriteIOPSDevice", io.throttle_write_iops_device()),
    ];
    let throttles = throttles.into_iter().flat_map(|(field, list)| {
        let list = list.iter().flatten();
        list.map(move |device| (field, device.major(), device.minor()))
    });
    weights.chain(throttles).collect()
}

fn block_io(
    io: &LinuxBlockIo,
    exists: &dyn Fn(&str) -> bool,
    settings: &mut Settings,
) -> Result<()> {
    if io.leaf_weight().is_some_and(|weight| weight != 0) {
        return refused("blockIO.leafWeight");
    }
    // BFQ is the only scheduler here that weighs groups by device; the caller turns it on.
    let weigh = |field: &str, weight: u16| match weight {
        10..=1000 if exists(BFQ_WEIGHT) => Ok(weight),
        10..=1000 => refused(field),
        _ => wrong(field, "is not within 10 and 1000"),
    };
    if let Some(weight) = io.weight().filter(|&weight| weight != 0) {
        let value = weigh("blockIO.weight", weight)?;
        push(settings, "blockIO.weight", BFQ_WEIGHT, value);
    }
    for device in io.weight_device().iter().flatten() {
        if device.leaf_weight().is_some_and(|weight| weight != 0) {
            return refused("blockIO.weightDevice.leafWeight");
        }
        let (major, minor) = (device.major(), device.minor());
        if let Some(weight) = device.weight().filter(|&weight| weight != 0) {
            let weight = weigh("blockIO.weightDevice.weight", weight)?;
            let value = format!("{major}:{minor} {weight}");
            push(settings, "blockIO.weightDevice", BFQ_WEIGHT, value);
        }
    }
    for (field, key, devices) in [
        (
            "throttleReadBpsDevice",
            "rbps",
            io.throttle_read_bps_device(),
        ),
        (
            "throttleWriteBpsDevice",
            "wbps",
            io.throttle_write_bps_device(),
        ),
        (
            "throttleReadIOPSDevice",
            "riops",
            io.throttle_read_iops_device(),
        ),
        (
            "throttleWriteIOPSDevice",
            "wiops",
            io.throttle_write_iops_device(),
        ),
    ] {
        for device in devices.iter().flatten() {
            let rate = match device.rate() {
                0 => "max".into(),
                rate => rate.to_string(),
            };
            let value = format!("{}:{} {key}={rate}", device.major(), device.minor());
            push(settings, &format!("blockIO.{field}"), "io.max", value);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(json: &str) -> Result<Vec<(String, String)>> {
        let resources: LinuxResources = serde_json::from_str(json).unwrap();
        Ok(settings(&resources, &|_| true)?
            .into_iter()
            .map(|setting| (setting.file, setting.value))
            .collect())
    }

    fn one(json: &str) -> (String, String) {
        let mut all = of(json).unwrap();
        assert_eq!(all.len(), 1);
        all.remove(0)
    }

    #[test]
    fn cpu_quota_and_period_go_together() {
        let (file, value) = one(r#"{"cpu":{"quota":50000,"period":100000}}"#);
        assert_eq!((file.as_str(), value.as_str()), ("cpu.max", "50000 100000"));
        assert_eq!(
            one(r#"{"cpu":{"quota":-1,"period":100000}}"#).1,
            "max 100000"
        );
    }

    #[test]
    fn shares_become_a_weight() {
        assert_eq!(one(r#"{"cpu":{"shares":1024}}"#).1, "39");
        assert_eq!(one(r#"{"cpu":{"shares":2}}"#).1, "1");
        assert_eq!(one(r#"{"cpu":{"shares":262144}}"#).1, "10000");
        assert_eq!(one(r#"{"cpu":{"shares":1}}"#).1, "1");
    }

    #[test]
    fn swap_is_counted_without_memory() {
        let all = of(r#"{"memory":{"limit":100,"swap":150}}"#).unwrap();
        assert!(all.contains(&("memory.swap.max".into(), "50".into())));
        let error = of(r#"{"memory":{"limit":100,"swap":50}}"#).unwrap_err();
        assert!(error.text().contains("linux.resources.memory.swap"));
    }

    #[test]
    fn no_limit_is_max() {
        let all = of(r#"{"memory":{"limit":-1}}"#).unwrap();
        assert!(all.len() == 2 && all.iter().all(|(_, value)| value == "max"));
        assert_eq!(one(r#"{"pids":{"limit":0}}"#).1, "max");
        assert_eq!(one(r#"{"pids":{"limit":5}}"#).1, "5");
    }

    #[test]
    fn what_v2_does_not_have_is_refused_by_name() {
        for (json, field) in [
            (r#"{"memory":{"swappiness":10}}"#, "memory.swappiness"),
            (r#"{"memory":{"kernel":10}}"#, "memory.kernel"),
            (
                r#"{"memory":{"disableOOMKiller":true}}"#,
                "memory.disableOOMKiller",
            ),
            (r#"{"cpu":{"realtimeRuntime":10}}"#, "cpu.realtimeRuntime"),
            (r#"{"blockIO":{"leafWeight":10}}"#, "blockIO.leafWeight"),
        ] {
            let error = of(json).unwrap_err().text();
            assert!(error.contains(field), "{error}");
        }
    }

    #[test]
    fn unified_takes_controller_files_only() {
        assert_eq!(
            one(r#"{"unified":{"memory.high":"1000"}}"#).0,
            "memory.high"
        );
        for name in ["cgroup.procs", "../memory.max", "cgroup.kill", "x"] {
            assert!(
                of(&format!(r#"{{"unified":{{"{name}":"1"}}}}"#)).is_err(),
                "{name}"
            );
        }
        assert_eq!(one(r#"{"unified":{"cgroup.max.depth":"2"}}"#).1, "2");
    }

    #[test]
    fn what_the_kernel_lacks_is_refused() {
        for (json, field) in [
            (r#"{"unified":{"cpu.uclamp.min":"1"}}"#, "unified"),
            (
                r#"{"hugepageLimits":[{"pageSize":"3MB","limit":1}]}"#,
                "pageSize",
            ),
            (r#"{"blockIO":{"weight":10}}"#, "blockIO.weight"),
        ] {
            let resources: LinuxResources = serde_json::from_str(json).unwrap();
            let error = settings(&resources, &|_| false).unwrap_err().text();
            assert!(error.contains(field), "{error}");
        }
    }

    #[test]
    fn a_burst_is_taken_back_while_the_quota_changes() {
        let all = of(r#"{"cpu":{"quota":5000,"burst":4000}}"#).unwrap();
        let values: Vec<&str> = all.iter().map(|(_, value)| value.as_str()).collect();
        assert_eq!(values, ["0", "5000", "4000"]);
    }

    #[test]
    fn weights_and_throttles_of_devices_go_to_their_files() {
        let all = of(
            r#"{"blockIO":{"weight":500,"weightDevice":[{"major":254,"minor":0,"weight":100}],
            "throttleWriteIOPSDevice":[{"major":254,"minor":16,"rate":7}]}}"#,
        )
        .unwrap();
        let all: Vec<String> = all.iter().map(|(f, v)| format!("{f} {v}")).collect();
        assert_eq!(
            all,
            [
                "io.bfq.weight 500",
                "io.bfq.weight 254:0 100",
                "io.max 254:16 wiops=7"
            ]
        );
        assert!(of(r#"{"blockIO":{"weight":5}}"#).is_err());
    }
}
