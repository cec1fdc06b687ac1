//! Images: a container sees the tree that overlayfs on the host shows.

use bulkhead_harness::{
    Context, Image, Outcome, Suite, Test, ensure, ensure_eq,
    runner::ANY,
    test,
    tree::{self, LIST},
};

use crate::images;

const BUSYBOX: &[Image] = &[Image::Busybox];
const LAYERS: &[Image] = &[Image::Layers, Image::Busybox];
const FILES: &[Image] = &[Image::Files];
const PYTHON: &[Image] = &[Image::Python, Image::Layers];

/// The cases of this group.
pub const TESTS: &[Test] = &[
    test!(images::one_layer_is_seen_as_on_the_host, BUSYBOX, ANY),
    test!(images::twenty_layers_are_seen_as_on_the_host, LAYERS, ANY).fast_host(),
    test!(
        images::extended_attributes_of_layers_are_seen_as_on_the_host,
        PYTHON,
        ANY
    )
    .fast_host(),
    test!(images::fifty_thousand_files_are_walked, FILES, ANY).fast_host(),
    test!(
        images::containers_of_one_image_do_not_see_each_others_files,
        BUSYBOX,
        ANY
    ),
];

fn top_folders(suite: &Suite, image: Image) -> Outcome<String> {
    let mounted = suite.mount(image)?;
    let mut names: Vec<String> = std::fs::read_dir(&mounted.folder)
        .context("read the image's root")?
        .flatten()
        .map(|entry| format!("/{}", entry.file_name().to_string_lossy()))
        .filter(|name| !["/proc", "/sys", "/dev", "/run"].contains(&name.as_str()))
        .collect();
    names.sort();
    Ok(names.join(" "))
}

fn as_on_the_host(suite: &Suite, image: Image) -> Outcome<String> {
    let folders = top_folders(suite, image)?;
    let run = suite.run(image).sh(format!("{LIST}\nlist {folders}"));
    let inside = run.output()?.ok()?.text();
    let mounted = suite.mount(image)?;
    let outside = tree::list_on_host(&mounted.folder, &[&folders])?;
    tree::same("the image", &inside, &outside)?;
    Ok(inside)
}

fn one_layer_is_seen_as_on_the_host(suite: &Suite) -> Outcome {
    let text = as_on_the_host(suite, Image::Busybox)?;
    ensure!(text.contains("busybox"), "no busybox in the listing");
    Ok(())
}

fn twenty_layers_are_seen_as_on_the_host(suite: &Suite) -> Outcome {
    as_on_the_host(suite, Image::Layers)?;
    let script = "cd /layers; n=0; for f in $(seq 1 19); do [ \"$(cat $f)\" = $f ] && n=$((n+1)); done; echo $n";
    let text = suite.run(Image::Layers).sh(script).output()?.ok()?.text();
    ensure_eq!("layers with their file", text, "19");
    Ok(())
}

fn extended_attributes_of_layers_are_seen_as_on_the_host(suite: &Suite) -> Outcome {
    let python = suite.mount(Image::Python)?;
    let layers = suite.mount(Image::Layers)?;
    let program = r#"
import os
for top, folders, files in os.walk('/'):
    folders[:] = [f for f in folders if os.path.join(top, f) not in ('/proc', '/sys', '/dev', '/run', '/py')]
    for name in folders + files:
        path = os.path.join(top, name)
        for key in sorted(os.listxattr(path, follow_symlinks=False)):
            print(repr(path), key, os.getxattr(path, key, follow_symlinks=False).hex())
"#;
    let mount = format!(
        "type=bind,src={},dst=/py,options=rbind:ro",
        python.folder.display()
    );
    let output = suite
        .run(Image::Layers)
        .mount(mount)
        .flags(&["--env", "PYTHONHOME=/py/usr"])
        .args(&[
            "/py/usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2",
            "--library-path",
            "/py/usr/lib/x86_64-linux-gnu",
            "/py/usr/bin/python3",
            "-c",
            program,
        ])
        .output()?
        .ok()?;
    let mut inside: Vec<String> = output.text().lines().map(str::to_owned).collect();
    inside.sort();
    let mut outside = Vec::new();
    attributes(&layers.folder, &layers.folder, &mut outside)?;
    outside.sort();
    ensure!(!outside.is_empty(), "the image has no extended attributes");
    ensure_eq!("extended attributes", inside, outside);
    Ok(())
}

fn attributes(root: &std::path::Path, folder: &std::path::Path, all: &mut Vec<String>) -> Outcome {
    for entry in std::fs::read_dir(folder).context("read folder")?.flatten() {
        let path = entry.path();
        let mut names = vec![0_u8; 4096];
        let count = rustix::fs::llistxattr(&path, &mut names[..]).context("llistxattr")?;
        for name in names.get(..count).unwrap_or_default().split(|b| *b == 0) {
            let name = String::from_utf8_lossy(name);
            // `trusted.` is not shown without CAP_SYS_ADMIN.
            if name.is_empty() || name.starts_with("trusted.") {
                continue;
            }
            let mut value = vec![0_u8; 4096];
            let len = rustix::fs::lgetxattr(&path, &*name, &mut value[..]).context("lgetxattr")?;
            let shown = path.strip_prefix(root).context("path")?;
            let hex = bulkhead_harness::command::hex(value.get(..len).unwrap_or_default());
            all.push(format!("'/{}' {name} {hex}", shown.display()));
        }
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            attributes(root, &path, all)?;
        }
    }
    Ok(())
}

fn fifty_thousand_files_are_walked(suite: &Suite) -> Outcome {
    // How many there are is the scale's affair.
    let mounted = suite.mount(Image::Files)?;
    let mut names: Vec<String> = std::fs::read_dir(mounted.folder.join("files"))
        .context("read /files")?
        .flatten()
        .map(|entry| format!("/files/{}", entry.file_name().to_string_lossy()))
        .collect();
    names.sort();
    names.truncate(suite.scale.folders as usize);
    let expected: usize = names
        .iter()
        .map(|name| {
            let folder = mounted.folder.join(name.trim_start_matches('/'));
            std::fs::read_dir(folder).map_or(0, Iterator::count)
        })
        .sum();
    drop(mounted);
    ensure!(expected >= 1000, "only {expected} files");
    let folders = names.join(" ");
    let script =
        format!("find {folders} -type f -size -100k | wc -l; find {folders} -type f | wc -l");
    let output = suite
        .run(Image::Files)
        .sh(script)
        .seconds(120)
        .output()?
        .ok()?;
    ensure_eq!("files", output.text(), format!("{expected}\n{expected}"));
    Ok(())
}

fn containers_of_one_image_do_not_see_each_others_files(suite: &Suite) -> Outcome {
    suite
        .busybox()
        .sh("echo mine >/only-here; rm /etc/passwd")
        .output()?
        .ok()?;
    let text = suite
        .busybox()
        .sh("ls /only-here 2>&1 | wc -l; test -e /etc/passwd && echo there")
        .output()?;
    ensure!(text.ok()?.text().ends_with("there"), "the image changed");
    Ok(())
}
