//! What is compared: runtimes behind one containerd.

use std::{
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt,
};

use bulkhead_harness::{
    Context, Engine, Image, Invocation, Run, Suite,
    failure::{Outcome, skip, write},
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
/// Starts gVisor without a network stack of its own: the one of 2022 takes new network namespaces of today's kernels for the host's.
const RUNSC_SCRIPT: &str = "/run/bulkhead-bench-runsc";
/// gVisor, behind runc's shim: Debian has no shim of its own for it.
const RUNSC: Subject = Subject {
    name: "runsc (gVisor)",
    flags: &["--runc-binary", RUNSC_SCRIPT],
    needs: "runsc",
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

/// What subjects need of files; they go with the value.
#[derive(Debug)]
pub struct Scripts(());

impl Scripts {
    /// Makes them.
    pub fn make() -> Outcome<Self> {
        let script = "#!/bin/sh\nexec runsc --network=none --ignore-cgroups \"$@\"\n";
        write(RUNSC_SCRIPT, script)?;
        fs::set_permissions(RUNSC_SCRIPT, Permissions::from_mode(0o755))
            .context(format_args!("make {RUNSC_SCRIPT} executable"))?;
        Ok(Self(()))
    }
}

impl Drop for Scripts {
    fn drop(&mut self) {
        let _ = fs::remove_file(RUNSC_SCRIPT);
    }
}

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
    pub fn all(engine: Engine) -> [Self; 5] {
        [RUNC, RUNC_AGAIN, Self::bulkhead(engine), CRUN, RUNSC]
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
