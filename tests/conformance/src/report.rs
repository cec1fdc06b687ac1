//! What was found, on the terminal and as Markdown.

use std::{collections::BTreeMap, fmt::Write as _, time::Duration};

use bulkhead_harness::{Failure, command::tail};

use crate::{End, case::Case, host::Host};

/// Groups whose cases show a limit or a filter that bites.
const BITES: &str = "bites::";

/// The report so far.
pub struct Report {
    head: String,
    rows: Vec<Row>,
    leaks: Vec<String>,
}

struct Row {
    name: String,
    word: &'static str,
    text: String,
    explained: Vec<(String, String)>,
    ours: String,
    runc: String,
}

impl Report {
    /// An empty one.
    pub fn new(host: &Host) -> Self {
        let head = format!(
            "engine {:?}; runc {}.{} with cgroup {}",
            host.engine,
            host.runc.0,
            host.runc.1,
            if host.cgroup_v2 { "v2" } else { "v1" }
        );
        Self {
            head,
            rows: Vec::new(),
            leaks: Vec::new(),
        }
    }

    /// Adds a case and prints its line.
    pub fn add(
        &mut self,
        case: &Case,
        took: Duration,
        index: usize,
        count: usize,
        end: &End,
        verbose: bool,
    ) {
        let (word, text) = match end {
            Ok(_) => ("ok", String::new()),
            Err(Failure::Skipped(text)) => ("skip", text.clone()),
            Err(Failure::Failed(text)) => ("FAIL", text.clone()),
        };
        println!(
            "{index:>3}/{count} {word:<4} {:<72} {:>7.2} s",
            case.name,
            took.as_secs_f64()
        );
        if !text.is_empty() {
            println!("         {text}");
        }
        let mut row = Row {
            name: case.name.clone(),
            word,
            text,
            explained: Vec::new(),
            ours: String::new(),
            runc: String::new(),
        };
        if let Ok(verdict) = end {
            row.ours.clone_from(&verdict.ours);
            row.runc.clone_from(&verdict.runc);
            row.explained = verdict
                .explained
                .iter()
                .map(|reason| {
                    let d = &reason.difference;
                    (
                        format!("{}: Bulkhead {}, runc {}", d.place(), d.ours, d.runc),
                        reason.why.clone(),
                    )
                })
                .collect();
            if verbose {
                println!(
                    "         bulkhead: {}\n         runc:     {}",
                    row.ours, row.runc
                );
                for (what, why) in &row.explained {
                    println!("         explained: {what} ({why})");
                }
            }
        }
        self.rows.push(row);
    }

    /// What is left on the host.
    pub fn leaks(&mut self, leaks: &[String]) {
        for leak in leaks {
            println!("left on the host: {leak}");
        }
        self.leaks = leaks.to_vec();
    }

    fn count(&self, word: &str) -> usize {
        self.rows.iter().filter(|row| row.word == word).count()
    }

    /// Cases that failed; something left on the host counts as one.
    pub fn failed(&self) -> usize {
        self.count("FAIL") + usize::from(!self.leaks.is_empty())
    }

    fn explained(&self) -> usize {
        self.rows.iter().map(|row| row.explained.len()).sum()
    }

    /// Prints the closing lines.
    pub fn close(&self) {
        for row in self.rows.iter().filter(|row| row.word == "FAIL") {
            println!("failed: {}", row.name);
        }
        println!(
            "{} cases, {} explained differences",
            self.rows.len(),
            self.explained()
        );
        println!(
            "{} passed, {} failed, {} skipped",
            self.count("ok"),
            self.failed(),
            self.count("skip")
        );
    }

    /// The report.
    pub fn markdown(&self) -> String {
        let mut text = format!(
            "# Conformance: the same bundle under runc and under Bulkhead\n\n{}. {} cases: {} passed, {} failed, {} skipped; \
             {} explained differences.\n",
            self.head,
            self.rows.len(),
            self.count("ok"),
            self.failed(),
            self.count("skip"),
            self.explained()
        );
        text.push_str("\n## Limits and filters that were run into\n\n| case | Bulkhead | runc |\n|---|---|---|\n");
        for row in self.rows.iter().filter(|row| row.name.contains(BITES)) {
            let (ours, runc) = if row.word == "ok" {
                (cell(&row.ours), cell(&row.runc))
            } else {
                (cell(&row.text), String::new())
            };
            let _ = writeln!(text, "| {} | {ours} | {runc} |", row.name);
        }
        text.push_str("\n## Differences and their reasons\n\n");
        let mut by_reason: BTreeMap<&str, Vec<String>> = BTreeMap::new();
        for row in &self.rows {
            for (what, why) in &row.explained {
                by_reason
                    .entry(why)
                    .or_default()
                    .push(format!("`{}`: {}", row.name, cell(what)));
            }
        }
        for (why, places) in by_reason {
            let _ = writeln!(text, "- {why} ({})", places.len());
            for place in places.iter().take(5) {
                let _ = writeln!(text, "  - {place}");
            }
            if places.len() > 5 {
                let _ = writeln!(text, "  - and {} more", places.len() - 5);
            }
        }
        text.push_str("\n## Cases\n\n| case | end | explained |\n|---|---|---|\n");
        for row in &self.rows {
            let end = if row.text.is_empty() {
                row.word.into()
            } else {
                format!("{}: {}", row.word, cell(&row.text))
            };
            let _ = writeln!(text, "| {} | {end} | {} |", row.name, row.explained.len());
        }
        for leak in &self.leaks {
            let _ = writeln!(text, "\nLeft on the host: {}", cell(leak));
        }
        text
    }
}

/// Text that fits into a cell.
fn cell(text: &str) -> String {
    let one = text.replace('\n', " ").replace('|', "\\|");
    if one.len() > 300 {
        format!("…{}", tail(&one, 300))
    } else {
        one
    }
}
