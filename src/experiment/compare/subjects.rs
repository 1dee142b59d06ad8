//! What is compared: the variants of all models, each with a name of its own and a place to run.

use std::num::NonZeroUsize;

use super::CompareRequest;
use crate::experiment::ExperimentError;
use crate::experiment::tiles::TileSet;
use crate::inference::{
    Activation, Device, ModelCard, OrtSession, Provider, Session, SessionError, SessionFactory, SessionOptions, Task,
    Variant, device,
};
use crate::report::compare::LeftOutRecord;

/// Batch of the step that adds batching where the device's own batch is smaller.
const BATCHED: usize = 8;

/// A variant, and where it runs.
#[derive(Clone, Debug)]
pub(super) struct Subject {
    /// Unique.
    pub(super) name: String,
    /// Index of its model.
    pub(super) model: usize,
    pub(super) card: ModelCard,
    pub(super) variant: Variant,
    pub(super) device: Device,
    pub(super) provider: Provider,
}

/// What a variant adds to the original, by its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    Rewritten,
    Fp16,
    Int8,
    Other,
}

impl Kind {
    pub(super) fn of(name: &str) -> Self {
        let name = name.to_lowercase();
        match () {
            () if name.contains("int8") => Self::Int8,
            () if name.contains("fp16") => Self::Fp16,
            () if name.contains("fp32") => Self::Rewritten,
            () => Self::Other,
        }
    }
}

/// Tiles per batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct BatchSize {
    /// As a run takes them on the device.
    pub(super) run: usize,
    /// Of the step that adds batching.
    pub(super) batched: usize,
}

impl BatchSize {
    /// Half of both, at least 1.
    pub(super) fn halved(self) -> Self {
        Self { run: (self.run / 2).max(1), batched: (self.batched / 2).max(1) }
    }
}

impl Subject {
    fn factory(&self, card: &ModelCard) -> Result<SessionFactory, SessionError> {
        // One thread a session, as in a run; OpenVINO brings its own.
        let intra_threads = (self.provider != Provider::OpenVino).then_some(NonZeroUsize::MIN);
        let options = SessionOptions { device: self.device, provider: self.provider, intra_threads };
        SessionFactory::new(card, &self.variant, options)
    }

    /// A session as a run has them.
    pub(super) fn open(&self) -> Result<OrtSession, SessionError> {
        self.factory(&self.card)?.open()
    }

    /// A session that gives the model's raw outputs.
    pub(super) fn open_raw(&self) -> Result<OrtSession, SessionError> {
        self.factory(&ModelCard { activation: Activation::None, ..self.card.clone() })?.open()
    }
}

/// The subjects, the original first, and the variants that are made for another device.
pub(super) fn subjects(request: &CompareRequest) -> Result<(Vec<Subject>, Vec<LeftOutRecord>), ExperimentError> {
    let Some(first) = request.models.first() else { return Ok((Vec::new(), Vec::new())) };
    for name in &request.variants {
        if !request.models.iter().any(|card| card.variants.contains_key(name)) {
            first.variant(name)?;
        }
    }
    let mut subjects: Vec<Subject> = Vec::new();
    let mut left_out = Vec::new();
    for (model, card) in request.models.iter().enumerate() {
        comparable(first, card)?;
        for variant in in_order(card, model == 0, &request.variants)? {
            let is_original = subjects.is_empty();
            let name = unique(full_name(card, variant, request.models.len()), &subjects);
            let suits = |subject: &Subject| variant.provider.is_none_or(|provider| provider.runs_on(subject.device));
            if let Some(original) = subjects.first().filter(|original| request.variants.is_empty() && !suits(original))
            {
                let made_for = variant.provider.map_or_else(String::new, |provider| provider.to_string());
                let why = format!("made for {made_for}, not for {}", original.device);
                left_out.push(LeftOutRecord { name, why, is_failure: false });
                continue;
            }
            match device::resolve(&request.devices, request.provider, variant.provider) {
                Ok(found) => {
                    let device = found.devices.first().copied().unwrap_or(Device::Cpu);
                    let (card, variant) = (card.clone(), variant.clone());
                    subjects.push(Subject { name, model, card, variant, device, provider: found.provider });
                }
                Err(error) if is_original => return Err(error.into()),
                Err(error) => {
                    // Asked for by name, or only because the card lists it.
                    let is_failure = !request.variants.is_empty();
                    left_out.push(LeftOutRecord { name, why: crate::engine::chain(&error), is_failure });
                }
            }
        }
    }
    Ok((subjects, left_out))
}

/// Keeps the subjects that open and predict a batch.
pub(super) fn that_run(
    subjects: Vec<Subject>,
    tiles: &TileSet,
    left_out: &mut Vec<LeftOutRecord>,
) -> Result<Vec<Subject>, ExperimentError> {
    let mut running = Vec::new();
    for subject in subjects {
        let tiles = tiles.slices();
        match subject.open().and_then(|mut session| session.predict(&tiles[..tiles.len().min(2)])) {
            Ok(_) => running.push(subject),
            Err(error) if running.is_empty() => return Err(error.into()),
            Err(error) => {
                let why = crate::engine::chain(&error);
                left_out.push(LeftOutRecord { name: subject.name, why, is_failure: true });
            }
        }
    }
    Ok(running)
}

/// The batches of the steps, by what was asked for, the graph and the device.
pub(super) fn batch_size(original: &Subject, asked: Option<NonZeroUsize>) -> Result<BatchSize, ExperimentError> {
    let factory = original.factory(&original.card)?;
    Ok(match (asked, factory.max_batch()) {
        (Some(asked), _) => BatchSize { run: asked.get(), batched: asked.get() },
        (None, Some(fixed)) => BatchSize { run: fixed, batched: fixed },
        (None, None) => {
            let run = factory.auto_batch_size(1)?;
            BatchSize { run, batched: run.max(BATCHED) }
        }
    })
}

/// A card's variants: its original if it is the first model, and those asked for, the likelier slower ones first.
fn in_order<'a>(card: &'a ModelCard, is_first: bool, asked: &[String]) -> Result<Vec<&'a Variant>, ExperimentError> {
    let original = card.default_variant()?;
    let is_wanted = |name: &String| asked.is_empty() || asked.contains(name);
    let mut others: Vec<&Variant> =
        card.variants.values().filter(|variant| variant.name != original.name && is_wanted(&variant.name)).collect();
    others.sort_by_key(|variant| Kind::of(&variant.name));
    let first = (is_first || is_wanted(&original.name)).then_some(original);
    Ok(first.into_iter().chain(others).collect())
}

fn comparable(first: &ModelCard, other: &ModelCard) -> Result<(), ExperimentError> {
    let names = |card: &ModelCard| card.class_names().join(", ");
    let what = if first.task != other.task {
        format!("its task is {}, not {}", other.task, first.task)
    } else if first.tile_size != other.tile_size || first.mpp != other.mpp {
        let of = |card: &ModelCard| format!("{} px at {} µm/px", card.tile_size, card.mpp);
        format!("its tiles are {}, not {}", of(other), of(first))
    } else if first.task != Task::Features && names(first) != names(other) {
        format!("its classes are {}, not {}", names(other), names(first))
    } else {
        return Ok(());
    };
    Err(ExperimentError::Incomparable { first: first.path.clone(), other: other.path.clone(), what })
}

/// The variant's name; of several models the file's stem, with the variant's name where the card has several.
fn full_name(card: &ModelCard, variant: &Variant, models: usize) -> String {
    let is_bare = card.path.extension().is_some_and(|extension| extension == "onnx");
    let stem = |path: &std::path::Path| path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    match (models, is_bare) {
        (1, _) => variant.name.clone(),
        (_, true) => stem(&card.path),
        (_, false) => format!("{}/{}", stem(card.path.parent().unwrap_or(&card.path)), variant.name),
    }
}

fn unique(name: String, taken: &[Subject]) -> String {
    let is_taken = |name: &str| taken.iter().any(|subject| subject.name == name);
    if !is_taken(&name) {
        return name;
    }
    let numbered = (2..).map(|number| format!("{name} ({number})"));
    numbered.into_iter().find(|name| !is_taken(name)).unwrap_or(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_are_halved_down_to_one() {
        let halves = std::iter::successors(Some(BatchSize { run: 4, batched: 8 }), |batch| Some(batch.halved()));
        let sizes: Vec<(usize, usize)> = halves.map(|batch| (batch.run, batch.batched)).take(5).collect();
        assert_eq!(sizes, [(4, 8), (2, 4), (1, 2), (1, 1), (1, 1)]);
    }

    #[test]
    fn kinds_follow_the_names() {
        let kinds = ["fp32-rewritten", "fp32-cuda", "fp16", "vit-INT8", "distilled"].map(Kind::of);
        assert_eq!(kinds, [Kind::Rewritten, Kind::Rewritten, Kind::Fp16, Kind::Int8, Kind::Other]);
    }
}
