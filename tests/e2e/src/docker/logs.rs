//! `docker logs` of much output.

use bulkhead_harness::{
    Keep, Outcome, Scale, Suite, Test, command::hex, ensure, ensure_eq, runner::ANY, test,
};
use sha2::{Digest, Sha256};

use super::{BUSYBOX, Made, SMALL, call, run, text};
use crate::docker;

/// The cases of this group.
pub const TESTS: &[Test] = &[
    test!(docker::logs::bulk_is_kept_over_rotation, BUSYBOX, ANY)
        .docker()
        .fast_host(),
];

/// Bytes of a line without its number.
const LINE: usize = 1015;

/// How many lines of 1 KiB: a handful, or as many MiB as the variable says (the product's promise is 1024).
fn lines() -> u64 {
    let asked = std::env::var("BULKHEAD_E2E_LOGS_MIB").ok();
    let mib: u64 = asked.and_then(|text| text.parse().ok()).unwrap_or(32);
    mib << 10
}

fn bulk_is_kept_over_rotation(suite: &Suite) -> Outcome {
    let lines = lines();
    println!("         {}", Scale::size(lines << 10));
    let text_of_line = "x".repeat(LINE);
    let mut hash = Sha256::new();
    let mut length = 0;
    for number in 1..=lines {
        let line = format!("{number:6}\t{text_of_line}\n");
        length += line.len() as u64;
        hash.update(line);
    }
    let expected = (length, hex(hash.finalize()));
    // Docker's own words around a line make it somewhat longer: five files are more than enough, and three are needed.
    let size = format!("max-size={}k", lines / 3);
    let script = format!("yes {text_of_line} | head -n {lines} | cat -n");
    let limit = suite
        .scale
        .seconds(60 + u32::try_from(lines >> 10).unwrap_or(0));
    let made = Made::by(suite, &["rm", "-f", "bulk"]);
    let args = [
        "--name",
        "bulk",
        "--log-opt",
        &size,
        "--log-opt",
        "max-file=5",
        SMALL,
    ];
    let attached = run(suite, &[&args[..], &["sh", "-c", &script]].concat())?;
    let attached = attached.keep(Keep::Hash).limit(limit).output()?.ok()?;
    ensure_eq!(
        "what the client of `docker run` got",
        (attached.stdout_len, attached.stdout_hash),
        expected
    );
    let logs = call(suite, &["logs", "bulk"])?;
    let logs = logs.keep(Keep::Hash).limit(limit).output()?.ok()?;
    ensure_eq!("docker logs", (logs.stdout_len, logs.stdout_hash), expected);
    let last = text(suite, &["logs", "--tail", "1", "bulk"])?;
    let number = last.split_whitespace().next().unwrap_or_default();
    ensure_eq!("last line", number, lines.to_string());
    let path = text(suite, &["inspect", "-f", "{{.LogPath}}", "bulk"])?;
    let rotated = suite.command("ls").arg(format!("{path}.1")).output()?;
    ensure!(rotated.status == 0, "the log was not rotated: {path}");
    drop(made);
    Ok(())
}
