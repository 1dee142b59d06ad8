//! The composition root: slide, tissue, inference, stitching and outputs become one run.
//!
//! [`plan::plan`] decides which tiles of a slide are inferred, [`Engine`] sends them through the stages,
//! [`cohort::run`] does so for many slides and keeps the account.

mod bottleneck;
pub mod cohort;
pub mod config;
mod cores;
mod error;
pub(crate) mod gpus;
pub mod inputs;
mod load;
pub(crate) mod memory;
mod pictures;
pub mod plan;
mod simulate;
mod stages;
mod write;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::panic::resume_unwind;
use std::path::Path;
use std::thread::{self, ScopedJoinHandle};
use std::time::{Duration, Instant};

use crossbeam_channel::bounded;
use rayon::prelude::*;

use self::bottleneck::Bottleneck;
use self::config::RunConfig;
use self::cores::TileCost;
pub use self::error::EngineError;
pub(crate) use self::error::chain;
pub use self::load::LoadRequest;
pub(crate) use self::load::model_record;
use self::memory::{Before, Resident, Room, Work, buffer_count, tile_bytes};
pub use self::memory::{MemoryParts, MemoryPlan};
use self::pictures::EarlyPictures;
pub(crate) use self::pictures::SlidePicture;
use self::plan::SlidePlan;
pub use self::simulate::Simulated;
use self::stages::{Group, Infer, Placed, Read, Stitch, Tile};
use self::write::{SlideFiles, SlideResults, Target};
use crate::inference::{ModelCard, Session, SessionError, SessionFactory, Task};
use crate::pipeline::{self, Cancel, PipelineError, StageStats, Trace, WorkerTrace};
use crate::report::{ExecutionRecord, ModelRecord, StageRecord};
use crate::slide::{ReadOptions, TileReader};
use crate::stitch::{StitchSpec, Stitcher};

/// Tiles between two calls of the progress callback.
const PROGRESS_STEP: u64 = 8;
/// Items between two stages, up to stitching: so many that none waits for one that waits for a core itself. What they hold in
/// all is bounded by the pool of buffers.
const QUEUE: NonZeroUsize = NonZeroUsize::new(64).unwrap();
/// Batches with results between inference and stitching that the pool has buffers for.
const PREDICTIONS: NonZeroUsize = NonZeroUsize::new(4).unwrap();
/// Tiles with their results beyond those that the workers hold: a worker that has to wait for a core holds back nobody. The
/// larger a tile is, the longer it takes, and the fewer pass meanwhile.
const SPARE_BYTES: u64 = 10 << 20;
/// Results between stitching and writing. The rows that a row of tiles completes leave at once, in up to eight strips of a
/// 512 px tile: without room for them stitching and writing would take turns.
const RESULTS: NonZeroUsize = NonZeroUsize::new(10).unwrap();

/// A loaded model with all that it takes to run it over slides.
pub struct Engine {
    card: ModelCard,
    config: RunConfig,
    /// All of the same variant; over all devices.
    sessions: Vec<Box<dyn Session>>,
    /// One per device.
    factories: Vec<SessionFactory>,
    readers: NonZeroUsize,
    /// Whether the number of readers and of sessions at work is still to be found, on the first slide.
    is_split_due: bool,
    /// Lowered when a device's memory does not suffice.
    batch_size: NonZeroUsize,
    /// Tiles of the largest batch that the sessions have run beforehand.
    warm_batch: usize,
    /// What the sessions that have run no batch will take with their first.
    cold_bytes: u64,
    /// What is resident beside a slide, with that: the least since the sessions are warm.
    model_bytes: Option<u64>,
    /// What may be kept ready for the next slide.
    room: Room,
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
    /// What every worker did when, if that was asked for.
    pub(crate) trace: Option<Vec<WorkerTrace>>,
}

impl SlideRun {
    /// What bounded it.
    pub(crate) fn bottleneck(&self, execution: &ExecutionRecord) -> Bottleneck {
        let cores = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
        bottleneck::of(&self.stages, self.duration, execution, cores)
    }
}

/// How a slide is run, apart from what is done with it.
#[derive(Clone, Copy)]
pub(crate) struct Conduct<'a> {
    /// Asks to stop.
    pub(crate) cancel: &'a Cancel,
    /// Whether every stretch of every worker's time is kept.
    pub(crate) is_traced: bool,
}

impl Engine {
    /// [`warm_up`](Self::warm_up) for any number of tiles, if the sessions run on GPUs: a GPU's libraries load and plan
    /// their kernels with the first batch, which takes up to seconds.
    ///
    /// # Errors
    /// Those of [`warm_up`](Self::warm_up).
    pub(crate) fn warm_up_gpus(&mut self) -> Result<(), EngineError> {
        if self.runs_on_gpus() { self.warm_up(usize::MAX) } else { Ok(()) }
    }

    fn runs_on_gpus(&self) -> bool {
        self.factories.iter().any(SessionFactory::runs_on_gpu)
    }

    /// Infers batches of no tile in particular, as large as so many tiles need, unless as large ones have run: what a
    /// session takes of memory is made by then. On GPUs with every session; on a CPU with one, which tells what the others
    /// will take, as there the time is lost.
    ///
    /// # Errors
    /// Those of the session. That memory does not suffice is left to the slide, which lowers the batch.
    pub(crate) fn warm_up(&mut self, tiles: usize) -> Result<(), EngineError> {
        let batch_size = self.batch_size.get().min(tiles);
        if batch_size <= self.warm_batch {
            return Ok(());
        }
        let side = self.card.tile_size as usize;
        let tile = vec![128; side * side * 3];
        let batch = vec![tile.as_slice(); batch_size];
        let warmed = if self.runs_on_gpus() { self.sessions.len() } else { 1 };
        // After the first batch ONNX Runtime knows what the graph needs, and takes it in one piece with the second.
        let twice = |session: &mut Box<dyn Session>| (0..2).try_for_each(|_| session.predict(&batch).map(drop));
        let before = Resident::read();
        let predicted = self.sessions[..warmed].par_iter_mut().map(twice);
        match predicted.collect::<Result<(), SessionError>>() {
            Ok(()) => self.is_warm(batch_size, warmed, before),
            Err(SessionError::OutOfMemory { .. }) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }

    /// Notes that the first `warmed` sessions have run such batches, and what the others will take by that.
    fn is_warm(&mut self, batch_size: usize, warmed: usize, before: Option<Resident>) {
        let grown = before.zip(Resident::read()).map_or(0, |(before, after)| after.now.saturating_sub(before.now));
        let others = self.sessions.len().saturating_sub(warmed) as u64;
        (self.warm_batch, self.model_bytes, self.cold_bytes) =
            (batch_size, None, others * grown / warmed.max(1) as u64);
    }

    /// Plans what a slide takes of the host's memory; from here on no more is kept ready than that. `None` where the system
    /// does not tell what is taken already.
    ///
    /// # Errors
    /// [`EngineError::MemoryUnknown`] if there is a limit nevertheless, and those of the slide's levels.
    pub(crate) fn plan_memory(
        &mut self,
        plan: &SlidePlan,
        limit: Option<u64>,
        is_traced: bool,
    ) -> Result<Option<MemoryPlan>, EngineError> {
        let Some(resident) = Resident::read() else {
            return if limit.is_some() { Err(EngineError::MemoryUnknown) } else { Ok(None) };
        };
        let now = resident.now.saturating_sub(memory::plan_bytes(plan)) + self.cold_bytes;
        let model = *self.model_bytes.insert(self.model_bytes.map_or(now, |least| least.min(now)));
        let before = Before { model, given_back: now - model, peak: resident.peak };
        let work = Work {
            plan,
            card: &self.card,
            config: &self.config,
            batch_size: self.batch_size,
            sessions: self.sessions.len(),
            readers: self.readers.get(),
            threads: rayon::current_num_threads(),
            is_traced,
        };
        let planned = work.plan(before, limit)?;
        self.room = planned.room;
        Ok(Some(planned))
    }

    /// Finds how many readers and sessions share the CPU, if that was left to the engine and is not known yet; says why so
    /// many.
    ///
    /// # Errors
    /// Those of opening the slide, and of the session.
    pub(crate) fn split_cores(&mut self, plan: &SlidePlan) -> Result<Option<String>, EngineError> {
        let Some(session) = self.sessions.first_mut().filter(|_| self.is_split_due) else { return Ok(None) };
        let options = ReadOptions { tile_size: plan.plane.tile_size, icc: self.config.icc };
        let before = Resident::read();
        let Some(cost) = TileCost::measure(plan, options, session.as_mut())? else { return Ok(None) };
        let cores = thread::available_parallelism().map_or(1, NonZeroUsize::get);
        let split = cost.split(cores);
        self.readers = NonZeroUsize::new(split.readers).unwrap_or(NonZeroUsize::MIN);
        self.sessions.truncate(split.sessions);
        self.is_warm(1, 1, before);
        self.is_split_due = false;
        self.execution.readers = split.readers;
        self.execution.sessions = self.sessions.len();
        Ok(Some(cost.reason(split, cores)))
    }

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
        conduct: Conduct<'_>,
        progress: &mut dyn FnMut(u64),
    ) -> Result<SlideRun, EngineError> {
        // From here on every session runs. A slide that is refused for its memory does not come so far.
        self.cold_bytes = 0;
        let mut batch_size = self.batch_size;
        loop {
            match self.try_slide(id, plan, out, batch_size, conduct, progress) {
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
        Conduct { cancel, is_traced }: Conduct<'_>,
        progress: &mut dyn FnMut(u64),
    ) -> Result<SlideRun, EngineError> {
        let Self { card, config, sessions, room, .. } = self;
        let spec = stitch_spec(card, config, plan);
        let options = ReadOptions { tile_size: plan.plane.tile_size, icc: config.icc };
        let mut readers = TileReader::several(&plan.slide, &plan.choice, options, &plan.positions, self.readers.get())?;
        let converts_colours = readers.first().is_some_and(TileReader::converts_colours);
        if let (Some(bytes), Some(reader)) = (room.decoded_bytes, readers.first_mut()) {
            reader.hold_at_most(bytes);
        }
        let stitcher = spec.as_ref().map(|spec| Stitcher::new(*spec)).transpose()?;

        let workers_hold = buffer_count(batch_size, sessions.len(), readers.len());
        let pool_size = workers_hold + room.spare_buffers(tile_bytes(card, plan.plane.tile_size));
        let (pool, free_buffers) = bounded(pool_size);
        for _ in 0..pool_size {
            pool.send(Vec::new()).ok();
        }
        // No more come back than a row of tiles sends out before it takes them: the others are not kept.
        let (give_back_strip, used_strips) = bounded(spec.as_ref().map_or(1, StitchSpec::strips_at_once));

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
        let trace = is_traced.then(Trace::default);
        let start = Instant::now();
        let mut pictures = None;
        let stages = thread::scope(|scope| {
            // Beside the tiles, since the devices have nothing to do while the files are finished.
            let mut drawing = Some(scope.spawn(|| EarlyPictures::make(&target)));
            let (files, results, drawing_ref, pictures_ref) = (&mut files, &mut results, &mut drawing, &mut pictures);
            let stages = pipeline::run_traced(cancel, trace.as_ref(), |line| {
                let placed = line
                    .source("plan", QUEUE, tiles)
                    .through("read", QUEUE, read)
                    .through("batch", QUEUE, vec![Group::new(batch_size)])
                    .through("infer", QUEUE, infer)
                    .through("stitch", room.waiting_results, vec![stitch]);
                // Both closures of the fold need the files; they run one after the other.
                let files = RefCell::new(files);
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
                        let Some((drawing, files)) = drawing_ref.take().zip(files.borrow_mut().take()) else {
                            return Ok(());
                        };
                        let drawn = drawing.join().unwrap_or_else(|panic| resume_unwind(panic))?;
                        *results = Some(files.finish(pictures_ref.insert(drawn))?);
                        Ok(())
                    },
                );
            });
            if let Some(Ok(Ok(unused))) = drawing.map(ScopedJoinHandle::join) {
                unused.remove();
            }
            stages
        });
        if let (Err(_), Some(pictures)) = (&stages, &pictures) {
            pictures.remove();
        }
        if let (Err(_), Some(results)) = (&stages, &results) {
            results.remove(out);
        }
        let stages = stages.map_err(|error| failed(error, cancel))?;
        let results = results.ok_or(EngineError::Cancelled)?;
        let duration = start.elapsed();
        let trace = trace.map(Trace::into_workers);
        Ok(SlideRun { results, stages, duration, batch_size, converts_colours, trace })
    }
}

/// What a stage did, as it is written down.
pub(crate) fn stage_record(stage: &StageStats) -> StageRecord {
    StageRecord {
        name: stage.name.to_owned(),
        workers: stage.workers,
        items: stage.items,
        busy_secs: stage.busy.as_secs_f64(),
        starved_secs: stage.starved.as_secs_f64(),
        blocked_secs: stage.blocked.as_secs_f64(),
    }
}

/// Why a line of stages ended early.
fn failed(error: PipelineError<EngineError>, cancel: &Cancel) -> EngineError {
    match error {
        // A stopped session fails its stage.
        _ if cancel.is_cancelled() => EngineError::Cancelled,
        PipelineError::Stage { source, .. } => source,
        PipelineError::Cancelled => EngineError::Cancelled,
        PipelineError::Panicked { stage, message } => EngineError::Panicked { stage, message },
    }
}

/// How this model's results are put together, `None` for features.
pub(crate) fn stitch_spec(card: &ModelCard, config: &RunConfig, plan: &SlidePlan) -> Option<StitchSpec> {
    let stride = plan.plane.tile_size - plan.overlap;
    let cell = match card.task {
        Task::Features => return None,
        Task::Classification => stride,
        Task::Segmentation => 1,
    };
    #[expect(clippy::cast_possible_truncation, reason = "a probability")]
    let threshold = (!card.is_exclusive()).then_some(config.threshold as f32);
    Some(StitchSpec { plane: plan.plane, cell, class_count: card.classes.len(), overlap: plan.overlap, threshold })
}

#[cfg(test)]
mod tests;
