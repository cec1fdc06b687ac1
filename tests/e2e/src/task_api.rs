//! The shim's own API as containerd speaks it, in orders that containerd's clients do not show.

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    os::unix::net::UnixStream,
    time::Duration,
};

use bulkhead_cri::Cri;
use bulkhead_harness::{
    Context, Failure, Image, Outcome, Suite, Test, ensure, ensure_eq, process, process::Process,
    runner::MACHINES, skip, test,
};
use containerd_shim_protos::{
    api::{
        CheckpointTaskRequest, DeleteRequest, ExecProcessRequest, KillRequest, PauseRequest,
        ResumeRequest, StartRequest, WaitRequest,
    },
    sandbox_api::{PingRequest, PlatformRequest, SandboxStatusRequest},
    sandbox_async::SandboxClient,
    shim_async::{Client, TaskClient},
};
use serde_json::json;
use tokio::{runtime::Runtime, time::timeout};
use ttrpc::{Code, context::Context as Limit};

use crate::task_api;

const BUSYBOX: &[Image] = &[Image::Busybox];

/// As in the limits tables (docs/limits.md).
const EXECS_MAX: usize = 1024;
const CONTROL_CONNECTIONS: usize = 8;
const CONTROL_LINE_BYTES: usize = 4 << 10;

/// The cases of this group.
pub const TESTS: &[Test] = &[
    test!(
        task_api::calls_in_any_order_have_typed_answers,
        BUSYBOX,
        MACHINES
    ),
    test!(task_api::execs_have_a_cap, BUSYBOX, MACHINES).fast_host(),
    test!(
        task_api::control_lines_and_connections_are_capped,
        BUSYBOX,
        MACHINES
    ),
    test!(
        task_api::sandbox_is_pinged,
        &[Image::Pause, Image::Busybox],
        MACHINES
    )
    .cri(),
];

/// A connection to the shim of a pod, as containerd has one.
fn connect(runtime: &Runtime, shim: &Process) -> Outcome<Client> {
    let file = format!("/proc/{}/cwd/address", shim.pid);
    let address = fs::read_to_string(&file).context(file)?;
    let client = runtime.block_on(Client::connect(address.trim()));
    client.context(format_args!("connect to {address}"))
}

fn runtime() -> Outcome<Runtime> {
    let mut builder = tokio::runtime::Builder::new_current_thread();
    builder.enable_all().build().context("a runtime")
}

/// The status code of an answer that must be an error.
fn code<T>(what: &str, answer: ttrpc::Result<T>) -> Outcome<Code> {
    match answer {
        Err(ttrpc::Error::RpcStatus(status)) => Ok(status.code()),
        Err(error) => Err(Failure::Failed(format!("{what}: {error}"))),
        Ok(_) => Err(Failure::Failed(format!("{what} was done"))),
    }
}

fn calls_in_any_order_have_typed_answers(suite: &Suite) -> Outcome {
    let pod = suite.busybox().args(&["sleep", "1000000"]).detach()?;
    let id = pod.name();
    let runtime = runtime()?;
    let task = TaskClient::new(connect(&runtime, &pod.shim()?)?);
    let patience = suite.scale.seconds(20);
    let limit = || ttrpc::context::with_duration(patience);
    let exec = |exec_id: &str, script: &str| exec_request(id, exec_id, script);
    let start = |exec_id: &str| {
        let mut request = StartRequest::new();
        request.id = id.into();
        request.exec_id = exec_id.into();
        request
    };
    let wait = |exec_id: &str| {
        let mut request = WaitRequest::new();
        request.id = id.into();
        request.exec_id = exec_id.into();
        request
    };
    let delete = |exec_id: &str| {
        let mut request = DeleteRequest::new();
        request.id = id.into();
        request.exec_id = exec_id.into();
        request
    };
    let kill = |exec_id: &str, signal: u32| {
        let mut request = KillRequest::new();
        request.id = id.into();
        request.exec_id = exec_id.into();
        request.signal = signal;
        request
    };
    let walk = async {
        let failed = |error: ttrpc::Error| Failure::Failed(error.to_string());
        task.exec(limit(), &exec("e", "sleep 0.3; exit 4"))
            .await
            .map_err(failed)?;
        let again = task.exec(limit(), &exec("e", "true")).await;
        ensure_eq!("exec twice", code("exec", again)?, Code::ALREADY_EXISTS);
        // Wait before start, and two who wait.
        let (first, second) = (wait("e"), wait("e"));
        let waiting = async {
            let one = task.wait(limit(), &first);
            let two = task.wait(limit(), &second);
            tokio::try_join!(one, two)
        };
        let starting = async {
            tokio::time::sleep(Duration::from_millis(100)).await;
            task.start(limit(), &start("e")).await
        };
        let ((one, two), _) = tokio::try_join!(waiting, starting).map_err(failed)?;
        ensure_eq!("ends", (one.exit_status, two.exit_status), (4, 4));
        let again = task.start(limit(), &start("e")).await;
        let what = "start of an ended exec";
        ensure_eq!(what, code(what, again)?, Code::FAILED_PRECONDITION);
        let dead = task.kill(limit(), &kill("e", 9)).await;
        ensure_eq!("kill after the end", code("kill", dead)?, Code::NOT_FOUND);
        let gone = task.delete(limit(), &delete("e")).await.map_err(failed)?;
        ensure_eq!("delete", gone.exit_status, 4);
        let twice = task.delete(limit(), &delete("e")).await;
        ensure_eq!("delete twice", code("delete", twice)?, Code::NOT_FOUND);
        let lost = task.wait(limit(), &wait("e")).await;
        ensure_eq!("wait after delete", code("wait", lost)?, Code::NOT_FOUND);

        // A start that its caller gives up is done all the same. One may be given up before it is sent.
        task.exec(limit(), &exec("given-up", "exit 6"))
            .await
            .map_err(failed)?;
        loop {
            let moment = ttrpc::context::with_duration(Duration::from_millis(2));
            match task.start(moment, &start("given-up")).await {
                Ok(_) => break,
                // By the start before.
                Err(ttrpc::Error::RpcStatus(no)) if no.code() == Code::FAILED_PRECONDITION => break,
                Err(_) => {}
            }
        }
        let ended = task.wait(limit(), &wait("given-up")).await;
        ensure_eq!("its end", ended.map_err(failed)?.exit_status, 6);
        let gone = task.delete(limit(), &delete("given-up")).await;
        ensure_eq!("delete", gone.map_err(failed)?.exit_status, 6);

        // Nothing begins in a paused container.
        task.exec(limit(), &exec("early", "true"))
            .await
            .map_err(failed)?;
        let (mut pause, mut resume) = (PauseRequest::new(), ResumeRequest::new());
        (pause.id, resume.id) = (id.into(), id.into());
        task.pause(limit(), &pause).await.map_err(failed)?;
        let into = task.exec(limit(), &exec("paused", "true")).await;
        let what = "exec into a paused container";
        ensure_eq!(what, code(what, into)?, Code::FAILED_PRECONDITION);
        let begun = task.start(limit(), &start("early")).await;
        let what = "start in a paused container";
        ensure_eq!(what, code(what, begun)?, Code::FAILED_PRECONDITION);
        task.resume(limit(), &resume).await.map_err(failed)?;
        task.start(limit(), &start("early")).await.map_err(failed)?;
        let ended = task.wait(limit(), &wait("early")).await;
        ensure_eq!("its end", ended.map_err(failed)?.exit_status, 0);

        task.exec(limit(), &exec("long", "sleep 1000000"))
            .await
            .map_err(failed)?;
        task.start(limit(), &start("long")).await.map_err(failed)?;
        let runs = task.delete(limit(), &delete("long")).await;
        let what = "delete of a running exec";
        ensure_eq!(what, code(what, runs)?, Code::FAILED_PRECONDITION);
        let none = task.checkpoint(limit(), &checkpoint(id)).await;
        ensure_eq!("checkpoint", code("checkpoint", none)?, Code::UNIMPLEMENTED);

        // An exec into a container that is ending: refused or ended with it, and never left waiting.
        task.kill(limit(), &kill("", 9)).await.map_err(failed)?;
        let late = task.exec(limit(), &exec("late", "sleep 1000000")).await;
        if late.is_ok() {
            let started = task.start(limit(), &start("late")).await;
            let ended = task.wait(limit(), &wait("late")).await.map_err(failed)?;
            ensure!(
                started.is_err() || ended.exit_status == 137,
                "an exec of an ending container ended with {}",
                ended.exit_status
            );
        }
        let ended = task.wait(limit(), &wait("")).await.map_err(failed)?;
        ensure_eq!("its end", ended.exit_status, 137);
        let ended = task.wait(limit(), &wait("long")).await.map_err(failed)?;
        ensure_eq!("the long exec's end", ended.exit_status, 137);
        let dead = task.kill(limit(), &kill("", 9)).await;
        ensure_eq!("kill after the end", code("kill", dead)?, Code::NOT_FOUND);
        let into = task.exec(limit(), &exec("x", "true")).await;
        let what = "exec into an ended container";
        ensure_eq!(what, code(what, into)?, Code::FAILED_PRECONDITION);
        Ok(())
    };
    let all = async {
        let walked = timeout(patience * 4, walk).await;
        walked.unwrap_or_else(|_| Err(Failure::Failed("a call has no answer".into())))
    };
    runtime.block_on(all)?;
    pod.delete()?;
    Ok(())
}

/// Execs that were added and never deleted: the next one is refused, and one that is deleted makes room.
fn execs_have_a_cap(suite: &Suite) -> Outcome {
    let pod = suite.busybox().args(&["sleep", "1000000"]).detach()?;
    let id = pod.name();
    let runtime = runtime()?;
    let task = TaskClient::new(connect(&runtime, &pod.shim()?)?);
    let patience = suite.scale.seconds(20);
    let limit = || ttrpc::context::with_duration(patience);
    let add = async |number: usize| {
        let request = exec_request(id, &format!("e{number}"), "true");
        task.exec(limit(), &request).await
    };
    runtime.block_on(async {
        let failed = |error: ttrpc::Error| Failure::Failed(error.to_string());
        for number in 0..EXECS_MAX {
            add(number).await.map_err(failed)?;
        }
        let what = "one exec more";
        let more = code(what, add(EXECS_MAX).await)?;
        ensure_eq!(what, more, Code::RESOURCE_EXHAUSTED);
        let mut first = DeleteRequest::new();
        first.id = id.into();
        first.exec_id = "e0".into();
        task.delete(limit(), &first).await.map_err(failed)?;
        add(EXECS_MAX).await.map_err(failed)?;
        Ok::<_, Failure>(())
    })?;
    pod.end()?;
    Ok(())
}

/// Clients at the VMM's control socket that ask for too much harm neither the pod nor each other.
fn control_lines_and_connections_are_capped(suite: &Suite) -> Outcome {
    let pod = suite.busybox().args(&["sleep", "1000000"]).detach()?;
    let path = suite.state_of(pod.name()).join("control.sock");
    let dial = || -> Outcome<UnixStream> {
        let stream = UnixStream::connect(&path).context("connect to control.sock")?;
        let patience = Some(suite.scale.seconds(20));
        stream.set_read_timeout(patience).context("a timeout")?;
        Ok(stream)
    };
    let answer = |stream: &UnixStream| -> Outcome<String> {
        let mut line = String::new();
        let mut reader = BufReader::new(stream);
        reader.read_line(&mut line).context("an answer")?;
        Ok(line)
    };
    let report = b"{\"op\":\"report\"}\n";

    let mut long = dial()?;
    // The VMM may close the connection before all of it is taken.
    let _ = long.write_all(&[b' '; CONTROL_LINE_BYTES + 1]);
    let said = answer(&long)?;
    ensure!(said.contains("too long"), "a long line: {said}");

    // More than it serves: those that wait are served once others go, and the pod goes on meanwhile.
    let idle = (0..2 * CONTROL_CONNECTIONS).map(|_| dial());
    let idle = idle.collect::<Outcome<Vec<_>>>()?;
    let output = pod.exec(&["echo", "there"]).output()?.ok()?;
    let text = output.text();
    ensure_eq!("an exec meanwhile", text.trim(), "there");
    let mut waiting = dial()?;
    waiting.write_all(report).context("write")?;
    drop(idle);
    let said = answer(&waiting)?;
    ensure!(said.starts_with("{\"ok\""), "after the others: {said}");
    pod.end()?;
    Ok(())
}

fn exec_request(id: &str, exec_id: &str, script: &str) -> ExecProcessRequest {
    let mut request = ExecProcessRequest::new();
    request.id = id.into();
    request.exec_id = exec_id.into();
    let process = json!({ "args": ["sh", "-c", script], "cwd": "/", "user": { "uid": 0, "gid": 0 },
        "env": ["PATH=/bin"] });
    request.spec.mut_or_insert_default().value = process.to_string().into_bytes();
    request
}

fn checkpoint(id: &str) -> CheckpointTaskRequest {
    let mut request = CheckpointTaskRequest::new();
    request.id = id.into();
    request
}

fn sandbox_is_pinged(suite: &Suite) -> Outcome {
    if suite.major < 2 {
        return skip("this containerd does not know the Sandbox API");
    }
    let cri = Cri::connect(suite, &[Image::Pause, Image::Busybox])?;
    let pod = cri.run_with("sandboxed", cri.config("pinged"))?;
    let runtime = runtime()?;
    let shim = process::shim_of(process::of_pods(&suite.mark()), pod.id())?;
    let sandbox = SandboxClient::new(connect(&runtime, &shim)?);
    let limit = || -> Limit { ttrpc::context::with_duration(suite.scale.seconds(20)) };
    let failed = |error: ttrpc::Error| Failure::Failed(error.to_string());
    let mut ping = PingRequest::new();
    ping.sandbox_id = pod.id().into();
    let pinged = runtime.block_on(sandbox.ping_sandbox(limit(), &ping));
    pinged.map_err(failed)?;
    let mut platform = PlatformRequest::new();
    platform.sandbox_id = pod.id().into();
    let said = runtime.block_on(sandbox.platform(limit(), &platform));
    let said = said.map_err(failed)?;
    ensure_eq!("platform", said.platform.os, "linux");
    let mut status = SandboxStatusRequest::new();
    status.sandbox_id = "another".into();
    let other = runtime.block_on(sandbox.sandbox_status(limit(), &status));
    ensure_eq!("another sandbox", code("status", other)?, Code::NOT_FOUND);
    pod.end()
}
