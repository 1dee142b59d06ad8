//! What LoRA costs: a model alone, with an adapter beside its weights, and with it merged, by rank.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::engine::{Engine, EngineError, LoadRequest};
use crate::experiment::agreement::{self, Agreement};
use crate::experiment::race::{Contestant, Race, RaceRules, race};
use crate::experiment::simulate::{SEED, TILES, TOLERANCE, config, size};
use crate::experiment::tiles::TileSet;
use crate::experiment::{ExperimentError, resources};
use crate::inference::{
    Activation, Device, ModelCard, Prediction, Provider, SessionFactory, SessionOptions, Variant, device,
};
use crate::measure::{Bootstrap, Samples};
use crate::onnx::lora::{Adapter, RandomLora, attach, merge};
use crate::onnx::{ElementType, Model, Rewriter};
use crate::pipeline::Cancel;
use crate::report::ModelSizeRecord;
use crate::report::bench::{Bench, BenchEntry, BenchKind, LoraRecord};
use crate::report::compare::{IntervalRecord, ResourcesRecord};

/// A turn should be long against the clock and the filling of the channels.
const TURN_SECS: f64 = 0.25;
/// Rounds that are measured at least.
const LEAST_ROUNDS: usize = 7;
/// Tiles on which merged and unmerged outputs are compared.
const PROOF_TILES: usize = 4;
/// Batches of every session while memory is watched: it has grown by then.
const ALONE_BATCHES: usize = 3;

/// What is to be measured.
#[derive(Clone, Debug)]
pub struct LoraRequest {
    /// Variant, devices, provider, sessions, and tiles per batch.
    pub load: LoadRequest,
    /// The ranks, ascending.
    pub ranks: Vec<usize>,
    /// α: updates are scaled by α / r.
    pub alpha: f32,
    /// The layers that adapters are for.
    pub targets: Vec<String>,
    /// No round starts after this.
    pub most_time: Duration,
    /// Where the models are written; they are of no use afterwards.
    pub folder: PathBuf,
}

/// A model to measure.
struct Subject {
    name: String,
    card: ModelCard,
    size: ModelSizeRecord,
    lora: Option<LoraRecord>,
    memory: ResourcesRecord,
}

/// Measures the model, and per rank the unmerged and the merged one, all in turns. `alone` measures what a model's file
/// takes in a process of its own, where one can be had; `say` is told what is being done.
///
/// # Errors
/// [`ExperimentError`] if the model has no such layers or can't be run, or merging changes its outputs.
pub fn bench(
    card: &ModelCard,
    request: &LoraRequest,
    alone: &mut dyn FnMut(&Path) -> Option<ResourcesRecord>,
    say: &mut dyn FnMut(&str),
) -> Result<Bench, ExperimentError> {
    let variant = variant_of(card, &request.load)?;
    let mut model = variant.load()?;
    model.embed_weights(&variant.file)?;
    let maker = Maker { card, variant, original: Rewriter::new(model.clone())?, request };
    let mut subjects = vec![maker.subject("baseline".to_owned(), model, None)?];
    let parameters = subjects[0].size.parameters;
    for &rank in &request.ranks {
        say(&format!("making rank {rank}, and proving that merging changes nothing"));
        subjects.extend(maker.rank(rank, parameters)?);
    }
    for subject in &mut subjects {
        say(&format!("{}: measuring memory", subject.name));
        let file = &subject.card.default_variant()?.file;
        subject.memory = alone(file).unwrap_or_default();
    }
    say("measuring speed, in turns");
    let (engines, race, counts) = timed(&subjects, request)?;
    let rates: Vec<Vec<f64>> = race
        .seconds
        .iter()
        .zip(counts)
        .map(|(seconds, count)| seconds.iter().map(|s| count as f64 / s).collect())
        .collect();
    let entry = |((subject, engine), of_rounds): ((Subject, &Engine), &Vec<f64>)| {
        subject.entry(engine, of_rounds, rates.first(), &card.name)
    };
    let ranks: Vec<String> = request.ranks.iter().map(usize::to_string).collect();
    Ok(Bench {
        kind: BenchKind::Lora,
        subject: format!(
            "{} with LoRA of {} at rank {}, α = {}",
            card.name,
            request.targets.join(" and "),
            ranks.join(", "),
            request.alpha
        ),
        entries: subjects.into_iter().zip(&engines).zip(&rates).map(entry).collect(),
        skipped: Vec::new(),
    })
}

/// What the model in `file` takes of memory, if this process does nothing else.
///
/// # Errors
/// [`ExperimentError`] if it can't be run.
pub fn alone(card: &ModelCard, file: &Path, load: &LoadRequest) -> Result<ResourcesRecord, ExperimentError> {
    let variant = variant_of(card, load)?;
    let devices = device::resolve(&load.devices, load.provider, variant.provider)?.devices;
    let card = with_file(card, stand_in(variant, file)?);
    let tiles = TileSet::synthetic(card.tile_size, TILES, SEED).tiles;
    let run = || {
        let mut engine = Engine::load(card.clone(), &of_one_variant(load), config(&card))?;
        let count = ALONE_BATCHES * engine.execution().sessions * engine.batch_size().get();
        engine.simulate(&tiles, count, &Cancel::default(), &mut |_| {})
    };
    let (ran, seen) = resources::watched(&devices, run);
    ran?;
    Ok(ResourcesRecord {
        peak_host_bytes: resources::peak_host_bytes(),
        peak_device_bytes: seen.peak_bytes,
        device_utilisation: None,
    })
}

/// Makes the models that are measured.
struct Maker<'a> {
    card: &'a ModelCard,
    variant: &'a Variant,
    original: Rewriter,
    request: &'a LoraRequest,
}

impl Maker<'_> {
    /// The unmerged and the merged model of a rank, proven to compute the same.
    fn rank(&self, rank: usize, parameters: u64) -> Result<[Subject; 2], ExperimentError> {
        let LoraRequest { alpha, targets, .. } = self.request;
        let lora = RandomLora { rank, alpha: *alpha, targets: targets.clone(), seed: SEED };
        let adapter = Adapter::random(&self.original, &lora)?;
        let [mut unmerged, mut merged] = [self.original.clone(), self.original.clone()];
        attach(&mut unmerged, &adapter)?;
        merge(&mut merged, &adapter)?;
        let own = adapter.parameters() as u64;
        let record = LoraRecord {
            rank,
            alpha: f64::from(*alpha),
            is_merged: false,
            parameters: own,
            share_of_parameters: own as f64 / (own + parameters) as f64,
            max_abs_difference: 0.0,
            difference_bound: 0.0,
        };
        let mut unmerged = self.subject(format!("rank {rank}, unmerged"), unmerged.finish()?, Some(record))?;
        let record = LoraRecord { is_merged: true, ..record };
        let mut merged = self.subject(format!("rank {rank}, merged"), merged.finish()?, Some(record))?;
        let (difference, bound) = proven(&unmerged.card, &merged.card, rank, &Rounding::of(&self.original, &adapter))?;
        for lora in [&mut unmerged.lora, &mut merged.lora].into_iter().flatten() {
            (lora.max_abs_difference, lora.difference_bound) = (difference, bound);
        }
        Ok([unmerged, merged])
    }

    fn subject(&self, name: String, model: Model, lora: Option<LoraRecord>) -> Result<Subject, ExperimentError> {
        let file = self.request.folder.join(format!("{}.onnx", name.replace([' ', ','], "")));
        model.save_with_weights(&file)?;
        let card = with_file(self.card, stand_in(self.variant, &file)?);
        let (size, _) = size::size(&card, card.default_variant()?, None)?;
        Ok(Subject { name, card, size, lora, memory: ResourcesRecord::default() })
    }
}

fn variant_of<'a>(card: &'a ModelCard, load: &LoadRequest) -> Result<&'a Variant, ExperimentError> {
    Ok(match &load.variant {
        Some(name) => card.variant(name)?,
        None => card.default_variant()?,
    })
}

/// The file, run as the variant is.
fn stand_in(variant: &Variant, file: &Path) -> Result<Variant, ExperimentError> {
    let Variant { name, provider, options, note, .. } = variant.clone();
    Ok(Variant { provider, options, note, ..Variant::of_file(&name, file)? })
}

/// The card with this variant alone.
fn with_file(card: &ModelCard, variant: Variant) -> ModelCard {
    ModelCard { variants: [(variant.name.clone(), variant)].into(), ..card.clone() }
}

/// The request for a card that has just one variant.
fn of_one_variant(load: &LoadRequest) -> LoadRequest {
    LoadRequest { variant: None, ..load.clone() }
}

/// What rounding may do to a model in which one sum is made in two ways.
struct Rounding {
    /// Unit roundoff of the weights.
    unit: f64,
    /// Terms of the longest sum.
    terms: usize,
    /// Layers with an adapter.
    layers: usize,
}

impl Rounding {
    fn of(original: &Rewriter, adapter: &Adapter) -> Self {
        let halves = |name: &String| original.constant_element(name) == Some(ElementType::F16);
        let unit = if original.constants().iter().any(halves) { 2.0_f64.powi(-11) } else { 2.0_f64.powi(-24) };
        let terms = adapter.updates.values().map(|update| update.inputs + update.rank).max().unwrap_or(1);
        Self { unit, terms, layers: adapter.updates.len() }
    }

    /// Share of the largest output: a sum of n terms is off by about √n roundoffs (Higham & Mary, *SIAM J. Sci. Comput.*
    /// 41, 2019), in both models, λ = 8 standing for near certainty, and layers add up. More than 1 % is never rounding.
    fn share(&self) -> f64 {
        (2.0 * 8.0 * self.unit * (self.terms as f64).sqrt() * self.layers as f64).min(0.01)
    }
}

/// The largest difference between the outputs of both, and what rounding explains.
fn proven(
    unmerged: &ModelCard,
    merged: &ModelCard,
    rank: usize,
    rounding: &Rounding,
) -> Result<(f64, f64), ExperimentError> {
    let tiles = TileSet::synthetic(unmerged.tile_size, PROOF_TILES, SEED);
    let [unmerged_outputs, merged_outputs] = [raw_outputs(unmerged, &tiles)?, raw_outputs(merged, &tiles)?];
    let Agreement { max_abs_difference: difference, .. } =
        agreement::compare(unmerged.task, &unmerged_outputs, &merged_outputs, 0.5);
    let bound = rounding.share() * unmerged_outputs.iter().map(largest).fold(0.0, f64::max);
    if difference <= bound {
        Ok((difference, bound))
    } else {
        Err(ExperimentError::MergeDiffers { rank, difference, bound })
    }
}

/// By the CPU, which computes with all the bits of the weights; that both graphs are the same holds everywhere.
fn raw_outputs(card: &ModelCard, tiles: &TileSet) -> Result<Vec<Prediction>, ExperimentError> {
    // An activation hides differences where it saturates.
    let card = ModelCard { activation: Activation::None, ..card.clone() };
    let options = SessionOptions { device: Device::Cpu, provider: Provider::Cpu, intra_threads: None };
    let mut session = SessionFactory::new(&card, card.default_variant()?, options)?.open()?;
    Ok(agreement::predict(&mut session, &tiles.slices(), PROOF_TILES)?)
}

fn largest(prediction: &Prediction) -> f64 {
    let of = |values: &mut dyn Iterator<Item = &f32>| values.fold(0.0_f32, |most, value| most.max(value.abs()));
    f64::from(match prediction {
        Prediction::Classes(scores) | Prediction::Features(scores) => of(&mut scores.iter()),
        Prediction::Map(map) => of(&mut map.iter()),
    })
}

/// Runs all subjects in turns: their engines, their times, and how many tiles a turn of each has.
fn timed(subjects: &[Subject], request: &LoraRequest) -> Result<(Vec<Engine>, Race, Vec<usize>), ExperimentError> {
    let mut load = of_one_variant(&request.load);
    let mut engines: Vec<Engine> = Vec::with_capacity(subjects.len());
    for subject in subjects {
        let engine = Engine::load(subject.card.clone(), &load, config(&subject.card))?;
        // All take the batch that suits the baseline.
        load.batch_size = Some(engine.batch_size());
        engines.push(engine);
    }
    let side = subjects.first().map_or(1, |subject| subject.card.tile_size);
    let tiles = TileSet::synthetic(side, TILES, SEED).tiles;
    let counts = engines.iter_mut().map(|engine| tiles_per_turn(engine, &tiles)).collect::<Result<Vec<_>, _>>()?;
    let contestants = engines.iter_mut().zip(&counts).map(|(engine, count)| {
        let tiles = &tiles;
        Box::new(move || engine.simulate(tiles, *count, &Cancel::default(), &mut |_| {}).map(drop))
            as Contestant<'_, EngineError>
    });
    let rules =
        RaceRules { warm_up: 1, least_rounds: LEAST_ROUNDS, tolerance: TOLERANCE, most_time: request.most_time };
    let race = race(&mut contestants.collect::<Vec<_>>(), rules)?;
    Ok((engines, race, counts))
}

/// As many full batches for every session as make a turn long enough.
fn tiles_per_turn(engine: &mut Engine, tiles: &[Vec<u8>]) -> Result<usize, EngineError> {
    let step = engine.execution().sessions * engine.batch_size().get();
    engine.simulate(tiles, step, &Cancel::default(), &mut |_| {})?;
    let start = Instant::now();
    engine.simulate(tiles, step, &Cancel::default(), &mut |_| {})?;
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "1 to 10,000")]
    let steps = (TURN_SECS / start.elapsed().as_secs_f64()).ceil().clamp(1.0, 10_000.0) as usize;
    Ok(steps * step)
}

impl Subject {
    /// `rounds`: tiles per second of each round; those of `baseline` ran next to them.
    fn entry(self, engine: &Engine, rounds: &[f64], baseline: Option<&Vec<f64>>, model: &str) -> BenchEntry {
        let execution = engine.execution();
        let samples = Samples::new(rounds.to_vec());
        let value = samples.as_ref().map_or(f64::NAN, Samples::median);
        let interval = samples.as_ref().and_then(Samples::median_interval);
        let ratio = baseline.and_then(|baseline| Bootstrap::default().ratio(rounds, baseline));
        let batch_size = engine.batch_size().get();
        BenchEntry {
            name: self.name,
            model: model.to_owned(),
            precision: "as built".to_owned(),
            device: execution.device,
            sessions: execution.sessions,
            batch_size,
            total_batch_size: batch_size * execution.sessions,
            parameters: self.size.parameters,
            flops: self.size.flops,
            samples_per_sec: interval.map_or(IntervalRecord { value, low: value, high: value }, Into::into),
            ms_per_sample: 1e3 / value,
            rounds_samples_per_sec: rounds.to_vec(),
            ratio: ratio.map(Into::into),
            peak_host_bytes: self.memory.peak_host_bytes,
            peak_device_bytes: self.memory.peak_device_bytes,
            utilisation: None,
            is_stable: samples.is_some_and(|samples| samples.is_stable(TOLERANCE)),
            lora: self.lora,
            scaling: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inference::{BareModel, Task};
    use crate::onnx::vit;

    fn card(folder: &Path) -> ModelCard {
        let config = "image=16,patch=8,dim=16,depth=2,heads=2,mlp=2".parse().unwrap();
        let file = folder.join("vit.onnx");
        vit::build(&config, 1).unwrap().save_with_weights(&file).unwrap();
        let bare = BareModel {
            task: Some(Task::Features),
            tile_size: Some(16),
            target_mpp: crate::geometry::Mpp::new(0.5).ok(),
            mean: Some([0.5; 3]),
            std: Some([0.5; 3]),
            activation: Some(Activation::None),
            ..BareModel::default()
        };
        ModelCard::load(&file, &bare).unwrap()
    }

    #[test]
    fn rounding_grows_with_length_depth_and_unit() {
        let of = |unit, terms, layers| Rounding { unit, terms, layers }.share();
        // 16 · 2⁻²⁴ · √64 · 4.
        assert_eq!(of(2.0_f64.powi(-24), 64, 4), 512.0 * 2.0_f64.powi(-24));
        assert_eq!(of(2.0_f64.powi(-11), 4096, 48), 0.01);
    }

    #[test]
    fn a_model_that_computes_something_else_is_no_merged_one() {
        let folder = tempfile::tempdir().unwrap();
        let card = card(folder.path());
        let mut model = card.default_variant().unwrap().load().unwrap();
        let rewriter = Rewriter::new(model.clone()).unwrap();
        let lora = RandomLora { rank: 4, alpha: 16.0, targets: vec!["qkv".to_owned()], seed: 1 };
        let adapter = Adapter::random(&rewriter, &lora).unwrap();
        let rounding = Rounding::of(&rewriter, &adapter);
        assert_eq!((rounding.terms, rounding.layers), (20, 2));
        let mut merged = rewriter;
        merge(&mut merged, &adapter).unwrap();
        model = merged.finish().unwrap();
        let file = folder.path().join("merged.onnx");
        model.save_with_weights(&file).unwrap();
        let merged = with_file(&card, Variant::of_file("fp32", &file).unwrap());
        // The model without the adapter is not the one with it.
        let error = proven(&card, &merged, 4, &rounding).unwrap_err();
        assert!(error.to_string().starts_with("rank 4: the merged model's outputs differ"), "{error}");
        let (difference, bound) = proven(&merged, &merged, 4, &rounding).unwrap();
        assert!(difference == 0.0 && bound > 0.0);
    }
}
