//! What kubelet mounts into containers, and what it changes in there while they run.

use std::{os::unix::fs::MetadataExt, path::Path};

use bulkhead_cri::{
    Cri, Int64Value,
    container::{mount, security, shell},
};
use bulkhead_harness::{
    Context, Outcome, Suite, Test, ensure, ensure_eq,
    failure::{make_folder, write},
    runner::ANY,
    test,
};

use super::IMAGES;
use crate::{cri, network::until};

/// The cases of this file.
pub const TESTS: &[Test] = &[test!(
    cri::volumes::of_every_kind_are_seen_on_both_sides,
    IMAGES,
    ANY
)
.cri()
.fast_host()];

/// A config map or a secret as kubelet writes it: the files are links into a folder that a link names, which is swapped at once.
fn publish(volume: &Path, version: &str, text: &str) -> Outcome {
    let data = volume.join(format!("..{version}"));
    make_folder(&data)?;
    write(data.join("key"), text)?;
    let (new, now) = (volume.join("..data_tmp"), volume.join("..data"));
    let link = |to: &str, at: &Path| {
        std::os::unix::fs::symlink(to, at).context(format_args!("link {}", at.display()))
    };
    link(&format!("..{version}"), &new)?;
    std::fs::rename(&new, &now).context("swap the data")?;
    match volume.join("key").is_symlink() {
        true => Ok(()),
        false => link("..data/key", &volume.join("key")),
    }
}

fn of_every_kind_are_seen_on_both_sides(suite: &Suite) -> Outcome {
    let cri = Cri::connect(suite, IMAGES)?;
    let folder = suite.folder("volumes")?;
    let volume = |name: &str| -> Outcome<std::path::PathBuf> {
        let path = folder.join(name);
        make_folder(&path)?;
        Ok(path)
    };
    let (config_map, disk, host) = (volume("config")?, volume("disk")?, volume("host")?);
    publish(&config_map, "first", "one")?;
    // An emptyDir in memory is a tmpfs that kubelet mounts where containerd lives.
    let memory = volume("memory")?;
    let tmpfs = suite
        .command("mount")
        .args(["-t", "tmpfs", "-o", "size=4m", "tmpfs"]);
    tmpfs.arg(&memory).output()?.ok()?;
    // fsGroup: kubelet gives the folder to the group, and new files get it.
    let grouped = volume("grouped")?;
    std::os::unix::fs::chown(&grouped, None, Some(2000)).context("chown")?;
    let setgid = std::os::unix::fs::PermissionsExt::from_mode(0o2775);
    std::fs::set_permissions(&grouped, setgid).context("chmod")?;
    make_folder(host.join("sub"))?;
    write(host.join("sub/app.conf"), "from a subPath")?;

    let pod = cri.run(cri.config("volumes"))?;
    let mut one = shell("one", "exec sleep 1000000");
    let who = security(&mut one);
    who.run_as_user = Some(Int64Value { value: 1000 });
    who.run_as_group = Some(Int64Value { value: 1000 });
    who.supplemental_groups = vec![2000];
    one.mounts = vec![
        mount(&config_map, "/etc/config", true),
        mount(&memory, "/memory", false),
        mount(&grouped, "/grouped", false),
        mount(&host.join("sub/app.conf"), "/etc/app.conf", true),
    ];
    let one = pod.launch(one)?;
    let mut two = shell("two", "exec sleep 1000000");
    two.mounts = vec![
        mount(&disk, "/disk", false),
        mount(&memory, "/memory", false),
        mount(&host, "/host", false),
    ];
    let two = pod.launch(two)?;

    ensure_eq!("config map", pod.sh(&one, "cat /etc/config/key")?, "one");
    publish(&config_map, "second", "two")?;
    until(suite.scale.seconds(5), "the config map's update", || {
        Ok(pod.sh(&one, "cat /etc/config/key")? == "two")
    })?;
    let said = pod.exec(&one, &["sh", "-c", "echo no >/etc/config/key"])?;
    ensure!(said.stderr.contains("Read-only file system"), "{said:?}");

    pod.sh(&two, "echo through memory >/memory/x; chmod 644 /memory/x")?;
    ensure_eq!("memory", pod.sh(&one, "cat /memory/x")?, "through memory");
    let fill = ["dd", "if=/dev/zero", "of=/memory/y", "bs=1M", "count=6"];
    let full = pod.exec(&two, &fill)?;
    ensure!(
        full.stderr.contains("No space left"),
        "the tmpfs has no limit: {full:?}"
    );

    pod.sh(&two, "echo kept >/disk/x; echo from inside >/host/y")?;
    ensure_eq!(
        "disk",
        bulkhead_harness::failure::read(disk.join("x"))?,
        "kept\n"
    );
    ensure_eq!(
        "host",
        bulkhead_harness::failure::read(host.join("y"))?,
        "from inside\n"
    );
    write(host.join("z"), "from outside")?;
    until(suite.scale.seconds(5), "the host's file", || {
        Ok(pod.exec(&two, &["cat", "/host/z"])?.stdout == "from outside")
    })?;

    ensure_eq!(
        "subPath",
        pod.sh(&one, "cat /etc/app.conf")?,
        "from a subPath"
    );
    pod.sh(&one, "touch /grouped/mine")?;
    let mine = std::fs::metadata(grouped.join("mine")).context("the file of the group")?;
    ensure_eq!("its owners", (mine.uid(), mine.gid()), (1000, 2000));
    pod.end()?;
    let unmount = suite.command("umount").arg(&memory);
    unmount.output()?.ok()?;
    Ok(())
}
