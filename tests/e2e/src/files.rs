//! Files that a container writes: what is odd, large or linked, seen by the container and then by the host.

use bulkhead_harness::{
    Engine, Image, Outcome, Pod, Suite, Test, ensure, ensure_eq, process,
    runner::{ANY, MACHINES},
    test,
    tree::{self, LIST},
};

use crate::files;

const BUSYBOX: &[Image] = &[Image::Busybox];
const PYTHON: &[Image] = &[Image::Python];
const LAYERS: &[Image] = &[Image::Layers];

/// The cases of this group.
pub const TESTS: &[Test] = &[
    test!(
        files::odd_names_links_and_modes_are_the_hosts_too,
        BUSYBOX,
        ANY
    ),
    test!(
        files::sparse_four_gibibyte_file_keeps_its_holes,
        BUSYBOX,
        ANY
    ),
    test!(
        files::changes_over_layers_are_what_overlayfs_makes,
        LAYERS,
        ANY
    ),
    test!(files::python_reads_and_writes_files, PYTHON, ANY).fast_host(),
    test!(files::extended_attributes_are_kept, PYTHON, ANY).fast_host(),
    test!(
        files::mapped_files_locks_and_deleted_files_work,
        PYTHON,
        ANY
    ),
    test!(
        files::named_pipes_work_and_device_nodes_stay_off_the_hosts_disk,
        BUSYBOX,
        ANY
    ),
    test!(
        files::what_is_open_of_an_image_takes_nothing_of_the_host,
        BUSYBOX,
        MACHINES
    ),
];

/// Runs the script as the container's process, ends it and compares the folder as both see it.
fn same_after(suite: &Suite, pod: Pod<'_>, folder: &str) -> Outcome {
    let inside = pod.sh(&format!("{LIST}\nlist {folder}"))?;
    let name = pod.name().to_owned();
    pod.kill("SIGKILL")?;
    pod.wait_status("STOPPED", suite.scale.seconds(20))?;
    pod.task(&["rm"]).output()?;
    {
        let mounted = suite.mount_snapshot(&name)?;
        let outside = tree::list_on_host(&mounted.folder, &[folder])?;
        ensure!(
            outside.lines().count() > 2,
            "the host sees nothing: {outside}"
        );
        tree::same(folder, &inside, &outside)?;
    }
    pod.delete_by_force()
}

fn odd_names_links_and_modes_are_the_hosts_too(suite: &Suite) -> Outcome {
    let pod = suite.busybox().sh("sleep 1000").detach()?;
    pod.sh(
        r#"set -e; mkdir /odd; cd /odd
        printf 1 >"$(printf 'new\nline')"; printf 2 >"ümläut-日本"; printf 3 >./-rf; printf 4 >' blank '
        printf 5 >"$(head -c 255 /dev/zero | tr '\0' n)"; printf 6 >"$(printf 'not\377utf8')"; printf 7 >'*?[a]"'
        (printf x >"$(head -c 256 /dev/zero | tr '\0' n)") 2>&1 | grep -q 'too long'
        printf hard >a; ln a b; ln a c; rm a; ln -s c rel; ln -s /odd/c abs; ln -s nowhere gone; ln -s .. up
        [ "$(stat -c %h b)" = 2 ]; [ "$(cat rel)$(cat abs)" = hardhard ]
        printf s >suid; chmod 6755 suid; printf t >none; chmod 0 none; mkdir sticky; chmod 1777 sticky
        chown 1234:4321 none; touch -d '2001-02-03 04:05:06' none
        mkdir -p deep/1/2/3/4/5/6/7/8/9; mv deep moved; printf over >x; printf under >y; mv x y; [ "$(cat y)" = over ]
        mkdir many; for i in $(seq 1 300); do : >many/$i; done; rm many/1*; [ "$(ls many | wc -l)" = 189 ]
        ! rmdir many 2>/dev/null; ! mkdir many 2>/dev/null; ! ln b b 2>/dev/null; mkfifo pipe
        printf abc >app; printf def >>app; [ "$(cat app)" = abcdef ]; truncate -s 4 app; [ "$(cat app)" = abcd ]"#,
    )?;
    same_after(suite, pod, "/odd")
}

fn sparse_four_gibibyte_file_keeps_its_holes(suite: &Suite) -> Outcome {
    let pod = suite.busybox().sh("sleep 1000").detach()?;
    let text = pod.sh(
        r#"set -e; mkdir /big; cd /big
        printf start >f; printf end | dd of=f bs=1 seek=4294967296 conv=notrunc 2>/dev/null
        printf mid | dd of=f bs=1 seek=2147483647 conv=notrunc 2>/dev/null
        stat -c %s f; [ $(stat -c %b f) -lt 1000 ] && echo sparse
        dd if=f bs=1 skip=4294967296 count=3 2>/dev/null; dd if=f bs=1 skip=2147483647 count=3 2>/dev/null; head -c 5 f"#,
    )?;
    ensure_eq!("in the container", text, "4294967299\nsparse\nendmidstart");
    let name = pod.name().to_owned();
    pod.kill("SIGKILL")?;
    pod.wait_status("STOPPED", suite.scale.seconds(20))?;
    pod.task(&["rm"]).output()?;
    {
        use std::os::unix::fs::MetadataExt;
        let mounted = suite.mount_snapshot(&name)?;
        let file =
            std::fs::metadata(mounted.folder.join("big/f")).map_err(|e| format!("big/f: {e}"))?;
        ensure_eq!("size on the host", file.len(), 4_294_967_299);
        ensure!(file.blocks() < 1000, "{} blocks on the host", file.blocks());
    }
    pod.delete_by_force()
}

fn changes_over_layers_are_what_overlayfs_makes(suite: &Suite) -> Outcome {
    let pod = suite.run(Image::Layers).sh("sleep 1000").detach()?;
    pod.sh(
        r#"set -e; cd /layers
        rm 1; mkdir 1; printf in >1/file; rm 2; printf new >2; mv 3 3.moved; printf more >>4; chmod 600 5; ln 6 6.link
        rm 7; ln -s 8 7; mv 9 10; touch 11; chown 1:1 12; : >13
        mkdir d; printf x >d/x; rm -r d; mkdir d; rmdir d; ! ls d 2>/dev/null"#,
    )?;
    // Folders of the image that are removed and made again are opaque.
    pod.sh("set -e; cp -a /etc /etc.copy; rm -r /etc; mkdir /etc; printf only >/etc/one; [ $(ls /etc) = one ]")?;
    pod.sh("set -e; rm -r /layers.none 2>/dev/null || true; mkdir -p /layers/sub; mv /layers/sub /layers/sub2")?;
    same_after(suite, pod, "/layers /etc /etc.copy")
}

const PROGRAM: &str = r#"
import hashlib, json, os, sys
text = open('/etc/debian_version').read().strip()
os.makedirs('/data/out')
with open('/data/out/result.json', 'w') as f: json.dump({'debian': text, 'pid': os.getpid()}, f)
data = os.urandom(1 << 20) * 8
with open('/data/out/blob', 'wb') as f: f.write(data); f.flush(); os.fsync(f.fileno())
assert hashlib.sha256(open('/data/out/blob', 'rb').read()).digest() == hashlib.sha256(data).digest()
print(json.load(open('/data/out/result.json'))['pid'], os.path.getsize('/data/out/blob'))
"#;

fn python(suite: &Suite, program: &str) -> Outcome<String> {
    let run = suite.run(Image::Python).args(&["python3", "-c", program]);
    Ok(run.output()?.ok()?.text())
}

fn python_reads_and_writes_files(suite: &Suite) -> Outcome {
    ensure_eq!("output", python(suite, PROGRAM)?, "1 8388608");
    Ok(())
}

fn extended_attributes_are_kept(suite: &Suite) -> Outcome {
    let text = python(
        suite,
        r#"
import os
open('/f', 'w').close(); os.mkdir('/d')
for path in '/f', '/d', '/etc/passwd':
    os.setxattr(path, 'user.note', b'hello \x00\xff'); os.setxattr(path, 'user.long', b'v' * 2000)
    assert os.getxattr(path, 'user.note') == b'hello \x00\xff'
    names = sorted(n for n in os.listxattr(path) if n.startswith('user.'))
    assert names == ['user.long', 'user.note'], names
    os.removexattr(path, 'user.long')
    assert [n for n in os.listxattr(path) if n.startswith('user.')] == ['user.note']
    assert not [n for n in os.listxattr(path) if 'overlay' in n or 'virtiofs' in n], os.listxattr(path)
try: os.getxattr('/f', 'user.none'); print('found')
except OSError as e: print(e.errno)
os.rename('/f', '/d/f'); print(os.getxattr('/d/f', 'user.note')[:5].decode())
"#,
    )?;
    ensure_eq!("output", text, "61\nhello");
    Ok(())
}

fn mapped_files_locks_and_deleted_files_work(suite: &Suite) -> Outcome {
    let text = python(
        suite,
        r#"
import fcntl, mmap, os
f = open('/map', 'w+b'); f.truncate(1 << 16)
m = mmap.mmap(f.fileno(), 1 << 16); m[5:10] = b'hello'; m.flush(); m.close()
print(open('/map', 'rb').read()[5:10].decode())
os.unlink('/map'); f.seek(5); print(f.read(5).decode(), os.fstat(f.fileno()).st_nlink)
a, b = open('/lock', 'w'), open('/lock', 'w')
fcntl.flock(a, fcntl.LOCK_EX)
try: fcntl.flock(b, fcntl.LOCK_EX | fcntl.LOCK_NB); print('both')
except OSError: print('locked')
fd = os.open('/sparse', os.O_RDWR | os.O_CREAT); os.posix_fallocate(fd, 0, 1 << 20); print(os.fstat(fd).st_size)
os.pwrite(fd, b'x', 5 << 20); print(os.lseek(fd, 2 << 20, os.SEEK_DATA) >> 20)
d = os.open('/', os.O_TMPFILE | os.O_RDWR); os.write(d, b'tmp'); print(os.pread(d, 3, 0).decode())
"#,
    )?;
    ensure_eq!("output", text, "hello\nhello 0\nlocked\n1048576\n5\ntmp");
    Ok(())
}

fn named_pipes_work_and_device_nodes_stay_off_the_hosts_disk(suite: &Suite) -> Outcome {
    let script = "mkfifo /p && (echo through >/p & cat /p); mknod /run/null c 1 3 && echo lost >/run/null && echo tmpfs; mknod /null c 1 3 2>/dev/null && echo node";
    let output = suite.busybox().sh(script).output()?;
    // runc makes the node, where the mount's `nodev` does not reach; the file server refuses it.
    let expected = match suite.engine {
        Engine::Runc => "through\nnode",
        _ => "through",
    };
    ensure_eq!(
        "pipe and nodes",
        output.text().replace("\ntmpfs", ""),
        expected
    );
    Ok(())
}

/// The guest opens files of the layers itself: however many a container holds, the file server knows of none.
fn what_is_open_of_an_image_takes_nothing_of_the_host(suite: &Suite) -> Outcome {
    let pod = suite.busybox().args(&["sleep", "1000"]).detach()?;
    let server = pod.command("bulkhead-fs")?;
    // What is looked up stays known.
    pod.sh("cat /bin/busybox >/dev/null")?;
    let before = process::fds(server.pid);
    let held = pod.sh("f=/bin/busybox; for i in 1 2 3 4 5 6 7 8 9 10; do
             (exec 3<$f 4<$f 5<$f 6<$f 7<$f 8<$f 9<$f; echo held; exec sleep 1000) 2>/dev/null &
         done | head -n 10 | wc -l")?;
    ensure_eq!("holders of 7 descriptors", held, "10");
    let now = process::fds(server.pid);
    ensure!(
        now < before + 20,
        "70 open files of the image: the file server held {before} descriptors and holds {now}"
    );
    pod.end()?;
    Ok(())
}
