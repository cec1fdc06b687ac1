//! The pod's network: what CNI's plugins put into the pod's network namespace is what the container has, and
//! everybody who should reaches it. The suite's own network stands for the host: see the harness's `network` module.

mod hostile;
mod life;
mod ports;
mod shape;
mod traffic;

use std::time::{Duration, Instant};

use bulkhead_harness::{
    Failure, Image, Outcome, Pod, Run, Suite, Test,
    network::{Network, Plug},
};

const NET: &[Image] = &[Image::Net];
const BUSYBOX: &[Image] = &[Image::Busybox];

/// The cases of this group.
pub fn tests() -> Vec<Test> {
    [
        shape::TESTS,
        traffic::TESTS,
        ports::TESTS,
        life::TESTS,
        hostile::TESTS,
    ]
    .concat()
}

/// A container in the plug's namespace, with the tools.
pub fn run<'a>(suite: &'a Suite, plug: &Plug) -> Run<'a> {
    let [flag, value] = plug.flag();
    suite.run(Image::Net).flag(flag).flag(value)
}

/// One that stays.
fn start<'a>(suite: &'a Suite, plug: &Plug) -> Outcome<Pod<'a>> {
    run(suite, plug).args(&["sleep", "1000000"]).detach()
}

/// One with nginx, which answers.
fn serve<'a>(suite: &'a Suite, network: &Network, plug: &Plug) -> Outcome<Pod<'a>> {
    let pod = run(suite, plug).args(&["nginx"]).detach()?;
    let url = format!("http://{}/", plug.v4()?);
    until(suite.scale.seconds(10), "nginx answers", || {
        let curl = network.tool(&["curl", "-s", "-m", "5", &url]);
        Ok(curl.output()?.text() == "hello from nginx")
    })?;
    Ok(pod)
}

/// Looks again until the condition holds.
pub fn until(limit: Duration, what: &str, mut holds: impl FnMut() -> Outcome<bool>) -> Outcome {
    let end = Instant::now() + limit;
    while !holds()? {
        if Instant::now() > end {
            return Err(Failure::Failed(format!("not within {limit:?}: {what}")));
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}
