//! How fast a model runs where slides cost nothing, through the engine's own sessions, batches and channels, and what
//! that means for a slide.
//!
//! `size` says how large the model is and what a tile costs, `slide` how long a slide takes.

pub(super) mod size;
mod slide;

use std::num::NonZeroUsize;
use std::time::{Duration, Instant};

use self::slide::Machine;
pub use self::slide::{CountedSlide, SlideQuestion, SlideSize};
use super::ExperimentError;
use super::resources::{self, Seen};
use super::tiles::TileSet;
use crate::engine::config::{Emit, OnFailure, RunConfig, TilingConfig};
use crate::engine::{Engine, EngineError, LoadRequest, Simulated, stage_record};
use crate::inference::{Device, ModelCard, Provider, SessionError, device, matmul_flops_per_sec};
use crate::measure::Samples;
use crate::onnx::ElementType;
use crate::onnx::vit::VitConfig;
use crate::pipeline::Cancel;
use crate::report::compare::{IntervalRecord, SummaryRecord};
use crate::report::{PointRecord, Simulation};

/// Tiles that take turns, so that no run meets the same one twice in a row.
pub(super) const TILES: usize = 32;
pub(super) const SEED: u64 = 1;
/// A round should be long against the clock and the filling of the channels.
const ROUND_SECS: f64 = 0.5;
/// Share of a round's length for which its rate is tried.
const TRIAL_SHARE: f64 = 0.1;
/// Rounds that are measured at least: as many as an interval of the median needs.
const LEAST_ROUNDS: usize = 6;
/// Rounds end when the median is known within this share of it.
pub(super) const TOLERANCE: f64 = 0.02;

/// What is to be simulated.
#[derive(Debug)]
pub struct SimulateRequest {
    /// Variant, devices, provider, readers and sessions.
    pub load: LoadRequest,
    /// Tiles per batch, each to be tried; empty for the device's own.
    pub batch_sizes: Vec<NonZeroUsize>,
    /// How long each batch size is measured at most.
    pub most_time: Duration,
    /// The ViT that the model was built from, for the formula and its warnings.
    pub vit: Option<VitConfig>,
    /// The slide whose time is asked for.
    pub slide: Option<CountedSlide>,
    /// Power of the machine while it infers; a GPU tells only its own.
    pub watts: Option<f64>,
}

/// Simulates; `say` is told what is being done.
///
/// # Errors
/// [`ExperimentError`] if the model can't be loaded or run, or the slide can't be read.
pub fn simulate(
    card: ModelCard,
    request: &SimulateRequest,
    say: &mut dyn FnMut(&str),
) -> Result<Simulation, ExperimentError> {
    let variant = match &request.load.variant {
        Some(name) => card.variant(name)?,
        None => card.default_variant()?,
    };
    say("counting parameters and operations");
    let (size, element) = size::size(&card, variant, request.vit.as_ref())?;
    let resolved = device::resolve(&request.load.devices, request.load.provider, variant.provider)?;
    let devices = resolved.devices;
    let idle_bytes = resources::used_device_bytes(&devices);
    resources::forget_peak_host_bytes();

    let batch_sizes = ascending(&request.batch_sizes);
    let sessions = request.load.sessions.map_or(1, NonZeroUsize::get);
    batch_sizes.iter().try_for_each(|batch_size| fits(batch_size.get(), sessions, size.input_bytes))?;
    say("loading");
    let tiles = TileSet::synthetic(card.tile_size, TILES, SEED).tiles;
    let start = Instant::now();
    let load = LoadRequest { batch_size: batch_sizes.first().copied(), ..request.load.clone() };
    let mut engine = Engine::load(card.clone(), &load, config(&card))?;
    let load_secs = start.elapsed().as_secs_f64();
    let mut found = Simulation {
        model: engine.model().clone(),
        warnings: size::warnings(&size, request.vit.as_ref(), devices.first().copied().unwrap_or(Device::Cpu)),
        size,
        load_secs,
        ..Simulation::default()
    };
    found.first_batch_secs = first_batch(&mut engine, &tiles, batch_sizes.is_empty(), &mut found.warnings)?;
    // The matrices of the ceiling are not the model's.
    let host_bytes = resources::peak_host_bytes();
    say("measuring the devices' matrix product");
    found.ceiling_flops_per_sec = element.map(|element| ceiling(&devices, resolved.provider, element)).transpose()?;
    resources::forget_peak_host_bytes();
    let batch_sizes = if batch_sizes.is_empty() { vec![engine.batch_size()] } else { batch_sizes };
    for batch_size in batch_sizes {
        say(&format!("measuring batches of {batch_size}"));
        engine.set_batch_size(batch_size);
        match Measured::of(&mut engine, &tiles, &devices, idle_bytes, request.most_time) {
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
    let best = found.points.get(found.best);
    let best_size = best.and_then(|best| NonZeroUsize::new(best.batch_size));
    engine.set_batch_size(best_size.unwrap_or(engine.batch_size()));
    found.execution = engine.execution();
    found.peak_host_bytes = host_bytes.max(resources::peak_host_bytes());
    if let Some(slide) = &request.slide {
        say("estimating the slide");
        let gpu_watts = best.and_then(|point| point.watts);
        let machine = Machine {
            inference: best.map_or(0.0, |point| point.tiles_per_sec.value),
            shares_cores: devices.contains(&Device::Cpu),
            readers: found.execution.readers,
            cores: std::thread::available_parallelism().map_or(1, NonZeroUsize::get),
            watts: request.watts.or(gpu_watts),
            watts_are_of_gpus: request.watts.is_none() && gpu_watts.is_some(),
        };
        found.slide = Some(slide.estimate(&machine)?);
    }
    Ok(found)
}

/// Each batch size once, the smallest first: memory that a large batch took would serve the small ones too, and a GPU is
/// kept at the largest batch that it met.
fn ascending(batch_sizes: &[NonZeroUsize]) -> Vec<NonZeroUsize> {
    let mut ascending = batch_sizes.to_vec();
    ascending.sort_unstable();
    ascending.dedup();
    ascending
}

/// Refuses a batch whose tiles alone, in every session, are more than the memory that is free: the system would end the
/// program.
fn fits(batch_size: usize, sessions: usize, input_bytes: u64) -> Result<(), ExperimentError> {
    let needed = (batch_size as u64 * sessions as u64).saturating_mul(input_bytes);
    match resources::available_bytes() {
        Some(available) if needed > available => Err(ExperimentError::TooLargeBatch {
            batch_size,
            sessions,
            needed: needed >> 20,
            available: available >> 20,
        }),
        _ => Ok(()),
    }
}

/// Seconds of the first batch. Where the device chose its size and does not have the memory after all it is halved, as in
/// a run.
fn first_batch(
    engine: &mut Engine,
    tiles: &[Vec<u8>],
    may_be_less: bool,
    warnings: &mut Vec<String>,
) -> Result<f64, EngineError> {
    let asked = engine.batch_size();
    loop {
        match engine.simulate(tiles, engine.batches_of_all(), &Cancel::default(), &mut |_| false) {
            Err(EngineError::Session(error))
                if error.is_out_of_memory() && may_be_less && engine.batch_size().get() > 1 =>
            {
                let half = NonZeroUsize::new(engine.batch_size().get() / 2).unwrap_or(NonZeroUsize::MIN);
                engine.set_batch_size(half);
            }
            outcome => {
                let rounds = outcome?.rounds;
                if engine.batch_size() < asked {
                    warnings.push(format!("memory sufficed for batches of {} tiles, not {asked}", engine.batch_size()));
                }
                return Ok(rounds.first().map_or(0.0, Duration::as_secs_f64));
            }
        }
    }
}

/// What all devices together multiply.
fn ceiling(devices: &[Device], provider: Provider, element: ElementType) -> Result<f64, SessionError> {
    devices.iter().map(|device| matmul_flops_per_sec(*device, provider, element)).sum()
}

/// As many full batches, the same for every session, as take about `secs`.
pub(super) fn batches_for(engine: &mut Engine, tiles: &[Vec<u8>], secs: f64) -> Result<NonZeroUsize, EngineError> {
    let once = engine.batches_of_all();
    // The first round chooses kernels. What waits in the channels passes in no time, so a few rounds alone tell nothing.
    let later = |rounds: &[Duration]| rounds.iter().skip(1).sum::<Duration>().as_secs_f64();
    let mut goes_on = |rounds: &[Duration]| rounds.len() < 3 || later(rounds) < TRIAL_SHARE * secs;
    let rounds = engine.simulate(tiles, once, &Cancel::default(), &mut goes_on)?.rounds;
    let took = later(&rounds) / (rounds.len() - 1) as f64;
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "1 to 10,000")]
    let times = (secs / took).ceil().clamp(1.0, 10_000.0) as usize;
    Ok(NonZeroUsize::new(times * once.get()).unwrap_or(once))
}

/// The rounds of one batch size.
struct Measured {
    batch_size: NonZeroUsize,
    /// Full batches of a round, over all sessions.
    batches: NonZeroUsize,
    simulated: Simulated,
    is_stable: bool,
    seen: Seen,
}

impl Measured {
    fn of(
        engine: &mut Engine,
        tiles: &[Vec<u8>],
        devices: &[Device],
        idle_bytes: u64,
        most_time: Duration,
    ) -> Result<Self, EngineError> {
        let batches = batches_for(engine, tiles, ROUND_SECS)?;
        let (mut start, mut is_stable) = (None, false);
        let mut goes_on = |rounds: &[Duration]| {
            let start = *start.get_or_insert_with(Instant::now);
            let secs: Vec<f64> = rounds[1..].iter().map(Duration::as_secs_f64).collect();
            let count = secs.len();
            is_stable = Samples::new(secs).is_some_and(|samples| samples.is_stable(TOLERANCE));
            count < LEAST_ROUNDS || !is_stable && start.elapsed() < most_time
        };
        let (simulated, seen) = resources::watched_since(devices, idle_bytes, || {
            engine.simulate(tiles, batches, &Cancel::default(), &mut goes_on)
        });
        Ok(Self { batch_size: engine.batch_size(), batches, simulated: simulated?, is_stable, seen })
    }

    fn point(self, flops: u64, ceiling: Option<f64>) -> PointRecord {
        let Self { batch_size, batches, simulated, is_stable, seen } = self;
        let tiles = (batches.get() * batch_size.get()) as f64;
        let rates: Vec<f64> = simulated.rounds[1..].iter().map(|round| tiles / round.as_secs_f64()).collect();
        let samples = Samples::new(rates.clone());
        let interval = samples.as_ref().and_then(Samples::median_interval);
        let median = samples.as_ref().map_or(0.0, Samples::median);
        let per_tile = simulated.batch_secs.iter().map(|secs| secs / batch_size.get() as f64).collect();
        let flops_per_sec = flops as f64 * median;
        PointRecord {
            batch_size: batch_size.get(),
            tiles_per_sec: interval.map_or(IntervalRecord { value: median, low: median, high: median }, Into::into),
            samples_tiles_per_sec: rates,
            ms_per_tile: Samples::new(per_tile).map(|secs| SummaryRecord::in_ms(&secs.summary())),
            flops_per_sec,
            share_of_ceiling: ceiling.map(|ceiling| flops_per_sec / ceiling),
            peak_device_bytes: seen.peak_bytes,
            device_utilisation: seen.mean_busy(),
            utilisation_by_device: seen.busy_by_device(),
            watts: seen.mean_watts(),
            is_stable,
            stages: simulated.stages.iter().map(stage_record).collect(),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_that_no_memory_holds_is_refused() {
        let error = fits(1 << 20, 1 << 10, 1 << 20).unwrap_err();
        assert!(
            error.to_string().starts_with("batches of 1048576 in 1024 sessions hold tiles of 1073741824 MiB, and ")
        );
        assert!(fits(8, 2, 3 * 224 * 224 * 4).is_ok());
    }

    #[test]
    fn batch_sizes_are_tried_from_the_smallest_on() {
        let sizes = |sizes: &[usize]| sizes.iter().map(|size| NonZeroUsize::new(*size).unwrap()).collect::<Vec<_>>();
        assert_eq!(ascending(&sizes(&[256, 64, 256, 1])), sizes(&[1, 64, 256]));
        assert_eq!(ascending(&[]), []);
    }
}
