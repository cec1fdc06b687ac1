use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use super::{
    Target,
    plan::Plan,
    undo::undo,
    wanted::{FILES, Facts, wanted},
};

struct Rig {
    dir: tempfile::TempDir,
    target: Target,
    facts: Facts,
}

/// All files, links and folders below a folder, with permissions and content.
fn tree(root: &Path) -> BTreeMap<PathBuf, (u32, Vec<u8>)> {
    let mut all = BTreeMap::new();
    let mut open = vec![root.to_owned()];
    while let Some(folder) = open.pop() {
        for entry in fs::read_dir(folder).unwrap().flatten() {
            let path = entry.path();
            let data = fs::symlink_metadata(&path).unwrap();
            let content = if data.is_symlink() {
                fs::read_link(&path)
                    .unwrap()
                    .into_os_string()
                    .into_encoded_bytes()
            } else if data.is_dir() {
                open.push(path.clone());
                Vec::new()
            } else {
                fs::read(&path).unwrap()
            };
            all.insert(path, (data.permissions().mode(), content));
        }
    }
    all
}

impl Rig {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        for (name, _) in FILES {
            fs::create_dir_all(dir.path().join("dist")).unwrap();
            fs::write(dir.path().join("dist").join(name), name).unwrap();
        }
        fs::create_dir(dir.path().join("root")).unwrap();
        let target = Target::new(dir.path().join("root"), "/usr/local".into()).unwrap();
        let facts = Facts {
            engine: "emulated",
            why: "no kvm: none here".into(),
            containerd: Some((2, 1)),
            docker: true,
        };
        Self { dir, target, facts }
    }

    fn write(&self, path: &str, text: &str) {
        let path = self.target.on_host(Path::new(path));
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn read(&self, path: &str) -> String {
        fs::read_to_string(self.target.on_host(Path::new(path))).unwrap()
    }

    fn plan(&self) -> Result<Plan, super::Error> {
        let from = self.dir.path().join("dist");
        Plan::new(&self.target, wanted(&self.target, &from, &self.facts)?)
    }

    fn install(&self) -> String {
        let plan = self.plan().unwrap();
        plan.apply(&self.target).unwrap();
        plan.text()
    }

    fn tree(&self) -> BTreeMap<PathBuf, (u32, Vec<u8>)> {
        tree(&self.target.root)
    }
}

#[test]
fn what_was_installed_is_taken_back_byte_for_byte() {
    let rig = Rig::new();
    rig.write("/etc/docker/daemon.json", "{\n  \"debug\": true\n}");
    let docker = rig.target.on_host(Path::new("/etc/docker/daemon.json"));
    fs::set_permissions(&docker, fs::Permissions::from_mode(0o640)).unwrap();
    rig.write(
        "/etc/containerd/config.toml",
        "version = 3\nimports = [\"conf.d/*.toml\"]\n",
    );
    let before = rig.tree();
    rig.plan().unwrap();
    assert_eq!(rig.tree(), before, "a plan changes nothing");
    let text = rig.install();
    assert!(text.contains("+     \"runtimes\""), "{text}");
    assert!(text.contains("systemctl restart containerd"), "{text}");
    assert_eq!(rig.read("/usr/local/bin/bulkhead"), "bulkhead");
    assert!(
        rig.read("/etc/bulkhead/config.toml")
            .ends_with("engine = \"emulated\"\n")
    );
    assert!(
        rig.read("/etc/containerd/conf.d/bulkhead.toml")
            .contains("version = 3")
    );
    assert_eq!(
        fs::metadata(&docker).unwrap().permissions().mode() & 0o777,
        0o640
    );
    let installed = rig.tree();
    // A second time is no change, and does not forget what was there before.
    assert!(rig.install().starts_with("Everything is in place."));
    assert_eq!(rig.tree(), installed);
    undo(&rig.target, true).unwrap();
    assert_eq!(rig.tree(), installed, "a dry run changes nothing");
    undo(&rig.target, false).unwrap();
    assert_eq!(rig.tree(), before);
    assert!(
        undo(&rig.target, false)
            .unwrap_err()
            .to_string()
            .contains("no installation")
    );
}

#[test]
fn an_upgrade_replaces_what_is_ours_and_undo_still_knows_what_was_before() {
    let rig = Rig::new();
    rig.write("/etc/docker/daemon.json", "{}");
    let before = rig.tree();
    rig.install();
    fs::write(rig.dir.path().join("dist/bulkhead-vmm"), "newer").unwrap();
    let text = rig.install();
    assert!(
        text.contains("bulkhead-vmm") && !text.contains("vmlinux"),
        "{text}"
    );
    assert_eq!(rig.read("/usr/local/lib/bulkhead/bulkhead-vmm"), "newer");
    undo(&rig.target, false).unwrap();
    assert_eq!(rig.tree(), before);
}

#[test]
fn what_somebody_changed_is_left_and_named() {
    let rig = Rig::new();
    rig.install();
    rig.write("/etc/bulkhead/config.toml", "engine = \"kvm\"\nvcpus = 2\n");
    let text = rig.install();
    assert!(text.contains("left   /etc/bulkhead/config.toml"), "{text}");
    assert!(rig.read("/etc/bulkhead/config.toml").contains("vcpus = 2"));
    rig.write("/usr/local/share/bulkhead/mine", "");
    let text = undo(&rig.target, false).unwrap();
    assert!(
        text.contains("left     /etc/bulkhead/config.toml: it was changed"),
        "{text}"
    );
    assert!(
        text.contains("left     /usr/local/share/bulkhead: it is not empty"),
        "{text}"
    );
    let left: Vec<_> = rig
        .tree()
        .into_keys()
        .filter(|path| path.is_file())
        .collect();
    assert_eq!(left.len(), 2, "{left:?}");
}

#[test]
fn what_others_placed_is_never_replaced() {
    let rig = Rig::new();
    rig.write("/etc/bulkhead/config.toml", "vcpus = 3\n");
    let text = rig.install();
    assert!(text.contains("left   /etc/bulkhead/config.toml"), "{text}");
    undo(&rig.target, false).unwrap();
    assert_eq!(rig.read("/etc/bulkhead/config.toml"), "vcpus = 3\n");
    rig.write("/usr/local/bin/bulkhead", "another program");
    let error = rig.plan().unwrap_err().to_string();
    assert!(error.contains("/usr/local/bin/bulkhead"), "{error}");
    assert_eq!(rig.tree().len(), 7, "nothing was placed: {:?}", rig.tree());
}

#[test]
fn an_installation_that_stopped_half_way_is_taken_back() {
    let rig = Rig::new();
    rig.write("/etc/docker/daemon.json", "{}");
    // A folder where a file must go: the last item of all.
    rig.write("/etc/docker/.daemon.json.bulkhead-new/x", "");
    let before = rig.tree();
    assert!(rig.plan().unwrap().apply(&rig.target).is_err());
    assert_ne!(rig.tree(), before);
    undo(&rig.target, false).unwrap();
    assert_eq!(rig.tree(), before);
}

#[test]
fn paths_must_be_absolute_and_files_must_be_there() {
    assert!(Target::new("root".into(), "/usr".into()).is_err());
    let rig = Rig::new();
    fs::remove_file(rig.dir.path().join("dist/vmlinux")).unwrap();
    assert!(rig.plan().unwrap_err().to_string().contains("vmlinux"));
}
