//! What is refused: each with an error that names the field or the path, and nothing left.

use bulkhead_harness::{
    Context, Engine, Image, Invocation, Outcome, Run, Suite, Test, ensure,
    failure::{make_folder, write},
    runner::{ANY, MACHINES},
    spec, test,
};
use serde_json::json;

use crate::bad_input;

const BUSYBOX: &[Image] = &[Image::Busybox];

/// The cases of this group.
pub const TESTS: &[Test] = &[
    test!(
        bad_input::missing_program_is_not_found_in_path,
        BUSYBOX,
        ANY
    ),
    test!(
        bad_input::program_without_permission_is_denied,
        BUSYBOX,
        ANY
    ),
    test!(
        bad_input::program_of_another_format_is_said,
        BUSYBOX,
        MACHINES
    ),
    test!(bad_input::kernel_missing, BUSYBOX, MACHINES),
    test!(bad_input::kernel_truncated, BUSYBOX, MACHINES),
    test!(bad_input::kernel_not_an_elf, BUSYBOX, MACHINES),
    test!(bad_input::initramfs_missing, BUSYBOX, MACHINES),
    test!(bad_input::emulator_missing, BUSYBOX, &[Engine::Emulated]),
    test!(
        bad_input::kvm_without_hardware,
        BUSYBOX,
        &[Engine::Emulated]
    ),
    test!(bad_input::kvm_device_missing, BUSYBOX, MACHINES),
    test!(bad_input::configuration_with_unknown_key, BUSYBOX, MACHINES),
    test!(bad_input::configuration_that_is_no_toml, BUSYBOX, MACHINES),
    test!(bad_input::memory_below_the_minimum, BUSYBOX, MACHINES),
    test!(bad_input::vcpus_that_are_no_number, BUSYBOX, MACHINES),
    test!(
        bad_input::unknown_annotation_under_our_prefix,
        BUSYBOX,
        MACHINES
    ),
    test!(bad_input::network_of_the_host, BUSYBOX, MACHINES),
    test!(bad_input::spec_without_a_process, BUSYBOX, MACHINES),
    test!(bad_input::spec_without_arguments, BUSYBOX, MACHINES),
    test!(bad_input::spec_with_an_empty_rootfs, BUSYBOX, MACHINES),
    test!(
        bad_input::spec_with_a_rootfs_that_is_missing,
        BUSYBOX,
        MACHINES
    ),
    test!(
        bad_input::spec_with_a_bind_source_that_is_missing,
        BUSYBOX,
        MACHINES
    ),
    test!(
        bad_input::spec_with_a_mount_of_unknown_type,
        BUSYBOX,
        MACHINES
    ),
    test!(
        bad_input::spec_with_a_relative_working_folder,
        BUSYBOX,
        MACHINES
    ),
    test!(bad_input::ids_that_are_paths, BUSYBOX, MACHINES),
];

fn missing_program_is_not_found_in_path(suite: &Suite) -> Outcome {
    let needle = "executable file not found in $PATH";
    suite
        .busybox()
        .args(&["no-such-program"])
        .output()?
        .refused(&["no-such-program", needle])?;
    suite
        .busybox()
        .args(&["/no/such"])
        .output()?
        .refused(&["/no/such", "no such file or directory"])?;
    Ok(())
}

fn program_without_permission_is_denied(suite: &Suite) -> Outcome {
    suite
        .busybox()
        .args(&["/etc/passwd"])
        .output()?
        .refused(&["/etc/passwd", "permission denied"])?;
    Ok(())
}

fn program_of_another_format_is_said(suite: &Suite) -> Outcome {
    let folder = suite.folder("format")?;
    write(folder.join("program"), "no magic")?;
    Invocation::new("chmod")
        .arg("755")
        .arg(folder.join("program"))
        .output()?
        .ok()?;
    let run = suite.busybox().mount(format!(
        "type=bind,src={},dst=/f,options=rbind:ro",
        folder.display()
    ));
    run.args(&["/f/program"])
        .output()?
        .refused(&["/f/program", "exec format error"])?;
    Ok(())
}

/// A container under other settings is refused with these words, and the next one runs.
fn with_settings(suite: &Suite, lines: &str, needles: &[&str]) -> Outcome {
    {
        let _configured = suite.configured(lines)?;
        suite.busybox().args(&["true"]).output()?.refused(needles)?;
    }
    if suite.scale.pods_are_cheap() {
        suite.busybox().args(&["true"]).output()?.ok()?;
    }
    Ok(())
}

fn kernel_missing(suite: &Suite) -> Outcome {
    with_settings(
        suite,
        "kernel = \"/no/vmlinux\"",
        &["kernel", "/no/vmlinux", "No such file"],
    )
}

fn kernel_truncated(suite: &Suite) -> Outcome {
    let file = suite.folder("kernel")?.join("truncated");
    let kernel = std::fs::read(suite.dist.join("vmlinux")).context("read vmlinux")?;
    write(&file, kernel.get(..kernel.len() / 2).unwrap_or(&kernel))?;
    with_settings(
        suite,
        &format!("kernel = {file:?}"),
        &["kernel", "truncated"],
    )
}

fn kernel_not_an_elf(suite: &Suite) -> Outcome {
    let file = suite.folder("kernel")?.join("text");
    write(&file, "not a kernel\n".repeat(1000))?;
    with_settings(
        suite,
        &format!("kernel = {file:?}"),
        &["kernel", "kernel/text", "ELF"],
    )
}

fn initramfs_missing(suite: &Suite) -> Outcome {
    with_settings(
        suite,
        "initramfs = \"/no/initramfs\"",
        &["initramfs", "/no/initramfs"],
    )
}

fn emulator_missing(suite: &Suite) -> Outcome {
    with_settings(suite, "qemu = \"/no/qemu\"", &["/no/qemu", "not installed"])
}

fn kvm_without_hardware(suite: &Suite) -> Outcome {
    let _configured = suite.configured("engine = \"kvm\"")?;
    let output = suite.busybox().args(&["true"]).output()?;
    if std::path::Path::new("/dev/kvm").exists() {
        output.refused(&["/dev/kvm", "hardware"])?;
    } else {
        output.refused(&["/dev/kvm"])?;
    }
    Ok(())
}

fn kvm_device_missing(suite: &Suite) -> Outcome {
    // A containerd that sees a /dev without kvm.
    let before = "mount -t tmpfs tmpfs /mnt
for f in null zero full random urandom tty ptmx; do cp -a /dev/$f /mnt/; done
mkdir /mnt/shm /mnt/pts; mount --bind /dev/pts /mnt/pts; mount --move /mnt /dev; mount -t tmpfs tmpfs /dev/shm";
    let _configured = suite.configured("engine = \"kvm\"")?;
    let another = suite.another_containerd("no-kvm", before)?;
    let name = suite.name("no-kvm");
    let rootfs = suite.rootfs()?;
    let address = another.address();
    let run = suite.ctr_at(
        &address,
        ["run", "--rm", "--runtime", suite.runtime(), "--rootfs"],
    );
    let output = run.arg(&rootfs).arg(&name).arg("true").output()?;
    let _ = suite.ctr_at(&address, ["container", "rm", &name]).output();
    output.refused(&["/dev/kvm", "load kvm_intel or kvm_amd"])?;
    Ok(())
}

fn configuration_with_unknown_key(suite: &Suite) -> Outcome {
    with_settings(suite, "memory_mb = 512", &["memory_mb", "config.toml"])
}

fn configuration_that_is_no_toml(suite: &Suite) -> Outcome {
    with_settings(suite, "this is not toml", &["config.toml"])
}

fn annotated(suite: &Suite, annotation: &str, needles: &[&str]) -> Outcome {
    let run = suite.busybox().flags(&["--annotation", annotation]);
    run.args(&["true"]).output()?.refused(needles)?;
    Ok(())
}

fn memory_below_the_minimum(suite: &Suite) -> Outcome {
    annotated(
        suite,
        "io.bulkhead.memory_mib=8",
        &["io.bulkhead.memory_mib", "96"],
    )?;
    with_settings(suite, "memory_mib = 8", &["memory_mib", "96"])
}

fn vcpus_that_are_no_number(suite: &Suite) -> Outcome {
    annotated(
        suite,
        "io.bulkhead.vcpus=many",
        &["io.bulkhead.vcpus", "many"],
    )?;
    annotated(suite, "io.bulkhead.vcpus=33", &["io.bulkhead.vcpus", "32"])
}

fn unknown_annotation_under_our_prefix(suite: &Suite) -> Outcome {
    annotated(suite, "io.bulkhead.nonsense=1", &["io.bulkhead.nonsense"])
}

fn network_of_the_host(suite: &Suite) -> Outcome {
    let output = suite
        .busybox()
        .flag("--net-host")
        .args(&["true"])
        .output()?;
    output.refused(&["network"])?;
    Ok(())
}

fn spec_refused(
    suite: &Suite,
    change: impl FnOnce(&mut serde_json::Value),
    needles: &[&str],
) -> Outcome {
    let mut spec = spec::default(&suite.rootfs()?, &["true"]);
    change(&mut spec);
    Run::of_spec(suite, &spec)?.output()?.refused(needles)?;
    Ok(())
}

fn spec_without_a_process(suite: &Suite) -> Outcome {
    let change = |spec: &mut serde_json::Value| {
        spec.as_object_mut().map(|object| object.remove("process"));
    };
    spec_refused(suite, change, &["process"])
}

fn spec_without_arguments(suite: &Suite) -> Outcome {
    spec_refused(
        suite,
        |spec| spec["process"]["args"] = json!([]),
        &["process.args"],
    )
}

fn spec_with_an_empty_rootfs(suite: &Suite) -> Outcome {
    spec_refused(suite, |spec| spec["root"]["path"] = json!(""), &["root"])?;
    let empty = suite.folder("empty-rootfs")?;
    spec_refused(
        suite,
        |spec| spec["root"]["path"] = json!(empty),
        &["true", "not found"],
    )
}

fn spec_with_a_rootfs_that_is_missing(suite: &Suite) -> Outcome {
    spec_refused(
        suite,
        |spec| spec["root"]["path"] = json!("/no/rootfs"),
        &["/no/rootfs"],
    )
}

fn mount_refused(suite: &Suite, mount: serde_json::Value, needles: &[&str]) -> Outcome {
    let change = |spec: &mut serde_json::Value| {
        if let Some(mounts) = spec["mounts"].as_array_mut() {
            mounts.push(mount);
        }
    };
    spec_refused(suite, change, needles)
}

fn spec_with_a_bind_source_that_is_missing(suite: &Suite) -> Outcome {
    let mount = json!({ "type": "bind", "source": "/no/source", "destination": "/x", "options": ["rbind"] });
    mount_refused(suite, mount, &["/no/source"])
}

fn spec_with_a_mount_of_unknown_type(suite: &Suite) -> Outcome {
    let mount = json!({ "type": "nonsensefs", "source": "x", "destination": "/x" });
    mount_refused(suite, mount, &["nonsensefs"])
}

fn spec_with_a_relative_working_folder(suite: &Suite) -> Outcome {
    spec_refused(
        suite,
        |spec| spec["process"]["cwd"] = json!("tmp"),
        &["cwd"],
    )
}

fn ids_that_are_paths(suite: &Suite) -> Outcome {
    // containerd refuses such ids itself; the shim is called as containerd would call it.
    let bundle = suite.folder("bundle")?;
    make_folder(bundle.join("rootfs"))?;
    write(
        bundle.join("config.json"),
        spec::default(&suite.rootfs()?, &["true"]).to_string(),
    )?;
    for id in ["..", "../x", "a/b", "/etc", ""] {
        let output = Invocation::new(suite.dist.join("containerd-shim-bulkhead-v1"))
            .args([
                "-namespace",
                suite.namespace(),
                "-address",
                "/run/none.sock",
            ])
            .args(["-publish-binary", "/bin/true", "-id", id, "start"])
            .env("BULKHEAD_CONFIG", suite.config())
            .folder(&bundle)
            .limit(suite.scale.seconds(10))
            .output()?;
        ensure!(output.status != 0, "the shim starts with the id {id:?}");
        let errors = output.errors();
        ensure!(
            errors.contains("id"),
            "the error for the id {id:?} does not name it: {errors}"
        );
    }
    Ok(())
}
