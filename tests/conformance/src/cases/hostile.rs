//! Specs and images that are made to break a runtime. Each is refused as runc refuses it, or works; after each the pod's
//! first container must still run, on both sides.

use std::{
    fs,
    os::unix::fs::symlink,
    sync::atomic::{AtomicBool, Ordering},
};

use bulkhead_harness::Outcome;
use serde_json::{Value, json};

use crate::{
    case::{Case, Fixture, case},
    side::{Bundle, Side},
};

/// The group.
// A table: one case a line where it fits.
#[rustfmt::skip]
pub fn all() -> Vec<Case> {
    let tmpfs = |to: &str| json!({ "mounts+": [{ "type": "tmpfs", "source": "tmpfs", "destination": to }] });
    let bind = |to: &str| json!({ "mounts+": [{ "type": "bind", "source": "$DIR", "destination": to, "options": ["bind"] }] });
    let many = |count: usize| {
        let all: Vec<Value> = (0..count).map(|i| json!({ "type": "tmpfs", "source": "tmpfs", "destination": format!("/m/{i}") })).collect();
        let mut list = crate::case::base()["mounts"].as_array().cloned().unwrap_or_default();
        list.push(json!({ "type": "tmpfs", "source": "tmpfs", "destination": "/m" }));
        list.extend(all);
        json!({ "mounts": list })
    };
    let env = |count: usize, bytes: usize| {
        let all: Vec<String> = (0..count).map(|i| format!("V{i}={}", "x".repeat(bytes))).collect();
        json!({ "process": { "env": all } })
    };
    let long = format!("/{}", "n".repeat(300));
    let deep = "/d".repeat(1000);
    vec![
        case("hostile::ten_thousand_mounts", many(10_000)).sees("identity").code(patiently),
        case("hostile::tmpfs_over_proc", tmpfs("/proc")).sees("names").survives(),
        case("hostile::tmpfs_inside_proc", tmpfs("/proc/self")).sees("names").refused(&["/proc"]),
        case("hostile::tmpfs_over_sys_of_proc", tmpfs("/proc/sys/kernel")).sees("names").survives(),
        case("hostile::bind_over_proc", bind("/proc")).sees("names").refused(&["/proc"]),
        case("hostile::bind_over_a_file_of_proc", bind("/proc/self/attr")).sees("names").refused(&["/proc"]),
        case("hostile::mount_over_the_root_by_dots", bind("/../../..")).sees("names").survives(),
        case("hostile::mount_target_of_300_bytes", tmpfs(&long)).sees("names").refused(&["too long"]),
        case("hostile::mount_target_a_thousand_folders_deep", tmpfs(&deep)).sees("names"),
        case("hostile::mount_target_with_a_zero_byte", tmpfs("/a\u{0}b")).sees("names").refused(&["mounts"]),
        case("hostile::mount_target_empty", tmpfs("")).sees("names").refused(&["mounts"]),
        case("hostile::etc_is_a_link_to_the_root", json!({ "process": { "cwd": "/etc" } })).with(&[Fixture::Link("$ROOT/old", "/"), Fixture::Link("$ROOT/lib", "/")])
            .sees("process /lib"),
        case("hostile::proc_is_a_link_to_the_root", json!({})).with(&[Fixture::Link("$ROOT/proc", "/")]).sees("names").refused(&["/proc"]),
        case("hostile::proc_is_a_link_to_a_folder", json!({})).with(&[Fixture::Link("$ROOT/proc", "/tmp")]).sees("names").refused(&["/proc"]),
        case("hostile::dev_is_a_link_to_the_root", json!({})).with(&[Fixture::Link("$ROOT/dev", "/")]).sees("names").survives(),
        case("hostile::dev_is_a_link_to_a_folder", json!({})).with(&[Fixture::Link("$ROOT/dev", "/tmp")]).sees("names,devices"),
        case("hostile::sys_is_a_link_to_the_root", json!({})).with(&[Fixture::Link("$ROOT/sys", "/")]).sees("names").refused(&["/sys"]),
        case("hostile::dev_null_of_the_image_is_a_link", json!({ "mounts": [{ "type": "proc", "source": "proc", "destination": "/proc" }] }))
            .with(&[Fixture::Link("$ROOT/dev/null", "/etc/passwd")]).sees("names").survives(),
        case("hostile::passwd_of_the_image_is_a_link_that_leaves", json!({ "process": { "env": [] } })).with(&[Fixture::Link("$ROOT/etc/group", "/../../../../etc/passwd")])
            .sees("environment /etc/group"),
        case("hostile::a_circle_of_links", tmpfs("/a/x")).with(&[Fixture::Link("$ROOT/a", "b"), Fixture::Link("$ROOT/b", "a")]).sees("names").refused(&["mounts"]),
        case("hostile::a_link_farm_that_swaps", tmpfs("/farm/x/y")).sees("names").code(swapping),
        case("hostile::environment_of_2_mb_in_one_entry", env(1, 2 << 20)).sees("names").refused(&["argument list too long"]),
        case("hostile::environment_of_2_mb_in_entries", env(2000, 1000)).sees("names").survives(),
        case("hostile::spec_over_its_limit", env(35, 100_000)).sees("names").refused(&["config.json"]),
        case("hostile::environment_of_100_kb_in_one_entry", env(1, 100_000)).sees("environment").both(json!({ "environment": { "count": 2 } })),
        case("hostile::environment_of_1_mb_in_entries", env(1000, 1000)).sees("names"),
        case("hostile::environment_of_100000_entries", env(100_000, 1)).sees("names"),
        case("hostile::environment_beyond_what_exec_takes", {
            let mut patch = env(5, 100_000);
            patch["process"]["rlimits"] = json!([{ "type": "RLIMIT_STACK", "soft": 1 << 20, "hard": 1 << 20 }]);
            patch
        }).sees("names").refused(&["argument list too long"]),
        case("hostile::two_thousand_arguments", json!({ "process": { "args": std::iter::once("/probe".to_owned()).chain(["see".into(), "names".into()])
            .chain((0..2000).map(|i| format!("/{i}"))).collect::<Vec<_>>() } })).code(started),
        case("hostile::a_thousand_rlimits", json!({ "process": { "rlimits": (0..1000).map(|_| json!({ "type": "RLIMIT_CORE", "soft": 1, "hard": 1 })).collect::<Vec<_>>() } }))
            .sees("names").ours_refuses("RLIMIT_CORE", "the spec: a limit that is listed twice is an error; runc takes the last"),
        case("hostile::seventy_thousand_groups", json!({ "process": { "user": { "additionalGids": (0..70_000).collect::<Vec<u32>>() } } })).sees("names").refused(&["roups"]),
        case("hostile::a_thousand_groups", json!({ "process": { "user": { "additionalGids": (0..1000).collect::<Vec<u32>>() } } })).sees("identity"),
        case("hostile::ten_thousand_device_rules", json!({ "linux": { "resources": { "devices": (0..10_000)
            .map(|i| json!({ "allow": true, "type": "c", "major": 1000 + i / 100, "minor": i % 100, "access": "rwm" })).collect::<Vec<_>>() } } })).sees("names").survives(),
        case("hostile::a_thousand_masked_paths", json!({ "linux": { "maskedPaths": (0..1000).map(|i| format!("/none/{i}")).collect::<Vec<_>>() } })).sees("names"),
        case("hostile::a_thousand_annotations", json!({ "annotations": (0..1000).map(|i| (format!("org.example.{i}"), json!("v"))).collect::<serde_json::Map<_, _>>() })).sees("names"),
        case("hostile::every_system_call_in_two_hundred_rules", json!({ "linux": { "seccomp": { "defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64"],
            "syscalls": (0..200).map(|i| json!({ "names": ["keyctl"], "action": "SCMP_ACT_ERRNO", "args": [{ "index": 0, "value": i, "op": "SCMP_CMP_EQ" }] })).collect::<Vec<_>>() } } }))
            .sees("names"),
        case("hostile::json_a_thousand_levels_deep", json!({})).sees("names").raw(|spec| {
            let text = spec.to_string();
            let deep = format!("{}{}", "[".repeat(1000), "]".repeat(1000));
            format!("{{\"deep\":{deep},{}", text.trim_start_matches('{'))
        })
        .survives(),
        case("hostile::config_of_8_mb", json!({})).sees("names").raw(|spec| {
            let text = spec.to_string();
            format!("{{\"filler\":\"{}\",{}", "x".repeat(8 << 20), text.trim_start_matches('{'))
        })
        .ours_refuses("config.json", "a config.json above 2 MiB does not fit the messages between shim and agent"),
    ]
}

/// With more time than others have.
fn patiently(side: &Side, bundle: Bundle) -> Outcome<Value> {
    let running = side
        .start(&bundle.name, &bundle.spec)?
        .seconds(120)
        .spawn()?;
    let end = side.end(&bundle, running)?;
    Ok(if end.started {
        end.seen["view"].clone()
    } else {
        json!({ "started": false, "error": end.error })
    })
}

fn started(side: &Side, bundle: Bundle) -> Outcome<Value> {
    let end = side.run(&bundle)?;
    Ok(json!({ "started": end.started, "status": end.seen["status"], "error": end.error }))
}

/// A folder of the rootfs becomes a link out of it and back all the time while containers with a mount below it are
/// made. Each start works or fails; what counts is that the mount never lands outside.
fn swapping(side: &Side, bundle: Bundle) -> Outcome<Value> {
    let (folder, link, target) = (
        bundle.root.join("farm"),
        bundle.root.join("link"),
        bundle.folder.join("victim"),
    );
    let _ = fs::create_dir_all(&folder);
    let _ = fs::create_dir_all(target.join("x/y"));
    let _ = symlink(&target, &link);
    let stop = AtomicBool::new(false);
    let mut escaped = false;
    std::thread::scope(|scope| -> Outcome {
        scope.spawn(|| {
            let spare = bundle.root.join("spare");
            while !stop.load(Ordering::Relaxed) {
                let _ = fs::rename(&folder, &spare);
                let _ = fs::rename(&link, &folder);
                let _ = fs::rename(&folder, &link);
                let _ = fs::rename(&spare, &folder);
            }
        });
        let mut run = || -> Outcome {
            for _ in 0..5 {
                let running = side.spawn(&bundle)?;
                running.wait()?;
                let _ = side.suite.ctr(["container", "rm", &bundle.name]).output();
                let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
                let victim = target.to_string_lossy().into_owned();
                escaped |= table.lines().any(|line| line.contains(&victim));
            }
            Ok(())
        };
        let end = run();
        stop.store(true, Ordering::Relaxed);
        end
    })?;
    Ok(json!({ "escaped": escaped }))
}
