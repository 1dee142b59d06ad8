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

    /// Items of a reference class that were predicted as a class; both below `classes`.
    #[must_use]
    pub fn count(&self, reference: usize, predicted: usize) -> u64 {
        self.counts[reference * self.classes + predicted]
    }

    /// What was counted by class.
    #[must_use]
    pub fn class_counts(&self) -> ClassCounts {
        let mut sums = ClassCounts::new(self.classes);
        for reference in 0..self.classes {
            for predicted in 0..self.classes {
                sums.add_many(reference, Some(predicted), self.count(reference, predicted));
            }
        }
        sums
    }

    /// [`ClassCounts::accuracy`].
    #[must_use]
    pub fn accuracy(&self) -> Option<f64> {
        self.class_counts().accuracy()
    }

    /// [`ClassCounts::balanced_accuracy`].
    #[must_use]
    pub fn balanced_accuracy(&self) -> Option<f64> {
        self.class_counts().balanced_accuracy()
    }

    /// [`ClassCounts::dice`].
    #[must_use]
    pub fn dice(&self) -> Vec<Option<f64>> {
        self.class_counts().dice()
    }

    /// Mean Dice coefficient of the classes that occur; `None` if none does.
    #[must_use]
    pub fn mean_dice(&self) -> Option<f64> {
        mean_of_some(&self.dice())
    }
}

/// How many items each class has in a reference, in a prediction and in both: all that figures by class need, in a
/// number for each class where [`Confusion`] has one for each pair.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClassCounts {
    both: Vec<u64>,
    reference: Vec<u64>,
    predicted: Vec<u64>,
}

impl ClassCounts {
    /// Nothing counted yet.
    #[must_use]
    pub fn new(classes: usize) -> Self {
        Self { both: vec![0; classes], reference: vec![0; classes], predicted: vec![0; classes] }
    }

    /// Counts `items` items; without a predicted class they are wrong, and in no class's prediction.
    pub fn add_many(&mut self, reference: usize, predicted: Option<usize>, items: u64) {
        self.reference[reference] += items;
        if let Some(predicted) = predicted {
            self.predicted[predicted] += items;
            self.both[reference] += if reference == predicted { items } else { 0 };
        }
    }

    /// Adds what another of the same classes has counted, `times` times.
    pub fn merge(&mut self, other: &Self, times: u64) {
        let sums = [&mut self.both, &mut self.reference, &mut self.predicted];
        for (sums, counts) in sums.into_iter().zip([&other.both, &other.reference, &other.predicted]) {
            sums.iter_mut().zip(counts).for_each(|(sum, count)| *sum += times * count);
        }
    }

    /// Items that were counted.
    #[must_use]
    pub fn items(&self) -> u64 {
        self.reference.iter().sum()
    }

    /// Items of a class in the reference.
    #[must_use]
    pub fn support(&self, class: usize) -> u64 {
        self.reference[class]
    }

    /// Items of a class in the prediction.
    #[must_use]
    pub fn predicted(&self, class: usize) -> u64 {
        self.predicted[class]
    }

    /// Share of the items with the same class in both: accuracy, or the pixel agreement of two maps. `None` for no items.
    #[must_use]
    pub fn accuracy(&self) -> Option<f64> {
        share(self.both.iter().sum(), self.items())
    }

    /// Mean recall of the classes that occur in the reference; `None` if none does.
    #[must_use]
    pub fn balanced_accuracy(&self) -> Option<f64> {
        mean_of_some(&self.recall())
    }

    /// Cohen's kappa, (pₒ − pₑ) / (1 − pₑ), of which pₒ is the accuracy and pₑ what chance gives with the same shares of
    /// classes (Cohen, *Educational and Psychological Measurement* 20, 1960). `None` for no items, or if both know one
    /// and the same class only.
    #[must_use]
    pub fn kappa(&self) -> Option<f64> {
        let items = self.items() as f64;
        let pairs = self.reference.iter().zip(&self.predicted);
        let chance = pairs.map(|(a, b)| *a as f64 * *b as f64).sum::<f64>() / (items * items);
        let kappa = (self.accuracy()? - chance) / (1.0 - chance);
        kappa.is_finite().then_some(kappa)
    }

    /// Share of each class's predictions that are right; `None` for a class that was never predicted.
    #[must_use]
    pub fn precision(&self) -> Vec<Option<f64>> {
        self.by_class(|class| share(self.both[class], self.predicted[class]))
    }

    /// Share of each class's items that were found; `None` for a class that does not occur in the reference.
    #[must_use]
    pub fn recall(&self) -> Vec<Option<f64>> {
        self.by_class(|class| share(self.both[class], self.reference[class]))
    }

    /// Dice coefficient of each class, 2·|A∩B| / (|A| + |B|), which is F1, the harmonic mean of precision and recall;
    /// `None` for a class that occurs in neither.
    #[must_use]
    pub fn dice(&self) -> Vec<Option<f64>> {
        self.by_class(|class| share(2 * self.both[class], self.reference[class] + self.predicted[class]))
    }

    /// Intersection over union of each class, |A∩B| / |A∪B| (Jaccard's index); `None` for a class that occurs in neither.
    #[must_use]
    pub fn iou(&self) -> Vec<Option<f64>> {
        self.by_class(|class| share(self.both[class], self.reference[class] + self.predicted[class] - self.both[class]))
    }

    fn by_class(&self, of_class: impl Fn(usize) -> Option<f64>) -> Vec<Option<f64>> {
        (0..self.both.len()).map(of_class).collect()
    }
}

/// Mean of the values that there are; `None` if there is none.
#[must_use]
pub fn mean_of_some(values: &[Option<f64>]) -> Option<f64> {
    let (sum, count) = values.iter().flatten().fold((0.0, 0_u32), |(sum, count), value| (sum + value, count + 1));
    (count > 0).then(|| sum / f64::from(count))
}

fn share(part: u64, whole: u64) -> Option<f64> {
    (whole > 0).then(|| part as f64 / whole as f64)
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
    fn figures_by_class_match_hand_computed_values() {
        // Of class 0: 3 right, 1 as class 1. Of class 1: 2 right, 1 as class 0, 1 as nothing. Class 2: 1 as class 1.
        let mut counts = ClassCounts::new(3);
        for (reference, predicted, items) in
            [(0, Some(0), 3), (0, Some(1), 1), (1, Some(1), 2), (1, Some(0), 1), (1, None, 1), (2, Some(1), 1)]
        {
            counts.add_many(reference, predicted, items);
        }
        assert_eq!((counts.items(), counts.support(1), counts.predicted(1)), (9, 4, 4));
        assert_eq!(counts.precision(), [Some(0.75), Some(0.5), None]);
        assert_eq!(counts.recall(), [Some(0.75), Some(0.5), Some(0.0)]);
        assert_eq!(counts.dice(), [Some(0.75), Some(0.5), Some(0.0)]);
        assert_eq!(counts.iou(), [Some(3.0 / 5.0), Some(2.0 / 6.0), Some(0.0)]);
        // pₒ = 5/9, pₑ = (4·4 + 4·4 + 1·0)/81 = 32/81: (45 − 32)/(81 − 32).
        assert!((counts.kappa().unwrap() - 13.0 / 49.0).abs() < 1e-15);
        let mut twice = counts.clone();
        twice.merge(&counts, 2);
        assert_eq!((twice.items(), twice.dice(), twice.kappa()), (27, counts.dice(), counts.kappa()));
    }

    #[test]
    fn kappa_is_nothing_where_chance_says_all() {
        let mut counts = ClassCounts::new(2);
        assert_eq!(counts.kappa(), None);
        counts.add_many(0, Some(0), 5);
        assert_eq!((counts.accuracy(), counts.kappa()), (Some(1.0), None));
        counts.add_many(1, Some(1), 5);
        assert_eq!(counts.kappa(), Some(1.0));
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
    }
}
