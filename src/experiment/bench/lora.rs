//! What LoRA costs: a model alone, with an adapter beside its weights, and with it merged, by rank.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::sessions_busy;
use crate::engine::{Engine, EngineError, LoadRequest, stage_record};
use crate::experiment::agreement::{self, Agreement};
use crate::experiment::race::{Contestant, Race, RaceRules, race};
use crate::experiment::simulate::{SEED, TILES, TOLERANCE, batches_for, config, size};
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
use crate::report::bench::{AloneRecord, Bench, BenchEntry, BenchKind, LoraRecord, ScalingRecord};
use crate::report::compare::IntervalRecord;

/// A turn should be long against the clock.
const TURN_SECS: f64 = 0.1;
/// Rounds that are measured at least.
const LEAST_ROUNDS: usize = 7;
/// Tiles on which merged and unmerged outputs are compared.
const PROOF_TILES: usize = 4;
/// What the model without an adapter is called.
const BASELINE: &str = "baseline";
/// Turns of a model alone while it is watched: memory has grown by then, and a GPU tells how busy it is a few times a second.
const ALONE_TURNS: usize = 3;
const ALONE_TURNS_ON_GPU: usize = 16;

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
    alone: AloneRecord,
}

/// Measures the model, and per rank the unmerged and the merged one, all in turns, each also on one device or by one
/// session where more were asked for. `alone` runs [`alone()`] in a process of its own; `say` is told what is being done.
///
/// # Errors
/// [`ExperimentError`] if the model has no such layers or can't be run, or merging changes its outputs.
pub fn bench(
    card: &ModelCard,
    request: &LoraRequest,
    alone: &mut dyn FnMut(&Path) -> Result<AloneRecord, String>,
    say: &mut dyn FnMut(&str),
) -> Result<Bench, ExperimentError> {
    let variant = variant_of(card, &request.load)?;
    let mut model = variant.load()?;
    model.embed_weights(&variant.file)?;
    let maker = Maker { card, variant, original: Rewriter::new(model.clone())?, request };
    let mut subjects = vec![maker.subject(BASELINE.to_owned(), model, None)?];
    let parameters = subjects[0].size.parameters;
    for &rank in &request.ranks {
        say(&format!("making rank {rank}, and proving that merging changes nothing"));
        subjects.extend(maker.rank(rank, parameters)?);
    }
    for subject in &mut subjects {
        say(&format!("{}: measuring memory", subject.name));
        match alone(&subject.card.default_variant()?.file) {
            Ok(seen) => subject.alone = seen,
            Err(why) => say(&format!("{}: its memory is not known: {why}", subject.name)),
        }
    }
    say("measuring speed, in turns");
    let timed = Timed::of(&subjects, request)?;
    let entries = subjects.into_iter().enumerate().map(|(index, subject)| subject.entry(&timed, index, &card.name));
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
        lora_targets: request.targets.clone(),
        entries: entries.collect(),
        skipped: Vec::new(),
    })
}

/// What the entries of a bench are called.
#[must_use]
pub fn names(request: &LoraRequest) -> Vec<String> {
    let of_rank = |rank: &usize| [unmerged(*rank), merged(*rank)];
    [BASELINE.to_owned()].into_iter().chain(request.ranks.iter().flat_map(of_rank)).collect()
}

fn unmerged(rank: usize) -> String {
    format!("rank {rank}, unmerged")
}

fn merged(rank: usize) -> String {
    format!("rank {rank}, merged")
}

/// What the model in `file` takes of memory and devices, if this process does nothing else.
///
/// # Errors
/// [`ExperimentError`] if it can't be run.
pub fn alone(card: &ModelCard, file: &Path, load: &LoadRequest) -> Result<AloneRecord, ExperimentError> {
    let variant = variant_of(card, load)?;
    let devices = device::resolve(&load.devices, load.provider, variant.provider)?.devices;
    let card = with_file(card, stand_in(variant, file)?);
    let tiles = TileSet::synthetic(card.tile_size, TILES, SEED).tiles;
    let turns = if devices.contains(&Device::Cpu) { ALONE_TURNS } else { ALONE_TURNS_ON_GPU };
    let idle_bytes = resources::used_device_bytes(&devices);
    let start = Instant::now();
    let mut engine = Engine::load(card.clone(), &of_one_variant(load), config(&card))?;
    engine.simulate(&tiles, engine.batches_of_all(), &Cancel::default(), &mut |_| false)?;
    let start_secs = start.elapsed().as_secs_f64();
    let batches = batches_for(&mut engine, &tiles, TURN_SECS)?;
    let (ran, seen) = resources::watched_since(&devices, idle_bytes, || {
        engine.simulate(&tiles, batches, &Cancel::default(), &mut |rounds| rounds.len() < turns)
    });
    let stages: Vec<_> = ran?.stages.iter().map(stage_record).collect();
    Ok(AloneRecord {
        start_secs: Some(start_secs),
        peak_host_bytes: resources::peak_host_bytes(),
        peak_device_bytes: seen.peak_bytes,
        utilisation: seen.mean_busy().or_else(|| sessions_busy(&stages)),
        utilisation_by_device: seen.busy_by_device(),
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
        let mut unmerged = self.subject(self::unmerged(rank), unmerged.finish()?, Some(record))?;
        let record = LoraRecord { is_merged: true, ..record };
        let mut merged = self.subject(self::merged(rank), merged.finish()?, Some(record))?;
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
        Ok(Subject { name, card, size, lora, alone: AloneRecord::default() })
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

/// How fast the subjects ran, all in turns.
struct Timed {
    engines: Vec<Engine>,
    /// Tiles per second of each round, by subject.
    rates: Vec<Vec<f64>>,
    /// How many devices or sessions there are, and the rates on one of them; `None` if there is just one.
    on_one: Option<(usize, Vec<Vec<f64>>)>,
}

impl Timed {
    fn of(subjects: &[Subject], request: &LoraRequest) -> Result<Self, ExperimentError> {
        let mut load = of_one_variant(&request.load);
        let mut engines = opened(subjects, &mut load)?;
        let one = load.on_one()?;
        if let Some((mut one, _)) = one.clone() {
            engines.extend(opened(subjects, &mut one)?);
        }
        let side = subjects.first().map_or(1, |subject| subject.card.tile_size);
        let tiles = TileSet::synthetic(side, TILES, SEED).tiles;
        let batches = |engine: &mut Engine| batches_for(engine, &tiles, TURN_SECS);
        let batches = engines.iter_mut().map(batches).collect::<Result<Vec<_>, _>>()?;
        let counts: Vec<usize> =
            engines.iter().zip(&batches).map(|(engine, batches)| batches.get() * engine.batch_size().get()).collect();
        let contestants = engines.iter_mut().zip(batches).map(|(engine, batches)| {
            let tiles = &tiles;
            Box::new(move || turn(engine, tiles, batches)) as Contestant<'_, EngineError>
        });
        let rules =
            RaceRules { warm_up: 1, least_rounds: LEAST_ROUNDS, tolerance: TOLERANCE, most_time: request.most_time };
        let Race { seconds, .. } = race(&mut contestants.collect::<Vec<_>>(), rules)?;
        let rate = |(seconds, count): (&Vec<f64>, usize)| seconds.iter().map(|s| count as f64 / s).collect();
        let mut rates: Vec<Vec<f64>> = seconds.iter().zip(counts).map(rate).collect();
        let of_one = rates.split_off(subjects.len());
        engines.truncate(subjects.len());
        Ok(Self { engines, rates, on_one: one.map(|(_, replicas)| (replicas, of_one)) })
    }

    /// What more devices or sessions bring to a subject.
    fn scaling(&self, index: usize) -> Option<ScalingRecord> {
        let (replicas, of_one) = self.on_one.as_ref()?;
        let speedup = Bootstrap::default().ratio(&self.rates[index], &of_one[index])?;
        let efficiency = speedup.value / *replicas as f64;
        let rounds_of_one = of_one[index].clone();
        Some(ScalingRecord { replicas: *replicas, rounds_of_one, speedup: speedup.into(), efficiency })
    }
}

/// An engine for each; all take the batch that suits the first.
fn opened(subjects: &[Subject], load: &mut LoadRequest) -> Result<Vec<Engine>, ExperimentError> {
    let mut engines: Vec<Engine> = Vec::with_capacity(subjects.len());
    for subject in subjects {
        let engine = Engine::load(subject.card.clone(), load, config(&subject.card))?;
        load.batch_size = Some(engine.batch_size());
        engines.push(engine);
    }
    Ok(engines)
}

/// A turn is the second round: the first one has what is set up for its threads.
fn turn(engine: &mut Engine, tiles: &[Vec<u8>], batches: NonZeroUsize) -> Result<Duration, EngineError> {
    let simulated = engine.simulate(tiles, batches, &Cancel::default(), &mut |rounds| rounds.len() < 2)?;
    Ok(simulated.rounds.last().copied().unwrap_or_default())
}

impl Subject {
    /// `index` is its place among the subjects, of which the first is the baseline.
    fn entry(self, timed: &Timed, index: usize, model: &str) -> BenchEntry {
        let (engine, rounds) = (&timed.engines[index], timed.rates[index].clone());
        let execution = engine.execution();
        let samples = Samples::new(rounds.clone());
        let value = samples.as_ref().map_or(f64::NAN, Samples::median);
        let interval = samples.as_ref().and_then(Samples::median_interval);
        let ratio = Bootstrap::default().ratio(&rounds, &timed.rates[0]);
        let batch_size = engine.batch_size().get();
        BenchEntry {
            name: self.name,
            model: model.to_owned(),
            precision: "as built".to_owned(),
            variant: engine.model().variant.clone(),
            device: execution.device,
            provider: execution.provider,
            sessions: execution.sessions,
            batch_size,
            total_batch_size: batch_size * execution.sessions,
            parameters: self.size.parameters,
            flops: self.size.flops,
            samples_per_sec: interval.map_or(IntervalRecord { value, low: value, high: value }, Into::into),
            ms_per_sample: 1e3 / value,
            rounds_samples_per_sec: rounds,
            ratio: ratio.map(Into::into),
            start_secs: self.alone.start_secs,
            peak_host_bytes: self.alone.peak_host_bytes,
            peak_device_bytes: self.alone.peak_device_bytes,
            utilisation: self.alone.utilisation,
            utilisation_by_device: self.alone.utilisation_by_device,
            is_stable: samples.is_some_and(|samples| samples.is_stable(TOLERANCE)),
            lora: self.lora,
            scaling: timed.scaling(index),
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
