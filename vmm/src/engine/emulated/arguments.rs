//! The emulator's command line.

use std::ffi::{OsStr, OsString};
use std::os::fd::RawFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use super::EmulatedError;
use crate::arch::x86_64::{cmdline, layout};
use crate::config::MachineConfig;
use crate::virtio::VirtioDevice;
use crate::virtio::net::Mac;

/// Kernel parameters behind those of every guest; those of the devices are added by the emulator. A restart is a triple fault
/// here: `-no-reboot` makes the emulator end with it. The guest is no wall anyway, so it does without mitigations.
///
/// The emulator does not see what our devices write into guest memory, so it would run the old translation of a page
/// that a device filled with other code. `init_on_alloc`: the guest's kernel clears every page before it gives it
/// to a file's cache, and the emulator drops what it had translated from there.
const COMMAND_LINE: &str = "reboot=t mitigations=off init_on_alloc=1";

/// The emulator's side of one of our devices.
pub struct Frontend {
    driver: Driver,
    socket: Socket,
}

/// How the emulator gets to a device's socket.
pub enum Socket {
    /// It inherits one that is connected.
    Inherited(RawFd),
    /// It connects to one that listens: the frontend for networks takes no other.
    Listening(PathBuf),
}

#[derive(Clone, Copy)]
enum Driver {
    Block,
    Rng,
    Vsock,
    Fs,
    Net { mac: Mac },
}

impl Frontend {
    /// By the device's type.
    pub fn new(device: &dyn VirtioDevice, socket: Socket) -> Result<Self, EmulatedError> {
        let driver = match device.device_type() {
            1 => {
                let mut mac = Mac::default();
                device.read_config(0, &mut mac);
                Driver::Net { mac }
            }
            2 => Driver::Block,
            4 => Driver::Rng,
            19 => Driver::Vsock,
            26 => Driver::Fs,
            device_type => {
                return Err(EmulatedError::Device {
                    name: device.name(),
                    device_type,
                });
            }
        };
        Ok(Self { driver, socket })
    }

    fn chardev(&self, index: usize) -> OsString {
        let mut value = OsString::from(format!("socket,id=vhost{index},"));
        match &self.socket {
            Socket::Inherited(fd) => value.push(format!("fd={fd}")),
            Socket::Listening(path) => {
                value.push("path=");
                value.push(escaped(path));
            }
        }
        value
    }

    fn device(&self, index: usize, config: &MachineConfig) -> String {
        let name = match self.driver {
            Driver::Block => "vhost-user-blk,num-queues=1",
            Driver::Rng => "vhost-user-rng",
            Driver::Vsock => "vhost-user-vsock-device",
            Driver::Fs => "vhost-user-fs-device,num-request-queues=1,queue-size=512",
            Driver::Net { mac } => {
                let mac = mac.map(|byte| format!("{byte:02x}")).join(":");
                return format!("virtio-net-device,netdev=net{index},mac={mac}");
            }
        };
        // The tag is a plain word, without a comma: `MachineConfig` checks that.
        let tag = match (self.driver, &config.fs) {
            (Driver::Fs, Some(fs)) => format!(",tag={}", fs.tag),
            _ => String::new(),
        };
        format!("{name}{tag},chardev=vhost{index}")
    }
}

/// A comma ends a value unless it is doubled.
fn escaped(path: &Path) -> OsString {
    let bytes = path.as_os_str().as_bytes().iter();
    let doubled = bytes.flat_map(|byte| std::iter::repeat_n(*byte, 1 + usize::from(*byte == b',')));
    OsString::from_vec(doubled.collect())
}

/// All arguments. Sizes are numbers and paths stand alone, so nothing in the configuration can become an option.
///
/// Before the first instruction of the guest the emulator changes into the empty folder `root` and becomes the pod's user.
pub fn arguments(
    config: &MachineConfig,
    frontends: &[Frontend],
    root: &Path,
    tsc_khz: u64,
) -> Vec<OsString> {
    let boot = config.memory_bytes();
    // The emulator has the machine's reserve as well; the guest's kernel is told to leave it.
    let memory = layout::mapping_len(boot, config.reserve_bytes()) >> 20;
    let mut list: Vec<OsString> = Vec::new();
    let mut add = |option: &str, value: &OsStr| {
        list.push(option.into());
        list.push(value.into());
    };
    let memory_object = format!("memory-backend-memfd,id=ram,share=on,size={memory}M");
    let debug = if config.debug_shell {
        cmdline::DEBUG_SHELL
    } else {
        ""
    };
    let mut command_line = format!(
        "{} {COMMAND_LINE} tsc_early_khz={tsc_khz}{debug}",
        cmdline::BASE
    );
    command_line.push_str(&cmdline::held_back(config.vcpus, config.vcpus_max()));
    if let (true, Some(last)) = (
        config.reserve_bytes() > 0,
        layout::memory_ranges(boot).last(),
    ) {
        command_line.push_str(&format!(" mem={}M", last.end() >> 20));
    }
    command_line.push_str(bulkhead_failpoint::kernel_parameter().as_ref());
    let user = format!("user={}:{}", config.jail.uid, config.jail.gid);
    let pairs = [
        // Nothing of a PC but what the kernel needs for its clocks, and the port for its messages.
        (
            "-machine",
            "microvm,acpi=off,rtc=on,isa-serial=on,memory-backend=ram",
        ),
        ("-accel", "tcg,thread=multi,tb-size=256"),
        // With LA57 the emulator faults at boot.
        ("-cpu", "max,-la57"),
        ("-object", &memory_object),
        ("-global", "virtio-mmio.force-legacy=false"),
        ("-display", "none"),
        ("-monitor", "none"),
        ("-chardev", "stdio,id=console,signal=off"),
        ("-serial", "chardev:console"),
        // The change of user below is one of the calls that `elevateprivileges` denies, and leaves nothing to elevate.
        (
            "-sandbox",
            "on,obsolete=deny,spawn=deny,resourcecontrol=deny",
        ),
        ("-run-with", &user),
        ("-append", &command_line),
    ];
    for (option, value) in pairs {
        add(option, OsStr::new(value));
    }
    let mut chroot = OsString::from("chroot=");
    chroot.push(escaped(root));
    add("-run-with", &chroot);
    add("-m", OsStr::new(&format!("{memory}M")));
    add("-smp", OsStr::new(&config.vcpus_max().to_string()));
    add("-kernel", config.kernel.as_os_str());
    add("-initrd", config.initramfs.as_os_str());
    for (index, frontend) in frontends.iter().enumerate() {
        add("-chardev", &frontend.chardev(index));
        if let Driver::Net { .. } = frontend.driver {
            let netdev = format!("vhost-user,id=net{index},chardev=vhost{index},queues=1");
            add("-netdev", OsStr::new(&netdev));
        }
        add("-device", OsStr::new(&frontend.device(index, config)));
    }
    list.extend(["-nodefaults", "-no-user-config", "-no-reboot"].map(OsString::from));
    list
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::end::end_channel;
    use crate::virtio::fs::Fs;
    use crate::virtio::net::{Net, Slot};

    #[test]
    fn every_path_is_an_argument_of_its_own() {
        let folder = tempfile::tempdir().unwrap();
        let json = r#"{"engine": "emulated", "kernel": "/a,readonly=off -qmp x", "initramfs": "/i",
            "vcpus": 2, "memory_mib": 96, "fs": {"tag": "pod", "worker_fds": [10]}}"#;
        std::fs::write(folder.path().join("machine.json"), json).unwrap();
        let config = MachineConfig::load(folder.path()).unwrap();
        let (_ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let device = Fs::new("pod", vec![theirs.into()], end_channel().0).unwrap();
        let net = Net::new(Slot::new("n0", [2, 0, 0, 0, 0, 1], 1, false));
        let frontends = [
            Frontend::new(&device, Socket::Inherited(7)).unwrap(),
            Frontend::new(&net, Socket::Listening("/a,b/net".into())).unwrap(),
        ];
        let list = arguments(&config, &frontends, Path::new("/s,t/root"), 2_000_000);
        let after = |option: &str| {
            let at = list.iter().position(|argument| argument == option).unwrap();
            list[at + 1].to_str().unwrap()
        };
        assert_eq!(after("-kernel"), "/a,readonly=off -qmp x");
        assert_eq!(after("-smp"), "2");
        assert_eq!(after("-m"), "96M");
        assert!(!after("-append").contains("mem=") && !after("-append").contains("maxcpus"));
        assert_eq!(
            after("-device"),
            "vhost-user-fs-device,num-request-queues=1,queue-size=512,tag=pod,chardev=vhost0"
        );
        assert!(list.contains(&"socket,id=vhost1,path=/a,,b/net".into()));
        assert!(list.contains(&"chroot=/s,,t/root".into()));
        assert!(list.contains(&"user=65534:65534".into()));
        let net = "virtio-net-device,netdev=net1,mac=02:00:00:00:00:01";
        assert!(list.contains(&net.into()));
    }

    #[test]
    fn a_reserve_is_the_emulators_and_the_kernel_leaves_it() {
        let arguments = |memory: u64| {
            let folder = tempfile::tempdir().unwrap();
            let json = serde_json::json!({"engine": "emulated", "kernel": "/k", "initramfs": "/i", "vcpus": 2,
                "vcpus_max": 4, "memory_mib": memory, "memory_max_mib": memory + 256});
            std::fs::write(folder.path().join("machine.json"), json.to_string()).unwrap();
            let config = MachineConfig::load(folder.path()).unwrap();
            let list = super::arguments(&config, &[], folder.path(), 2_000_000);
            let after = |option: &str| {
                let at = list.iter().position(|argument| argument == option).unwrap();
                list[at + 1].to_str().unwrap().to_owned()
            };
            assert_eq!(after("-smp"), "4");
            assert!(after("-object").ends_with(&format!(",size={}", after("-m"))));
            (after("-m"), after("-append"))
        };
        let (memory, line) = arguments(600);
        assert_eq!(memory, "896M");
        assert!(line.contains(" maxcpus=2 mem=600M"), "{line}");
        // What is above the hole ends a GiB higher.
        let (memory, line) = arguments(4096);
        assert_eq!(memory, "4352M");
        assert!(line.contains(" mem=5120M"), "{line}");
    }
}
