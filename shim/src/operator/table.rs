//! The pods as a table of 100 columns.

use std::fmt::Write;

use super::{
    pods::{Pod, State},
    shown,
};

/// Columns at most.
const WIDTH: usize = 100;
/// An id of CRI has 64 characters; its first 13 tell it apart.
const ID_SHORT: usize = 13;
const HEAD: [&str; 9] = [
    "NAMESPACE",
    "POD",
    "STATE",
    "ENGINE",
    "CPU",
    "MEMORY",
    "SIZE",
    "CONTAINERS",
    "AGE",
];

/// The table, with its head.
pub fn table(pods: &[Pod]) -> String {
    let mut rows: Vec<[String; 9]> = vec![HEAD.map(str::to_owned)];
    rows.extend(pods.iter().map(row));
    let mut widths = [0; 9];
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = cell.chars().count().max(*width);
        }
    }
    // What is too much goes from the names, the pod's first.
    for column in [1, 0] {
        let total: usize = widths.iter().map(|w| w.saturating_add(2)).sum();
        let excess = total.saturating_sub(WIDTH.saturating_add(2));
        if let Some(width) = widths.get_mut(column).filter(|_| excess > 0) {
            *width = width.saturating_sub(excess).max(ID_SHORT);
        }
    }
    let mut text = String::new();
    for row in &rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(widths) {
            let _ = write!(line, "{:<width$}  ", cut(cell, width));
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

fn row(pod: &Pod) -> [String; 9] {
    let unknown = || "-".to_owned();
    let memory = mib(pod.pss_kib / 1024);
    let state = match (pod.state, pod.record.as_ref()) {
        (State::Running, Some(record)) if record.debug_shell => "running*".into(),
        (state, _) => state.name().to_owned(),
    };
    let Some(record) = &pod.record else {
        let name = shown(&pod.name());
        let [engine, cpu, size, containers, age] = std::array::from_fn(|_| unknown());
        return [
            unknown(),
            name,
            state,
            engine,
            cpu,
            memory,
            size,
            containers,
            age,
        ];
    };
    [
        shown(&record.namespace),
        shown(&record.id),
        state,
        match record.engine {
            crate::config::Engine::Kvm => "kvm".into(),
            crate::config::Engine::Emulated => "emulated".into(),
        },
        record.vcpus.to_string(),
        memory,
        mib(record.memory_mib),
        record.containers.len().to_string(),
        pod.age.map_or_else(unknown, age),
    ]
}

/// The beginning of a name that is too long, and a mark that it is one.
fn cut(cell: &str, width: usize) -> String {
    if cell.chars().count() <= width {
        return cell.to_owned();
    }
    let kept: String = cell.chars().take(width.saturating_sub(2)).collect();
    format!("{kept}..")
}

fn mib(mib: u64) -> String {
    match mib {
        0..10_240 => format!("{mib} MiB"),
        more => format!("{} GiB", more / 1024),
    }
}

/// A time as people say it.
pub fn age(seconds: u64) -> String {
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds}s"),
        (0, 0, minutes) => format!("{minutes}m{:02}s", seconds % 60),
        (0, hours, _) => format!("{hours}h{:02}m", minutes % 60),
        (days, ..) => format!("{days}d{:02}h", hours % 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{config::Engine, sandbox::record::Record};

    fn pod(namespace: &str, id: &str) -> Pod {
        Pod {
            dir: "/run/bulkhead/x".into(),
            state: State::Running,
            record: Some(Record {
                namespace: namespace.into(),
                id: id.into(),
                created: 0,
                engine: Engine::Emulated,
                vcpus: 32,
                memory_mib: 1 << 20,
                debug_shell: true,
                containers: vec![String::new(); 256],
                stages_us: Default::default(),
                ready: None,
            }),
            processes: Vec::new(),
            pss_kib: 10 << 20,
            age: Some(90_061),
        }
    }

    #[test]
    fn the_longest_names_and_figures_fit_in_100_columns() {
        let long = [
            pod(&"n".repeat(76), &"0123456789abcdef".repeat(8)),
            pod("k8s.io", "web\u{1b}[2J"),
        ];
        let text = table(&long);
        for line in text.lines() {
            assert!(line.chars().count() <= WIDTH, "{line}");
            assert!(!line.contains('\u{1b}'));
        }
        assert!(text.contains("0123456789a..  running"), "{text}");
    }

    #[test]
    fn columns_stand_below_their_heads() {
        let text = table(&[pod("default", "web")]);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(
            lines,
            [
                "NAMESPACE  POD  STATE     ENGINE    CPU  MEMORY  SIZE      CONTAINERS  AGE",
                "default    web  running*  emulated  32   10 GiB  1024 GiB  256         1d01h",
            ]
        );
    }

    #[test]
    fn ages_have_two_figures() {
        assert_eq!([9, 75, 3700].map(age), ["9s", "1m15s", "1h01m"]);
    }
}
