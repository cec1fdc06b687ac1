//! `hooks`: when each runs, what it gets, and what its failure does.

use std::{fs, path::Path};

use bulkhead_harness::Outcome;
use serde_json::{Value, json};

use crate::{
    case::{Case, case},
    side::{Bundle, Side},
};

/// A hook on the host that keeps its input in `$DIR/NAME` and ends with `code`.
fn hook(name: &str, code: u32) -> Value {
    json!([{ "path": "/bin/sh", "args": ["sh", "-c", format!("cat >$DIR/{name}; echo \"$GREETING $#\" >$DIR/{name}.more; exit {code}"), "a", "b"],
        "env": ["GREETING=hello", "PATH=/bin:/usr/bin"] }])
}

/// A hook of the container: the probe.
fn inner(name: &str, code: u32) -> Value {
    json!([{ "path": "/probe", "args": ["probe", "hook", format!("/tmp/{name}"), code.to_string()] }])
}

/// The group.
// A table: one case a line where it fits.
#[rustfmt::skip]
pub fn all() -> Vec<Case> {
    let hooks = |name: &str, list: Value| json!({ "hooks": { name: list } });
    let ran = |name: &str, status: &str| json!({ name: { "ran": true, "status": status, "more": "hello 1" } });
    vec![
        case("hooks::prestart", hooks("prestart", hook("prestart", 0))).does("exit 0").code(run).both(ran("prestart", "creating")),
        case("hooks::create_runtime", hooks("createRuntime", hook("createRuntime", 0))).does("exit 0").code(run).both(ran("createRuntime", "creating")),
        case("hooks::poststart", hooks("poststart", hook("poststart", 0))).does("sleep 1").code(run).ours(ran("poststart", "running")),
        case("hooks::poststop", hooks("poststop", hook("poststop", 0))).does("exit 0").code(run).both(ran("poststop", "stopped")),
        case("hooks::prestart_that_fails", hooks("prestart", hook("prestart", 3))).does("exit 0").refused(&["prestart"]),
        case("hooks::create_runtime_that_fails", hooks("createRuntime", hook("createRuntime", 3))).does("exit 0").refused(&["createRuntime"]),
        case("hooks::poststart_that_fails", hooks("poststart", hook("poststart", 3))).does("exit 0").survives(),
        case("hooks::poststop_that_fails", hooks("poststop", hook("poststop", 3))).does("exit 7").status(7),
        case("hooks::that_is_missing", hooks("createRuntime", json!([{ "path": "/no/such/hook" }]))).does("exit 0").refused(&["/no/such/hook"]),
        case("hooks::past_its_timeout", hooks("createRuntime", json!([{ "path": "/bin/sleep", "args": ["sleep", "30"], "timeout": 1 }])))
            .does("exit 0").refused(&["createRuntime"]),
        case("hooks::with_a_relative_path", hooks("createRuntime", json!([{ "path": "sh" }]))).does("exit 0").survives(),
        case("hooks::several_in_order", hooks("createRuntime", json!([
            { "path": "/bin/sh", "args": ["sh", "-c", "echo one >>$DIR/createRuntime.more; cat >/dev/null"] },
            { "path": "/bin/sh", "args": ["sh", "-c", "echo two >>$DIR/createRuntime.more; cat >$DIR/createRuntime"] }])))
            .does("exit 0").code(run).both(json!({ "createRuntime": { "more": "one\ntwo" } })),
        case("hooks::start_container", json!({ "hooks": { "startContainer": inner("started", 0) },
            "mounts+": [{ "type": "tmpfs", "source": "tmpfs", "destination": "/tmp" }] })).sees("identity /tmp")
            .both(json!({ "paths": { "/tmp": { "names": ["started"] } } })),
        case("hooks::start_container_that_fails", json!({ "hooks": { "startContainer": inner("started", 4) },
            "mounts+": [{ "type": "tmpfs", "source": "tmpfs", "destination": "/tmp" }] })).sees("identity").refused(&["startContainer"]),
        case("hooks::start_container_that_is_missing", hooks("startContainer", json!([{ "path": "/no/such/hook" }]))).sees("identity").refused(&["/no/such/hook"]),
        case("hooks::create_container_that_is_missing", hooks("createContainer", json!([{ "path": "/no/such/hook" }]))).sees("identity").refused(&["/no/such/hook"]),
        case("hooks::all_of_the_host", json!({ "hooks": { "prestart": hook("prestart", 0), "createRuntime": hook("createRuntime", 0),
            "poststart": hook("poststart", 0), "poststop": hook("poststop", 0) } })).does("sleep 1").code(run)
            .both(json!({ "prestart": { "ran": true }, "createRuntime": { "ran": true }, "poststart": { "ran": true }, "poststop": { "ran": true } })),
    ]
}

/// Runs the container, and tells what each hook of the host got.
fn run(side: &Side, bundle: Bundle) -> Outcome<Value> {
    let end = side.run(&bundle)?;
    if !end.started {
        return Ok(json!({ "started": false, "error": end.error }));
    }
    let mut seen = json!({ "status": end.seen["status"] });
    for name in ["prestart", "createRuntime", "poststart", "poststop"] {
        let file = bundle.folder.join(name);
        // poststop comes when the task is deleted, which the client does last.
        if let Ok(text) = fs::read_to_string(&file) {
            seen[name] = state(&text, &bundle, &file);
        }
    }
    Ok(seen)
}

fn state(text: &str, bundle: &Bundle, file: &Path) -> Value {
    let state: Value = serde_json::from_str(text).unwrap_or_default();
    let more = fs::read_to_string(file.with_extension("more")).unwrap_or_default();
    json!({
        "ran": true, "status": state["status"], "id": state["id"] == json!(bundle.name), "has_pid": state["pid"].as_i64().is_some_and(|p| p > 0),
        "version": state["ociVersion"].is_string(), "bundle": state["bundle"].as_str().is_some_and(|b| b.ends_with(&bundle.name)),
        "annotations": state["annotations"]["io.kubernetes.cri.container-type"], "more": more.trim_end(),
    })
}
