//! The guest alone, in virtual time: kernel, initramfs and command line of the product in QEMU, where each instruction is a
//! nanosecond (`-icount shift=0,sleep=off`). What this machine does besides changes nothing: runs agree to the nanosecond.
//!
//! `clock.c` is PID 1 before the agent and notes when it begins and when the agent calls the host to say that it serves. Nothing
//! before that call waits for the host, so the devices need not answer. Time counts from reset; the firmware takes less
//! than 0.1 ms of it. Other than on KVM the kernel is entered through PVH, and ticks come from the PIT: KVM's guests have a timer
//! that needs no calibration, QEMU's have not (200 ms).

mod silent;

use std::{
    fmt::Write as _,
    fs,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::mpsc,
    time::{Duration, Instant},
};

use bulkhead_harness::{
    Engine,
    failure::{Context, Outcome, read, write},
};

use crate::{Plan, figure::Figure};

/// What the kernel is told; the VMM's own.
const COMMAND_LINE: &str = include_str!("../../../../vmm/src/arch/x86_64/cmdline.txt");
/// Starts the clock.
const CLOCK: &str = "rdinit=/clock";
/// In virtual time the kernel must be told how fast its counter runs, and that ticks come from the PIT.
const VIRTUAL: &str = "tsc_early_khz=1000000 nolapic_timer";
/// As the shim makes a machine.
const MEMORY_MIB: u32 = 512;
const NET_SLOTS: usize = 4;
const CID: u64 = 3;

/// Lets `clock.c` note every system call.
const ALL_CALLS: &str = "benchcalls=1";
/// Its last line.
const END: &str = "clock end";
const EXECVE: u64 = 59;
/// Time that a start may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(120);

/// What is started.
#[derive(Clone, Copy, Debug)]
pub struct Product<'a> {
    /// Folder with kernel and initramfs.
    pub dist: &'a Path,
    /// An archive with `clock.c`, compiled.
    pub clock: &'a Path,
}

/// A start, in nanoseconds since reset.
#[derive(Debug, Default)]
pub struct Start {
    /// The kernel was done.
    pub init: u64,
    /// The agent served.
    pub ready: u64,
    /// System calls of the agent: number, begin and end of what noting it took.
    calls: Vec<[u64; 3]>,
}

impl Start {
    fn parse(console: &str) -> Outcome<Self> {
        let mut start = Self::default();
        for line in console.lines() {
            let words: Vec<&str> = line.split_whitespace().collect();
            let number = |at: usize| words.get(at)?.parse::<u64>().ok();
            if let ["clock", ..] = words[..]
                && let (Some(init), Some(ready)) = (number(1), number(2))
            {
                (start.init, start.ready) = (init, ready);
            } else if let (Some(call), Some(begin), Some(end)) = (number(0), number(1), number(2)) {
                start.calls.push([call, begin, end]);
            }
        }
        // What came before is the clock's own.
        let becomes_agent = start.calls.iter().position(|call| call[0] == EXECVE);
        start.calls.drain(..becomes_agent.map_or(0, |at| at + 1));
        match start.ready > start.init && start.init > 0 {
            true => Ok(start),
            false => Err(format!("the guest told no time: {console}").into()),
        }
    }

    /// When each system call came, for whoever looks for the time.
    fn listing(&self) -> String {
        let mut text = String::from(
            "Number of each system call of the agent, and ms from the end of noting the one before (some 0.01 ms are the noting):\n",
        );
        for pair in self.calls.windows(2) {
            if let [[_, _, before], [call, begin, _]] = pair {
                let ms = begin.saturating_sub(*before) as f64 / 1e6;
                let _ = writeln!(text, "{call:4} {ms:8.3}");
            }
        }
        text
    }
}

/// `guest::*`; needs no containerd.
pub fn figures(product: Product<'_>, plan: &Plan) -> Vec<Figure> {
    const ROUNDS: u32 = 3;
    let mut time = Figure::new(
        "guest::virtual_time",
        "from reset until the agent serves, 1 ns an instruction",
        "ms",
    );
    let mut calls = Figure::new(
        "guest::system_calls",
        "system calls of the agent until it serves",
        "calls",
    );
    if plan.wants(&time.id) {
        let starts: Outcome<Vec<Start>> = (0..ROUNDS).map(|_| start(product, "")).collect();
        match starts {
            Ok(starts) => {
                let ms =
                    |of: fn(&Start) -> u64| starts.iter().map(|s| of(s) as f64 / 1e6).collect();
                time.add_part("kernel", ms(|s| s.init));
                time.add_part("agent", ms(|s| s.ready - s.init));
                time.add_part("until the agent serves", ms(|s| s.ready));
            }
            Err(error) => time.missing.push(error.to_string()),
        }
    }
    if plan.wants(&calls.id) {
        match start(product, ALL_CALLS) {
            Ok(start) => {
                calls.add_part("agent", vec![start.calls.len() as f64]);
                calls.notes.push(start.listing());
            }
            Err(error) => calls.missing.push(error.to_string()),
        }
    }
    let asked = [time, calls]
        .into_iter()
        .filter(|figure| plan.wants(&figure.id));
    asked.collect()
}

/// Starts the guest once, with more on its kernel's command line.
pub fn start(product: Product<'_>, parameters: &str) -> Outcome<Start> {
    let parameters = format!("{CLOCK} {VIRTUAL} {parameters}");
    let accelerator = [
        "-accel",
        "tcg,thread=single",
        "-icount",
        "shift=0,sleep=off",
    ];
    // With LA57 the emulator faults at boot.
    run(product, &accelerator, "max,-la57", &parameters).and_then(|console| Start::parse(&console))
}

/// Milliseconds from the emulator's start until the agent serves, by this machine's clock.
pub fn wall_ms(product: Product<'_>, engine: Engine) -> Outcome<f64> {
    let (accelerator, cpu) = match engine {
        Engine::Kvm => ("kvm", "host"),
        _ => ("tcg,thread=multi", "max,-la57"),
    };
    let begin = Instant::now();
    run(product, &["-accel", accelerator], cpu, CLOCK)?;
    Ok(begin.elapsed().as_secs_f64() * 1e3)
}

/// What the guest says until the agent serves.
fn run(product: Product<'_>, accelerator: &[&str], cpu: &str, parameters: &str) -> Outcome<String> {
    let folder = Folder::new()?;
    let bytes = |file: &Path| fs::read(file).context(format_args!("read {}", file.display()));
    let initramfs = bytes(&product.dist.join("initramfs.cpio"))?;
    // One archive behind the other is one to the kernel.
    let initramfs = [initramfs, bytes(product.clock)?].concat();
    write(folder.0.join("initramfs.cpio"), initramfs)?;
    let mut emulator = Emulator::start(product.dist, &folder.0, accelerator, cpu, parameters)?;
    let console = emulator.console();
    console.map_err(|console| {
        let log = read(folder.0.join("log")).unwrap_or_default();
        format!("the guest did not get ready: {console}{log}").into()
    })
}

/// QEMU; it is killed with the value.
struct Emulator(Child);

impl Emulator {
    fn start(
        dist: &Path,
        folder: &Path,
        accelerator: &[&str],
        cpu: &str,
        parameters: &str,
    ) -> Outcome<Self> {
        silent::listen(&folder.join("fs"), Vec::new())?;
        silent::listen(&folder.join("vsock"), CID.to_le_bytes().to_vec())?;
        let line = COMMAND_LINE.trim_ascii();
        let line = format!("{line} {parameters}");
        let log = fs::File::create(folder.join("log")).context("QEMU's log")?;
        let kernel = dist.join("vmlinux");
        let kernel =
            fs::canonicalize(&kernel).context(format_args!("find {}", kernel.display()))?;
        let memory = format!("memory-backend-memfd,id=ram,share=on,size={MEMORY_MIB}M");
        let mut command = Command::new("qemu-system-x86_64");
        command
            .current_dir(folder)
            .args([
                "-machine",
                "microvm,acpi=off,pit=on,pic=on,rtc=on,isa-serial=on,memory-backend=ram",
            ])
            .args(accelerator)
            // Time of day and random numbers are the same in each run.
            .args(["-cpu", cpu, "-smp", "1", "-seed", "1"])
            .args(["-rtc", "base=2025-01-01T00:00:00,clock=vm"])
            .args(["-m", &format!("{MEMORY_MIB}M"), "-object", &memory])
            .args([
                "-nodefaults",
                "-no-user-config",
                "-no-reboot",
                "-display",
                "none",
                "-monitor",
                "none",
            ])
            .args([
                "-global",
                "virtio-mmio.force-legacy=false",
                "-serial",
                "stdio",
            ])
            .args(["-device", "virtio-rng-device"])
            .args(["-device", "virtio-balloon-device,free-page-reporting=on"])
            .args(["-chardev", "socket,id=vsock,path=vsock"])
            .args(["-device", "vhost-user-vsock-device,chardev=vsock"])
            .args(["-chardev", "socket,id=fs,path=fs"])
            .args([
                "-device",
                "vhost-user-fs-device,num-request-queues=1,queue-size=512,tag=pod,chardev=fs",
            ]);
        for _ in 0..NET_SLOTS {
            command.args(["-device", "virtio-net-device"]);
        }
        command
            .arg("-kernel")
            .arg(kernel)
            .args(["-initrd", "initramfs.cpio", "-append", &line])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log);
        command
            .spawn()
            .context("start qemu-system-x86_64")
            .map(Self)
    }

    /// What the guest says up to the clock's last line; as an error if that does not come.
    fn console(&mut self) -> Result<String, String> {
        let (to, from) = mpsc::channel();
        let lines = self
            .0
            .stdout
            .take()
            .map(BufReader::new)
            .map(BufReader::lines);
        std::thread::spawn(move || {
            let lines = lines.into_iter().flatten().map_while(Result::ok);
            lines
                .take_while(|line| to.send(line.clone()).is_ok())
                .for_each(drop);
        });
        let mut text = String::new();
        while let Ok(line) = from.recv_timeout(PATIENCE) {
            let line = line.trim();
            if line == END {
                return Ok(text);
            }
            let _ = writeln!(text, "{line}");
        }
        Err(text)
    }
}

impl Drop for Emulator {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A folder of its own, which goes with the value.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Outcome<Self> {
        let path = std::env::temp_dir().join(format!("bulkhead-bench-{}", std::process::id()));
        fs::create_dir(&path).context(format_args!("make {}", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_console_without_times_is_no_start() {
        let start =
            Start::parse("a warning\nclock 90 120\n0 91 92\n59 95 96\n1 100 101\n2 105 106\n")
                .unwrap();
        assert_eq!((start.init, start.ready, start.calls.len()), (90, 120, 2));
        assert!(start.listing().contains("   2    0.000"));
        for said in ["", "clock: seccomp failed 22 0", "clock 120 90"] {
            assert!(Start::parse(said).is_err(), "{said}");
        }
    }
}
