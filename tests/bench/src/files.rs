//! File I/O on the rootfs and on a volume: fio in pods that stay, taking turns. Through the page caches, as programs do it.

use bulkhead_harness::{
    Image, Pod, Suite, ensure,
    failure::{Context, Outcome},
};
use serde_json::Value;

use crate::{
    Plan,
    figure::{Figure, measure},
    subject::{RUNC, RUNC_AGAIN, Subject},
};

/// Name, fio's word, which half of its report, and what it is in words.
const JOBS: [(&str, &str, &str, &str); 4] = [
    (
        "write",
        "write",
        "write",
        "a file written from begin to end, 128 KiB at a time",
    ),
    (
        "read",
        "read",
        "read",
        "a file read from begin to end, 128 KiB at a time",
    ),
    (
        "random_read",
        "randread",
        "read",
        "a file read in places of chance, 4 KiB at a time",
    ),
    (
        "random_write",
        "randwrite",
        "write",
        "a file written in places of chance, 4 KiB at a time",
    ),
];
const PLACES: [(&str, &str); 2] = [("rootfs", "/"), ("volume", "/volume")];

/// `files::*`.
pub fn figures(suite: &Suite, plan: &Plan) -> Outcome<Vec<Figure>> {
    let id = |place: &str, job: &str| format!("files::{place}_{job}");
    let wanted: Vec<_> = PLACES
        .into_iter()
        .filter(|(place, _)| JOBS.iter().any(|(job, ..)| plan.wants(&id(place, job))))
        .collect();
    if wanted.is_empty() {
        return Ok(Vec::new());
    }
    suite.import(Image::Fio)?;
    let subjects = [RUNC, RUNC_AGAIN, Subject::bulkhead(suite.engine)];
    let pods: Vec<(Subject, Pod<'_>)> = subjects
        .into_iter()
        .map(|subject| {
            let folder = suite.folder(&suite.name("volume"))?;
            let run = subject.run(suite, Image::Fio).args(&["sleep", "100000"]);
            let source = folder.to_string_lossy();
            let run = run.mount(format!(
                "type=bind,src={source},dst=/volume,options=rbind:rw"
            ));
            Ok((subject, run.detach()?))
        })
        .collect::<Outcome<_>>()?;
    let mut found = Vec::new();
    for (place, folder) in wanted {
        let figures = JOBS.map(|(job, _, _, what)| {
            let unit = if job.starts_with("random") {
                "1/s"
            } else {
                "MiB/s"
            };
            Figure::new(
                &id(place, job),
                format!("{what}, on the {place} (fio)"),
                unit,
            )
            .more_is_better()
        });
        let rounds = plan.rounds.div_ceil(5).max(2);
        found.extend(measure(figures, rounds, &subjects, |subject| {
            let pod = pods.iter().find(|(s, _)| *s == subject);
            let (_, pod) = pod.context("no pod of it")?;
            fio(suite, pod, folder)
        }));
    }
    for (_, pod) in pods {
        pod.end()?;
    }
    Ok(found)
}

/// MiB a second, or requests a second where they are of 4 KiB, of each job.
fn fio(suite: &Suite, pod: &Pod<'_>, folder: &str) -> Outcome<[f64; 4]> {
    let size = if suite.scale.pods_are_cheap() {
        "64m"
    } else {
        "16m"
    };
    let mut words: Vec<String> = [
        "fio",
        "--output-format=json",
        "--ioengine=psync",
        "--filename=fio-file",
    ]
    .map(String::from)
    .into();
    words.extend([
        format!("--directory={folder}"),
        format!("--size={size}"),
        "--time_based".into(),
        "--runtime=2".into(),
        "--stonewall".into(),
    ]);
    for (name, kind, ..) in JOBS {
        let block = if kind.starts_with("rand") {
            "4k"
        } else {
            "128k"
        };
        words.extend([
            format!("--name={name}"),
            format!("--rw={kind}"),
            format!("--bs={block}"),
        ]);
    }
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let text = pod.exec(&words).seconds(120).output()?.ok()?.text();
    // Warnings come before the report.
    let report = text.find('{').and_then(|at| text.get(at..));
    let report: Value = serde_json::from_str(report.unwrap_or_default()).context("fio's report")?;
    let mut values = [0.0; JOBS.len()];
    for (value, (name, kind, half, _)) in values.iter_mut().zip(JOBS) {
        let mut jobs = report["jobs"].as_array().into_iter().flatten();
        let job = jobs.find(|job| job["jobname"] == name);
        let job = job.context(format_args!("fio reports no job {name}"))?;
        ensure!(
            job["error"] == 0,
            "fio's job {name} failed: {}",
            job["error"]
        );
        let of = |key: &str| {
            job[half][key]
                .as_f64()
                .context(format_args!("fio says no {key} of {name}"))
        };
        *value = if kind.starts_with("rand") {
            of("iops")?
        } else {
            of("bw")? / 1024.0
        };
    }
    Ok(values)
}
