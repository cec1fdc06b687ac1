//! What a running container loses: the same commands in pods that stay, taking turns.

use bulkhead_harness::{
    Image, Pod, Suite, ensure,
    failure::{Context, Outcome},
};

use crate::{
    Plan,
    figure::{Figure, measure},
    subject::{RUNC, RUNC_AGAIN, Subject},
};

struct Work {
    id: &'static str,
    title: &'static str,
    /// `%` is the size.
    script: &'static str,
    size: u64,
    slow: u64,
}

const WORK: &[Work] = &[
    Work {
        id: "workload::hash",
        title: "SHA-256 of % MiB of zeros",
        script: "head -c %M /dev/zero | sha256sum",
        size: 64,
        slow: 16,
    },
    Work {
        id: "workload::compile",
        title: "% modules of Python's library compiled",
        script: "python3 -c 'import glob\nfor f in sorted(glob.glob(\"/usr/lib/python3*/*.py\"))[:%]: compile(open(f, \"rb\").read(), f, \"exec\")' && echo done",
        size: 40,
        slow: 6,
    },
    Work {
        id: "workload::system_calls",
        title: "% times read and write of a byte, /dev/zero to /dev/null",
        script: "dd if=/dev/zero of=/dev/null bs=1 count=% 2>&1 | grep -c '^%+0 records out'",
        size: 500_000,
        slow: 50_000,
    },
    Work {
        id: "workload::processes",
        title: "% processes created one after another",
        script: "i=0; while [ $i -lt % ]; do /bin/true || exit 1; i=$((i+1)); done; echo done",
        size: 300,
        slow: 50,
    },
    Work {
        id: "workload::walk",
        title: "`find` over the rootfs of a Debian image, % times",
        script: "i=0; while [ $i -lt % ]; do find / -xdev -type f | wc -l; i=$((i+1)); done",
        size: 3,
        slow: 1,
    },
    Work {
        id: "workload::read_rootfs",
        title: "the files of the image's /usr/lib read, the first % MiB of them",
        script: "find /usr/lib -xdev -type f -exec cat {} + | head -c %M | wc -c",
        size: 32,
        slow: 8,
    },
];

/// `workload::*`.
pub fn figures(suite: &Suite, plan: &Plan) -> Outcome<Vec<Figure>> {
    let subjects = [RUNC, RUNC_AGAIN, Subject::bulkhead(suite.engine)];
    let wanted: Vec<&Work> = WORK.iter().filter(|work| plan.wants(work.id)).collect();
    if wanted.is_empty() {
        return Ok(Vec::new());
    }
    suite.import(Image::Python)?;
    let pods: Vec<(Subject, Pod<'_>)> = subjects
        .into_iter()
        .map(|subject| {
            let run = subject.run(suite, Image::Python).args(&["sleep", "100000"]);
            Ok((subject, run.detach()?))
        })
        .collect::<Outcome<_>>()?;
    let mut found = Vec::new();
    for work in wanted {
        let size = if suite.scale.pods_are_cheap() {
            work.size
        } else {
            work.slow
        };
        let words = |text: &str| text.replace('%', &size.to_string());
        let figures = [Figure::new(work.id, words(work.title), "ms")];
        let script = words(work.script);
        found.extend(measure(
            figures,
            plan.rounds.div_ceil(3).max(2),
            &subjects,
            |subject| {
                let pod = pods.iter().find(|(s, _)| *s == subject);
                let (_, pod) = pod.context("no pod of it")?;
                run_timed(pod, &script, work.id).map(|ms| [ms])
            },
        ));
    }
    for (_, pod) in pods {
        pod.end()?;
    }
    Ok(found)
}

/// Milliseconds of a script by the container's clock: what it takes to get in and out is not the work's.
fn run_timed(pod: &Pod<'_>, script: &str, id: &str) -> Outcome<f64> {
    let timed = format!("a=$(date +%s%N); {script}; s=$?; b=$(date +%s%N); echo $((b-a)); exit $s");
    let output = pod
        .exec(&["sh", "-c", &timed])
        .seconds(120)
        .output()?
        .ok()?;
    let text = output.text();
    let lines: Vec<&str> = text.lines().collect();
    let [.., said, time] = lines[..] else {
        return Err(format!("no output of {id}").into());
    };
    ensure!(!said.is_empty(), "no output of {id}");
    let ms = time.parse::<f64>().context("the time")? / 1e6;
    let outside = output.took.as_secs_f64() * 1e3;
    ensure!(
        ms > 0.0 && ms <= outside,
        "{id} took {ms} ms inside and {outside} ms outside"
    );
    Ok(ms)
}
