//! Drives an agent in a running guest, in the shim's stead: makes a busybox container, runs execs, pushes data through the
//! streams, deletes everything, and checks what is left.
//!
//! Usage: `drive VSOCK_SOCKET FOLDER TREE [TEST]`: the socket speaks `CONNECT port` and knows half-close; FOLDER is served as
//! tree TREE, and holds a busybox rootfs as `base`.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use bulkhead_protocol::{
    agent::*,
    agent_ttrpc::AgentClient,
    limits::{AGENT_PORT, STREAM_PORT},
    stream::{StreamHeader, StreamKind},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
};

#[derive(Clone)]
struct Driver {
    socket: PathBuf,
    trees: PathBuf,
    tree: String,
    agent: AgentClient,
}

fn context() -> ttrpc::context::Context {
    ttrpc::context::with_duration(Duration::from_secs(300))
}

async fn connect(socket: &Path, port: u32) -> Result<UnixStream> {
    let mut stream = UnixStream::connect(socket).await?;
    stream
        .write_all(format!("CONNECT {port}\n").as_bytes())
        .await?;
    let mut line = Vec::new();
    while line.last() != Some(&b'\n') {
        line.push(stream.read_u8().await.context("no answer to CONNECT")?);
    }
    ensure!(
        line.starts_with(b"OK "),
        "{:?}",
        String::from_utf8_lossy(&line)
    );
    Ok(stream)
}

fn message(error: ttrpc::Error) -> String {
    match error {
        ttrpc::Error::RpcStatus(status) => format!("{:?}: {}", status.code(), status.message),
        other => other.to_string(),
    }
}

const PATH: &str = "PATH=/bin:/usr/bin";
const CAPS: &str = r#"["CAP_CHOWN","CAP_KILL","CAP_SETUID","CAP_SETGID"]"#;

fn process(args: &[&str], extra: &str) -> String {
    let args = serde_json::to_string(args).unwrap_or_default();
    format!(
        r#"{{"user":{{"uid":0,"gid":0}},"args":{args},"env":["{PATH}"],"cwd":"/",
        "capabilities":{{"bounding":{CAPS},"effective":{CAPS},"permitted":{CAPS}}},
        "rlimits":[{{"type":"RLIMIT_NOFILE","hard":1024,"soft":1024}}],"noNewPrivileges":true{extra}}}"#
    )
}

fn spec(process: &str, resources: &str, more: &str) -> String {
    format!(
        r#"{{"ociVersion":"1.0.2","process":{process},"root":{{"path":"rootfs"}},"hostname":"box",
        "mounts":[
        {{"destination":"/proc","type":"proc","source":"proc","options":["nosuid","noexec","nodev"]}},
        {{"destination":"/dev","type":"tmpfs","source":"tmpfs","options":["nosuid","strictatime","mode=755","size=65536k"]}},
        {{"destination":"/dev/pts","type":"devpts","source":"devpts","options":["nosuid","noexec","newinstance","ptmxmode=0666","mode=0620","gid=5"]}},
        {{"destination":"/dev/shm","type":"tmpfs","source":"shm","options":["nosuid","noexec","nodev","mode=1777","size=65536k"]}},
        {{"destination":"/dev/mqueue","type":"mqueue","source":"mqueue","options":["nosuid","noexec","nodev"]}},
        {{"destination":"/sys","type":"sysfs","source":"sysfs","options":["nosuid","noexec","nodev","ro"]}},
        {{"destination":"/sys/fs/cgroup","type":"cgroup","source":"cgroup","options":["ro","nosuid","noexec","nodev"]}},
        {{"destination":"/run","type":"tmpfs","source":"tmpfs","options":["nosuid","strictatime","mode=755","size=65536k"]}},
        {{"destination":"/etc/bound","type":"bind","source":"/run/bulkhead/trees/TREE/file","options":["rbind","rprivate","ro"]}}],
        "linux":{{"cgroupsPath":"/default/x","namespaces":[{{"type":"pid"}},{{"type":"ipc"}},{{"type":"uts"}},{{"type":"mount"}},{{"type":"cgroup"}},{{"type":"network"}}],
        "sysctl":{{"net.ipv4.ping_group_range":"0 0"}},
        "resources":{{"devices":[{{"allow":false,"access":"rwm"}}],"pids":{{"limit":100}},"cpu":{{"shares":512}}{resources}}},
        "maskedPaths":["/proc/kcore","/proc/keys","/proc/scsi","/sys/firmware","/proc/acpi","/proc/timer_list"],
        "readonlyPaths":["/proc/bus","/proc/fs","/proc/irq","/proc/sys","/proc/sysrq-trigger"]{more}}}}}"#
    )
}

struct Output {
    code: u32,
    stdout: Vec<u8>,
    stderr: Vec<u8>,
}

impl Driver {
    async fn stream(&self, container: &str, exec: &str, stream: StreamKind) -> Result<UnixStream> {
        let mut connection = connect(&self.socket, STREAM_PORT).await?;
        let header = StreamHeader {
            container: container.into(),
            exec: exec.into(),
            stream,
        };
        connection.write_all(&header.encode()?).await?;
        Ok(connection)
    }

    fn request(container: &str, exec: &str) -> ProcessRequest {
        ProcessRequest {
            container: container.into(),
            exec_id: exec.into(),
            ..Default::default()
        }
    }

    fn tree(&self, path: &str) -> String {
        format!("{}/{path}", self.tree)
    }

    fn rootfs(&self, name: &str) -> Result<Rootfs> {
        for folder in ["upper", "work"] {
            std::fs::create_dir_all(self.trees.join(name).join(folder))?;
        }
        Ok(Rootfs {
            lower: vec![self.tree("empty"), self.tree("base")],
            upper: self.tree(&format!("{name}/upper")),
            work: self.tree(&format!("{name}/work")),
            ..Default::default()
        })
    }

    async fn create(&self, name: &str, spec: &str, stdio: Stdio) -> Result<u32, String> {
        let request = CreateContainerRequest {
            container: name.into(),
            spec: spec.replace("TREE", &self.tree).into_bytes(),
            rootfs: Some(self.rootfs(name).map_err(|e| e.to_string())?).into(),
            stdio: Some(stdio).into(),
            ..Default::default()
        };
        let made = self.agent.create_container(context(), &request).await;
        made.map(|response| response.pid).map_err(message)
    }

    async fn start(&self, container: &str, exec: &str) -> Result<u32, String> {
        let started = self
            .agent
            .start(context(), &Self::request(container, exec))
            .await;
        started.map(|response| response.pid).map_err(message)
    }

    async fn wait(&self, container: &str, exec: &str) -> Result<WaitResponse> {
        self.agent
            .wait(context(), &Self::request(container, exec))
            .await
            .map_err(|e| anyhow::anyhow!(message(e)))
    }

    async fn delete(&self, container: &str, exec: &str) -> Result<()> {
        self.agent
            .delete(context(), &Self::request(container, exec))
            .await
            .map_err(|e| anyhow::anyhow!("delete {container} {exec}: {}", message(e)))?;
        Ok(())
    }

    async fn register(&self, name: &str, exec: &str, process: &str, stdio: Stdio) -> Result<()> {
        let request = CreateExecRequest {
            container: name.into(),
            exec_id: exec.into(),
            process: process.as_bytes().to_vec(),
            stdio: Some(stdio).into(),
            ..Default::default()
        };
        self.agent
            .create_exec(context(), &request)
            .await
            .map_err(|e| anyhow::anyhow!(message(e)))?;
        Ok(())
    }

    async fn exec(
        &self,
        name: &str,
        exec: &str,
        process: &str,
        input: Option<Vec<u8>>,
    ) -> Result<Output> {
        let stdio = Stdio {
            stdin: input.is_some(),
            stdout: true,
            stderr: true,
            ..Default::default()
        };
        self.register(name, exec, process, stdio).await?;
        let mut out = self.stream(name, exec, StreamKind::Stdout).await?;
        let mut err = self.stream(name, exec, StreamKind::Stderr).await?;
        if let Some(bytes) = input {
            let mut stdin = self.stream(name, exec, StreamKind::Stdin).await?;
            tokio::spawn(async move {
                let _ = stdin.write_all(&bytes).await;
                let _ = stdin.shutdown().await;
            });
        }
        if let Err(error) = self.start(name, exec).await {
            self.delete(name, exec).await?;
            bail!("{error}");
        }
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        tokio::try_join!(out.read_to_end(&mut stdout), err.read_to_end(&mut stderr))?;
        let code = self.wait(name, exec).await?.exit_status;
        self.delete(name, exec).await?;
        Ok(Output {
            code,
            stdout,
            stderr,
        })
    }

    async fn sh(&self, name: &str, exec: &str, script: &str) -> Result<String> {
        let output = self
            .exec(name, exec, &process(&["sh", "-c", script], ""), None)
            .await?;
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.code == 0, "{script}: code {} {stderr}", output.code);
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_string())
    }

    /// Container that sleeps, started.
    async fn box_up(&self, name: &str, extra: &str, resources: &str) -> Result<()> {
        let spec = spec(&process(&["sleep", "100000"], extra), resources, "");
        self.create(name, &spec, Stdio::default())
            .await
            .map_err(anyhow::Error::msg)?;
        self.start(name, "").await.map_err(anyhow::Error::msg)?;
        Ok(())
    }

    async fn kill(&self, name: &str, exec: &str, signal: u32, all: bool) -> Result<()> {
        let request = SignalRequest {
            container: name.into(),
            exec_id: exec.into(),
            signal,
            all,
            ..Default::default()
        };
        self.agent
            .signal(context(), &request)
            .await
            .map_err(|e| anyhow::anyhow!(message(e)))?;
        Ok(())
    }

    async fn box_down(&self, name: &str) -> Result<()> {
        self.kill(name, "", 9, true).await?;
        self.wait(name, "").await?;
        self.delete(name, "").await
    }
}

async fn basics(d: &Driver) -> Result<()> {
    d.box_up("c1", "", "").await?;
    for (script, expected) in [
        ("cat /proc/1/comm", "sleep"),
        ("hostname", "box"),
        ("cat /etc/bound", "bound file"),
        ("echo x > /new && cat /new", "x"),
        ("id -u", "0"),
        ("ulimit -n", "1024"),
        ("cat /proc/self/cgroup", "0::/"),
        ("cat /sys/fs/cgroup/pids.max", "100"),
        ("cat /sys/fs/cgroup/cpu.weight", "20"),
        ("wc -c < /proc/timer_list", "0"),
        ("cat /proc/sys/net/ipv4/ping_group_range", "0\t0"),
        ("grep NoNewPrivs /proc/self/status", "NoNewPrivs:\t1"),
        ("grep CapEff /proc/self/status", "CapEff:\t00000000000000e1"),
        ("grep CapBnd /proc/self/status", "CapBnd:\t00000000000000e1"),
        ("ls /proc/self/fd | wc -l", "4"),
        (
            "echo y > /dev/stderr; test -c /dev/null && readlink /dev/fd",
            "/proc/self/fd",
        ),
        ("ls / | grep -c -E 'mnt|trees' || true", "0"),
        ("mount | grep -c virtiofs || true", "1"),
        ("ip link show lo | grep -c ,UP || true", "1"),
        (
            "echo 1 > /proc/sys/kernel/shmmni 2>/dev/null || echo readonly",
            "readonly",
        ),
        (
            "(mknod /tmp/x b 8 0; cat /tmp/x) 2>&1 | grep -c 'not permitted'",
            "1",
        ),
    ] {
        match d.sh("c1", "e", script).await {
            Ok(got) if got == expected => {}
            Ok(got) => println!("  DIFFERS {script}: {got:?}, expected {expected:?}"),
            Err(error) => println!("  FAILS {script}: {error:#}"),
        }
    }
    ensure!(
        d.trees.join("c1/upper/new").exists(),
        "the upper layer has the new file"
    );
    let mut codes = Vec::new();
    for script in ["exit 7", "kill -9 $$", "true", "kill -TERM $$"] {
        let run = d
            .exec("c1", "e", &process(&["sh", "-c", script], ""), None)
            .await?;
        codes.push(run.code);
    }
    ensure!(codes == [7, 137, 0, 143], "exit codes {codes:?}");
    for (args, expected) in [
        (
            &["foo"][..],
            "exec: \"foo\": executable file not found in $PATH",
        ),
        (
            &["/nope"],
            "exec: \"/nope\": stat /nope: no such file or directory",
        ),
        (&["/etc/bound"], "exec: \"/etc/bound\": permission denied"),
    ] {
        let error = d.exec("c1", "e", &process(args, ""), None).await;
        let error = error.err().map(|e| e.to_string()).unwrap_or_default();
        ensure!(error.contains(expected), "{error}");
    }
    println!(
        "  pids {:?}",
        d.agent
            .list_pids(
                context(),
                &ContainerRequest {
                    container: "c1".into(),
                    ..Default::default()
                }
            )
            .await?
            .pids
    );
    let stats = d
        .agent
        .stats(
            context(),
            &ContainerRequest {
                container: "c1".into(),
                ..Default::default()
            },
        )
        .await?;
    ensure!(
        stats.memory.usage > 0 && stats.pids.limit == 100,
        "stats {stats:?}"
    );
    Ok(())
}

async fn create_errors(d: &Driver) -> Result<()> {
    for (process, linux, expected) in [
        (
            process(&["foo"], ""),
            "",
            "InvalidArgument|INVALID_ARGUMENT: unable to start container process: exec: \"foo\": executable file not found in $PATH",
        ),
        (process(&["/bin"], ""), "", "is a directory"),
        (
            process(&["sh"], ",\"selinuxLabel\":\"x\""),
            "",
            "process.selinuxLabel is not supported",
        ),
        (
            process(&["sh"], ""),
            ",\"intelRdt\":{}",
            "linux.intelRdt is not supported",
        ),
        (
            process(&["sh"], ""),
            ",\"devices\":[{\"path\":\"/proc/1/x\",\"type\":\"c\",\"major\":1,\"minor\":3}]",
            "linux.devices[0]",
        ),
    ] {
        let error = d
            .create("bad", &spec(&process, "", linux), Stdio::default())
            .await;
        let error = error.err().unwrap_or_default();
        let expected = expected.split('|').next_back().unwrap_or_default();
        ensure!(
            error.contains(expected),
            "got {error:?}, expected {expected:?}"
        );
    }
    Ok(())
}

async fn many_execs(d: &Driver) -> Result<()> {
    let before = Instant::now();
    for i in 0..100 {
        let got = d.sh("c1", &format!("s{i}"), &format!("echo {i}")).await?;
        ensure!(got == i.to_string(), "{got}");
    }
    println!("  100 execs one by one: {:?}", before.elapsed());
    let before = Instant::now();
    let mut tasks = Vec::new();
    for i in 0..20 {
        let d = d.clone();
        tasks.push(tokio::spawn(async move {
            d.sh("c1", &format!("p{i}"), &format!("echo {i}")).await
        }));
    }
    for (i, task) in tasks.into_iter().enumerate() {
        ensure!(task.await?? == i.to_string());
    }
    println!("  20 execs at once: {:?}", before.elapsed());
    Ok(())
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length)
        .map(|i| (i.wrapping_mul(31) >> 3) as u8)
        .collect()
}

async fn bulk(d: &Driver) -> Result<()> {
    let data = pattern(100_000_000);
    let before = Instant::now();
    let run = d
        .exec("c1", "cat", &process(&["cat"], ""), Some(data.clone()))
        .await?;
    ensure!(
        run.stdout == data,
        "100 MB came back as {} bytes",
        run.stdout.len()
    );
    println!("  100 MB through cat: {:?}", before.elapsed());
    // Everything written right before the end arrives.
    for i in 0..10 {
        let run = d
            .exec(
                "c1",
                &format!("last{i}"),
                &process(&["sh", "-c", "head -c 300000 /dev/zero; echo end >&2"], ""),
                None,
            )
            .await?;
        ensure!(
            run.stdout.len() == 300_000 && run.stderr == b"end\n",
            "{}",
            run.stdout.len()
        );
    }
    // A reader that connects only after the process's end gets what the pipe holds.
    d.register(
        "c1",
        "late",
        &process(&["sh", "-c", "echo early"], ""),
        Stdio {
            stdout: true,
            ..Default::default()
        },
    )
    .await?;
    d.start("c1", "late").await.map_err(anyhow::Error::msg)?;
    d.wait("c1", "late").await?;
    let mut text = String::new();
    d.stream("c1", "late", StreamKind::Stdout)
        .await?
        .read_to_string(&mut text)
        .await?;
    ensure!(text == "early\n", "{text:?}");
    d.delete("c1", "late").await?;
    // A background process that keeps stdout open does not hold Wait and Delete up.
    d.register(
        "c1",
        "bg",
        &process(&["sh", "-c", "echo now; sleep 1000 &"], ""),
        Stdio {
            stdout: true,
            ..Default::default()
        },
    )
    .await?;
    let mut out = d.stream("c1", "bg", StreamKind::Stdout).await?;
    d.start("c1", "bg").await.map_err(anyhow::Error::msg)?;
    d.wait("c1", "bg").await?;
    d.delete("c1", "bg").await?;
    text.clear();
    out.read_to_string(&mut text).await?;
    ensure!(text == "now\n", "{text:?}");
    // A connection that breaks is replaced by the next one, and nothing is lost in the pipe.
    d.register(
        "c1",
        "re",
        &process(&["sh", "-c", "read x; echo $x"], ""),
        Stdio {
            stdin: true,
            stdout: true,
            ..Default::default()
        },
    )
    .await?;
    d.start("c1", "re").await.map_err(anyhow::Error::msg)?;
    drop(d.stream("c1", "re", StreamKind::Stdout).await?);
    let mut stdin = d.stream("c1", "re", StreamKind::Stdin).await?;
    let mut out = d.stream("c1", "re", StreamKind::Stdout).await?;
    stdin.write_all(b"again\n").await?;
    text.clear();
    out.read_to_string(&mut text).await?;
    ensure!(text == "again\n", "{text:?}");
    d.wait("c1", "re").await?;
    d.delete("c1", "re").await
}

async fn terminal(d: &Driver) -> Result<()> {
    let tty = Stdio {
        stdin: true,
        stdout: true,
        terminal: true,
        ..Default::default()
    };
    d.register(
        "c1",
        "tty",
        &process(
            &[
                "sh",
                "-c",
                "tty; stty size; read line; echo got $line; exit 3",
            ],
            ",\"terminal\":true,\"consoleSize\":{\"height\":33,\"width\":99}",
        ),
        tty.clone(),
    )
    .await?;
    let mut out = d.stream("c1", "tty", StreamKind::Stdout).await?;
    let mut stdin = d.stream("c1", "tty", StreamKind::Stdin).await?;
    d.start("c1", "tty").await.map_err(anyhow::Error::msg)?;
    stdin.write_all(b"hello\n").await?;
    let mut text = String::new();
    out.read_to_string(&mut text).await?;
    ensure!(
        text.contains("/dev/pts/0") && text.contains("33 99") && text.contains("got hello"),
        "{text:?}"
    );
    ensure!(d.wait("c1", "tty").await?.exit_status == 3);
    d.delete("c1", "tty").await?;
    // An init with a terminal has /dev/console.
    let init = process(
        &["sh", "-c", "echo on-console > /dev/console; stty size"],
        ",\"terminal\":true",
    );
    d.create("t1", &spec(&init, "", ""), tty)
        .await
        .map_err(anyhow::Error::msg)?;
    let mut out = d.stream("t1", "", StreamKind::Stdout).await?;
    let resize = ResizePtyRequest {
        container: "t1".into(),
        width: 70,
        height: 20,
        ..Default::default()
    };
    d.agent.resize_pty(context(), &resize).await?;
    d.start("t1", "").await.map_err(anyhow::Error::msg)?;
    text.clear();
    out.read_to_string(&mut text).await?;
    ensure!(text == "on-console\r\n20 70\r\n", "{text:?}");
    d.wait("t1", "").await?;
    d.delete("t1", "").await
}

async fn life(d: &Driver) -> Result<()> {
    let request = |name: &str| ContainerRequest {
        container: name.into(),
        ..Default::default()
    };
    // Pause stops a counter, resume lets it go on.
    d.agent.pause(context(), &request("c1")).await?;
    d.agent.resume(context(), &request("c1")).await?;
    let update = UpdateRequest {
        container: "c1".into(),
        resources: br#"{"pids":{"limit":50}}"#.to_vec(),
        ..Default::default()
    };
    d.agent.update(context(), &update).await?;
    ensure!(d.sh("c1", "u", "cat /sys/fs/cgroup/pids.max").await? == "50");
    // Memory: the kernel kills, and it is told.
    d.box_up("oom", "", ",\"memory\":{\"limit\":8388608}")
        .await?;
    let run = d
        .exec(
            "oom",
            "big",
            &process(
                &["sh", "-c", "dd if=/dev/zero of=/dev/null bs=64M count=1"],
                "",
            ),
            None,
        )
        .await?;
    ensure!(
        run.code == 137,
        "code {} {}",
        run.code,
        String::from_utf8_lossy(&run.stderr)
    );
    d.box_down("oom").await?;
    // A container that was never started can be deleted; a running one cannot.
    d.create(
        "never",
        &spec(&process(&["sh"], ""), "", ""),
        Stdio::default(),
    )
    .await
    .map_err(anyhow::Error::msg)?;
    d.delete("never", "").await?;
    ensure!(d.delete("c1", "").await.is_err());
    // The init's end ends its execs.
    d.box_up("c2", "", "").await?;
    d.register(
        "c2",
        "e",
        &process(&["sleep", "1000"], ""),
        Stdio::default(),
    )
    .await?;
    d.start("c2", "e").await.map_err(anyhow::Error::msg)?;
    d.kill("c2", "", 9, false).await?;
    ensure!(d.wait("c2", "e").await?.exit_status == 137);
    ensure!(d.wait("c2", "").await?.exit_status == 137);
    d.delete("c2", "").await?;
    // Another user, another folder, made on the way.
    let init = process(
        &[
            "sh",
            "-c",
            "id -u; id -G; pwd; umask; touch /root/x 2>&1 | grep -c denied",
        ],
        "",
    )
    .replace(
        r#""uid":0,"gid":0"#,
        r#""uid":1000,"gid":1000,"additionalGids":[5],"umask":63"#,
    )
    .replace(r#""cwd":"/""#, r#""cwd":"/srv/new""#);
    d.create(
        "c3",
        &spec(&init, "", ""),
        Stdio {
            stdout: true,
            ..Default::default()
        },
    )
    .await
    .map_err(anyhow::Error::msg)?;
    let mut out = d.stream("c3", "", StreamKind::Stdout).await?;
    d.start("c3", "").await.map_err(anyhow::Error::msg)?;
    let mut text = String::new();
    out.read_to_string(&mut text).await?;
    ensure!(text == "1000\n1000 5\n/srv/new\n0077\n1\n", "{text:?}");
    d.wait("c3", "").await?;
    d.delete("c3", "").await?;
    for i in 0..20 {
        let name = format!("n{i}");
        d.box_up(&name, "", "").await?;
        d.box_down(&name).await?;
    }
    Ok(())
}

async fn layers(d: &Driver) -> Result<()> {
    let mut rootfs = d.rootfs("many")?;
    rootfs.lower = Vec::new();
    for i in 0..128 {
        let name = format!("a-long-name-of-a-layer-so-that-a-page-is-too-small-{i}");
        std::fs::create_dir_all(d.trees.join(&name))?;
        std::fs::write(d.trees.join(&name).join(format!("f{i}")), "")?;
        rootfs.lower.push(d.tree(&name));
    }
    rootfs.lower.push(d.tree("base"));
    let init = process(&["sh", "-c", "ls -d /f* | wc -l"], "");
    let request = CreateContainerRequest {
        container: "many".into(),
        spec: spec(&init, "", "").replace("TREE", &d.tree).into_bytes(),
        rootfs: Some(rootfs).into(),
        stdio: Some(Stdio {
            stdout: true,
            ..Default::default()
        })
        .into(),
        ..Default::default()
    };
    d.agent
        .create_container(context(), &request)
        .await
        .map_err(|e| anyhow::anyhow!(message(e)))?;
    let mut out = d.stream("many", "", StreamKind::Stdout).await?;
    d.start("many", "").await.map_err(anyhow::Error::msg)?;
    let mut text = String::new();
    out.read_to_string(&mut text).await?;
    ensure!(text == "128\n", "{text:?}");
    d.wait("many", "").await?;
    d.delete("many", "").await
}

/// A filter works with and without noNewPrivileges, for the init and for execs.
async fn filter(d: &Driver) -> Result<()> {
    let profile = r#","seccomp":{"defaultAction":"SCMP_ACT_ALLOW","architectures":["SCMP_ARCH_X86_64","SCMP_ARCH_X86"],
        "syscalls":[{"names":["mkdir","mkdirat"],"action":"SCMP_ACT_ERRNO","errnoRet":38}]}"#;
    for (name, new_privileges) in [("f1", "true"), ("f2", "false")] {
        let process = |args: &[&str]| {
            process(args, "").replace(
                r#""noNewPrivileges":true"#,
                &format!(r#""noNewPrivileges":{new_privileges}"#),
            )
        };
        let spec = spec(&process(&["sleep", "1000"]), "", profile);
        d.create(name, &spec, Stdio::default())
            .await
            .map_err(anyhow::Error::msg)?;
        d.start(name, "").await.map_err(anyhow::Error::msg)?;
        let run = process(&["sh", "-c", "mkdir /x; grep ^Seccomp: /proc/1/status"]);
        let run = d.exec(name, "e", &run, None).await?;
        let said = String::from_utf8_lossy(&run.stderr).into_owned();
        ensure!(said.contains("Function not implemented"), "{said:?}");
        ensure!(run.stdout == b"Seccomp:\t2\n", "{:?}", run.stdout);
        d.box_down(name).await?;
    }
    Ok(())
}

/// A gigabyte through stdin and stdout, with the agent's memory before and after. Runs only if named.
async fn gigabyte(d: &Driver) -> Result<()> {
    d.register(
        "c1",
        "gb",
        &process(&["cat"], ""),
        Stdio {
            stdin: true,
            stdout: true,
            ..Default::default()
        },
    )
    .await?;
    let mut out = d.stream("c1", "gb", StreamKind::Stdout).await?;
    let mut stdin = d.stream("c1", "gb", StreamKind::Stdin).await?;
    d.start("c1", "gb").await.map_err(anyhow::Error::msg)?;
    tokio::spawn(async move {
        let block = vec![7; 1_000_000];
        for _ in 0..1000 {
            if stdin.write_all(&block).await.is_err() {
                return;
            }
        }
        let _ = stdin.shutdown().await;
    });
    let mut block = vec![0; 1_000_000];
    let mut total = 0;
    loop {
        let length = out.read(&mut block).await?;
        ensure!(
            block.iter().take(length).all(|byte| *byte == 7),
            "other bytes"
        );
        total += length;
        if length == 0 {
            break;
        }
    }
    ensure!(total == 1_000_000_000, "{total} bytes");
    d.wait("c1", "gb").await?;
    d.delete("c1", "gb").await
}

/// Looks at the agent itself from a container that shares its pid namespace.
async fn left(d: &Driver) -> Result<String> {
    let init = process(&["sleep", "1000"], "").replace(
        CAPS,
        r#"["CAP_SYS_PTRACE","CAP_DAC_OVERRIDE","CAP_SYS_ADMIN"]"#,
    );
    let spec = spec(&init, "", "")
        .replace(r#"{"type":"pid"},"#, "")
        .replace(r#"{"type":"cgroup"},"#, "");
    d.create("look", &spec, Stdio::default())
        .await
        .map_err(anyhow::Error::msg)?;
    d.start("look", "").await.map_err(anyhow::Error::msg)?;
    let script = "echo fds $(ls /proc/1/fd | wc -l), mounts $(wc -l < /proc/1/mounts), cgroups $(ls -d /sys/fs/cgroup/pods/*/ | wc -l), zombies $(grep -l '^State:.Z' /proc/[0-9]*/status 2>/dev/null | wc -l), threads $(ls /proc/1/task | wc -l), $(grep VmRSS /proc/1/status)";
    let exec = process(&["sh", "-c", script], "").replace(
        CAPS,
        r#"["CAP_SYS_PTRACE","CAP_DAC_OVERRIDE","CAP_SYS_ADMIN"]"#,
    );
    let run = d.exec("look", "e", &exec, None).await?;
    d.box_down("look").await?;
    Ok(String::from_utf8_lossy(&run.stdout).trim().to_string())
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let socket = PathBuf::from(args.next().context("VSOCK_SOCKET")?);
    let trees = PathBuf::from(args.next().context("TREES")?);
    let tree = args.next().context("TREE")?;
    let only = args.next();
    std::fs::create_dir_all(trees.join("empty"))?;
    std::fs::write(trees.join("file"), "bound file\n")?;
    let connection = connect(&socket, AGENT_PORT).await?;
    let client = ttrpc::r#async::Client::new(ttrpc::r#async::transport::Socket::new(connection));
    let d = Driver {
        socket,
        trees,
        tree,
        agent: AgentClient::new(client),
    };
    let d = Arc::new(d);
    let mut failed = 0;
    println!(
        "before: {}",
        left(&d).await.unwrap_or_else(|error| format!("{error:#}"))
    );
    macro_rules! run {
        ($($name:ident),*) => { $(
            if only.as_deref().is_none_or(|only| only == stringify!($name) || stringify!($name) == "basics") {
                let before = Instant::now();
                match $name(&d).await {
                    Ok(()) => println!("ok {} {:?}", stringify!($name), before.elapsed()),
                    Err(error) => { failed += 1; println!("FAILED {}: {error:#}", stringify!($name)); }
                }
            }
        )* };
    }
    run!(
        basics,
        create_errors,
        many_execs,
        bulk,
        terminal,
        life,
        layers,
        filter
    );
    if only.is_some() {
        run!(gigabyte);
    }
    d.box_down("c1").await?;
    println!("after: {}", left(&d).await?);
    d.agent
        .shutdown(context(), &Empty::new())
        .await
        .map_err(|e| anyhow::anyhow!(message(e)))?;
    println!("{failed} failed");
    ensure!(failed == 0, "{failed} failed");
    Ok(())
}
