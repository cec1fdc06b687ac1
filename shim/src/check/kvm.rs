//! Whether hardware stands behind `/dev/kvm`: a loop of real-mode instructions, timed.
//!
//! Hardware runs hundreds of millions of them a second; a KVM that interprets its guests needs about a microsecond
//! each, and stops at the first instruction that it does not know, so that no kernel boots.

use std::{
    io,
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};

/// Slower than this per instruction is no hardware (hardware: below 1 ns; a CPU emulated by QEMU's TCG: some 10 ns).
pub const SLOW_NS: f64 = 100.0;
/// Where code is loaded.
const CODE: u64 = 0x1000;
/// Turns of the two loops whose difference is measured, so that entry and exit do not count.
const TURNS: (u16, u16) = (1_000, 11_000);
/// Instructions of a turn.
const PER_TURN: f64 = 2.0;
/// How often the longer loop is timed.
const ROUNDS: u32 = 5;
/// How long the loops may take.
const LIMIT: Duration = Duration::from_secs(5);

/// What is wrong with KVM.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The device cannot be opened.
    #[error("opening /dev/kvm: {0}")]
    Open(#[source] io::Error),
    /// A call fails.
    #[error("/dev/kvm: {what}: {source}")]
    Call {
        /// Which one.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The guest ended otherwise than by HLT.
    #[error(
        "/dev/kvm is without hardware virtualization: a loop of real-mode instructions ended with {0}"
    )]
    Exit(String),
    /// It runs and runs.
    #[error("/dev/kvm is without hardware virtualization: a loop of {0} instructions does not end")]
    Hangs(u32),
}

/// A page of guest memory.
#[repr(C, align(4096))]
struct Page([u8; 4096]);

/// Nanoseconds that a guest instruction takes.
pub fn instruction_ns() -> Result<f64, Error> {
    let kvm = Kvm::new().map_err(|e| Error::Open(e.into()))?;
    let (sender, receiver) = mpsc::channel();
    // A thread of its own: a KVM_RUN that never comes back must not hold the command.
    thread::spawn(move || sender.send(measure(&kvm)));
    receiver
        .recv_timeout(LIMIT)
        .map_err(|_| Error::Hangs(u32::from(TURNS.1) * 2 * ROUNDS))?
}

fn measure(kvm: &Kvm) -> Result<f64, Error> {
    let call = |what| {
        move |e: kvm_ioctls::Error| Error::Call {
            what,
            source: e.into(),
        }
    };
    let vm = kvm.create_vm().map_err(call("creating a machine"))?;
    let mut page = Box::new(Page([0; 4096]));
    // mov cx, imm16; loop: dec cx; jnz loop; hlt
    for (to, byte) in page.0.iter_mut().zip([0xb9, 0, 0, 0x49, 0x75, 0xfd, 0xf4]) {
        *to = byte;
    }
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: CODE,
        memory_size: 4096,
        userspace_addr: (&raw mut *page) as u64,
    };
    // SAFETY: the page is aligned, 4096 bytes long, and lives until after `vm` and `vcpu`, which are dropped first.
    unsafe { vm.set_user_memory_region(region) }.map_err(call("giving memory to a machine"))?;
    let mut vcpu = vm.create_vcpu(0).map_err(call("creating a vCPU"))?;
    let mut sregs = vcpu.get_sregs().map_err(call("reading registers"))?;
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    vcpu.set_sregs(&sregs).map_err(call("setting registers"))?;
    run(&mut vcpu, &mut page, 1)?; // The first entry maps memory.
    let short = run(&mut vcpu, &mut page, TURNS.0)?;
    // The best of some: other load on the host must not make it look slow.
    let mut long = Duration::MAX;
    for _ in 0..ROUNDS {
        long = long.min(run(&mut vcpu, &mut page, TURNS.1)?);
    }
    let turns = f64::from(TURNS.1) - f64::from(TURNS.0);
    let spent = long.saturating_sub(short).as_nanos() as f64;
    drop((vcpu, vm));
    drop(page);
    Ok(spent / (turns * PER_TURN))
}

fn run(vcpu: &mut VcpuFd, page: &mut Page, turns: u16) -> Result<Duration, Error> {
    let call = |e: kvm_ioctls::Error| Error::Call {
        what: "setting registers",
        source: e.into(),
    };
    if let Some(imm) = page.0.get_mut(1..3) {
        imm.copy_from_slice(&turns.to_le_bytes());
    }
    let mut regs = vcpu.get_regs().map_err(call)?;
    (regs.rip, regs.rflags) = (CODE, 2);
    vcpu.set_regs(&regs).map_err(call)?;
    let start = Instant::now();
    match vcpu.run() {
        Ok(VcpuExit::Hlt) => Ok(start.elapsed()),
        Ok(other) => Err(Error::Exit(format!("{other:?}"))),
        Err(e) => Err(Error::Call {
            what: "running a vCPU",
            source: e.into(),
        }),
    }
}
