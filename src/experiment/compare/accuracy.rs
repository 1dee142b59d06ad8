//! Holds every variant against labels, with paired intervals of how it differs from the original.

use ndarray::Axis;

use super::labels::{self, Item, Labelled, Truth};
use super::subjects::Subject;
use crate::experiment::ExperimentError;
use crate::inference::{ModelCard, OrtSession, Prediction, Session, Task};
use crate::measure::{Bootstrap, Confusion, Interval, auc_one_vs_rest, predicted_class};
use crate::report::compare::{AccuracyRecord, AccuracyRow, IntervalRecord, MetricRecord};

/// A row per variant, the original first.
pub(super) fn accuracy(
    subjects: &[Subject],
    labelled: &Labelled,
    batch: usize,
    say: &mut dyn FnMut(&str),
) -> Result<AccuracyRecord, ExperimentError> {
    let mut scored: Vec<Scored> = Vec::new();
    for subject in subjects {
        say(&format!("predicting {} labelled images with {}", labelled.items.len(), subject.name));
        let mut session = subject.open()?;
        scored.push(match subject.card.task {
            Task::Segmentation => maps(&subject.card, &mut session, labelled, batch)?,
            _ => tiles(&subject.card, &mut session, labelled, batch)?,
        });
    }
    let rows = subjects.iter().zip(&scored).enumerate().map(|(index, (subject, scored_by))| {
        let metric = |of: fn(&Scored, &[usize]) -> f64| metric(&scored[0], scored_by, index > 0, labelled.groups, of);
        AccuracyRow {
            variant: subject.name.clone(),
            accuracy: metric(Scored::accuracy),
            balanced_accuracy: metric(Scored::balanced_accuracy),
            auc: metric(Scored::auc),
            dice: metric(Scored::dice),
        }
    });
    let what =
        if subjects.first().is_some_and(|first| first.card.task == Task::Segmentation) { "images" } else { "tiles" };
    let groups = if labelled.has_groups { format!(" of {} groups", labelled.groups) } else { String::new() };
    Ok(AccuracyRecord {
        labels: labelled.path.display().to_string(),
        items: labelled.items.len() as u64,
        unit: format!("{what}{groups}"),
        rows: rows.collect(),
    })
}

/// A metric of a variant, and how it differs from the original's on the same draws of groups.
fn metric(
    original: &Scored,
    variant: &Scored,
    is_variant: bool,
    groups: usize,
    of: fn(&Scored, &[usize]) -> f64,
) -> Option<MetricRecord> {
    let bootstrap = Bootstrap::default();
    let record = |interval: Interval| IntervalRecord::from(interval);
    let value = bootstrap.interval(groups, |drawn| of(variant, drawn))?;
    let difference = || bootstrap.difference(groups, |drawn| of(original, drawn), |drawn| of(variant, drawn));
    Some(MetricRecord { value: record(value), difference: is_variant.then(difference).flatten().map(record) })
}

/// What a variant said of the labelled images, by group.
struct Scored {
    /// One more class than there are: no number was predicted.
    confusions: Vec<Confusion>,
    /// Scores `[items, classes]` and labels; empty for maps.
    scores: Vec<(Vec<f32>, Vec<usize>)>,
    classes: usize,
    /// The class that no Dice is asked of.
    background: Option<usize>,
    is_map: bool,
}

impl Scored {
    fn new(card: &ModelCard, groups: usize) -> Self {
        let classes = card.classes.len();
        Self {
            confusions: vec![Confusion::new(classes + 1); groups],
            scores: vec![Default::default(); groups],
            classes,
            background: card.background,
            is_map: card.task == Task::Segmentation,
        }
    }

    fn drawn(&self, groups: &[usize]) -> Confusion {
        let mut sum = Confusion::new(self.classes + 1);
        groups.iter().for_each(|group| sum.merge(&self.confusions[*group]));
        sum
    }

    fn accuracy(&self, groups: &[usize]) -> f64 {
        self.drawn(groups).accuracy().unwrap_or(f64::NAN)
    }

    fn balanced_accuracy(&self, groups: &[usize]) -> f64 {
        self.drawn(groups).balanced_accuracy().unwrap_or(f64::NAN)
    }

    /// Mean area of each class against the rest.
    fn auc(&self, groups: &[usize]) -> f64 {
        if self.is_map {
            return f64::NAN;
        }
        let (mut scores, mut labels) = (Vec::new(), Vec::new());
        for group in groups {
            scores.extend_from_slice(&self.scores[*group].0);
            labels.extend_from_slice(&self.scores[*group].1);
        }
        mean(auc_one_vs_rest(&scores, &labels, self.classes).into_iter().flatten())
    }

    /// Mean over the classes but the background.
    fn dice(&self, groups: &[usize]) -> f64 {
        if !self.is_map {
            return f64::NAN;
        }
        let dice = self.drawn(groups).dice();
        let counts = |class: &usize| Some(*class) != self.background;
        mean((0..self.classes).filter(counts).filter_map(|class| dice[class]))
    }
}

/// NaN for no values.
fn mean(values: impl Iterator<Item = f64>) -> f64 {
    let (sum, count) = values.fold((0.0, 0_u32), |(sum, count), value| (sum + value, count + 1));
    sum / f64::from(count)
}

/// Classifies labelled tiles.
fn tiles(
    card: &ModelCard,
    session: &mut OrtSession,
    labelled: &Labelled,
    batch: usize,
) -> Result<Scored, ExperimentError> {
    let mut scored = Scored::new(card, labelled.groups);
    for items in labelled.items.chunks(batch) {
        let images: Vec<Vec<u8>> = items.iter().map(|item| tile(card, item)).collect::<Result<_, _>>()?;
        let tiles: Vec<&[u8]> = images.iter().map(Vec::as_slice).collect();
        let Prediction::Classes(scores) = session.predict(&tiles)? else { continue };
        for (item, row) in items.iter().zip(scores.outer_iter()) {
            let Truth::Class(label) = item.truth else { continue };
            let row = row.to_vec();
            let predicted = predicted_class(&row).unwrap_or(scored.classes);
            scored.confusions[item.group].add(label, predicted);
            scored.scores[item.group].0.extend(row);
            scored.scores[item.group].1.push(label);
        }
    }
    Ok(scored)
}

/// An image that is one tile.
fn tile(card: &ModelCard, item: &Item) -> Result<Vec<u8>, ExperimentError> {
    let (image, side) = (labels::pixels(&item.image)?, card.tile_size);
    if image.dimensions() != (side, side) {
        let (width, height) = image.dimensions();
        let reason = format!("is {width} × {height} px, but the model's tiles are {side} × {side}");
        return Err(ExperimentError::Labels { path: item.image.clone(), reason });
    }
    Ok(image.into_raw())
}

/// Segments labelled images and counts their pixels.
fn maps(
    card: &ModelCard,
    session: &mut OrtSession,
    labelled: &Labelled,
    batch: usize,
) -> Result<Scored, ExperimentError> {
    let mut scored = Scored::new(card, labelled.groups);
    for item in &labelled.items {
        let Truth::Mask(mask) = &item.truth else { continue };
        let image = labels::pixels(&item.image)?;
        let (width, height) = image.dimensions();
        let side = card.tile_size;
        if width < side || height < side {
            let reason = format!("is {width} × {height} px, less than a tile of {side} × {side}");
            return Err(ExperimentError::Labels { path: item.image.clone(), reason });
        }
        let truth = labels::mask(mask, (width, height), scored.classes)?;
        let sums = scores_of(card, session, &image, batch)?;
        let pixels = truth.len();
        for (pixel, truth) in truth.iter().enumerate() {
            if *truth != u8::MAX {
                let of: Vec<f32> = (0..scored.classes).map(|class| sums[class * pixels + pixel]).collect();
                let predicted = predicted_class(&of).unwrap_or(scored.classes);
                scored.confusions[item.group].add(usize::from(*truth), predicted);
            }
        }
    }
    Ok(scored)
}

/// Sums of the probabilities of all tiles that cover a pixel, `[class, row, column]`; the greatest sum of a pixel is its
/// greatest mean too.
fn scores_of(
    card: &ModelCard,
    session: &mut OrtSession,
    image: &image::RgbImage,
    batch: usize,
) -> Result<Vec<f32>, ExperimentError> {
    let (width, height, side) = (image.width(), image.height(), card.tile_size);
    let step = side - card.overlap;
    let corners: Vec<(u32, u32)> =
        starts(height, side, step).flat_map(|y| starts(width, side, step).map(move |x| (x, y))).collect();
    let pixels = width as usize * height as usize;
    let mut sums = vec![0.0; card.classes.len() * pixels];
    for corners in corners.chunks(batch) {
        let cut = |(x, y): &(u32, u32)| image::imageops::crop_imm(image, *x, *y, side, side).to_image().into_raw();
        let tiles: Vec<Vec<u8>> = corners.iter().map(cut).collect();
        let tiles: Vec<&[u8]> = tiles.iter().map(Vec::as_slice).collect();
        let Prediction::Map(maps) = session.predict(&tiles)? else { continue };
        for ((x, y), map) in corners.iter().zip(maps.axis_iter(Axis(0))) {
            for ((class, row, column), value) in map.indexed_iter() {
                let at = (*y as usize + row) * width as usize + *x as usize + column;
                sums[class * pixels + at] += value;
            }
        }
    }
    Ok(sums)
}

/// Where tiles begin along a side, the last one at its end.
fn starts(length: u32, side: u32, step: u32) -> impl Iterator<Item = u32> {
    let last = length - side;
    (0..last).step_by(step as usize).chain([last])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inference::BareModel;
    use std::path::Path;

    #[test]
    fn tiles_cover_an_image_to_its_end() {
        assert_eq!(starts(400, 256, 192).collect::<Vec<_>>(), [0, 144]);
        assert_eq!(starts(256, 256, 192).collect::<Vec<_>>(), [0]);
        assert_eq!(starts(500, 256, 192).collect::<Vec<_>>(), [0, 192, 244]);
    }

    #[test]
    fn metrics_are_of_drawn_groups_and_differences_are_paired() {
        let card = ModelCard::load(Path::new("models/cells-vit"), &BareModel::default()).unwrap();
        let scored = |wrong_in: usize| {
            let mut scored = Scored::new(&card, 4);
            for group in 0..4 {
                for label in 0..2 {
                    let predicted = if group == wrong_in { 1 - label } else { label };
                    scored.confusions[group].add(label, predicted);
                    let mut row = vec![0.0; 4];
                    row[predicted] = 1.0;
                    scored.scores[group].0.extend(row);
                    scored.scores[group].1.push(label);
                }
            }
            scored
        };
        let (right, worse) = (scored(9), scored(1));
        assert_eq!(worse.accuracy(&[0, 1]), 0.5);
        assert_eq!((worse.auc(&[1]), worse.auc(&[0])), (0.0, 1.0));
        assert!(right.dice(&[0]).is_nan());
        let of = |variant| metric(&right, variant, true, 4, Scored::balanced_accuracy).unwrap();
        let same = of(&right).difference.unwrap();
        assert_eq!((same.value, same.low, same.high), (0.0, 0.0, 0.0));
        let lost = of(&worse).difference.unwrap();
        assert!(lost.value == -0.25 && lost.low < -0.25 && lost.high == 0.0, "{lost:?}");
    }
}
