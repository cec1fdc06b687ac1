//! The points, the step that fails with each, and the two ways: an error, and the death of the process.

use std::{env, fs, path::PathBuf};

use bulkhead_harness::{
    Context, Image, Outcome, Suite, Test, ensure,
    failure::write,
    runner::{MACHINES, Place},
};

use crate::life::{Ended, Step, live, one_line};

/// The variable that the programs look at.
const FILE: &str = "BULKHEAD_FAILPOINT";
const BUSYBOX: &[Image] = &[Image::Busybox];

/// Where a point is, and how it fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    /// The step is an error.
    Error,
    /// The process dies there.
    Kill,
}

/// For each point the step that fails if it is an error, and if it is a death. A shim's death is none: another takes over.
macro_rules! points {
    ($($name:literal: $error:expr, $kill:expr;)*) => {
        /// The cases.
        pub const TESTS: &[Test] = &[
            $(case(concat!("error::", $name), |suite| fails(suite, $name, Mode::Error, $error)),
            case(concat!("kill::", $name), |suite| fails(suite, $name, Mode::Kill, $kill)),)*
        ];
    };
}

const RUN: Option<Step> = Some(Step::Run);
const MEMBER: Option<Step> = Some(Step::Member);
const EXEC: Option<Step> = Some(Step::Exec);
const NONE: Option<Step> = None;

points! {
    // `start`, the keeper and the shim.
    "start.socket": RUN, RUN;
    "start.daemon": RUN, RUN;
    "keeper.worker": RUN, RUN;
    "keeper.socket": RUN, RUN;
    "keeper.keep": RUN, RUN;
    "create.folder": RUN, NONE;
    "create.user": RUN, NONE;
    "create.config": RUN, NONE;
    "create.cgroup": RUN, NONE;
    "create.vmm": RUN, NONE;
    "create.fs": RUN, NONE;
    "create.trees": RUN, NONE;
    "create.ready": RUN, NONE;
    "create.agent": RUN, NONE;
    "create.network": RUN, NONE;
    "create.container": RUN, NONE;
    "create.streams": RUN, NONE;
    "create.pid": MEMBER, NONE;
    "start.container": RUN, NONE;
    "exec.create": EXEC, NONE;
    "exec.streams": EXEC, NONE;
    "exec.start": EXEC, NONE;
    "exit.wait": EXEC, NONE;
    "kill.signal": NONE, NONE;
    "delete.container": NONE, NONE;
    "delete.trees": NONE, NONE;
    "delete.pid": NONE, NONE;
    "delete.power-off": NONE, NONE;
    "delete.folder": NONE, NONE;
    // The VMM.
    "vmm.build": RUN, RUN;
    "vmm.jail": RUN, RUN;
    "vmm.start": RUN, RUN;
    "vmm.serve": RUN, RUN;
    "vmm.add-pid": MEMBER, MEMBER;
    // The file server and its steward.
    "fs.start": RUN, RUN;
    "fs.server": RUN, RUN;
    "fs.steward": RUN, RUN;
    "fs.serve": RUN, RUN;
    "fs.add-tree": RUN, RUN;
    "fs.remove-tree": NONE, NONE;
    // The agent, and the copies of itself that set containers up.
    "agent.serve": RUN, RUN;
    "agent.cgroup": RUN, RUN;
    "agent.rootfs": RUN, RUN;
    "agent.pivot": RUN, RUN;
    "agent.launched": RUN, RUN;
    "agent.start": RUN, RUN;
    "agent.exec": EXEC, EXEC;
    "agent.exec-start": EXEC, EXEC;
    "agent.signal": NONE, NONE;
    "agent.delete": NONE, NONE;
}

const fn case(name: &'static str, run: fn(&Suite) -> Outcome) -> Test {
    Test {
        name,
        images: BUSYBOX,
        engines: MACHINES,
        place: Place::Machine,
        fast_host: false,
        run,
    }
}

/// Tells the programs to come where the point stands. Before there is a second thread.
pub fn announce() {
    let file = env::temp_dir().join(format!("bulkhead-failpoint-{}", std::process::id()));
    // SAFETY: the process has one thread.
    unsafe { env::set_var(FILE, file) }
}

/// The point that is set; none once this goes.
pub struct Set(PathBuf);

impl Set {
    pub fn new(point: &str, mode: &str) -> Outcome<Self> {
        let file = PathBuf::from(env::var_os(FILE).context(FILE)?);
        write(&file, format!("{point} {mode}\n"))?;
        Ok(Self(file))
    }
}

impl Drop for Set {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

fn fails(suite: &Suite, point: &str, mode: Mode, expected: Option<Step>) -> Outcome {
    // A shim removes the file before it dies; of the others the step's end tells.
    let word = match mode {
        Mode::Error => "error",
        Mode::Kill => "kill",
    };
    let log = suite.log_mark();
    let set = Set::new(point, word)?;
    let ended = live(suite)?;
    let said = suite.logs(log);
    match (&ended, expected) {
        (Ended::Well, None) => {}
        (Ended::At(step, _), Some(expected)) if *step == expected => {}
        (ended, expected) => {
            let failed = format!("{expected:?} was to fail, but {ended:?}");
            return Err(failed.into());
        }
    }
    let text = match &ended {
        Ended::At(_, text) => text.as_str(),
        Ended::Well => "",
    };
    if mode == Mode::Error {
        let name = format!("failpoint {point}");
        let names = match point {
            // Itself, or the server that misses it: whoever comes last.
            "fs.steward" => vec![name.as_str(), "the steward is gone"],
            // containerd, which finds nobody, may have closed the log by then.
            "keeper.keep" => vec![name.as_str(), "connection refused"],
            // The request is not sent, and the next harder way is taken.
            "delete.power-off" => vec!["end=stopped"],
            _ => vec![name.as_str()],
        };
        // Errors are broken where their lines are full.
        let all = one_line(&format!("{text} {said}"));
        ensure!(
            names.iter().any(|name| all.contains(name)),
            "nobody says {names:?}: {text}\n{said}"
        );
    }
    println!(
        "         {}",
        text.trim().lines().last().unwrap_or("every step succeeded")
    );
    let of_shim =
        !point.starts_with("agent.") && !point.starts_with("vmm.") && !point.starts_with("fs.");
    if mode == Mode::Kill && of_shim {
        ensure!(!set.0.exists(), "{point} was not reached");
    }
    Ok(())
}
