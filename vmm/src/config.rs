//! `machine.json` → a checked [`MachineConfig`].
//!
//! Called once by `bulkhead-vmm` when it starts. The file comes from the shim and is not trusted: unknown keys,
//! values outside their range and names that are not plain words are refused with an error that names the field.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Read;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::arch::x86_64::layout;
use crate::jail::JailConfig;
use crate::limits;
use crate::virtio::net::Mac;

/// Why a configuration was refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// Which file.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: std::io::Error,
    },
    /// The file is not the JSON that it should be.
    #[error("{} is not a machine configuration", path.display())]
    Parse {
        /// Which file.
        path: PathBuf,
        /// Names the key and the place.
        #[source]
        source: serde_json::Error,
    },
    /// A value that is out of its range.
    #[error("{field} is {value}: {rule}")]
    Field {
        /// The key, as a path from the root.
        field: String,
        /// What it held.
        value: String,
        /// What it must be.
        rule: &'static str,
    },
}

/// What runs the vCPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EngineKind {
    /// Our own VMM on `/dev/kvm`.
    Kvm,
    /// QEMU as a software CPU; no wall.
    Emulated,
}

impl EngineKind {
    /// The name in configuration and reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Emulated => "emulated",
        }
    }
}

/// The vsock device.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockConfig {
    /// The guest's address, 3 or above.
    pub cid: u32,
    /// Ports of the host that the guest reaches.
    #[serde(default)]
    pub ports: Vec<u32>,
    /// An inherited SEQPACKET socket to the shim, where the guest's connections to them go.
    #[serde(default)]
    pub uplink_fd: Option<RawFd>,
}

/// The file system device.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FsConfig {
    /// Mount tag, at most 36 bytes (virtio 1.3 section 5.11.4).
    pub tag: String,
    /// Inherited SEQPACKET sockets to the file server, one a worker.
    pub worker_fds: Vec<RawFd>,
}

/// One slot for a block device.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlockConfig {
    /// Name of the slot, and the disk's serial in the guest.
    pub id: String,
    /// The backing file; without one the slot is empty until `attach`.
    #[serde(default)]
    pub path: Option<PathBuf>,
    /// The guest may not write.
    #[serde(default)]
    pub readonly: bool,
}

/// One slot for a network interface, empty until `attach-net`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetConfig {
    /// Name of the slot.
    pub id: String,
    /// The address that the guest finds in the device, and knows the slot by: six pairs of hexadecimal digits.
    #[serde(deserialize_with = "crate::virtio::net::mac")]
    pub mac: Mac,
}

/// A machine's configuration: [`MachineConfig::load`] is the only way to one, so its values are in range.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineConfig {
    /// What runs the vCPUs.
    pub engine: EngineKind,
    /// Uncompressed ELF kernel.
    pub kernel: PathBuf,
    /// A cpio archive.
    pub initramfs: PathBuf,
    /// 1 to 32.
    pub vcpus: u8,
    /// At least 96.
    pub memory_mib: u32,
    /// Most vCPUs that it can grow to; without it, it has what it starts with.
    #[serde(default)]
    vcpus_max: Option<u8>,
    /// The same for memory.
    #[serde(default)]
    memory_max_mib: Option<u32>,
    /// The emulator, for [`EngineKind::Emulated`] alone.
    #[serde(default = "default_qemu")]
    pub qemu: PathBuf,
    /// The vsock device, if any.
    #[serde(default)]
    pub vsock: Option<VsockConfig>,
    /// The file system device, if any.
    #[serde(default)]
    pub fs: Option<FsConfig>,
    /// Slots for network interfaces.
    #[serde(default)]
    pub net: Vec<NetConfig>,
    /// Slots for block devices.
    #[serde(default)]
    pub blocks: Vec<BlockConfig>,
    /// The guest's agent is told to offer a debugging shell.
    #[serde(default)]
    pub debug_shell: bool,
    /// How the process is confined.
    #[serde(default)]
    pub jail: JailConfig,
    /// The machine's state folder; not part of the file.
    #[serde(skip)]
    pub state_dir: PathBuf,
}

fn default_qemu() -> PathBuf {
    PathBuf::from("qemu-system-x86_64")
}

impl MachineConfig {
    /// Reads and checks `machine.json` of a state folder.
    pub fn load(state_dir: &Path) -> Result<Self, ConfigError> {
        let path = state_dir.join("machine.json");
        let mut text = Vec::new();
        File::open(&path)
            .and_then(|file| file.take(limits::CONFIG_BYTES).read_to_end(&mut text))
            .map_err(|source| ConfigError::Read {
                path: path.clone(),
                source,
            })?;
        let mut config: Self =
            serde_json::from_slice(&text).map_err(|source| ConfigError::Parse { path, source })?;
        config.state_dir = state_dir.to_path_buf();
        config.check()?;
        Ok(config)
    }

    /// Guest memory in bytes.
    pub fn memory_bytes(&self) -> u64 {
        u64::from(self.memory_mib) << 20
    }

    /// Most vCPUs that the machine can have.
    pub fn vcpus_max(&self) -> u8 {
        self.vcpus_max.unwrap_or(self.vcpus)
    }

    /// Memory that can be added to what the machine starts with, in bytes: whole blocks.
    pub fn reserve_bytes(&self) -> u64 {
        let most = u64::from(self.memory_max_mib.unwrap_or(self.memory_mib)) << 20;
        let added = most.saturating_sub(self.memory_bytes());
        added - added % layout::MEMORY_BLOCK
    }

    fn check(&self) -> Result<(), ConfigError> {
        let path = |field: &str, path: &Path| {
            require(
                path.is_absolute(),
                field,
                path.display(),
                "must be absolute",
            )
        };
        path("kernel", &self.kernel)?;
        path("initramfs", &self.initramfs)?;
        require(
            (1..=limits::VCPUS).contains(&self.vcpus),
            "vcpus",
            self.vcpus,
            "must be 1 to 32",
        )?;
        require(
            (limits::MEMORY_MIB_MIN..=limits::MEMORY_MIB_MAX).contains(&self.memory_mib),
            "memory_mib",
            self.memory_mib,
            "must be 96 to 1048576",
        )?;
        require(
            (self.vcpus..=limits::VCPUS).contains(&self.vcpus_max()),
            "vcpus_max",
            self.vcpus_max(),
            "must be at least vcpus and at most 32",
        )?;
        if let Some(most) = self.memory_max_mib {
            require(
                (self.memory_mib..=limits::MEMORY_MIB_MAX).contains(&most),
                "memory_max_mib",
                most,
                "must be at least memory_mib and at most 1048576",
            )?;
        }
        require(
            !self.qemu.as_os_str().is_empty(),
            "qemu",
            self.qemu.display(),
            "must name a program",
        )?;
        if let Some(vsock) = &self.vsock {
            require(
                vsock.cid >= 3 && vsock.cid != u32::MAX,
                "vsock.cid",
                vsock.cid,
                "must be 3 or more",
            )?;
        }
        for (field, id) in [("jail.uid", self.jail.uid), ("jail.gid", self.jail.gid)] {
            require(
                id != 0 && id != u32::MAX,
                field,
                id,
                "must be neither root's nor 4294967295",
            )?;
        }
        if let Some(fs) = &self.fs {
            require(plain_word(&fs.tag, 36), "fs.tag", &fs.tag, WORD_36)?;
            require(
                (1..=limits::FS_WORKERS).contains(&fs.worker_fds.len()),
                "fs.worker_fds",
                fs.worker_fds.len(),
                "must have 1 to 16 entries",
            )?;
            let mut seen = BTreeSet::new();
            for fd in &fs.worker_fds {
                let once = *fd > 2 && seen.insert(*fd);
                let rule = "must be descriptors above 2, each once";
                require(once, "fs.worker_fds", fd, rule)?;
            }
        }
        require(
            self.net.len() <= limits::NET_SLOTS,
            "net",
            self.net.len(),
            "must have at most 4 entries",
        )?;
        for (index, net) in self.net.iter().enumerate() {
            let field = |name: &str| format!("net[{index}].{name}");
            let before = self.net.iter().take(index);
            let id_twice = before.clone().any(|other| other.id == net.id);
            let mac_twice = before.clone().any(|other| other.mac == net.mac);
            let mac = net.mac.map(|byte| format!("{byte:02x}")).join(":");
            require(plain_word(&net.id, 20), &field("id"), &net.id, WORD_20)?;
            require(!id_twice, &field("id"), &net.id, "is used twice")?;
            require(!mac_twice, &field("mac"), mac, "is used twice")?;
        }
        require(
            self.blocks.len() <= limits::BLOCK_SLOTS,
            "blocks",
            self.blocks.len(),
            "must have at most 8 entries",
        )?;
        for (index, block) in self.blocks.iter().enumerate() {
            let field = |name: &str| format!("blocks[{index}].{name}");
            let twice = self.blocks[..index]
                .iter()
                .any(|other| other.id == block.id);
            require(plain_word(&block.id, 20), &field("id"), &block.id, WORD_20)?;
            require(!twice, &field("id"), &block.id, "is used twice")?;
            if let Some(backing) = &block.path {
                path(&field("path"), backing)?;
            }
        }
        Ok(())
    }
}

const WORD_36: &str = "must be 1 to 36 letters, digits, '-', '_' or '.'";
const WORD_20: &str = "must be 1 to 20 letters, digits, '-', '_' or '.'";

fn plain_word(word: &str, max: usize) -> bool {
    (1..=max).contains(&word.len())
        && word
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
}

fn require(
    holds: bool,
    field: &str,
    value: impl std::fmt::Display,
    rule: &'static str,
) -> Result<(), ConfigError> {
    if holds {
        return Ok(());
    }
    Err(ConfigError::Field {
        field: field.to_owned(),
        value: value.to_string(),
        rule,
    })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn load(change: impl FnOnce(&mut Value)) -> Result<MachineConfig, ConfigError> {
        let mut value = json!({
            "engine": "kvm", "kernel": "/k", "initramfs": "/i", "vcpus": 1, "memory_mib": 512,
            "qemu": "qemu-system-x86_64", "vsock": {"cid": 3},
            "fs": {"tag": "pod", "worker_fds": [10, 11]},
            "net": [{"id": "n0", "mac": "02:00:00:00:00:01"}],
            "blocks": [{"id": "b0", "path": "/d", "readonly": true}]
        });
        change(&mut value);
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("machine.json"), value.to_string()).unwrap();
        MachineConfig::load(dir.path())
    }

    #[test]
    fn of_a_file_without_end_no_more_than_the_cap_is_read() {
        let error = load(|v| v["qemu"] = json!("q".repeat(limits::CONFIG_BYTES as usize)));
        assert!(matches!(error, Err(ConfigError::Parse { .. })));
    }

    #[test]
    fn a_whole_configuration_is_read() {
        let config = load(|_| ()).unwrap();
        assert_eq!(config.engine, EngineKind::Kvm);
        assert_eq!(config.memory_bytes(), 512 << 20);
        assert_eq!(config.blocks[0].id, "b0");
        assert_eq!(config.net[0].mac, [2, 0, 0, 0, 0, 1]);
    }

    #[test]
    fn without_a_maximum_a_machine_keeps_its_size_and_a_reserve_is_whole_blocks() {
        let config = load(|_| ()).unwrap();
        assert_eq!((config.vcpus_max(), config.reserve_bytes()), (1, 0));
        let config = load(|v| {
            v["vcpus_max"] = json!(4);
            v["memory_max_mib"] = json!(512 + 128 + 127);
        });
        let config = config.unwrap();
        assert_eq!((config.vcpus_max(), config.reserve_bytes()), (4, 128 << 20));
    }

    #[test]
    fn a_mac_is_the_address_of_one_device() {
        for mac in [
            "",
            "02:00:00:00:00",
            "02:00:00:00:00:01:02",
            "03:00:00:00:00:01",
            "00:00:00:00:00:00",
            "+2:00:00:00:00:01",
            "02-00-00-00-00-01",
            "0200:00:00:00:01",
        ] {
            let error = load(|v| v["net"][0]["mac"] = json!(mac)).unwrap_err();
            let source = std::error::Error::source(&error).unwrap().to_string();
            assert!(source.contains("must be the address"), "{mac}: {source}");
        }
    }

    #[test]
    fn each_value_out_of_range_is_refused_by_name() {
        type Case = (&'static str, fn(&mut Value));
        let cases: [Case; 26] = [
            ("kernel", |v| v["kernel"] = json!("k")),
            ("initramfs", |v| v["initramfs"] = json!("")),
            ("vcpus", |v| v["vcpus"] = json!(0)),
            ("vcpus", |v| v["vcpus"] = json!(33)),
            ("memory_mib", |v| v["memory_mib"] = json!(95)),
            ("memory_mib", |v| v["memory_mib"] = json!(u32::MAX)),
            ("vcpus_max", |v| v["vcpus_max"] = json!(0)),
            ("vcpus_max", |v| v["vcpus_max"] = json!(33)),
            ("memory_max_mib", |v| v["memory_max_mib"] = json!(511)),
            ("memory_max_mib", |v| v["memory_max_mib"] = json!(u32::MAX)),
            ("qemu", |v| v["qemu"] = json!("")),
            ("vsock.cid", |v| v["vsock"]["cid"] = json!(2)),
            ("jail.uid", |v| v["jail"] = json!({"uid": 0, "gid": 1})),
            ("fs.tag", |v| v["fs"]["tag"] = json!("a b")),
            ("fs.worker_fds", |v| v["fs"]["worker_fds"] = json!([])),
            ("fs.worker_fds", |v| v["fs"]["worker_fds"] = json!([5, 5])),
            ("fs.worker_fds", |v| v["fs"]["worker_fds"] = json!([2])),
            ("fs.worker_fds", |v| {
                v["fs"]["worker_fds"] = (3..20).collect();
            }),
            ("blocks", |v| {
                let slot = |n| json!({"id": format!("b{n}"), "path": "/d", "readonly": true});
                v["blocks"] = (0..9).map(slot).collect();
            }),
            ("net[0].id", |v| v["net"][0]["id"] = json!("")),
            ("net", |v| {
                let slot =
                    |n| json!({"id": format!("n{n}"), "mac": format!("02:00:00:00:00:0{n}")});
                v["net"] = (0..5).map(slot).collect();
            }),
            ("net[1].id", |v| {
                let twin = json!({"id": "n0", "mac": "02:00:00:00:00:02"});
                v["net"].as_array_mut().unwrap().push(twin);
            }),
            ("net[1].mac", |v| {
                let twin = json!({"id": "n1", "mac": "02:00:00:00:00:01"});
                v["net"].as_array_mut().unwrap().push(twin);
            }),
            ("blocks[0].id", |v| v["blocks"][0]["id"] = json!("../x")),
            ("blocks[0].path", |v| v["blocks"][0]["path"] = json!("x")),
            ("blocks[1].id", |v| {
                let first = v["blocks"][0].clone();
                v["blocks"].as_array_mut().unwrap().push(first);
            }),
        ];
        for (field, change) in cases {
            let error = load(change).unwrap_err();
            match error {
                ConfigError::Field { field: named, .. } => assert_eq!(named, field),
                other => panic!("{field}: {other}"),
            }
        }
    }

    #[test]
    fn an_unknown_key_is_refused_by_name() {
        let error = load(|v| v["bogus"] = json!(1)).unwrap_err();
        let ConfigError::Parse { source, .. } = error else {
            panic!("{error}");
        };
        assert!(source.to_string().contains("bogus"));
        assert!(load(|v| v["vsock"]["bogus"] = json!(1)).is_err());
        assert!(load(|v| v["engine"] = json!("xen")).is_err());
    }
}
