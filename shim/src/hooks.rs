//! Hooks that run on the host (runtime-spec, config.md, "POSIX-platform Hooks").
//!
//! | hook | when | if it fails |
//! |---|---|---|
//! | prestart, then createRuntime | the machine is up; before the agent makes the container | create fails, with its stderr; the container's poststop hooks run |
//! | poststart | the program was started | start fails, the container is killed |
//! | poststop | the container was deleted, or its creation failed | logged |
//!
//! The pid in the state is the container's on the host: the VMM's, or of a further container a thread's of it, in the pod's network
//! namespace.
//! Hooks come from containerd's client, who is root on this host anyway; they are run as they are, with nothing but their own environment.
//! Poststop hooks are remembered in a file of the bundle, so that `delete` runs them if the shim dies.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process_group};
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWriteExt},
    process::{Child, Command},
    time::timeout,
};

use crate::{
    limits::HOOK_STDERR,
    refusal::{Refusal, wrong},
    sandbox::{machine::printable, state::write_private},
};

/// The longest part of a hook's stderr that an error quotes.
const QUOTE_MAX: usize = 600;
/// How long a hook's stderr is read after its end, should a child of it hold it open.
const STDERR_WAIT: Duration = Duration::from_millis(200);
/// The file in the bundle.
const POSTSTOP: &str = "bulkhead-poststop.json";

/// One hook.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Hook {
    path: PathBuf,
    args: Vec<String>,
    env: Vec<String>,
    timeout: Option<u64>,
}

/// The host's hooks of a spec.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Hooks {
    prestart: Vec<Hook>,
    create_runtime: Vec<Hook>,
    poststart: Vec<Hook>,
    poststop: Vec<Hook>,
}

/// The container's state (runtime-spec, runtime.md, "State"): what a hook reads on stdin.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct State {
    /// Version of the spec.
    pub oci_version: String,
    /// Id of the container.
    pub id: String,
    /// `creating`, `running` or `stopped`.
    pub status: String,
    /// The VMM's; none if stopped.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pid: Option<u32>,
    /// The bundle.
    pub bundle: PathBuf,
    /// The spec's.
    pub annotations: BTreeMap<String, String>,
}

/// A hook that failed.
#[derive(Debug, thiserror::Error)]
#[error("hooks.{kind}[{index}] ({path}): {why}")]
pub struct Error {
    kind: &'static str,
    index: usize,
    path: PathBuf,
    why: Why,
}

#[derive(Debug, thiserror::Error)]
enum Why {
    #[error("cannot be run: {0}")]
    Run(#[from] io::Error),
    #[error("{0}: {1}")]
    Status(ExitStatus, String),
    #[error("did not end within its timeout of {0} s and was killed: {1}")]
    Timeout(u64, String),
}

impl Hooks {
    /// Refuses paths and timeouts that cannot be meant.
    pub fn check(&self) -> Result<(), Refusal> {
        for (kind, hooks) in [
            ("prestart", &self.prestart),
            ("createRuntime", &self.create_runtime),
            ("poststart", &self.poststart),
            ("poststop", &self.poststop),
        ] {
            for (index, hook) in hooks.iter().enumerate() {
                let field = |name| format!("hooks.{kind}[{index}].{name}");
                if !hook.path.is_absolute() {
                    return Err(wrong(field("path"), "is not an absolute path"));
                }
                if hook.timeout == Some(0) {
                    return Err(wrong(field("timeout"), "is not greater than zero"));
                }
            }
        }
        Ok(())
    }
}

/// A container's hooks with what they are told.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Runner {
    hooks: Hooks,
    state: State,
}

impl Runner {
    /// `state` without status.
    pub fn new(hooks: Hooks, state: State) -> Self {
        Self { hooks, state }
    }

    /// Prestart and createRuntime hooks.
    pub async fn create(&self) -> Result<(), Error> {
        let state = self.state("creating");
        run("prestart", &self.hooks.prestart, &state).await?;
        run("createRuntime", &self.hooks.create_runtime, &state).await
    }

    /// Poststart hooks.
    pub async fn poststart(&self) -> Result<(), Error> {
        run("poststart", &self.hooks.poststart, &self.state("running")).await
    }

    /// Poststop hooks: each is run, whatever happens to those before it.
    pub async fn poststop(&self) {
        let mut state = self.state("stopped");
        state.pid = None;
        for (index, hook) in self.hooks.poststop.iter().enumerate() {
            if let Err(error) = run_one("poststop", index, hook, &state).await {
                tracing::warn!(container = state.id, %error, "the container is gone all the same");
            }
        }
        let _ = fs::remove_file(self.state.bundle.join(POSTSTOP));
    }

    fn state(&self, status: &str) -> State {
        State {
            status: status.into(),
            ..self.state.clone()
        }
    }

    /// Leaves the poststop hooks in the bundle, for `delete`.
    pub fn remember(&self) -> io::Result<()> {
        if self.hooks.poststop.is_empty() {
            return Ok(());
        }
        let text = serde_json::to_string(self).map_err(io::Error::other)?;
        write_private(&self.state.bundle.join(POSTSTOP), &text)
    }

    /// Runs what a shim that died has left in the bundle.
    pub fn recover(bundle: &Path) {
        let Ok(text) = fs::read(bundle.join(POSTSTOP)) else {
            return;
        };
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build();
        if let (Ok(runner), Ok(runtime)) = (serde_json::from_slice::<Self>(&text), runtime) {
            runtime.block_on(runner.poststop());
        }
    }
}

/// Runs hooks in their order, up to the first that fails.
async fn run(kind: &'static str, hooks: &[Hook], state: &State) -> Result<(), Error> {
    for (index, hook) in hooks.iter().enumerate() {
        run_one(kind, index, hook, state).await?;
    }
    Ok(())
}

async fn run_one(
    kind: &'static str,
    index: usize,
    hook: &Hook,
    state: &State,
) -> Result<(), Error> {
    tracing::debug!(kind, index, path = %hook.path.display(), container = state.id, "hook");
    hook.run(state).await.map_err(|why| Error {
        kind,
        index,
        path: hook.path.clone(),
        why,
    })
}

impl Hook {
    async fn run(&self, state: &State) -> Result<(), Why> {
        let input = serde_json::to_vec(state).map_err(io::Error::from)?;
        let mut child = self.spawn(&state.bundle)?;
        // Tasks of their own: a hook may read nothing, and a child of it may hold the pipes open.
        let feed = child.stdin.take().map(|mut stdin| {
            tokio::spawn(async move {
                let _ = stdin.write_all(&input).await;
            })
        });
        let said = Arc::new(Mutex::new(Vec::new()));
        let listen = child
            .stderr
            .take()
            .map(|err| tokio::spawn(keep(err, said.clone())));
        let ended = self.wait(&mut child).await;
        if let Some(feed) = feed {
            feed.abort();
        }
        if let Some(listen) = listen {
            let _ = timeout(STDERR_WAIT, listen).await;
        }
        let said = said.lock().unwrap_or_else(PoisonError::into_inner);
        let said = printable(String::from_utf8_lossy(&said).trim(), QUOTE_MAX);
        match ended? {
            None => Err(Why::Timeout(self.timeout.unwrap_or_default(), said)),
            Some(status) if !status.success() => Err(Why::Status(status, said)),
            Some(_) => Ok(()),
        }
    }

    fn spawn(&self, bundle: &Path) -> io::Result<Child> {
        let mut command = Command::new(&self.path);
        if let Some((name, rest)) = self.args.split_first() {
            command.arg0(name).args(rest);
        }
        let env = self.env.iter().filter_map(|entry| entry.split_once('='));
        command
            .env_clear()
            .envs(env)
            .current_dir(bundle)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
    }

    /// The exit status; none if the time was over, and then the process group is gone.
    async fn wait(&self, child: &mut Child) -> io::Result<Option<ExitStatus>> {
        let Some(seconds) = self.timeout else {
            return child.wait().await.map(Some);
        };
        match timeout(Duration::from_secs(seconds), child.wait()).await {
            Ok(status) => status.map(Some),
            Err(_) => {
                // Not reaped yet, so the number is still its own.
                let group = child.id().and_then(|pid| Pid::from_raw(pid.cast_signed()));
                if let Some(group) = group {
                    let _ = kill_process_group(group, Signal::KILL);
                }
                child.wait().await?;
                Ok(None)
            }
        }
    }
}

/// Keeps the beginning of what comes, and reads the rest so that nobody blocks.
async fn keep(mut from: impl AsyncRead + Unpin, to: Arc<Mutex<Vec<u8>>>) {
    let mut buffer = [0; 1024];
    while let Ok(length @ 1..) = from.read(&mut buffer).await {
        let mut to = to.lock().unwrap_or_else(PoisonError::into_inner);
        let room = HOOK_STDERR.saturating_sub(to.len()).min(length);
        to.extend_from_slice(buffer.get(..room).unwrap_or_default());
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn runner(bundle: &Path, hooks: Value) -> Runner {
        let state = State {
            oci_version: "1.0.2".into(),
            id: "c1".into(),
            pid: Some(7),
            bundle: bundle.into(),
            annotations: [("k".into(), "v".into())].into(),
            ..State::default()
        };
        Runner::new(serde_json::from_value(hooks).unwrap(), state)
    }

    fn shell(script: &str) -> Value {
        json!({ "path": "/bin/sh", "args": ["hook", "-c", script], "env": ["A=b c"] })
    }

    #[tokio::test]
    async fn a_hook_gets_state_arguments_environment_and_the_bundle_as_folder() {
        let bundle = tempfile::tempdir().unwrap();
        let script = "cat > state; echo \"$A|$0|$HOME|${PATH:+p}\" > out";
        let hooks =
            json!({ "prestart": [shell("echo first > out2")], "createRuntime": [shell(script)] });
        runner(bundle.path(), hooks).create().await.unwrap();
        let read = |name| fs::read_to_string(bundle.path().join(name)).unwrap();
        let state: Value = serde_json::from_str(&read("state")).unwrap();
        assert_eq!(
            state,
            json!({ "ociVersion": "1.0.2", "id": "c1", "status": "creating", "pid": 7,
                    "bundle": bundle.path(), "annotations": { "k": "v" } })
        );
        assert!(read("out").starts_with("b c|hook||"), "{}", read("out"));
        assert_eq!(read("out2"), "first\n");
    }

    #[tokio::test]
    async fn a_hook_that_fails_is_named_with_its_stderr_and_ends_the_row() {
        let bundle = tempfile::tempdir().unwrap();
        let hooks = json!({ "createRuntime": [shell("true"), shell("echo no network >&2; exit 3"), shell("touch third")] });
        let error = runner(bundle.path(), hooks)
            .create()
            .await
            .unwrap_err()
            .to_string();
        assert_eq!(
            error,
            "hooks.createRuntime[1] (/bin/sh): exit status: 3: no network"
        );
        assert!(!bundle.path().join("third").exists());
        let hooks = json!({ "prestart": [{ "path": "/no/such" }] });
        let error = runner(bundle.path(), hooks)
            .create()
            .await
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("hooks.prestart[0] (/no/such): cannot be run: No such file"),
            "{error}"
        );
    }

    #[tokio::test]
    async fn of_a_hooks_stderr_only_the_beginning_is_kept() {
        let kept = Arc::new(Mutex::new(Vec::new()));
        let flood = vec![b'x'; 1 << 20];
        keep(flood.as_slice(), Arc::clone(&kept)).await;
        assert_eq!(kept.lock().unwrap().len(), HOOK_STDERR);
    }

    #[tokio::test]
    async fn after_the_timeout_the_whole_process_group_is_killed() {
        let bundle = tempfile::tempdir().unwrap();
        let mut hook = shell("echo $$ > pid; sleep 71 & echo busy >&2; sleep 72");
        hook["timeout"] = json!(1);
        let started = std::time::Instant::now();
        let hooks = json!({ "poststart": [hook] });
        let error = runner(bundle.path(), hooks)
            .poststart()
            .await
            .unwrap_err()
            .to_string();
        assert!(
            error.ends_with("timeout of 1 s and was killed: busy"),
            "{error}"
        );
        assert!(started.elapsed() < Duration::from_secs(10));
        let pid: i32 = fs::read_to_string(bundle.path().join("pid"))
            .unwrap()
            .trim()
            .parse()
            .unwrap();
        let mut gone = false;
        for _ in 0..100 {
            gone = rustix::process::test_kill_process_group(Pid::from_raw(pid).unwrap()).is_err();
            if gone {
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert!(gone, "the group lives");
    }

    #[tokio::test]
    async fn a_child_that_holds_stderr_and_a_hook_that_reads_nothing_do_not_hang() {
        let bundle = tempfile::tempdir().unwrap();
        let mut runner = runner(
            bundle.path(),
            json!({ "prestart": [shell("sleep 5 & exit 0")] }),
        );
        runner
            .state
            .annotations
            .insert("big".into(), "x".repeat(1 << 20));
        let started = std::time::Instant::now();
        runner.create().await.unwrap();
        assert!(started.elapsed() < Duration::from_secs(4));
    }

    #[test]
    fn poststop_hooks_all_run_and_survive_the_shim() {
        let bundle = tempfile::tempdir().unwrap();
        let hooks = json!({ "poststop": [shell("exit 1"), shell("cat >> stopped")] });
        runner(bundle.path(), hooks).remember().unwrap();
        Runner::recover(bundle.path());
        let state: Value =
            serde_json::from_str(&fs::read_to_string(bundle.path().join("stopped")).unwrap())
                .unwrap();
        assert_eq!(
            (&state["status"], state.get("pid")),
            (&json!("stopped"), None)
        );
        Runner::recover(bundle.path());
        assert!(!bundle.path().join(POSTSTOP).exists());
    }

    #[test]
    fn relative_paths_and_no_time_are_refused_by_name() {
        for (hook, field) in [
            (json!({ "path": "x" }), "hooks.poststop[0].path"),
            (
                json!({ "path": "/x", "timeout": 0 }),
                "hooks.poststop[0].timeout",
            ),
        ] {
            let hooks: Hooks = serde_json::from_value(json!({ "poststop": [hook] })).unwrap();
            let error = hooks.check().unwrap_err().to_string();
            assert!(error.starts_with(field), "{error}");
        }
    }
}
