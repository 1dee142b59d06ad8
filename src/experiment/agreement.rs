//! How much two models agree on the same tiles.

use ndarray::Axis;

use crate::inference::{Prediction, Session, SessionError, Task};
use crate::measure;

/// What a variant predicts, against what the original predicts.
#[derive(Clone, Debug, PartialEq)]
pub struct Agreement {
    /// Tiles compared.
    pub tiles: usize,
    /// Cosine of the outputs of each tile, in ascending order; NaN ones are left out.
    pub cosines: Vec<f64>,
    /// Greatest difference of any two outputs.
    pub max_abs_difference: f64,
    /// Share of tiles, or for maps of pixels, whose most probable class is the same; `None` for features.
    pub top1: Option<f64>,
    /// Of each class the Dice of both class maps; empty but for maps.
    pub dice: Vec<Option<f64>>,
    /// Tiles of which some class changes sides at the threshold; for maps by the mean over the tile.
    pub flips: usize,
    /// Outputs of the variant that are infinite or not a number.
    pub nonfinite: usize,
}

impl Agreement {
    /// Mean cosine; 0 if there is none.
    #[must_use]
    pub fn mean_cosine(&self) -> f64 {
        self.cosines.iter().sum::<f64>() / self.cosines.len().max(1) as f64
    }

    /// The least cosine; 0 if there is none.
    #[must_use]
    pub fn min_cosine(&self) -> f64 {
        self.cosines.first().copied().unwrap_or(0.0)
    }
}

/// Predicts tiles one batch after the other.
///
/// # Errors
/// [`SessionError`] of the first batch that fails.
pub fn predict(session: &mut dyn Session, tiles: &[&[u8]], batch: usize) -> Result<Vec<Prediction>, SessionError> {
    tiles.chunks(batch.max(1)).map(|batch| session.predict(batch)).collect()
}

/// Compares predictions of the same tiles in the same batches.
#[must_use]
pub fn compare(task: Task, original: &[Prediction], variant: &[Prediction], threshold: f32) -> Agreement {
    let mut tally = Tally::new(task, threshold);
    for (original, variant) in original.iter().zip(variant) {
        tally.add((original, variant), (original, variant));
    }
    tally.finish()
}

/// An agreement while it is counted, batch by batch, so that predictions need not be kept.
#[derive(Clone, Debug)]
pub struct Tally {
    task: Task,
    threshold: f32,
    agreement: Agreement,
    same: usize,
    all: usize,
    /// `None` until the number of classes is known.
    confusion: Option<measure::Confusion>,
}

impl Tally {
    /// Nothing counted yet; tiles flip at `threshold`.
    #[must_use]
    pub fn new(task: Task, threshold: f32) -> Self {
        let agreement = Agreement {
            tiles: 0,
            cosines: Vec::new(),
            max_abs_difference: 0.0,
            top1: None,
            dice: Vec::new(),
            flips: 0,
            nonfinite: 0,
        };
        Self { task, threshold, agreement, same: 0, all: 0, confusion: None }
    }

    /// Counts the same batch as the original and as the variant predicts it: cosines and differences by `raw`, classes
    /// and flips by `scores`, which may be `raw` after the activation.
    pub fn add(&mut self, raw: (&Prediction, &Prediction), scores: (&Prediction, &Prediction)) {
        let agreement = &mut self.agreement;
        for (a, b) in rows(raw.0).iter().zip(&rows(raw.1)) {
            agreement.tiles += 1;
            agreement.cosines.extend(measure::cosine(&a.values, &b.values));
            let difference = measure::max_abs_difference(&a.values, &b.values);
            agreement.max_abs_difference = agreement.max_abs_difference.max(difference);
            agreement.nonfinite += measure::non_finite(&b.values);
        }
        if self.task == Task::Features {
            return;
        }
        for (a, b) in rows(scores.0).iter().zip(&rows(scores.1)) {
            agreement.flips += usize::from(measure::flips(&a.means, &b.means, self.threshold) > 0);
            let confusion = self.confusion.get_or_insert_with(|| measure::Confusion::new(a.means.len()));
            for (a, b) in a.classes().zip(b.classes()) {
                self.all += 1;
                // What is no number is no class, and so not the same one.
                self.same += usize::from(a.is_some() && a == b);
                if let (Some(a), Some(b)) = (a, b) {
                    confusion.add(a, b);
                }
            }
        }
    }

    /// What was counted.
    #[must_use]
    pub fn finish(self) -> Agreement {
        let mut agreement = self.agreement;
        agreement.cosines.sort_by(f64::total_cmp);
        agreement.top1 = (self.all > 0).then(|| self.same as f64 / self.all as f64);
        let maps = self.confusion.filter(|_| self.task == Task::Segmentation);
        agreement.dice = maps.map(|confusion| confusion.dice()).unwrap_or_default();
        agreement
    }
}

/// One tile's prediction.
struct Row {
    /// `[class, place]`, or a vector of features.
    values: Vec<f32>,
    /// Mean of each class over the tile.
    means: Vec<f32>,
}

impl Row {
    /// The most probable class of every place.
    fn classes(&self) -> impl Iterator<Item = Option<usize>> + '_ {
        let places = self.values.len() / self.means.len().max(1);
        (0..places).map(move |place| {
            let scores: Vec<f32> = (0..self.means.len()).map(|class| self.values[class * places + place]).collect();
            measure::predicted_class(&scores)
        })
    }
}

fn rows(prediction: &Prediction) -> Vec<Row> {
    match prediction {
        Prediction::Classes(all) | Prediction::Features(all) => {
            all.rows().into_iter().map(|row| Row { values: row.to_vec(), means: row.to_vec() }).collect()
        }
        Prediction::Map(all) => {
            let row = |map: ndarray::ArrayView3<'_, f32>| {
                let mean = |plane: ndarray::ArrayView2<'_, f32>| {
                    let sum: f64 = plane.iter().map(|value| f64::from(*value)).sum();
                    #[expect(clippy::cast_possible_truncation, reason = "a mean of f32 values fits f32")]
                    let mean = (sum / plane.len().max(1) as f64) as f32;
                    mean
                };
                let means = map.outer_iter().map(mean).collect();
                Row { values: map.iter().copied().collect(), means }
            };
            all.axis_iter(Axis(0)).map(row).collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::{Array4, array};

    #[test]
    fn classes_that_agree_and_do_not() {
        let original = [Prediction::Classes(array![[0.9, 0.1], [0.4, 0.6]])];
        let variant = [Prediction::Classes(array![[0.8, 0.2], [0.55, 0.45]])];
        let agreement = compare(Task::Classification, &original, &variant, 0.5);
        assert_eq!((agreement.tiles, agreement.top1, agreement.flips, agreement.nonfinite), (2, Some(0.5), 1, 0));
        assert!((agreement.max_abs_difference - 0.15).abs() < 1e-6);
        // (0.4·0.55 + 0.6·0.45) / (√0.52 · √0.505)
        assert!((agreement.min_cosine() - 0.956_2).abs() < 1e-3, "{}", agreement.min_cosine());
    }

    #[test]
    fn maps_are_compared_by_pixel() {
        let map = |values: [f32; 8]| [Prediction::Map(Array4::from_shape_vec((1, 2, 2, 2), values.to_vec()).unwrap())];
        let original = map([0.9, 0.9, 0.1, 0.1, 0.1, 0.1, 0.9, 0.9]);
        let variant = map([0.9, 0.9, 0.1, 0.6, 0.1, 0.1, 0.9, 0.4]);
        let agreement = compare(Task::Segmentation, &original, &variant, 0.5);
        assert_eq!(agreement.top1, Some(0.75));
        // Class 0: 2 and 3 pixels, 2 in common; class 1: 2 and 1 pixels, 1 in common.
        assert_eq!(agreement.dice, [Some(0.8), Some(2.0 / 3.0)]);
        assert_eq!(agreement.tiles, 1);
    }

    #[test]
    fn values_that_are_no_numbers_are_counted() {
        let original = [Prediction::Features(array![[1.0, 2.0]])];
        let variant = [Prediction::Features(array![[1.0, f32::NAN]])];
        let agreement = compare(Task::Features, &original, &variant, 0.5);
        assert_eq!((agreement.nonfinite, agreement.cosines.len(), agreement.top1), (1, 0, None));
        assert_eq!(agreement.mean_cosine(), 0.0);
    }
}
