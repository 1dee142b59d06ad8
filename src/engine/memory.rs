//! The host's memory: what a slide will take of it, computed from the plan and held against a limit, and what the process
//! has taken.

use std::num::NonZeroUsize;
use std::thread;
use std::time::Duration;

use crossbeam_channel::{RecvTimeoutError, bounded};

use super::config::{Emit, RunConfig};
use super::plan::SlidePlan;
use super::{EngineError, PREDICTIONS, QUEUE, RESULTS, SPARE_BYTES, pictures, stitch_spec, write};
use crate::geometry::TilePosition;
use crate::inference::{ModelCard, Task};
use crate::pipeline::Cancel;
use crate::report::{self, MemoryRecord};
use crate::slide::{ReadMemory, ReadOptions, TileReader};
use crate::stitch::StitchSpec;
use crate::tissue::TissueMask;

/// Between two looks at the memory of a slide that has a limit.
const LOOK: Duration = Duration::from_secs(1);
/// Numbers that a model of features gives for a tile, at most: ViT-g has 1,536, with the mean of its patches 3,072.
const FEATURES: u64 = 4096;
/// What a file takes while it is written: its buffer, and what is on its way there.
const FILE_BYTES: u64 = 512 << 10;
/// What a core takes that compresses maps: a tile before and after, and the compressor's tables.
const ENCODER_BYTES: u64 = 1 << 20;
/// A tile's corner in the features file: kept until the end, then copied, by twos as a list grows.
const CORNER_BYTES: u64 = 3 * 2 * 16;
/// The overview's regions and their contours, for each of its cells: what a map of noise takes.
const CONTOUR_BYTES: u64 = 5;
/// One in so many bytes is not found among those that earlier slides gave back: they lie scattered.
const SCATTERED: u64 = 3;
/// What all stages note of a tile in a trace, and the text of it.
const TRACE_BYTES: u64 = 4096;

/// What of a run's memory changes its speed and none of its results.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Room {
    /// Tiles with their results beyond those that the workers hold.
    pub(super) spare_bytes: u64,
    /// Results between stitching and writing.
    pub(super) waiting_results: NonZeroUsize,
    /// Decoded tiles of the file, in bytes; `None` is as much as the reader holds by itself.
    pub(super) decoded_bytes: Option<u64>,
}

impl Room {
    /// As much as makes a run fast.
    pub(super) const AMPLE: Self = Self { spare_bytes: SPARE_BYTES, waiting_results: RESULTS, decoded_bytes: None };
    /// As little as a run needs, but for the decoded tiles.
    const LEAST: Self = Self { spare_bytes: 0, waiting_results: NonZeroUsize::MIN, decoded_bytes: None };

    /// How many tiles of so many bytes it has buffers for beyond those that the workers hold: no more than wait between two
    /// stages.
    pub(super) fn spare_buffers(self, tile_bytes: u64) -> usize {
        usize::try_from(self.spare_bytes / tile_bytes.max(1)).unwrap_or(usize::MAX).min(QUEUE.get())
    }
}

/// What a slide's run takes of memory, in bytes, by what it is for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryParts {
    /// The program, its libraries, and the model in every session: what is there before the first tile.
    pub model: u64,
    /// Where the tiles lie, and the tissue mask.
    pub plan: u64,
    /// Decoded tiles of the slide's file that readers share, and what each reader decodes with.
    pub reading: u64,
    /// Pixels of the tiles on their way.
    pub tiles: u64,
    /// What the model said of them.
    pub predictions: u64,
    /// Rows of the map to which tiles may still be added, and finished ones that wait to be written.
    pub stitching: u64,
    /// Rows of the maps that are compressed together.
    pub maps: u64,
    /// The whole map, made small, and the contours of its regions.
    pub overview: u64,
    /// The picture of the slide, and what is drawn on it.
    pub pictures: u64,
    /// The tables, and where the tiles of a features file lie.
    pub tables: u64,
    /// What every worker did when.
    pub trace: u64,
    /// What earlier slides gave back and this one can't use again.
    pub earlier: u64,
}

impl MemoryParts {
    /// Each part under its name.
    #[must_use]
    pub fn named(&self) -> [(&'static str, u64); 12] {
        [
            ("model", self.model),
            ("plan", self.plan),
            ("reading", self.reading),
            ("tiles", self.tiles),
            ("predictions", self.predictions),
            ("stitching", self.stitching),
            ("maps", self.maps),
            ("overview", self.overview),
            ("pictures", self.pictures),
            ("tables", self.tables),
            ("trace", self.trace),
            ("earlier slides", self.earlier),
        ]
    }

    /// Their sum.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.named().iter().map(|(_, bytes)| bytes).sum()
    }
}

/// What a slide's run is expected to take, told before its tiles are read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryPlan {
    /// What it is for.
    pub parts: MemoryParts,
    /// The most so far, while the slide was planned.
    pub so_far: u64,
    /// What it must stay below.
    pub limit: Option<u64>,
    pub(super) room: Room,
}

impl MemoryPlan {
    /// The most that will be resident at a time.
    #[must_use]
    pub fn expected(&self) -> u64 {
        self.parts.total().max(self.so_far)
    }

    /// Whether less is kept ready than is best for speed, to stay below the limit.
    #[must_use]
    pub fn is_lowered(&self) -> bool {
        self.room != Room::AMPLE
    }

    /// The sum and what makes it up, in a sentence.
    #[must_use]
    pub fn in_words(&self) -> String {
        let mut parts = self.parts.named().to_vec();
        parts.sort_by_key(|(_, bytes)| std::cmp::Reverse(*bytes));
        let is_worth = |bytes: &u64| *bytes * 100 >= self.parts.total();
        let worth = parts.iter().filter(|(_, bytes)| is_worth(bytes));
        let worth: Vec<String> = worth.map(|(name, bytes)| format!("{name} {}", report::bytes(*bytes))).collect();
        let lowered = match self.limit {
            Some(limit) if self.is_lowered() => {
                let limit = report::bytes(limit);
                format!("; because of the limit of {limit} fewer tiles and decoded pixels are kept ready")
            }
            _ => String::new(),
        };
        format!("memory: up to {} expected: {}{lowered}", report::bytes(self.expected()), worth.join(", "))
    }

    /// What is written down of it; the peak is known afterwards.
    pub(super) fn record(&self) -> MemoryRecord {
        MemoryRecord {
            expected_bytes: self.expected(),
            parts: self.parts.named().map(|(name, bytes)| (name.to_owned(), bytes)).into(),
            limit_bytes: self.limit,
            lowered: self.is_lowered(),
            peak_bytes: None,
        }
    }

    /// That it stays below its limit.
    ///
    /// # Errors
    /// [`EngineError::MemoryExceeded`] if there was more already, [`EngineError::MemoryTooLittle`].
    pub(super) fn check(&self, slide: &SlidePlan) -> Result<(), EngineError> {
        let Some(limit) = self.limit.filter(|limit| self.expected() > *limit) else { return Ok(()) };
        let path = slide.slide.path.clone();
        if self.so_far > limit {
            return Err(EngineError::MemoryExceeded { path, peak: self.so_far, limit });
        }
        let (part, bytes) = self.parts.named().into_iter().max_by_key(|(_, bytes)| *bytes).unwrap_or_default();
        Err(EngineError::MemoryTooLittle { path, expected: self.expected(), limit, part, bytes })
    }
}

/// What is taken before a slide's tiles are read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Before {
    /// Beside any slide: [`MemoryParts::model`].
    pub(super) model: u64,
    /// What earlier slides gave back, as far as it is resident still.
    pub(super) given_back: u64,
    /// The most while the slide was planned, all included.
    pub(super) peak: u64,
}

/// A slide's run, as far as its memory depends on it.
pub(super) struct Work<'a> {
    pub(super) plan: &'a SlidePlan,
    pub(super) card: &'a ModelCard,
    pub(super) config: &'a RunConfig,
    pub(super) batch_size: NonZeroUsize,
    pub(super) sessions: usize,
    pub(super) readers: usize,
    /// Threads that compress and draw.
    pub(super) threads: usize,
    pub(super) is_traced: bool,
}

impl Work<'_> {
    /// Plans the memory; where it would be above `limit`, what changes no result is lowered as far as that helps.
    ///
    /// # Errors
    /// Those of the slide's levels.
    pub(super) fn plan(&self, before: Before, limit: Option<u64>) -> Result<MemoryPlan, EngineError> {
        let slide = self.plan;
        let options = ReadOptions { tile_size: slide.plane.tile_size, icc: self.config.icc };
        let reading = TileReader::memory(&slide.slide, &slide.choice, options, &slide.positions, self.readers)?;
        let with =
            |room| Ok(MemoryPlan { parts: self.parts(before, reading, room)?, so_far: before.peak, limit, room });
        let ample: MemoryPlan = with(Room::AMPLE)?;
        let Some(limit) = limit.filter(|limit| ample.parts.total() > *limit) else { return Ok(ample) };
        // What is left is for the decoded tiles: without them the same ones are decoded again and again.
        let beside: MemoryPlan = with(Room { decoded_bytes: Some(reading.least_held), ..Room::LEAST })?;
        let left = limit.saturating_sub(beside.parts.total()) + reading.least_held;
        with(Room { decoded_bytes: (left < reading.held).then_some(left), ..Room::LEAST })
    }

    fn parts(&self, before: Before, reading: ReadMemory, room: Room) -> Result<MemoryParts, EngineError> {
        let Self { plan, card, config, batch_size, sessions, readers, threads, is_traced } = *self;
        let emits = |kind| config.emit.contains(&kind);
        let count = plan.positions.len() as u64;
        let held = room.decoded_bytes.map_or(reading.held, |bytes| bytes.min(reading.held));
        let tile_size = plan.plane.tile_size;
        let buffers = buffer_count(batch_size, sessions, readers) + room.spare_buffers(tile_bytes(card, tile_size));
        let on_their_way = (buffers as u64).min(count);
        let spec = stitch_spec(card, config, plan);
        let stitching = spec.as_ref().map_or(0, |spec| stitching_bytes(spec, room));
        let overview = |spec: &StitchSpec| {
            let bytes = spec.overview_bytes(write::OVERVIEW_SIDE);
            let cells = bytes / (spec.class_count as u64 + 1);
            let contours = if emits(Emit::GeoJson) { CONTOUR_BYTES * cells } else { 0 };
            // Contours are drawn when no rows are held any more.
            bytes + contours.saturating_sub(stitching)
        };
        let files = config.emit.len() + spec.map_or(0, |spec| spec.class_count);
        let corners = if card.task == Task::Features && emits(Emit::H5) { CORNER_BYTES * count } else { 0 };
        let new = MemoryParts {
            model: 0,
            plan: 0,
            reading: held + readers as u64 * reading.per_reader,
            tiles: on_their_way * pixel_bytes(tile_size),
            predictions: on_their_way * result_bytes(card, tile_size),
            stitching,
            maps: spec.as_ref().filter(|_| emits(Emit::Tiff)).map_or(0, |spec| map_bytes(plan, spec, threads)),
            overview: spec.as_ref().map_or(0, overview),
            pictures: pictures::memory_bytes(plan, &config.emit, spec.is_some())?,
            tables: corners + files as u64 * FILE_BYTES,
            trace: if is_traced { TRACE_BYTES * count } else { 0 },
            earlier: 0,
        };
        let used_again = new.total() - new.total() / SCATTERED;
        let earlier = before.given_back.saturating_sub(used_again);
        Ok(MemoryParts { model: before.model, plan: plan_bytes(plan), earlier, ..new })
    }
}

/// What a plan takes while its slide is run.
pub(super) fn plan_bytes(plan: &SlidePlan) -> u64 {
    let tissue = plan.tissue.as_ref().map_or(0, TissueMask::memory_bytes);
    tissue + (plan.positions.len() * size_of::<TilePosition>()) as u64
}

/// A tile on its way, with what the model says of it.
pub(super) fn tile_bytes(card: &ModelCard, tile_size: u32) -> u64 {
    pixel_bytes(tile_size) + result_bytes(card, tile_size)
}

fn pixel_bytes(tile_size: u32) -> u64 {
    3 * u64::from(tile_size).pow(2)
}

fn result_bytes(card: &ModelCard, tile_size: u32) -> u64 {
    let values = match card.task {
        Task::Classification => card.classes.len() as u64,
        Task::Segmentation => card.classes.len() as u64 * u64::from(tile_size).pow(2),
        Task::Features => FEATURES,
    };
    values * size_of::<f32>() as u64
}

/// Tiles that may be on their way without any to spare: every session holds a batch and has one waiting, one batch is being
/// put together, those of waiting predictions, and each reader holds a tile and has one waiting.
pub(super) fn buffer_count(batch_size: NonZeroUsize, sessions: usize, readers: usize) -> usize {
    batch_size.get() * (2 * sessions + PREDICTIONS.get()) + 2 * readers
}

/// Rows that are open, strips that wait, one in the stitcher's hands and one in the writer's, and those that come back while
/// a row of tiles is placed.
fn stitching_bytes(spec: &StitchSpec, room: Room) -> u64 {
    let strips = (room.waiting_results.get() + 2 + spec.strips_at_once()) as u64;
    spec.rows_bytes() + strips.min(spec.strip_count()) * spec.strip_bytes()
}

/// A pyramid for each class and for the class map; each core compresses rows of one of them.
fn map_bytes(plan: &SlidePlan, spec: &StitchSpec, threads: usize) -> u64 {
    let Some(pyramid) = write::pyramid_spec(plan, spec) else { return 0 };
    let maps = spec.class_count as u64 + 1;
    maps * pyramid.memory_bytes() + maps.min(threads as u64) * pyramid.encoded_bytes() + threads as u64 * ENCODER_BYTES
}

/// The memory of this process that is resident.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Resident {
    /// Now.
    pub(super) now: u64,
    /// The most since [`forget_peak`].
    pub(super) peak: u64,
}

impl Resident {
    /// What the system says; only Linux does.
    pub(super) fn read() -> Option<Self> {
        let status = std::fs::read_to_string("/proc/self/status").ok()?;
        let bytes = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name))?;
            line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kibibytes| kibibytes * 1024)
        };
        Some(Self { now: bytes("VmRSS:")?, peak: bytes("VmHWM:")? })
    }
}

/// Forgets the largest resident memory so far; only Linux can.
pub(crate) fn forget_peak() {
    // `man 5 proc`: 5 sets the peak back to what is resident now. Without it the peak is since the start.
    std::fs::write("/proc/self/clear_refs", "5").ok();
}

/// Largest resident memory of this process so far; only Linux tells.
pub(crate) fn peak() -> Option<u64> {
    Resident::read().map(|resident| resident.peak)
}

/// Does `work`, which stops when it is asked to, while the process stays below `limit`; says of how much there was if it
/// did not, also if that was seen only after the work.
pub(super) fn watched<T>(limit: Option<u64>, cancel: &Cancel, work: impl FnOnce(&Cancel) -> T) -> (T, Option<u64>) {
    let Some(limit) = limit else { return (work(cancel), None) };
    let over = || peak().filter(|peak| *peak > limit);
    let stop = cancel.child();
    let result = thread::scope(|scope| {
        // Closed when the work ends, also by a panic.
        let (_at_work, ended) = bounded::<()>(0);
        let (over, stop) = (&over, &stop);
        scope.spawn(move || {
            while ended.recv_timeout(LOOK) == Err(RecvTimeoutError::Timeout) {
                if over().is_some() {
                    stop.cancel();
                    return;
                }
            }
        });
        work(stop)
    });
    (result, over())
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use std::time::Instant;

    use super::*;

    #[test]
    fn the_system_tells_what_is_resident() {
        let Resident { now, peak } = Resident::read().unwrap();
        assert!(now > 1 << 20 && peak >= now / 2, "{now} {peak}");
    }

    #[test]
    fn work_above_the_limit_is_stopped_and_told() {
        let whole = Cancel::default();
        let start = Instant::now();
        let wait = |stop: &Cancel| {
            while !stop.is_cancelled() && start.elapsed() < Duration::from_secs(30) {
                thread::sleep(Duration::from_millis(5));
            }
            stop.is_cancelled()
        };
        let (was_stopped, over) = watched(Some(1 << 20), &whole, wait);
        assert!(was_stopped && over.unwrap() > 1 << 20 && !whole.is_cancelled());
        // Too short for a look, it is told nevertheless.
        assert!(watched(Some(1 << 20), &whole, |_| ()).1.is_some());
        assert_eq!(watched(Some(u64::MAX), &whole, |_| 7), (7, None));
        assert_eq!(watched(None, &whole, |_| 7), (7, None));
    }
}
