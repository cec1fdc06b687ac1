//! Memory of an idle pod by process (PSS: a page that several map counts in parts), the guest's apart.

use bulkhead_harness::{
    Image, Suite,
    failure::{Outcome, read},
    process::Process,
};

use crate::{
    Plan,
    figure::Figure,
    subject::{RUNC, Subject},
};

/// A map at least as large as this is the guest's memory.
const GUEST_KIB: u64 = 256 << 10;
const GUEST: &str = "guest memory";
const KEEPER: &str = "bulkhead-keeper";

/// `memory::idle_pod`: a row a process, and one for the whole pod.
pub fn figures(suite: &Suite, plan: &Plan) -> Outcome<Vec<Figure>> {
    let mut found = Vec::new();
    for (id, image, what) in [
        ("memory::idle_pod", Image::Busybox, "busybox"),
        (
            "memory::idle_python",
            Image::Python,
            "a Debian image with python3",
        ),
    ] {
        if !plan.wants(id) {
            continue;
        }
        suite.import(image)?;
        let title = format!("PSS of an idle pod of {what} by process");
        let mut figure = Figure::new(id, title, "MiB");
        for subject in [RUNC, Subject::bulkhead(suite.engine)] {
            eprintln!("{id}: {}", subject.name);
            match pod(suite, subject, image) {
                Ok(parts) => {
                    let sum = parts.iter().map(|(_, mib)| mib).sum();
                    figure.add(subject.name, vec![sum]);
                    for (name, mib) in parts {
                        figure.add_part(format!("{}: {name}", subject.name), vec![mib]);
                    }
                }
                Err(error) => figure.missing.push(format!("{}: {error}", subject.name)),
            }
        }
        found.push(figure);
    }
    Ok(found)
}

fn pod(suite: &Suite, subject: Subject, image: Image) -> Outcome<Vec<(String, f64)>> {
    let program: &[&str] = match image {
        Image::Python => &[
            "python3",
            "-c",
            "import time; print(flush=True); time.sleep(1000)",
        ],
        _ => &["sleep", "1000"],
    };
    let pod = subject.run(suite, image).args(program).detach()?;
    std::thread::sleep(suite.scale.seconds(2));
    let mut parts: Vec<(String, f64)> = Vec::new();
    let mut guest = 0;
    let mut processes: Vec<(u32, String)> = Vec::new();
    // The keeper is the shim's program under a name of its own.
    let named = |p: Process| match p.command() {
        name if name == KEEPER => (p.pid, name),
        _ => (p.pid, p.name),
    };
    processes.extend(pod.processes().into_iter().map(named));
    // With runc the program itself; with Bulkhead the VMM, which is there already.
    if let Some((pid, _)) = pod.status()?
        && !processes.iter().any(|(known, _)| *known == pid)
    {
        processes.push((pid, "the program".into()));
    }
    for (pid, name) in processes {
        let (own, machine) = pss(&read(format!("/proc/{pid}/smaps"))?);
        guest += machine;
        parts.push((name, mib(own)));
    }
    if guest > 0 {
        parts.push((GUEST.into(), mib(guest)));
    }
    pod.end()?;
    Ok(parts)
}

/// KiB of the process's own maps, and of the guest's memory.
fn pss(smaps: &str) -> (u64, u64) {
    let (mut own, mut guest, mut size) = (0, 0, 0);
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let (key, value) = (
            words.next(),
            words.next().and_then(|w| w.parse::<u64>().ok()),
        );
        match (key, value) {
            (Some("Size:"), Some(kib)) => size = kib,
            (Some("Pss:"), Some(kib)) if size >= GUEST_KIB => guest += kib,
            (Some("Pss:"), Some(kib)) => own += kib,
            _ => {}
        }
    }
    (own, guest)
}

fn mib(kib: u64) -> f64 {
    kib as f64 / 1024.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guests_memory_is_the_large_map() {
        let smaps =
            "a-b rw-p\nSize: 524288 kB\nRss: 9 kB\nPss: 2048 kB\nc-d r-xp\nSize: 8 kB\nPss: 4 kB\n";
        assert_eq!(pss(smaps), (4, 2048));
    }
}
