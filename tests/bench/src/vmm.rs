//! The VMM alone, beside QEMU's microvm: the same kernel and initramfs, from the VMM's start until the agent serves.

use bulkhead_harness::{
    Image, Invocation, Suite,
    failure::{Context, Outcome},
};

use crate::{
    Plan, counts,
    figure::Figure,
    guest::{self, Product},
    subject::Subject,
};

/// `vmm::ready`.
pub fn figures(suite: &Suite, product: Product<'_>, plan: &Plan) -> Outcome<Vec<Figure>> {
    let mut ready = Figure::new(
        "vmm::ready",
        "from the start of the VMM until the agent serves, the same kernel and initramfs",
        "ms",
    );
    if !plan.wants(&ready.id) {
        return Ok(Vec::new());
    }
    suite.import(Image::Busybox)?;
    let (mut peer, mut ours) = (Vec::new(), Vec::new());
    let present = Invocation::new("which")
        .arg("qemu-system-x86_64")
        .output()?;
    let rounds = plan.rounds.div_ceil(3);
    for round in 1..=rounds {
        eprint!("\rvmm::ready: round {round} of {rounds} ");
        if present.status == 0 {
            peer.push(guest::wall_ms(product, suite.engine)?);
        }
        let pod = Subject::bulkhead(suite.engine).run(suite, Image::Busybox);
        let pod = pod.args(&["sleep", "1000"]).detach()?;
        let report = counts::report(&suite.state_of(pod.name()))?;
        let us = report["ready_us"]
            .as_f64()
            .context("the VMM's report has no ready_us")?;
        ours.push(us / 1e3);
        pod.end()?;
    }
    eprintln!();
    match peer.is_empty() {
        true => ready
            .missing
            .push("QEMU's microvm: QEMU is not installed".into()),
        false => ready.add_part("qemu -M microvm", peer),
    }
    ready.add_part(Subject::bulkhead(suite.engine).name, ours);
    Ok(vec![ready])
}
