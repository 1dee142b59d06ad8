//! How fast a model runs where slides cost nothing, through the engine's own sessions, batches and channels, and what
//! that means for a slide.
//!
//! `size` says how large the model is and what a tile costs, `slide` how long a slide takes.

pub(super) mod size;
mod slide;

use std::num::NonZeroUsize;
use std::time::{Duration, Instant};

use self::slide::Machine;
pub use self::slide::{SlideQuestion, SlideSize, TileCounts};
use super::ExperimentError;
use super::resources::{self, Seen};
use super::tiles::TileSet;
use crate::engine::config::{Emit, OnFailure, RunConfig, TilingConfig};
use crate::engine::{Engine, EngineError, LoadRequest, Simulated, stage_record};
use crate::inference::{Device, ModelCard, device, matmul_flops_per_sec};
use crate::measure::Samples;
use crate::onnx::vit::VitConfig;
use crate::pipeline::Cancel;
use crate::report::compare::{IntervalRecord, SummaryRecord};
use crate::report::{PointRecord, Simulation};

/// Tiles that take turns, so that no run meets the same one twice in a row.
pub(super) const TILES: usize = 32;
pub(super) const SEED: u64 = 1;
/// A round should be long against the clock and the filling of the channels.
const ROUND_SECS: f64 = 0.5;
/// Rounds that are measured at least: as many as an interval of the median needs.
const LEAST_ROUNDS: usize = 6;
/// Rounds end when the median is known within this share of it.
pub(super) const TOLERANCE: f64 = 0.02;

/// What is to be simulated.
#[derive(Clone, Debug)]
pub struct SimulateRequest {
    /// Variant, devices, provider and sessions.
    pub load: LoadRequest,
    /// Tiles per batch, each to be tried; empty for the device's own.
    pub batch_sizes: Vec<NonZeroUsize>,
    /// How long each batch size is measured at most.
    pub most_time: Duration,
    /// The ViT that the model was built from, for the formula and its warnings.
    pub vit: Option<VitConfig>,
    /// The slide whose time is asked for.
    pub slide: Option<SlideQuestion>,
    /// Power of the machine while it infers, where it is known better than a GPU tells it.
    pub watts: Option<f64>,
}

/// Simulates; `say` is told what is being done.
///
/// # Errors
/// [`ExperimentError`] if the model can't be loaded or run, or the slide can't be read.
pub fn simulate(
    card: ModelCard,
    request: &SimulateRequest,
    cancel: &Cancel,
    say: &mut dyn FnMut(&str),
) -> Result<Simulation, ExperimentError> {
    let variant = match &request.load.variant {
        Some(name) => card.variant(name)?,
        None => card.default_variant()?,
    };
    say("counting parameters and operations");
    let (size, element) = size::size(&card, variant, request.vit.as_ref())?;
    let resolved = device::resolve(&request.load.devices, request.load.provider, variant.provider)?;
    let device = resolved.devices.first().copied().unwrap_or(Device::Cpu);
    say("measuring the device's matrix product");
    // There is no such ceiling for integers: their products are measured against nothing.
    let ceiling = element.map(|element| matmul_flops_per_sec(device, resolved.provider, element)).transpose()?;

    say("loading");
    let tiles = TileSet::synthetic(card.tile_size, TILES, SEED).tiles;
    let start = Instant::now();
    let load = LoadRequest { batch_size: request.batch_sizes.first().copied(), ..request.load.clone() };
    let mut engine = Engine::load(card.clone(), &load, config(&card))?;
    let load_secs = start.elapsed().as_secs_f64();
    let start = Instant::now();
    let one_each = engine.execution().sessions * engine.batch_size().get();
    engine.simulate(&tiles, one_each, cancel, &mut |_| {})?;
    let first_batch_secs = start.elapsed().as_secs_f64();

    let mut found = Simulation {
        model: engine.model().clone(),
        warnings: size::warnings(&size, request.vit.as_ref(), device),
        size,
        load_secs,
        first_batch_secs,
        ceiling_flops_per_sec: ceiling,
        ..Simulation::default()
    };
    sweep(&mut engine, &tiles, &resolved.devices, request, &mut found, cancel, say)?;
    found.execution = engine.execution();
    found.peak_host_bytes = resources::peak_host_bytes();
    if let Some(question) = &request.slide {
        say("estimating the slide");
        let best = found.points.get(found.best);
        let machine = Machine {
            inference: best.map_or(0.0, |point| point.tiles_per_sec.value),
            shares_cores: device == Device::Cpu,
            readers: found.execution.readers,
            cores: std::thread::available_parallelism().map_or(1, NonZeroUsize::get),
            watts: request.watts.or(best.and_then(|point| point.watts)),
        };
        found.slide = Some(slide::estimate(question, &card, &machine)?);
    }
    Ok(found)
}

/// Measures every batch size, ascending: memory that a large batch took would serve the small ones too, and a GPU is
/// kept at the largest batch that it met.
fn sweep(
    engine: &mut Engine,
    tiles: &[Vec<u8>],
    devices: &[Device],
    request: &SimulateRequest,
    found: &mut Simulation,
    cancel: &Cancel,
    say: &mut dyn FnMut(&str),
) -> Result<(), ExperimentError> {
    let mut batch_sizes = request.batch_sizes.clone();
    if batch_sizes.is_empty() {
        batch_sizes.push(engine.batch_size());
    }
    batch_sizes.sort_unstable();
    batch_sizes.dedup();
    for batch_size in batch_sizes {
        say(&format!("measuring batches of {batch_size}"));
        engine.set_batch_size(batch_size);
        match measure(engine, tiles, devices, request.most_time, cancel) {
            Ok(measured) => found.points.push(measured.point(found.size.flops, found.ceiling_flops_per_sec)),
            Err(EngineError::Session(error)) if error.is_out_of_memory() && !found.points.is_empty() => {
                found.warnings.push(format!("batches of {batch_size} and more do not fit the device's memory"));
                break;
            }
            Err(error) => return Err(error.into()),
        }
    }
    let rate = |index: &usize| found.points[*index].tiles_per_sec.value;
    found.best = (0..found.points.len()).max_by(|a, b| rate(a).total_cmp(&rate(b))).unwrap_or(0);
    Ok(())
}

/// The rounds of one batch size.
struct Measured {
    rounds: Vec<Simulated>,
    is_stable: bool,
    seen: Seen,
}

fn measure(
    engine: &mut Engine,
    tiles: &[Vec<u8>],
    devices: &[Device],
    most_time: Duration,
    cancel: &Cancel,
) -> Result<Measured, EngineError> {
    let step = engine.execution().sessions * engine.batch_size().get();
    // The first round chooses kernels for the batch, the second tells how many tiles make a round long enough.
    engine.simulate(tiles, step, cancel, &mut |_| {})?;
    let trial = engine.simulate(tiles, step, cancel, &mut |_| {})?;
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "1 to 10,000")]
    let steps = (ROUND_SECS / trial.duration.as_secs_f64()).ceil().clamp(1.0, 10_000.0) as usize;
    let (rounds, seen) = resources::watched(devices, || {
        let start = Instant::now();
        let (mut rounds, mut secs) = (Vec::new(), Vec::new());
        loop {
            let round = engine.simulate(tiles, steps * step, cancel, &mut |_| {})?;
            secs.push(round.duration.as_secs_f64());
            rounds.push(round);
            let is_stable = Samples::new(secs.clone()).is_some_and(|samples| samples.is_stable(TOLERANCE));
            if rounds.len() >= LEAST_ROUNDS && (is_stable || start.elapsed() >= most_time) {
                return Ok::<_, EngineError>((rounds, is_stable));
            }
        }
    });
    let (rounds, is_stable) = rounds?;
    Ok(Measured { rounds, is_stable, seen })
}

impl Measured {
    fn point(self, flops: u64, ceiling: Option<f64>) -> PointRecord {
        let Self { rounds, is_stable, seen } = self;
        let rates: Vec<f64> = rounds.iter().map(|round| round.tiles as f64 / round.duration.as_secs_f64()).collect();
        let samples = Samples::new(rates.clone());
        let interval = samples.as_ref().and_then(Samples::median_interval);
        let median = samples.as_ref().map_or(0.0, Samples::median);
        let batches: Vec<f64> = rounds.iter().flat_map(|round| round.batch_secs.iter().copied()).collect();
        let flops_per_sec = flops as f64 * median;
        PointRecord {
            batch_size: rounds.first().map_or(0, |round| round.batch_size.get()),
            tiles_per_sec: interval.map_or(IntervalRecord { value: median, low: median, high: median }, Into::into),
            samples_tiles_per_sec: rates,
            ms_per_batch: Samples::new(batches).map(|batches| SummaryRecord::in_ms(&batches.summary())),
            flops_per_sec,
            share_of_ceiling: ceiling.map(|ceiling| flops_per_sec / ceiling),
            peak_device_bytes: seen.peak_bytes,
            device_utilisation: seen.mean_busy(),
            utilisation_by_device: seen.busy_by_device(),
            watts: seen.mean_watts(),
            is_stable,
            stages: rounds.last().map(|round| round.stages.iter().map(stage_record).collect()).unwrap_or_default(),
        }
    }
}

/// What a run without further settings does; its outputs are not written here.
pub(super) fn config(card: &ModelCard) -> RunConfig {
    RunConfig {
        tiling: TilingConfig::of(card),
        threshold: 0.5,
        emit: vec![Emit::Csv],
        on_tile_error: OnFailure::Fail,
        on_nonfinite: OnFailure::Fail,
        icc: false,
    }
}
