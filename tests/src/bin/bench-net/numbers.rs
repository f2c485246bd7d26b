//! Medians and the like.

use std::time::Duration;

/// What was measured, in any order.
#[derive(Default)]
pub struct Times(Vec<Duration>);

impl Times {
    pub fn add(&mut self, took: Duration) {
        self.0.push(took);
    }

    pub fn merge(&mut self, more: Times) {
        self.0.extend(more.0);
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// The value that so many of a hundred do not exceed, in milliseconds.
    pub fn percentile(&mut self, percent: usize) -> f64 {
        self.0.sort();
        let at = (self.0.len() * percent / 100).min(self.0.len().saturating_sub(1));
        self.0.get(at).map_or(f64::NAN, ms)
    }

    /// `p50 … ms, p95 … ms`
    pub fn shown(&mut self) -> String {
        let (p50, p95) = (self.percentile(50), self.percentile(95));
        format!("p50 {p50:>7.3} ms, p95 {p95:>7.3} ms")
    }
}

impl Extend<Duration> for Times {
    fn extend<T: IntoIterator<Item = Duration>>(&mut self, times: T) {
        self.0.extend(times);
    }
}

fn ms(time: &Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

/// The middle one.
pub fn median(numbers: &[f64]) -> f64 {
    let mut sorted = numbers.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}
