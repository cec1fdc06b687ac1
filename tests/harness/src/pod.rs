//! Containers through `ctr run`, `ctr task exec` and their kind.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use serde_json::Value;

use crate::{
    command::{Input, Invocation, Keep, Output, Running},
    failure::{Context, Failure, Outcome, write},
    process::{self, Process},
    suite::Suite,
};

/// A `ctr run` that is put together.
#[derive(Clone, Debug)]
pub struct Run<'a> {
    suite: &'a Suite,
    runtime: &'static str,
    name: String,
    source: Vec<String>,
    flags: Vec<String>,
    args: Vec<String>,
    input: Input,
    keep: Keep,
    terminal: Option<(u16, u16)>,
    limit: Duration,
}

impl<'a> Run<'a> {
    pub(crate) fn new(suite: &'a Suite, source: Vec<String>) -> Self {
        Self {
            suite,
            runtime: suite.runtime(),
            name: suite.name("c"),
            source,
            flags: Vec::new(),
            args: Vec::new(),
            input: Input::Null,
            keep: Keep::All,
            terminal: None,
            limit: suite.scale.seconds(60),
        }
    }

    /// A container of a `config.json`.
    pub fn of_spec(suite: &'a Suite, spec: &Value) -> Outcome<Self> {
        let mut run = Self::new(suite, Vec::new());
        let file = suite.folder("specs")?.join(format!("{}.json", run.name));
        write(&file, spec.to_string())?;
        run.flags = vec!["--config".into(), file.to_string_lossy().into_owned()];
        Ok(run)
    }

    /// A container over a folder of the host.
    pub fn of_folder(suite: &'a Suite, folder: &Path) -> Self {
        let folder = folder.to_string_lossy().into_owned();
        Self::new(suite, vec![folder]).flag("--rootfs")
    }

    /// The container's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Another name.
    pub fn named(mut self, name: impl Into<String>) -> Self {
        self.name = name.into();
        self
    }

    /// Another runtime than the suite's.
    pub fn runtime(mut self, runtime: &'static str) -> Self {
        self.runtime = runtime;
        self
    }

    /// An option of `ctr run`.
    pub fn flag(mut self, flag: impl Into<String>) -> Self {
        self.flags.push(flag.into());
        self
    }

    /// Options of `ctr run`.
    pub fn flags(mut self, flags: &[&str]) -> Self {
        self.flags.extend(flags.iter().map(|&f| f.to_owned()));
        self
    }

    /// A mount in the words of `ctr run --mount`.
    pub fn mount(self, mount: impl Into<String>) -> Self {
        self.flag("--mount").flag(mount)
    }

    /// The process's arguments.
    pub fn args(mut self, args: &[&str]) -> Self {
        self.args = args.iter().map(|&a| a.to_owned()).collect();
        self
    }

    /// A shell script as the process.
    pub fn sh(self, script: impl AsRef<str>) -> Self {
        self.args(&["sh", "-c", script.as_ref()])
    }

    /// The client's stdin.
    pub fn input(mut self, input: Input) -> Self {
        self.input = input;
        self
    }

    /// What happens to stdout.
    pub fn keep(mut self, keep: Keep) -> Self {
        self.keep = keep;
        self
    }

    /// With a terminal of this size.
    pub fn terminal(mut self, rows: u16, columns: u16) -> Self {
        self.terminal = Some((rows, columns));
        self.input = Input::Open;
        self.flag("--tty")
    }

    /// A time limit in seconds of a fast host.
    pub fn seconds(mut self, seconds: u32) -> Self {
        self.limit = self.suite.scale.seconds(seconds);
        self
    }

    fn invocation(&self, more: &[&str]) -> Invocation {
        let run = self
            .suite
            .ctr(["run", "--runtime", self.runtime])
            .args(more)
            .args(&self.flags)
            .args(&self.source)
            .arg(&self.name)
            .args(&self.args)
            .input(self.input.clone())
            .keep(self.keep)
            .limit(self.limit);
        match self.terminal {
            Some((rows, columns)) => run.in_terminal(rows, columns),
            None => run,
        }
    }

    /// Runs the container to its end and removes it. What `ctr` leaves after a failed start is removed as well.
    pub fn output(self) -> Outcome<Output> {
        let output = self.invocation(&["--rm"]).output()?;
        if output.status != 0 {
            let remove = self.suite.ctr(["container", "rm", &self.name]);
            let _ = remove.output();
        }
        Ok(output)
    }

    /// Starts the container with the client attached to it.
    pub fn spawn(self) -> Outcome<Running> {
        self.invocation(&["--rm"]).spawn()
    }

    /// Starts the container and lets go of it; its output goes nowhere.
    pub fn detach(self) -> Outcome<Pod<'a>> {
        let (pod, starting) = self.begin()?;
        starting.wait()?.ok()?;
        Ok(pod)
    }

    /// The same, without waiting for the start.
    pub fn begin(self) -> Outcome<(Pod<'a>, Running)> {
        let pod = Pod {
            suite: self.suite,
            name: self.name.clone(),
            attached: false,
            gone: false,
        };
        let starting = self.invocation(&["-d", "--null-io"]).spawn()?;
        Ok((pod, starting))
    }

    /// Starts the container and lets go of it; its output goes to where the URI says.
    pub fn log_to(self, uri: &str) -> Outcome<Pod<'a>> {
        let pod = Pod {
            suite: self.suite,
            name: self.name.clone(),
            attached: false,
            gone: false,
        };
        self.invocation(&["-d", "--log-uri", uri]).output()?.ok()?;
        Ok(pod)
    }

    /// Starts the container with the client attached, as a pod that can be asked.
    pub fn attach(self) -> Outcome<(Pod<'a>, Running)> {
        let pod = Pod {
            suite: self.suite,
            name: self.name.clone(),
            attached: true,
            gone: false,
        };
        let running = self.invocation(&[]).spawn()?;
        Ok((pod, running))
    }
}

/// A container that runs.
#[derive(Debug)]
pub struct Pod<'a> {
    suite: &'a Suite,
    name: String,
    /// A client waits for it, and removes its task at the end.
    attached: bool,
    gone: bool,
}

impl Pod<'_> {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its client died: nobody else removes the task.
    pub fn without_client(mut self) -> Self {
        self.attached = false;
        self
    }

    /// An exec, yet to be run.
    pub fn exec(&self, args: &[&str]) -> Exec<'_> {
        Exec {
            suite: self.suite,
            pod: &self.name,
            flags: Vec::new(),
            args: args.iter().map(|&a| a.to_owned()).collect(),
            input: Input::Null,
            keep: Keep::All,
            terminal: None,
            limit: self.suite.scale.seconds(60),
        }
    }

    /// Runs a shell script in the container; it must succeed.
    pub fn sh(&self, script: &str) -> Outcome<String> {
        Ok(self.exec(&["sh", "-c", script]).output()?.ok()?.text())
    }

    /// `ctr task ARGS… NAME`.
    pub fn task(&self, args: &[&str]) -> Invocation {
        self.suite.ctr(["task"]).args(args).arg(&self.name)
    }

    /// Sends a signal by name.
    pub fn kill(&self, signal: &str) -> Outcome<Output> {
        self.task(&["kill", "-s", signal]).output()
    }

    /// Its line in `ctr task ls`: pid and status.
    pub fn status(&self) -> Outcome<Option<(u32, String)>> {
        let list = self.suite.ctr(["task", "ls"]).output()?.ok()?.text();
        Ok(list.lines().find_map(|line| {
            let mut words = line.split_whitespace();
            (words.next() == Some(&self.name)).then_some(())?;
            Some((words.next()?.parse().ok()?, words.next()?.to_owned()))
        }))
    }

    /// Waits until its status is `status`.
    pub fn wait_status(&self, status: &str, limit: Duration) -> Outcome {
        let end = Instant::now() + limit;
        loop {
            let seen = self.status()?;
            if seen.as_ref().is_some_and(|(_, s)| s == status) {
                return Ok(());
            }
            if Instant::now() > end {
                return Err(Failure::Failed(format!(
                    "{} is {seen:?} and not {status} after {limit:?}",
                    self.name
                )));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Processes of the pod on the host.
    pub fn processes(&self) -> Vec<Process> {
        let state = self.suite.state_of(&self.name);
        let shim = format!("-id {} ", self.name);
        let bundle = format!("/{}/{}", self.suite.namespace(), self.name);
        let all = process::of_pods(&self.suite.mark());
        let mut mine: Vec<Process> = Vec::new();
        // Parents come first in most cases, and the emulator is known by its parent.
        for p in all {
            let line = format!("{} ", p.line);
            let cwd = std::fs::read_link(format!("/proc/{}/cwd", p.pid)).unwrap_or_default();
            let parent = process::parent(p.pid);
            if line.contains(&*state.to_string_lossy())
                || line.contains(&shim)
                || cwd.to_string_lossy().ends_with(&bundle)
                || mine.iter().any(|m| Some(m.pid) == parent)
            {
                mine.push(p);
            }
        }
        mine
    }

    /// The pod's process that is called `name` (comm).
    pub fn command(&self, name: &str) -> Outcome<Process> {
        let mut all = self.processes().into_iter();
        all.find(|p| p.command() == name)
            .context(format_args!("no process {name} of {}", self.name))
    }

    /// The process that answers for the pod: the keeper's child.
    pub fn shim(&self) -> Outcome<Process> {
        process::shim_of(self.processes(), &self.name)
    }

    /// The pod's process whose executable's name begins with `name`.
    pub fn process(&self, name: &str) -> Outcome<Process> {
        let mut all = self.processes().into_iter();
        all.find(|p| p.name.starts_with(name))
            .context(format_args!("no process {name} of {}", self.name))
    }

    /// Ends the container and removes it; the exit status that `ctr task rm` tells.
    pub fn end(self) -> Outcome<i32> {
        self.kill("SIGKILL")?;
        self.delete()
    }

    /// Removes the container, which has ended or is about to; its exit status (0 if an attached client had it).
    pub fn delete(mut self) -> Outcome<i32> {
        let mut status = 0;
        if !self.attached {
            self.wait_status("STOPPED", self.suite.scale.seconds(20))?;
            let removed = self.task(&["rm"]).output()?.ok()?.errors();
            if let Some((_, code)) = removed.split_once("non-zero exit code ") {
                let digits: String = code.chars().take_while(char::is_ascii_digit).collect();
                status = digits
                    .parse()
                    .context(format_args!("exit code in {removed}"))?;
            }
        }
        self.gone = true;
        let remove = self.suite.ctr(["container", "rm", &self.name]);
        remove.output()?.ok()?;
        Ok(status)
    }

    /// Removes the task by force and the container.
    pub fn delete_by_force(mut self) -> Outcome {
        self.gone = true;
        self.task(&["rm", "-f"]).output()?;
        self.suite
            .ctr(["container", "rm", &self.name])
            .output()?
            .ok()?;
        Ok(())
    }
}

impl Drop for Pod<'_> {
    fn drop(&mut self) {
        if !self.gone {
            self.suite.save_logs();
            let short = self.suite.scale.seconds(10);
            let _ = self.task(&["rm", "-f"]).limit(short).output();
            let _ = self
                .suite
                .ctr(["container", "rm", &self.name])
                .limit(short)
                .output();
        }
    }
}

/// A `ctr task exec` that is put together.
#[derive(Clone, Debug)]
pub struct Exec<'a> {
    suite: &'a Suite,
    pod: &'a str,
    flags: Vec<String>,
    args: Vec<String>,
    input: Input,
    keep: Keep,
    terminal: Option<(u16, u16)>,
    limit: Duration,
}

impl Exec<'_> {
    /// Options of `ctr task exec`.
    pub fn flags(mut self, flags: &[&str]) -> Self {
        self.flags.extend(flags.iter().map(|&f| f.to_owned()));
        self
    }

    /// The client's stdin.
    pub fn input(mut self, input: Input) -> Self {
        self.input = input;
        self
    }

    /// What happens to stdout.
    pub fn keep(mut self, keep: Keep) -> Self {
        self.keep = keep;
        self
    }

    /// With a terminal of this size.
    pub fn terminal(mut self, rows: u16, columns: u16) -> Self {
        self.terminal = Some((rows, columns));
        self.input = Input::Open;
        self.flags.push("--tty".into());
        self
    }

    /// A time limit in seconds of a fast host.
    pub fn seconds(mut self, seconds: u32) -> Self {
        self.limit = self.suite.scale.seconds(seconds);
        self
    }

    /// Starts the exec.
    pub fn spawn(self) -> Outcome<Running> {
        let id = self.suite.name("x");
        let exec = self
            .suite
            .ctr(["task", "exec", "--exec-id", &id])
            .args(&self.flags)
            .arg(self.pod)
            .args(&self.args)
            .input(self.input)
            .keep(self.keep)
            .limit(self.limit);
        match self.terminal {
            Some((rows, columns)) => exec.in_terminal(rows, columns),
            None => exec,
        }
        .spawn()
    }

    /// Runs the exec to its end.
    pub fn output(self) -> Outcome<Output> {
        self.spawn()?.wait()
    }
}
