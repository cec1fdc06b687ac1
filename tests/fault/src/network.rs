//! What carries the pod's frames vanishes from under it: the pod goes on, and is plugged in again when it can be.

use std::time::{Duration, Instant};

use bulkhead_harness::{
    Context, Image, Invocation, Outcome, Pod, Running, Suite, Test, ensure, runner::MACHINES, test,
};

use crate::network;

const BUSYBOX: &[Image] = &[Image::Busybox];

/// The cases.
pub const TESTS: &[Test] = &[
    test!(network::a_tap_that_vanishes, BUSYBOX, MACHINES),
    test!(network::an_interface_that_vanishes, BUSYBOX, MACHINES),
];

/// A pod with an `eth0`, whose other end is in a namespace of its own.
struct Plugged<'a> {
    pod: Pod<'a>,
    /// Holds the other end.
    far: Running,
    /// The VMM, in the pod's namespace.
    vmm: u32,
}

impl<'a> Plugged<'a> {
    fn start(suite: &'a Suite) -> Outcome<Self> {
        let pod = suite.busybox().args(&["sleep", "100000"]).detach()?;
        let (vmm, _) = pod.status()?.context("the pod's pid")?;
        let far = Invocation::new("unshare")
            .args(["--net", "sh", "-c", "echo there; exec sleep 1000"])
            .spawn()?;
        far.wait_for("there", suite.scale.seconds(5))?;
        let plugged = Self { pod, far, vmm };
        plugged.plug()?;
        Ok(plugged)
    }

    /// A shell script in the namespace of process `pid`.
    fn at(pid: u32, script: &str) -> Outcome<String> {
        let net = format!("--net=/proc/{pid}/ns/net");
        let script = Invocation::new("nsenter").args([&net, "sh", "-ec", script]);
        Ok(script.output()?.ok()?.text())
    }

    fn plug(&self) -> Outcome {
        let far = self.far.pid();
        let near = format!(
            "ip link add eth0 type veth peer name eth0 netns {far}; ip address add 10.99.0.2/24 dev eth0; ip link set eth0 up"
        );
        Self::at(self.vmm, &near)?;
        Self::at(
            far,
            "ip address add 10.99.0.1/24 dev eth0; ip link set eth0 up",
        )?;
        Ok(())
    }

    fn until_it_reaches(&self, suite: &Suite, when: &str) -> Outcome {
        let end = Instant::now() + suite.scale.seconds(15);
        while self
            .pod
            .exec(&["ping", "-c", "1", "-W", "1", "10.99.0.1"])
            .output()?
            .status
            != 0
        {
            ensure!(Instant::now() < end, "{when}: nothing is reached");
        }
        Ok(())
    }

    /// Nobody waits in circles for what is gone.
    fn rests(&self) -> Outcome {
        let processes = self.pod.processes();
        // One that is gone uses none.
        let used = || {
            processes
                .iter()
                .map(|p| p.cpu_ticks().unwrap_or(0))
                .sum::<u64>()
        };
        let before = used();
        std::thread::sleep(Duration::from_secs(1));
        let ticks = used().saturating_sub(before);
        // Of 100 a second and process.
        ensure!(ticks < 50, "{ticks} ticks of CPU in a second at rest");
        Ok(())
    }
}

/// The interface is still there: the shim makes it another tap.
fn a_tap_that_vanishes(suite: &Suite) -> Outcome {
    let plugged = Plugged::start(suite)?;
    plugged.until_it_reaches(suite, "plugged in")?;
    let tap = "cat /sys/class/net/bhtap0/ifindex 2>/dev/null || ip -o link show bhtap0";
    let before = Plugged::at(plugged.vmm, tap)?;
    Plugged::at(plugged.vmm, "ip link del bhtap0")?;
    plugged.pod.sh("echo goes")?;
    plugged.until_it_reaches(suite, "without its tap")?;
    ensure!(Plugged::at(plugged.vmm, tap)? != before, "the tap stayed");
    plugged.rests()?;
    plugged.pod.end()?;
    Ok(())
}

/// Its other end goes with it, as when CNI's bridge is removed.
fn an_interface_that_vanishes(suite: &Suite) -> Outcome {
    let plugged = Plugged::start(suite)?;
    plugged.until_it_reaches(suite, "plugged in")?;
    Plugged::at(plugged.vmm, "ip link del eth0")?;
    plugged.pod.sh("echo goes")?;
    let end = Instant::now() + suite.scale.seconds(10);
    while plugged.pod.sh("ip -o link")?.contains("eth0") {
        ensure!(Instant::now() < end, "the guest still has it");
    }
    plugged.rests()?;
    plugged.plug()?;
    plugged.until_it_reaches(suite, "plugged in again")?;
    plugged.pod.end()?;
    Ok(())
}
