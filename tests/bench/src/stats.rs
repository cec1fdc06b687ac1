//! Numbers from samples: medians with quartiles, and ratios of runs that were made side by side.

use serde::Serialize;

/// A median between its quartiles.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Spread {
    /// A quarter of the samples lies below.
    pub q1: f64,
    /// Half of them.
    pub median: f64,
    /// Three quarters.
    pub q3: f64,
}

/// The spread of samples; none of no samples.
pub fn spread(samples: &[f64]) -> Option<Spread> {
    let mut sorted: Vec<f64> = samples.iter().copied().filter(|s| s.is_finite()).collect();
    sorted.sort_by(f64::total_cmp);
    Some(Spread {
        q1: quantile(&sorted, 0.25)?,
        median: quantile(&sorted, 0.5)?,
        q3: quantile(&sorted, 0.75)?,
    })
}

/// Between the two samples next to the place, by distance.
fn quantile(sorted: &[f64], at: f64) -> Option<f64> {
    let last = sorted.len().checked_sub(1)?;
    let place = at * last as f64;
    let below = place.floor();
    let (low, high) = (
        sorted.get(below as usize)?,
        sorted.get((place.ceil() as usize).min(last))?,
    );
    Some(low + (high - low) * (place - below))
}

/// Each round's `ours` by the same round's `base`: what disturbs one run of a pair most often disturbs both.
pub fn paired(ours: &[f64], base: &[f64]) -> Option<Spread> {
    let ratios: Vec<f64> = ours.iter().zip(base).map(|(a, b)| a / b).collect();
    spread(&ratios)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_of_an_even_number_lies_between_two() {
        let found = spread(&[4.0, 1.0, 3.0, 2.0]).unwrap();
        assert_eq!((found.q1, found.median, found.q3), (1.75, 2.5, 3.25));
        assert_eq!(spread(&[]), None);
        assert_eq!(spread(&[7.0]).unwrap().q3, 7.0);
    }

    #[test]
    fn a_ratio_is_of_the_same_round() {
        let found = paired(&[2.0, 20.0, 200.0], &[1.0, 10.0, 100.0]).unwrap();
        assert_eq!((found.q1, found.median, found.q3), (2.0, 2.0, 2.0));
        assert_eq!(paired(&[1.0], &[]), None);
    }
}
