use serde_json::json;

use super::*;
use crate::config::Config;

fn good() -> Value {
    json!({
        "process": { "args": ["sh"], "env": null },
        "root": { "path": "rootfs", "readonly": true },
        "annotations": null,
        "linux": { "namespaces": [
            { "type": "pid" }, { "type": "network", "path": "/var/run/netns/x" }
        ], "unknownField": { "kept": true } }
    })
}

fn parse(value: &Value) -> Result<Spec, Error> {
    Spec::parse(
        value.to_string().as_bytes(),
        Path::new("/b/config.json"),
        Path::new("/b"),
        &host(),
    )
}

/// The CPUs of a larger host than this may be.
fn host() -> HostCpus {
    HostCpus::of("0-99\n")
}

/// A good spec with one change.
fn with(pointer: &str, value: Value) -> Value {
    let mut spec = good();
    let (parent, key) = pointer.rsplit_once('/').unwrap();
    spec.pointer_mut(parent).unwrap()[key] = value;
    spec
}

fn refusal(pointer: &str, value: Value) -> String {
    parse(&with(pointer, value)).unwrap_err().to_string()
}

fn guest() -> Guest {
    Guest {
        vcpus: 4,
        inits: [(1000, Some(52)), (1001, Some(60)), (1002, None)].into(),
        pod_network: true,
    }
}

/// What the agent gets.
fn sent(spec: &Value) -> Value {
    let mut spec = parse(spec).unwrap();
    spec.translate(guest()).unwrap();
    serde_json::from_slice(&spec.to_json()).unwrap()
}

#[test]
fn fields_nobody_here_knows_reach_the_agent_and_the_network_path_becomes_the_guests() {
    let spec = parse(&good()).unwrap();
    assert_eq!(spec.root, Path::new("/b/rootfs"));
    assert!(spec.root_readonly);
    let sent = sent(&good());
    assert_eq!(sent["linux"]["unknownField"]["kept"], true);
    assert_eq!(sent["linux"]["namespaces"][1]["path"], "/proc/1/ns/net");
    // Another container of the pod, which wants a network of its own.
    let own = with("/linux/namespaces", json!([{"type":"network"}]));
    let mut spec = parse(&own).unwrap();
    spec.translate(Guest {
        pod_network: false,
        ..guest()
    })
    .unwrap();
    assert!(spec.value["linux"]["namespaces"][0].get("path").is_none());
}

#[test]
fn refusals_name_the_field() {
    for (pointer, value, names) in [
        ("/process", Value::Null, "process: is missing"),
        ("/process/args", json!([]), "process.args: is empty"),
        ("/root/path", json!(""), "root.path: is missing or empty"),
        (
            "/ociVersion",
            json!("2.0.0"),
            "ociVersion: \"2.0.0\" is not",
        ),
        (
            "/linux/namespaces",
            json!([{"type":"pid"}]),
            "linux.namespaces: joining the host's",
        ),
        (
            "/linux/namespaces",
            json!([{"type":"network"},{"type":"pid","path":"/run/pid"}]),
            "linux.namespaces[pid].path: /run/pid is of the host",
        ),
        (
            "/linux/namespaces",
            json!([{"type":"network"},{"type":"ipc","path":"/proc/5/ns/uts"}]),
            "linux.namespaces[ipc].path",
        ),
        (
            "/hooks",
            json!({"prestart":[{"path":"x"}]}),
            "hooks.prestart[0].path: is not an absolute",
        ),
        (
            "/annotations",
            json!({"io.bulkhead.cpus":"2"}),
            "annotations[io.bulkhead.cpus]: is unknown; there are io.bulkhead.vcpus, io.bulkhead.memory_mib, io.bulkhead.port_forward",
        ),
        (
            "/annotations",
            json!({"io.bulkhead.port_forward":"no"}),
            "annotations[io.bulkhead.port_forward]: \"no\" is neither",
        ),
        (
            "/annotations",
            json!({"io.bulkhead.memory_mib":"95"}),
            "below the minimum of 96 MiB",
        ),
        (
            "/annotations",
            json!({"io.bulkhead.vcpus":"33"}),
            "annotations[io.bulkhead.vcpus]: 33",
        ),
        (
            "/annotations",
            json!({"io.bulkhead.vcpus":"two"}),
            "not a number",
        ),
        (
            "/linux/namespaces",
            json!("net"),
            "/b/config.json is not a valid OCI spec",
        ),
    ] {
        let text = refusal(pointer, value);
        assert!(text.contains(names), "{pointer}: {text}");
    }
}

#[test]
fn what_the_table_refuses_is_refused_by_its_name_and_reason() {
    for (pointer, value, names) in [
        (
            "/linux/intelRdt",
            json!({"closID":"a"}),
            "linux.intelRdt.closID: the guest has no resctrl",
        ),
        (
            "/linux/mountLabel",
            json!("a:b"),
            "linux.mountLabel: the guest has no SELinux",
        ),
        (
            "/process/selinuxLabel",
            json!("a:b"),
            "process.selinuxLabel: the guest has",
        ),
        (
            "/windows",
            json!({"servicing":true}),
            "windows: is for Windows",
        ),
        (
            "/linux/resources",
            json!({"rdma":{"hca1":{"hcaHandles":3}}}),
            "linux.resources.rdma.hca1.hcaHandles: the guest has no RDMA",
        ),
        (
            "/linux/resources",
            json!({"memory":{"limit":1,"oomGroup":true}}),
            "linux.resources.memory.oomGroup: is not known here",
        ),
        (
            "/linux/seccomp",
            json!({"listenerPath":"/x"}),
            "linux.seccomp.listenerPath",
        ),
    ] {
        let text = refusal(pointer, value);
        assert!(text.contains(names), "{pointer}: {text}");
    }
    parse(&with(
        "/linux/resources",
        json!({"memory":{"swappiness":0,"disableOOMKiller":false}}),
    ))
    .unwrap();
}

#[test]
fn default_apparmor_profiles_are_not_sent_and_others_are_refused() {
    for profile in check::APPARMOR_DEFAULTS {
        let spec = with("/process/apparmorProfile", json!(profile));
        assert!(sent(&spec)["process"].get("apparmorProfile").is_none());
    }
    let text = refusal("/process/apparmorProfile", json!("mine"));
    assert!(
        text.starts_with("process.apparmorProfile: the guest has no AppArmor"),
        "{text}"
    );
    let exec = json!({"args":["sh"],"apparmorProfile":"docker-default"}).to_string();
    let exec = process(exec.as_bytes(), &Cpus::default()).unwrap();
    assert!(!String::from_utf8(exec).unwrap().contains("apparmor"));
}

#[test]
fn a_spec_that_is_too_large_or_no_json_names_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("config.json");
    fs::write(&file, vec![b' '; SPEC_MAX + 1]).unwrap();
    let text = Spec::load(dir.path()).unwrap_err().to_string();
    assert!(text.contains("config.json is larger"), "{text}");
    fs::write(&file, "{").unwrap();
    let text = Spec::load(dir.path()).unwrap_err().to_string();
    assert!(text.contains("config.json is not a valid"), "{text}");
}

fn size(spec: &Value) -> (u64, u64) {
    let config = Config::parse("", Path::new("/c"), Path::new("/o")).unwrap();
    let host = Host {
        cpus: 8,
        memory_mib: 8192,
    };
    let size = parse(spec).unwrap().sizing(&config, host).unwrap().start;
    (size.vcpus, size.memory_mib)
}

#[test]
fn a_machine_holds_the_containers_limits_but_not_more_than_the_host() {
    let resources = |value| with("/linux/resources", value);
    assert_eq!(size(&good()), (1, 512));
    for (limits, expected) in [
        (json!({"memory":{"limit": 1_u64 << 30}}), (1, 1024 + 128)),
        (json!({"memory":{"limit": i64::MAX}}), (1, 8192)),
        (json!({"memory":{"limit": -1}}), (1, 512)),
        (
            json!({"cpu":{"quota":300_000,"period":100_000},"memory":{"limit": 2_u64 << 30}}),
            (3, 2176),
        ),
        (json!({"cpu":{"quota":250_000}}), (3, 512)),
        (json!({"cpu":{"quota":-1,"period":100_000}}), (1, 512)),
        (json!({"cpu":{"cpus":"4-6,9"}}), (4, 512)),
        (
            json!({"cpu":{"cpus":"0-1","quota":300_000,"period":100_000}}),
            (3, 512),
        ),
        (json!({"cpu":{"cpus":"0-99"}}), (8, 512)),
        (json!({"cpu":{"quota":i64::MAX,"period":1}}), (8, 512)),
    ] {
        assert_eq!(size(&resources(limits.clone())), expected, "{limits}");
    }
}

#[test]
fn annotations_are_the_least_and_the_pods_sums_count() {
    let annotations = |value| with("/annotations", value);
    let ours = json!({"io.bulkhead.memory_mib":"128","io.bulkhead.vcpus":"4"});
    assert_eq!(size(&annotations(ours.clone())), (4, 128));
    let mut spec = annotations(ours);
    spec["linux"]["resources"] =
        json!({"cpu":{"quota":600_000,"period":100_000},"memory":{"limit":1_u64 << 28}});
    assert_eq!(size(&spec), (6, 256 + 128));
    let pod = json!({"io.kubernetes.cri.sandbox-cpu-quota":"300000","io.kubernetes.cri.sandbox-cpu-period":"100000",
                     "io.kubernetes.cri.sandbox-memory":"2147483648"});
    assert_eq!(size(&annotations(pod)), (3, 2048 + 128));
}

#[test]
fn a_cpuset_becomes_the_guests_first_cpus_and_affinity_keeps_its_rank() {
    let mut spec = with(
        "/linux/resources",
        json!({"cpu":{"cpus":"2,5-6","mems":""}}),
    );
    spec["process"]["execCPUAffinity"] = json!({"initial":"2","final":"5-7"});
    let sent = sent(&spec);
    assert_eq!(sent["linux"]["resources"]["cpu"]["cpus"], "0,1,2");
    assert_eq!(
        sent["process"]["execCPUAffinity"],
        json!({"initial":"0","final":"1,2"})
    );
    let small: Value =
        serde_json::from_slice(&resources_on(&host(), b"{\"cpu\":{\"cpus\":\"0-9\"}}", 2).unwrap())
            .unwrap();
    assert_eq!(small["cpu"]["cpus"], "0,1");
}

#[test]
fn cpus_that_the_container_does_not_have_and_lists_that_are_none_are_refused() {
    let mut spec = with("/linux/resources", json!({"cpu":{"cpus":"2-3"}}));
    spec["process"]["execCPUAffinity"] = json!({"initial":"0"});
    let text = parse(&spec)
        .unwrap()
        .translate(guest())
        .unwrap_err()
        .to_string();
    assert!(
        text.starts_with("process.execCPUAffinity.initial: the container has none"),
        "{text}"
    );
    for (list, field) in [("cpus", "cpu.cpus: \"x\""), ("mems", "cpu.mems: \"x\"")] {
        let text = refusal("/linux/resources", json!({"cpu":{list:"x"}}));
        assert!(text.contains(field), "{text}");
    }
    let text = refusal("/linux/resources", json!({"cpu":{"mems":"4000"}}));
    assert!(
        text.contains("cpu.mems: memory of a machine is not bound"),
        "{text}"
    );
}

#[test]
fn a_cpu_that_the_host_does_not_have_is_refused_by_field_and_number() {
    let why = "linux.resources.cpu.cpus: the host has no CPU 100; it has 0-99";
    let text = refusal("/linux/resources", json!({"cpu":{"cpus":"0,98-101"}}));
    assert!(text.contains(why), "{text}");
    let update = |cpus: &str| {
        let json = json!({"cpu":{"cpus":cpus}}).to_string();
        resources_on(&host(), json.as_bytes(), 2)
    };
    let text = update("100").unwrap_err().to_string();
    assert!(text.contains(why), "{text}");
    update("99").unwrap();
    update("").unwrap();
}

#[test]
fn all_memory_nodes_of_the_host_are_the_guests_one() {
    let nodes =
        fs::read_to_string("/sys/devices/system/node/online").unwrap_or_else(|_| "0".into());
    let spec = with("/linux/resources", json!({"cpu":{"mems":nodes.trim()}}));
    assert_eq!(sent(&spec)["linux"]["resources"]["cpu"]["mems"], "0");
}

#[test]
fn the_pid_that_containerd_knows_means_that_container_of_the_pod() {
    let namespaces = json!([{"type":"network","path":"/proc/1000/ns/net"},
        {"type":"ipc","path":"/proc/1000/ns/ipc"}, {"type":"uts","path":"/proc/77/ns/uts"},
        {"type":"mount"}, {"type":"pid","path":"/proc/1001/ns/pid"}]);
    let spec = with("/linux/namespaces", namespaces);
    let sent = sent(&spec);
    assert_eq!(sent["linux"]["namespaces"][1]["path"], "/proc/52/ns/ipc");
    assert_eq!(sent["linux"]["namespaces"][2]["path"], "/proc/77/ns/uts");
    assert_eq!(sent["linux"]["namespaces"][4]["path"], "/proc/60/ns/pid");
    let spec = with(
        "/linux/namespaces",
        json!([{"type":"mount"}, {"type":"network"}, {"type":"ipc","path":"/proc/1002/ns/ipc"}]),
    );
    let mut spec = parse(&spec).unwrap();
    assert!(spec.joins());
    let text = spec.translate(guest()).unwrap_err().to_string();
    assert!(
        text.contains("linux.namespaces[ipc].path: the container that it names"),
        "{text}"
    );
    assert!(!parse(&good()).unwrap().joins());
}

#[test]
fn devices_of_the_guest_pass_and_others_are_refused_by_path_and_number() {
    let device = |path: &str, kind: &str, major: i64, minor: i64| json!([{"path":path,"type":kind,"major":major,"minor":minor}]);
    for (path, kind, major, minor) in [
        ("/dev/fuse", "c", 10, 229),
        ("/dev/net/tun", "c", 10, 200),
        ("/dev/p", "p", 0, 0),
    ] {
        parse(&with("/linux/devices", device(path, kind, major, minor))).unwrap();
    }
    for (path, kind, major, minor, why) in [
        (
            "/dev/kvm",
            "c",
            10,
            232,
            "linux.devices[0] (/dev/kvm, c 10:232): the guest has no such device",
        ),
        (
            "/dev/sda",
            "b",
            8,
            0,
            "(/dev/sda, b 8:0): is a block device of the host",
        ),
        ("/dev/loop0", "b", 7, 0, "is a block device of the host"),
    ] {
        let text = refusal("/linux/devices", device(path, kind, major, minor));
        assert!(text.contains(why), "{text}");
    }
}

#[test]
fn a_privileged_container_gets_the_devices_that_the_guest_has() {
    let mut spec = with(
        "/linux/devices",
        json!([
            {"path":"/dev/kvm","type":"c","major":10,"minor":232},
            {"path":"/dev/null","type":"c","major":1,"minor":3},
            {"path":"/dev/sda","type":"b","major":8,"minor":0},
            {"path":"/dev/loop0","type":"b","major":7,"minor":0}
        ]),
    );
    spec["linux"]["resources"] =
        json!({"devices":[{"allow":false,"access":"rwm"},{"allow":true,"access":"rwm"}]});
    let sent = sent(&spec);
    let paths: Vec<&str> = sent["linux"]["devices"]
        .as_array()
        .unwrap()
        .iter()
        .filter_map(|d| d["path"].as_str())
        .collect();
    assert_eq!(paths, ["/dev/null", "/dev/loop0"]);
    spec["linux"]["resources"] =
        json!({"devices":[{"allow":true,"access":"rwm"},{"allow":false,"access":"rwm"}]});
    assert!(parse(&spec).is_err());
}

#[test]
fn limits_of_loop_devices_pass_and_those_of_other_block_devices_are_refused() {
    for list in [
        "weightDevice",
        "throttleReadBpsDevice",
        "throttleWriteBpsDevice",
        "throttleReadIOPSDevice",
        "throttleWriteIOPSDevice",
    ] {
        let rate = if list == "weightDevice" {
            "weight"
        } else {
            "rate"
        };
        let of = |major: i64| json!({"blockIO":{list:[{"major":7,rate:100},{"major":major,"minor":16,rate:100}]}});
        let spec = with("/linux/resources", of(7));
        assert_eq!(sent(&spec)["linux"]["resources"], of(7));
        let why =
            format!("linux.resources.blockIO.{list}[1] (8:16): is a block device of the host");
        let text = refusal("/linux/resources", of(8));
        assert!(text.contains(&why), "{text}");
        let update = |major| resources(of(major).to_string().as_bytes(), 1);
        update(7).unwrap();
        assert!(update(8).unwrap_err().to_string().contains(&why));
    }
    let leaf = json!({"blockIO":{"weightDevice":[{"major":7,"minor":0,"leafWeight":100}]}});
    let text = refusal("/linux/resources", leaf);
    assert!(text.contains("blockIO.weightDevice.leafWeight"), "{text}");
}

#[test]
fn a_container_of_another_pod_names_its_sandbox() {
    let dir = tempfile::tempdir().unwrap();
    let spec = json!({"annotations":{"io.kubernetes.cri.sandbox-id":"pod1"}});
    fs::write(dir.path().join("config.json"), spec.to_string()).unwrap();
    assert_eq!(
        sandbox_of(dir.path(), "c1").unwrap().as_deref(),
        Some("pod1")
    );
    assert_eq!(sandbox_of(dir.path(), "pod1").unwrap(), None);
}

#[test]
fn execs_and_updates_are_checked_as_the_spec_is() {
    let exec = |json: &str| process(json.as_bytes(), &Cpus::default()).map_err(|e| e.to_string());
    assert!(exec("{\"args\":[\"sh\"],\"env\":null}").is_ok());
    for (json, why) in [
        ("{\"args\":[]}", "process.args: is empty"),
        ("{", "process: is not valid JSON"),
        ("[]", "process: is not a JSON object"),
        (
            "{\"args\":[\"a\"],\"selinuxLabel\":\"x\"}",
            "process.selinuxLabel",
        ),
    ] {
        assert!(exec(json).unwrap_err().starts_with(why), "{json}");
    }
    let text = resources(b"{\"network\":{\"classID\":5}}", 1)
        .unwrap_err()
        .to_string();
    assert!(
        text.starts_with("linux.resources.network.classID"),
        "{text}"
    );
}

#[test]
fn a_spec_full_of_unknown_names_is_no_trouble() {
    let mut spec = good();
    for n in 0..10_000 {
        spec["linux"][format!("field{n}\n\u{1b}")] = json!({"a":{"b":[1]}});
    }
    parse(&spec).unwrap();
}
