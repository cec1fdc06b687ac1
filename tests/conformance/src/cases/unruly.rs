//! Processes that do not end when they should, and what they leave behind.

use std::time::{Duration, Instant};

use bulkhead_harness::Outcome;
use serde_json::{Value, json};

use crate::{
    case::{Case, case},
    side::{Bundle, Side},
};

/// The group.
// A table: one case a line where it fits.
#[rustfmt::skip]
pub fn all() -> Vec<Case> {
    let shared_pid = json!({ "linux": { "namespaces": [{ "type": "ipc" }, { "type": "uts" }, { "type": "mount" }, { "type": "network" }, { "type": "cgroup" }] } });
    vec![
        case("unruly::a_process_that_ignores_sigterm_ends_by_sigkill", json!({})).does("ignore-term 100").code(stubborn)
            .both(json!({ "after SIGTERM": "RUNNING", "status": 137 })),
        case("unruly::a_process_without_a_handler_ignores_sigterm_as_pid_1", json!({})).does("sleep 100").code(stubborn)
            .both(json!({ "after SIGTERM": "RUNNING", "status": 137 })),
        case("unruly::sigterm_ends_a_process_of_a_shared_pid_namespace", shared_pid.clone()).does("sleep 100").code(stubborn),
        case("unruly::a_grandchild_does_not_outlive_init", json!({})).does("double-fork 100 7").code(timed)
            .both(json!({ "status": 7, "in time": true })),
        case("unruly::a_grandchild_that_holds_stdout_does_not_hold_the_container", shared_pid).does("double-fork 100 7").code(timed)
            .both(json!({ "status": 7, "in time": true })),
        case("unruly::an_exec_that_leaves_a_grandchild_with_stdout_ends", json!({})).does("hold").code(exec_leaves)
            .both(json!({ "status": 7, "container": "RUNNING" })),
        case("unruly::a_zombie_factory_ends", json!({ "linux": { "resources": { "pids": { "limit": 300 } } } })).does("zombies 200").both(json!({ "zombies": 200 })),
        case("unruly::a_zombie_factory_stops_at_pids_limit", json!({ "linux": { "resources": { "pids": { "limit": 50 } } } })).does("zombies 1000").both(json!({ "zombies": 49 })),
        case("unruly::exit_codes_arrive", json!({})).does("exit 42").status(42),
        case("unruly::exit_code_255_arrives", json!({})).does("exit 255").status(255),
        case("unruly::a_signal_that_pid_1_sends_itself", json!({})).does("raise 15"),
    ]
}

/// SIGTERM, a look, SIGKILL.
fn stubborn(side: &Side, bundle: Bundle) -> Outcome<Value> {
    let mut running = side.spawn(&bundle)?;
    if running
        .wait_for("\"\n", side.suite.scale.seconds(20))
        .is_err()
    {
        let end = side.end(&bundle, running)?;
        return Ok(json!({ "started": false, "error": end.error }));
    }
    side.kill(&bundle.name, "SIGTERM")?;
    let limit = Instant::now() + side.suite.scale.seconds(1) / 2;
    while !running.has_ended() && Instant::now() < limit {
        std::thread::sleep(Duration::from_millis(20));
    }
    // The client may still be at the removal of a container that has ended.
    let runs = side
        .status(&bundle.name)?
        .is_some_and(|(_, s)| s == "RUNNING");
    if runs {
        side.kill(&bundle.name, "SIGKILL")?;
    }
    let status = if runs { "RUNNING" } else { "STOPPED" };
    let end = side.end(&bundle, running)?;
    Ok(json!({ "after SIGTERM": status, "status": end.seen["status"] }))
}

/// Runs to the end, which must come soon.
fn timed(side: &Side, bundle: Bundle) -> Outcome<Value> {
    let end = side.run(&bundle)?;
    if !end.started {
        return Ok(json!({ "started": false, "error": end.error }));
    }
    let soon = side.suite.scale.seconds(15);
    Ok(json!({ "status": end.seen["status"], "in time": end.took < soon }))
}

/// An exec whose grandchild keeps its stdout open.
fn exec_leaves(side: &Side, bundle: Bundle) -> Outcome<Value> {
    let (pod, client) = side.start(&bundle.name, &bundle.spec)?.attach()?;
    client.wait_for("}\n", side.suite.scale.seconds(20))?;
    let output = pod
        .exec(&["/probe", "double-fork", "100", "7"])
        .seconds(30)
        .output()?;
    let status = pod.status()?.map_or("gone".to_owned(), |(_, s)| s);
    pod.kill("SIGKILL")?;
    client.wait()?;
    pod.delete()?;
    Ok(json!({ "status": output.status, "container": status, "error": output.errors() }))
}
