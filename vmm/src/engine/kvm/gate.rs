//! The gate that every vCPU passes before it enters the guest: closed while the machine is paused.
//!
//! A vCPU inside the guest is kicked out by a signal. Its handler sets `immediate_exit` in the thread's own `kvm_run`, so
//! that a signal which comes just before `KVM_RUN` is not lost. The vCPU clears the flag, then looks at the gate,
//! then enters: whichever moment the signal takes, it leaves the guest or does not enter.

use std::cell::Cell;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

use kvm_bindings::kvm_run;
use kvm_ioctls::VcpuFd;

/// Open or closed, and how many vCPUs wait before it.
#[derive(Default)]
pub struct Gate {
    closed: AtomicBool,
    parked: Mutex<usize>,
    changed: Condvar,
}

impl Gate {
    /// Closes the gate. The caller kicks the vCPUs and waits with [`Self::wait_parked`].
    pub fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
    }

    /// Lets all vCPUs go on.
    pub fn open(&self) {
        let parked = self.parked.lock().unwrap_or_else(PoisonError::into_inner);
        self.closed.store(false, Ordering::SeqCst);
        drop(parked);
        self.changed.notify_all();
    }

    /// Whether the gate is closed.
    pub fn is_closed(&self) -> bool {
        self.closed.load(Ordering::SeqCst)
    }

    /// Blocks the calling vCPU while the gate is closed; whether it was.
    pub fn pass(&self) -> bool {
        if !self.is_closed() {
            return false;
        }
        let mut parked = self.parked.lock().unwrap_or_else(PoisonError::into_inner);
        *parked += 1;
        self.changed.notify_all();
        while self.is_closed() {
            parked = self
                .changed
                .wait(parked)
                .unwrap_or_else(PoisonError::into_inner);
        }
        *parked -= 1;
        true
    }

    /// Returns once `count` vCPUs wait before the gate; `false` if they do not within `limit`.
    pub fn wait_parked(&self, count: usize, limit: Duration) -> bool {
        let parked = self.parked.lock().unwrap_or_else(PoisonError::into_inner);
        let waits = |parked: &mut usize| *parked < count && self.is_closed();
        let (_parked, waited) = self
            .changed
            .wait_timeout_while(parked, limit, waits)
            .unwrap_or_else(PoisonError::into_inner);
        !waited.timed_out()
    }
}

thread_local! {
    static OWN_RUN: Cell<*mut kvm_run> = const { Cell::new(null_mut()) };
}

/// The kick's signal.
pub fn kick_signal() -> libc::c_int {
    libc::SIGRTMIN()
}

extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let run = OWN_RUN.get();
    if !run.is_null() {
        // SAFETY: only a vCPU's thread has its pointer set, to the mapping of its own `VcpuFd`, which outlives the
        // thread's loop (see `VcpuKick`). The write is volatile: the kernel and this thread alone look at it.
        unsafe { (&raw mut (*run).immediate_exit).write_volatile(1) };
    }
}

/// Installs the handler; once, before vCPU threads start.
pub fn install_handler() -> Result<(), vmm_sys_util::errno::Error> {
    vmm_sys_util::signal::register_signal_handler(kick_signal(), on_kick)
}

/// Makes kicks reach a vCPU while it is alive. Belongs to the vCPU's thread.
pub struct VcpuKick(());

impl VcpuKick {
    /// `fd` must be dropped after the result, by the same thread: both are locals of the vCPU loop.
    pub fn new(fd: &mut VcpuFd) -> Self {
        OWN_RUN.set(&raw mut *fd.get_kvm_run());
        Self(())
    }
}

impl Drop for VcpuKick {
    fn drop(&mut self) {
        OWN_RUN.set(null_mut());
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn a_closed_gate_holds_everyone_until_it_opens() {
        let gate = Arc::new(Gate::default());
        gate.close();
        let threads: Vec<_> = (0..3)
            .map(|_| {
                let gate = gate.clone();
                std::thread::spawn(move || gate.pass())
            })
            .collect();
        assert!(gate.wait_parked(3, Duration::from_secs(10)));
        // A vCPU that does not come holds nobody up.
        assert!(!gate.wait_parked(4, Duration::from_millis(10)));
        assert!(threads.iter().all(|thread| !thread.is_finished()));
        gate.open();
        for thread in threads {
            assert!(thread.join().unwrap());
        }
        assert!(!gate.pass());
    }
}
