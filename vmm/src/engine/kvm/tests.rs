//! Tiny guests on the real `/dev/kvm`: a few instructions each, loaded as an ELF kernel. They run on a KVM
//! without hardware as well. Skipped, with a word, where there is no `/dev/kvm`.

use std::path::Path;
use std::sync::mpsc::Receiver;
use std::time::Duration;

use tempfile::TempDir;

use super::*;
use crate::machine::end::{End, EndReason, end_channel};
use crate::virtio::{ActivateError, Activation};

const ENTRY: u64 = 0x10_0000;

struct Guest {
    engine: KvmEngine,
    console: Arc<ConsoleRing>,
    exits: Arc<ExitCounts>,
    ended: Receiver<End>,
    _dir: TempDir,
}

impl Guest {
    fn end(&self) -> End {
        self.ended.recv_timeout(Duration::from_secs(20)).unwrap()
    }
}

/// An ELF file whose one segment is `code` at [`ENTRY`].
fn elf(code: &[u8]) -> Vec<u8> {
    let mut file = vec![0; 64 + 56];
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"\x7fELF\x02\x01\x01");
    put(16, &[2, 0, 62, 0, 1]);
    put(24, &ENTRY.to_le_bytes());
    put(32, &[64]);
    put(52, &[64, 0, 56, 0, 1]);
    put(64, &[1, 0, 0, 0, 7]);
    put(72, &120u64.to_le_bytes());
    put(80, &ENTRY.to_le_bytes());
    put(88, &ENTRY.to_le_bytes());
    put(96, &(code.len() as u64).to_le_bytes());
    put(104, &(code.len() as u64).to_le_bytes());
    file.extend_from_slice(code);
    file
}

fn config(dir: &Path, vcpus: u8, memory_mib: u32) -> MachineConfig {
    let (kernel, initramfs) = (dir.join("kernel"), dir.join("initramfs"));
    std::fs::write(&initramfs, [0; 512]).unwrap();
    let json = serde_json::json!({"engine": "kvm", "kernel": kernel, "initramfs": initramfs,
        "vcpus": vcpus, "vcpus_max": 32, "memory_mib": memory_mib, "memory_max_mib": memory_mib + 512});
    std::fs::write(dir.join("machine.json"), json.to_string()).unwrap();
    MachineConfig::load(dir).unwrap()
}

fn start(code: &[u8], vcpus: u8, devices: Vec<Box<dyn VirtioDevice>>) -> Option<Guest> {
    if !Path::new(host::DEVICE).exists() {
        eprintln!("skipped: no {}", host::DEVICE);
        return None;
    }
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("kernel"), elf(code)).unwrap();
    let config = config(dir.path(), vcpus, 96);
    let (console, exits) = (ConsoleRing::new(), Arc::new(ExitCounts::default()));
    let (sender, ended) = end_channel();
    let built = KvmEngine::build(&config, devices, console.clone(), exits.clone(), sender).unwrap();
    let engine = built.start().unwrap();
    Some(Guest {
        engine,
        console,
        exits,
        ended,
        _dir: dir,
    })
}

/// `mov edx, port; mov al, value; out dx, al`
fn out(port: u16, value: u8) -> Vec<u8> {
    let [low, high] = port.to_le_bytes();
    vec![0xba, low, high, 0, 0, 0xb0, value, 0xee]
}

fn reset() -> Vec<u8> {
    [out(0x64, 0xfe), vec![0xeb, 0xfe]].concat()
}

fn print(text: &str) -> Vec<u8> {
    text.bytes().flat_map(|byte| out(0x3f8, byte)).collect()
}

#[test]
fn a_guest_prints_and_resets() {
    let Some(guest) = start(&[print("hello\n"), reset()].concat(), 1, vec![]) else {
        return;
    };
    assert_eq!(guest.end().reason, EndReason::GuestShutdown);
    assert_eq!(guest.console.tail(100), "hello\n");
    assert_eq!(guest.exits.by_name()["port_write"], 7);
}

#[test]
fn a_reset_after_the_panic_line_is_a_panic() {
    let text = "Kernel panic - not syncing: test\n";
    let Some(guest) = start(&[print(text), reset()].concat(), 1, vec![]) else {
        return;
    };
    let end = guest.end();
    assert_eq!(end.reason, EndReason::GuestPanic);
    assert_eq!(end.detail, text.trim_end());
}

#[test]
fn a_triple_fault_is_told_as_such() {
    // ud2, with an empty interrupt table
    let Some(guest) = start(&[0x0f, 0x0b], 1, vec![]) else {
        return;
    };
    assert_eq!(guest.end().reason, EndReason::GuestTripleFault);
}

#[test]
fn unclaimed_ports_and_addresses_read_as_ones_at_every_width() {
    let mut code = vec![0xba, 0x34, 0x12, 0, 0]; // mov edx, 0x1234
    let check = |code: &mut Vec<u8>, compare: &[u8]| {
        code.extend_from_slice(compare);
        // je over a ud2
        code.extend_from_slice(&[0x74, 2, 0x0f, 0x0b]);
    };
    code.push(0xec); // in al, dx
    check(&mut code, &[0x3c, 0xff]);
    code.extend_from_slice(&[0x66, 0xed]); // in ax, dx
    check(&mut code, &[0x66, 0x83, 0xf8, 0xff]);
    code.push(0xed); // in eax, dx
    check(&mut code, &[0x83, 0xf8, 0xff]);
    code.extend_from_slice(&[0xee, 0x66, 0xef, 0xef]); // out dx, al, ax, eax
    // MMIO: beyond the 96 MiB of memory, within the mapped first GiB
    code.extend_from_slice(&[0xbb, 0, 0, 0, 0x30]); // mov ebx, 0x3000_0000
    code.extend_from_slice(&[0x8a, 0x03]); // mov al, [rbx]
    check(&mut code, &[0x3c, 0xff]);
    code.extend_from_slice(&[0x66, 0x8b, 0x03]); // mov ax, [rbx]
    check(&mut code, &[0x66, 0x83, 0xf8, 0xff]);
    code.extend_from_slice(&[0x8b, 0x43, 0x01]); // mov eax, [rbx + 1]
    check(&mut code, &[0x83, 0xf8, 0xff]);
    code.extend_from_slice(&[0x48, 0x8b, 0x03]); // mov rax, [rbx]
    check(&mut code, &[0x48, 0x83, 0xf8, 0xff]);
    code.extend_from_slice(&[0x88, 0x03, 0x66, 0x89, 0x03, 0x89, 0x03, 0x48, 0x89, 0x03]);
    code.extend(reset());
    let Some(guest) = start(&code, 1, vec![]) else {
        return;
    };
    assert_eq!(guest.end().reason, EndReason::GuestShutdown);
    let exits = guest.exits.by_name();
    assert_eq!((exits["port_read"], exits["mmio_read"]), (3, 4));
}

#[test]
fn a_guest_has_no_performance_counters() {
    // mov ecx, 0; rdpmc: no interrupt table takes the exception that it is to be.
    let mut code = vec![0xb9, 0, 0, 0, 0, 0x0f, 0x33];
    code.extend(reset());
    let Some(guest) = start(&code, 1, vec![]) else {
        return;
    };
    let counters = std::fs::read_to_string("/sys/module/kvm/parameters/enable_pmu");
    let has_counters = counters.is_ok_and(|has| has.trim() == "Y");
    if has_counters && !pmu_can_be_disabled(&host::open().unwrap()) {
        return eprintln!("skipped: this KVM cannot take them away");
    }
    assert_eq!(guest.end().reason, EndReason::GuestTripleFault);
}

#[test]
fn the_guest_finds_its_boot_parameters() {
    // cmp dword [rsi + 0x202], "HdrS"; je +2; ud2
    let mut code = vec![0x81, 0xbe, 0x02, 0x02, 0, 0];
    code.extend_from_slice(b"HdrS");
    code.extend_from_slice(&[0x74, 2, 0x0f, 0x0b]);
    // mov ebx, [rsi + 0x228]; cmp dword [rbx], "cons"; je +2; ud2
    code.extend_from_slice(&[0x8b, 0x9e, 0x28, 0x02, 0, 0, 0x81, 0x3b]);
    code.extend_from_slice(b"cons");
    code.extend_from_slice(&[0x74, 2, 0x0f, 0x0b]);
    code.extend(reset());
    let Some(guest) = start(&code, 1, vec![]) else {
        return;
    };
    assert_eq!(guest.end().reason, EndReason::GuestShutdown);
}

#[test]
fn a_machine_with_the_most_vcpus_starts_and_ends() {
    let Some(guest) = start(&reset(), 32, vec![]) else {
        return;
    };
    assert_eq!(guest.end().reason, EndReason::GuestShutdown);
}

#[test]
fn a_paused_machine_stands_still_until_it_is_resumed() {
    // Counts without end: out 0x80, al; jmp
    let Some(guest) = start(&[0xe6, 0x80, 0xeb, 0xfc], 2, vec![]) else {
        return;
    };
    let total = || guest.exits.by_name()["port_write"];
    guest.engine.pause().unwrap();
    let before = total();
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(total(), before);
    guest.engine.resume();
    let deadline = std::time::Instant::now() + Duration::from_secs(10);
    while total() <= before + 1 {
        assert!(std::time::Instant::now() < deadline);
        std::thread::yield_now();
    }
    guest.engine.pause().unwrap();
}

struct Idle;

impl VirtioDevice for Idle {
    fn device_type(&self) -> u32 {
        4
    }
    fn name(&self) -> &'static str {
        "idle"
    }
    fn queue_sizes(&self) -> &[u16] {
        &[16]
    }
    fn activate(&mut self, _: Activation) -> Result<(), ActivateError> {
        Ok(())
    }
    fn reset(&mut self) {}
}

#[test]
fn a_guest_reads_the_registers_of_a_virtio_device() {
    // The boot tables map the first GiB and the device lies above: one more table at 0x5000.
    let mut code = vec![0xbb, 0x18, 0x30, 0, 0]; // mov ebx, 0x3018
    code.extend_from_slice(&[0xc7, 0x03, 0x03, 0x50, 0, 0]); // mov dword [rbx], 0x5003
    code.extend_from_slice(&[0xbb, 0, 0x54, 0, 0]); // mov ebx, 0x5400
    code.extend_from_slice(&[0xc7, 0x03, 0x83, 0, 0, 0xd0]); // mov dword [rbx], 0xd0000083
    code.extend_from_slice(&[0xbb, 0, 0, 0, 0xd0]); // mov ebx, 0xd0000000
    code.extend_from_slice(&[0x81, 0x3b]); // cmp dword [rbx], "virt"
    code.extend_from_slice(b"virt");
    code.extend_from_slice(&[0x74, 2, 0x0f, 0x0b]);
    // Writes to the status, and a kick that goes by the ioeventfd: mov dword [rbx + 0x70], 1; [rbx + 0x50], 0
    code.extend_from_slice(&[0xc7, 0x43, 0x70, 1, 0, 0, 0]);
    code.extend_from_slice(&[0xc7, 0x43, 0x50, 0, 0, 0, 0]);
    // cmp dword [rbx + 0x70], 1
    code.extend_from_slice(&[0x83, 0x7b, 0x70, 1, 0x74, 2, 0x0f, 0x0b]);
    code.extend(reset());
    let Some(guest) = start(&code, 1, vec![Box::new(Idle)]) else {
        return;
    };
    assert_eq!(guest.end().reason, EndReason::GuestShutdown);
    let exits = guest.exits.by_name();
    assert_eq!((exits["mmio_read"], exits["mmio_write"]), (2, 1));
}

/// Waits until `holds`, for some seconds.
fn eventually(holds: impl Fn() -> bool) {
    let deadline = std::time::Instant::now() + Duration::from_secs(20);
    while !holds() {
        assert!(std::time::Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Maps the GiB of devices below 4 GiB with its last table at 0x5000, and only the 2 MiB that `page` lies in.
fn map_devices(page: u32) -> Vec<u8> {
    let mut code = vec![0xbb, 0x18, 0x30, 0, 0]; // mov ebx, 0x3018
    code.extend_from_slice(&[0xc7, 0x03, 0x03, 0x50, 0, 0]); // mov dword [rbx], 0x5003
    code.push(0xbb); // mov ebx, the entry
    code.extend_from_slice(&(0x5000 + (page - 0xc000_0000) / (2 << 20) * 8).to_le_bytes());
    code.extend_from_slice(&[0xc7, 0x03]); // mov dword [rbx], the page, its size and rights, uncached
    code.extend_from_slice(&(page & !0x1f_ffff | 0x93).to_le_bytes());
    code
}

#[test]
fn a_guest_cannot_start_a_vcpu_before_it_is_granted() {
    let mut code = map_devices(layout::LOCAL_APIC);
    // The other vCPU's program at 0x20000, in real mode: mov al, 'A'; mov dx, 0x3f8; out dx, al; hlt; jmp
    code.extend_from_slice(&[0xbb, 0, 0, 2, 0]); // mov ebx, 0x20000
    code.extend_from_slice(&[0xc7, 0x03, 0xb0, 0x41, 0xba, 0xf8]);
    code.extend_from_slice(&[0xc7, 0x43, 4, 0x03, 0xee, 0xf4, 0xeb]);
    code.extend_from_slice(&[0xc6, 0x43, 8, 0xfd]);
    code.extend_from_slice(&[0xbb, 0, 0, 0xe0, 0xfe]); // mov ebx, the local APIC
    // Without end: to APIC id 1 INIT, then SIPI with 0x20; out 0x80, al
    let again = code.len();
    code.extend_from_slice(&[0xc7, 0x83, 0x10, 3, 0, 0, 0, 0, 0, 1]);
    code.extend_from_slice(&[0xc7, 0x83, 0, 3, 0, 0, 0, 0x45, 0, 0]);
    code.extend_from_slice(&[0xc7, 0x83, 0x10, 3, 0, 0, 0, 0, 0, 1]);
    code.extend_from_slice(&[0xc7, 0x83, 0, 3, 0, 0, 0x20, 0x46, 0, 0]);
    code.extend_from_slice(&[0xe6, 0x80]);
    let back = again as i8 as isize - (code.len() as isize + 2);
    code.extend_from_slice(&[0xeb, back as i8 as u8]);
    let Some(guest) = start(&code, 1, vec![]) else {
        return;
    };
    // It has asked several times.
    eventually(|| guest.exits.by_name()["port_write"] > 3);
    assert_eq!(guest.console.tail(100), "");
    assert_eq!(guest.engine.vcpus(), 1);
    // Also while the machine is paused; then the new vCPU stands still as well.
    guest.engine.pause().unwrap();
    guest.engine.grow_vcpus(2).unwrap();
    assert_eq!(guest.engine.vcpus(), 2);
    guest.engine.grow_vcpus(2).unwrap();
    guest.engine.pause().unwrap();
    assert_eq!(guest.console.tail(100), "");
    guest.engine.resume();
    eventually(|| guest.console.tail(100).starts_with('A'));
    guest.engine.pause().unwrap();
}

#[test]
fn memory_is_the_guests_once_it_is_granted() {
    // Looks at the first block after its 96 MiB until that is no longer all ones.
    let mut code = vec![0xbb, 0, 0, 0, 8]; // mov ebx, 128 MiB
    code.extend_from_slice(&[0x8b, 0x03, 0x83, 0xf8, 0xff, 0x74, 0xf9]); // mov eax, [rbx]; cmp eax, -1; je back
    // Writes to the end of the block and reads it back.
    code.extend_from_slice(&[0xbb, 0xfc, 0xff, 0xff, 0x0f]); // mov ebx, 256 MiB - 4
    code.extend_from_slice(&[0xc7, 0x03]); // mov dword [rbx], "more"
    code.extend_from_slice(b"more");
    code.extend_from_slice(&[0x81, 0x3b]); // cmp dword [rbx], "more"
    code.extend_from_slice(b"more");
    code.extend_from_slice(&[0x74, 2, 0x0f, 0x0b]);
    code.extend(reset());
    let Some(guest) = start(&code, 1, vec![]) else {
        return;
    };
    eventually(|| guest.exits.by_name()["mmio_read"] > 2);
    let before = lock(&guest.engine.memory).shared().memory().into_inner();
    assert!(before.read_obj::<u32>(GuestAddress(128 << 20)).is_err());
    guest.engine.grow_memory(128 << 20).unwrap();
    let map = guest.engine.memory();
    assert_eq!(guest.end().reason, EndReason::GuestShutdown);
    // Devices find what the guest wrote in the new map, and nothing beyond it; the old map is as it was.
    let last = GuestAddress((256 << 20) - 4);
    assert_eq!(&map.read_obj::<u32>(last).unwrap().to_le_bytes(), b"more");
    assert!(map.read_obj::<u32>(GuestAddress(256 << 20)).is_err());
    assert!(before.read_obj::<u32>(last).is_err());
    // The next blocks, and the same again.
    guest.engine.grow_memory(512 << 20).unwrap();
    let map = guest.engine.memory();
    assert_eq!(&map.read_obj::<u32>(last).unwrap().to_le_bytes(), b"more");
    assert!(map.read_obj::<u32>(GuestAddress(639 << 20)).is_ok());
    assert!(guest.engine.grow_memory(512 << 20).is_ok());
}
