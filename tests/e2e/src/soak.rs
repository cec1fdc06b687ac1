//! The soak: pods come and go beside one that stays, and neither containerd nor that one's processes grow. Asked for by
//! `--pods` or `--minutes`; `tests/load/run` calls it.

mod fit;

use std::{
    sync::OnceLock,
    time::{Duration, Instant},
};

use bulkhead_harness::{
    Image, Outcome, Pod, Suite, Test, ensure, ensure_eq,
    network::{self as net, GATEWAY},
    process::{self, Process},
    runner::ANY,
    test,
};
use fit::Fit;

use crate::{network, soak};

/// The cases of this group.
pub const TESTS: &[Test] =
    &[test!(soak::nothing_grows, &[Image::Busybox, Image::Net], ANY).networked()];

/// What the command line asks for.
pub static LENGTH: OnceLock<Length> = OnceLock::new();

/// How long it goes on.
#[derive(Clone, Copy, Debug)]
pub enum Length {
    /// So many pods.
    Pods(u32),
    /// As many as there are in this time.
    Time(Duration),
}

/// Bytes and descriptors a pod that are growth if the whole interval lies above: a page or a descriptor in ten pods.
const GROWTH: [f64; 2] = [409.6, 0.1];
/// A resident machine's memory. Mappings of half of it and more are the guest's memory, which is no growth of the process.
const MACHINE_MIB: u64 = 128;
/// Between two lines of progress.
const PROGRESS: Duration = Duration::from_secs(30);

/// A process that stays, and what it held after each pod.
struct Watched {
    process: Process,
    /// Mappings of half of this and more are a guest's memory.
    machine_mib: u64,
    bytes: Vec<f64>,
    descriptors: Vec<f64>,
}

impl Watched {
    fn new(process: Process, machine_mib: u64) -> Self {
        Self {
            process,
            machine_mib,
            bytes: Vec::new(),
            descriptors: Vec::new(),
        }
    }

    fn sample(&mut self) -> Outcome {
        let Process { pid, name, .. } = &self.process;
        let kib = self.process.private_kib(self.machine_mib)?;
        let descriptors = process::fds(*pid);
        // What has ended shows nothing, which would look like no growth.
        ensure!(kib > 0 && descriptors > 0, "{name} ({pid}) has ended");
        self.bytes.push((kib * 1024) as f64);
        self.descriptors.push(descriptors as f64);
        Ok(())
    }

    /// Its line of the table, and what grew.
    fn judge(&self) -> Outcome<(String, Option<String>)> {
        let title = format!("{} {}", self.process.command(), self.process.pid);
        let [bytes, descriptors] = [Fit::of(&self.bytes)?, Fit::of(&self.descriptors)?];
        let line = format!(
            "{title:<24} {:>8.0} {:>8.0} {:>22} {:>5} {:>5} {:>26}",
            bytes.first / 1024.0,
            bytes.last / 1024.0,
            bytes.show(0),
            descriptors.first,
            descriptors.last,
            descriptors.show(3)
        );
        let grew = [(bytes, "bytes"), (descriptors, "descriptors")]
            .into_iter()
            .zip(GROWTH)
            .find(|((fit, _), growth)| fit.low() > *growth)
            .map(|((fit, unit), _)| format!("{title} grows: {:.2} {unit} a pod", fit.slope));
        Ok((line, grew))
    }
}

fn nothing_grows(suite: &Suite) -> Outcome {
    let Some(length) = LENGTH.get() else {
        return bulkhead_harness::skip("--pods or --minutes says how long");
    };
    if let Length::Pods(asked) = *length {
        // Before the hour, not after it.
        ensure!(
            asked as usize >= fit::LEAST,
            "--pods has to be {} or more",
            fit::LEAST
        );
    }
    let network = suite.network()?;
    let enter = network.enter();
    let before = net::Network::state(&enter);
    let plug = network.pod()?;
    let size = format!("io.bulkhead.memory_mib={MACHINE_MIB}");
    let resident = network::run(suite, &plug).flags(&["--annotation", &size]);
    let resident = resident.args(&["sleep", "1000000"]).detach()?;
    let containerd = Process {
        pid: suite.containerd_pid()?,
        name: "containerd".into(),
        line: String::new(),
    };
    let mut watched = vec![Watched::new(containerd, u64::MAX >> 10)];
    let own = resident.processes().into_iter();
    watched.extend(own.map(|process| Watched::new(process, MACHINE_MIB)));

    let pods = rounds(suite, *length, &resident, &mut watched)?;

    println!(
        "         {pods} pods; after each the private memory and descriptors of:\n{:<24} {:>8} {:>8} {:>22} {:>5} {:>5} {:>26}",
        "process",
        "KiB then",
        "KiB now",
        "bytes a pod, 95 %",
        "then",
        "now",
        "descriptors a pod, 95 %"
    );
    let mut growth = Vec::new();
    for one in &watched {
        let (line, grew) = one.judge()?;
        println!("{line}");
        growth.extend(grew);
    }
    ensure_eq!("the resident's exit status", resident.end()?, 137);
    plug.end()?;
    let mut left = Vec::new();
    let clean = network::until(suite.settle(), "nothing is left", || {
        let now = net::Network::state(&enter);
        left = now.difference(&before).cloned().collect();
        Ok(left.is_empty())
    });
    clean.map_err(|_| format!("left in the network: {left:?}"))?;
    ensure!(growth.is_empty(), "{}", growth.join("\n"));
    Ok(())
}

/// Pods one after another, each second one with a network, until it is enough; how many there were.
fn rounds(suite: &Suite, length: Length, resident: &Pod, watched: &mut [Watched]) -> Outcome<u32> {
    let (start, mut told) = (Instant::now(), Instant::now());
    let mut pods = 0;
    while match length {
        Length::Pods(asked) => pods < asked,
        Length::Time(asked) => start.elapsed() < asked,
    } {
        one(suite, pods)?;
        // The resident works too: a process, a walk through files, a frame each way.
        let script = format!(
            "ls -lR /bin >/tmp/list; rm /tmp/list; ping -c 1 -W 5 {} >/dev/null && echo {pods}",
            GATEWAY.0
        );
        ensure_eq!("the resident", resident.sh(&script)?, pods.to_string());
        watched.iter_mut().try_for_each(Watched::sample)?;
        pods += 1;
        if told.elapsed() > PROGRESS {
            told = Instant::now();
            println!(
                "         {pods} pods in {:.1} minutes",
                start.elapsed().as_secs_f64() / 60.0
            );
        }
    }
    Ok(pods)
}

/// Create, start, exec, stop, delete.
fn one(suite: &Suite, round: u32) -> Outcome {
    let plug = match round % 2 {
        0 => None,
        _ => Some(
            suite
                .network()?
                .plug()?
                .with(&net::pods(), "eth0", &[(8080, 80)])?,
        ),
    };
    let run = match &plug {
        Some(plug) => network::run(suite, plug),
        None => suite.busybox(),
    };
    let pod = run.args(&["sleep", "1000000"]).detach()?;
    let script = match plug {
        Some(_) => format!("ping -c 1 -W 5 {} >/dev/null && echo {round}", GATEWAY.0),
        None => format!("echo {round}"),
    };
    ensure_eq!("exec", pod.sh(&script)?, round.to_string());
    ensure_eq!("exit status", pod.end()?, 137);
    plug.map_or(Ok(()), |plug| plug.end())
}
