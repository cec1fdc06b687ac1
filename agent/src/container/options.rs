//! Mount options of the OCI spec (`mounts[].options`): names to attributes, propagation and file system data.

use rustix::mount::MountAttrFlags;

use crate::{
    error::{Error, Result},
    sys::{MountAttr, attr},
};

/// Options of one mount, parsed.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// `bind` or `rbind`; true for recursive.
    pub bind: Option<bool>,
    /// Attributes of the mount itself.
    pub own: MountAttr,
    /// Attributes for the mount and all below it (`rro` ...).
    pub recursive: MountAttr,
    /// Propagation: flag and whether it is recursive.
    pub propagation: Option<(u64, bool)>,
    /// `remount`: what is mounted there already is changed.
    pub remount: bool,
    /// `tmpcopyup`: a tmpfs takes over what the folder it covers holds.
    pub copy_up: bool,
    /// `idmap` or `ridmap`; true for recursive.
    pub idmap: Option<bool>,
    /// Flags of the file system (`sync` ...).
    pub flags: Vec<String>,
    /// Data of the file system: key and value, or a key alone.
    pub data: Vec<(String, Option<String>)>,
}

const MS_SHARED: u64 = libc::MS_SHARED;
const MS_SLAVE: u64 = libc::MS_SLAVE;
const MS_PRIVATE: u64 = libc::MS_PRIVATE;
const MS_UNBINDABLE: u64 = libc::MS_UNBINDABLE;

/// Propagation by its name in the spec: flag and whether it is recursive.
pub fn propagation(name: &str) -> Option<(u64, bool)> {
    Some(match name {
        "shared" => (MS_SHARED, false),
        "rshared" => (MS_SHARED, true),
        "slave" => (MS_SLAVE, false),
        "rslave" => (MS_SLAVE, true),
        "private" => (MS_PRIVATE, false),
        "rprivate" => (MS_PRIVATE, true),
        "unbindable" => (MS_UNBINDABLE, false),
        "runbindable" => (MS_UNBINDABLE, true),
        _ => return None,
    })
}

/// Attribute bits by name: set, clear.
fn attribute(name: &str) -> Option<(u64, u64)> {
    Some(match name {
        "ro" => (attr::RDONLY, 0),
        "rw" => (0, attr::RDONLY),
        "nosuid" => (attr::NOSUID, 0),
        "suid" => (0, attr::NOSUID),
        "nodev" => (attr::NODEV, 0),
        "dev" => (0, attr::NODEV),
        "noexec" => (attr::NOEXEC, 0),
        "exec" => (0, attr::NOEXEC),
        "nodiratime" => (attr::NODIRATIME, 0),
        "diratime" => (0, attr::NODIRATIME),
        "nosymfollow" => (attr::NOSYMFOLLOW, 0),
        "symfollow" => (0, attr::NOSYMFOLLOW),
        "noatime" => (attr::NOATIME, attr::ATIME_MASK),
        "strictatime" => (attr::STRICTATIME, attr::ATIME_MASK),
        "relatime" | "atime" | "norelatime" | "nostrictatime" => (attr::RELATIME, attr::ATIME_MASK),
        _ => return None,
    })
}

fn apply(to: &mut MountAttr, (set, clear): (u64, u64)) {
    to.set = (to.set & !clear) | set;
    to.clear = (to.clear & !set) | clear;
}

impl Options {
    /// Parses the options of the mount that `field` names. `bind_type` says that the mount's type is `bind`.
    pub fn parse(field: &str, bind_type: bool, options: &[String]) -> Result<Self> {
        let mut parsed = Self::default();
        if bind_type {
            parsed.bind = Some(options.iter().any(|option| option == "rbind"));
        }
        for option in options {
            parsed.take(field, option)?;
        }
        if parsed.bind.is_some() {
            let data = parsed.data.first().map(|(key, _)| key.as_str());
            if let Some(name) = data.or(parsed.flags.first().map(String::as_str)) {
                return Err(Error::field(
                    format!("{field}.options"),
                    format!("\"{name}\" has no meaning for a bind mount"),
                ));
            }
        }
        Ok(parsed)
    }

    fn take(&mut self, field: &str, option: &str) -> Result<()> {
        match option {
            "bind" => {
                self.bind.get_or_insert(false);
            }
            "rbind" => self.bind = Some(true),
            // What file systems do anyway; `silent` and `loud` are about the kernel's log.
            "defaults" | "async" | "nomand" | "silent" | "loud" | "noiversion" | "" => {}
            "nolazytime" => self.flags.retain(|flag| flag != "lazytime"),
            "sync" | "dirsync" | "lazytime" => self.flags.push(option.to_string()),
            // The kernel has no mandatory locks any more, and no change counters for what the guest mounts.
            "mand" | "iversion" => {
                return Err(Error::refused(format!("{field}.options \"{option}\"")));
            }
            "remount" => self.remount = true,
            "tmpcopyup" => self.copy_up = true,
            "idmap" => self.idmap = Some(false),
            "ridmap" => self.idmap = Some(true),
            _ => {
                if let Some(change) = attribute(option) {
                    apply(&mut self.own, change);
                } else if let Some(change) = option.strip_prefix('r').and_then(attribute) {
                    apply(&mut self.recursive, change);
                } else if let Some(kind) = propagation(option) {
                    self.propagation = Some(kind);
                } else {
                    self.data.push(match option.split_once('=') {
                        Some((key, value)) => (key.to_string(), Some(value.to_string())),
                        None => (option.to_string(), None),
                    });
                }
            }
        }
        Ok(())
    }

    /// Whether the data sets `key`.
    pub fn has_data(&self, key: &str) -> bool {
        self.data.iter().any(|(name, _)| name == key)
    }

    /// The attributes for `fsmount`.
    pub fn fsmount_attr(&self) -> MountAttrFlags {
        MountAttrFlags::from_bits_retain(u32::try_from(self.own.set).unwrap_or(0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(bind: bool, options: &[&str]) -> Result<Options> {
        let options: Vec<String> = options.iter().map(ToString::to_string).collect();
        Options::parse("mounts[0]", bind, &options)
    }

    #[test]
    fn containerds_default_tmpfs_options_are_understood() {
        let o = parse(false, &["nosuid", "strictatime", "mode=755", "size=65536k"]).unwrap();
        assert_eq!(o.own.set, attr::NOSUID | attr::STRICTATIME);
        assert_eq!(o.bind, None);
        assert_eq!(
            o.data,
            [
                ("mode".to_string(), Some("755".to_string())),
                ("size".to_string(), Some("65536k".to_string()))
            ]
        );
    }

    #[test]
    fn devpts_options_keep_flags_without_value() {
        let o = parse(false, &["nosuid", "noexec", "newinstance", "ptmxmode=0666"]).unwrap();
        assert_eq!(o.data.first(), Some(&("newinstance".to_string(), None)));
    }

    #[test]
    fn rbind_is_recursive_and_ro_is_not() {
        let o = parse(true, &["rbind", "rprivate", "ro"]).unwrap();
        assert_eq!(o.bind, Some(true));
        assert_eq!(o.propagation, Some((MS_PRIVATE, true)));
        assert_eq!(o.own.set, attr::RDONLY);
        assert_eq!(o.recursive, MountAttr::default());
    }

    #[test]
    fn recursive_attributes_are_kept_apart() {
        let o = parse(true, &["bind", "rro", "rnosuid"]).unwrap();
        assert_eq!(o.recursive.set, attr::RDONLY | attr::NOSUID);
        assert_eq!(o.own, MountAttr::default());
    }

    #[test]
    fn the_last_of_two_contrary_options_wins() {
        let o = parse(true, &["ro", "rw", "noatime", "relatime"]).unwrap();
        assert_eq!(o.own.set, 0);
        assert_eq!(o.own.clear & attr::RDONLY, attr::RDONLY);
    }

    #[test]
    fn bind_by_option_alone_is_a_bind() {
        assert_eq!(parse(false, &["bind"]).unwrap().bind, Some(false));
        assert_eq!(parse(true, &[]).unwrap().bind, Some(false));
    }

    #[test]
    fn options_of_runc_that_are_no_flags_are_kept_apart() {
        let o = parse(true, &["ridmap", "remount"]).unwrap();
        assert_eq!((o.idmap, o.remount, o.copy_up), (Some(true), true, false));
        let o = parse(false, &["tmpcopyup", "lazytime", "nolazytime", "size=1m"]).unwrap();
        assert!(o.copy_up && o.flags.is_empty() && o.data.len() == 1);
    }

    #[test]
    fn data_on_a_bind_and_unsupported_options_are_refused_by_name() {
        let error = parse(true, &["size=1"]).unwrap_err().text();
        assert!(error.contains("mounts[0].options") && error.contains("size"));
        for option in ["mand", "iversion"] {
            let error = parse(false, &[option]).unwrap_err().text();
            assert!(error.contains(option), "{error}");
        }
    }

    #[test]
    fn no_advertised_option_is_taken_for_data_of_a_file_system() {
        use bulkhead_protocol::features::{MOUNT_OPTIONS, PROPAGATIONS};
        for option in MOUNT_OPTIONS.iter().chain(PROPAGATIONS) {
            let parsed = parse(false, &[option]).unwrap();
            assert!(parsed.data.is_empty(), "{option}");
        }
        assert!(PROPAGATIONS.iter().all(|name| propagation(name).is_some()));
    }
}
