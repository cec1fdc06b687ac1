//! Engine `kvm`: our own machine on `/dev/kvm`.
//!
//! [`KvmEngine::build`] reads top-down: host, VM, memory, devices, guest images, vCPUs. The interrupt controllers and the
//! timer are in the kernel; ports and MMIO come to the vCPU loop ([`vcpu`]); virtio kicks and interrupts pass
//! by eventfds without it.

pub mod exits;
mod gate;
mod host;
mod memory;
mod vcpu;

#[cfg(test)]
mod tests;

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use kvm_bindings::{
    CpuId, KVM_CAP_PMU_CAPABILITY, KVM_MAX_CPUID_ENTRIES, KVM_PIT_SPEAKER_DUMMY,
    KVM_PMU_CAP_DISABLE, kvm_enable_cap, kvm_pit_config,
};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryError, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use self::exits::ExitCounts;
use self::gate::Gate;
use self::memory::{GuestMemory, MemoryError};
use self::vcpu::Shared;
use crate::arch::x86_64::cmdline::MmioSlot;
use crate::arch::x86_64::{boot_params, cmdline, cpuid, images, layout, mp_table, registers};
use crate::bus::{Bus, BusError};
use crate::config::MachineConfig;
use crate::i8042::I8042;
use crate::limits;
use crate::machine::end::EndSender;
use crate::serial::{ConsoleRing, SerialPort};
use crate::virtio::transport::mmio::MmioTransport;
use crate::virtio::{GrowingMemory, SharedMemory, VirtioDevice};

/// Why the engine could not start.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// The host's KVM cannot be used.
    #[error(transparent)]
    Host(#[from] host::HostError),
    /// KVM refused a step.
    #[error("KVM cannot {step}")]
    Kvm {
        /// What was tried.
        step: &'static str,
        /// KVM's answer.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// The host allows fewer vCPUs.
    #[error("vcpus is {asked}: this host's KVM allows {allowed}")]
    Vcpus {
        /// Configured.
        asked: u8,
        /// What KVM says.
        allowed: usize,
    },
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// A boot structure could not be written.
    #[error("cannot write {what} into guest memory")]
    Write {
        /// Which structure.
        what: &'static str,
        /// Why.
        #[source]
        source: GuestMemoryError,
    },
    /// Kernel or initramfs.
    #[error(transparent)]
    Image(#[from] images::ImageError),
    /// First state of a vCPU.
    #[error(transparent)]
    Registers(#[from] registers::RegisterError),
    /// The CPUID list is too long.
    #[error("cannot make the CPUID list of vCPU {0}")]
    Cpuid(u8),
    /// Two devices at one place.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// No interrupt line is left.
    #[error("too many devices: there are {} interrupt lines", layout::VIRTIO_IRQS.count())]
    TooManyDevices,
    /// A descriptor or thread could not be made.
    #[error("cannot make {what}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
}

/// A vCPU waits for a device, which the guest can bring about.
#[derive(Debug, thiserror::Error)]
#[error("a vCPU does not stop: it waits for a device")]
pub struct NotStopping;

fn kvm_error(step: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> KvmError {
    move |source| KvmError::Kvm { step, source }
}

/// A machine before its start.
pub struct Built {
    engine: KvmEngine,
    vcpus: Vec<VcpuFd>,
}

impl Built {
    /// Starts the vCPUs.
    pub fn start(self) -> Result<KvmEngine, KvmError> {
        for (id, fd) in (0u8..).zip(self.vcpus) {
            self.engine.run(id, fd)?;
        }
        Ok(self.engine)
    }
}

/// A machine whose vCPUs run.
pub struct KvmEngine {
    shared: Arc<Shared>,
    maker: VcpuMaker,
    /// One for each vCPU that was granted. The guest's kernel finds more in its tables, but they do not exist: what it
    /// sends to them goes nowhere.
    threads: Mutex<Vec<JoinHandle<()>>>,
    memory: Mutex<GuestMemory>,
    // Closed after the vCPUs' descriptors: they are fields of threads that end with the process.
    vm: VmFd,
}

impl KvmEngine {
    /// Builds the machine; its vCPUs do not run yet, and there is no thread.
    pub fn build(
        config: &MachineConfig,
        devices: Vec<Box<dyn VirtioDevice>>,
        console: Arc<ConsoleRing>,
        exits: Arc<ExitCounts>,
        end: EndSender,
    ) -> Result<Built, KvmError> {
        let kvm = host::open()?;
        let vm = create_vm(&kvm, config)?;
        let memory = GuestMemory::new(&vm, config)?;
        let (mmio, slots) = attach_virtio(&vm, devices, memory.shared())?;
        let ports = attach_ports(&vm, &console, &end)?;
        let entry = load_guest(&memory.shared().memory(), config, &slots)?;
        let maker = VcpuMaker::new(&kvm, config.vcpus_max(), entry)?;
        let vcpus = (0..config.vcpus)
            .map(|id| maker.make(&vm, id))
            .collect::<Result<Vec<_>, _>>()?;
        let shared = Arc::new(Shared {
            ports,
            mmio,
            exits,
            gate: Gate::default(),
            end,
            console,
        });
        gate::install_handler().map_err(|error| KvmError::Io {
            what: "the vCPUs' signal handler",
            source: error.into(),
        })?;
        let engine = Self {
            shared,
            maker,
            threads: Mutex::default(),
            memory: Mutex::new(memory),
            vm,
        };
        Ok(Built { engine, vcpus })
    }

    fn run(&self, id: u8, fd: VcpuFd) -> Result<(), KvmError> {
        let thread = vcpu::spawn(id, fd, self.shared.clone()).map_err(|source| KvmError::Io {
            what: "a vCPU thread",
            source,
        })?;
        lock(&self.threads).push(thread);
        Ok(())
    }

    /// Makes vCPUs until there are `count`, for the guest to start. On an error some may have been made.
    pub fn grow_vcpus(&self, count: u8) -> Result<(), KvmError> {
        for id in self.vcpus()..count {
            self.run(id, self.maker.make(&self.vm, id)?)?;
        }
        Ok(())
    }

    /// How many vCPUs there are.
    pub fn vcpus(&self) -> u8 {
        u8::try_from(lock(&self.threads).len()).unwrap_or(u8::MAX)
    }

    /// Makes what was added after the start `added` bytes: whole blocks, within the reserve.
    pub fn grow_memory(&self, added: u64) -> Result<(), KvmError> {
        Ok(lock(&self.memory).grow(&self.vm, added)?)
    }

    /// The map of the memory that there is now.
    pub fn memory(&self) -> SharedMemory {
        lock(&self.memory).map()
    }

    /// Stops all vCPUs; returns when none is in the guest. If one does not stop in time, all go on.
    pub fn pause(&self) -> Result<(), NotStopping> {
        self.shared.gate.close();
        let threads = lock(&self.threads);
        threads.iter().for_each(vcpu::kick);
        let count = threads.len();
        if self.shared.gate.wait_parked(count, limits::PAUSE_TIMEOUT) {
            return Ok(());
        }
        self.shared.gate.open();
        Err(NotStopping)
    }

    /// Lets all vCPUs go on.
    pub fn resume(&self) {
        self.shared.gate.open();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn create_vm(kvm: &Kvm, config: &MachineConfig) -> Result<VmFd, KvmError> {
    let allowed = kvm.get_max_vcpus();
    if usize::from(config.vcpus_max()) > allowed {
        return Err(KvmError::Vcpus {
            asked: config.vcpus_max(),
            allowed,
        });
    }
    // A signal that reaches us meanwhile makes KVM give up with EINTR.
    let vm = loop {
        match kvm.create_vm() {
            Err(error) if error.errno() == libc::EINTR => {}
            other => break other.map_err(kvm_error("create a VM"))?,
        }
    };
    vm.set_identity_map_address(layout::KVM_IDENTITY_MAP)
        .map_err(kvm_error("place its identity map"))?;
    vm.set_tss_address(layout::KVM_TSS as usize)
        .map_err(kvm_error("place its task segment"))?;
    vm.create_irq_chip()
        .map_err(kvm_error("create the interrupt controllers"))?;
    vm.create_pit2(kvm_pit_config {
        // Port 0x61 is answered in the kernel as well.
        flags: KVM_PIT_SPEAKER_DUMMY,
        ..Default::default()
    })
    .map_err(kvm_error("create the timer"))?;
    if pmu_can_be_disabled(kvm) {
        // Before there is a vCPU. CPUID names no counters, but AMD's first four need no CPUID.
        let mut cap = kvm_enable_cap {
            cap: KVM_CAP_PMU_CAPABILITY,
            ..Default::default()
        };
        cap.args[0] = KVM_PMU_CAP_DISABLE.into();
        vm.enable_cap(&cap)
            .map_err(kvm_error("take away the performance counters"))?;
    }
    Ok(vm)
}

/// Linux has that since 5.18, and not where it has no counters for guests at all.
fn pmu_can_be_disabled(kvm: &Kvm) -> bool {
    let can = kvm.check_extension_raw(KVM_CAP_PMU_CAPABILITY.into());
    u32::try_from(can).is_ok_and(|can| can & KVM_PMU_CAP_DISABLE != 0)
}

/// Puts each device on its page of MMIO with its interrupt line; kicks go by ioeventfd, interrupts by irqfd.
fn attach_virtio(
    vm: &VmFd,
    devices: Vec<Box<dyn VirtioDevice>>,
    memory: &GrowingMemory,
) -> Result<(Bus, Vec<MmioSlot>), KvmError> {
    let mut bus = Bus::default();
    let mut slots = Vec::new();
    let mut lines = layout::VIRTIO_IRQS;
    for device in devices {
        let irq = lines.next().ok_or(KvmError::TooManyDevices)?;
        let address = layout::VIRTIO_MMIO + slots.len() as u64 * layout::VIRTIO_MMIO_SIZE;
        let transport =
            MmioTransport::new(device, memory.clone()).map_err(|source| KvmError::Io {
                what: "a device's events",
                source,
            })?;
        vm.register_irqfd(transport.irq(), irq)
            .map_err(kvm_error("wire a device's interrupt"))?;
        let notify = IoEventAddress::Mmio(address + MmioTransport::QUEUE_NOTIFY);
        for (queue, kick) in (0u32..).zip(transport.kicks()) {
            vm.register_ioevent(kick, &notify, queue)
                .map_err(kvm_error("wire a device's queue"))?;
        }
        bus.insert(
            address,
            layout::VIRTIO_MMIO_SIZE,
            Arc::new(Mutex::new(transport)),
        )?;
        slots.push(MmioSlot { address, irq });
    }
    Ok((bus, slots))
}

fn attach_ports(vm: &VmFd, console: &Arc<ConsoleRing>, end: &EndSender) -> Result<Bus, KvmError> {
    let irq = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(|source| KvmError::Io {
        what: "the serial port's event",
        source,
    })?;
    vm.register_irqfd(&irq, layout::SERIAL_IRQ)
        .map_err(kvm_error("wire the serial port's interrupt"))?;
    let serial = SerialPort::new(irq, console.clone());
    let i8042 = I8042::new(console.clone(), end.clone());
    let mut bus = Bus::default();
    bus.insert(layout::SERIAL_PORT, 8, Arc::new(Mutex::new(serial)))?;
    bus.insert(layout::I8042_PORT, 5, Arc::new(Mutex::new(i8042)))?;
    Ok(bus)
}

/// Kernel, initramfs and what the boot protocol wants beside them. The answer is the first instruction.
fn load_guest(
    memory: &GuestMemoryMmap,
    config: &MachineConfig,
    slots: &[MmioSlot],
) -> Result<GuestAddress, KvmError> {
    let kernel = images::load_kernel(memory, &config.kernel)?;
    let initramfs = images::load_initramfs(memory, &kernel, &config.initramfs)?;
    let most = config.vcpus_max();
    let line = cmdline::build(config.vcpus, most, slots, config.debug_shell);
    let params = boot_params::build(config.memory_bytes(), Some(initramfs), line.len());
    let write = |what, bytes: &[u8], address| {
        memory
            .write_slice(bytes, GuestAddress(address))
            .map_err(|source| KvmError::Write { what, source })
    };
    // Memory is zero, so the line has its end mark.
    write("the command line", line.as_bytes(), layout::CMDLINE)?;
    write("the boot parameters", &params, layout::BOOT_PARAMS)?;
    let table = mp_table::build(config.vcpus_max());
    write("the MP table", &table, layout::MP_TABLE)?;
    registers::write_boot_tables(memory)?;
    Ok(kernel.entry)
}

/// What a vCPU is made from, at the start and later.
struct VcpuMaker {
    supported: CpuId,
    tsc_deadline: bool,
    /// Those that may come later included: the topology does not change.
    count: u8,
    entry: GuestAddress,
}

impl VcpuMaker {
    fn new(kvm: &Kvm, count: u8, entry: GuestAddress) -> Result<Self, KvmError> {
        Ok(Self {
            supported: kvm
                .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
                .map_err(kvm_error("tell the CPUID that it supports"))?,
            tsc_deadline: kvm.check_extension(Cap::TscDeadlineTimer),
            count,
            entry,
        })
    }

    fn make(&self, vm: &VmFd, id: u8) -> Result<VcpuFd, KvmError> {
        let fd = vm
            .create_vcpu(u64::from(id))
            .map_err(kvm_error("create a vCPU"))?;
        let list = cpuid::for_vcpu(&self.supported, id, self.count, self.tsc_deadline)
            .map_err(|_| KvmError::Cpuid(id))?;
        registers::set_up(&fd, id, &list, self.entry)?;
        Ok(fd)
    }
}
