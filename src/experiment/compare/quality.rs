//! How much every variant agrees with the original on the same tiles.

use super::THRESHOLD;
use super::subjects::Subject;
use crate::experiment::ExperimentError;
use crate::experiment::agreement::{Agreement, Tally};
use crate::experiment::tiles::TileSet;
use crate::inference::{OrtSession, Session, Task};
use crate::measure::percentile;
use crate::report::compare::{AgreementRecord, ClassValue, CosineRecord, FlipsRecord};

/// A record per variant but the original.
pub(super) fn agreement(
    subjects: &[Subject],
    tiles: &TileSet,
    batch: usize,
) -> Result<Vec<AgreementRecord>, ExperimentError> {
    let Some((original, variants)) = subjects.split_first() else { return Ok(Vec::new()) };
    let task = original.card.task;
    let mut reference = original.open_raw()?;
    let mut sessions: Vec<OrtSession> = variants.iter().map(Subject::open_raw).collect::<Result<_, _>>()?;
    let mut tallies = vec![Tally::new(task, THRESHOLD); variants.len()];
    for batch in tiles.slices().chunks(batch) {
        let raw = reference.predict(batch)?;
        let scores = raw.clone().activated(original.card.activation);
        for ((session, tally), subject) in sessions.iter_mut().zip(&mut tallies).zip(variants) {
            let other = session.predict(batch)?;
            let other_scores = other.clone().activated(subject.card.activation);
            tally.add((&raw, &other), (&scores, &other_scores));
        }
    }
    Ok(variants.iter().zip(tallies).map(|(subject, tally)| record(subject, &tally.finish())).collect())
}

fn record(subject: &Subject, agreement: &Agreement) -> AgreementRecord {
    let task = subject.card.task;
    let cosine = (!agreement.cosines.is_empty()).then(|| CosineRecord {
        mean: agreement.mean_cosine(),
        p1: percentile(&agreement.cosines, 1.0),
        min: agreement.min_cosine(),
    });
    let names = subject.card.class_names().into_iter();
    let largest = agreement.max_abs_difference;
    AgreementRecord {
        variant: subject.name.clone(),
        tiles: agreement.tiles as u64,
        cosine,
        max_abs_difference: largest.is_finite().then_some(largest),
        top1_agreement: agreement.top1.filter(|_| task == Task::Classification),
        dice: names.zip(&agreement.dice).map(|(class, value)| ClassValue { class, value: *value }).collect(),
        pixel_agreement: agreement.top1.filter(|_| task == Task::Segmentation),
        flips: (task != Task::Features)
            .then(|| FlipsRecord { threshold: f64::from(THRESHOLD), tiles: agreement.flips as u64 }),
        nan_count: agreement.nonfinite as u64,
    }
}
