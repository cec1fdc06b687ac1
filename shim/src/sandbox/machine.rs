//! What the shim and the VMM tell each other in files: `machine.json` and `exit.json`.

use std::{
    fmt, fs,
    io::{self, Read, Seek, SeekFrom},
    os::{fd::AsRawFd, unix::process::ExitStatusExt},
    path::Path,
    process::ExitStatus,
};

use serde::{Deserialize, Serialize};

use bulkhead_protocol::limits::NET_SLOTS;

use super::{
    growth::Sizing,
    network,
    state::write_private,
    timeline::{OfVmm, Stages},
    uplink,
};
use crate::{
    config::{Config, Engine, JailLayer},
    limits::EXIT_JSON,
    spec::CgroupPath,
};

/// See [`End::out_of_memory`].
const OUT_OF_MEMORY: &str = "out-of-memory";
/// Console bytes that an error quotes.
const QUOTE_MAX: usize = 600;

/// vCPUs and memory of a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Size {
    /// vCPUs.
    pub vcpus: u64,
    /// Memory in MiB.
    pub memory_mib: u64,
}

#[derive(Serialize)]
struct Machine<'a> {
    engine: Engine,
    kernel: &'a Path,
    initramfs: &'a Path,
    vcpus: u64,
    memory_mib: u64,
    vcpus_max: u64,
    memory_max_mib: u64,
    qemu: &'a str,
    vsock: Vsock,
    fs: Fs,
    net: Vec<Net>,
    blocks: [(); 0],
    debug_shell: bool,
    jail: Jail<'a>,
}

#[derive(Serialize)]
struct Jail<'a> {
    uid: u32,
    gid: u32,
    require: &'a [JailLayer],
}

#[derive(Serialize)]
struct Net {
    id: String,
    mac: String,
}

#[derive(Serialize)]
struct Vsock {
    cid: u32,
    ports: [u32; 2],
    uplink_fd: i32,
}

#[derive(Serialize)]
struct Fs {
    tag: &'static str,
    worker_fds: Vec<i32>,
}

/// Writes `machine.json`.
pub fn write_machine(
    dir: &Path,
    config: &Config,
    sizing: Sizing,
    uid: u32,
    workers: &[impl AsRawFd],
    uplink: &impl AsRawFd,
) -> io::Result<()> {
    let machine = Machine {
        engine: config.engine,
        kernel: &config.kernel,
        initramfs: &config.initramfs,
        vcpus: sizing.start.vcpus,
        memory_mib: sizing.start.memory_mib,
        vcpus_max: sizing.most.vcpus,
        memory_max_mib: sizing.most.memory_mib,
        qemu: &config.qemu,
        vsock: Vsock {
            cid: 3,
            ports: uplink::PORTS,
            uplink_fd: uplink.as_raw_fd(),
        },
        fs: Fs {
            tag: "pod",
            worker_fds: workers.iter().map(AsRawFd::as_raw_fd).collect(),
        },
        net: (0..NET_SLOTS)
            .map(|slot| Net {
                id: network::slot_id(slot),
                mac: network::slot_mac(slot),
            })
            .collect(),
        blocks: [],
        debug_shell: config.debug_shell,
        jail: Jail {
            uid,
            gid: uid,
            require: &config.jail.require,
        },
    };
    let text = serde_json::to_string(&machine).map_err(io::Error::other)?;
    write_private(&dir.join("machine.json"), &text)
}

/// Why a machine is no more.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct End {
    /// A word of the list in `docs/architecture.md`, or ours.
    pub reason: String,
    /// One line.
    #[serde(default)]
    pub detail: String,
    /// The console's last bytes.
    #[serde(default)]
    pub console: String,
    /// How far the machine came.
    #[serde(flatten)]
    pub of_vmm: OfVmm,
    /// How far the pod's start came.
    #[serde(skip)]
    pub stages: Stages,
    /// What to do about it, if that is known.
    #[serde(skip)]
    pub advice: String,
}

impl End {
    /// Reads `exit.json`; without one, the exit status tells.
    pub fn read(dir: &Path, status: io::Result<ExitStatus>) -> Self {
        if let Ok(end) = Self::read_file(&dir.join("exit.json")) {
            return end;
        }
        let log = last_word(&dir.join("vmm.log"));
        let detail = match status {
            Ok(status) => match (status.signal(), status.code()) {
                (Some(libc::SIGSYS), _) => {
                    "bulkhead-vmm made a system call that its jail forbids: \
                    the host's kernel log tells which (dmesg, \"syscall=\")"
                        .into()
                }
                (Some(signal), _) => format!("bulkhead-vmm was killed by signal {signal}"),
                (_, Some(code)) => format!("bulkhead-vmm exited with code {code} {log}"),
                _ => "bulkhead-vmm is gone".into(),
            },
            Err(e) => format!("bulkhead-vmm ended, how is not known ({e}) {log}"),
        };
        Self {
            reason: "vmm-died".into(),
            detail: detail.trim_end().into(),
            ..Self::default()
        }
    }

    fn read_file(file: &Path) -> io::Result<Self> {
        let mut text = Vec::new();
        fs::File::open(file)?
            .take(EXIT_JSON)
            .read_to_end(&mut text)?;
        serde_json::from_slice(&text).map_err(io::Error::other)
    }

    /// The host's kernel has killed one of the pod's processes: `path` or a cgroup above it is at its limit, or the host is.
    pub fn out_of_memory(&mut self, path: &CgroupPath) {
        self.reason = OUT_OF_MEMORY.into();
        self.detail =
            format!("the host's kernel killed a process of cgroup {path} for want of memory");
        self.advice = "raise the memory limit of the cgroups above it (in Kubernetes: the pod's limits, or the RuntimeClass's overhead)".into();
    }

    /// Whether the host had no memory for it.
    pub fn is_out_of_memory(&self) -> bool {
        self.reason == OUT_OF_MEMORY
    }

    /// Whether it ended as asked.
    pub fn is_orderly(&self) -> bool {
        matches!(self.reason.as_str(), "stopped" | "guest-shutdown")
    }
}

/// For the log, in one line: `reason: detail; console: last lines`, without control characters.
impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.reason)?;
        if !self.detail.is_empty() {
            write!(f, ": {}", printable(&self.detail, QUOTE_MAX))?;
        }
        if !self.console.is_empty() && !self.is_orderly() {
            write!(f, "; console: {}", printable(&self.console, QUOTE_MAX))?;
        }
        Ok(())
    }
}

/// The last `max` bytes of `text` in one line; the guest wrote it, so no control characters pass.
pub fn printable(text: &str, max: usize) -> String {
    let mut start = text.len().saturating_sub(max);
    while !text.is_char_boundary(start) {
        start = start.saturating_add(1);
    }
    let tail = text.get(start..).unwrap_or_default();
    tail.lines()
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .map(|line| {
            line.chars()
                .map(|c| if is_shown(c) { c } else { '?' })
                .collect::<String>()
        })
        .collect::<Vec<_>>()
        .join(" | ")
}

/// Whether a character of the guest's may reach a terminal: no control, and none that turns the direction of writing.
pub fn is_shown(c: char) -> bool {
    !c.is_control()
        && !matches!(c, '\u{200e}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// The last error in a log, or its last line if there is none, in parentheses. Of two processes that write, the one that failed
/// need not be the last.
pub(super) fn last_word(file: &Path) -> String {
    let Ok(mut file) = fs::File::open(file) else {
        return String::new();
    };
    let length = file.metadata().map_or(0, |m| m.len());
    let _ = file.seek(SeekFrom::Start(length.saturating_sub(EXIT_JSON)));
    let mut text = Vec::new();
    let _ = (&mut file).take(EXIT_JSON).read_to_end(&mut text);
    let text = String::from_utf8_lossy(&text);
    let mut lines = text.lines().rev().filter(|l| !l.trim().is_empty());
    lines
        .clone()
        .find(|l| l.contains(" ERROR "))
        .or_else(|| lines.next())
        .map(|l| format!("({})", printable(l, 300)))
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_error_is_the_last_word_and_else_the_last_line() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        assert_eq!(last_word(&log), "");
        for (text, word) in [
            ("T INFO one\nT WARN two\n\n", "(T WARN two)"),
            (
                "T ERROR one\nT ERROR two\nT INFO serving\n",
                "(T ERROR two)",
            ),
        ] {
            fs::write(&log, text).unwrap();
            assert_eq!(last_word(&log), word);
        }
    }

    #[test]
    fn machine_json_has_the_documented_keys_and_no_others() {
        let dir = tempfile::tempdir().unwrap();
        let config = Config::parse("", Path::new("/c"), Path::new("/opt")).unwrap();
        let size = Size {
            vcpus: 2,
            memory_mib: 256,
        };
        let fds = [std::fs::File::open("/dev/null").unwrap()];
        let sizing = Sizing {
            least: size,
            start: size,
            most: Size {
                vcpus: 4,
                memory_mib: 1024,
            },
        };
        write_machine(dir.path(), &config, sizing, 7, &fds, &fds[0]).unwrap();
        let text = fs::read_to_string(dir.path().join("machine.json")).unwrap();
        let value: serde_json::Value = serde_json::from_str(&text).unwrap();
        let expected = serde_json::json!({
            "engine": "kvm", "kernel": "/opt/vmlinux", "initramfs": "/opt/initramfs.cpio", "vcpus": 2,
            "memory_mib": 256, "vcpus_max": 4, "memory_max_mib": 1024, "qemu": "qemu-system-x86_64",
            "vsock": { "cid": 3, "ports": [1026, 1028], "uplink_fd": fds[0].as_raw_fd() }, "jail": { "uid": 7, "gid": 7, "require": [] },
            "fs": { "tag": "pod", "worker_fds": [fds[0].as_raw_fd()] }, "blocks": [], "debug_shell": false,
            "net": [{ "id": "n0", "mac": "02:62:6b:00:00:00" }, { "id": "n1", "mac": "02:62:6b:00:00:01" },
                    { "id": "n2", "mac": "02:62:6b:00:00:02" }, { "id": "n3", "mac": "02:62:6b:00:00:03" }]
        });
        assert_eq!(value, expected);
    }

    #[test]
    fn an_end_quotes_reason_panic_line_and_console_without_control_characters() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(
            dir.path().join("exit.json"),
            r#"{"reason":"guest-panic","detail":"Kernel panic - not syncing: sysrq","console":"a\n\u001b[31mb\n"}"#,
        )
        .unwrap();
        let end = End::read(dir.path(), Ok(ExitStatus::from_raw(256)));
        assert_eq!(
            end.to_string(),
            "guest-panic: Kernel panic - not syncing: sysrq; console: a | ?[31mb"
        );
    }

    #[test]
    fn without_exit_json_the_signal_tells() {
        let dir = tempfile::tempdir().unwrap();
        let end = End::read(dir.path(), Ok(ExitStatus::from_raw(9)));
        assert_eq!(
            end.to_string(),
            "vmm-died: bulkhead-vmm was killed by signal 9"
        );
        let end = End::read(dir.path(), Ok(ExitStatus::from_raw(libc::SIGSYS)));
        assert!(end.to_string().contains("its jail forbids"), "{end}");
        fs::write(dir.path().join("vmm.log"), "one\nlast words\n").unwrap();
        let end = End::read(dir.path(), Ok(ExitStatus::from_raw(256)));
        assert!(end.to_string().ends_with("code 1 (last words)"), "{end}");
    }

    #[test]
    fn a_long_console_is_cut_at_a_character() {
        let text = "ü".repeat(1000);
        assert!(printable(&text, 601).len() <= 601);
    }
}
