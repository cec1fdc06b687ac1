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
        script: "dd if=/dev/zero bs=1M count=% 2>/dev/null | sha256sum",
        size: 128,
        slow: 32,
    },
    Work {
        id: "workload::processes",
        title: "% processes created one after another",
        script: "i=0; while [ $i -lt % ]; do /bin/true || exit 1; i=$((i+1)); done; echo done",
        size: 1000,
        slow: 200,
    },
    Work {
        id: "workload::walk",
        title: "`find` over the rootfs of a Debian image, % times",
        script: "i=0; while [ $i -lt % ]; do find / -xdev -type f | wc -l; i=$((i+1)); done",
        size: 10,
        slow: 3,
    },
    Work {
        id: "workload::write_and_read",
        title: "a file written to the rootfs and read again, % MiB",
        script: "dd if=/dev/zero of=/tmp-file bs=1M count=% 2>/dev/null && cat /tmp-file | wc -c && rm /tmp-file",
        size: 256,
        slow: 32,
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
            plan.rounds.div_ceil(2),
            &subjects,
            |subject| {
                let pod = pods.iter().find(|(s, _)| *s == subject);
                let (_, pod) = pod.context("no pod of it")?;
                let output = pod
                    .exec(&["sh", "-c", &script])
                    .seconds(120)
                    .output()?
                    .ok()?;
                ensure!(!output.stdout.is_empty(), "no output of {}", work.id);
                Ok([output.took.as_secs_f64() * 1e3])
            },
        ));
    }
    for (_, pod) in pods {
        pod.end()?;
    }
    Ok(found)
}
