//! The configuration file (`docs/architecture.md`, "Configuration"). Written by the operator: trusted, but checked.

use std::{
    env, fs, io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

/// Where the file is when `BULKHEAD_CONFIG` names no other.
pub const DEFAULT_PATH: &str = "/etc/bulkhead/config.toml";
/// Folder of the pods' state folders when the file names no other.
const DEFAULT_STATE: &str = "/run/bulkhead";
/// Least memory of a machine in MiB.
pub const MEMORY_MIN_MIB: u64 = 96;
/// Most memory of a machine in MiB.
pub const MEMORY_MAX_MIB: u64 = 1024 * 1024;
/// Most vCPUs of a machine.
pub const VCPUS_MAX: u64 = 32;
/// Longest `state` path: socket paths in the pods' folders end at 107 bytes.
const STATE_MAX: usize = 56;

/// What runs the vCPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Engine {
    /// Our VMM on `/dev/kvm`.
    Kvm,
    /// QEMU as a software CPU; no wall.
    Emulated,
}

/// Table `jail`: the confinement is always on; this is its range of users, and what a host must have.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Jail {
    /// First of the users that pods run as, each as one of its own.
    pub first_uid: u32,
    /// How many there are.
    pub uids: u32,
    /// Layers without which no pod starts; without it a layer that the host lacks is a warning.
    pub require: Vec<JailLayer>,
}

impl Default for Jail {
    fn default() -> Self {
        Self {
            // Of a range that no system of ids has taken (systemd, "Users, Groups, UIDs and GIDs").
            first_uid: 1_900_000_000,
            uids: 65536,
            require: Vec::new(),
        }
    }
}

/// A layer of the jail.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum JailLayer {
    /// Namespaces and an empty root.
    Root,
    /// Limits of resources.
    Limits,
    /// A user of its own without capabilities.
    User,
    /// Landlock.
    Landlock,
    /// seccomp by thread.
    Seccomp,
}

/// The configuration, complete.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// What runs the vCPUs.
    pub engine: Engine,
    /// Folder of the pods' state folders.
    pub state: PathBuf,
    /// Guest kernel.
    pub kernel: PathBuf,
    /// Initramfs with the agent.
    pub initramfs: PathBuf,
    /// The emulator.
    pub qemu: String,
    /// vCPUs of a machine.
    pub vcpus: u64,
    /// Memory of a machine in MiB.
    pub memory_mib: u64,
    /// Guests offer a debugging shell to `bulkhead exec`; weaker, as root of the host then rules inside, too.
    pub debug_shell: bool,
    /// How the pods' processes are confined.
    pub jail: Jail,
    /// `bulkhead-vmm`.
    pub vmm: PathBuf,
    /// `bulkhead-fs`.
    pub fs: PathBuf,
}

#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct File {
    engine: Option<Engine>,
    state: Option<PathBuf>,
    kernel: Option<PathBuf>,
    initramfs: Option<PathBuf>,
    qemu: Option<String>,
    vcpus: Option<u64>,
    memory_mib: Option<u64>,
    debug_shell: bool,
    jail: Jail,
}

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be read.
    #[error("reading {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Not TOML, or an unknown key.
    #[error("{path}: {}", source.message())]
    Parse {
        /// The file.
        path: PathBuf,
        /// Why.
        source: Box<toml::de::Error>,
    },
    /// A value out of its range.
    #[error("{path}: {key}: {why}")]
    Value {
        /// The file.
        path: PathBuf,
        /// The key.
        key: &'static str,
        /// What it should be.
        why: String,
    },
    /// `/proc/self/exe` cannot be resolved.
    #[error("finding our own executable")]
    Exe(#[source] io::Error),
}

/// The text of the file that `BULKHEAD_CONFIG` names, or of the default one if it exists, and its path.
fn read() -> Result<(String, PathBuf), Error> {
    let named = env::var_os("BULKHEAD_CONFIG").map(PathBuf::from);
    let path = named.clone().unwrap_or_else(|| DEFAULT_PATH.into());
    match fs::read_to_string(&path) {
        Ok(text) => Ok((text, path)),
        Err(e) if e.kind() == io::ErrorKind::NotFound && named.is_none() => {
            Ok((String::new(), path))
        }
        Err(source) => Err(Error::Read { path, source }),
    }
}

/// Folder of the pods' state folders. It is all that pods which are there need of the file, so nothing else that is wrong in it keeps
/// anybody from looking after them: an error is told when a machine is to be made ([`Config::load`]).
pub fn state() -> PathBuf {
    let named = read().ok().and_then(|(text, _)| state_in(&text));
    named.unwrap_or_else(|| DEFAULT_STATE.into())
}

fn state_in(text: &str) -> Option<PathBuf> {
    let named = |part: &str| {
        let value = part.parse::<toml::Table>().ok()?.remove("state")?;
        Some(PathBuf::from(value.as_str()?))
    };
    // Of what is no TOML each line for itself; the key stands before the tables.
    let mut top = text.lines().take_while(|line| !line.starts_with('['));
    let path = named(text).or_else(|| top.find_map(named))?;
    check_state(&path).is_ok().then_some(path)
}

fn check_state(path: &Path) -> Result<(), String> {
    if !path.is_absolute() {
        return Err(format!("{} is not an absolute path", path.display()));
    }
    if path.as_os_str().len() > STATE_MAX {
        return Err(format!(
            "longer than {STATE_MAX} bytes: socket paths would not fit"
        ));
    }
    Ok(())
}

impl Config {
    /// Reads the file that `BULKHEAD_CONFIG` names, or the default one if it exists.
    pub fn load() -> Result<Self, Error> {
        let (text, path) = read()?;
        let exe = env::current_exe().map_err(Error::Exe)?;
        let beside = exe.parent().unwrap_or(Path::new("/"));
        Self::parse(&text, &path, beside)
    }

    /// Parses `text` of the file `path`; defaults stand in the folder `beside`.
    pub fn parse(text: &str, path: &Path, beside: &Path) -> Result<Self, Error> {
        let file: File = toml::from_str(text).map_err(|source| Error::Parse {
            path: path.to_owned(),
            source: Box::new(source),
        })?;
        let config = Self {
            engine: file.engine.unwrap_or(Engine::Kvm),
            state: file.state.unwrap_or_else(|| DEFAULT_STATE.into()),
            kernel: file.kernel.unwrap_or_else(|| beside.join("vmlinux")),
            initramfs: file
                .initramfs
                .unwrap_or_else(|| beside.join("initramfs.cpio")),
            qemu: file.qemu.unwrap_or_else(|| "qemu-system-x86_64".into()),
            vcpus: file.vcpus.unwrap_or(1),
            memory_mib: file.memory_mib.unwrap_or(512),
            debug_shell: file.debug_shell,
            jail: file.jail,
            vmm: beside.join("bulkhead-vmm"),
            fs: beside.join("bulkhead-fs"),
        };
        config.check().map_err(|(key, why)| Error::Value {
            path: path.to_owned(),
            key,
            why,
        })?;
        Ok(config)
    }

    fn check(&self) -> Result<(), (&'static str, String)> {
        for (key, path) in [("kernel", &self.kernel), ("initramfs", &self.initramfs)] {
            if !path.is_absolute() {
                return Err((key, format!("{} is not an absolute path", path.display())));
            }
        }
        check_state(&self.state).map_err(|why| ("state", why))?;
        if self.jail.first_uid == 0 {
            return Err(("jail.first_uid", "0 is root".into()));
        }
        let last = self.jail.first_uid.checked_add(self.jail.uids);
        if self.jail.uids == 0 || last.is_none() {
            let why = format!("{} is none, or goes beyond 4294967294", self.jail.uids);
            return Err(("jail.uids", why));
        }
        check_vcpus(self.vcpus).map_err(|why| ("vcpus", why))?;
        check_memory(self.memory_mib).map_err(|why| ("memory_mib", why))
    }
}

/// Whether a machine may have so many vCPUs.
pub fn check_vcpus(vcpus: u64) -> Result<(), String> {
    if (1..=VCPUS_MAX).contains(&vcpus) {
        return Ok(());
    }
    Err(format!("{vcpus} is not between 1 and {VCPUS_MAX}"))
}

/// Whether a machine may have so much memory.
pub fn check_memory(mib: u64) -> Result<(), String> {
    if mib < MEMORY_MIN_MIB {
        return Err(format!(
            "{mib} MiB is below the minimum of {MEMORY_MIN_MIB} MiB"
        ));
    }
    if mib > MEMORY_MAX_MIB {
        return Err(format!(
            "{mib} MiB is above the maximum of {MEMORY_MAX_MIB} MiB"
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, Error> {
        Config::parse(text, Path::new("/c.toml"), Path::new("/opt/bulkhead"))
    }

    #[test]
    fn an_empty_file_means_the_documented_defaults() {
        let config = parse("").unwrap();
        assert_eq!(config.engine, Engine::Kvm);
        assert_eq!(config.state, Path::new("/run/bulkhead"));
        assert_eq!(config.kernel, Path::new("/opt/bulkhead/vmlinux"));
        assert_eq!(config.initramfs, Path::new("/opt/bulkhead/initramfs.cpio"));
        assert_eq!(config.vmm, Path::new("/opt/bulkhead/bulkhead-vmm"));
        assert_eq!((config.vcpus, config.memory_mib), (1, 512));
        assert!(!config.debug_shell);
    }

    #[test]
    fn unknown_keys_name_themselves() {
        let text = parse("memory = 5").unwrap_err().to_string();
        assert!(
            text.contains("memory") && text.contains("/c.toml"),
            "{text}"
        );
    }

    #[test]
    fn the_pods_folder_is_found_whatever_else_is_wrong() {
        for text in [
            "state = '/srv/b'\nmemory = 5",
            "memory_mib = 8\nstate = '/srv/b'",
            "this is not toml\nstate = '/srv/b'\nengine = ",
            "[jail]\nrequire = 7\n",
            "state = 'srv'",
            "state = 5",
        ] {
            parse(text).unwrap_err();
            let named = text.contains("/srv/b").then(|| "/srv/b".into());
            assert_eq!(state_in(text), named, "{text}");
        }
    }

    #[test]
    fn values_out_of_range_are_errors_that_name_the_key() {
        for (text, key) in [
            ("memory_mib = 95", "memory_mib"),
            ("vcpus = 0", "vcpus"),
            ("vcpus = 33", "vcpus"),
            ("kernel = 'vmlinux'", "kernel"),
            ("state = 'run'", "state"),
            ("engine = 'qemu'", "qemu"),
            ("[jail]\nfirst_uid = 0", "jail.first_uid"),
            ("[jail]\nuids = 0", "jail.uids"),
            ("[jail]\nfirst_uid = 4294967295", "jail.uids"),
            ("[jail]\nrequire = ['moat']", "moat"),
        ] {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.contains(key), "{text}: {error}");
        }
    }
}
