//! How right a variant is against labels, and how much two class maps overlap.

/// How often each class of a reference met each class of a prediction: labels and what was predicted, or the class maps
/// of two variants. Items are tiles or pixels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Confusion {
    classes: usize,
    /// `[reference class, predicted class]`.
    counts: Vec<u64>,
    left_out: u64,
}

impl Confusion {
    /// Nothing counted yet.
    #[must_use]
    pub fn new(classes: usize) -> Self {
        Self { classes, counts: vec![0; classes * classes], left_out: 0 }
    }

    /// Counts a map against another, pixel by pixel; a pixel of a class from `classes` on is left out.
    #[must_use]
    pub fn of_maps(reference: &[u8], predicted: &[u8], classes: usize) -> Self {
        let mut confusion = Self::new(classes);
        for (&reference, &predicted) in reference.iter().zip(predicted) {
            confusion.add(usize::from(reference), usize::from(predicted));
        }
        confusion
    }

    /// Counts an item; one with a class that is none of `0..classes` is left out, and that is counted.
    pub fn add(&mut self, reference: usize, predicted: usize) {
        if reference < self.classes && predicted < self.classes {
            self.counts[reference * self.classes + predicted] += 1;
        } else {
            self.left_out += 1;
        }
    }

    /// Adds what another of the same classes has counted.
    pub fn merge(&mut self, other: &Self) {
        debug_assert_eq!(self.classes, other.classes, "confusions of different classes");
        self.counts.iter_mut().zip(&other.counts).for_each(|(sum, count)| *sum += count);
        self.left_out += other.left_out;
    }

    /// Items that were counted.
    #[must_use]
    pub fn items(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// Items that were left out.
    #[must_use]
    pub fn left_out(&self) -> u64 {
        self.left_out
    }

    /// Share of the items with the same class in both: accuracy, or the pixel agreement of two maps. `None` for no items.
    #[must_use]
    pub fn accuracy(&self) -> Option<f64> {
        let right: u64 = (0..self.classes).map(|class| self.both(class)).sum();
        share(right, self.items())
    }

    /// Mean recall of the classes that occur in the reference; `None` if none does.
    #[must_use]
    pub fn balanced_accuracy(&self) -> Option<f64> {
        mean((0..self.classes).filter_map(|class| share(self.both(class), self.in_reference(class))))
    }

    /// Dice coefficient of each class, 2·|A∩B| / (|A| + |B|); `None` for a class that occurs in neither.
    #[must_use]
    pub fn dice(&self) -> Vec<Option<f64>> {
        let of_class = |class| share(2 * self.both(class), self.in_reference(class) + self.in_prediction(class));
        (0..self.classes).map(of_class).collect()
    }

    /// Mean Dice coefficient of the classes that occur; `None` if none does.
    #[must_use]
    pub fn mean_dice(&self) -> Option<f64> {
        mean(self.dice().into_iter().flatten())
    }

    fn both(&self, class: usize) -> u64 {
        self.counts[class * self.classes + class]
    }

    fn in_reference(&self, class: usize) -> u64 {
        self.counts[class * self.classes..][..self.classes].iter().sum()
    }

    fn in_prediction(&self, class: usize) -> u64 {
        self.counts.iter().skip(class).step_by(self.classes).sum()
    }
}

/// Area under the ROC curve: the chance that a positive item scores above a negative one, ties counting half.
///
/// By the mean ranks of the positives (Hanley & McNeil, *Radiology* 143, 1982). `None` without both kinds, with a NaN
/// score or with lists that differ in length.
#[must_use]
pub fn auc(scores: &[f32], is_positive: &[bool]) -> Option<f64> {
    if scores.len() != is_positive.len() || scores.iter().any(|score| score.is_nan()) {
        return None;
    }
    let mut items: Vec<(f32, bool)> = scores.iter().copied().zip(is_positive.iter().copied()).collect();
    items.sort_by(|(a, _), (b, _)| a.total_cmp(b));
    let positives = items.iter().filter(|(_, is_positive)| *is_positive).count() as f64;
    let negatives = items.len() as f64 - positives;
    let (mut rank, mut rank_sum) = (0.0, 0.0);
    // 0 and −0 are equal scores but sort apart, so ties are told by comparison.
    for tied in items.chunk_by(|(a, _), (b, _)| a == b) {
        let tied_positives = tied.iter().filter(|(_, is_positive)| *is_positive).count() as f64;
        rank_sum += tied_positives * (rank + (tied.len() as f64 + 1.0) / 2.0);
        rank += tied.len() as f64;
    }
    let area = (rank_sum - positives * (positives + 1.0) / 2.0) / (positives * negatives);
    area.is_finite().then_some(area)
}

/// [`auc`] of each class against all others; `None` for a class that all or no items have.
///
/// `scores`: `[items, classes]`; `labels`: a class per item.
#[must_use]
pub fn auc_one_vs_rest(scores: &[f32], labels: &[usize], classes: usize) -> Vec<Option<f64>> {
    let of_class = |class| {
        let column: Vec<f32> = scores.iter().skip(class).step_by(classes).copied().collect();
        let is_positive: Vec<bool> = labels.iter().map(|&label| label == class).collect();
        auc(&column, &is_positive)
    };
    (0..classes).map(of_class).collect()
}

fn share(part: u64, whole: u64) -> Option<f64> {
    (whole > 0).then(|| part as f64 / whole as f64)
}

fn mean(values: impl Iterator<Item = f64>) -> Option<f64> {
    let (sum, count) = values.fold((0.0, 0_u32), |(sum, count), value| (sum + value, count + 1));
    (count > 0).then(|| sum / f64::from(count))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn metrics_of_maps_match_hand_computed_values() {
        // Class 0: 3 in the reference, 2 predicted, 2 in both. Class 1: 2, 3, 2. Class 2: absent. Class 9: left out.
        let confusion = Confusion::of_maps(&[0, 0, 0, 1, 1, 9], &[0, 0, 1, 1, 1, 0], 3);
        assert_eq!((confusion.items(), confusion.left_out()), (5, 1));
        assert_eq!(confusion.accuracy(), Some(0.8));
        assert_eq!(confusion.balanced_accuracy(), Some((2.0 / 3.0 + 1.0) / 2.0));
        assert_eq!(confusion.dice(), [Some(0.8), Some(0.8), None]);
        assert_eq!(confusion.mean_dice(), Some(0.8));
    }

    #[test]
    fn nothing_counted_has_no_metric() {
        let empty = Confusion::new(2);
        assert_eq!((empty.accuracy(), empty.balanced_accuracy(), empty.mean_dice()), (None, None, None));
        assert_eq!(Confusion::new(0).dice(), []);
    }

    #[test]
    fn balanced_accuracy_is_not_fooled_by_the_frequent_class() {
        let mut confusion = Confusion::new(2);
        (0..90).for_each(|_| confusion.add(0, 0));
        (0..10).for_each(|_| confusion.add(1, 0));
        assert_eq!((confusion.accuracy(), confusion.balanced_accuracy()), (Some(0.9), Some(0.5)));
    }

    #[test]
    fn areas_match_hand_computed_values() {
        assert_eq!(auc(&[0.1, 0.4, 0.35, 0.8], &[false, false, true, true]), Some(0.75));
        assert_eq!(auc(&[0.5, 0.5, 0.5], &[true, false, false]), Some(0.5));
        // Pairs of (0.2, 0.8) with (0.2, 0.1): a tie, a win, two wins.
        assert_eq!(auc(&[0.2, 0.8, 0.2, 0.1], &[true, true, false, false]), Some(0.875));
        assert_eq!(auc(&[0.0, -0.0], &[true, false]), Some(0.5));
        assert_eq!(auc(&[0.1, 0.2], &[true, true]), None);
        assert_eq!(auc(&[0.1, f32::NAN], &[true, false]), None);
        assert_eq!(auc(&[], &[]), None);
        assert_eq!(auc(&[0.1], &[]), None);
    }

    #[test]
    fn each_class_is_set_against_the_rest() {
        let scores = [0.8, 0.2, 0.0, 0.3, 0.7, 0.0, 0.6, 0.4, 0.0];
        assert_eq!(auc_one_vs_rest(&scores, &[0, 1, 0], 3), [Some(1.0), Some(1.0), None]);
        assert_eq!(auc_one_vs_rest(&scores, &[1, 0, 0], 3)[0], Some(0.0));
    }

    proptest! {
        #[test]
        fn counting_in_parts_is_counting_at_once(
            pixels in prop::collection::vec((0..4_u8, 0..4_u8), 0..200), cut in 0..200_usize,
        ) {
            let (a, b): (Vec<u8>, Vec<u8>) = pixels.into_iter().unzip();
            let cut = cut.min(a.len());
            let mut parts = Confusion::of_maps(&a[..cut], &b[..cut], 3);
            parts.merge(&Confusion::of_maps(&a[cut..], &b[cut..], 3));
            let whole = Confusion::of_maps(&a, &b, 3);
            prop_assert_eq!(&parts, &whole);
            prop_assert_eq!(whole.dice(), Confusion::of_maps(&b, &a, 3).dice());
            prop_assert_eq!(Confusion::of_maps(&a, &a, 3).accuracy().unwrap_or(1.0), 1.0);
        }

        #[test]
        fn the_area_counts_pairs(items in prop::collection::vec((0..6_u8, any::<bool>()), 2..40)) {
            let scores: Vec<f32> = items.iter().map(|(score, _)| f32::from(*score)).collect();
            let is_positive: Vec<bool> = items.iter().map(|(_, is_positive)| *is_positive).collect();
            let (mut won, mut pairs) = (0.0, 0.0);
            for (a, _) in items.iter().filter(|item| item.1) {
                for (b, _) in items.iter().filter(|item| !item.1) {
                    pairs += 1.0;
                    won += if a > b { 1.0 } else if a == b { 0.5 } else { 0.0 };
                }
            }
            match auc(&scores, &is_positive) {
                Some(area) => prop_assert!((area - won / pairs).abs() < 1e-12),
                None => prop_assert_eq!(pairs, 0.0),
            }
        }
    }
}
