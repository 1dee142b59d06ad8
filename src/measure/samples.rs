//! Times of repeated rounds: their summary, what is odd about them, and when there are enough.

use super::bootstrap::Interval;

/// Fewer rounds than this are never called stable: six is the least for which an interval of two order statistics covers
/// the median with 95 %.
const MIN_ROUNDS: usize = 6;

/// Modified z-scores beyond this mark outliers (Iglewicz & Hoaglin, *How to Detect and Handle Outliers*, 1993, §3.3).
const OUTLIER_SCORE: f64 = 3.5;

/// A first round that is slower by less than this share of the median changes no conclusion.
const SLOW_START: f64 = 0.05;

/// Seconds of repeated rounds, in the order in which they were taken: at least one, all finite.
#[derive(Clone, Debug, PartialEq)]
pub struct Samples {
    seconds: Vec<f64>,
    sorted: Vec<f64>,
}

/// What is told about repeated rounds, in seconds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Summary {
    /// Rounds.
    pub count: usize,
    /// Arithmetic mean.
    pub mean: f64,
    /// The middle one, or the mean of the two middle ones.
    pub median: f64,
    /// Sample standard deviation (n − 1); `None` for a single round.
    pub std: Option<f64>,
    /// Median of the absolute deviations from the median, not scaled.
    pub mad: f64,
    /// Fastest round.
    pub min: f64,
    /// Slowest round.
    pub max: f64,
    /// 50th percentile, as [`percentile`] defines it.
    pub p50: f64,
    /// 90th percentile.
    pub p90: f64,
    /// 99th percentile.
    pub p99: f64,
}

impl Samples {
    /// Takes the seconds of each round, in order; `None` if there is none or one is not finite.
    #[must_use]
    pub fn new(seconds: Vec<f64>) -> Option<Self> {
        if seconds.is_empty() || seconds.iter().any(|value| !value.is_finite()) {
            return None;
        }
        let sorted = sorted(&seconds);
        Some(Self { seconds, sorted })
    }

    /// The seconds of each round, in order.
    #[must_use]
    pub fn seconds(&self) -> &[f64] {
        &self.seconds
    }

    /// The median in seconds.
    #[must_use]
    pub fn median(&self) -> f64 {
        percentile(&self.sorted, 50.0)
    }

    /// Everything that is told about them.
    #[must_use]
    pub fn summary(&self) -> Summary {
        let count = self.seconds.len();
        let mean = self.sorted.iter().sum::<f64>() / count as f64;
        let squares: f64 = self.sorted.iter().map(|value| (value - mean).powi(2)).sum();
        let at = |percent| percentile(&self.sorted, percent);
        Summary {
            count,
            mean,
            median: at(50.0),
            std: (count > 1).then(|| (squares / (count - 1) as f64).sqrt()),
            mad: median_deviation(&self.sorted, at(50.0)),
            min: at(0.0),
            max: at(100.0),
            p50: at(50.0),
            p90: at(90.0),
            p99: at(99.0),
        }
    }

    /// The median with an interval that covers the true one with at least 95 %, whatever the distribution; `None` for
    /// fewer than six rounds, of which no interval does.
    ///
    /// Its ends are order statistics, whose rank follows from the binomial distribution with p = ½ (Conover, *Practical
    /// Nonparametric Statistics*, 3rd ed., §3.2).
    #[must_use]
    pub fn median_interval(&self) -> Option<Interval> {
        let count = self.sorted.len();
        let mut term = 0.5_f64.powi(i32::try_from(count).ok()?);
        let (mut below, mut rank) = (0.0, 0);
        // `below` is P(fewer than `rank` rounds lie under the median): one tail of the interval from rank `rank`.
        while rank < count / 2 && below + term <= 0.025 {
            below += term;
            rank += 1;
            term *= (count - rank + 1) as f64 / rank as f64;
        }
        let first = rank.checked_sub(1)?;
        Some(Interval { value: self.median(), low: self.sorted[first], high: self.sorted[count - 1 - first] })
    }

    /// Whether more rounds would tell little: the rule by which repeated rounds end.
    ///
    /// There are at least six rounds; both ends of [`Self::median_interval`] lie within `tolerance` (a share, such as
    /// 0.02) of the median; and the medians of the earlier and the later half differ by no more than that, so nothing
    /// is still warming up or slowing down.
    #[must_use]
    pub fn is_stable(&self, tolerance: f64) -> bool {
        if self.seconds.len() < MIN_ROUNDS {
            return false;
        }
        let Some(interval) = self.median_interval() else { return false };
        let margin = tolerance * interval.value.abs();
        let (early, late) = self.seconds.split_at(self.seconds.len() / 2);
        let drift = percentile(&sorted(late), 50.0) - percentile(&sorted(early), 50.0);
        interval.value - interval.low <= margin && interval.high - interval.value <= margin && drift.abs() <= margin
    }

    /// Indices of the rounds whose modified z-score exceeds 3.5 (Iglewicz & Hoaglin 1993).
    #[must_use]
    pub fn outliers(&self) -> Vec<usize> {
        let scores = self.seconds.iter().map(|&value| modified_z_score(value, &self.sorted));
        scores.enumerate().filter(|(_, score)| score.abs() > OUTLIER_SCORE).map(|(index, _)| index).collect()
    }

    /// Whether the first round stands out above the others: an outlier to them, and over 5 % slower than their median.
    #[must_use]
    pub fn is_first_slow(&self) -> bool {
        let [first, others @ ..] = self.seconds.as_slice() else { return false };
        if others.len() < 2 {
            return false;
        }
        let others = sorted(others);
        let median = percentile(&others, 50.0);
        modified_z_score(*first, &others) > OUTLIER_SCORE && *first > median * (1.0 + SLOW_START)
    }

    /// What the reader of the summary should know, in sentences; empty if nothing is odd.
    #[must_use]
    pub fn notes(&self) -> Vec<String> {
        let mut notes = Vec::new();
        let (median, outliers) = (self.median(), self.outliers());
        if self.is_first_slow() {
            let ratio = self.seconds[0] / median;
            notes.push(format!(
                "The first round took {ratio:.2} times the median: caches were cold, or warm-up too short."
            ));
        }
        let later = outliers.iter().filter(|&&index| index > 0 || !self.is_first_slow()).count();
        if later > 0 {
            let count = self.seconds.len();
            let rounds = if later == 1 { "round is an outlier" } else { "rounds are outliers" };
            notes.push(format!(
                "{later} of {count} {rounds} (modified z-score over {OUTLIER_SCORE}): something else may have run."
            ));
        }
        notes
    }
}

/// The percentile of values that are sorted ascending, linearly between the two nearest ranks: position
/// `(n − 1) · percent / 100`, counted from 0. NaN for no values.
///
/// This is definition 7 of Hyndman & Fan, *Sample Quantiles in Statistical Packages*, 1996, and the default of NumPy.
#[must_use]
pub fn percentile(sorted: &[f64], percent: f64) -> f64 {
    let Some(last) = sorted.len().checked_sub(1) else { return f64::NAN };
    let position = last as f64 * (percent / 100.0).clamp(0.0, 1.0);
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "between 0 and the last index")]
    let below = position.floor() as usize;
    let above = (below + 1).min(last);
    sorted[below] + (sorted[above] - sorted[below]) * (position - below as f64)
}

fn sorted(values: &[f64]) -> Vec<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted
}

fn median_deviation(values: &[f64], median: f64) -> f64 {
    let deviations: Vec<f64> = values.iter().map(|value| (value - median).abs()).collect();
    percentile(&sorted(&deviations), 50.0)
}

/// How far a value lies from the median, in units that equal standard deviations of a normal distribution.
///
/// 0.6745 · (x − median) / MAD; where more than half of the values are equal and MAD is 0, the mean absolute deviation
/// takes its place with its own factor, 1 / 1.2533. 0 if all are equal and this one too.
fn modified_z_score(value: f64, sorted: &[f64]) -> f64 {
    let median = percentile(sorted, 50.0);
    let distance = value - median;
    let mad = median_deviation(sorted, median);
    let mean_deviation = sorted.iter().map(|value| (value - median).abs()).sum::<f64>() / sorted.len() as f64;
    let unit = if mad > 0.0 { mad / 0.6745 } else { 1.2533 * mean_deviation };
    if distance == 0.0 { 0.0 } else { distance / unit }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn samples(seconds: &[f64]) -> Samples {
        Samples::new(seconds.to_vec()).unwrap()
    }

    #[test]
    fn a_summary_matches_hand_computed_values() {
        let summary = samples(&[4.0, 1.0, 3.0, 2.0, 10.0]).summary();
        assert_eq!((summary.count, summary.min, summary.max), (5, 1.0, 10.0));
        assert_eq!((summary.mean, summary.median, summary.p50), (4.0, 3.0, 3.0));
        // Squares of −3, −2, −1, 0, 6 sum to 50; 50 / 4 = 12.5. Deviations from 3: 0, 1, 1, 2, 7.
        assert_eq!((summary.std, summary.mad), (Some(12.5_f64.sqrt()), 1.0));
        // Positions 3.6 and 3.96 in 1, 2, 3, 4, 10.
        assert!((summary.p90 - 7.6).abs() < 1e-12 && (summary.p99 - 9.76).abs() < 1e-12);
        assert_eq!(samples(&[2.0]).summary().std, None);
        assert_eq!(samples(&[1.0, 2.0]).median(), 1.5);
    }

    #[test]
    fn what_is_no_time_is_refused() {
        assert!(Samples::new(Vec::new()).is_none());
        assert!(Samples::new(vec![1.0, f64::NAN]).is_none());
        assert!(Samples::new(vec![f64::INFINITY]).is_none());
        assert!(percentile(&[], 50.0).is_nan());
    }

    #[test]
    fn the_median_interval_has_the_tabled_ranks() {
        let ends = |count: u32| {
            let interval = samples(&(1..=count).map(f64::from).collect::<Vec<_>>()).median_interval();
            interval.map(|interval| (interval.low, interval.high))
        };
        assert_eq!(ends(5), None);
        // Ranks of the sign test's 95 % interval: Conover, table A3, p = 0.5.
        assert_eq!(ends(6), Some((1.0, 6.0)));
        assert_eq!(ends(8), Some((1.0, 8.0)));
        assert_eq!(ends(9), Some((2.0, 8.0)));
        assert_eq!(ends(20), Some((6.0, 15.0)));
        assert_eq!(ends(30), Some((10.0, 21.0)));
    }

    #[test]
    fn rounds_end_when_they_are_many_close_and_level() {
        let level = [1.0, 1.01, 0.99, 1.0, 1.01, 0.99];
        assert!(samples(&level).is_stable(0.02));
        assert!(!samples(&level).is_stable(0.005));
        assert!(!samples(&level[..5]).is_stable(0.02));
        // Every round is close to the median, but the machine slows down.
        let falling = [1.0, 1.0, 1.0, 1.0, 1.03, 1.03, 1.03, 1.03];
        assert!(samples(&falling).is_stable(0.04) && !samples(&falling).is_stable(0.02));
        // A single hiccup among many does not matter.
        let mut hiccup = vec![1.0; 12];
        hiccup[5] = 9.0;
        assert!(samples(&hiccup).is_stable(0.01));
    }

    #[test]
    fn odd_rounds_are_named() {
        let calm = [1.0, 1.02, 0.99, 1.01, 1.0, 0.98, 1.03];
        assert_eq!(samples(&calm).notes(), Vec::<String>::new());
        let mut cold = calm.to_vec();
        cold.insert(0, 3.0);
        assert!(samples(&cold).is_first_slow());
        assert_eq!(samples(&cold).outliers(), [0]);
        assert_eq!(samples(&cold).notes().len(), 1);
        let mut busy = calm.to_vec();
        busy.push(3.0);
        assert!(!samples(&busy).is_first_slow());
        assert_eq!(samples(&busy).outliers(), [7]);
        assert!(samples(&busy).notes()[0].starts_with("1 of 8 round is an outlier"));
        // More than half are equal: MAD is 0, and the mean deviation decides.
        assert_eq!(samples(&[1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 5.0]).outliers(), [8]);
        assert_eq!(samples(&[1.0; 5]).outliers(), Vec::<usize>::new());
    }

    proptest! {
        #[test]
        fn a_summary_is_ordered_and_scales(values in prop::collection::vec(1e-6..1e3_f64, 1..60), factor in 0.01..100.0_f64) {
            let (one, other) = (samples(&values), samples(&values.iter().map(|v| v * factor).collect::<Vec<_>>()));
            let (a, b) = (one.summary(), other.summary());
            prop_assert!(a.min <= a.p50 && a.p50 <= a.p90 && a.p90 <= a.p99 && a.p99 <= a.max);
            prop_assert!(a.min <= a.mean + 1e-9 && a.mean <= a.max + 1e-9);
            prop_assert!((b.median - a.median * factor).abs() <= 1e-9 * b.median);
            prop_assert!((b.mad - a.mad * factor).abs() <= 1e-9 * b.max);
            if let Some(interval) = one.median_interval() {
                prop_assert!(interval.low <= interval.value && interval.value <= interval.high);
            }
        }
    }
}
