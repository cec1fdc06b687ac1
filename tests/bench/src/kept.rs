//! The short form: counts and virtual time held against the figures kept in the repository (`tests/bench/kept.json`). What grew
//! by more than its noise fails; wall time and whatever else depends on the host's load is not judged.

use std::{collections::BTreeMap, fs, path::Path};

use anyhow::Context;
use serde::{Deserialize, Serialize};

use crate::figure::Figure;

/// A figure that is kept, by the name `<figure>: <row>`.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Kept {
    /// The least of the runs when it was kept.
    value: f64,
    /// What it may grow by, as a part of the value.
    noise: f64,
}

/// By engine and name.
type All = BTreeMap<String, BTreeMap<String, Kept>>;

/// How a comparison ended.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// No larger than kept.
    pub passed: u32,
    /// Grown, or not measured.
    pub failed: u32,
}

/// Compares, prints a line for each kept figure, and tells how many hold.
pub fn compare(file: &Path, engine: &str, figures: &[Figure]) -> anyhow::Result<Tally> {
    let mut tally = Tally::default();
    let kept = load(file)?.remove(engine).unwrap_or_default();
    for (name, kept) in kept {
        let (line, count) = match least(figures).find(|(found, _)| *found == name) {
            None => (not_measured(&name, figures), &mut tally.failed),
            Some((_, now)) if now > kept.value * (1.0 + kept.noise) => {
                let line = format!(
                    "FAIL {name}: {now:.3}, kept is {:.3} and {:.1} % of noise. If it has to grow: tests/bench/run keep {engine}",
                    kept.value,
                    kept.noise * 100.0
                );
                (line, &mut tally.failed)
            }
            Some((_, now)) => (
                format!("ok   {name}: {now:.3} (kept {:.3})", kept.value),
                &mut tally.passed,
            ),
        };
        *count += 1;
        println!("{line}");
    }
    Ok(tally)
}

/// Writes what was measured in place of what is kept; which figures are kept, and their noise, stays.
pub fn keep(file: &Path, engine: &str, figures: &[Figure]) -> anyhow::Result<()> {
    let mut all = load(file)?;
    for (name, now) in least(figures) {
        let kept = all.get_mut(engine).and_then(|all| all.get_mut(&name));
        if let Some(kept) = kept {
            println!("{name}: {:.3} becomes {now:.3}", kept.value);
            // As many digits as a person compares.
            kept.value = (now * 1e3).round() / 1e3;
        }
    }
    let text = serde_json::to_string_pretty(&all)?;
    fs::write(file, text + "\n").with_context(|| format!("write {}", file.display()))
}

fn load(file: &Path) -> anyhow::Result<All> {
    let text = fs::read_to_string(file).with_context(|| format!("read {}", file.display()))?;
    serde_json::from_str(&text).with_context(|| format!("parse {}", file.display()))
}

/// The least of each row's runs: a busy host only ever adds (retries, wake-ups).
fn least(figures: &[Figure]) -> impl Iterator<Item = (String, f64)> {
    figures.iter().flat_map(|figure| {
        figure.rows.iter().filter_map(|row| {
            let least = row.samples.iter().copied().reduce(f64::min)?;
            Some((format!("{}: {}", figure.id, row.name), least))
        })
    })
}

fn not_measured(name: &str, figures: &[Figure]) -> String {
    let figure = figures.iter().find(|f| name.starts_with(&f.id));
    let why = figure.and_then(|figure| figure.missing.first());
    let why = why.map_or("nothing is called so any more", String::as_str);
    format!("FAIL {name}: not measured: {why}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figure(value: f64) -> Figure {
        let mut figure = Figure::new("counts::a", "", "calls");
        figure.add_part("vmm", vec![value]);
        figure
    }

    #[test]
    fn growth_beyond_the_noise_fails_and_so_does_what_is_not_measured() {
        let folder = std::env::temp_dir().join(format!("bulkhead-kept-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let file = folder.join("kept.json");
        let text = r#"{"kvm": {"counts::a: vmm": {"value": 100.0, "noise": 0.05},
            "counts::b: vmm": {"value": 1.0, "noise": 0.0}}}"#;
        fs::write(&file, text).unwrap();
        let tally = |value: f64| {
            let Tally { passed, failed } = compare(&file, "kvm", &[figure(value)]).unwrap();
            (passed, failed)
        };
        assert_eq!(tally(104.0), (1, 1));
        assert_eq!(tally(10.0), (1, 1));
        assert_eq!(tally(106.0), (0, 2));
        keep(&file, "kvm", &[figure(106.0)]).unwrap();
        assert_eq!(tally(106.0), (1, 1));
        fs::remove_dir_all(folder).unwrap();
    }
}
