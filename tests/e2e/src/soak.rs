//! The soak: pods come and go beside one that stays, and neither containerd nor that one's processes grow. Asked for by
//! `--pods` or `--minutes`; `tests/load/run` calls it.

mod fit;

use std::{
    path::PathBuf,
    sync::OnceLock,
    time::{Duration, Instant},
};

use bulkhead_harness::{
    Image, Outcome, Pod, Suite, Test, ensure, ensure_eq,
    network::{self as net, GATEWAY},
    process::{self, Process},
    profile,
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

/// Bytes in which a heap grows (M_TOP_PAD of mallopt(3)): once in the whole run is none of the pods' growth.
const STEP: f64 = 131_072.0;
/// Descriptors or goroutines a pod.
const COUNT: f64 = 0.1;
/// The emulator keeps an index of its translations, one node a block: at most a tenth of their bytes. Both end with the
/// buffer's size, after which they begin anew.
const INDEX: f64 = 0.1;
/// A resident machine's memory. Mappings of half of it and more are the guest's memory, which is no growth of the process.
const MACHINE_MIB: u64 = 128;
/// Between two lines of progress.
const PROGRESS: Duration = Duration::from_secs(30);

/// A process that stays, and what it held after each pod.
struct Watched {
    process: Process,
    /// Of containerd: its profiler's socket.
    profiler: Option<PathBuf>,
    bytes: Vec<f64>,
    translated: Vec<f64>,
    descriptors: Vec<f64>,
    goroutines: Vec<f64>,
}

impl Watched {
    fn new(process: Process, profiler: Option<PathBuf>) -> Self {
        Self {
            process,
            profiler,
            bytes: Vec::new(),
            translated: Vec::new(),
            descriptors: Vec::new(),
            goroutines: Vec::new(),
        }
    }

    fn sample(&mut self) -> Outcome {
        let Process { pid, name, .. } = &self.process;
        let descriptors = process::fds(*pid);
        let bytes = match &self.profiler {
            Some(socket) => {
                let goroutines = profile::goroutines(socket)?.len();
                self.goroutines.push(goroutines as f64);
                profile::heap(socket)?
            }
            None => {
                let (own, translated) = self.process.written_kib(MACHINE_MIB)?;
                self.translated.push((translated * 1024) as f64);
                own * 1024
            }
        };
        // What has ended shows nothing, which would look like no growth.
        ensure!(bytes > 0 && descriptors > 0, "{name} ({pid}) has ended");
        self.bytes.push(bytes as f64);
        self.descriptors.push(descriptors as f64);
        Ok(())
    }

    /// Its lines of the table, and what grew.
    fn judge(&self) -> Outcome<(String, Vec<String>)> {
        let title = format!("{} {}", self.process.command(), self.process.pid);
        let index = match self.translated.as_slice() {
            [] => 0.0,
            samples => Fit::of(samples)?.slope.max(0.0) * INDEX,
        };
        let judged = Fit::judged(self.bytes.len()) as f64;
        // Growth if the whole interval lies above the last value.
        let series = [
            ("bytes", 0, &self.bytes, STEP / judged + index),
            ("translated", 0, &self.translated, f64::INFINITY),
            ("descriptors", 3, &self.descriptors, COUNT),
            ("goroutines", 3, &self.goroutines, COUNT),
        ];
        let (mut lines, mut grew) = (String::new(), Vec::new());
        // Only the emulator translates, and only Go has goroutines.
        for (unit, digits, samples, growth) in series {
            if samples.iter().all(|sample| *sample == 0.0) {
                continue;
            }
            let fit = Fit::of(samples)?;
            lines.push_str(&format!(
                "{title:<24} {unit:<12} {:>10.0} {:>10.0} {:>26}\n",
                fit.first,
                fit.last,
                fit.show(digits)
            ));
            if fit.low() > growth {
                grew.push(format!("{title} grows: {:.2} {unit} a pod", fit.slope));
            }
        }
        Ok((lines, grew))
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
    let profiler = suite.address().with_file_name(profile::SOCKET);
    let mut watched = vec![Watched::new(containerd, Some(profiler))];
    let own = resident.processes().into_iter();
    watched.extend(own.map(|process| Watched::new(process, None)));

    let pods = rounds(suite, *length, &resident, &mut watched)?;

    println!(
        "         {pods} pods; after each:\n{:<24} {:<12} {:>10} {:>10} {:>26}",
        "process", "what", "then", "now", "growth a pod, 95 %"
    );
    let mut growth = Vec::new();
    for one in &watched {
        let (lines, grew) = one.judge()?;
        print!("{lines}");
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
