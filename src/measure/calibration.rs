//! Whether a model is right as often as it says.

/// Bins of confidence, as in the paper's experiments.
pub const CALIBRATION_BINS: usize = 15;

/// Predictions by their confidence, in bins of equal width: (0, 1/15], (1/15, 2/15] and so on.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Calibration {
    bins: [Bin; CALIBRATION_BINS],
}

/// Predictions of about one confidence.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Bin {
    /// Predictions.
    pub items: u64,
    /// How many of them are right.
    pub right: u64,
    /// Sum of their confidences.
    confidence: f64,
}

impl Bin {
    /// Mean confidence, 0–1; `None` for no predictions.
    #[must_use]
    pub fn confidence(&self) -> Option<f64> {
        (self.items > 0).then(|| self.confidence / self.items as f64)
    }

    /// Share that is right; `None` for no predictions.
    #[must_use]
    pub fn accuracy(&self) -> Option<f64> {
        (self.items > 0).then(|| self.right as f64 / self.items as f64)
    }
}

impl Calibration {
    /// Adds a prediction of a confidence of 0–1, `times` times.
    pub fn add(&mut self, confidence: f64, is_right: bool, times: u64) {
        let bin = &mut self.bins[bin_of(confidence)];
        bin.items += times;
        bin.right += if is_right { times } else { 0 };
        bin.confidence += confidence * times as f64;
    }

    /// The bins, from the lowest confidence to the highest.
    #[must_use]
    pub fn bins(&self) -> &[Bin] {
        &self.bins
    }

    /// Expected calibration error, Σ |Bₘ|/n · |acc(Bₘ) − conf(Bₘ)| (Guo et al., *On Calibration of Modern Neural
    /// Networks*, ICML 2017, equation 3); `None` for no predictions.
    #[must_use]
    pub fn error(&self) -> Option<f64> {
        let items: u64 = self.bins.iter().map(|bin| bin.items).sum();
        let gap: f64 = self.bins.iter().map(|bin| (bin.right as f64 - bin.confidence).abs()).sum();
        (items > 0).then(|| gap / items as f64)
    }
}

fn bin_of(confidence: f64) -> usize {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "held within the bins")]
    let bin = ((confidence * CALIBRATION_BINS as f64).ceil() - 1.0).clamp(0.0, CALIBRATION_BINS as f64 - 1.0) as usize;
    bin
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_error_matches_hand_computed_values() {
        let mut calibration = Calibration::default();
        assert_eq!(calibration.error(), None);
        // Bin (14/15, 1]: three of confidence 0.95, 0.97 and 1, two right: |2 − 2.92|. Bin (8/15, 9/15]: one of 0.6,
        // right, twice: |2 − 1.2|. Together (0.92 + 0.8) / 5.
        calibration.add(0.95, true, 1);
        calibration.add(0.97, true, 1);
        calibration.add(1.0, false, 1);
        calibration.add(0.6, true, 2);
        assert!((calibration.error().unwrap() - 1.72 / 5.0).abs() < 1e-12);
        let bins = calibration.bins();
        assert_eq!((bins[14].items, bins[14].accuracy()), (3, Some(2.0 / 3.0)));
        assert_eq!((bins[8].items, bins[8].confidence()), (2, Some(0.6)));
        assert_eq!((bins[0].confidence(), bins[0].accuracy()), (None, None));
    }

    #[test]
    fn a_bin_holds_its_upper_end() {
        assert_eq!([0.0, 0.01, 1.0 / 15.0, 0.0667, 0.5, 1.0].map(bin_of), [0, 0, 0, 1, 7, 14]);
    }
}
