//! What a host can lack: room, descriptors, memory, a folder that can be written to. The client is told what, and nothing is left.

use std::{fs, os::unix::fs::PermissionsExt, path::Path};

use bulkhead_harness::{
    Context, Image, Invocation, Outcome, Output, Suite, Test, containerd::unmount_below, ensure,
    failure::write, runner::MACHINES, test,
};

use crate::{host, life::one_line};

const BUSYBOX: &[Image] = &[Image::Busybox];

/// The cases.
pub const TESTS: &[Test] = &[
    test!(host::a_state_folder_without_room, BUSYBOX, MACHINES),
    test!(host::a_state_folder_that_is_read_only, BUSYBOX, MACHINES),
    test!(host::a_volume_without_room, BUSYBOX, MACHINES),
    test!(host::a_rootfs_without_room, BUSYBOX, MACHINES),
    test!(host::a_network_namespace_that_is_missing, BUSYBOX, MACHINES),
    test!(host::few_descriptors, BUSYBOX, MACHINES),
    test!(host::no_memory_for_the_guest, BUSYBOX, MACHINES),
];

/// A tmpfs of a case's own; unmounted at its end.
struct Tmpfs<'a>(&'a Path);

impl<'a> Tmpfs<'a> {
    fn mount(folder: &'a Path, options: &str) -> Outcome<Self> {
        let mount = Invocation::new("mount").args(["-t", "tmpfs", "-o", options, "tmpfs"]);
        mount.arg(folder).output()?.ok()?;
        Ok(Self(folder))
    }
}

impl Drop for Tmpfs<'_> {
    fn drop(&mut self) {
        unmount_below(self.0);
    }
}

/// What the client was told.
fn told(output: &Output) -> String {
    one_line(&output.errors())
}

/// Each file more that the folder has room for takes the start one step further, until there is room for all.
fn a_state_folder_without_room(suite: &Suite) -> Outcome {
    let folder = suite.folder("full")?;
    let _configured = suite.configured(&format!("state = {folder:?}"))?;
    for inodes in 2..60 {
        let _tmpfs = Tmpfs::mount(&folder, &format!("mode=700,nr_inodes={inodes}"))?;
        let output = suite.busybox().args(&["echo", "here"]).output()?;
        let left = fs::read_dir(&folder).context("list the state folder")?;
        let left: Vec<_> = left.flatten().map(|e| e.file_name()).collect();
        ensure!(left.is_empty(), "{inodes} inodes: {left:?} is left");
        if output.status == 0 {
            ensure!(output.text() == "here", "no output: {:?}", output.text());
            // Folder, record, owner, user, configuration, sockets, logs.
            ensure!(inodes > 8, "{inodes} inodes were enough");
            return Ok(());
        }
        let told = told(&output);
        ensure!(told.contains("o space left on device"), "{inodes}: {told}");
    }
    Err("there is never room enough".into())
}

fn a_state_folder_that_is_read_only(suite: &Suite) -> Outcome {
    let folder = suite.folder("read-only")?;
    let _tmpfs = Tmpfs::mount(&folder, "ro")?;
    let _configured = suite.configured(&format!("state = {folder:?}"))?;
    let output = suite.busybox().args(&["true"]).output()?;
    output.refused(&["state folder", "Read-only file system"])?;
    Ok(())
}

/// The program is told, and the container goes on.
fn a_volume_without_room(suite: &Suite) -> Outcome {
    let folder = suite.folder("volume")?;
    let _tmpfs = Tmpfs::mount(&folder, "size=1m")?;
    let mount = format!(
        "type=bind,src={},dst=/volume,options=rbind:rw",
        folder.display()
    );
    let script = "dd if=/dev/zero of=/volume/file bs=64k count=100 conv=fsync 2>&1; echo $?; rm /volume/file; echo x >/volume/y && echo goes";
    let output = suite.busybox().mount(mount).sh(script).output()?.ok()?;
    let text = output.text();
    ensure!(
        text.contains("No space left on device") && text.ends_with("1\ngoes"),
        "output: {text}"
    );
    Ok(())
}

/// The snapshots' volume is full: the program is told, whatever writes nothing goes on, and the pod can be stopped and removed.
fn a_rootfs_without_room(suite: &Suite) -> Outcome {
    let folder = suite.folder("small")?;
    let snapshots = folder.join("io.containerd.snapshotter.v1.overlayfs/snapshots");
    let snapshots = snapshots.display();
    let before = format!("mkdir -p {snapshots}; mount -t tmpfs -o size=16m tmpfs {snapshots}");
    let another = suite.another_containerd("cases/small", &before)?;
    let (address, pid) = (another.address(), another.pid().to_string());
    // The client mounts snapshots, too.
    let ctr = |args: &[&str]| -> Outcome<Output> {
        let inside = Invocation::new("nsenter").args(["-t", &pid, "-m", "--"]);
        let ctr = suite.ctr_at(&address, args).words();
        inside.args(ctr).output()
    };
    let tar = suite.tar_of(Image::Busybox)?;
    ctr(&["image", "import", &tar.to_string_lossy()])?.ok()?;
    let name = suite.name("small");
    let image = Image::Busybox.reference();
    let runtime = suite.runtime();
    let run = ["run", "-d", "--null-io", "--runtime", runtime, &image];
    ctr(&[&run[..], &[&name, "sleep", "100000"]].concat())?.ok()?;
    let sh = |script: &str| {
        let id = suite.name("x");
        ctr(&["task", "exec", "--exec-id", &id, &name, "sh", "-c", script])
    };
    let fill = "dd if=/dev/zero of=/file bs=64k count=1000 conv=fsync 2>&1; echo $?";
    for round in 0..2 {
        let text = sh(fill)?.ok()?.text();
        ensure!(
            text.contains("No space left on device") && text.ends_with("\n1"),
            "round {round}: {text}"
        );
        let text = sh(
            "cat /etc/passwd >/dev/null && echo reads; dd if=/dev/zero of=/more bs=64k count=1 conv=fsync 2>/dev/null || echo full",
        )?;
        ensure!(
            text.text() == "reads\nfull",
            "round {round}: {}",
            text.text()
        );
        if round == 0 {
            let text = sh("rm /file && echo x >/other && cat /other")?.ok()?.text();
            ensure!(text == "x", "with room again: {text}");
        }
    }
    // Still full.
    ctr(&["task", "kill", "-s", "SIGTERM", &name])?.ok()?;
    ctr(&["task", "kill", "-s", "SIGKILL", &name])?;
    ctr(&["task", "rm", "-f", &name])?;
    ctr(&["container", "rm", &name])?.ok()?;
    let left = ctr(&["task", "ls", "-q"])?.ok()?.text();
    ensure!(left.is_empty(), "{left} is left");
    Ok(())
}

fn a_network_namespace_that_is_missing(suite: &Suite) -> Outcome {
    let run = suite
        .busybox()
        .flags(&["--with-ns", "network:/run/netns/none-such"]);
    let output = run.args(&["true"]).output()?;
    output.refused(&["/run/netns/none-such", "o such file"])?;
    Ok(())
}

/// Runs a container with each of the values as the limit `ulimit -LETTER` of its shim, and of all that the shim starts.
fn limited(
    suite: &Suite,
    letter: char,
    values: &[u32],
    mut judge: impl FnMut(u32, Output) -> Outcome,
) -> Outcome {
    let folder = suite.folder("limited")?;
    let (shim, limit) = (
        folder.join("containerd-shim-bulkhead-v1"),
        folder.join("value"),
    );
    let real = suite.dist.join("containerd-shim-bulkhead-v1");
    let script = format!(
        "#!/bin/sh\nulimit -{letter} $(cat {}) && exec {} \"$@\"\n",
        limit.display(),
        real.display()
    );
    write(&shim, script)?;
    fs::set_permissions(&shim, fs::Permissions::from_mode(0o755)).context("chmod")?;
    let before = format!("export PATH={}:$PATH", folder.display());
    let another = suite.another_containerd("limited", &before)?;
    let address = another.address();
    let rootfs = suite.rootfs()?;
    for value in values {
        write(&limit, value.to_string())?;
        let name = suite.name("limited");
        let run = ["run", "--rm", "--runtime", suite.runtime(), "--rootfs"];
        let run = suite.ctr_at(&address, run).arg(&rootfs).arg(&name);
        let output = run.args(["/bin/echo", "here"]).output()?;
        for object in ["task", "container"] {
            let remove = suite.ctr_at(&address, [object, "rm", &name]);
            let _ = remove.output();
        }
        judge(*value, output)?;
    }
    Ok(())
}

/// With ever more of them the start comes one step further; the client is always told why it ends.
fn few_descriptors(suite: &Suite) -> Outcome {
    let mut refused = 0;
    limited(
        suite,
        'n',
        &[8, 16, 20, 24, 32, 48, 256, 4096],
        |value, output| {
            if output.status == 0 {
                ensure!(output.text() == "here", "{value}: no output");
                return Ok(());
            }
            let told = told(&output);
            ensure!(value < 4096, "{value} are not enough: {told}");
            refused += 1;
            ensure!(told.contains("open files"), "{value}: {told}");
            Ok(())
        },
    )?;
    ensure!(refused > 0, "the limit has no effect");
    Ok(())
}

/// The guest's memory is reserved before anything runs: what cannot be had is said.
fn no_memory_for_the_guest(suite: &Suite) -> Outcome {
    limited(suite, 'v', &[400_000], |_, output| {
        let told = told(&output);
        ensure!(told.contains("annot allocate memory"), "{told}");
        Ok(())
    })
}
