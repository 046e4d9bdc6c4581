//! Summaries of samples.

use std::time::Duration;

use serde_json::{Value, json};

/// Converts a duration to milliseconds, the unit of all times of the benchmarks.
pub(crate) fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

/// Samples, sorted in ascending order.
#[derive(Clone, Debug, Default)]
pub(crate) struct Samples(Vec<f64>);

impl Samples {
    pub(crate) fn new(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        Samples(values)
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    /// Returns the percentile by the nearest-rank method: always one of the samples.
    pub(crate) fn percentile(&self, percent: f64) -> f64 {
        let rank = (percent / 100.0 * self.0.len() as f64).ceil() as usize;
        self.0.get(rank.saturating_sub(1)).or(self.0.last()).copied().unwrap_or(f64::NAN)
    }

    /// Returns the median: the middle sample, or the mean of the middle two.
    pub(crate) fn median(&self) -> f64 {
        let half = self.0.len() / 2;
        match (self.0.len() % 2, self.0.get(half), half.checked_sub(1).and_then(|below| self.0.get(below))) {
            (1, Some(middle), _) => *middle,
            (_, Some(above), Some(below)) => f64::midpoint(*above, *below),
            _ => f64::NAN,
        }
    }

    pub(crate) fn max(&self) -> f64 {
        self.0.last().copied().unwrap_or(f64::NAN)
    }

    pub(crate) fn min(&self) -> f64 {
        self.0.first().copied().unwrap_or(f64::NAN)
    }

    pub(crate) fn to_json(&self) -> Value {
        json!({
            "count": self.len(),
            "min": round(self.min()),
            "p50": round(self.percentile(50.0)),
            "p90": round(self.percentile(90.0)),
            "p99": round(self.percentile(99.0)),
            "max": round(self.max()),
        })
    }
}

/// Rounds to four decimal places.
pub(crate) fn round(value: f64) -> f64 {
    (value * 10_000.0).round() / 10_000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_samples() {
        let samples = Samples::new((1..=200).rev().map(f64::from).collect());
        assert_eq!(samples.percentile(50.0), 100.0);
        assert_eq!(samples.percentile(99.0), 198.0);
        assert_eq!((samples.min(), samples.max()), (1.0, 200.0));
        assert_eq!(samples.percentile(100.0), 200.0);
    }

    #[test]
    fn medians_are_the_middle_or_the_mean_of_the_middle_two() {
        assert_eq!(Samples::new(vec![3.0, 1.0, 2.0]).median(), 2.0);
        assert_eq!(Samples::new(vec![4.0, 1.0, 2.0, 3.0]).median(), 2.5);
        assert!(Samples::default().median().is_nan());
    }
}
