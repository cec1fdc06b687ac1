//! Many containers, many pods, and an end in the middle of a start.

use bulkhead_cri::{Cri, container::shell};
use bulkhead_harness::{Outcome, Suite, Test, ensure_eq, runner::ANY, test};

use super::IMAGES;
use crate::cri;

/// The cases of this file.
pub const TESTS: &[Test] = &[
    test!(cri::many::containers_in_one_pod, IMAGES, ANY)
        .cri()
        .fast_host(),
    test!(cri::many::pods_at_once, IMAGES, ANY)
        .cri()
        .fast_host(),
    test!(
        cri::many::pod_is_stopped_while_its_containers_start,
        IMAGES,
        ANY
    )
    .cri()
    .fast_host(),
];

/// A number that the environment can raise to what is promised.
fn number(variable: &str, usual: usize) -> usize {
    let asked = std::env::var(variable).ok();
    asked.and_then(|asked| asked.parse().ok()).unwrap_or(usual)
}

fn containers_in_one_pod(suite: &Suite) -> Outcome {
    let cri = Cri::connect(suite, IMAGES)?;
    let count = number("BULKHEAD_E2E_CONTAINERS", 12);
    let pod = cri.run(cri.config("many"))?;
    let mut all = Vec::new();
    for index in 0..count {
        let script = format!("echo {index} >/me; exec sleep 1000000");
        all.push(pod.launch(shell(&format!("c{index}"), &script))?);
    }
    for (index, container) in all.iter().enumerate() {
        let script = "until [ -s /me ]; do sleep 0.1; done; cat /me";
        ensure_eq!("which one", pod.sh(container, script)?, index.to_string());
    }
    pod.end()
}

fn pods_at_once(suite: &Suite) -> Outcome {
    let cri = Cri::connect(suite, IMAGES)?;
    let count = number("BULKHEAD_E2E_PODS_AT_ONCE", 4);
    let configs = (0..count).map(|index| cri.config(&format!("at-once-{index}")));
    let pods = cri.run_all(configs.collect());
    let pods = pods.into_iter().collect::<Outcome<Vec<_>>>()?;
    for (index, pod) in pods.iter().enumerate() {
        let container = pod.launch(shell("one", "exec sleep 1000000"))?;
        ensure_eq!(
            "its name",
            pod.sh(&container, "hostname")?,
            format!("at-once-{index}")
        );
    }
    pods.into_iter().try_for_each(|pod| pod.end())
}

fn pod_is_stopped_while_its_containers_start(suite: &Suite) -> Outcome {
    let cri = Cri::connect(suite, IMAGES)?;
    for round in 0..2 {
        let pod = cri.run(cri.config(&format!("stopped-{round}")))?;
        let create = |name: &&str| pod.create(shell(name, "exec sleep 1000000"));
        let all = ["a", "b", "c"]
            .iter()
            .map(create)
            .collect::<Outcome<Vec<_>>>()?;
        pod.stop_while_starting(&all)?;
        pod.end()?;
    }
    Ok(())
}
