//! The vCPU loop: one thread a vCPU, from exit to exit.
//!
//! An exit's data is the guest's. It goes to the buses, which cannot panic, or ends the machine with a reason.

use std::os::unix::thread::JoinHandleExt;
use std::sync::Arc;
use std::thread::JoinHandle;

use kvm_bindings::{KVM_INTERNAL_ERROR_EMULATION, KVM_SYSTEM_EVENT_CRASH};
use kvm_ioctls::{VcpuExit, VcpuFd};

use super::exits::{ExitCounts, ExitKind};
use super::gate::{self, Gate, VcpuKick};
use crate::bus::Bus;
use crate::jail::seccomp::Kind;
use crate::jail::threads;
use crate::machine::end::{End, EndReason, EndSender};
use crate::serial::ConsoleRing;

/// What all vCPUs of a machine share.
pub struct Shared {
    /// Ports.
    pub ports: Bus,
    /// MMIO addresses.
    pub mmio: Bus,
    /// Exits so far.
    pub exits: Arc<ExitCounts>,
    /// Closed while paused.
    pub gate: Gate,
    /// Told when the machine ends.
    pub end: EndSender,
    /// What the guest printed: it tells a restart from a crash.
    pub console: Arc<ConsoleRing>,
}

/// Starts the thread of vCPU `id`.
pub fn spawn(id: u8, fd: VcpuFd, shared: Arc<Shared>) -> std::io::Result<JoinHandle<()>> {
    let builder = std::thread::Builder::new().name(format!("vcpu{id}"));
    threads::spawn(Kind::Vcpu, builder, move || {
        let end = run(id, fd, &shared);
        shared.end.send(end);
    })
}

/// Makes a vCPU leave the guest and look at the gate.
pub fn kick(thread: &JoinHandle<()>) {
    // SAFETY: the handle is not joined, so the thread's id is valid; the signal has a handler.
    unsafe { libc::pthread_kill(thread.as_pthread_t(), gate::kick_signal()) };
}

fn run(id: u8, mut fd: VcpuFd, shared: &Shared) -> End {
    // Declared after `fd`, so dropped before it.
    let _kick = VcpuKick::new(&mut fd);
    let count = |kind| shared.exits.count(kind);
    loop {
        fd.set_kvm_immediate_exit(0);
        if shared.gate.pass() {
            // The guest's watchdogs are not to take the pause for a stall. A guest without KVM's clock has none to tell.
            let _ = fd.kvmclock_ctrl();
        }
        match fd.run() {
            Ok(VcpuExit::IoIn(port, data)) => {
                count(ExitKind::PortRead);
                if !shared.ports.port_read(port, data) {
                    tracing::trace!(port, "read of an unclaimed port");
                }
            }
            Ok(VcpuExit::IoOut(port, data)) => {
                count(ExitKind::PortWrite);
                if !shared.ports.port_write(port, data) {
                    tracing::trace!(port, ?data, "write to an unclaimed port");
                }
            }
            Ok(VcpuExit::MmioRead(address, data)) => {
                count(ExitKind::MmioRead);
                shared.mmio.read(address, data);
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                count(ExitKind::MmioWrite);
                shared.mmio.write(address, data);
            }
            Ok(VcpuExit::Intr) => count(ExitKind::Interrupted),
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {
                count(ExitKind::Interrupted);
            }
            // With the interrupt controller in the kernel, KVM waits by itself.
            Ok(VcpuExit::Hlt) => count(ExitKind::Other),
            Ok(VcpuExit::Shutdown) => return End::triple_fault(&shared.console),
            Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_CRASH, _)) => {
                return End::new(EndReason::GuestPanic, "the guest reported a crash");
            }
            Ok(VcpuExit::SystemEvent(..)) => return End::guest_reset(&shared.console),
            Ok(VcpuExit::FailEntry(reason, _)) => {
                return failed(format!(
                    "vCPU {id}: the processor refused to enter the guest, reason {reason:#x}"
                ));
            }
            Ok(VcpuExit::InternalError) => return failed(internal_error(id, &mut fd)),
            Ok(exit) => return failed(format!("vCPU {id}: unexpected exit {exit:?}")),
            Err(error) => return failed(format!("vCPU {id}: KVM_RUN failed: {error}")),
        }
    }
}

fn failed(detail: String) -> End {
    End::new(EndReason::EngineFailed, detail)
}

fn internal_error(id: u8, fd: &mut VcpuFd) -> String {
    // SAFETY: the exit reason was KVM_EXIT_INTERNAL_ERROR, for which KVM fills this member.
    let suberror = unsafe { fd.get_kvm_run().__bindgen_anon_1.internal.suberror };
    let rip = fd.get_regs().map(|regs| regs.rip).unwrap_or_default();
    if suberror == KVM_INTERNAL_ERROR_EMULATION {
        format!(
            "vCPU {id}: KVM could not emulate the instruction at {rip:#x}; \
             does this host's /dev/kvm lack hardware virtualization? `bulkhead check` tells"
        )
    } else {
        format!("vCPU {id}: KVM internal error {suberror} at {rip:#x}")
    }
}
