//! Many slides, one account: locks the output folder, redoes only what is missing or was made differently, records every
//! slide's state, and never lets one bad slide stop the others.

use std::collections::BTreeMap;
use std::fs::{self, File, TryLockError};
use std::io::{Read as _, Seek as _, Write as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use sha2::{Digest, Sha256};

use super::config::{InputDigests, RunConfig, TilingConfig, TissueSource};
use super::gpus::{self, Seen};
use super::inputs::SlideInput;
use super::plan::{self, SlidePlan};
use super::{Conduct, Engine, EngineError, MemoryPlan, SlideRun, memory};
use crate::inference::device::GpuMonitor;
use crate::output;
use crate::pipeline::{Activity, Cancel, Span, WorkerTrace};
use crate::report::{
    self, CoverageRecord, ExecutionRecord, ReadingRecord, RunRecord, SLIDE_SCHEMA, SlideIdentity, SlideRecord, Status,
    TimingRecord, TraceRow,
};
use crate::slide::Slide;

/// Bytes of a slide file's head that tell it from another.
const HEAD_BYTES: u64 = 1 << 20;

/// How the cohort is run, apart from what is done with each slide.
#[derive(Clone, Copy, Debug, Default)]
pub struct CohortOptions {
    /// Redo slides that are done.
    pub force: bool,
    /// Stop at the first slide that fails.
    pub fail_fast: bool,
    /// Write what every worker did when, into `traces/ID.json`.
    pub profile: bool,
    /// Bytes of the host's memory that the process may take; a slide that takes more fails.
    pub memory_limit: Option<u64>,
}

/// What happens, for whoever shows or logs it.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event<'a> {
    /// A slide is looked at.
    SlideStarted {
        /// The slide.
        id: &'a str,
        /// Its number, from 0.
        index: usize,
        /// Number of slides.
        count: usize,
    },
    /// Its tiles are known.
    SlidePlanned {
        /// The slide.
        id: &'a str,
        /// What will be done.
        plan: &'a SlidePlan,
        /// Why it is redone, if it was done before.
        redone_because: Option<&'a str>,
    },
    /// It was found how many readers and sessions share the CPU.
    CoresSplit {
        /// How many, and why.
        reason: &'a str,
    },
    /// It is known what the slide takes of the host's memory.
    MemoryPlanned {
        /// The slide.
        id: &'a str,
        /// How much, and what for.
        plan: &'a MemoryPlan,
    },
    /// Tiles were done.
    Progress {
        /// Tiles so far.
        tiles: u64,
    },
    /// The slide is done, failed or was skipped.
    SlideFinished {
        /// Its record.
        record: &'a SlideRecord,
        /// `Skipped` if the record is from an earlier run.
        status: Status,
    },
}

/// How a cohort ended.
#[derive(Clone, Debug, Default)]
pub struct CohortSummary {
    /// The slides' records in their order, with what was done with each in this run.
    pub slides: Vec<(Status, SlideRecord)>,
    /// Whether someone asked to stop.
    pub interrupted: bool,
}

impl CohortSummary {
    /// Number of slides that ended so.
    #[must_use]
    pub fn count(&self, status: Status) -> u64 {
        self.slides.iter().filter(|(of, _)| *of == status).count() as u64
    }

    /// Tiles without a result, over the slides done in this run or before.
    #[must_use]
    pub fn failed_tiles(&self) -> usize {
        self.slides.iter().filter_map(|(_, record)| record.coverage.as_ref()).map(|tiles| tiles.failed.len()).sum()
    }
}

/// The output folder, held by this process until dropped; a process that died holds nothing.
#[derive(Debug)]
pub struct OutputFolder {
    path: PathBuf,
    _lock: File,
}

impl OutputFolder {
    /// Makes the folder if need be, locks it and removes what a killed run left half-written.
    ///
    /// # Errors
    /// [`EngineError::Locked`] if another run holds it, [`EngineError::Output`] if it can't be written.
    pub fn lock(path: &Path) -> Result<Self, EngineError> {
        let cannot = |source| EngineError::Output(output::OutputError::Write { path: path.to_owned(), source });
        fs::create_dir_all(path).map_err(cannot)?;
        let lock_path = path.join(".lock");
        let mut options = File::options();
        let mut file = options.read(true).write(true).create(true).truncate(false).open(&lock_path).map_err(cannot)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut holder = String::new();
                file.read_to_string(&mut holder).ok();
                let holder = Some(holder.trim().to_owned()).filter(|text| !text.is_empty());
                return Err(EngineError::Locked { path: path.to_owned(), holder });
            }
            Err(TryLockError::Error(source)) => return Err(cannot(source)),
        }
        file.set_len(0).and_then(|()| file.rewind()).map_err(cannot)?;
        writeln!(file, "process {}", std::process::id()).map_err(cannot)?;
        for entry in walkdir::WalkDir::new(path).max_depth(2).into_iter().flatten() {
            if entry.file_type().is_file() && output::is_partial(entry.path()) {
                fs::remove_file(entry.path()).map_err(cannot)?;
            }
        }
        Ok(Self { path: path.to_owned(), _lock: file })
    }

    /// The folder.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn record_path(&self, id: &str) -> PathBuf {
        self.path.join("slides").join(format!("{id}.json"))
    }

    fn trace_path(&self, id: &str) -> PathBuf {
        self.path.join("traces").join(format!("{id}.json"))
    }

    /// The slide's record from an earlier run; one that can't be read counts as none.
    fn earlier(&self, id: &str) -> Option<SlideRecord> {
        serde_json::from_slice(&fs::read(self.record_path(id)).ok()?).ok()
    }

    /// Removes an earlier run's record and then its files, so that nothing of it looks finished.
    fn forget(&self, id: &str, earlier: &SlideRecord) -> Result<(), EngineError> {
        let paths = earlier.outputs.iter().map(|output| self.path.join(&output.path));
        for path in [self.record_path(id), self.trace_path(id)].into_iter().chain(paths) {
            match fs::remove_file(&path) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(EngineError::Output(output::OutputError::Write { path, source: error }));
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn missing_output(&self, record: &SlideRecord) -> Option<String> {
        let is_there = |output: &&report::OutputRecord| {
            fs::metadata(self.path.join(&output.path)).is_ok_and(|file| file.len() == output.bytes)
        };
        let missing = record.outputs.iter().find(|output| !is_there(output))?;
        Some(format!("{} is missing or has another size", missing.path))
    }

    /// Writes the run's account.
    ///
    /// # Errors
    /// [`EngineError::Output`].
    pub fn write_run(&self, record: &RunRecord) -> Result<(), EngineError> {
        output::write_atomic(&self.path.join("run.json"), &report::to_json(record))?;
        Ok(())
    }

    fn write_process_list(&self, slides: &[(Status, SlideRecord)]) -> Result<(), EngineError> {
        let path = self.path.join("process_list.csv");
        let mut table = csv::Writer::from_writer(Vec::new());
        let problem = |error: csv::Error| {
            EngineError::Output(output::OutputError::Write { path: path.clone(), source: std::io::Error::other(error) })
        };
        table.write_record(["slide", "status", "tiles", "seconds", "tiles_per_s", "error"]).map_err(problem)?;
        for (status, record) in slides {
            let tiles = record.coverage.as_ref().map_or(0, |coverage| coverage.inferred);
            let (seconds, rate) = record.timing.as_ref().map_or((0.0, 0.0), |t| (t.seconds, t.tiles_per_sec));
            let error = record.error.clone().unwrap_or_default();
            let row =
                [&record.id, status.as_str(), &tiles.to_string(), &format!("{seconds:.3}"), &format!("{rate:.2}")];
            table.write_record(row.into_iter().chain([error.as_str()])).map_err(problem)?;
        }
        let bytes = table.into_inner().map_err(|error| problem(error.into_error().into()))?;
        output::write_atomic(&path, &bytes)?;
        Ok(())
    }
}

impl Engine {
    /// Everything that shapes the results, by the names of the settings.
    #[must_use]
    pub fn shaping_settings(&self) -> serde_json::Map<String, serde_json::Value> {
        self.config.shaping_settings(&digests(&self.config))
    }
}

/// Runs all slides; each one's record is written as soon as it ends.
///
/// # Errors
/// Only what concerns all slides: the account can't be written. A slide's failure is in its record.
pub fn run(
    engine: &mut Engine,
    slides: &[SlideInput],
    folder: &OutputFolder,
    options: CohortOptions,
    cancel: &Cancel,
    observe: &mut dyn FnMut(&Event<'_>),
) -> Result<CohortSummary, EngineError> {
    let mut summary = CohortSummary::default();
    let gpus = gpus::monitor(&engine.devices());
    let mut cohort = Cohort { engine, folder, options, cancel, gpus, observe };
    for (index, input) in slides.iter().enumerate() {
        (cohort.observe)(&Event::SlideStarted { id: &input.id, index, count: slides.len() });
        let Some((status, record)) = cohort.slide(input)? else {
            summary.interrupted = true;
            break;
        };
        (cohort.observe)(&Event::SlideFinished { record: &record, status });
        summary.slides.push((status, record));
        folder.write_process_list(&summary.slides)?;
        if status == Status::Failed && options.fail_fast {
            break;
        }
    }
    Ok(summary)
}

/// What all slides of a run share.
struct Cohort<'a> {
    engine: &'a mut Engine,
    folder: &'a OutputFolder,
    options: CohortOptions,
    /// `None` on a CPU, and where the driver can't be asked.
    gpus: Option<GpuMonitor>,
    cancel: &'a Cancel,
    observe: &'a mut dyn FnMut(&Event<'_>),
}

impl Cohort<'_> {
    /// Does one slide, or finds that it is done; `None` if someone asked to stop.
    fn slide(&mut self, input: &SlideInput) -> Result<Option<(Status, SlideRecord)>, EngineError> {
        let start = Instant::now();
        let config = RunConfig { tiling: input.tiling(&self.engine.config.tiling), ..self.engine.config.clone() };
        let mut record = SlideRecord {
            schema: SLIDE_SCHEMA.to_owned(),
            id: input.id.clone(),
            status: Status::Failed,
            error: None,
            hint: None,
            finished: String::new(),
            slide: identity(&input.path),
            model: self.engine.model.clone(),
            settings: config.shaping_settings(&digests(&config)),
            reading: None,
            coverage: None,
            class_shares: BTreeMap::new(),
            timing: None,
            memory: None,
            notes: Vec::new(),
            outputs: Vec::new(),
        };
        let mut reason = None;
        if let Some(earlier) = self.folder.earlier(&input.id) {
            let changed = report::difference(&earlier, &with_status(&record, Status::Done));
            reason = changed.or_else(|| self.folder.missing_output(&earlier));
            if reason.is_none() && !self.options.force {
                return Ok(Some((Status::Skipped, earlier)));
            }
            self.folder.forget(&input.id, &earlier)?;
        }
        match self.fill(&mut record, input, &config.tiling, reason.as_deref()) {
            Ok(()) => record.status = Status::Done,
            Err(EngineError::Cancelled) => return Ok(None),
            Err(error) => {
                record.error = Some(error.chain());
                record.hint = error.hint();
            }
        }
        if let Some(memory) = &mut record.memory {
            memory.peak_bytes = memory::peak();
        }
        if let Some(timing) = &mut record.timing {
            timing.seconds = start.elapsed().as_secs_f64();
        }
        record.finished = now();
        output::write_atomic(&self.folder.record_path(&input.id), &report::to_json(&record))?;
        Ok(Some((record.status, record)))
    }

    /// Does the slide's work and fills its record as far as it gets.
    fn fill(
        &mut self,
        record: &mut SlideRecord,
        input: &SlideInput,
        tiling: &TilingConfig,
        redone_because: Option<&str>,
    ) -> Result<(), EngineError> {
        memory::forget_peak();
        let Self { engine, .. } = self;
        let (plan, warmed_up) =
            rayon::join(|| plan::plan(Slide::open(&input.path, tiling.reader)?, tiling), || engine.warm_up_gpus());
        // A stop ends the warm-up with an error of its own.
        if self.cancel.is_cancelled() {
            return Err(EngineError::Cancelled);
        }
        let plan = plan?;
        warmed_up?;
        (self.observe)(&Event::SlidePlanned { id: &input.id, plan: &plan, redone_because });
        record.notes.clone_from(&plan.notes);
        record.reading = Some(reading(&plan));
        record.coverage = Some(CoverageRecord {
            grid: plan.grid_tiles,
            inferred: 0,
            background: plan.background_tiles,
            unsampled: plan.unsampled_tiles,
            failed: Vec::new(),
        });
        let split = self.engine.split_cores(&plan);
        // As above: the batch that a stop ends is no failure of the slide.
        if self.cancel.is_cancelled() {
            return Err(EngineError::Cancelled);
        }
        if let Some(reason) = split? {
            (self.observe)(&Event::CoresSplit { reason: &reason });
        }
        let warmed_up = self.engine.warm_up(plan.positions.len());
        if self.cancel.is_cancelled() {
            return Err(EngineError::Cancelled);
        }
        warmed_up?;
        let CohortOptions { memory_limit, profile, .. } = self.options;
        if let Some(memory) = self.engine.plan_memory(&plan, memory_limit, profile)? {
            (self.observe)(&Event::MemoryPlanned { id: &input.id, plan: &memory });
            record.memory = Some(memory.record());
            memory.check(&plan)?;
        }
        let asked = self.engine.batch_size;
        let (run, seen) = self.run(&input.id, &plan);
        let run = run?;
        if let Some(workers) = &run.trace {
            output::write_atomic(
                &self.folder.trace_path(&input.id),
                &report::trace_json(&input.id, &trace_rows(workers)),
            )?;
        }
        if run.batch_size != asked {
            record.notes.push(format!("memory sufficed for batches of {} tiles, not {asked}", run.batch_size));
        }
        if let Some(reading) = &mut record.reading {
            reading.icc = icc_word(self.engine.config.icc, run.converts_colours).to_owned();
        }
        if plan.positions.is_empty() {
            record.notes.push("no tile has enough tissue: nothing was inferred".to_owned());
        }
        record.timing = Some(timing(&run, &self.engine.execution(), &seen));
        if let Some(coverage) = &mut record.coverage {
            coverage.inferred = run.results.inferred;
            coverage.failed = run.results.failed;
        }
        record.class_shares = run.results.class_shares.into_iter().collect();
        record.outputs = run.results.outputs;
        Ok(())
    }

    /// Runs a slide below the limit on memory, and says what was seen of the GPUs meanwhile.
    fn run(&mut self, id: &str, plan: &SlidePlan) -> (Result<SlideRun, EngineError>, Seen) {
        let Self { engine, folder, options, gpus, observe, .. } = self;
        let mut progress = |tiles| observe(&Event::Progress { tiles });
        let ((run, over), seen) = gpus::watched_by(gpus.as_ref(), 0, || {
            memory::watched(options.memory_limit, self.cancel, |cancel| {
                let conduct = Conduct { cancel, is_traced: options.profile };
                engine.run_slide(id, plan, folder.path(), conduct, &mut progress)
            })
        });
        let Some((peak, limit)) = over.zip(options.memory_limit) else { return (run, seen) };
        match run {
            Ok(run) => run.results.remove(folder.path()),
            Err(EngineError::Cancelled) if !self.cancel.is_cancelled() => {}
            Err(error) => return (Err(error), seen),
        }
        (Err(EngineError::MemoryExceeded { path: plan.slide.path.clone(), peak, limit }), seen)
    }
}

fn icc_word(asked: bool, applied: bool) -> &'static str {
    match (asked, applied) {
        (false, _) => "not asked",
        (true, true) => "applied",
        (true, false) => "absent",
    }
}

fn reading(plan: &SlidePlan) -> ReadingRecord {
    let extent = plan.slide.extent();
    let region = plan.plane.region;
    let tile = plan.plane.level0_rect(plan.plane.position(0, 0));
    let side = |length: i64| u64::try_from(length).unwrap_or(0);
    ReadingRecord {
        reader: plan.slide.reader.as_str().to_owned(),
        reader_reason: plan.slide.reader_reason.clone(),
        vendor: plan.slide.vendor.clone(),
        dimensions: [side(extent.width), side(extent.height)],
        slide_mpp: [plan.pixel_size.x.get(), plan.pixel_size.y.get()],
        requested_mpp: plan.choice.requested.get(),
        effective_mpp: [plan.choice.effective.x.get(), plan.choice.effective.y.get()],
        level: plan.choice.level.0,
        resampled: plan.choice.resample.is_some(),
        icc: "not asked".to_owned(),
        region: [region.x, region.y, region.width, region.height],
        tile_size: plan.plane.tile_size,
        overlap: plan.overlap,
        tile_size_level0: [tile.width, tile.height],
    }
}

fn timing(run: &SlideRun, execution: &ExecutionRecord, seen: &Seen) -> TimingRecord {
    let bottleneck = run.bottleneck(execution);
    let seconds = run.duration.as_secs_f64();
    TimingRecord {
        seconds,
        pipeline_seconds: seconds,
        tiles_per_sec: run.results.inferred as f64 / seconds.max(1e-9),
        bottleneck: bottleneck.what,
        relief: bottleneck.relief,
        gpu_busy: seen.busy_by_device(),
        stages: run.stages.iter().map(super::stage_record).collect(),
    }
}

/// The workers as rows of a trace: those of one stage are numbered.
fn trace_rows(workers: &[WorkerTrace]) -> Vec<TraceRow> {
    let micros = |time: Duration| time.as_secs_f64() * 1e6;
    let number = |index: usize| 1 + workers[..index].iter().filter(|other| other.stage == workers[index].stage).count();
    let span = |span: &Span| {
        let name = match span.activity {
            Activity::Busy => "busy",
            Activity::Starved => "starved",
            Activity::Blocked => "blocked",
        };
        (name, micros(span.start), micros(span.length))
    };
    let row = |(index, worker): (usize, &WorkerTrace)| TraceRow {
        name: format!("{} {}", worker.stage, number(index)),
        spans: worker.spans.iter().map(span).collect(),
    };
    workers.iter().enumerate().map(row).collect()
}

fn with_status(record: &SlideRecord, status: Status) -> SlideRecord {
    SlideRecord { status, ..record.clone() }
}

/// Hashes the mask and coordinates files of a run.
fn digests(config: &RunConfig) -> InputDigests {
    let tiling = &config.tiling;
    let mask = match &tiling.tissue {
        TissueSource::Png(path) | TissueSource::GeoJson(path) => Some(path),
        TissueSource::Otsu | TissueSource::None => None,
    };
    InputDigests {
        mask: mask.and_then(|path| head_sha256(path, u64::MAX)),
        coords: tiling.coords.as_ref().and_then(|path| head_sha256(path, u64::MAX)),
    }
}

/// What tells this slide file from another; empty where the file can't be read, which opening it will report.
fn identity(path: &Path) -> SlideIdentity {
    let metadata = fs::metadata(path).ok();
    let modified = metadata.as_ref().and_then(|file| file.modified().ok());
    SlideIdentity {
        path: path.to_string_lossy().into_owned(),
        bytes: metadata.map_or(0, |file| file.len()),
        modified: modified.map(|time| humantime::format_rfc3339_nanos(time).to_string()).unwrap_or_default(),
        head_sha256: head_sha256(path, HEAD_BYTES).unwrap_or_default(),
    }
}

fn head_sha256(path: &Path, bytes: u64) -> Option<String> {
    let mut hasher = Sha256::new();
    std::io::copy(&mut File::open(path).ok()?.take(bytes), &mut HashWriter(&mut hasher)).ok()?;
    Some(hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Feeds what is written into a hash.
struct HashWriter<'a>(&'a mut Sha256);

impl std::io::Write for HashWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// The time as records hold it: RFC 3339, UTC, whole seconds.
#[must_use]
pub fn now() -> String {
    humantime::format_rfc3339_seconds(SystemTime::now()).to_string()
}
