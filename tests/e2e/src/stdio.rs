//! Standard streams: nothing is lost, nothing grows, and one that is stuck harms nobody else.

use std::{
    io::{Read, Write},
    time::{Duration, Instant},
};

use bulkhead_harness::{
    Context, Image, Keep, Outcome, Pod, Running, Suite, Test,
    command::{Input, hex},
    ensure, ensure_eq,
    runner::{ANY, MACHINES},
    test,
};
use sha2::{Digest, Sha256};

use crate::stdio;

const BUSYBOX: &[Image] = &[Image::Busybox];
/// Holds the lock of its stdout's pipe: splice(2) waits for a socket from which nothing comes. What was written before has to be still
/// unread then, so whoever reads it is kept busy by stderr.
const HOLD: &str = "
import os, socket, time
if os.fork() == 0:
    while True:
        os.write(2, b'y' * 4096)
a, b = socket.socketpair()
time.sleep(0.3)
os.write(1, b'x')
os.splice(a.fileno(), 1, 4096)
";
/// Memory of the machine, in MiB, that is not counted as growth.
const MACHINE: u64 = 512;
/// Growth that a transfer may cost a process, in KiB.
const GROWTH: u64 = 16 << 10;

/// The cases of this group.
pub const TESTS: &[Test] = &[
    test!(stdio::small_input_comes_back, BUSYBOX, ANY),
    test!(
        stdio::input_that_ends_before_the_pod_is_there_arrives,
        BUSYBOX,
        MACHINES
    ),
    test!(stdio::one_mebibyte_both_ways, BUSYBOX, ANY),
    test!(
        stdio::bulk_both_ways_without_loss_or_growth,
        BUSYBOX,
        MACHINES
    ),
    test!(stdio::bulk_in_an_exec_both_ways, BUSYBOX, ANY),
    test!(stdio::stderr_flood_arrives_whole, BUSYBOX, ANY).fast_host(),
    test!(
        stdio::pipe_held_by_its_process_stops_nobody_else,
        &[Image::Busybox, Image::Python],
        MACHINES
    )
    .fast_host(),
    test!(stdio::output_right_before_the_end_is_not_lost, BUSYBOX, ANY),
    test!(
        stdio::reader_that_is_stuck_stops_only_its_writer,
        BUSYBOX,
        MACHINES
    )
    .fast_host(),
    test!(stdio::input_that_nobody_reads_does_no_harm, BUSYBOX, ANY),
    test!(
        stdio::client_that_dies_does_not_stop_the_container,
        BUSYBOX,
        ANY
    ),
    test!(stdio::output_of_a_background_child_arrives, BUSYBOX, ANY),
];

fn small_input_comes_back(suite: &Suite) -> Outcome {
    let mut running = suite
        .busybox()
        .input(Input::Open)
        .sh("echo up; exec cat")
        .spawn()?;
    running.wait_for("up", suite.scale.seconds(30))?;
    running.write(b"hello\n")?;
    running.wait_for("hello", suite.scale.seconds(10))?;
    running.write(b"again\n")?;
    running.close_stdin();
    ensure_eq!("output", running.wait()?.ok()?.text(), "up\nhello\nagain");
    Ok(())
}

/// `echo hello | ctr run … cat`: with runc it often hangs, because ctr forgets an end that it sees too early.
fn input_that_ends_before_the_pod_is_there_arrives(suite: &Suite) -> Outcome {
    let run = suite
        .busybox()
        .input(Input::Bytes(b"hello\n".to_vec()))
        .args(&["cat"]);
    ensure_eq!("output", run.output()?.ok()?.text(), "hello");
    Ok(())
}

/// Bytes that no layer can compress away or confuse, without keeping them.
struct Noise(u64);

impl Noise {
    fn fill(&mut self, block: &mut [u8]) {
        for chunk in block.chunks_mut(8) {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            let bytes = self.0.to_le_bytes();
            chunk.copy_from_slice(bytes.get(..chunk.len()).unwrap_or(&bytes));
        }
    }
}

/// Feeds `len` bytes of noise to stdin, closes it, and returns their hash.
fn feed(
    running: &mut Running,
    len: u64,
) -> Outcome<std::thread::JoinHandle<std::io::Result<String>>> {
    let mut pipe = running.take_stdin()?;
    Ok(std::thread::spawn(move || {
        let (mut noise, mut hash, mut left) = (Noise(0x1234_5678_9abc_def1), Sha256::new(), len);
        let mut block = vec![0; 256 << 10];
        while left > 0 {
            let count = usize::try_from(left).unwrap_or(usize::MAX).min(block.len());
            let part = block.get_mut(..count).unwrap_or_default();
            noise.fill(part);
            hash.update(&*part);
            pipe.write_all(part)?;
            left -= count as u64;
        }
        Ok(hex(hash.finalize()))
    }))
}

fn there_and_back(mut running: Running, len: u64) -> Outcome {
    let feeder = feed(&mut running, len)?;
    let output = running.wait()?.ok()?;
    let sent = feeder
        .join()
        .map_err(|_| "the feeder panicked")?
        .context("feed stdin")?;
    ensure_eq!("bytes that came back", output.stdout_len, len);
    ensure_eq!("SHA-256 of what came back", output.stdout_hash, sent);
    Ok(())
}

/// stderr says when the container is up, so that stdin's end meets a task that can be told of it.
fn echo(suite: &Suite) -> bulkhead_harness::Run<'_> {
    suite
        .busybox()
        .input(Input::Open)
        .keep(Keep::Hash)
        .sh("echo up >&2; exec cat")
}

fn wait_for_stderr(suite: &Suite, running: &Running) -> Outcome {
    let end = Instant::now() + suite.scale.seconds(30);
    while !running.stderr().contains("up") {
        ensure!(
            Instant::now() < end,
            "the container is not up: {}",
            running.stderr()
        );
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

fn one_mebibyte_both_ways(suite: &Suite) -> Outcome {
    let running = echo(suite).spawn()?;
    wait_for_stderr(suite, &running)?;
    there_and_back(running, 1 << 20)
}

fn memory(pod: &Pod<'_>) -> Outcome<Vec<(String, u64)>> {
    let mut all = Vec::new();
    for process in pod.processes() {
        // The emulator's translation cache grows with the code that runs; it is not a buffer of the stream.
        if !process.name.starts_with("qemu") {
            all.push((process.name.clone(), process.memory_kib(MACHINE)?));
        }
    }
    Ok(all)
}

fn bulk_both_ways_without_loss_or_growth(suite: &Suite) -> Outcome {
    let (pod, running) = echo(suite).seconds(150).attach()?;
    wait_for_stderr(suite, &running)?;
    let before = memory(&pod)?;
    ensure!(before.len() >= 3, "processes of the pod: {before:?}");
    let most = std::sync::Mutex::new(before.clone());
    let done = std::sync::atomic::AtomicBool::new(false);
    let processes = pod.processes();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                for process in &processes {
                    let Ok(now) = process.memory_kib(MACHINE) else {
                        continue;
                    };
                    let mut most = most
                        .lock()
                        .unwrap_or_else(std::sync::PoisonError::into_inner);
                    for (name, kib) in most.iter_mut().filter(|(name, _)| *name == process.name) {
                        let _ = name;
                        *kib = now.max(*kib);
                    }
                }
                std::thread::sleep(Duration::from_millis(500));
            }
        });
        let end = there_and_back(running, suite.scale.bulk);
        done.store(true, std::sync::atomic::Ordering::Relaxed);
        end
    })?;
    let most = most
        .into_inner()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    for ((name, before), (_, most)) in before.iter().zip(&most) {
        ensure!(
            *most <= before + GROWTH,
            "{name} grew from {before} KiB to {most} KiB"
        );
    }
    pod.delete()?;
    Ok(())
}

fn bulk_in_an_exec_both_ways(suite: &Suite) -> Outcome {
    let pod = suite.busybox().sh("sleep 1000").detach()?;
    let exec = pod
        .exec(&["sh", "-c", "echo up >&2; exec cat"])
        .input(Input::Open);
    let running = exec.keep(Keep::Hash).seconds(60).spawn()?;
    wait_for_stderr(suite, &running)?;
    there_and_back(running, suite.scale.bulk / 16)?;
    pod.end()?;
    Ok(())
}

fn stderr_flood_arrives_whole(suite: &Suite) -> Outcome {
    let len = 32 << 20;
    let script = format!("head -c {len} /dev/zero | tr '\\0' e >&2; echo done");
    let output = suite.busybox().sh(script).output()?.ok()?;
    ensure_eq!("bytes of stderr", output.stderr.len(), len);
    ensure!(
        output.stderr.iter().all(|&b| b == b'e'),
        "stderr has other bytes"
    );
    ensure_eq!("stdout", output.text(), "done");
    Ok(())
}

fn output_right_before_the_end_is_not_lost(suite: &Suite) -> Outcome {
    let pod = suite.busybox().sh("sleep 1000").detach()?;
    for round in 0..suite.scale.rounds {
        let script = format!(
            "for i in 1 2 3 4 5 6 7 8 9; do echo {round}.$i; echo e$i >&2; done; exec echo last"
        );
        let output = pod.exec(&["sh", "-c", &script]).output()?.ok()?;
        let expected: String = (1..10)
            .map(|i| format!("{round}.{i}\n"))
            .collect::<String>()
            + "last";
        ensure_eq!("stdout", output.text(), expected);
        ensure_eq!("lines of stderr", output.errors().lines().count(), 9);
    }
    pod.end()?;
    // The same for a container's first process, whose end ends the machine.
    for _ in 0..(suite.scale.rounds / 10).max(2) {
        let output = suite
            .busybox()
            .sh("seq 1 20000; exec echo last")
            .output()?
            .ok()?;
        ensure_eq!("lines", output.text().lines().count(), 20001);
        ensure!(output.text().ends_with("20000\nlast"), "the end is lost");
    }
    Ok(())
}

fn pipe_held_by_its_process_stops_nobody_else(suite: &Suite) -> Outcome {
    let run = suite.run(Image::Python).args(&["sleep", "1000000"]);
    let pod = run.detach()?;
    // One in four meets a reader that is about to read.
    let held = (0..8).map(|_| pod.exec(&["python3", "-c", HOLD]).spawn());
    let held = held.collect::<Outcome<Vec<_>>>()?;
    std::thread::sleep(suite.scale.seconds(3));
    let joined = format!("io.kubernetes.cri.sandbox-id={}", pod.name());
    let beside = suite.busybox().flags(&["--annotation", &joined]);
    let beside = beside.args(&["echo", "on"]).seconds(20).output()?;
    ensure_eq!("a container beside", beside.ok()?.text(), "on");
    ensure_eq!("exit status", pod.end()?, 137);
    for exec in held {
        ensure_eq!("exec's exit status", exec.wait()?.status, 137);
    }
    Ok(())
}

fn reader_that_is_stuck_stops_only_its_writer(suite: &Suite) -> Outcome {
    let script = "echo up >&2; dd if=/dev/zero bs=64k count=3200 2>/dev/null; echo written >&2";
    let (pod, mut running) = suite
        .busybox()
        .keep(Keep::Unread)
        .sh(script)
        .seconds(120)
        .attach()?;
    wait_for_stderr(suite, &running)?;
    std::thread::sleep(suite.scale.seconds(1));
    let before = memory(&pod)?;
    std::thread::sleep(suite.scale.seconds(1));
    ensure!(
        !running.stderr().contains("written"),
        "200 MiB went into buffers"
    );
    for ((name, before), (_, after)) in before.iter().zip(memory(&pod)?) {
        ensure!(
            after <= before + GROWTH,
            "{name} grew from {before} KiB to {after} KiB"
        );
    }
    // An exec in the same pod and another pod go on.
    ensure_eq!(
        "exec beside",
        pod.exec(&["echo", "on"]).seconds(10).output()?.ok()?.text(),
        "on"
    );
    let beside = suite.busybox().args(&["echo", "on"]).seconds(15).output()?;
    ensure_eq!("pod beside", beside.ok()?.text(), "on");
    let mut pipe = running.unread.take().context("no pipe")?;
    let mut total = 0;
    let mut block = vec![0; 1 << 20];
    loop {
        let count = pipe.read(&mut block).context("read stdout")?;
        if count == 0 {
            break;
        }
        total += count;
    }
    ensure_eq!("bytes after all", total, 3200 << 16);
    running.wait()?.ok()?;
    pod.delete()?;
    Ok(())
}

fn input_that_nobody_reads_does_no_harm(suite: &Suite) -> Outcome {
    let (pod, mut running) = suite
        .busybox()
        .input(Input::Open)
        .sh("echo up; sleep 1000")
        .attach()?;
    running.wait_for("up", suite.scale.seconds(30))?;
    let feeder = feed(&mut running, 64 << 20)?;
    std::thread::sleep(suite.scale.seconds(1));
    ensure_eq!(
        "exec beside",
        pod.exec(&["echo", "on"]).seconds(10).output()?.ok()?.text(),
        "on"
    );
    pod.kill("SIGKILL")?.ok()?;
    running.wait()?.expect(137)?;
    drop(feeder.join());
    pod.delete()?;
    Ok(())
}

fn client_that_dies_does_not_stop_the_container(suite: &Suite) -> Outcome {
    // A shell whose write fails prints an error and goes on; SIGPIPE is ignored.
    let script = "trap '' PIPE; echo up; i=0; while [ $i -lt 1000 ]; do echo line; i=$((i+1)); sleep 0.05; done; sleep 1000";
    let (pod, running) = suite.busybox().sh(script).attach()?;
    running.wait_for("up", suite.scale.seconds(30))?;
    running.signal(rustix::process::Signal::KILL);
    drop(running);
    let pod = pod.without_client();
    // The next one sees what comes; one that dies in an exec is as little missed.
    for _ in 0..2 {
        let attached = pod.task(&["attach"]).spawn()?;
        attached.wait_for("line\nline", suite.scale.seconds(20))?;
        attached.signal(rustix::process::Signal::KILL);
        let exec = pod.exec(&["sh", "-c", "echo up; exec sleep 1000"]);
        let exec = exec.input(Input::Open).spawn()?;
        exec.wait_for("up", suite.scale.seconds(20))?;
        exec.signal(rustix::process::Signal::KILL);
    }
    std::thread::sleep(suite.scale.seconds(1));
    ensure_eq!(
        "exec",
        pod.exec(&["echo", "on"]).seconds(10).output()?.ok()?.text(),
        "on"
    );
    ensure_eq!(
        "status",
        pod.status()?.map(|(_, s)| s),
        Some("RUNNING".to_owned())
    );
    pod.end()?;
    Ok(())
}

fn output_of_a_background_child_arrives(suite: &Suite) -> Outcome {
    let pod = suite.busybox().sh("sleep 1000").detach()?;
    let output = pod
        .exec(&["sh", "-c", "(sleep 0.3; echo late) & echo early; wait"])
        .output()?;
    ensure_eq!("output", output.ok()?.text(), "early\nlate");
    pod.end()?;
    Ok(())
}
