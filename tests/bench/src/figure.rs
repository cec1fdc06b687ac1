//! A figure: one quantity of several subjects, measured in rounds.

use bulkhead_harness::failure::{Failure, Outcome};
use serde::Serialize;

use crate::{
    stats::{Spread, paired, spread},
    subject::{RUNC, Subject},
};

/// What is measured.
#[derive(Clone, Debug, Serialize)]
pub struct Figure {
    /// Group and name, as `--filter` takes it.
    pub id: String,
    /// What was done, in words.
    pub title: String,
    /// Unit of the samples.
    pub unit: &'static str,
    /// Whether more is better.
    pub more_is_better: bool,
    /// How it is drawn.
    #[serde(skip)]
    pub plot: Plot,
    /// One a subject.
    pub rows: Vec<Row>,
    /// What could not be measured, and why.
    pub missing: Vec<String>,
    /// Text for whoever looks closer; folded away in the page.
    pub notes: Vec<String>,
}

/// A picture's kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Plot {
    /// A bar a row.
    #[default]
    Bars,
    /// Each row begins where the row before ends, or the row that [`Row::after`] names.
    Waterfall,
    /// One bar a subject, of the parts that are called `<subject>: <part>`.
    Stacked,
}

/// A subject's samples.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// The subject, or a part of it.
    pub name: String,
    /// One a round.
    pub samples: Vec<f64>,
    /// Their median and quartiles.
    pub spread: Option<Spread>,
    /// The same of the ratios to runc, round by round.
    pub to_runc: Option<Spread>,
    /// In a waterfall, what it follows if that is not the row before.
    #[serde(skip)]
    pub after: Option<&'static str>,
}

impl Figure {
    /// An empty one.
    pub fn new(id: &str, title: impl Into<String>, unit: &'static str) -> Self {
        Self {
            id: id.into(),
            title: title.into(),
            unit,
            more_is_better: false,
            plot: Plot::Bars,
            rows: Vec::new(),
            missing: Vec::new(),
            notes: Vec::new(),
        }
    }

    /// The same where more is better.
    pub fn more_is_better(mut self) -> Self {
        self.more_is_better = true;
        self
    }

    /// The same drawn in another way.
    pub fn drawn(mut self, plot: Plot) -> Self {
        self.plot = plot;
        self
    }

    /// Adds a subject's row.
    pub fn add(&mut self, name: impl Into<String>, samples: Vec<f64>) {
        let base = self.rows.iter().find(|row| row.name == RUNC.name);
        let to_runc = base.and_then(|base| paired(&samples, &base.samples));
        self.add_part(name, samples);
        if let Some(row) = self.rows.last_mut() {
            row.to_runc = to_runc;
        }
    }

    /// Adds a row for a part of a subject, which has no peer.
    pub fn add_part(&mut self, name: impl Into<String>, samples: Vec<f64>) {
        self.rows.push(Row {
            name: name.into(),
            spread: spread(&samples),
            samples,
            to_runc: None,
            after: None,
        });
    }
}

/// Measures in rounds: in each, every subject once, so that what disturbs the host disturbs all of them. A sample holds one
/// value for each figure. A subject that fails once is left out and its failure told.
pub fn measure<const N: usize>(
    mut figures: [Figure; N],
    rounds: u32,
    subjects: &[Subject],
    mut sample: impl FnMut(Subject) -> Outcome<[f64; N]>,
) -> Vec<Figure> {
    let title = figures.first().map(|f| f.id.clone()).unwrap_or_default();
    let mut missing = Vec::new();
    let mut running: Vec<(Subject, [Vec<f64>; N])> = Vec::new();
    for &subject in subjects {
        match subject.present() {
            Ok(()) => running.push((subject, std::array::from_fn(|_| Vec::new()))),
            Err(error) => missing.push(format!("{}: {error}", subject.name)),
        }
    }
    for round in 1..=rounds {
        eprint!("\r{title}: round {round} of {rounds} ");
        running.retain_mut(|(subject, samples)| match sample(*subject) {
            Ok(values) => {
                for (all, value) in samples.iter_mut().zip(values) {
                    all.push(value);
                }
                true
            }
            Err(error) => {
                missing.push(format!("{}: {}", subject.name, line(&error)));
                false
            }
        });
    }
    eprintln!();
    for (subject, samples) in running {
        for (figure, samples) in figures.iter_mut().zip(samples) {
            figure.add(subject.name, samples);
        }
    }
    for figure in &mut figures {
        figure.missing.clone_from(&missing);
    }
    figures.into()
}

fn line(error: &Failure) -> String {
    let text = error.to_string();
    text.lines().next().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use bulkhead_harness::Engine;

    #[test]
    fn subjects_take_turns_and_a_failure_is_told() {
        let mut order = Vec::new();
        let bulkhead = Subject::bulkhead(Engine::Emulated);
        let figures = [Figure::new("a::b", "", "ms")];
        let figures = measure(figures, 2, &[RUNC, bulkhead], |subject| {
            order.push(subject.name);
            match order.len() {
                4 => Err("it broke\nhere".into()),
                n => Ok([n as f64]),
            }
        });
        let figure = &figures[0];
        assert_eq!(order, ["runc", bulkhead.name, "runc", bulkhead.name]);
        assert_eq!(figure.rows.len(), 1);
        assert_eq!(figure.missing, [format!("{}: it broke", bulkhead.name)]);
    }

    #[test]
    fn a_ratio_is_to_runc() {
        let mut figure = Figure::new("a::b", "", "ms");
        figure.add("runc", vec![1.0, 2.0]);
        figure.add("other", vec![3.0, 6.0]);
        assert_eq!(figure.rows[1].to_runc.unwrap().median, 3.0);
        assert!(figure.rows[0].to_runc.is_none());
    }
}
