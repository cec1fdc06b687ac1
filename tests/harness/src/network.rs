//! A host of the suite's own as far as the network goes: a network and a mount namespace in which containerd, `ctr`
//! and the CNI plugins live, a second host behind a router ("outside"), and a neighbour of the pods ("lan"). Every
//! address is inside; the end of the namespaces is the clean-up.
//!
//! ```text
//!  outside 192.0.2.2, 2001:db8::2 ── up0 [host: containerd, NAT] cni0 ─┬─ lan
//!                                       192.0.2.1, 2001:db8::1         └─ pods 10.88.0.0/24, fd00:88::/64
//! ```

use std::{
    cell::{Cell, OnceCell},
    collections::BTreeSet,
    net::{Ipv4Addr, Ipv6Addr},
    path::{Path, PathBuf},
    time::Duration,
};

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::{
    command::{Input, Invocation, Running},
    failure::{Context, Failure, Outcome, skip},
};

/// The second host, which knows no way to the pods' addresses.
pub const OUTSIDE: &str = "outside";
/// A plain host on the pods' link.
pub const LAN: &str = "lan";
/// The host's addresses on the outside.
pub const HOST: (&str, &str) = ("192.0.2.1", "2001:db8::1");
/// Addresses of [`OUTSIDE`].
pub const OUTSIDE_ADDRESS: (&str, &str) = ("192.0.2.2", "2001:db8::2");
/// The host's addresses on the pods' link.
pub const GATEWAY: (&str, &str) = ("10.88.0.1", "fd00:88::1");

/// Where Debian and others have the plugins.
const PLUGINS: [&str; 2] = ["/usr/lib/cni", "/opt/cni/bin"];

/// Runs in the new namespaces; stdin is open as long as the suite lives. Without duplicate address detection, which
/// costs seconds and finds nothing here.
const SET_UP: &str = r#"
scratch=$1
mkdir -p "$scratch" /run/netns
mount -t tmpfs tmpfs "$scratch"
mount -t tmpfs tmpfs /run/netns
# Folders that clients and plugins take for granted, without a trace on the host.
for folder in etc var/lib; do
  mkdir -p "$scratch/$folder/upper" "$scratch/$folder/work"
  mount -t overlay overlay -o "lowerdir=/$folder,upperdir=$scratch/$folder/upper,workdir=$scratch/$folder/work" "/$folder"
done
mkdir -p /etc/cni/net.d /var/lib/cni
echo 1 >/proc/sys/net/ipv4/ip_forward
echo 1 >/proc/sys/net/ipv6/conf/all/forwarding
echo 0 >/proc/sys/net/ipv6/conf/default/accept_dad
ip link set lo up
ip netns add outside
ip link add up0 type veth peer name eth0 netns outside
ip address add 192.0.2.1/24 dev up0
ip address add 2001:db8::1/64 dev up0 nodad
ip link set up0 up
ip -n outside link set lo up
ip -n outside address add 192.0.2.2/24 dev eth0
ip -n outside address add 2001:db8::2/64 dev eth0 nodad
ip -n outside link set eth0 up
echo ready
exec cat
"#;

/// What a pod could leave: links, addresses, routes, rules, qdiscs, filters, firewall rules, namespaces, CNI's files.
const STATE: &str = r#"
ip -o link | sed -E 's/^[0-9]+: ([^:@]*).*/link \1/'
ip -o address | awk '{ print "address", $2, $4 }' | grep -v 'docker0 fe80'
{ ip route; ip -6 route; } | sed 's/^/route /; s/ linkdown//; s/ expires.*//' | grep -vE '^route fe80::/64 dev (veth|docker0)'
{ ip rule; ip -6 rule; } | sed 's/^/rule /'
tc qdisc | grep -v ' noqueue ' | sed 's/^/tc /'
ip netns | sed 's/^\([^ ]*\).*/network namespace \1/'
{ iptables-save; ip6tables-save; } 2>/dev/null | grep '^-A' | sed 's/^/firewall /'
{ iptables-legacy-save; ip6tables-legacy-save; } 2>/dev/null | grep '^-A' | sed 's/^/legacy firewall /'
find /var/lib/cni -type f | sed 's/^/file /'
"#;

/// The namespaces and what is in them; they end with this value.
#[derive(Debug)]
pub struct Network {
    anchor: Running,
    plugins: PathBuf,
    tools: OnceCell<PathBuf>,
    limit: Duration,
    counter: Cell<u32>,
}

impl Network {
    /// Makes them. `scratch` becomes a mount point inside.
    pub fn start(scratch: &Path, limit: Duration) -> Outcome<Self> {
        let bridge = |folder: &&str| Path::new(folder).join("bridge").exists();
        let Some(plugins) = PLUGINS.iter().find(|folder| bridge(folder)) else {
            return skip("no CNI plugins (Debian: containernetworking-plugins)");
        };
        let anchor = Invocation::new("unshare")
            .args(["--mount", "--net", "sh", "-ec", SET_UP, "network"])
            .arg(scratch)
            .input(Input::Open)
            .limit(Duration::from_secs(24 * 3600))
            .spawn()?;
        let network = Self {
            anchor,
            plugins: plugins.into(),
            tools: OnceCell::new(),
            limit,
            counter: Cell::new(0),
        };
        network.anchor.wait_for("ready", limit)?;
        let pods = pods();
        network.write("/etc/cni/net.d/10-pods.conflist", &pods.to_string())?;
        // Plugins make bridges and chains once; a first pod that comes and goes has them made.
        network.plug()?.with(&pods, "eth0", &[(1, 1)])?.end()?;
        // The neighbour stays, so that the bridge never loses its carrier.
        let mut lan = network.plug_named(LAN)?;
        lan.add(&pods, "eth0", &[])?;
        lan.forget();
        Ok(network)
    }

    /// The process whose namespaces they are.
    pub fn pid(&self) -> u32 {
        self.anchor.pid()
    }

    /// Words before a command that is to run inside.
    pub fn enter(&self) -> Vec<String> {
        ["nsenter", "-t", &self.pid().to_string(), "-m", "-n", "--"]
            .map(str::to_owned)
            .to_vec()
    }

    /// Ends the namespaces.
    pub fn end(&self) {
        self.anchor.signal(Signal::KILL);
    }

    /// A command on the host.
    pub fn host(&self, args: &[&str]) -> Invocation {
        let mut words = self.enter();
        words.extend(args.iter().map(|&word| word.to_owned()));
        of_words(&words).limit(self.limit)
    }

    /// A command in a network namespace made inside.
    pub fn at(&self, namespace: &str, args: &[&str]) -> Invocation {
        let net = format!("--net=/run/netns/{namespace}");
        self.host(&[&["nsenter", &net, "--"], args].concat())
    }

    /// A command of the image with the tools, on the host.
    pub fn tool(&self, args: &[&str]) -> Invocation {
        self.host(&[&["chroot", &self.tools()], args].concat())
    }

    /// A command of the image with the tools, in a network namespace made inside.
    pub fn tool_at(&self, namespace: &str, args: &[&str]) -> Invocation {
        self.at(namespace, &[&["chroot", &self.tools()], args].concat())
    }

    /// Root of the tools' image, as the mount namespace sees it.
    pub fn tools(&self) -> String {
        let folder = self.tools.get().map(|f| f.to_string_lossy().into_owned());
        folder.unwrap_or_else(|| "/".into())
    }

    /// Folder of the mounted image with the tools.
    pub(crate) fn set_tools(&self, folder: PathBuf) {
        let _ = self.tools.set(folder);
    }

    /// The plugins' folder.
    pub fn plugins(&self) -> &Path {
        &self.plugins
    }

    /// Writes a file as the mount namespace sees it.
    pub fn write(&self, path: &str, text: &str) -> Outcome {
        let input = Input::Bytes(text.as_bytes().to_vec());
        let script = "cat >\"$1\"";
        let command = self.host(&["sh", "-ec", script, "sh", path]).input(input);
        command.output()?.ok().map(drop)
    }

    /// A new network namespace for a pod.
    pub fn plug(&self) -> Outcome<Plug<'_>> {
        self.counter.set(self.counter.get() + 1);
        self.plug_named(&format!("pod{}", self.counter.get()))
    }

    fn plug_named(&self, name: &str) -> Outcome<Plug<'_>> {
        let script = "ip netns add \"$1\"; ip -n \"$1\" link set lo up; \
                      exec nsenter --net=/run/netns/\"$1\" sh -c 'echo 0 >/proc/sys/net/ipv6/conf/default/accept_dad'";
        let add = self.host(&["sh", "-ec", script, "sh", name]);
        add.output()?.ok()?;
        Ok(Plug {
            network: self,
            name: name.to_owned(),
            path: format!("/run/netns/{name}"),
            ours: true,
            joined: Vec::new(),
        })
    }

    /// A network namespace that somebody else made, by its path.
    pub fn plug_into(&self, name: &str, path: &str) -> Plug<'_> {
        Plug {
            network: self,
            name: name.to_owned(),
            path: path.to_owned(),
            ours: false,
            joined: Vec::new(),
        }
    }

    /// A new namespace on the pods' network.
    pub fn pod(&self) -> Outcome<Plug<'_>> {
        self.plug()?.with(&pods(), "eth0", &[])
    }

    /// What a pod could leave, one line a thing.
    pub fn state(enter: &[String]) -> BTreeSet<String> {
        let mut words = enter.to_vec();
        words.extend(["sh", "-c", STATE].map(str::to_owned));
        let text = of_words(&words)
            .output()
            .map(|o| o.text())
            .unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }
}

fn of_words(words: &[String]) -> Invocation {
    match words.split_first() {
        Some((program, args)) => Invocation::new(program).args(args),
        None => Invocation::new("false"),
    }
}

/// The pods' network: bridge with a gateway, NAT, both families, published ports, firewall.
pub fn pods() -> Value {
    let mut list = bridge("pods", "cni0", "10.88.0.0/24", "fd00:88::/64");
    if let Some(plugins) = list["plugins"].as_array_mut() {
        plugins.push(json!({ "type": "firewall", "backend": "iptables" }));
        plugins.push(
            json!({ "type": "portmap", "snat": true, "capabilities": { "portMappings": true } }),
        );
    }
    list
}

/// A bridge as a CNI network.
pub fn bridge(name: &str, link: &str, v4: &str, v6: &str) -> Value {
    json!({
        "cniVersion": "0.4.0", "name": name,
        "plugins": [{
            "type": "bridge", "bridge": link, "isGateway": true, "ipMasq": true, "hairpinMode": true,
            "ipam": {
                "type": "host-local", "ranges": [[{ "subnet": v4 }], [{ "subnet": v6 }]],
                "routes": [{ "dst": "0.0.0.0/0" }, { "dst": "::/0" }],
            },
        }],
    })
}

/// Another plugin as a CNI network with addresses by `host-local` and no routes.
pub fn single(name: &str, mut plugin: Value, ranges: &[&str]) -> Value {
    let ranges: Vec<Value> = ranges.iter().map(|r| json!([{ "subnet": r }])).collect();
    plugin["ipam"] = json!({ "type": "host-local", "ranges": ranges });
    json!({ "cniVersion": "0.4.0", "name": name, "plugins": [plugin] })
}

/// A network namespace and what CNI put into it.
#[derive(Debug)]
pub struct Plug<'a> {
    network: &'a Network,
    name: String,
    path: String,
    ours: bool,
    joined: Vec<Joined>,
}

#[derive(Debug)]
struct Joined {
    list: Value,
    interface: String,
    ports: Value,
    result: Value,
}

impl<'a> Plug<'a> {
    /// Its name under `/run/netns`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its path.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The option of `ctr run` that puts a container there.
    pub fn flag(&self) -> [String; 2] {
        ["--with-ns".into(), format!("network:{}", self.path)]
    }

    /// [`add`](Self::add) in a chain.
    pub fn with(mut self, list: &Value, interface: &str, ports: &[(u16, u16)]) -> Outcome<Self> {
        self.add(list, interface, ports)?;
        Ok(self)
    }

    /// CNI's ADD: every plugin of the list, each with what the one before it said (CNI spec 0.4, "Network
    /// Configuration Lists"). `ports` are published: on the host, in the pod.
    pub fn add(&mut self, list: &Value, interface: &str, ports: &[(u16, u16)]) -> Outcome {
        let map = |(host, pod): &(u16, u16)| json!({ "hostPort": host, "containerPort": pod, "protocol": "tcp" });
        let mut joined = Joined {
            list: list.clone(),
            interface: interface.to_owned(),
            ports: ports.iter().map(map).collect(),
            result: Value::Null,
        };
        let count = list["plugins"].as_array().map_or(0, Vec::len);
        for index in 0..count {
            let answer = self.call("ADD", &joined, index);
            let answer = match answer {
                Ok(answer) => answer,
                Err(error) => {
                    for index in (0..count).rev() {
                        let _ = self.call("DEL", &joined, index);
                    }
                    return Err(error);
                }
            };
            joined.result = serde_json::from_str(&answer).context("the plugin's answer")?;
        }
        self.joined.push(joined);
        Ok(())
    }

    /// CNI's DEL of one interface.
    pub fn remove(&mut self, interface: &str) -> Outcome {
        let found = self.joined.iter().position(|j| j.interface == interface);
        let joined = self
            .joined
            .remove(found.context(format_args!("no {interface}"))?);
        self.del(&joined)
    }

    fn del(&self, joined: &Joined) -> Outcome {
        let count = joined.list["plugins"].as_array().map_or(0, Vec::len);
        for index in (0..count).rev() {
            self.call("DEL", joined, index)?;
        }
        Ok(())
    }

    fn call(&self, command: &str, joined: &Joined, index: usize) -> Outcome<String> {
        let mut conf = joined.list["plugins"][index].clone();
        conf["cniVersion"] = joined.list["cniVersion"].clone();
        conf["name"] = joined.list["name"].clone();
        if !joined.result.is_null() {
            conf["prevResult"] = joined.result.clone();
        }
        if conf["capabilities"]["portMappings"] == true {
            conf["runtimeConfig"] = json!({ "portMappings": joined.ports });
        }
        let kind = conf["type"].as_str().context("a plugin's type")?;
        let program = self.network.plugins.join(kind);
        let output = self
            .network
            .host(&[&program.to_string_lossy()])
            .env("CNI_COMMAND", command)
            .env("CNI_CONTAINERID", &self.name)
            .env("CNI_NETNS", &self.path)
            .env("CNI_IFNAME", &joined.interface)
            .env("CNI_PATH", &self.network.plugins)
            .input(Input::Bytes(conf.to_string().into_bytes()))
            .output()?;
        if output.status == 0 {
            return Ok(output.text());
        }
        Err(Failure::Failed(format!(
            "CNI {command} by {kind}: {}{}",
            output.text(),
            output.errors()
        )))
    }

    /// Addresses of an interface as CNI told them, without the prefix length.
    pub fn addresses(&self, interface: &str) -> Vec<String> {
        let joined = self.joined.iter().find(|j| j.interface == interface);
        let ips = joined.and_then(|j| j.result["ips"].as_array());
        ips.into_iter()
            .flatten()
            .filter_map(|ip| Some(ip["address"].as_str()?.split('/').next()?.to_owned()))
            .collect()
    }

    /// The IPv4 address of `eth0`.
    pub fn v4(&self) -> Outcome<String> {
        let mut all = self.addresses("eth0").into_iter();
        all.find(|a| a.parse::<Ipv4Addr>().is_ok())
            .context("no IPv4 address")
    }

    /// The IPv6 address of `eth0`.
    pub fn v6(&self) -> Outcome<String> {
        let mut all = self.addresses("eth0").into_iter();
        all.find(|a| a.parse::<Ipv6Addr>().is_ok())
            .context("no IPv6 address")
    }

    /// A command of the host's in this namespace.
    pub fn inside(&self, args: &[&str]) -> Invocation {
        let net = format!("--net={}", self.path);
        self.network
            .host(&[&["nsenter", &net, "--"], args].concat())
    }

    /// A command of the image with the tools in this namespace.
    pub fn tool(&self, args: &[&str]) -> Invocation {
        self.inside(&[&["chroot", &self.network.tools()], args].concat())
    }

    /// Takes everything out and removes the namespace.
    pub fn end(mut self) -> Outcome {
        self.undo()
    }

    fn undo(&mut self) -> Outcome {
        while let Some(joined) = self.joined.pop() {
            self.del(&joined)?;
        }
        if std::mem::take(&mut self.ours) {
            let delete = self.network.host(&["ip", "netns", "delete", &self.name]);
            delete.output()?.ok()?;
        }
        Ok(())
    }

    /// It stays as long as the network.
    fn forget(mut self) {
        self.joined.clear();
        self.ours = false;
    }
}

impl Drop for Plug<'_> {
    fn drop(&mut self) {
        let _ = self.undo();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_names_its_plugins_in_order() {
        let list = pods();
        let plugins = list["plugins"].as_array().unwrap();
        let kinds: Vec<&str> = plugins.iter().filter_map(|p| p["type"].as_str()).collect();
        assert_eq!(kinds, ["bridge", "firewall", "portmap"]);
    }
}
