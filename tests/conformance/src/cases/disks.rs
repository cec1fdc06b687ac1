//! `linux.resources.blockIO` for a block device that the machine has: a loop device that another container of the pod makes.

use bulkhead_harness::{Context, Outcome};
use serde_json::{Value, json};

use crate::{
    case::{Case, case},
    host::When,
    side::{Bundle, Side},
};

/// Lists of devices with a rate.
const THROTTLES: [&str; 4] = [
    "throttleReadBpsDevice",
    "throttleWriteBpsDevice",
    "throttleReadIOPSDevice",
    "throttleWriteIOPSDevice",
];

/// Cases of the groups `bites` and `cgroups`. The machine's loop devices are not the host's: runc is not asked.
// A table: one case a line where it fits.
#[rustfmt::skip]
pub fn all() -> Vec<Case> {
    // Of a minor number that the test fills in.
    let of = |io: Value| json!({ "linux": { "resources": { "blockIO": io, "devices+": [
        { "allow": true, "type": "c", "major": 10, "minor": 237, "access": "rwm" }, { "allow": true, "type": "b", "major": 7, "access": "rwm" }] } } });
    let throttle = |field: &str, rate: u64| of(json!({ field: [{ "major": 7, "minor": 0, "rate": rate }] }));
    let slow = json!({ "throttled": "over 2 s", "free": "below 1 s" });
    vec![
        case("bites::a_device_with_write_bps_is_slow", throttle("throttleWriteBpsDevice", 1 << 20)).does("transfer write 1048576 3")
            .code(throttled).ours(slow.clone()).beyond(When::Always),
        case("bites::a_device_with_read_bps_is_slow", throttle("throttleReadBpsDevice", 1 << 20)).does("transfer read 1048576 3")
            .code(throttled).ours(slow.clone()).beyond(When::Always),
        case("bites::a_device_with_write_iops_is_slow", throttle("throttleWriteIOPSDevice", 10)).does("transfer write 4096 30")
            .code(throttled).ours(slow.clone()).beyond(When::Always),
        case("bites::a_device_with_read_iops_is_slow", throttle("throttleReadIOPSDevice", 10)).does("transfer read 4096 30")
            .code(throttled).ours(slow).beyond(When::Always),
        case("cgroups::io_limits_of_a_device", of(json!({
                "weight": 200, "weightDevice": [{ "major": 7, "minor": 0, "weight": 300 }],
                "throttleReadBpsDevice": [{ "major": 7, "minor": 0, "rate": 1_000_000 }], "throttleWriteBpsDevice": [{ "major": 7, "minor": 0, "rate": 2_000_000 }],
                "throttleReadIOPSDevice": [{ "major": 7, "minor": 0, "rate": 30 }], "throttleWriteIOPSDevice": [{ "major": 7, "minor": 0, "rate": 40 }] })))
            .sees("cgroup").code(limits).beyond(When::Always)
            .ours(json!({ "io.max": "7:N rbps=1000000 wbps=2000000 riops=30 wiops=40", "io.bfq.weight": "default 200\n7:N 300" })),
        case("cgroups::io_throttle_of_a_loop_device_that_is_missing", of(json!({ "throttleWriteBpsDevice": [{ "major": 7, "minor": 200, "rate": 1000 }] }))).sees("cgroup").beyond(When::Always)
            .refused(&["linux.resources.blockIO.throttleWriteBpsDevice", "7:200"]),
    ]
}

/// How long a transfer takes with the limits and without them.
fn throttled(side: &Side, bundle: Bundle) -> Outcome<Value> {
    with_disk(side, &bundle, |mut bundle, minor| {
        if let Some(args) = bundle.spec["process"]["args"].as_array_mut() {
            args.push(json!(minor.to_string()));
        }
        let with_limits = side.run(&bundle)?;
        if !with_limits.started {
            return Ok(json!({ "started": false, "error": with_limits.error }));
        }
        let free = side.run(&another(side, &bundle, None))?;
        let seconds = [&with_limits, &free].map(|end| end.seen["view"]["seconds"].as_f64());
        let [Some(slow), Some(fast)] = seconds else {
            return Ok(json!({ "throttled": with_limits.seen, "free": free.seen }));
        };
        Ok(json!({
            "throttled": if slow >= 2.0 { "over 2 s".into() } else { format!("{slow:.2} s") },
            "free": if fast < 1.0 { "below 1 s".into() } else { format!("{fast:.2} s") },
            "seconds": format!("{slow:.2} and {fast:.2}"),
        }))
    })
}

/// What the cgroup says of a device.
fn limits(side: &Side, bundle: Bundle) -> Outcome<Value> {
    with_disk(side, &bundle, |bundle, minor| {
        let end = side.run(&bundle)?;
        if !end.started {
            return Ok(json!({ "started": false, "error": end.error }));
        }
        let file = |name: &str| {
            let text = end.seen["view"]["cgroup"][name].as_str().unwrap_or("none");
            json!(text.replace(&format!("7:{minor} "), "7:N "))
        };
        Ok(json!({ "io.max": file("io.max"), "io.bfq.weight": file("io.bfq.weight") }))
    })
}

/// Runs `act` with a bundle whose limits are those of a loop device of the pod, and the device's number.
fn with_disk(
    side: &Side,
    bundle: &Bundle,
    act: impl FnOnce(Bundle, u64) -> Outcome<Value>,
) -> Outcome<Value> {
    let maker = another(side, bundle, Some(&["/probe", "loop", "16"]));
    let (pod, client) = side.start(&maker.name, &maker.spec)?.attach()?;
    let told = client.wait_for("}\n", side.suite.scale.seconds(20));
    let acted = told.and_then(|()| {
        let said: Value =
            serde_json::from_str(client.stdout().trim()).context("parse the loop device")?;
        let minor = said["minor"]
            .as_u64()
            .context(format_args!("no loop device: {said}"))?;
        let mut bundle = bundle.clone();
        let io = &mut bundle.spec["linux"]["resources"]["blockIO"];
        for list in THROTTLES.iter().chain(&["weightDevice"]) {
            for device in io
                .get_mut(*list)
                .and_then(Value::as_array_mut)
                .into_iter()
                .flatten()
            {
                device["minor"] = json!(minor);
            }
        }
        act(bundle, minor)
    });
    pod.kill("SIGTERM")?;
    client.wait()?;
    pod.delete()?;
    acted
}

/// The bundle under another name, without limits of devices.
fn another(side: &Side, bundle: &Bundle, args: Option<&[&str]>) -> Bundle {
    let mut bundle = bundle.clone();
    bundle.name = side.suite.name(side.kind.name());
    if let Some(resources) = bundle.spec["linux"]["resources"].as_object_mut() {
        resources.remove("blockIO");
    }
    if let Some(args) = args {
        bundle.spec["process"]["args"] = json!(args);
    }
    bundle
}
