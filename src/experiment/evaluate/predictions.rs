//! What a model says of labelled images, and which of them can't be read.

use image::RgbImage;
use rayon::prelude::*;

use crate::experiment::ExperimentError;
use crate::experiment::images::{self, Fit, ScoreMap, decided, failed_image};
use crate::experiment::labels::{Item, Labelled, Truth};
use crate::experiment::one_class::BothSides;
use crate::experiment::pace::Paced;
use crate::inference::ModelCard;
use crate::measure::{ClassCounts, Confusion, is_in_top};
use crate::report::FailedImage;

/// Images that are decoded side by side before they are predicted.
const READ_AHEAD: usize = 64;

/// A labelled image that was classified.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Sample {
    /// Index of the labelled item.
    pub(super) item: usize,
    pub(super) label: usize,
    pub(super) group: usize,
    /// `None` where the model gave no number.
    pub(super) predicted: Option<usize>,
    pub(super) is_in_top5: bool,
    /// Of each class.
    pub(super) scores: Vec<f32>,
}

impl Sample {
    /// A prediction out of scores.
    pub(super) fn new(item: usize, label: usize, group: usize, scores: Vec<f32>) -> Self {
        let is_in_top5 = is_in_top(&scores, label, 5);
        Self { item, label, group, predicted: decided(&scores), is_in_top5, scores }
    }

    /// The largest score.
    pub(super) fn confidence(&self) -> Option<f64> {
        self.predicted.map(|class| f64::from(self.scores[class]))
    }
}

/// A labelled image that was segmented.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Segmented {
    /// Index of the labelled item.
    pub(super) item: usize,
    pub(super) group: usize,
    /// Whether it is smaller than a tile.
    pub(super) is_padded: bool,
    /// Of its pixels.
    pub(super) counts: ClassCounts,
}

/// What was predicted, and what could not be.
#[derive(Debug)]
pub(super) struct Predicted<T> {
    pub(super) images: Vec<T>,
    pub(super) failed: Vec<FailedImage>,
    /// `[label, predicted]` with one more class than there are: no number.
    pub(super) confusion: Confusion,
}

/// Classifies labelled images by the classes that are told apart.
pub(super) fn classify(
    labelled: &Labelled,
    card: &ModelCard,
    session: &mut Paced,
    fit: Fit,
) -> Result<Predicted<Sample>, ExperimentError> {
    let (batch, classes) = (session.predictor.total_batch_size(), card.classes.len());
    let (mut samples, mut failed, mut confusion) = (Vec::new(), Vec::new(), Confusion::new(classes + 1));
    // Whole batches, so that only the very last one may be smaller.
    let ahead = READ_AHEAD.div_ceil(batch) * batch;
    for (start, items) in (0..).step_by(ahead).zip(labelled.items.chunks(ahead)) {
        let read: Vec<_> = items.par_iter().map(|item| images::tile(&item.image, card, fit)).collect();
        let mut tiles = Vec::with_capacity(items.len());
        for ((index, item), tile) in (start..).zip(items).zip(read) {
            match (tile, &item.truth) {
                (Ok(tile), Truth::Class(label)) => tiles.push((index, *label, item.group, tile)),
                (Ok(_), Truth::Mask(_) | Truth::Region(_)) => {}
                (Err(error), _) if images::is_about_one_image(&error) => {
                    failed.push(failed_image(&item.image, &error));
                }
                (Err(error), _) => return Err(error),
            }
        }
        for tiles in tiles.chunks(batch) {
            let slices: Vec<&[u8]> = tiles.iter().map(|(.., tile)| tile.as_slice()).collect();
            for ((item, label, group, _), scores) in
                tiles.iter().zip(images::classify(&slices, &mut BothSides(session))?)
            {
                let sample = Sample::new(*item, *label, *group, scores);
                confusion.add(sample.label, sample.predicted.unwrap_or(classes));
                samples.push(sample);
            }
        }
    }
    Ok(Predicted { images: samples, failed, confusion })
}

/// Segments labelled images by the classes that are told apart, pixel by pixel against their masks.
pub(super) fn segment(
    labelled: &Labelled,
    card: &ModelCard,
    session: &mut Paced,
) -> Result<Predicted<Segmented>, ExperimentError> {
    let classes = card.classes.len();
    let (mut segmented, mut failed, mut confusion) = (Vec::new(), Vec::new(), Confusion::new(classes + 1));
    for (index, item) in labelled.items.iter().enumerate() {
        match map(item, card, session) {
            Ok(Mapped { truth, map, .. }) => {
                let mut of_image = Confusion::new(classes + 1);
                for (pixel, label) in truth.iter().enumerate().filter(|(_, label)| **label != u8::MAX) {
                    of_image.add(usize::from(*label), map.class_at(pixel).unwrap_or(classes));
                }
                confusion.merge(&of_image);
                let is_padded = images::is_padded((map.width, map.height), card.tile_size);
                let counts = counts(&of_image, classes);
                segmented.push(Segmented { item: index, group: item.group, is_padded, counts });
            }
            Err(error) if images::is_about_one_image(&error) => failed.push(failed_image(&item.image, &error)),
            Err(error) => return Err(error),
        }
    }
    if !segmented.is_empty() && confusion.items() == 0 {
        return Err(images::unsuited(
            &labelled.path,
            "labels no pixel: all masks are 255".to_owned(),
            "check the masks",
        ));
    }
    Ok(Predicted { images: segmented, failed, confusion })
}

/// A labelled image with what is right of it and what the model says.
pub(super) struct Mapped {
    pub(super) image: RgbImage,
    /// The mask's values, `[row, column]`.
    pub(super) truth: Vec<u8>,
    pub(super) map: ScoreMap,
}

pub(super) fn map(item: &Item, card: &ModelCard, session: &mut Paced) -> Result<Mapped, ExperimentError> {
    let image = images::pixels(&item.image)?;
    let truth = item.truth.pixels(image.dimensions(), card.classes.len())?;
    let batch = session.predictor.total_batch_size();
    let map = images::segment(&image, &item.image, card, &mut BothSides(session), batch)?;
    Ok(Mapped { image, truth, map })
}

/// By class, where the last class of the confusion is no number.
fn counts(confusion: &Confusion, classes: usize) -> ClassCounts {
    let mut counts = ClassCounts::new(classes);
    for label in 0..classes {
        for predicted in 0..=classes {
            let is_number = predicted < classes;
            counts.add_many(label, is_number.then_some(predicted), confusion.count(label, predicted));
        }
    }
    counts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_number_is_in_no_prediction() {
        let mut confusion = Confusion::new(3);
        for (label, predicted) in [(0, 0), (0, 2), (1, 0), (1, 1)] {
            confusion.add(label, predicted);
        }
        let counts = counts(&confusion, 2);
        assert_eq!((counts.items(), counts.support(0), counts.predicted(0)), (4, 2, 2));
        assert_eq!(counts.accuracy(), Some(0.5));
    }
}
