//! A line through samples, and how sure its slope is.

use bulkhead_harness::{Outcome, ensure};

/// Stretches of which the least sample counts: a heap's floor, not where its collector happened to be. Samples next to
/// each other are alike, and a fit through all of them would claim to know more than it does.
const STRETCHES: usize = 12;
/// Samples that make a slope: two a stretch, and the quarter before.
pub const LEAST: usize = 2 * STRETCHES * 4 / 3 + 1;
/// Student's t for a 95 % interval and as many degrees of freedom as stretches without two.
const T: f64 = 2.228;

/// See the module.
#[derive(Clone, Copy, Debug)]
pub struct Fit {
    /// The first stretch's sample.
    pub first: f64,
    /// The last one's.
    pub last: f64,
    /// Growth a sample.
    pub slope: f64,
    /// Half of its 95 % interval.
    pub half: f64,
}

impl Fit {
    /// Of all but the first quarter, which is warm-up.
    pub fn of(samples: &[f64]) -> Outcome<Self> {
        let warm = samples.get(samples.len() / 4..).unwrap_or_default();
        ensure!(
            samples.len() >= LEAST,
            "{} pods are too few for a slope; {LEAST} are enough",
            samples.len()
        );
        let numbered: Vec<(f64, f64)> = (0..).map(f64::from).zip(warm.iter().copied()).collect();
        let bound = |stretch: usize| stretch * numbered.len() / STRETCHES;
        let points: Vec<(f64, f64)> = (0..STRETCHES)
            .filter_map(|at| numbered.get(bound(at)..bound(at + 1)))
            .filter_map(|part| part.iter().copied().min_by(|a, b| a.1.total_cmp(&b.1)))
            .collect();
        let count = points.len() as f64;
        let mean = |of: fn(&(f64, f64)) -> f64| points.iter().map(of).sum::<f64>() / count;
        let (x, y) = (mean(|p| p.0), mean(|p| p.1));
        let spread: f64 = points.iter().map(|p| (p.0 - x).powi(2)).sum();
        let slope = points.iter().map(|p| (p.0 - x) * (p.1 - y)).sum::<f64>() / spread;
        let off = |p: &(f64, f64)| (p.1 - y - slope * (p.0 - x)).powi(2);
        let rest: f64 = points.iter().map(off).sum();
        Ok(Self {
            first: points.first().map_or(0.0, |p| p.1),
            last: points.last().map_or(0.0, |p| p.1),
            slope,
            half: T * (rest / (count - 2.0) / spread).sqrt(),
        })
    }

    /// The interval's lower end.
    pub fn low(&self) -> f64 {
        self.slope - self.half
    }

    /// How many of so many samples are judged.
    pub fn judged(samples: usize) -> usize {
        samples - samples / 4
    }

    /// The slope and its interval with so many digits.
    pub fn show(&self, digits: usize) -> String {
        let (low, high) = (self.low(), self.slope + self.half);
        // Without the sign of a zero.
        let [slope, low, high] = [self.slope, low, high].map(|v| match format!("{v:.digits$}") {
            text if text.trim_matches(['-', '0', '.']).is_empty() => format!("{:.digits$}", 0.0),
            text => text,
        });
        format!("{slope} [{low}, {high}]")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The same each time, between -1 and 1.
    fn noise(count: u32) -> impl Iterator<Item = f64> {
        let next = |state: &mut u32| {
            *state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            Some(f64::from(*state >> 8) / f64::from(1 << 23) - 1.0)
        };
        std::iter::repeat_n((), count as usize).scan(7, move |state, ()| next(state))
    }

    #[test]
    fn a_leak_under_noise_is_found_and_noise_alone_is_none() {
        let leak = (0..).map(f64::from).zip(noise(400));
        let leak: Vec<f64> = leak.map(|(x, n)| 1e6 + 3.0 * x + 40.0 * n).collect();
        let fit = Fit::of(&leak).unwrap();
        assert!(
            fit.low() > 2.0 && (fit.slope - 3.0).abs() <= fit.half,
            "{fit:?}"
        );
        let level: Vec<f64> = noise(400).map(|n| 1e6 + 40.0 * n).collect();
        let fit = Fit::of(&level).unwrap();
        assert!(fit.low() < 0.0 && fit.half < 0.1, "{fit:?}");
    }

    #[test]
    fn a_sure_leak_of_one_in_four_is_exact_to_the_stretch() {
        let steps: Vec<f64> = (0..400).map(|x| f64::from(x / 4)).collect();
        let fit = Fit::of(&steps).unwrap();
        assert!(
            (fit.slope - 0.25).abs() < 0.01 && fit.low() > 0.2,
            "{fit:?}"
        );
    }

    #[test]
    fn warm_up_and_a_collectors_waves_are_no_growth() {
        let heap = |x: u32| {
            if x < 90 {
                f64::from(x)
            } else {
                100.0 + f64::from(x % 7)
            }
        };
        let samples: Vec<f64> = (0..400).map(heap).collect();
        let fit = Fit::of(&samples).unwrap();
        assert_eq!(
            (fit.slope, fit.half, fit.first, fit.last),
            (0.0, 0.0, 100.0, 100.0)
        );
        assert_eq!(fit.show(1), "0.0 [0.0, 0.0]");
    }

    #[test]
    fn too_few_samples_are_refused_by_number() {
        assert!(Fit::of(&[1.0; LEAST]).is_ok());
        let error = Fit::of(&[1.0; LEAST - 1]).unwrap_err().to_string();
        assert!(
            error.contains("32 pods are too few for a slope; 33"),
            "{error}"
        );
    }
}
