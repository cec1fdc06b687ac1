//! `bulkhead check`: what this host can run, and why not.

pub mod host;
mod jail;
pub mod kvm;

use std::{
    fmt,
    path::{Path, PathBuf},
};

use serde::Serialize;

use crate::{
    config::{Config, Engine, Error as ConfigError},
    operator,
    sandbox::network,
};

/// Columns of the printed report.
const WIDTH: usize = 100;
/// Column where an item's text begins.
const INDENT: usize = 19;

/// How an item stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// As it should be.
    Ok,
    /// Not good, but it runs.
    Warn,
    /// Something does not run for this.
    No,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Item {
    /// How it stands.
    pub status: Status,
    /// What it is.
    pub name: &'static str,
    /// What was found.
    pub text: String,
    /// What to do.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub todo: Option<String>,
    /// Engines that do not run for this.
    #[serde(skip)]
    stops: Stops,
}

/// What an item that is `no` stops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stops {
    Kvm,
    Emulated,
    /// Every engine, because of the host.
    Host,
    /// Every engine, because of what is installed.
    Installed,
}

/// The report.
#[derive(Debug, Serialize)]
pub struct Report {
    /// The engine this host can use, best first: `kvm`, `emulated`, `none`.
    pub engine: &'static str,
    /// Why it is not a better one.
    pub why: String,
    /// The engine of the configuration.
    pub configured: Option<Engine>,
    /// Whether that one can run as things are.
    pub runs: bool,
    /// What was looked at.
    pub items: Vec<Item>,
}

fn item(name: &'static str, stops: Stops, result: Result<String, (String, &str)>) -> Item {
    match result {
        Ok(text) => Item {
            status: Status::Ok,
            name,
            text,
            todo: None,
            stops,
        },
        Err((text, todo)) => Item {
            status: Status::No,
            name,
            text,
            todo: (!todo.is_empty()).then(|| todo.to_owned()),
            stops,
        },
    }
}

impl Item {
    fn or_warn(mut self) -> Self {
        if self.status == Status::No {
            self.status = Status::Warn;
        }
        self
    }
}

/// Looks at everything.
pub fn check(config: Result<Config, ConfigError>) -> Report {
    let mut items = vec![config_item(&config), kvm_device(), kvm_speed()];
    items.extend(kernel_items());
    items.extend(jail::layers());
    let qemu = config
        .as_ref()
        .map_or("qemu-system-x86_64", |c| c.qemu.as_str());
    items.push(qemu_item(qemu));
    if let Ok(config) = &config {
        items.extend(jail::configured(&config.jail));
        items.extend(installed(config));
    }
    if config.as_ref().is_ok_and(|c| c.debug_shell) {
        items.push(debug_shell_item());
    }
    items.extend([containerd_item(), shim_item()]);
    items.push(network_item());
    items.extend(vhost_items());
    conclude(items, config.ok().map(|c| c.engine))
}

fn conclude(mut items: Vec<Item>, configured: Option<Engine>) -> Report {
    let stopped = |items: &[Item], engine: Stops| -> Option<String> {
        let mut host = items.iter().filter(|i| i.status == Status::No);
        host.find(|i| i.stops == Stops::Host || i.stops == engine)
            .map(|i| i.text.clone())
    };
    let not_kvm = stopped(&items, Stops::Kvm);
    let not_emulated = stopped(&items, Stops::Emulated);
    let (engine, why) = match (&not_kvm, &not_emulated) {
        (None, _) => ("kvm", String::new()),
        (Some(why), None) => ("emulated", format!("no kvm: {why}")),
        (Some(kvm), Some(emulated)) if kvm == emulated => ("none", kvm.clone()),
        (Some(kvm), Some(emulated)) => ("none", format!("no kvm: {kvm}; no emulated: {emulated}")),
    };
    let installed = !items
        .iter()
        .any(|i| i.status == Status::No && i.stops == Stops::Installed);
    let runs = installed
        && match configured {
            Some(Engine::Kvm) => not_kvm.is_none(),
            Some(Engine::Emulated) => not_emulated.is_none(),
            None => false,
        };
    // What only the other engine needs is no fault.
    for item in &mut items {
        let other = match configured {
            Some(Engine::Emulated) => item.stops == Stops::Kvm,
            _ => item.stops == Stops::Emulated,
        };
        if other && item.status == Status::No && engine != "none" {
            item.status = Status::Warn;
        }
    }
    Report {
        engine,
        why,
        configured,
        runs,
        items,
    }
}

fn config_item(config: &Result<Config, ConfigError>) -> Item {
    let result = match config {
        Ok(config) => Ok(format!(
            "valid; engine {:?}, {} vCPU, {} MiB, state in {}",
            engine_name(config.engine),
            config.vcpus,
            config.memory_mib,
            config.state.display()
        )),
        Err(error) => Err((error.to_string(), "correct the file")),
    };
    item("configuration", Stops::Installed, result)
}

fn engine_name(engine: Engine) -> &'static str {
    match engine {
        Engine::Kvm => "kvm",
        Engine::Emulated => "emulated",
    }
}

fn kvm_device() -> Item {
    let result = match std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm")
    {
        Ok(_) => Ok("/dev/kvm is there and can be opened".into()),
        Err(e) => Err((
            format!("/dev/kvm: {e}"),
            "load kvm_intel or kvm_amd (virtualization may be off in the firmware), and run as root",
        )),
    };
    item("kvm", Stops::Kvm, result)
}

fn kvm_speed() -> Item {
    let result = match kvm::instruction_ns() {
        Ok(ns) if ns < kvm::SLOW_NS => Ok(format!("a guest instruction takes {ns:.1} ns")),
        Ok(ns) => Err((
            format!("KVM without hardware behind it: a guest instruction takes {ns:.0} ns"),
            "use a host with virtualization in hardware, or engine = \"emulated\" to try things out",
        )),
        Err(kvm::Error::Open(_)) => Err(("not measured: no /dev/kvm".into(), "")),
        Err(error) => Err((
            format!("KVM does not run a guest: {error}"),
            "use a host with virtualization in hardware, or engine = \"emulated\" to try things out",
        )),
    };
    item("kvm speed", Stops::Kvm, result)
}

/// What the check says against engine `kvm` on this host, with what to do: for errors of machines that did not start.
pub fn kvm_trouble() -> Option<String> {
    let trouble = || {
        let bad = [kvm_device(), kvm_speed()];
        bad.into_iter().find(|item| item.status == Status::No)
    };
    // Twice: a busy host can look slow once.
    let bad = trouble().and_then(|_| trouble())?;
    let device = match bad.text.starts_with("/dev/kvm") {
        true => "",
        false => "/dev/kvm: ",
    };
    let todo = bad.todo.map(|todo| format!("; {todo}"));
    Some(format!("{device}{}{}", bad.text, todo.unwrap_or_default()))
}

/// Whether what the configured engine needs is there, as far as that is known at once; else what is not, and why.
pub fn engine_present(config: &Config) -> Result<(), (&'static str, PathBuf, String)> {
    match config.engine {
        Engine::Kvm => match kvm_device() {
            Item {
                status: Status::No,
                text,
                todo,
                ..
            } => {
                let why = text.strip_prefix("/dev/kvm: ").unwrap_or(&text);
                let todo = todo.unwrap_or_default();
                let why = format!("{why}: {todo}");
                Err(("engine \"kvm\":", "/dev/kvm".into(), why))
            }
            _ => Ok(()),
        },
        Engine::Emulated if host::find_program(&config.qemu).is_none() => {
            let why = format!("is not installed: {QEMU_TODO}");
            Err(("qemu", config.qemu.clone().into(), why))
        }
        Engine::Emulated => Ok(()),
    }
}

fn kernel_items() -> Vec<Item> {
    let (release, version) = host::kernel_release();
    let kernel = if version >= (5, 10) {
        Ok(format!("Linux {release}"))
    } else {
        Err((
            format!("Linux {release} is too old"),
            "use Linux 5.10 or newer",
        ))
    };
    let root = if rustix::process::geteuid().is_root() {
        Ok("running as root".into())
    } else {
        Err(("not running as root".to_owned(), "run the check as root"))
    };
    let open_tree = host::open_tree_works()
        .map(|()| "detached mounts work".to_owned())
        .map_err(|e| {
            (
                format!("open_tree: {e}"),
                "use Linux 5.2 or newer, with CAP_SYS_ADMIN",
            )
        });
    let openat2 = host::openat2_works()
        .map(|()| "paths resolve beneath a folder".to_owned())
        .map_err(|e| (format!("openat2: {e}"), "use Linux 5.6 or newer"));
    vec![
        item("host kernel", Stops::Host, kernel),
        item("privilege", Stops::Host, root),
        item("open_tree", Stops::Host, open_tree),
        item("openat2", Stops::Host, openat2),
    ]
}

const QEMU_TODO: &str = "install QEMU 10 or newer (Debian 12: from bookworm-backports)";

fn qemu_item(program: &str) -> Item {
    let result = match host::version_of(program) {
        Ok((text, version)) if version >= (10, 0) => Ok(format!("{program} {text}")),
        Ok((text, _)) => Err((
            format!("{program} {text} is too old: its TCG is faulty"),
            QEMU_TODO,
        )),
        Err(why) => Err((why, QEMU_TODO)),
    };
    item("qemu", Stops::Emulated, result)
}

fn installed(config: &Config) -> Vec<Item> {
    type Check = fn(&Path) -> Result<String, String>;
    let files: [(&'static str, &Path, Check, &str); 4] = [
        (
            "guest kernel",
            &config.kernel,
            host::check_kernel,
            "build it, or name it in the configuration (kernel = ...)",
        ),
        (
            "initramfs",
            &config.initramfs,
            host::check_initramfs,
            "build it, or name it in the configuration (initramfs = ...)",
        ),
        (
            "bulkhead-vmm",
            &config.vmm,
            host::check_program,
            "install it beside the shim",
        ),
        (
            "bulkhead-fs",
            &config.fs,
            host::check_program,
            "install it beside the shim",
        ),
    ];
    files
        .into_iter()
        .map(|(name, path, check, todo)| {
            let shown = path.display();
            let result = check(path)
                .map(|text| format!("{shown}: {text}"))
                .map_err(|why| (format!("{shown}: {why}"), todo));
            item(name, Stops::Installed, result)
        })
        .collect()
}

/// Named because it weakens: what is not there is not mentioned.
fn debug_shell_item() -> Item {
    let todo = "take the key out where it is not needed; pods keep what they were started with";
    item(
        "debug shell",
        Stops::Installed,
        Err((operator::shell::weakening(), todo)),
    )
    .or_warn()
}

fn containerd_item() -> Item {
    let result = match host::version_of("containerd") {
        Ok((text, version)) if version >= (1, 6) => Ok(format!("version {text}")),
        Ok((text, _)) => Err((format!("version {text} is too old"), "use 1.6 or newer")),
        Err(why) => Err((why, "install containerd 1.6 or newer")),
    };
    item("containerd", Stops::Installed, result).or_warn()
}

fn shim_item() -> Item {
    let name = "containerd-shim-bulkhead-v1";
    let result = host::in_path(name)
        .map(|path| path.display().to_string())
        .ok_or((
            format!("{name} is not in PATH"),
            "containerd looks for it in its own PATH: install it there",
        ));
    item("shim", Stops::Installed, result).or_warn()
}

fn network_item() -> Item {
    let result = match network::missing() {
        None => Ok("taps and redirects (sch_ingress, cls_u32, act_mirred) work".into()),
        Some(missing) => Err((
            format!("{missing}: pods have loopback only"),
            "load the module, or use a kernel that has it (CONFIG_TUN, CONFIG_NET_SCH_INGRESS, CONFIG_NET_CLS_U32, CONFIG_NET_ACT_MIRRED)",
        )),
    };
    item("network", Stops::Host, result).or_warn()
}

/// For information: Bulkhead does without.
fn vhost_items() -> Vec<Item> {
    let there = |there| if there { "there" } else { "not there" };
    let net = there(network::has_vhost());
    let vsock = there(Path::new("/dev/vhost-vsock").exists());
    vec![
        item(
            "vhost-net",
            Stops::Host,
            Ok(format!(
                "/dev/vhost-net is {net} (makes the network faster)"
            )),
        ),
        item(
            "vhost-vsock",
            Stops::Host,
            Ok(format!("/dev/vhost-vsock is {vsock} (not needed)")),
        ),
    ]
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for item in &self.items {
            let status = match item.status {
                Status::Ok => "ok",
                Status::Warn => "warn",
                Status::No => "no",
            };
            let head = format!("{status:<4} {:<INDENT$}", item.name, INDENT = INDENT - 5);
            write_wrapped(f, &head, &item.text)?;
            if let Some(todo) = item.todo.as_ref().filter(|_| item.status != Status::Ok) {
                write_wrapped(f, &" ".repeat(INDENT), &format!("-> {todo}"))?;
            }
        }
        if let (false, Some(engine)) = (self.runs, self.configured) {
            let name = engine_name(engine);
            writeln!(
                f,
                "The configured engine {name:?} cannot run here: see \"no\" above."
            )?;
        }
        match self.why.as_str() {
            "" => writeln!(f, "engine: {}", self.engine),
            why => write_wrapped(f, &format!("engine: {} ", self.engine), &format!("({why})")),
        }
    }
}

/// Writes `text` after `head`, broken at words, further lines below the first.
fn write_wrapped(f: &mut fmt::Formatter<'_>, head: &str, text: &str) -> fmt::Result {
    let indent = head.chars().count().min(INDENT);
    let mut line = head.to_owned();
    let mut empty = true;
    for word in text.split_whitespace() {
        let length = line.chars().count() + usize::from(!empty) + word.chars().count();
        if !empty && length > WIDTH {
            writeln!(f, "{line}")?;
            line = " ".repeat(indent);
            empty = true;
        }
        if !empty {
            line.push(' ');
        }
        line.push_str(word);
        empty = false;
    }
    writeln!(f, "{line}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(items: Vec<Item>, configured: Engine) -> Report {
        conclude(items, Some(configured))
    }

    fn no(stops: Stops) -> Item {
        item(
            "thing",
            stops,
            Err((format!("{stops:?} is bad"), "mend it")),
        )
    }

    #[test]
    fn the_engine_is_the_best_the_host_can_use() {
        assert_eq!(report(vec![], Engine::Kvm).engine, "kvm");
        let one = report(vec![no(Stops::Kvm)], Engine::Kvm);
        assert_eq!((one.engine, one.runs), ("emulated", false));
        assert_eq!(one.why, "no kvm: Kvm is bad");
        let both = report(vec![no(Stops::Kvm), no(Stops::Emulated)], Engine::Kvm);
        assert_eq!(both.engine, "none");
        assert_eq!(report(vec![no(Stops::Host)], Engine::Kvm).engine, "none");
    }

    #[test]
    fn what_is_not_installed_stops_the_configured_engine_but_not_the_host() {
        let report = report(vec![no(Stops::Installed)], Engine::Kvm);
        assert_eq!((report.engine, report.runs), ("kvm", false));
    }

    #[test]
    fn what_only_the_other_engine_needs_is_a_warning() {
        let report = report(vec![no(Stops::Kvm)], Engine::Emulated);
        assert!(report.runs);
        assert_eq!(report.items[0].status, Status::Warn);
    }

    #[test]
    fn the_report_fits_in_100_columns_and_ends_with_the_engine() {
        let mut long = no(Stops::Kvm);
        long.text = "word ".repeat(60);
        let text = report(vec![long, no(Stops::Emulated)], Engine::Kvm).to_string();
        assert!(text.lines().all(|l| l.chars().count() <= WIDTH), "{text}");
        let last = text.lines().rfind(|l| !l.starts_with(' ')).unwrap();
        assert!(last.starts_with("engine: none"), "{text}");
        assert!(text.contains("-> mend it"));
    }
}
