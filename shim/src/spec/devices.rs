//! `linux.devices`: which nodes mean in the guest what they mean on the host. The numbers of the kernel's own character devices are fixed,
//! so those work with the guest's drivers; a device of the host's hardware is not in the guest. Limits of block devices in
//! `linux.resources.blockIO` are checked alike.
//!
//! A container that may use every device is a privileged one, and its list is whatever the host has: it gets what of that the
//! guest has, and the rest is logged. Any other container names the devices that it needs: one that the guest lacks is refused.

use serde_json::Value;

use super::view::{DeviceView, RuleView};
use crate::{
    refusal::{Refusal, unsupported},
    sandbox::machine::printable,
};

/// Character devices that the guest's kernel has.
const GUEST: [(i64, i64); 13] = [
    (1, 3),    // null
    (1, 5),    // zero
    (1, 7),    // full
    (1, 8),    // random
    (1, 9),    // urandom
    (1, 11),   // kmsg
    (5, 0),    // tty
    (5, 1),    // console
    (5, 2),    // ptmx
    (10, 183), // hwrng
    (10, 200), // net/tun
    (10, 229), // fuse
    (10, 237), // loop-control
];
/// Loop devices: the guest has its own.
const LOOP: i64 = 7;
/// Names of left-out devices that are logged.
const NAMES_MAX: usize = 500;

/// Refuses devices that the guest does not have, or takes them out of a privileged container's list in `spec`.
pub fn check(devices: &[DeviceView], rules: &[RuleView], spec: &mut Value) -> Result<(), Refusal> {
    let privileged = may_use_all(rules);
    let mut left_out = Vec::new();
    for (index, device) in devices.iter().enumerate() {
        let Some(why) = lacks(device, privileged) else {
            continue;
        };
        if !privileged {
            let path = printable(&device.path, NAMES_MAX);
            let DeviceView { major, minor, .. } = device;
            return Err(unsupported(
                format!(
                    "linux.devices[{index}] ({path}, {} {major}:{minor})",
                    printable(&device.r#type, 8)
                ),
                why,
            ));
        }
        left_out.push(index);
    }
    if left_out.is_empty() {
        return Ok(());
    }
    let names: Vec<&str> = left_out
        .iter()
        .filter_map(|&i| devices.get(i))
        .map(|d| d.path.as_str())
        .collect();
    let names = printable(&names.join(" "), NAMES_MAX);
    tracing::info!(
        names,
        "linux.devices: a privileged container gets the guest's devices, without these of the host"
    );
    if let Some(list) = spec
        .pointer_mut("/linux/devices")
        .and_then(Value::as_array_mut)
    {
        let mut index = 0;
        list.retain(|_| {
            let keep = left_out.binary_search(&index).is_err();
            index += 1;
            keep
        });
    }
    Ok(())
}

/// Lists of `linux.resources.blockIO` that name devices.
const BLOCK_LISTS: [&str; 5] = [
    "weightDevice",
    "throttleReadBpsDevice",
    "throttleWriteBpsDevice",
    "throttleReadIOPSDevice",
    "throttleWriteIOPSDevice",
];

/// Refuses weights and throttles of devices of the host in a resources object. Loop devices are the guest's; the agent looks
/// whether it has the one that is named.
pub fn check_block_io(resources: &Value) -> Result<(), Refusal> {
    for list in BLOCK_LISTS {
        let pointer = format!("/blockIO/{list}");
        let devices = resources.pointer(&pointer).and_then(Value::as_array);
        for (index, device) in devices.into_iter().flatten().enumerate() {
            let number = |key: &str| device.get(key).and_then(Value::as_i64).unwrap_or(0);
            let (major, minor) = (number("major"), number("minor"));
            if major != LOOP {
                return Err(unsupported(
                    format!("linux.resources.blockIO.{list}[{index}] ({major}:{minor})"),
                    "is a block device of the host, which the guest does not have; only loop devices (major 7), which are the guest's own, have limits",
                ));
            }
        }
    }
    Ok(())
}

/// Whether the last rule for every device allows it everything.
fn may_use_all(rules: &[RuleView]) -> bool {
    let every = |rule: &&RuleView| {
        matches!(rule.r#type.as_str(), "" | "a")
            && rule.major.is_none_or(|n| n < 0)
            && rule.minor.is_none_or(|n| n < 0)
    };
    rules.iter().rfind(every).is_some_and(|rule| {
        rule.allow && (rule.access.is_empty() || "rwm".chars().all(|c| rule.access.contains(c)))
    })
}

fn lacks(device: &DeviceView, privileged: bool) -> Option<&'static str> {
    match device.r#type.as_str() {
        "c" | "u" if GUEST.contains(&(device.major, device.minor)) => None,
        "c" | "u" => Some("the guest has no such device; remove it from the container"),
        "b" if privileged && device.major == LOOP => None,
        "b" => Some(
            "is a block device of the host, which the guest does not have; mount a file system of it as a volume",
        ),
        // Fifos are made; other types are wrong, and the agent says so.
        _ => None,
    }
}
