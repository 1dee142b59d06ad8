//! The composition root: slide, tissue, inference, stitching and outputs become one run.
//!
//! [`plan::plan`] decides which tiles of a slide are inferred, [`Engine`] sends them through the stages,
//! [`cohort::run`] does so for many slides and keeps the account.

pub mod cohort;
pub mod config;
mod error;
pub mod inputs;
mod load;
mod pictures;
pub mod plan;
mod stages;
mod write;

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::path::Path;
use std::time::{Duration, Instant};

use crossbeam_channel::bounded;

use self::config::RunConfig;
pub use self::error::EngineError;
pub use self::load::LoadRequest;
use self::plan::SlidePlan;
use self::stages::{Group, Infer, Placed, Read, Stitch, Tile};
use self::write::{SlideFiles, SlideResults, Target};
use crate::inference::{Activation, ModelCard, Session, SessionError, SessionFactory, Task};
use crate::pipeline::{self, Cancel, PipelineError, StageStats};
use crate::report::{ExecutionRecord, ModelRecord};
use crate::slide::{ReadOptions, TileReader};
use crate::stitch::{StitchSpec, Stitcher};

/// Tiles between two calls of the progress callback.
const PROGRESS_STEP: u64 = 8;
/// Items between two stages: enough to hide an uneven rate, few enough to stay small.
const QUEUE: NonZeroUsize = NonZeroUsize::new(2).unwrap();

/// A loaded model with all that it takes to run it over slides.
pub struct Engine {
    card: ModelCard,
    config: RunConfig,
    /// All of the same variant; over all devices.
    sessions: Vec<Box<dyn Session>>,
    /// One per device.
    factories: Vec<SessionFactory>,
    readers: NonZeroUsize,
    /// Lowered when a device's memory does not suffice.
    batch_size: NonZeroUsize,
    model: ModelRecord,
    execution: ExecutionRecord,
}

/// What a run over one slide gave.
#[derive(Debug)]
pub(crate) struct SlideRun {
    pub(crate) results: SlideResults,
    pub(crate) stages: Vec<StageStats>,
    /// From the first tile to the last output.
    pub(crate) duration: Duration,
    /// Tiles per batch: lower than asked for if memory did not suffice.
    pub(crate) batch_size: NonZeroUsize,
    /// Whether an ICC profile was applied.
    pub(crate) converts_colours: bool,
}

impl Engine {
    /// Sends a slide's tiles through the stages and writes its files below `out`.
    ///
    /// `progress` is told the number of tiles done. If a device's memory does not suffice, the slide is started again
    /// with half the batch.
    ///
    /// # Errors
    /// [`EngineError`]: the first thing that went wrong; then no file of the slide is left.
    pub(crate) fn run_slide(
        &mut self,
        id: &str,
        plan: &SlidePlan,
        out: &Path,
        cancel: &Cancel,
        progress: &mut dyn FnMut(u64),
    ) -> Result<SlideRun, EngineError> {
        let mut batch_size = self.batch_size;
        loop {
            match self.try_slide(id, plan, out, batch_size, cancel, progress) {
                Err(EngineError::Session(SessionError::OutOfMemory { .. })) if batch_size.get() > 1 => {
                    batch_size = NonZeroUsize::new(batch_size.get() / 2).unwrap_or(NonZeroUsize::MIN);
                }
                outcome => {
                    // What did not fit this slide would not fit the next one either.
                    self.batch_size = batch_size;
                    return outcome;
                }
            }
        }
    }

    fn try_slide(
        &mut self,
        id: &str,
        plan: &SlidePlan,
        out: &Path,
        batch_size: NonZeroUsize,
        cancel: &Cancel,
        progress: &mut dyn FnMut(u64),
    ) -> Result<SlideRun, EngineError> {
        let Self { card, config, sessions, .. } = self;
        let spec = stitch_spec(card, config, plan);
        let options = ReadOptions { tile_size: plan.plane.tile_size, icc: config.icc };
        let new_reader = || TileReader::new(&plan.slide, &plan.choice, options);
        let readers: Vec<TileReader> = (0..self.readers.get()).map(|_| new_reader()).collect::<Result<_, _>>()?;
        let converts_colours = readers.first().is_some_and(TileReader::converts_colours);
        let stitcher = spec.as_ref().map(|spec| Stitcher::new(*spec)).transpose()?;

        // Every session may hold a batch and have one waiting, one batch is being put together, and each reader holds
        // a tile and has one waiting.
        let pool_size = batch_size.get() * (2 * sessions.len() + 2) + 2 * readers.len();
        let (pool, free_buffers) = bounded(pool_size);
        for _ in 0..pool_size {
            pool.send(Vec::new()).ok();
        }
        let (give_back_strip, used_strips) = bounded(4);

        let tiles = plan.positions.iter().enumerate().map_while(move |(index, position)| {
            let pixels = free_buffers.recv().ok()?;
            Some(Tile { index, position: *position, pixels, failure: None })
        });
        let read: Vec<Read> =
            readers.into_iter().map(|reader| Read { reader, on_tile_error: config.on_tile_error }).collect();
        let on_nonfinite = config.on_nonfinite;
        let infer: Vec<Infer<'_>> =
            sessions.iter_mut().map(|session| Infer { session: session.as_mut(), on_nonfinite }).collect();
        let stitch =
            Stitch { plane: plan.plane, stitcher, pool, used_strips, waiting: BTreeMap::new(), next_sequence: 0 };

        let target = Target { out, id, plan, card, config, stitch: spec.as_ref() };
        let mut files = Some(SlideFiles::create(target)?);
        let mut results = None;
        let mut done = 0;
        let start = Instant::now();
        let files_ref = &mut files;
        let results_ref = &mut results;
        let stages = pipeline::run(cancel, |line| {
            let placed = line
                .source("plan", QUEUE, tiles)
                .through("read", QUEUE, read)
                .through("batch", QUEUE, vec![Group::new(batch_size)])
                .through("infer", QUEUE, infer)
                .through("stitch", QUEUE, vec![stitch]);
            // Both closures of the fold need the files; they run one after the other.
            let files = std::cell::RefCell::new(files_ref);
            placed.fold(
                "write",
                |placed| {
                    let mut files = files.borrow_mut();
                    let Some(files) = files.as_mut() else { return Ok(()) };
                    match placed {
                        Placed::Tile { rect, values } => files.tile(rect, &values)?,
                        Placed::Failed { rect, reason } => files.failed(rect, reason),
                        Placed::Strip(strip) => {
                            files.strip(&strip)?;
                            give_back_strip.try_send(strip).ok();
                            return Ok(());
                        }
                    }
                    done += 1;
                    if done % PROGRESS_STEP == 0 {
                        progress(done);
                    }
                    Ok(())
                },
                || {
                    let files = files.borrow_mut().take();
                    *results_ref = files.map(SlideFiles::finish).transpose()?;
                    Ok(())
                },
            );
        });
        let stages = stages.map_err(|error| match error {
            // A stopped session fails its stage.
            _ if cancel.is_cancelled() => EngineError::Cancelled,
            PipelineError::Stage { source, .. } => source,
            PipelineError::Cancelled => EngineError::Cancelled,
            PipelineError::Panicked { stage, message } => EngineError::Panicked { stage, message },
        })?;
        let results = results.ok_or(EngineError::Cancelled)?;
        Ok(SlideRun { results, stages, duration: start.elapsed(), batch_size, converts_colours })
    }
}

/// How this model's results are put together, `None` for features.
fn stitch_spec(card: &ModelCard, config: &RunConfig, plan: &SlidePlan) -> Option<StitchSpec> {
    let stride = plan.plane.tile_size - plan.overlap;
    let cell = match card.task {
        Task::Features => return None,
        Task::Classification => stride,
        Task::Segmentation => 1,
    };
    // One output alone, or one sigmoid each: a place may be of no class.
    let is_exclusive = card.activation != Activation::Sigmoid && card.classes.len() > 1;
    #[expect(clippy::cast_possible_truncation, reason = "a probability")]
    let threshold = (!is_exclusive).then_some(config.threshold as f32);
    Some(StitchSpec { plane: plan.plane, cell, class_count: card.classes.len(), overlap: plan.overlap, threshold })
}

/// The stage whose workers were busy for the largest share of the run, and what it says.
pub(crate) fn bottleneck(stages: &[StageStats], duration: Duration) -> String {
    let load = |stage: &StageStats| stage.busy.as_secs_f64() / (stage.workers.max(1) as f64 * duration.as_secs_f64());
    let busiest = stages.iter().skip(1).max_by(|a, b| load(a).total_cmp(&load(b)));
    busiest.map_or_else(String::new, |stage| {
        format!("{} ({:.0} % busy over {} workers)", stage.name, 100.0 * load(stage), stage.workers)
    })
}
