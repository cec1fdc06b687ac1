//! Agents that lie: the real kernel, and `tests/hostile/agent` as its init.

use std::fs;

use bulkhead_harness::{Context, Image, Outcome, Suite, Test, pod::Pod, runner::MACHINES, test};

use crate::{
    agents,
    attack::{End, attack, beside},
};

const BUSYBOX: &[Image] = &[Image::Busybox];

/// Each attack by its name in the agent, and how the pod must end.
macro_rules! attacks {
    ($list:ident: $($name:ident: $end:expr, $meanwhile:expr;)*) => {
        $(fn $name(suite: &Suite) -> Outcome {
            lie(suite, stringify!($name), $end, $meanwhile)
        })*
        /// The cases.
        pub const $list: &[Test] = &[$(Test {
            name: concat!("agents::", stringify!($name)),
            ..test!(agents::$name, BUSYBOX, MACHINES)
        }),*];
    };
}

attacks! { TESTS:
    wrong_version: End::Fails(10, &["0.0.0-hostile"]), nothing;
    garbage_on_the_ready_port: End::Fails(10, &["the guest says other things than `ready`"]), nothing;
    ready_line_without_end: End::Fails(15, &["the guest says other things than `ready`"]), nothing;
    half_a_ready_line: End::Fails(20, &["the guest says other things than `ready`"]), nothing;
    ready_and_gone: End::Fails(10, &["guest-shutdown"]), nothing;
    ready_and_deaf: End::Fails(25, &["connecting to the agent"]), nothing;
    ready_a_thousand_times: End::Fails(20, &["guest-shutdown", "connecting to the agent"]), nothing;
    console_flood: End::Fails(20, &["Kernel panic - not syncing:", "guest-shutdown"]), nothing;
    connections_to_every_port: End::Fails(30, &["`ready`", "guest-shutdown"]), nothing;
    half_a_frame: End::Fails(20, &["failed to create shim task"]), nothing;
    frame_of_four_gigabytes: End::Fails(20, &["failed to create shim task"]), nothing;
    answers_that_nobody_asked_for: End::Fails(20, &["failed to create shim task"]), nothing;
    noise_for_frames: End::Fails(20, &["failed to create shim task"]), nothing;
    long_error: End::Fails(15, &["?[2J"]), nothing;
    error_of_megabytes: End::Fails(15, &["262144 is the most"]), nothing;
    gone_at_start: End::Fails(15, &["guest-shutdown"]), nothing;
    end_of_nonsense: End::Fails(15, &["status=255"]), nothing;
    answers_and_output_without_end: End::Killed(40), ask;
}

attacks! { LONG:
    never_ready: End::Fails(140, &["not ready after"]), nothing;
    create_never_answers: End::Fails(140, &["failed to create shim task"]), nothing;
}

fn nothing(_: &Pod) -> Outcome {
    Ok(())
}

/// Every question that is answered with megabytes: no more than an error may come of it.
fn ask(pod: &Pod) -> Outcome {
    for question in [["metrics"], ["ps"]] {
        pod.task(&question).output()?;
    }
    Ok(())
}

fn lie(suite: &Suite, name: &str, end: End, meanwhile: impl FnOnce(&Pod) -> Outcome) -> Outcome {
    let mut archive = fs::read(beside("hostile-initramfs.cpio")?).context("the initramfs")?;
    // The kernel unpacks one archive after another.
    archive.extend(file("attack", name.as_bytes()));
    archive.extend(file("TRAILER!!!", b""));
    let path = suite.folder("agents")?.join(format!("{name}.cpio"));
    fs::write(&path, archive).context("the initramfs with an attack")?;
    let done = attack(suite, &format!("initramfs = {path:?}"), end, meanwhile);
    fs::remove_file(&path).context("the initramfs with an attack")?;
    done.map(drop)
}

/// An entry of a cpio archive (newc): all numbers are 8 hexadecimal digits.
fn file(name: &str, body: &[u8]) -> Vec<u8> {
    let mut entry = String::from("070701");
    let numbers = [
        1000,
        0o100_644,
        0,
        0,
        1,
        0,
        body.len(),
        0,
        0,
        0,
        0,
        name.len() + 1,
        0,
    ];
    for number in numbers {
        entry.push_str(&format!("{number:08x}"));
    }
    entry.push_str(name);
    let mut entry = entry.into_bytes();
    entry.push(0);
    entry.resize(entry.len().next_multiple_of(4), 0);
    entry.extend_from_slice(body);
    entry.resize(entry.len().next_multiple_of(4), 0);
    entry
}
