//! Holds every variant against labels, with paired intervals of how it differs from the original.

use super::subjects::Subject;
use crate::experiment::ExperimentError;
use crate::experiment::images::{self, Fit};
use crate::experiment::labels::{Labelled, Truth};
use crate::experiment::one_class::{BothSides, told_apart};
use crate::inference::{ModelCard, Prediction, Session, Task};
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
        let (card, mut session) = (told_apart(&subject.card), BothSides(&mut session));
        scored.push(match card.task {
            Task::Segmentation => maps(&card, &mut session, labelled, batch)?,
            _ => tiles(&card, &mut session, labelled, batch)?,
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
    let groups = if labelled.has_groups() { format!(" of {} groups", labelled.groups) } else { String::new() };
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
    session: &mut dyn Session,
    labelled: &Labelled,
    batch: usize,
) -> Result<Scored, ExperimentError> {
    let mut scored = Scored::new(card, labelled.groups);
    for items in labelled.items.chunks(batch) {
        let images: Vec<Vec<u8>> =
            items.iter().map(|item| images::tile(&item.image, card, Fit::Exact)).collect::<Result<_, _>>()?;
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

/// Segments labelled images and counts their pixels.
fn maps(
    card: &ModelCard,
    session: &mut dyn Session,
    labelled: &Labelled,
    batch: usize,
) -> Result<Scored, ExperimentError> {
    let mut scored = Scored::new(card, labelled.groups);
    for item in &labelled.items {
        let image = images::pixels(&item.image)?;
        let truth = item.truth.pixels(image.dimensions(), scored.classes)?;
        let map = images::segment(&image, &item.image, card, session, batch)?;
        for (pixel, truth) in truth.iter().enumerate().filter(|(_, truth)| **truth != u8::MAX) {
            let predicted = map.class_at(pixel).unwrap_or(scored.classes);
            scored.confusions[item.group].add(usize::from(*truth), predicted);
        }
    }
    Ok(scored)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inference::BareModel;
    use std::path::Path;

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
