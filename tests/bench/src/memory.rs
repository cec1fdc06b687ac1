//! Memory of idle pods by process (PSS: a page that several map counts in parts), the guest's apart.

use std::time::Duration;

use bulkhead_harness::{
    Image, Pod, Suite,
    failure::{Outcome, read},
    process::Process,
    smaps::{self, Map},
};

use crate::{
    Plan,
    figure::{Figure, Plot},
    plot::PART,
    subject::{RUNC, Subject},
};

/// A map at least as large as this is the guest's memory.
const GUEST_KIB: u64 = 256 << 10;
const GUEST: &str = "guest memory";
/// A pod counts as idle after so long.
const IDLE: Duration = Duration::from_secs(10);
const KEEPER: &str = "bulkhead-keeper";

/// `memory::*`: a row a subject and a row a process, of one pod in the middle of several.
pub fn figures(suite: &Suite, plan: &Plan) -> Outcome<Vec<Figure>> {
    let cheap = suite.scale.pods_are_cheap();
    let sizes: &[u32] = if cheap {
        &[1, 10, plan.most_pods]
    } else {
        &[1, 3]
    };
    let mut figures = vec![(
        "memory::idle_python".to_owned(),
        Image::Python,
        "a Debian image with python3",
        1,
    )];
    for &pods in sizes.iter().filter(|&&pods| pods > 0) {
        figures.push((
            format!("memory::idle_pods_{pods}"),
            Image::Busybox,
            "busybox",
            pods,
        ));
    }
    let mut found = Vec::new();
    for (id, image, what, pods) in figures {
        if !plan.wants(&id) {
            continue;
        }
        suite.import(image)?;
        let title = match pods {
            1 => format!("PSS of an idle pod of {what} by process"),
            _ => format!("PSS of a pod by process, the mean of {pods} idle pods of {what}"),
        };
        let mut figure = Figure::new(&id, title, "MiB").drawn(Plot::Stacked);
        for subject in [RUNC, Subject::bulkhead(suite.engine)] {
            eprintln!("{id}: {}", subject.name);
            match mean(suite, subject, image, pods) {
                Ok(parts) => {
                    let sum = parts.iter().map(|(_, mib)| mib).sum();
                    figure.add(subject.name, vec![sum]);
                    for (name, mib) in parts {
                        figure.add_part(format!("{}{PART}{name}", subject.name), vec![mib]);
                    }
                }
                Err(error) => figure.missing.push(format!("{}: {error}", subject.name)),
            }
        }
        found.push(figure);
    }
    if plan.most_pods == 0 && cheap && plan.wants("memory::idle_pods_50") {
        let mut many = Figure::new("memory::idle_pods_50", "50 idle pods", "MiB");
        many.missing.push("only on request: --pods 50".into());
        found.push(many);
    }
    Ok(found)
}

/// MiB by process of a pod, of several that stand side by side.
fn mean(suite: &Suite, subject: Subject, image: Image, pods: u32) -> Outcome<Vec<(String, f64)>> {
    let program: &[&str] = match image {
        Image::Python => &[
            "python3",
            "-c",
            "import time; print(flush=True); time.sleep(1000000)",
        ],
        _ => &["sleep", "1000000"],
    };
    let start = || subject.run(suite, image).args(program).detach();
    let all: Vec<Pod<'_>> = (0..pods).map(|_| start()).collect::<Outcome<_>>()?;
    // What a start has used and freed goes back to the host within some seconds.
    std::thread::sleep(IDLE);
    let mut parts: Vec<(String, f64)> = Vec::new();
    for pod in &all {
        for (name, mib) in of(pod)? {
            let share = mib / f64::from(pods);
            match parts.iter_mut().find(|(known, _)| *known == name) {
                Some((_, sum)) => *sum += share,
                None => parts.push((name, share)),
            }
        }
    }
    for pod in all {
        pod.end()?;
    }
    Ok(parts)
}

fn of(pod: &Pod<'_>) -> Outcome<Vec<(String, f64)>> {
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
        // The emulator has large maps of its own besides, and so have other programs.
        let is_guest = |map: &str| match &*name {
            "bulkhead-vmm" => true,
            emulator => emulator.starts_with("qemu") && map.starts_with("/memfd"),
        };
        let (own, machine) = pss(&read(format!("/proc/{pid}/smaps"))?, is_guest);
        guest += machine;
        parts.push((name, mib(own)));
    }
    if guest > 0 {
        parts.push((GUEST.into(), mib(guest)));
    }
    Ok(parts)
}

/// KiB of the process's own maps, and of the guest's memory.
fn pss(smaps: &str, is_guest: impl Fn(&str) -> bool) -> (u64, u64) {
    let (guest, own): (Vec<_>, Vec<_>) = smaps::maps(smaps)
        .into_iter()
        .partition(|map| map.kib >= GUEST_KIB && is_guest(map.name));
    let sum = |maps: Vec<Map<'_>>| maps.iter().map(|map| map.pss).sum();
    (sum(own), sum(guest))
}

fn mib(kib: u64) -> f64 {
    kib as f64 / 1024.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guests_memory_is_the_large_map() {
        let smaps = "10000000-20000000 rw-p 0 00:00 0\nPss: 3072 kB\n\
            20000000-20002000 r-xp 0 fd:00 7 /bin/vmm\nSize: 8 kB\nPss: 4 kB\n";
        assert_eq!(pss(smaps, |_| true), (4, 3072));
        assert_eq!(pss(smaps, |name| name.starts_with("/memfd")), (3076, 0));
    }
}
