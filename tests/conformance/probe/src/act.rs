//! One thing at a time: limits that are run into, and processes that do not behave.

use std::{
    fs::{self, File},
    io::{Read, Write},
    time::Duration,
};

use serde_json::{Value, json};

use crate::{disk, see, sys, syscalls};

/// Prints what it sees and stays until it is told to end, with every child that it inherits.
pub fn hold(sections: &str) -> i32 {
    sys::say(&see::see(sections, &[]));
    loop {
        match sys::wait_for(&[libc::SIGTERM, libc::SIGINT, libc::SIGCHLD]) {
            libc::SIGCHLD => {
                // Several may have ended; those that have not are asked about again by the next signal.
                while sys::call(libc::SYS_wait4, [usize::MAX, 0, 1, 0, 0]) > 0 {}
            }
            _ => return 0,
        }
    }
}

/// Does `action` and prints how it ended.
pub fn act(action: &str, words: &[&str]) -> i32 {
    let number = |place: usize| {
        words
            .get(place)
            .and_then(|w| w.parse::<u64>().ok())
            .unwrap_or(0)
    };
    let word = |place: usize| words.get(place).copied().unwrap_or("");
    let told = match action {
        "exit" => return i32::try_from(number(0)).unwrap_or(1),
        "raise" => {
            sys::kill(
                std::process::id().cast_signed(),
                i32::try_from(number(0)).unwrap_or(0),
            );
            std::thread::sleep(Duration::from_secs(1));
            json!("alive")
        }
        "forks" => forks(number(0)),
        "threads" => threads(number(0)),
        "eat" => {
            eat(number(0));
            json!("not killed")
        }
        "eat-in-child" => in_child(|| eat(number(0))),
        "spin" => spin(number(0), number(1)),
        "fill" => fill(word(0), number(1)),
        "files" => files(),
        "grow" => in_child(|| grow(word(0), number(1))),
        "call" => syscalls::one(word(0)),
        "call-in-child" => in_child(|| drop(syscalls::one(word(0)))),
        "mkdir" => json!(sys::outcome(&fs::create_dir(word(0)))),
        "ignore-term" => {
            sys::ignore(libc::SIGTERM);
            sys::say(&json!("ignoring"));
            std::thread::sleep(Duration::from_secs(number(0)));
            json!("slept")
        }
        "double-fork" => return double_fork(number(0), number(1)),
        "transfer" => disk::transfer(word(0), number(1), number(2), number(3)),
        "zombies" => zombies(number(0)),
        "hook" => return hook(word(0), number(1)),
        "sleep" => {
            sys::say(&json!("up"));
            std::thread::sleep(Duration::from_secs(number(0)));
            json!("slept")
        }
        other => {
            sys::say(&json!(format!("no action {other}")));
            return 2;
        }
    };
    sys::say(&told);
    0
}

/// A fork bomb with an end: children that stay, until the kernel says no or there are `most`.
fn forks(most: u64) -> Value {
    let mut children = Vec::new();
    let mut said = "ok".into();
    while (children.len() as u64) < most {
        match sys::fork() {
            0 => {
                std::thread::sleep(Duration::from_secs(100));
                sys::exit(0);
            }
            -1 => {
                said = sys::name(sys::errno());
                break;
            }
            child => children.push(child),
        }
    }
    for child in &children {
        sys::kill(*child, libc::SIGKILL);
    }
    for child in &children {
        sys::wait(*child);
    }
    json!({ "forked": children.len(), "then": said })
}

fn threads(most: u64) -> Value {
    let mut count = 0;
    let mut said = "ok".into();
    while count < most {
        let thread = std::thread::Builder::new().stack_size(64 << 10);
        match thread.spawn(|| std::thread::sleep(Duration::from_secs(100))) {
            Ok(_) => count += 1,
            Err(error) => {
                said = sys::name(error.raw_os_error().unwrap_or(0));
                break;
            }
        }
    }
    json!({ "started": count, "then": said })
}

/// Takes memory and touches it.
fn eat(mib: u64) {
    let mut kept: Vec<Vec<u8>> = Vec::new();
    for _ in 0..mib {
        let mut block = Vec::<u8>::new();
        if block.try_reserve_exact(1 << 20).is_err() {
            sys::exit(12);
        }
        block.resize(1 << 20, 1);
        kept.push(block);
    }
    std::hint::black_box(&kept);
}

fn in_child(work: impl FnOnce()) -> Value {
    let child = sys::fork();
    if child == 0 {
        work();
        sys::exit(0);
    }
    match sys::wait(child) {
        Some(code) if code > 128 => json!(format!("signal {}", code.wrapping_sub(128))),
        code => json!(code),
    }
}

/// Share of one CPU that `processes` busy ones got, in the first of eight windows that is within 5 % of `wanted` percent, or the
/// nearest. On a busy host all may get less than they are allowed: then none may have more, and one a fair part.
fn spin(wanted: u64, processes: u64) -> Value {
    let busy: Vec<i32> = (1..processes.max(1))
        .map(|_| match sys::fork() {
            0 => loop {
                std::hint::spin_loop();
            },
            child => child,
        })
        .collect();
    let used = || {
        // The whole container's time: /proc/self's is not enough with several processes.
        let others: f64 = busy.iter().map(|pid| cpu_time(*pid)).sum();
        sys::clock(libc::CLOCK_PROCESS_CPUTIME_ID) + others
    };
    let wanted = wanted as f64;
    let (mut best, mut most) = (f64::INFINITY, 0.0_f64);
    for _ in 0..8 {
        let (wall, start) = (sys::clock(libc::CLOCK_MONOTONIC), used());
        let mut now = wall;
        while now - wall < 2.0 {
            now = sys::clock(libc::CLOCK_MONOTONIC);
        }
        let percent = (used() - start) / (now - wall) * 100.0;
        most = most.max(percent);
        if (percent - wanted).abs() < (best - wanted).abs() {
            best = percent;
        }
        if (percent - wanted).abs() <= wanted * 0.05 {
            break;
        }
    }
    for child in &busy {
        sys::kill(*child, libc::SIGKILL);
        sys::wait(*child);
    }
    let near = (best - wanted).abs() <= wanted * 0.05;
    let holds = near || (most <= wanted * 1.05 && most >= wanted * 0.6);
    json!({ "holds": holds, "percent": (best * 10.0).round() / 10.0 })
}

fn cpu_time(pid: i32) -> f64 {
    let text = see::read(&format!("/proc/{pid}/schedstat")).unwrap_or_default();
    let nanoseconds: f64 = text
        .split(' ')
        .next()
        .and_then(|n| n.parse().ok())
        .unwrap_or(0.0);
    nanoseconds / 1e9
}

/// Writes a file until the kernel says no, or `most` MiB.
fn fill(path: &str, most: u64) -> Value {
    let block = vec![7; 64 << 10];
    let mut written = 0_u64;
    let mut said = "ok".into();
    match File::create(path) {
        Ok(mut file) => {
            while written < most << 20 {
                match file.write(&block) {
                    Ok(count) => written += count as u64,
                    Err(error) => {
                        said = sys::name(error.raw_os_error().unwrap_or(0));
                        break;
                    }
                }
            }
        }
        Err(error) => said = sys::name(error.raw_os_error().unwrap_or(0)),
    }
    let _ = fs::remove_file(path);
    json!({ "bytes": written, "then": said })
}

fn files() -> Value {
    let mut kept = Vec::new();
    let said = loop {
        match File::open("/") {
            Ok(file) if kept.len() < 100_000 => kept.push(file),
            Ok(_) => break "ok".into(),
            Err(error) => break sys::name(error.raw_os_error().unwrap_or(0)),
        }
    };
    json!({ "opened": kept.len(), "then": said })
}

fn grow(path: &str, bytes: u64) {
    let grown = File::create(path).and_then(|mut file| {
        let block = vec![0; usize::try_from(bytes).unwrap_or(0)];
        file.write_all(&block)?;
        file.write_all(b"more")
    });
    sys::exit(if grown.is_ok() { 0 } else { 1 });
}

/// Leaves a grandchild that holds the streams for `seconds`, and ends with `code`.
fn double_fork(seconds: u64, code: u64) -> i32 {
    if sys::fork() == 0 {
        if sys::fork() == 0 {
            std::thread::sleep(Duration::from_secs(seconds));
        }
        sys::exit(0);
    }
    sys::say(&json!("left a grandchild"));
    i32::try_from(code).unwrap_or(1)
}

/// Children that end and that nobody waits for.
fn zombies(count: u64) -> Value {
    let mut made = 0;
    for _ in 0..count {
        match sys::fork() {
            0 => sys::exit(0),
            -1 => break,
            _ => made += 1,
        }
    }
    json!({ "zombies": made })
}

/// A hook of the container: keeps the state it gets, and ends with `code`.
fn hook(path: &str, code: u64) -> i32 {
    let mut state = String::new();
    let _ = std::io::stdin().read_to_string(&mut state);
    let _ = fs::write(path, state);
    i32::try_from(code).unwrap_or(1)
}
