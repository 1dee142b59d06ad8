//! How far a figure would move if other rounds or items had been drawn: bootstrap intervals.
//!
//! Percentile intervals of the nonparametric bootstrap (Efron & Tibshirani, *An Introduction to the Bootstrap*, 1993,
//! ch. 13). The generator is seeded: the same numbers give the same interval on every machine.

use super::samples::percentile;

/// A figure and the interval around it; all finite, `low <= high`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Interval {
    /// The figure itself.
    pub value: f64,
    /// Lower end.
    pub low: f64,
    /// Upper end.
    pub high: f64,
}

impl Interval {
    /// Whether the interval holds a value.
    #[must_use]
    pub fn contains(&self, value: f64) -> bool {
        self.low <= value && value <= self.high
    }
}

/// How intervals are drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bootstrap {
    /// How often the items are drawn anew.
    pub resamples: usize,
    /// Share of the resamples inside the interval, such as 0.95.
    pub confidence: f64,
    /// Seed of the generator.
    pub seed: u64,
}

impl Default for Bootstrap {
    fn default() -> Self {
        Self { resamples: 2000, confidence: 0.95, seed: 0 }
    }
}

impl Bootstrap {
    /// The interval of a statistic over `items` items, which it gets as indices, drawn with replacement.
    ///
    /// What is drawn must be independent: where tiles of one slide resemble each other, an item is a slide. Resamples in
    /// which the statistic is not finite (a class was not drawn) are left out; `None` for fewer
    /// than two items, or if it is not finite over all items or in more than half of the resamples.
    #[must_use]
    pub fn interval(&self, items: usize, statistic: impl Fn(&[usize]) -> f64) -> Option<Interval> {
        self.intervals(items, |drawn| vec![statistic(drawn)]).pop().flatten()
    }

    /// [`Self::interval`] of each of several statistics, which are computed together on the same draws.
    #[must_use]
    pub fn intervals(&self, items: usize, statistics: impl Fn(&[usize]) -> Vec<f64>) -> Vec<Option<Interval>> {
        let mut drawn: Vec<usize> = (0..items).collect();
        let values = statistics(&drawn);
        // One alone tells nothing of how others would differ.
        if items < 2 {
            return vec![None; values.len()];
        }
        let mut random = SplitMix64(self.seed);
        let mut resampled = vec![Vec::with_capacity(self.resamples); values.len()];
        for _ in 0..self.resamples {
            drawn.fill_with(|| random.below(items));
            resampled.iter_mut().zip(statistics(&drawn)).for_each(|(resampled, value)| resampled.push(value));
        }
        values.into_iter().zip(resampled).map(|(value, resampled)| self.around(value, resampled)).collect()
    }

    fn around(&self, value: f64, mut resampled: Vec<f64>) -> Option<Interval> {
        resampled.retain(|value| value.is_finite());
        if !value.is_finite() || resampled.is_empty() || resampled.len() * 2 < self.resamples {
            return None;
        }
        resampled.sort_by(f64::total_cmp);
        let tail = 50.0 * (1.0 - self.confidence);
        Some(Interval { value, low: percentile(&resampled, tail), high: percentile(&resampled, 100.0 - tail) })
    }

    /// How many times `base` is longer than `other`: the median of the rounds' own ratios `base[i] / other[i]`.
    ///
    /// Round `i` of both must have been taken next to each other: what slows the machine for a while then slows both,
    /// and the ratio stays. Rounds are drawn as pairs. `None` for lists that differ in length or have fewer than two, or times that
    /// are not above 0.
    #[must_use]
    pub fn ratio(&self, base: &[f64], other: &[f64]) -> Option<Interval> {
        let is_time = |value: &f64| value.is_finite() && *value > 0.0;
        if base.len() != other.len() || !base.iter().chain(other).all(is_time) {
            return None;
        }
        let ratios: Vec<f64> = base.iter().zip(other).map(|(base, other)| base / other).collect();
        self.interval(ratios.len(), |rounds| {
            let mut drawn: Vec<f64> = rounds.iter().map(|&round| ratios[round]).collect();
            drawn.sort_by(f64::total_cmp);
            percentile(&drawn, 50.0)
        })
    }

    /// How many times the median of `other` is that of `base`, for figures that were taken apart, as in two runs: both are
    /// drawn on their own. What changed for a whole run is in the ratio, not in the interval. `None` if one is empty or
    /// figures are not above 0.
    #[must_use]
    pub fn unpaired_ratio(&self, base: &[f64], other: &[f64]) -> Option<Interval> {
        let is_rate = |value: &f64| value.is_finite() && *value > 0.0;
        if base.is_empty() || other.is_empty() || !base.iter().chain(other).all(is_rate) {
            return None;
        }
        let median = |values: &mut Vec<f64>| {
            values.sort_by(f64::total_cmp);
            percentile(values, 50.0)
        };
        let value = median(&mut other.to_vec()) / median(&mut base.to_vec());
        let mut random = SplitMix64(self.seed);
        let mut draw = |from: &[f64]| median(&mut from.iter().map(|_| from[random.below(from.len())]).collect());
        let mut ratios: Vec<f64> = (0..self.resamples).map(|_| draw(other) / draw(base)).collect();
        ratios.sort_by(f64::total_cmp);
        let tail = 50.0 * (1.0 - self.confidence);
        Some(Interval { value, low: percentile(&ratios, tail), high: percentile(&ratios, 100.0 - tail) })
    }

    /// The paired difference `other − base` of a metric over the same items: both are computed on every draw, so that
    /// what is hard for both cancels.
    #[must_use]
    pub fn difference(
        &self,
        items: usize,
        base: impl Fn(&[usize]) -> f64,
        other: impl Fn(&[usize]) -> f64,
    ) -> Option<Interval> {
        self.interval(items, |drawn| other(drawn) - base(drawn))
    }
}

/// Steele, Lea & Flood, *Fast Splittable Pseudorandom Number Generators*, 2014.
struct SplitMix64(u64);

impl SplitMix64 {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// An index below `end`, by the high half of the product (Lemire 2019); its bias of `end` / 2⁶⁴ is nothing here.
    fn below(&mut self, end: usize) -> usize {
        #[expect(clippy::cast_possible_truncation, reason = "less than `end`")]
        let index = ((u128::from(self.next()) * end as u128) >> 64) as usize;
        index
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_generator_is_splitmix64() {
        // The published reference sequence for seed 1234567.
        let mut random = SplitMix64(1_234_567);
        assert_eq!(random.next(), 6_457_827_717_110_365_317);
        assert_eq!(random.next(), 3_203_168_211_198_807_973);
        let mut counts = [0_u32; 5];
        (0..5000).for_each(|_| counts[random.below(5)] += 1);
        assert!(counts.iter().all(|count| (880..1120).contains(count)), "{counts:?}");
    }

    #[test]
    fn statistics_of_one_pass_have_their_own_intervals() {
        let (a, b) = ([1.0, 2.0, 4.0, 8.0, 9.0], [3.0, f64::NAN, 1.0, 0.0, 2.0]);
        let mean = |of: &[f64; 5], drawn: &[usize]| drawn.iter().map(|&item| of[item]).sum::<f64>() / 5.0;
        let bootstrap = Bootstrap::default();
        let both = bootstrap.intervals(5, |drawn| vec![mean(&a, drawn), mean(&b, drawn)]);
        assert_eq!(both, [bootstrap.interval(5, |drawn| mean(&a, drawn)), None]);
        assert!(both[0].is_some());
        assert_eq!(bootstrap.intervals(0, |_| vec![1.0, 2.0]), [None, None]);
    }

    #[test]
    fn a_ratio_ignores_what_slows_both() {
        let drift: Vec<f64> = (0..20).map(|round| 1.0 + f64::from(round % 7) * 0.3).collect();
        let base: Vec<f64> = drift.iter().map(|drift| 3.0 * drift).collect();
        let ratio = Bootstrap::default().ratio(&base, &drift).unwrap();
        assert!((ratio.value - 3.0).abs() < 1e-12 && (ratio.high - ratio.low).abs() < 1e-12, "{ratio:?}");
        let noisy: Vec<f64> = base.iter().enumerate().map(|(i, t)| t * (1.0 + 0.1 * (i % 3) as f64)).collect();
        let ratio = Bootstrap::default().ratio(&noisy, &drift).unwrap();
        assert!(ratio.low < 3.3 && ratio.contains(3.3) && ratio.contains(ratio.value) && ratio.high <= 3.6 + 1e-12);
    }

    #[test]
    fn an_unpaired_ratio_is_of_medians_and_knows_the_noise_of_both() {
        let bootstrap = Bootstrap::default();
        let (steady, double) = ([10.0, 10.1, 9.9, 10.0, 10.0], [20.0, 20.2, 19.8, 20.0, 20.0, 20.0]);
        let ratio = bootstrap.unpaired_ratio(&steady, &double).unwrap();
        assert_eq!(ratio.value, 2.0);
        // 19.8 / 10.1 and 20.2 / 9.9 are the most that can be drawn.
        assert!(ratio.low >= 1.96 && ratio.low < 2.0 && ratio.high > 2.0 && ratio.high <= 2.041, "{ratio:?}");
        let same = bootstrap.unpaired_ratio(&steady, &steady).unwrap();
        assert!(same.value == 1.0 && same.low < 1.0 && same.high > 1.0, "drawn apart: {same:?}");
        assert_eq!(bootstrap.unpaired_ratio(&[], &steady), None);
        assert_eq!(bootstrap.unpaired_ratio(&steady, &[0.0]), None);
    }

    #[test]
    fn what_has_no_ratio_has_none() {
        let bootstrap = Bootstrap::default();
        assert_eq!(bootstrap.ratio(&[], &[]), None);
        assert_eq!(bootstrap.ratio(&[1.0], &[1.0, 2.0]), None);
        assert_eq!(bootstrap.ratio(&[1.0], &[0.0]), None);
        assert_eq!(bootstrap.ratio(&[f64::NAN], &[1.0]), None);
    }

    #[test]
    fn the_interval_of_a_mean_has_the_width_of_theory() {
        // 400 values 0 and 1, half each: the mean's standard error is 0.5 / 20 = 0.025, ±1.96 of it the interval.
        let mean = |drawn: &[usize]| drawn.iter().filter(|&&item| item % 2 == 0).count() as f64 / drawn.len() as f64;
        let interval = Bootstrap::default().interval(400, mean).unwrap();
        assert_eq!(interval.value, 0.5);
        // 2,000 resamples know the ends to about ±0.004.
        assert!((interval.low - 0.451).abs() < 0.006 && (interval.high - 0.549).abs() < 0.006, "{interval:?}");
    }

    #[test]
    fn a_paired_difference_is_tighter_than_two_intervals() {
        // Both are right on the same items but for one: the difference is certain where each alone is not.
        let share = |wrong: usize| move |d: &[usize]| d.iter().filter(|&&i| i >= wrong).count() as f64 / d.len() as f64;
        let bootstrap = Bootstrap::default();
        let difference = bootstrap.difference(100, share(30), share(31)).unwrap();
        assert!((difference.value + 0.01).abs() < 1e-12 && difference.high <= 0.0 && difference.low >= -0.05);
        assert_eq!(bootstrap.difference(100, share(30), share(30)).unwrap().high, 0.0);
    }

    #[test]
    fn undefined_resamples_are_left_out() {
        let bootstrap = Bootstrap::default();
        assert_eq!(bootstrap.interval(5, |_| f64::NAN), None);
        // Defined only if item 0 was drawn, which is so in 67 % of the resamples.
        let with_first = |drawn: &[usize]| if drawn.contains(&0) { 1.0 } else { f64::NAN };
        assert!(bootstrap.interval(5, with_first).is_some());
        // Items 0 to 4 all drawn: in 4 %.
        let with_all = |drawn: &[usize]| if (0..5).all(|item| drawn.contains(&item)) { 1.0 } else { f64::NAN };
        assert_eq!(bootstrap.interval(5, with_all), None);
    }

    proptest! {
        #[test]
        fn intervals_are_ordered_and_repeatable(times in prop::collection::vec((0.1..10.0_f64, 0.1..10.0_f64), 2..30)) {
            let (base, other): (Vec<f64>, Vec<f64>) = times.into_iter().unzip();
            let bootstrap = Bootstrap { resamples: 200, ..Bootstrap::default() };
            let ratio = bootstrap.ratio(&base, &other).unwrap();
            prop_assert!(ratio.low <= ratio.high);
            prop_assert_eq!(bootstrap.ratio(&base, &other), Some(ratio));
        }
    }
}
