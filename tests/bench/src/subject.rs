//! What is compared: runtimes behind one containerd.

use bulkhead_harness::{
    Engine, Image, Invocation, Run, Suite,
    failure::{Outcome, skip},
};

/// A runtime.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Subject {
    /// As the report calls it.
    pub name: &'static str,
    runtime: &'static str,
    flags: &'static [&'static str],
    /// The program that must be installed.
    needs: &'static str,
}

/// What every figure is a ratio to.
pub const RUNC: Subject = Subject {
    name: "runc",
    runtime: "io.containerd.runc.v2",
    flags: &[],
    needs: "runc",
};
/// The same again: what differs between the two is noise.
pub const RUNC_AGAIN: Subject = Subject {
    name: "runc again",
    ..RUNC
};
const CRUN: Subject = Subject {
    name: "crun",
    flags: &["--runc-binary", "crun"],
    needs: "crun",
    ..RUNC
};
const BULKHEAD_KVM: Subject = Subject {
    name: "bulkhead, kvm",
    runtime: "io.containerd.bulkhead.v1",
    flags: &[],
    needs: "true",
};
const BULKHEAD_EMULATED: Subject = Subject {
    name: "bulkhead, emulated",
    ..BULKHEAD_KVM
};

impl Subject {
    /// Bulkhead itself.
    pub fn bulkhead(engine: Engine) -> Self {
        match engine {
            Engine::Kvm => BULKHEAD_KVM,
            _ => BULKHEAD_EMULATED,
        }
    }

    /// Bulkhead on KVM where vhost-net is hidden from it.
    pub fn without_vhost() -> Self {
        Self {
            name: "bulkhead, kvm, without vhost-net",
            ..BULKHEAD_KVM
        }
    }

    /// runc twice, Bulkhead, and the other peers.
    pub fn all(engine: Engine) -> [Self; 4] {
        [RUNC, RUNC_AGAIN, Self::bulkhead(engine), CRUN]
    }

    /// Whether the host has it.
    pub fn present(self) -> Outcome {
        let found = Invocation::new("which").arg(self.needs).output()?;
        match found.status {
            0 => Ok(()),
            _ => skip(format!("{} is not installed", self.needs)),
        }
    }

    /// A container of it.
    pub fn run(self, suite: &Suite, image: Image) -> Run<'_> {
        suite.run(image).runtime(self.runtime).flags(self.flags)
    }
}
