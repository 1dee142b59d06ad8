//! Ranges of activations, read off calibration tiles: a histogram of fixed size per value, and a range by a method.

use std::collections::BTreeMap;

use crate::onnx::Tensor;

/// Bins of a histogram, half of them below zero.
const BINS: usize = 8192;

/// Levels of a byte.
const LEVELS: usize = 256;

/// Clipping thresholds that [`RangeMethod::Entropy`] compares.
const THRESHOLDS: usize = 96;

/// How a range is chosen from what was seen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RangeMethod {
    /// All that was seen.
    MinMax,
    /// The share of values, such as 0.9999, that the range holds; as much is cut off below as above.
    Percentile(f64),
    /// The clipping after which the distribution of the bytes says most about that of the values: least
    /// Kullback-Leibler divergence (Migacz, 8-bit inference with TensorRT, 2017).
    Entropy,
}

/// The smallest and the largest value that a byte must be able to hold.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Range {
    /// Smallest; not above `max`.
    pub min: f32,
    /// Largest.
    pub max: f32,
}

/// A value whose range can't be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RangeError {
    /// No calibration tile gave it.
    #[error("the range of {value:?} was not measured")]
    NotMeasured {
        /// The value.
        value: String,
    },
    /// A calibration tile made it NaN or infinite.
    #[error("{value:?} held NaN or infinity on a calibration tile")]
    NotFinite {
        /// The value.
        value: String,
    },
    /// It never differed from zero by what a float can scale, so that no scale can be told.
    #[error("{value:?} was zero on every calibration tile")]
    Zero {
        /// The value.
        value: String,
    },
}

/// A calibration result: the range of each value, and how much of it a byte loses.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ActivationRanges(BTreeMap<String, Measured>);

#[derive(Clone, Copy, Debug, PartialEq)]
struct Measured {
    /// `None` if NaN or infinity was seen.
    range: Option<Range>,
    noise: f64,
}

impl ActivationRanges {
    /// Sets the range of a value, as when it is known without measuring; its noise counts as none.
    pub fn insert(&mut self, value: &str, range: Range) {
        let finite = range.min.is_finite() && range.max.is_finite() && range.min <= range.max;
        self.0.insert(value.to_owned(), Measured { range: finite.then_some(range), noise: 0.0 });
    }

    /// The range of a value.
    ///
    /// # Errors
    /// [`RangeError`] if it was not measured, or was not finite.
    pub fn get(&self, value: &str) -> Result<Range, RangeError> {
        let measured = self.0.get(value).ok_or_else(|| RangeError::NotMeasured { value: value.to_owned() })?;
        measured.range.ok_or_else(|| RangeError::NotFinite { value: value.to_owned() })
    }

    /// The mean square of what rounding to a byte and clipping to the range change, by the value's mean square; 0 for
    /// values that were not measured.
    #[must_use]
    pub fn noise(&self, value: &str) -> f64 {
        self.0.get(value).map_or(0.0, |measured| measured.noise)
    }
}

/// Collects what values a model's activations take, tile by tile, in fixed memory.
#[derive(Clone, Debug, Default)]
pub struct RangeCollector(BTreeMap<String, Histogram>);

impl RangeCollector {
    /// Takes in one tensor of the value called `value`; tensors that hold no floats are passed over.
    pub fn observe(&mut self, value: &str, tensor: &Tensor) {
        if let Some(floats) = tensor.to_f32() {
            self.0.entry(value.to_owned()).or_default().extend(&floats);
        }
    }

    /// The ranges of all values seen, by one method; may be asked for several.
    #[must_use]
    pub fn ranges(&self, method: RangeMethod) -> ActivationRanges {
        let seen = self.0.iter().filter(|(_, histogram)| histogram.count > 0 || !histogram.finite);
        let measure = |histogram: &Histogram| {
            let range = histogram.finite.then(|| histogram.range(method));
            Measured { range, noise: range.map_or(0.0, |range| histogram.noise(range)) }
        };
        ActivationRanges(seen.map(|(value, histogram)| (value.clone(), measure(histogram))).collect())
    }
}

/// Counts of values but zero over `[-limit, limit)`; when one lies outside, the limit doubles and bins merge in pairs.
#[derive(Clone, Debug)]
struct Histogram {
    bins: Vec<u64>,
    limit: f32,
    min: f32,
    max: f32,
    count: u64,
    square: f64,
    finite: bool,
}

impl Default for Histogram {
    fn default() -> Self {
        let (min, max) = (f32::INFINITY, f32::NEG_INFINITY);
        Self { bins: vec![0; BINS], limit: f32::MIN_POSITIVE, min, max, count: 0, square: 0.0, finite: true }
    }
}

impl Histogram {
    fn extend(&mut self, values: &[f32]) {
        let mut peak = 0.0_f32;
        for value in values {
            if !value.is_finite() {
                self.finite = false;
                return;
            }
            peak = peak.max(value.abs());
            self.min = self.min.min(*value);
            self.max = self.max.max(*value);
        }
        self.grow(peak);
        let per_unit = f64::from(u16::try_from(BINS / 2).unwrap_or(u16::MAX)) / f64::from(self.limit);
        // Zero is always kept exactly, and rectifiers give it in masses: it would hide what happens to the others.
        for value in values.iter().filter(|value| **value != 0.0) {
            let value = f64::from(*value);
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "within the bins after grow")]
            let bin = ((value + f64::from(self.limit)) * per_unit) as usize;
            self.bins[bin.min(BINS - 1)] += 1;
            self.square += value * value;
        }
        self.count += values.len() as u64;
    }

    /// Doubles the limit until `peak` lies within.
    fn grow(&mut self, peak: f32) {
        while peak > self.limit {
            // The largest float is its own limit: nothing lies beyond.
            self.limit = (self.limit * 2.0).min(f32::MAX);
            let mut merged = vec![0; BINS];
            for (bin, count) in self.bins.iter().enumerate() {
                merged[(bin + BINS / 2) / 2] += count;
            }
            self.bins = merged;
        }
    }

    fn width(&self) -> f64 {
        f64::from(self.limit) * 2.0 / BINS as f64
    }

    /// The value in the middle of a bin.
    fn middle(&self, bin: usize) -> f64 {
        (bin as f64 + 0.5) * self.width() - f64::from(self.limit)
    }

    fn range(&self, method: RangeMethod) -> Range {
        let (low, high) = match method {
            RangeMethod::MinMax => return Range { min: self.min, max: self.max },
            RangeMethod::Percentile(share) => self.holding(share),
            RangeMethod::Entropy => self.least_divergent(),
        };
        #[expect(clippy::cast_possible_truncation, reason = "between two floats")]
        let inside = |value: f64| value.clamp(f64::from(self.min), f64::from(self.max)) as f32;
        Range { min: inside(low), max: inside(high) }
    }

    /// Where as much of the values is cut off below as above, so that `share` is left.
    fn holding(&self, share: f64) -> (f64, f64) {
        let outside = (1.0 - share.clamp(0.0, 1.0)) / 2.0 * self.count as f64;
        let low = self.passing(outside, 0..BINS).unwrap_or(0);
        let high = self.passing(outside, (0..BINS).rev()).unwrap_or(BINS - 1);
        (self.middle(low) - self.width() / 2.0, self.middle(high) + self.width() / 2.0)
    }

    /// The bin at which more than `count` values have been passed.
    fn passing(&self, count: f64, mut bins: impl Iterator<Item = usize>) -> Option<usize> {
        let mut passed = 0.0;
        bins.find(|bin| {
            passed += self.bins[*bin] as f64;
            passed > count
        })
    }

    /// The range, clipped to some threshold on either side of zero, whose bytes diverge least from the values.
    fn least_divergent(&self) -> (f64, f64) {
        let peak = f64::from(self.min.abs().max(self.max.abs()));
        let clipped = |part: usize| {
            let threshold = peak * part as f64 / THRESHOLDS as f64;
            (f64::from(self.min).min(0.0).max(-threshold), f64::from(self.max).max(0.0).min(threshold))
        };
        // Below a sixteenth of the peak no real activation is clipped, and bins would be wider than bytes.
        let candidates = (THRESHOLDS / 16..=THRESHOLDS).map(clipped);
        let rated = candidates.map(|range| (range, self.divergence(range)));
        let best = rated.min_by(|a, b| a.1.total_cmp(&b.1));
        best.map_or((f64::from(self.min), f64::from(self.max)), |(range, _)| range)
    }

    /// Kullback-Leibler divergence of the values, clipped, from what bytes over `range` tell of them.
    fn divergence(&self, (low, high): (f64, f64)) -> f64 {
        let step = (high - low) / (LEVELS - 1) as f64;
        if step <= 0.0 {
            return f64::INFINITY;
        }
        let first = self.bin_of(low);
        let last = self.bin_of(high);
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a level of a byte")]
        let level = |bin: usize| ((self.middle(bin) - low) / step).round().clamp(0.0, (LEVELS - 1) as f64) as usize;
        let (mut held, mut filled) = ([0.0_f64; LEVELS], [0.0_f64; LEVELS]);
        for bin in first..=last {
            held[level(bin)] += self.bins[bin] as f64;
            filled[level(bin)] += f64::from(u8::from(self.bins[bin] > 0));
        }
        let below: u64 = self.bins[..first].iter().sum();
        let above: u64 = self.bins[last + 1..].iter().sum();
        let inside = held.iter().sum::<f64>().max(1.0);
        let all = inside + (below + above) as f64;
        let mut divergence = 0.0;
        for bin in first..=last {
            // What was clipped is counted at the ends of the values, not of the bytes: that is the price of clipping.
            let clipped = if bin == first { below } else { 0 } + if bin == last { above } else { 0 };
            let value = (self.bins[bin] + clipped) as f64 / all;
            if value > 0.0 {
                let byte = if self.bins[bin] > 0 { held[level(bin)] / filled[level(bin)] / inside } else { 0.0 };
                divergence += value * (value / byte.max(1e-12)).ln();
            }
        }
        divergence
    }

    fn bin_of(&self, value: f64) -> usize {
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped to the bins")]
        let bin = ((value + f64::from(self.limit)) / self.width()).clamp(0.0, (BINS - 1) as f64) as usize;
        bin
    }

    /// See [`ActivationRanges::noise`]: rounding to a step loses a twelfth of its square.
    fn noise(&self, range: Range) -> f64 {
        let (low, high) = (f64::from(range.min.min(0.0)), f64::from(range.max.max(0.0)));
        let step = (high - low) / (LEVELS - 1) as f64;
        let lost = |bin: usize| {
            let value = self.middle(bin);
            let clipped = (low - value).max(value - high).max(0.0) - self.width() / 2.0;
            if clipped > 0.0 { clipped * clipped } else { step * step / 12.0 }
        };
        let total: f64 = self.bins.iter().enumerate().map(|(bin, count)| *count as f64 * lost(bin)).sum();
        if self.square > 0.0 { total / self.square } else { 0.0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn collected(batches: &[&[f32]]) -> RangeCollector {
        let mut collector = RangeCollector::default();
        for batch in batches {
            collector.observe("x", &Tensor::f32(&[batch.len()], batch.to_vec()));
        }
        collector
    }

    /// A bell of 60,000 values within ±3 with ends like a normal distribution's.
    fn bell() -> Vec<f32> {
        (0..60_000_u32).map(|i| (0..12).map(|k| ((i * 12 + k) as f32 * 0.618_034).fract()).sum::<f32>() - 6.0).collect()
    }

    #[test]
    fn smallest_and_largest_are_found_over_all_batches() {
        let ranges = collected(&[&[0.5, 1.0], &[-2.0], &[1e6]]).ranges(RangeMethod::MinMax);
        assert_eq!(ranges.get("x"), Ok(Range { min: -2.0, max: 1e6 }));
        assert!(matches!(ranges.get("y"), Err(RangeError::NotMeasured { .. })));
    }

    #[test]
    fn a_growing_histogram_loses_no_value() {
        let mut histogram = Histogram::default();
        for power in -30..30 {
            histogram.extend(&[2.0_f32.powi(power), -(2.0_f32.powi(power))]);
        }
        histogram.extend(&[0.0, f32::MAX, f32::MIN]);
        assert_eq!((histogram.bins.iter().sum::<u64>(), histogram.count, histogram.bins.len()), (122, 123, BINS));
        assert_eq!(histogram.range(RangeMethod::Percentile(1.0)), Range { min: f32::MIN, max: f32::MAX });
    }

    #[test]
    fn a_percentile_cuts_outliers_off() {
        let mut values = bell();
        values.push(1000.0);
        let share = |share| collected(&[&values]).ranges(RangeMethod::Percentile(share)).get("x").unwrap();
        assert_eq!(share(1.0).max, 1000.0);
        // Bins are 2 · 1024 / 8192 = 0.25 wide once 1000 was seen.
        assert!(share(0.9999).max < 6.25 && share(0.9999).min > -6.25, "{:?}", share(0.9999));
        assert!(share(0.999).max <= share(0.9999).max);
    }

    #[test]
    fn entropy_clips_what_is_rare_and_far_and_keeps_what_is_even() {
        let mut values = bell();
        values.extend([40.0, -40.0]);
        let clipped = collected(&[&values]).ranges(RangeMethod::Entropy).get("x").unwrap();
        assert!(clipped.max < 10.0 && clipped.max > 2.0 && clipped.min < -2.0, "{clipped:?}");
        let even: Vec<f32> = (0..4096_u16).map(|i| f32::from(i) / 4095.0).collect();
        let kept = collected(&[&even]).ranges(RangeMethod::Entropy).get("x").unwrap();
        assert!(kept.max > 0.95 && kept.min == 0.0, "{kept:?}");
        let mut rectified = vec![0.0; 100_000];
        rectified.extend(&even);
        assert_eq!(collected(&[&rectified]).ranges(RangeMethod::Entropy).get("x").unwrap(), kept);
    }

    #[test]
    fn what_is_not_finite_is_told() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let ranges = collected(&[&[1.0], &[bad, 2.0], &[3.0]]).ranges(RangeMethod::Entropy);
            assert_eq!(ranges.get("x"), Err(RangeError::NotFinite { value: "x".to_owned() }));
        }
    }

    #[test]
    fn constants_and_zeros_have_a_range() {
        for method in [RangeMethod::MinMax, RangeMethod::Percentile(0.999), RangeMethod::Entropy] {
            for constant in [0.0, 2.5, -1e-3] {
                let range = collected(&[&[constant; 9]]).ranges(method).get("x").unwrap();
                assert_eq!((range.min, range.max), (constant, constant), "{method:?}");
            }
        }
        assert_eq!(collected(&[&[]]).ranges(RangeMethod::MinMax), ActivationRanges::default());
    }

    #[test]
    fn noise_is_a_twelfth_of_the_squared_step() {
        let even: Vec<f32> = (0..10_000_u16).map(|i| f32::from(i) / 9_999.0).collect();
        let noise = collected(&[&even]).ranges(RangeMethod::MinMax).noise("x");
        let expected = (1.0 / 255.0_f64).powi(2) / 12.0 * 3.0;
        assert!((noise / expected - 1.0).abs() < 0.05, "{noise} {expected}");
    }
}
