//! Machines whose kernel is `tests/hostile/guest`: it drives the devices itself, without a driver's manners, and ends
//! with a line that counts what it did. Beside the suite's engine they run on `/dev/kvm` wherever there is one: they are
//! small enough for a KVM without hardware.

use std::{fs, path::Path};

use bulkhead_harness::{
    Context, Engine, Image, Outcome, Suite, Test, ensure, runner::MACHINES, skip, test,
};

use crate::{
    attack::{End, attack, beside},
    machines,
};

const BUSYBOX: &[Image] = &[Image::Busybox];
const EMULATED: &[Engine] = &[Engine::Emulated];
/// The program's last byte of this says which attacks it makes.
const MARK: &[u8] = b"hostile machine0";

/// The cases.
pub const TESTS: &[Test] = &[
    test!(machines::registers, BUSYBOX, MACHINES),
    test!(machines::rings, BUSYBOX, MACHINES),
    test!(machines::sockets, BUSYBOX, MACHINES),
    test!(machines::files, BUSYBOX, MACHINES),
    test!(
        machines::rings_that_the_emulator_hands_on,
        BUSYBOX,
        EMULATED
    ),
    test!(machines::registers_on_kvm, BUSYBOX, EMULATED),
    test!(machines::rings_on_kvm, BUSYBOX, EMULATED),
    test!(machines::sockets_on_kvm, BUSYBOX, EMULATED),
    test!(machines::files_on_kvm, BUSYBOX, EMULATED),
];

fn registers(suite: &Suite) -> Outcome {
    machine(suite, b'1', "")
}

fn rings(suite: &Suite) -> Outcome {
    machine(suite, b'2', "")
}

fn sockets(suite: &Suite) -> Outcome {
    machine(suite, b'3', "")
}

fn files(suite: &Suite) -> Outcome {
    machine(suite, b'4', "")
}

/// The emulator does not look at what it is told of rings: the device does, and the machine ends with that reason.
fn rings_that_the_emulator_hands_on(suite: &Suite) -> Outcome {
    let end = End::Fails(20, &["device cannot go on: "]);
    run(suite, b'5', "", end).map(drop)
}

fn registers_on_kvm(suite: &Suite) -> Outcome {
    on_kvm(suite, b'1')
}

fn rings_on_kvm(suite: &Suite) -> Outcome {
    on_kvm(suite, b'2')
}

fn sockets_on_kvm(suite: &Suite) -> Outcome {
    on_kvm(suite, b'3')
}

fn files_on_kvm(suite: &Suite) -> Outcome {
    on_kvm(suite, b'4')
}

fn on_kvm(suite: &Suite, set: u8) -> Outcome {
    if !Path::new("/dev/kvm").exists() {
        return skip("no /dev/kvm");
    }
    machine(suite, set, "engine = \"kvm\"\n")
}

/// Runs the kernel; what was logged.
fn run(suite: &Suite, set: u8, lines: &str, end: End) -> Outcome<String> {
    let mut kernel = fs::read(beside("hostile-machine")?).context("the kernel")?;
    let at = kernel.windows(MARK.len()).position(|bytes| bytes == MARK);
    let at = at.context("the kernel's mark")? + MARK.len() - 1;
    *kernel.get_mut(at).context("the kernel's mark")? = set;
    let path = suite.folder("machines")?.join("vmlinux");
    fs::write(&path, kernel).context("the kernel with its attacks")?;
    let lines = format!("{lines}kernel = {path:?}");
    let said = attack(suite, &lines, end, |_| Ok(()));
    fs::remove_file(&path).context("the kernel with its attacks")?;
    said
}

fn machine(suite: &Suite, set: u8, lines: &str) -> Outcome {
    // A machine that is slow to attack the shim's port is given up before it is done.
    const GIVEN_UP: &str = "the guest says other things than `ready`";
    let said = run(
        suite,
        set,
        lines,
        End::Fails(60, &["guest-panic", GIVEN_UP]),
    )?;
    if said.contains(GIVEN_UP) {
        return Ok(());
    }
    let line = said.lines().find(|line| line.contains(" attacks, "));
    let line = line.context(format_args!("no count of attacks: {said}"))?;
    let (_, line) = line.split_once("not syncing: ").unwrap_or(("", line));
    let line = line.split("; console").next().unwrap_or(line);
    println!("         {line}");
    ensure!(
        line.ends_with(" attacks, 0 unanswered, 0 breaches") && !line.contains(" 0 attacks"),
        "the machine found something: {said}"
    );
    Ok(())
}
