//! Compares variants of models: how fast each step from the original to everything together is, how much every variant
//! agrees with the original and with labels, and whether it keeps what it must.
//!
//! `subjects` names the variants, `ladder` says which steps there are and makes their rows, `speed` times them in
//! turns, `course` is the part of the slide that they run over, `alone` what a step takes in a process of its own,
//! `quality` and `accuracy` hold outputs against the original's and against labels, `gates` judges,
//! `pictures` shows.

mod accuracy;
mod alone;
mod course;
mod gates;
mod ladder;
mod pictures;
mod quality;
mod speed;
mod subjects;

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Duration;

pub use self::alone::{Alone, alone};
use self::course::Course;
pub use self::gates::{Gates, MostFlips};
use self::ladder::Ladder;
use self::speed::Timed;
use self::subjects::{BatchSize, Subject};
use super::ExperimentError;
use super::labels::{self, Labelled};
use super::tiles::TileSet;
use crate::inference::{DeviceRequest, ModelCard, ProviderRequest};
use crate::report::compare::{
    AccuracyRecord, AgreementRecord, ComparedInput, ComparedModel, ComparedVariant, Findings, MeasuringRecord,
    ResourcesRecord,
};

/// The probability at which a tile changes sides, as in a run without further settings.
const THRESHOLD: f32 = 0.5;
/// Tiles that maps to look at have at least, if the slide has as many.
const PICTURE_TILES: usize = 144;
/// Seed of the tiles that are drawn.
const SEED: u64 = 1;

/// What is compared, and how.
#[derive(Clone, Debug)]
pub struct CompareRequest {
    /// The models, at least one; the default variant of the first is the original.
    pub models: Vec<ModelCard>,
    /// The variants to compare with the original; all that suit the device if empty.
    pub variants: Vec<String>,
    /// The slide to take tiles from and to run over.
    pub slide: Option<PathBuf>,
    /// Labelled images: a folder with a folder per class, or a table.
    pub labels: Option<PathBuf>,
    /// Where the variants run.
    pub devices: DeviceRequest,
    /// With which provider.
    pub provider: ProviderRequest,
    /// Tiles per batch of all steps but the original; `None` is left to the device.
    pub batch_size: Option<NonZeroUsize>,
    /// Tiles on which outputs are compared.
    pub tiles: usize,
    /// How long each of the two measurements, of the model alone and end to end, may take.
    pub seconds: Duration,
    /// What a variant must keep.
    pub gates: Gates,
}

/// Compares; `say` is told what is being done, `in_own_process` runs [`alone()`] in a process of its own.
///
/// # Errors
/// [`ExperimentError`] if a model, the slide or the labels can't be read, or the original does not run. A variant that
/// does not run is left out, and that is said.
pub fn compare(
    request: &CompareRequest,
    in_own_process: &mut dyn FnMut(&Alone) -> Result<ResourcesRecord, String>,
    say: &mut dyn FnMut(&str),
) -> Result<Findings, ExperimentError> {
    let (subjects, mut left_out) = subjects::subjects(request)?;
    let card = &request.models[0];
    let labelled = request.labels.as_deref().map(|path| labels::read(path, card)).transpose()?;
    let (tiles, is_real) = tiles_of(request, card, labelled.as_ref())?;

    say(&format!("opening {} variants on {}", subjects.len(), subjects[0].device));
    let subjects = subjects::that_run(subjects, &tiles, &mut left_out)?;
    if request.gates.any() && subjects.len() == 1 && !left_out.iter().any(|left| left.is_failure) {
        return Err(ExperimentError::NothingToGate);
    }
    let asked = subjects::batch_size(&subjects[0], request.batch_size)?;
    let mut batch = asked;
    let measured = loop {
        match measure(request, &subjects, &tiles, labelled.as_ref(), batch, say) {
            // The sessions of all variants are open together: a batch that fits one may not fit beside the others.
            Err(error) if error.is_out_of_memory() && request.batch_size.is_none() && batch.batched > 1 => {
                batch = batch.halved();
                say(&format!("memory did not suffice: again, with batches of {}", batch.batched));
            }
            outcome => break outcome?,
        }
    };
    let Measurements { agreement, accuracy, ladder, model_only, course, end_to_end } = measured;
    let gates = request.gates.judge(&subjects[0].card, &agreement, accuracy.as_ref(), &left_out);

    say("measuring the memory of each step in a process of its own");
    let round = course.as_ref().map_or(request.tiles, |course| course.wanted);
    let resources = ladder.resources(&subjects, round, in_own_process, say);

    let slide_tiles = course.as_ref().map(|course| course.slide_tiles);
    let (rows, best) = ladder.rows(
        &subjects,
        &ladder::Measured { model_only: &model_only, end_to_end: end_to_end.as_ref(), resources, slide_tiles },
        &gates,
        &left_out,
    );
    let mut drawn = Vec::new();
    if let Some((path, course)) = request.slide.as_ref().zip(course.as_ref()).filter(|_| subjects.len() > 1) {
        let shown = if best > 0 { best } else { subjects.len() - 1 };
        say(&format!("drawing the maps of {} and {}", subjects[0].name, subjects[shown].name));
        let wide = Course::new(path, card, course.wanted.max(PICTURE_TILES))?;
        drawn = pictures::pictures(&subjects[0], &subjects[shown], &wide)?;
    }
    let source = match (&request.slide, is_real) {
        (Some(path), _) => path.display().to_string(),
        _ => tiles.source.clone(),
    };
    Ok(Findings {
        models: models(request, &subjects),
        left_out,
        input: ComparedInput { source, tiles: tiles.tiles.len() as u64, slide_tiles },
        measuring: lowered(measuring(request, &model_only, end_to_end.as_ref()), asked, batch),
        ladder: rows,
        agreement,
        accuracy,
        gates,
        pictures: drawn,
    })
}

/// What a batch size gave.
struct Measurements {
    agreement: Vec<AgreementRecord>,
    accuracy: Option<AccuracyRecord>,
    ladder: Ladder,
    model_only: Timed,
    course: Option<Course>,
    end_to_end: Option<Timed>,
}

fn measure(
    request: &CompareRequest,
    subjects: &[Subject],
    tiles: &TileSet,
    labelled: Option<&Labelled>,
    batch: BatchSize,
    say: &mut dyn FnMut(&str),
) -> Result<Measurements, ExperimentError> {
    say(&format!("comparing outputs on {}", tiles.source));
    let agreement = quality::agreement(subjects, tiles, batch.run)?;
    let accuracy = labelled.map(|labelled| accuracy::accuracy(subjects, labelled, batch.run, say)).transpose()?;
    let ladder = Ladder::new(subjects, batch, request.slide.is_some());
    say(&format!("timing {} configurations of the model alone", ladder.alone.len()));
    let model_only = speed::model_only(subjects, &ladder.alone, tiles, request.seconds)?;
    let (mut course, mut end_to_end) = (None, None);
    if let Some(path) = &request.slide {
        let tiles = speed::tiles_per_round(subjects, &ladder, &model_only, request.seconds);
        let taken = Course::new(path, &request.models[0], tiles)?;
        say(&format!("timing {} steps end to end on {} tiles of the slide", ladder.whole.len(), taken.tiles()));
        end_to_end = Some(speed::end_to_end(subjects, &ladder.whole, &taken, request)?);
        course = Some(taken);
    }
    Ok(Measurements { agreement, accuracy, ladder, model_only, course, end_to_end })
}

/// Says so, if batches are smaller than they were to be.
fn lowered(mut measuring: MeasuringRecord, asked: BatchSize, batch: BatchSize) -> MeasuringRecord {
    if batch != asked {
        let (now, then) = (batch.batched, asked.batched);
        measuring.note.push_str(&format!(" Batches of {now}, not {then}: memory did not suffice for all variants."));
    }
    measuring
}

/// Tiles to compare outputs on: of the slide, else of the labelled images, else made up; and whether they are real.
fn tiles_of(
    request: &CompareRequest,
    card: &ModelCard,
    labelled: Option<&Labelled>,
) -> Result<(TileSet, bool), ExperimentError> {
    let paths: Vec<PathBuf> = match (&request.slide, labelled) {
        (Some(slide), _) => vec![slide.clone()],
        (None, Some(labelled)) => labelled.images(),
        (None, None) => return Ok((TileSet::synthetic(card.tile_size, request.tiles, SEED), false)),
    };
    Ok((TileSet::read(&paths, card, request.tiles, SEED)?, true))
}

fn models(request: &CompareRequest, subjects: &[Subject]) -> Vec<ComparedModel> {
    let of_model = |(index, card): (usize, &ModelCard)| ComparedModel {
        name: card.name.clone(),
        task: card.task.to_string(),
        classes: card.class_names(),
        tile_size: card.tile_size,
        variants: subjects.iter().filter(|subject| subject.model == index).map(variant).collect(),
    };
    request.models.iter().enumerate().map(of_model).filter(|model| !model.variants.is_empty()).collect()
}

fn variant(subject: &Subject) -> ComparedVariant {
    let file = &subject.variant.file;
    let mut files = vec![file.clone()];
    if let Ok(model) = subject.variant.load() {
        files.extend(model.weight_files(file).unwrap_or_default());
    }
    ComparedVariant {
        name: subject.name.clone(),
        file: file.display().to_string(),
        bytes: files.iter().filter_map(|file| std::fs::metadata(file).ok()).map(|metadata| metadata.len()).sum(),
        sha256: subject.variant.sha256.clone(),
        provider: subject.provider.to_string(),
        device: subject.device.to_string(),
        options: subject.variant.options.clone(),
    }
}

fn measuring(request: &CompareRequest, model_only: &Timed, end_to_end: Option<&Timed>) -> MeasuringRecord {
    let both = || std::iter::once(model_only).chain(end_to_end);
    let seconds = both().map(|timed| timed.duration.as_secs_f64()).sum();
    let tell = |what: &str, timed: &Timed| {
        let rounds = timed.rounds();
        let why = if timed.is_stable { "every median was known well enough" } else { "the time was up" };
        format!("{what}: {rounds} rounds, until {why}")
    };
    let mut note = tell("The model alone", model_only);
    if let Some(timed) = end_to_end {
        note.push_str("; ");
        note.push_str(&tell("end to end", timed));
    }
    note.push('.');
    let bootstrap = crate::measure::Bootstrap::default();
    MeasuringRecord {
        warmup_rounds: speed::WARM_UP as u64,
        rounds: both().map(Timed::rounds).min().unwrap_or(0) as u64,
        is_interleaved: true,
        tolerance: speed::TOLERANCE,
        time_limit_secs: request.seconds.as_secs_f64() * both().count() as f64,
        seconds,
        is_stable: both().all(|timed| timed.is_stable),
        note,
        confidence: bootstrap.confidence,
        resamples: bootstrap.resamples as u64,
        seed: bootstrap.seed,
    }
}
