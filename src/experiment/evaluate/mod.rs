//! Holds a model against labels: how often it is right, of which class, how sure that is, and where it errs most.
//!
//! `predictions` reads and predicts the labelled images, `figures` computes with intervals, `gallery` shows errors.

mod figures;
mod gallery;
mod predictions;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Instant;

use self::figures::Groups;
use self::predictions::{Predicted, Sample, Segmented};
pub use super::images::Fit;
use super::labels::{self, Labelled, Truth};
use super::pace::{Paced, ran_on};
use super::{ExperimentError, images, one_class, resources, results};
use crate::engine::model_record;
use crate::inference::{ModelCard, Predictor, PredictorOptions, Task, device};
use crate::measure::{ClassCounts, Confusion};
use crate::report::{EvaluatedRecord, PaceRecord, SampleRecord, WorstRecord};

/// The files that are written of an evaluation: the page, the record and the table of predictions.
pub const FILES: [&str; 3] = ["evaluate.html", "evaluate.json", "predictions.csv"];

/// What is evaluated, and how.
#[derive(Clone, Debug)]
pub struct EvaluateRequest {
    /// The model.
    pub card: ModelCard,
    /// Labelled images: a folder with a folder per class, or a table.
    pub labels: PathBuf,
    /// Where and how the model runs.
    pub options: PredictorOptions,
    /// How an image of another size becomes a tile; a map takes any size.
    pub fit: Fit,
    /// Where [`FILES`] will be written; tried before the work.
    pub out: PathBuf,
}

/// A model held against labels.
#[derive(Clone, Debug, PartialEq)]
pub struct Evaluation {
    /// Everything but single predictions.
    pub found: EvaluatedRecord,
    /// What the model said of each image that could be read, in the order of the labels.
    pub samples: Vec<SampleRecord>,
}

/// Evaluates; `say` is told what is being done. An image that can't be read is listed, and the others go on.
///
/// # Errors
/// [`ExperimentError`] if the labels don't fit the model, results can't be written or would be written over an input, the
/// model can't be had, or no image can be read.
pub fn evaluate(request: &EvaluateRequest, say: &mut dyn FnMut(&str)) -> Result<Evaluation, ExperimentError> {
    let card = &request.card;
    let labelled = labels::read(&request.labels, card)?;
    let written = FILES.map(|name| request.out.join(name));
    results::prepare(&request.out, &written, labelled.files().into_iter().chain(results::of_model(card)))?;
    let mut session = Paced::new(Predictor::open(card.clone(), &request.options)?);
    let count = labelled.items.len();
    say(&format!(
        "predicting {count} labelled images with {} on {}",
        card.name,
        device::in_words(session.predictor.devices())
    ));
    let mut evaluation = if card.task == Task::Segmentation {
        segmentation(request, &labelled, &mut session, say)
    } else {
        classification(request, &labelled, &mut session, say)
    }?;
    // What is not a model's only class is no output of it, and follows from what is said of the class.
    evaluation.samples.iter_mut().for_each(|sample| sample.values.truncate(card.classes.len()));
    Ok(evaluation)
}

/// What predicting all images took.
struct Taken {
    pace: Option<PaceRecord>,
    /// With reading and decoding.
    seconds: f64,
    /// How busy each GPU was.
    busy: BTreeMap<String, f64>,
}

/// Predicts, and numbers the groups of what could be.
fn predicted<T>(
    labelled: &Labelled,
    session: &mut Paced,
    group: fn(&mut T) -> &mut usize,
    predict: impl FnOnce(&mut Paced) -> Result<Predicted<T>, ExperimentError>,
) -> Result<(Predicted<T>, Groups, Taken), ExperimentError> {
    let devices = session.predictor.devices().to_vec();
    let ((predicted, seconds), seen) = resources::watched(&devices, || {
        let start = Instant::now();
        (predict(session), start.elapsed().as_secs_f64())
    });
    let mut predicted = predicted?;
    let (pace, busy) = (session.record(), seen.busy_by_device());
    some_are_left(&predicted, labelled)?;
    let groups = number_groups(labelled, predicted.images.iter_mut().map(group));
    Ok((predicted, groups, Taken { pace, seconds, busy }))
}

fn classification(
    request: &EvaluateRequest,
    labelled: &Labelled,
    session: &mut Paced,
    say: &mut dyn FnMut(&str),
) -> Result<Evaluation, ExperimentError> {
    let card = &one_class::told_apart(&request.card);
    let classify = |session: &mut Paced| predictions::classify(labelled, card, session, request.fit);
    let (predicted, groups, taken) = predicted(labelled, session, |sample| &mut sample.group, classify)?;
    say("drawing intervals");
    let computed = figures::of_samples(&predicted.images, card, groups);
    let worst = gallery::of_samples(&predicted.images, labelled, card, request.fit)?;
    let samples = predicted.images.iter().map(|sample| sample_record(sample, labelled, card)).collect();
    Ok(Evaluation { found: record(request, labelled, session, predicted, computed, (worst, taken)), samples })
}

fn segmentation(
    request: &EvaluateRequest,
    labelled: &Labelled,
    session: &mut Paced,
    say: &mut dyn FnMut(&str),
) -> Result<Evaluation, ExperimentError> {
    let card = &one_class::told_apart(&request.card);
    let segment = |session: &mut Paced| predictions::segment(labelled, card, session);
    let (predicted, groups, taken) = predicted(labelled, session, |image| &mut image.group, segment)?;
    let mut by_group = vec![ClassCounts::new(card.classes.len()); groups.count];
    predicted.images.iter().for_each(|image| by_group[image.group].merge(&image.counts, 1));
    say("drawing intervals");
    let mut computed = figures::of_maps(&by_group, card, groups);
    let padded = predicted.images.iter().filter(|image| image.is_padded);
    let padded: Vec<String> = padded.map(|image| labelled.items[image.item].image.display().to_string()).collect();
    computed.notes.extend(images::about_padded(&padded, card.tile_size));
    let worst = gallery::of_maps(&predicted.images, labelled, card, session)?;
    let samples = predicted.images.iter().map(|image| image_record(image, labelled)).collect();
    Ok(Evaluation { found: record(request, labelled, session, predicted, computed, (worst, taken)), samples })
}

/// Numbers the groups anew, without those of which no image could be read.
fn number_groups<'a>(labelled: &Labelled, of_images: impl Iterator<Item = &'a mut usize>) -> Groups {
    let mut numbers = vec![None; labelled.groups];
    let mut count = 0;
    for group in of_images {
        *group = *numbers[*group].get_or_insert_with(|| {
            count += 1;
            count - 1
        });
    }
    Groups { count, are_named: labelled.has_groups() }
}

fn some_are_left<T>(predicted: &Predicted<T>, labelled: &Labelled) -> Result<(), ExperimentError> {
    match predicted.failed.first() {
        Some(first) if predicted.images.is_empty() => {
            let reason = format!("none of its images can be read; the first, {}: {}", first.path, first.reason);
            Err(images::unsuited(
                &labelled.path,
                reason,
                first.hint.clone().unwrap_or_else(|| "check the files".to_owned()),
            ))
        }
        _ => Ok(()),
    }
}

fn record<T>(
    request: &EvaluateRequest,
    labelled: &Labelled,
    session: &Paced,
    predicted: Predicted<T>,
    computed: figures::Computed,
    (worst, taken): (Vec<WorstRecord>, Taken),
) -> EvaluatedRecord {
    let (card, confusion) = (&request.card, &predicted.confusion);
    let classes = computed.classes.len();
    let mut notes = computed.notes;
    notes.extend(one_class::note(card));
    let not_a_number: u64 = (0..classes).map(|label| confusion.count(label, classes)).sum();
    if not_a_number > 0 {
        let what = if card.task == Task::Segmentation { "pixels" } else { "images" };
        notes.insert(0, format!("For {not_a_number} {what} the model gave no number; they count as wrong."));
    }
    if let (Some(name), [only]) = (&labelled.not, card.classes.as_slice()) {
        notes.push(format!("Labels and folders named {name} stand for not {}.", only.name));
    }
    let skipped = images::by_extension(&labelled.others);
    notes.extend(images::about_others(&skipped));
    EvaluatedRecord {
        model: model_record(card, session.predictor.variant()),
        ran_on: ran_on(&session.predictor),
        labels: request.labels.display().to_string(),
        fit: request.fit.to_string(),
        images: predicted.images.len() as u64,
        items: confusion.items(),
        not_a_number,
        failed: predicted.failed,
        skipped,
        figures: computed.figures,
        classes: computed.classes,
        confusion: rows(confusion, classes),
        calibration: computed.calibration,
        drawn: computed.drawn,
        worst,
        pace: taken.pace,
        utilisation_by_device: taken.busy,
        seconds: taken.seconds,
        notes,
    }
}

fn rows(confusion: &Confusion, classes: usize) -> Vec<Vec<u64>> {
    (0..classes).map(|label| (0..=classes).map(|predicted| confusion.count(label, predicted)).collect()).collect()
}

fn sample_record(sample: &Sample, labelled: &Labelled, card: &ModelCard) -> SampleRecord {
    let name = |class: usize| card.classes[class].name.clone();
    SampleRecord {
        path: labelled.items[sample.item].image.display().to_string(),
        group: group(sample.item, labelled),
        label: name(sample.label),
        predicted: sample.predicted.map(name),
        values: sample.scores.iter().map(|score| Some(f64::from(*score)).filter(|score| score.is_finite())).collect(),
    }
}

fn image_record(image: &Segmented, labelled: &Labelled) -> SampleRecord {
    let item = &labelled.items[image.item];
    let mask = match &item.truth {
        Truth::Mask(mask) | Truth::Region(mask) => mask.display().to_string(),
        Truth::Class(_) => String::new(),
    };
    let path = item.image.display().to_string();
    SampleRecord { path, group: group(image.item, labelled), label: mask, predicted: None, values: image.counts.dice() }
}

/// Name of an item's group; empty if it has none.
fn group(item: usize, labelled: &Labelled) -> String {
    labelled.group_names.get(labelled.items[item].group).cloned().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_without_images_are_not_drawn() {
        let labelled = Labelled {
            path: "a".into(),
            items: Vec::new(),
            groups: 5,
            group_names: vec!["p".into()],
            others: Vec::new(),
            not: None,
        };
        let mut groups = [4, 1, 4, 0];
        let found = number_groups(&labelled, groups.iter_mut());
        assert_eq!((groups, found.count, found.are_named), ([0, 1, 0, 2], 3, true));
    }
}
