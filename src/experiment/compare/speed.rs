//! Times settings in turns: the model alone on tiles in memory, and end to end over the slide's course.

use std::path::Path;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::CompareRequest;
use super::course::Course;
use super::ladder::{Ladder, Setting, Way};
use super::subjects::Subject;
use crate::engine::config::{Emit, RunConfig};
use crate::engine::{Conduct, Engine, LoadRequest};
use crate::experiment::ExperimentError;
use crate::experiment::optimize::file_error;
use crate::experiment::race::{Contestant, RaceRules, race, timed};
use crate::experiment::tiles::TileSet;
use crate::inference::{Device, ModelCard, OrtSession, ProviderRequest, Session, SessionError};
use crate::measure::percentile;
use crate::pipeline::Cancel;

/// Rounds that do not count.
pub(super) const WARM_UP: usize = 1;
/// Rounds end when every median is known within this share of it.
pub(super) const TOLERANCE: f64 = 0.02;
/// A turn of the model alone should be long against the clock and the scheduler.
const TURN_SECS: f64 = 0.15;
/// Rounds end to end that should fit the time.
const ROUNDS: f64 = 9.0;
/// About what reading a tile takes, in seconds, for a guess of how long a round will be.
const READ_SECS: f64 = 0.003;

/// The times of some settings.
pub(super) struct Timed {
    /// Seconds per tile of each setting's rounds; round `i` of one was next to round `i` of the others.
    pub(super) seconds: Vec<Vec<f64>>,
    /// What bounds each setting; empty for the model alone.
    pub(super) bottlenecks: Vec<String>,
    /// False if the time was up before the medians were known well.
    pub(super) is_stable: bool,
    pub(super) duration: Duration,
}

impl Timed {
    /// Rounds that count.
    pub(super) fn rounds(&self) -> usize {
        self.seconds.iter().map(Vec::len).min().unwrap_or(0)
    }
}

/// Times sessions on tiles in memory.
pub(super) fn model_only(
    subjects: &[Subject],
    settings: &[Setting],
    tiles: &TileSet,
    most_time: Duration,
) -> Result<Timed, ExperimentError> {
    let tiles = tiles.slices();
    let tiles = tiles.as_slice();
    let mut sessions = Vec::new();
    for setting in settings {
        let mut session = subjects[setting.subject].open()?;
        let batches = batches_per_turn(&mut session, tiles, setting.batch)?;
        sessions.push((session, setting.batch, batches));
    }
    let counts: Vec<usize> = sessions.iter().map(|(_, batch, batches)| batch * batches).collect();
    let contestants = sessions.iter_mut().map(|(session, batch, batches)| {
        Box::new(move || timed(|| predict(session, tiles, *batch, *batches))) as Contestant<'_, SessionError>
    });
    let rules = RaceRules { warm_up: WARM_UP, least_rounds: 11, tolerance: TOLERANCE, most_time };
    let raced = race(&mut contestants.collect::<Vec<_>>(), rules)?;
    let per_tile = |(seconds, count): (&Vec<f64>, &usize)| seconds.iter().map(|s| s / *count as f64).collect();
    Ok(Timed {
        seconds: raced.seconds.iter().zip(&counts).map(per_tile).collect(),
        bottlenecks: Vec::new(),
        is_stable: raced.is_stable,
        duration: raced.duration,
    })
}

/// Predicts so many batches of tiles, beginning anew where they end.
pub(super) fn predict(
    session: &mut dyn Session,
    tiles: &[&[u8]],
    batch: usize,
    batches: usize,
) -> Result<(), SessionError> {
    let mut tiles = tiles.iter().copied().cycle();
    (0..batches).try_for_each(|_| session.predict(&tiles.by_ref().take(batch).collect::<Vec<_>>()).map(drop))
}

/// How many batches make a turn long enough.
fn batches_per_turn(session: &mut dyn Session, tiles: &[&[u8]], batch: usize) -> Result<usize, SessionError> {
    predict(session, tiles, batch, 1)?;
    let start = Instant::now();
    predict(session, tiles, batch, 1)?;
    let batches = (TURN_SECS / start.elapsed().as_secs_f64().max(1e-6)).ceil().clamp(1.0, 64.0);
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "1 to 64")]
    let batches = batches as usize;
    Ok(batches)
}

/// How many tiles of the slide a round should have, so that enough rounds fit the time.
pub(super) fn tiles_per_round(subjects: &[Subject], ladder: &Ladder, model_only: &Timed, time: Duration) -> usize {
    let cores = std::thread::available_parallelism().map_or(1.0, |cores| cores.get() as f64);
    let seconds_per_tile = |setting: &Setting| {
        let alone =
            ladder.alone.iter().position(|alone| (alone.subject, alone.batch) == (setting.subject, setting.batch));
        let mut seconds = alone.map_or_else(Vec::new, |index| model_only.seconds[index].clone());
        seconds.sort_by(f64::total_cmp);
        let infer = percentile(&seconds, 50.0);
        match (setting.way, subjects[setting.subject].device) {
            (Way::Overlapped, Device::Cpu) => (infer + READ_SECS) / cores,
            (Way::Overlapped, _) => infer.max(READ_SECS / cores),
            _ => infer + READ_SECS,
        }
    };
    let round: f64 = ladder.whole.iter().map(seconds_per_tile).sum();
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "16 to 1024")]
    let tiles = (time.as_secs_f64() / ROUNDS / round).clamp(16.0, 1024.0) as usize;
    tiles
}

/// Times the settings over the course, each in its own way.
pub(super) fn end_to_end(
    subjects: &[Subject],
    settings: &[Setting],
    course: &Course,
    request: &CompareRequest,
) -> Result<Timed, ExperimentError> {
    let out = tempfile::tempdir().map_err(|source| file_error(&std::env::temp_dir(), "written", source))?;
    let mut runners = Vec::new();
    for setting in settings {
        runners.push(Runner::open(&subjects[setting.subject], *setting, course.config(Emit::Csv), request)?);
    }
    let contestants = runners.iter_mut().map(|runner| {
        let out = &out;
        Box::new(move || timed(|| runner.round(course, out))) as Contestant<'_, ExperimentError>
    });
    let rules = RaceRules { warm_up: WARM_UP, least_rounds: 6, tolerance: TOLERANCE, most_time: request.seconds };
    let raced = race(&mut contestants.collect::<Vec<_>>(), rules)?;
    let tiles = course.tiles() as f64;
    Ok(Timed {
        seconds: raced.seconds.iter().map(|seconds| seconds.iter().map(|s| s / tiles).collect()).collect(),
        bottlenecks: runners.into_iter().map(|runner| runner.bottleneck).collect(),
        is_stable: raced.is_stable,
        duration: raced.duration,
    })
}

/// Takes a model over a course in one way.
pub(super) struct Runner {
    how: How,
    /// Of the last round.
    bottleneck: String,
}

enum How {
    InTurn { card: Box<ModelCard>, session: Box<OrtSession>, batch: usize },
    Overlapped(Box<Engine>),
}

impl Runner {
    pub(super) fn open(
        subject: &Subject,
        setting: Setting,
        config: RunConfig,
        request: &CompareRequest,
    ) -> Result<Self, ExperimentError> {
        let how = if setting.way == Way::Overlapped {
            How::Overlapped(Box::new(engine(subject, setting.batch, config, request)?))
        } else {
            let (card, session) = (Box::new(subject.card.clone()), Box::new(subject.open()?));
            How::InTurn { card, session, batch: setting.batch }
        };
        Ok(Self { how, bottleneck: String::new() })
    }

    /// Goes over the course once, from the slide's file to the stitched map; files go to `out`.
    pub(super) fn round(&mut self, course: &Course, out: &TempDir) -> Result<(), ExperimentError> {
        self.bottleneck = match &mut self.how {
            How::InTurn { card, session, batch } => course.walk(card, session.as_mut(), *batch)?.bottleneck(),
            How::Overlapped(engine) => run(engine, course, out.path())?,
        };
        Ok(())
    }
}

/// The engine as a run loads it.
fn engine(
    subject: &Subject,
    batch: usize,
    config: RunConfig,
    request: &CompareRequest,
) -> Result<Engine, ExperimentError> {
    let load = LoadRequest {
        variant: Some(subject.variant.name.clone()),
        devices: request.devices.clone(),
        provider: ProviderRequest::Named(subject.provider),
        batch_size: std::num::NonZeroUsize::new(batch),
        readers: None,
        sessions: None,
        graph_cache: None,
    };
    Ok(Engine::load(subject.card.clone(), &load, config)?)
}

/// Runs over the course and says what bounded it.
fn run(engine: &mut Engine, course: &Course, out: &Path) -> Result<String, ExperimentError> {
    let conduct = Conduct { cancel: &Cancel::default(), is_traced: false };
    let run = engine.run_slide("slide", &course.plan, out, conduct, &mut |_| {})?;
    Ok(run.bottleneck(&engine.execution()).what)
}
