//! The files that a pod's containers share: `/etc/hostname`, `/etc/hosts`, `/etc/resolv.conf`. Where containerd makes a pause container
//! it writes them and mounts them into the others; of a sandbox that is the shim's it leaves that to the shim.

use std::{fs, io, path::Path};

use serde_json::{Value, json};

use super::config::cri::PodSandboxConfig;

/// Their folder in the sandbox's bundle, which goes with the sandbox.
const FOLDER: &str = "files";
const NAMES: [&str; 3] = ["hostname", "hosts", "resolv.conf"];
/// What a host has at least.
const HOSTS: &str = "127.0.0.1\tlocalhost\n::1\tlocalhost\n";
/// Most of a file of the host's that is taken over.
const FILE_MAX: usize = 1 << 20;

/// Writes them.
pub fn write(bundle: &Path, config: &PodSandboxConfig) -> io::Result<()> {
    let folder = bundle.join(FOLDER);
    fs::create_dir_all(&folder)?;
    let host = |path: &str| {
        let mut text = fs::read_to_string(path).unwrap_or_default();
        if text.len() > FILE_MAX {
            text.clear();
        }
        text
    };
    let hostname = match config.hostname.as_str() {
        "" => host("/proc/sys/kernel/hostname"),
        name => format!("{name}\n"),
    };
    let hosts = match host("/etc/hosts") {
        text if text.is_empty() => HOSTS.to_owned(),
        text => text,
    };
    let resolver = match config.dns_config.as_ref() {
        None => host("/etc/resolv.conf"),
        Some(dns) => {
            let line = |word: &str, values: &[String]| match values {
                [] => String::new(),
                values => format!("{word} {}\n", values.join(" ")),
            };
            let servers = dns.servers.iter().map(|ip| format!("nameserver {ip}\n"));
            line("search", &dns.searches)
                + &servers.collect::<String>()
                + &line("options", &dns.options)
        }
    };
    for (name, text) in NAMES.iter().zip([hostname, hosts, resolver]) {
        fs::write(folder.join(name), text)?;
    }
    Ok(())
}

/// Mounts them into a container of the pod, except where it has something there.
pub fn mount(bundle: &Path, spec: &mut Value) {
    let folder = bundle.join(FOLDER);
    if !folder.exists() {
        return;
    }
    let readonly = spec.pointer("/root/readonly") == Some(&Value::Bool(true));
    let Some(spec) = spec.as_object_mut() else {
        return;
    };
    let mounts = spec.entry("mounts").or_insert_with(|| json!([]));
    let Some(mounts) = mounts.as_array_mut() else {
        return;
    };
    for name in NAMES {
        let destination = format!("/etc/{name}");
        if mounts.iter().any(|m| m["destination"] == *destination) {
            continue;
        }
        mounts.push(json!({
            "destination": destination, "type": "bind", "source": folder.join(name),
            "options": ["rbind", "rprivate", if readonly { "ro" } else { "rw" }],
        }));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pods_names_and_servers_are_in_files_that_its_containers_get() {
        let bundle = tempfile::tempdir().unwrap();
        let mut config = PodSandboxConfig::new();
        config.hostname = "web".into();
        let dns = config.dns_config.mut_or_insert_default();
        dns.servers = vec!["10.0.0.1".into(), "10.0.0.2".into()];
        dns.searches = vec!["a.test".into(), "b.test".into()];
        write(bundle.path(), &config).unwrap();
        let read = |name| fs::read_to_string(bundle.path().join(FOLDER).join(name)).unwrap();
        assert_eq!(read("hostname"), "web\n");
        assert_eq!(
            read("resolv.conf"),
            "search a.test b.test\nnameserver 10.0.0.1\nnameserver 10.0.0.2\n"
        );
        assert!(!read("hosts").is_empty());
        let mut spec = json!({ "root": { "readonly": true },
            "mounts": [{ "destination": "/etc/hosts", "source": "/kubelets" }] });
        mount(bundle.path(), &mut spec);
        let mounts = spec["mounts"].as_array().unwrap();
        assert_eq!(mounts.len(), 3);
        assert_eq!(mounts[0]["source"], "/kubelets");
        assert_eq!(mounts[1]["destination"], "/etc/hostname");
        assert_eq!(mounts[1]["options"][2], "ro");
    }

    #[test]
    fn a_bundle_without_them_changes_nothing() {
        let bundle = tempfile::tempdir().unwrap();
        let mut spec = json!({});
        mount(bundle.path(), &mut spec);
        assert_eq!(spec, json!({}));
    }
}
