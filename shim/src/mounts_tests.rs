use serde_json::json;

use super::*;

fn bundle(mounts: Value) -> (tempfile::TempDir, Spec) {
    let dir = tempfile::tempdir().unwrap();
    let spec = json!({
        "process": { "args": ["sh"] }, "root": { "path": "rootfs" }, "mounts": mounts,
        "linux": { "namespaces": [{ "type": "network" }] }
    });
    fs::write(dir.path().join("config.json"), spec.to_string()).unwrap();
    let spec = Spec::load(dir.path()).unwrap();
    (dir, spec)
}

fn mount(kind: &str, source: &str, options: &[String]) -> Mount {
    let mut mount = Mount::new();
    mount.type_ = kind.into();
    mount.source = source.into();
    mount.options = options.to_vec();
    mount
}

fn layers(dir: &Path) -> (String, Vec<String>) {
    let path = |name: &str| {
        let path = dir.join(name);
        fs::create_dir_all(&path).unwrap();
        path.display().to_string()
    };
    let options = vec![
        format!("workdir={}", path("7/work")),
        format!("upperdir={}", path("7/fs")),
        format!("lowerdir={}:{}", path("6/fs"), path("5/fs")),
        "index=off".into(),
    ];
    (path("7"), options)
}

#[test]
fn an_overlay_becomes_read_only_layers_and_one_tree_for_upper_and_work() {
    let (dir, mut spec) = bundle(json!([]));
    let (parent, options) = layers(dir.path());
    let plan = Plan::new(
        &[mount("overlay", "overlay", &options)],
        &mut spec,
        &mut Table::default(),
    )
    .unwrap();
    assert_eq!(plan.rootfs.lower, ["t0", "t1"]);
    assert_eq!(
        (plan.rootfs.upper.as_str(), plan.rootfs.work.as_str()),
        ("t2/fs", "t2/work")
    );
    assert_eq!(plan.rootfs.options, ["index=off"]);
    assert!(plan.trees[0].readonly && plan.trees[1].readonly);
    assert!(plan.trees[0].path.ends_with("6/fs"), "topmost first");
    assert!(!plan.trees[2].readonly);
    assert_eq!(plan.trees[2].path, Path::new(&parent));
}

#[test]
fn upper_and_work_in_different_folders_are_refused() {
    let (dir, mut spec) = bundle(json!([]));
    let (_, mut options) = layers(dir.path());
    let elsewhere = dir.path().join("8/work");
    fs::create_dir_all(&elsewhere).unwrap();
    options[0] = format!("workdir={}", elsewhere.display());
    let error = Plan::new(
        &[mount("overlay", "overlay", &options)],
        &mut spec,
        &mut Table::default(),
    )
    .unwrap_err();
    assert!(error.to_string().contains("not in one folder"), "{error}");
}

#[test]
fn a_single_bind_is_writable_unless_it_says_ro() {
    let (dir, mut spec) = bundle(json!([]));
    let path = dir.path().display().to_string();
    let rw = mount("bind", &path, &["rbind".into(), "rw".into()]);
    let plan = Plan::new(&[rw], &mut spec, &mut Table::default()).unwrap();
    assert_eq!(plan.rootfs.bind, "t0");
    let ro = mount("bind", &path, &["rbind".into(), "ro".into()]);
    let plan = Plan::new(&[ro], &mut spec, &mut Table::default()).unwrap();
    assert_eq!(plan.rootfs.lower, ["t0"]);
    assert!(plan.trees[0].readonly);
}

#[test]
fn an_empty_rootfs_and_unknown_kinds_are_refused_by_name() {
    let (dir, mut spec) = bundle(json!([]));
    let error = Plan::new(&[], &mut spec, &mut Table::default())
        .unwrap_err()
        .to_string();
    assert!(error.starts_with("rootfs: no mounts were given"), "{error}");
    fs::create_dir(dir.path().join("rootfs")).unwrap();
    let error = Plan::new(&[], &mut spec, &mut Table::default())
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("rootfs is empty: \"sh\" is not found"),
        "{error}"
    );
    let erofs = mount("erofs", "/x.img", &[]);
    let error = Plan::new(&[erofs], &mut spec, &mut Table::default())
        .unwrap_err()
        .to_string();
    assert!(error.contains("\"erofs\" is not supported"), "{error}");
    fs::create_dir(dir.path().join("rootfs/bin")).unwrap();
    assert_eq!(
        Plan::new(&[], &mut spec, &mut Table::default())
            .unwrap()
            .rootfs
            .bind,
        "t0"
    );
}

#[test]
fn bind_mounts_become_trees_and_the_guests_own_pass_through() {
    let host = tempfile::tempdir().unwrap();
    let source = host.path().display().to_string();
    let (dir, mut spec) = bundle(json!([
        { "destination": "/proc", "type": "proc", "source": "proc" },
        { "destination": "/data", "type": "bind", "source": source, "options": ["rbind", "ro"] },
        { "destination": "/w", "type": "none", "source": source, "options": ["bind", "ro", "rw"] }
    ]));
    fs::create_dir_all(dir.path().join("rootfs/bin")).unwrap();
    let plan = Plan::new(&[], &mut spec, &mut Table::default()).unwrap();
    let trees = &plan.trees[1..];
    assert_eq!(trees.len(), 2);
    assert!(trees[0].readonly && trees[0].recursive);
    assert!(!trees[1].readonly && !trees[1].recursive);
    assert!(trees.iter().all(|tree| tree.shared));
    assert_eq!(spec.value["mounts"][0]["source"], "proc");
    assert_eq!(spec.value["mounts"][1]["source"], "/run/bulkhead/trees/t1");
    assert_eq!(spec.value["mounts"][2]["source"], "/run/bulkhead/trees/t2");
}

#[test]
fn more_sources_than_a_container_may_have_are_refused() {
    let host = tempfile::tempdir().unwrap();
    let mount = |number: usize| {
        let source = host.path().join(number.to_string());
        fs::create_dir(&source).unwrap();
        json!({ "destination": format!("/{number}"), "type": "bind", "source": source })
    };
    let mounts: Vec<_> = (0..crate::limits::TREES).map(mount).collect();
    let (dir, mut spec) = bundle(json!(mounts));
    fs::create_dir_all(dir.path().join("rootfs/bin")).unwrap();
    let error = Plan::new(&[], &mut spec, &mut Table::default()).err();
    let text = error.map(|error| error.to_string()).unwrap_or_default();
    assert!(text.contains("more trees than"), "{text}");
}

#[test]
fn sources_that_are_missing_devices_or_other_file_systems_are_refused_with_their_index() {
    for (mount, why) in [
        (
            json!({ "destination": "/d", "type": "bind", "source": "/no/such" }),
            "mounts[0] (/d).source: /no/such: No such file",
        ),
        (
            json!({ "destination": "/d", "type": "bind", "source": "/dev/null" }),
            "is a device",
        ),
        (
            json!({ "destination": "/d", "type": "bind", "source": "x" }),
            "not an absolute path",
        ),
        (
            json!({ "destination": "/d", "type": "ext4", "source": "/dev/sda" }),
            "mount type \"ext4\"",
        ),
    ] {
        let (dir, mut spec) = bundle(json!([mount]));
        fs::create_dir_all(dir.path().join("rootfs/bin")).unwrap();
        let error = Plan::new(&[], &mut spec, &mut Table::default())
            .unwrap_err()
            .to_string();
        assert!(error.contains(why), "{error}");
    }
}

#[test]
fn a_colon_in_a_layers_path_can_be_escaped() {
    assert_eq!(
        split_lower("/a\\:b:/c"),
        [PathBuf::from("/a:b"), PathBuf::from("/c")]
    );
}

#[test]
fn a_source_mounted_twice_in_a_pod_is_one_tree_until_its_last_user_is_gone() {
    let host = tempfile::tempdir().unwrap();
    let source = host.path().display().to_string();
    let mounts = json!([
        { "destination": "/a", "type": "bind", "source": source, "options": ["rbind"] },
        { "destination": "/b", "type": "bind", "source": format!("{source}/."), "options": ["rbind"] },
        { "destination": "/c", "type": "bind", "source": source, "options": ["rbind", "ro"] }
    ]);
    let mut table = Table::default();
    let mut plan = || {
        let (dir, mut spec) = bundle(mounts.clone());
        let (_, options) = layers(dir.path());
        Plan::new(
            &[mount("overlay", "overlay", &options)],
            &mut spec,
            &mut table,
        )
        .unwrap()
        .trees
    };
    let (one, two) = (plan(), plan());
    let fresh = |trees: &[Tree]| trees[3..].iter().map(|t| t.fresh).collect::<Vec<_>>();
    assert_eq!(one[3].id, one[4].id);
    assert_ne!(one[3].id, one[5].id, "read-only is another tree");
    assert_eq!(fresh(&one), [true, false, true]);
    assert_eq!(fresh(&two), [false, false, false]);
    assert_eq!(table.release(&one).len(), 3, "only its own layers");
    assert_eq!(table.release(&two).len(), 5);
    assert!(table.release(&two[3..]).is_empty());
}

#[test]
fn an_overlay_among_the_mounts_gets_its_layers_as_trees() {
    let host = tempfile::tempdir().unwrap();
    let at = |name: &str| {
        fs::create_dir(host.path().join(name)).unwrap();
        host.path().join(name).display().to_string()
    };
    let options = [
        format!("lowerdir={}:{}", at("a"), at("b")),
        format!("upperdir={}", at("up")),
        format!("workdir={}", at("work")),
        "index=off".into(),
    ];
    let mounts = json!([{ "destination": "/o", "type": "overlay", "source": "overlay", "options": options }]);
    let (dir, mut spec) = bundle(mounts);
    fs::create_dir_all(dir.path().join("rootfs/bin")).unwrap();
    let plan = Plan::new(&[], &mut spec, &mut Table::default()).unwrap();
    assert_eq!(
        spec.value["mounts"][0]["options"],
        json!([
            "lowerdir=/run/bulkhead/trees/t1:/run/bulkhead/trees/t2",
            "upperdir=/run/bulkhead/trees/t3/up",
            "workdir=/run/bulkhead/trees/t3/work",
            "index=off"
        ])
    );
    assert!(plan.trees[1].readonly && plan.trees[2].readonly && !plan.trees[3].readonly);
    let (dir, mut spec) = bundle(
        json!([{ "destination": "/o", "type": "overlay", "options": ["lowerdir=/no/such"] }]),
    );
    fs::create_dir_all(dir.path().join("rootfs/bin")).unwrap();
    let error = Plan::new(&[], &mut spec, &mut Table::default())
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("mounts[0] (/o).lowerdir: /no/such"),
        "{error}"
    );
}

#[test]
fn a_read_only_root_gets_the_mount_points_that_it_lacks_and_nothing_outside() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("root");
    fs::create_dir_all(root.join("real")).unwrap();
    std::os::unix::fs::symlink("/real", root.join("link")).unwrap();
    std::os::unix::fs::symlink("/../../outside", root.join("away")).unwrap();
    fs::write(dir.path().join("file"), "").unwrap();
    let spec = json!({ "mounts": [
        { "type": "tmpfs", "destination": "/dev" },
        { "type": "tmpfs", "destination": "/dev/shm" },
        { "type": "bind", "source": dir.path().join("file"), "destination": "/sbin/init" },
        { "type": "bind", "source": dir.path(), "destination": "/link/../link/data" },
        { "type": "tmpfs", "destination": "/away/x" },
        { "type": "tmpfs", "destination": "/../up" },
    ] });
    points::make(&root, &spec);
    let mut names: Vec<_> = fs::read_dir(&root)
        .unwrap()
        .map(|e| e.unwrap().file_name())
        .collect();
    names.sort();
    assert_eq!(names, ["away", "dev", "link", "real", "sbin", "up"]);
    assert!(root.join("sbin/init").is_file() && root.join("real/data").is_dir());
    assert_eq!(fs::read_dir(root.join("dev")).unwrap().count(), 0);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
}
