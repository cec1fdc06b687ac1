//! Which cases a suite's command line asks for.

use clap::{Args, ValueEnum};

use crate::suite::Engine;

/// Options of every suite.
#[derive(Args, Clone, Debug)]
pub struct Choice {
    /// Only cases whose name holds one of these words.
    #[arg(long)]
    pub filter: Vec<String>,
    /// Not the one of this name.
    #[arg(long)]
    pub skip: Vec<String>,
    /// Only each N-th case beginning with the K-th, as K/N.
    #[arg(long, value_name = "K/N", value_parser = shard)]
    pub shard: Option<(usize, usize)>,
    /// Print the names.
    #[arg(long)]
    pub list: bool,
}

/// What runs the guests of a suite that is about machines alone.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum MachineEngine {
    /// Our VMM on `/dev/kvm`.
    Kvm,
    /// Our VMM with QEMU as a software CPU.
    Emulated,
}

impl From<MachineEngine> for Engine {
    fn from(engine: MachineEngine) -> Self {
        match engine {
            MachineEngine::Kvm => Self::Kvm,
            MachineEngine::Emulated => Self::Emulated,
        }
    }
}

impl Choice {
    /// The chosen ones of `all`. With `list` their names are printed, and there is nothing to run.
    pub fn of<'a, T>(&self, all: &'a [T], name: impl Fn(&T) -> &str) -> Option<Vec<&'a T>> {
        let (first, step) = self.shard.unwrap_or((1, 1));
        let chosen: Vec<&T> = all
            .iter()
            .filter(|case| {
                self.filter.is_empty() || self.filter.iter().any(|word| name(case).contains(word))
            })
            .skip(first - 1)
            .step_by(step)
            .filter(|case| !self.skip.iter().any(|skip| name(case) == skip))
            .collect();
        if self.list {
            chosen.iter().for_each(|case| println!("{}", name(case)));
            return None;
        }
        Some(chosen)
    }
}

fn shard(text: &str) -> Result<(usize, usize), String> {
    text.split_once('/')
        .and_then(|(k, n)| Some((k.parse().ok()?, n.parse().ok()?)))
        .filter(|(k, n)| (1..=*n).contains(k))
        .ok_or_else(|| "is not K/N with K from 1 to N".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shards_share_out_what_the_filter_leaves_whatever_is_skipped() {
        let all = ["a::1", "b::1", "a::2", "a::3"];
        let choose = |k, skip: &[&str]| {
            let choice = Choice {
                filter: vec!["a::".into()],
                skip: skip.iter().map(ToString::to_string).collect(),
                shard: Some((k, 2)),
                list: false,
            };
            let chosen = choice.of(&all, |name| name).unwrap();
            chosen.into_iter().copied().collect::<Vec<_>>()
        };
        assert_eq!(choose(1, &[]), ["a::1", "a::3"]);
        assert_eq!(choose(1, &["a::1"]), ["a::3"]);
        assert_eq!(choose(2, &["a::1"]), ["a::2"]);
        assert!(
            ["", "1", "0/2", "3/2", "x/2"]
                .map(shard)
                .iter()
                .all(Result::is_err)
        );
    }
}
