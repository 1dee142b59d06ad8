//! What is written down about a run: versioned wire types, and reading and writing them as JSON.
//!
//! Only this module and what serves HTTP know JSON; domain types are converted at the edge. Fields are only ever added
//! within a schema version.

pub mod bench;
mod chart;
pub mod compare;
mod evaluate;
mod html;
mod optimize;
mod predict;
mod simulate;
mod text;
mod trace;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

pub use self::evaluate::{
    BinRecord, ClassFigures, DrawnRecord, EVALUATE_SCHEMA, EvaluateRecord, EvaluatedRecord, FigureRecord, Figures,
    SampleRecord, WorstRecord, predictions_csv,
};
pub use self::optimize::{
    NodeRecord, OPTIMIZE_SCHEMA, OptimizeRecord, PassRecord, SpeedRecord, VariantAgreement, VariantRecord,
};
pub use self::predict::{
    FailedImage, FolderRecord, ImageClass, ImageRecord, PREDICT_SCHEMA, PaceRecord, PredictRecord, PredictedRecord,
    RanOnRecord, TileRecord, start_in_words,
};
pub use self::simulate::{
    EstimateRecord, FormulaRecord, ModelSizeRecord, PointRecord, SIMULATE_SCHEMA, SimulateRecord, Simulation,
};
pub use self::text::{bytes, count, duration, significant};
pub use self::trace::{TraceRow, trace_json};
pub use html::{bench_html, compare_html, evaluate_html};

/// Schema of [`RunRecord`].
pub const RUN_SCHEMA: &str = "slidestream/run/1";
/// Schema of [`SlideRecord`].
pub const SLIDE_SCHEMA: &str = "slidestream/slide/1";

/// How far a run or a slide got.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// Not finished: still at work, or killed.
    Running,
    /// All that was asked for was done.
    Done,
    /// Something failed; what, stands beside it.
    Failed,
    /// Was done before with the same model, variant, settings and slide.
    Skipped,
    /// Stopped on request.
    Interrupted,
}

impl Status {
    /// The word in files and tables.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Done => "done",
            Self::Failed => "failed",
            Self::Skipped => "skipped",
            Self::Interrupted => "interrupted",
        }
    }
}

/// When, with what and where a record was made.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AccountRecord {
    /// RFC 3339, UTC.
    pub started: String,
    /// RFC 3339, UTC.
    pub finished: String,
    /// The program's version.
    pub version: String,
    /// The command line, as it was typed.
    pub command: Vec<String>,
    /// Versions and paths of the native libraries, by name.
    pub libraries: BTreeMap<String, LibraryRecord>,
    /// The machine.
    pub hardware: HardwareRecord,
}

/// `run.json`: one run over any number of slides.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunRecord {
    /// [`RUN_SCHEMA`].
    pub schema: String,
    /// Written as `running` before the first slide.
    pub status: Status,
    /// RFC 3339, UTC.
    pub started: String,
    /// RFC 3339, UTC; absent while running.
    pub finished: Option<String>,
    /// The program's version.
    pub version: String,
    /// The command line, as it was typed.
    pub command: Vec<String>,
    /// Versions and paths of the native libraries, by name.
    pub libraries: BTreeMap<String, LibraryRecord>,
    /// The machine.
    pub hardware: HardwareRecord,
    /// The model.
    pub model: ModelRecord,
    /// Where and how it ran.
    pub execution: ExecutionRecord,
    /// Everything that shapes the results, by the names of the flags.
    pub settings: Map<String, Value>,
    /// Slides by status.
    pub slides: BTreeMap<String, u64>,
}

/// A native library.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LibraryRecord {
    /// Its own version.
    pub version: String,
    /// The file.
    pub path: String,
    /// Why that one.
    pub origin: String,
}

/// The machine that a run used.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HardwareRecord {
    /// The processor's name.
    pub cpu: String,
    /// Logical cores that this process may use.
    pub cores: usize,
    /// Memory of the machine.
    pub memory_bytes: u64,
    /// Names of the GPUs.
    pub gpus: Vec<String>,
}

impl HardwareRecord {
    /// The processor with its cores, and the GPUs.
    #[must_use]
    pub fn in_words(&self) -> String {
        let mut words = format!("{}, {} logical cores", self.cpu, self.cores);
        self.gpus.iter().for_each(|gpu| words.extend([", ", gpu]));
        words
    }
}

/// The model of a run.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelRecord {
    /// The card's name.
    pub name: String,
    /// The variant that ran, such as `fp32`.
    pub variant: String,
    /// Its file.
    pub file: String,
    /// SHA-256 of that file.
    pub sha256: String,
    /// `classification`, `segmentation` or `features`.
    pub task: String,
    /// Class names in the order of the model's outputs; empty for features.
    pub classes: Vec<String>,
}

/// Where and how a model ran.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecutionRecord {
    /// Such as `cpu` or `cuda:0`.
    pub device: String,
    /// The execution provider.
    pub provider: String,
    /// Why this device and provider.
    pub reason: String,
    /// Where the graph's nodes ran: provider → operator → count; empty where everything ran on the CPU.
    pub placement: BTreeMap<String, BTreeMap<String, u64>>,
    /// Tiles per batch.
    pub batch_size: usize,
    /// Reader threads.
    pub readers: usize,
    /// Sessions.
    pub sessions: usize,
    /// Threads inside a session.
    pub threads_per_session: usize,
}

/// `slides/ID.json`: one slide's state; written last, after its outputs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SlideRecord {
    /// [`SLIDE_SCHEMA`].
    pub schema: String,
    /// The slide's name in every file of the run.
    pub id: String,
    /// `done` or `failed`.
    pub status: Status,
    /// Why it failed.
    pub error: Option<String>,
    /// How to put that right.
    pub hint: Option<String>,
    /// RFC 3339, UTC.
    pub finished: String,
    /// The slide's file.
    pub slide: SlideIdentity,
    /// The model's name, variant and sha256.
    pub model: ModelRecord,
    /// Everything that shapes the results, by the names of the flags.
    pub settings: Map<String, Value>,
    /// How the slide was read; absent if it could not be.
    pub reading: Option<ReadingRecord>,
    /// What became of the grid's tiles; absent if there was no grid.
    pub coverage: Option<CoverageRecord>,
    /// Share of each class in the classified area, `name → 0..=1`.
    pub class_shares: BTreeMap<String, f64>,
    /// The times of the run.
    pub timing: Option<TimingRecord>,
    /// What it took of the host's memory; absent if it was not planned, or the system doesn't tell.
    #[serde(default)]
    pub memory: Option<MemoryRecord>,
    /// What happened that the reader of the results should know.
    pub notes: Vec<String>,
    /// The files, with their checksums.
    pub outputs: Vec<OutputRecord>,
}

/// What tells one slide file from another without reading gigabytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SlideIdentity {
    /// The file as it was named.
    pub path: String,
    /// Its size.
    pub bytes: u64,
    /// Its modification time, RFC 3339, UTC.
    pub modified: String,
    /// SHA-256 of its first MiB.
    pub head_sha256: String,
}

/// How a slide was read.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ReadingRecord {
    /// Who decoded it: `native` or `openslide`.
    pub reader: String,
    /// Why that reader.
    #[serde(default)]
    pub reader_reason: String,
    /// The format as OpenSlide calls it.
    pub vendor: String,
    /// Level-0 size, `[width, height]`.
    pub dimensions: [u64; 2],
    /// Level-0 resolution in µm/px, `[x, y]`.
    pub slide_mpp: [f64; 2],
    /// What the model asks for.
    pub requested_mpp: f64,
    /// What it got, `[x, y]`.
    pub effective_mpp: [f64; 2],
    /// The level that was read.
    pub level: u32,
    /// Whether its pixels were resampled.
    pub resampled: bool,
    /// Whether an ICC profile was applied: `not asked`, `applied` or `absent`.
    pub icc: String,
    /// The region of the run in level-0 pixels, `[x, y, width, height]`.
    pub region: [i64; 4],
    /// Tile side in pixels at the effective resolution.
    pub tile_size: u32,
    /// Pixels that neighbouring tiles share.
    pub overlap: u32,
    /// Tile size in level-0 pixels, `[width, height]`.
    pub tile_size_level0: [i64; 2],
}

/// What became of the tiles: `inferred + background + unsampled + failed` is the grid.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CoverageRecord {
    /// Tiles of the grid (or of the coordinates file).
    pub grid: u64,
    /// Tiles with a result.
    pub inferred: u64,
    /// Tiles without enough tissue.
    pub background: u64,
    /// Tissue tiles left out by `max_tiles`.
    pub unsampled: u64,
    /// Tiles that could not be read or gave no finite result, with their place.
    pub failed: Vec<FailedTile>,
}

/// A tile without a result.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FailedTile {
    /// Its rectangle in level-0 pixels, `[x, y, width, height]`.
    pub rect: [i64; 4],
    /// What went wrong.
    pub reason: String,
}

/// The times of one slide.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TimingRecord {
    /// From opening the slide to the last output.
    pub seconds: f64,
    /// From the first tile to the last.
    pub pipeline_seconds: f64,
    /// Inferred tiles per second of the pipeline.
    pub tiles_per_sec: f64,
    /// The stage that bounds the rate, and how that is known.
    pub bottleneck: String,
    /// What would relieve it.
    #[serde(default)]
    pub relief: String,
    /// Share of the time in which each GPU was at work, 0–1, as its driver tells: the mean over the later half.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub gpu_busy: BTreeMap<String, f64>,
    /// Each stage in order.
    pub stages: Vec<StageRecord>,
}

/// What a slide takes of the host's memory, all that the process holds included.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryRecord {
    /// The most that was expected, before the tiles were read.
    pub expected_bytes: u64,
    /// What makes it up, by what it is for; less than the whole if planning the slide took more.
    pub parts: BTreeMap<String, u64>,
    /// What was allowed.
    pub limit_bytes: Option<u64>,
    /// Whether less was kept ready than is best for speed, because of the limit.
    pub lowered: bool,
    /// The most that was resident, from the opening of the slide on; absent before its tiles are done.
    pub peak_bytes: Option<u64>,
}

/// The time of one stage, over all its workers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StageRecord {
    /// The stage.
    pub name: String,
    /// Its workers.
    pub workers: usize,
    /// Items that arrived.
    pub items: u64,
    /// Seconds at work.
    pub busy_secs: f64,
    /// Seconds without input.
    pub starved_secs: f64,
    /// Seconds without room downstream.
    pub blocked_secs: f64,
}

impl StageRecord {
    /// Share of its workers' time at work, 0–1; `None` if there was no time.
    #[must_use]
    pub fn utilisation(&self) -> Option<f64> {
        let all = self.busy_secs + self.starved_secs + self.blocked_secs;
        (all > 0.0).then(|| self.busy_secs / all)
    }
}

/// A file that was written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OutputRecord {
    /// Path below the run's folder.
    pub path: String,
    /// Its size.
    pub bytes: u64,
    /// Its checksum.
    pub sha256: String,
}

/// The record as readable JSON, with a line feed at its end.
#[must_use]
pub fn to_json(record: &impl Serialize) -> Vec<u8> {
    // Wire types hold only text, numbers, lists and maps with text keys, which always serialise.
    let mut bytes = serde_json::to_vec_pretty(record).unwrap_or_default();
    bytes.push(b'\n');
    bytes
}

/// Why two runs over the same slide would give different results, `None` if they would not.
///
/// Names the first difference: another model, variant, setting or slide file.
#[must_use]
pub fn difference(before: &SlideRecord, now: &SlideRecord) -> Option<String> {
    if before.schema != now.schema {
        return Some(format!("its record has schema {:?}", before.schema));
    }
    if before.status != Status::Done {
        return Some(format!("it was {}", before.status.as_str()));
    }
    if before.model.name != now.model.name {
        return Some(format!("made with model {:?}, now {:?}", before.model.name, now.model.name));
    }
    if before.model.variant != now.model.variant {
        return Some(format!("made with variant {:?}, now {:?}", before.model.variant, now.model.variant));
    }
    if before.model != now.model {
        return Some("the model's file or classes changed".to_owned());
    }
    if before.slide.bytes != now.slide.bytes
        || before.slide.modified != now.slide.modified
        || before.slide.head_sha256 != now.slide.head_sha256
    {
        return Some("the slide file changed".to_owned());
    }
    let names = before.settings.keys().chain(now.settings.keys());
    for name in names {
        let (old, new) = (before.settings.get(name), now.settings.get(name));
        if old != new {
            let text = |value: Option<&Value>| value.map_or_else(|| "unset".to_owned(), ToString::to_string);
            return Some(format!("made with {name} {}, now {}", text(old), text(new)));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn record() -> SlideRecord {
        let model = ModelRecord {
            name: "m".into(),
            variant: "fp32".into(),
            file: "m.onnx".into(),
            sha256: "00".into(),
            task: "classification".into(),
            classes: vec!["a".into()],
        };
        let settings = json!({"target_mpp": 0.5, "overlap": 0}).as_object().unwrap().clone();
        SlideRecord {
            schema: SLIDE_SCHEMA.into(),
            id: "s".into(),
            status: Status::Done,
            error: None,
            hint: None,
            finished: String::new(),
            slide: SlideIdentity { path: "s.svs".into(), bytes: 1, modified: "t".into(), head_sha256: "11".into() },
            model,
            settings,
            reading: None,
            coverage: None,
            class_shares: BTreeMap::new(),
            timing: None,
            memory: None,
            notes: Vec::new(),
            outputs: Vec::new(),
        }
    }

    #[test]
    fn a_difference_is_named() {
        let change = |edit: fn(&mut SlideRecord)| {
            let mut now = record();
            edit(&mut now);
            difference(&record(), &now)
        };
        assert_eq!(change(|_| {}), None);
        assert_eq!(change(|now| now.slide.path = "elsewhere/s.svs".into()), None);
        assert_eq!(change(|now| now.slide.bytes = 2).as_deref(), Some("the slide file changed"));
        assert_eq!(
            change(|now| now.model.variant = "int8".into()).as_deref(),
            Some("made with variant \"fp32\", now \"int8\"")
        );
        assert_eq!(
            change(|now| now.model.sha256 = "01".into()).as_deref(),
            Some("the model's file or classes changed")
        );
        assert_eq!(
            change(|now| drop(now.settings.insert("overlap".into(), json!(64)))).as_deref(),
            Some("made with overlap 0, now 64")
        );
        assert_eq!(
            change(|now| drop(now.settings.insert("icc".into(), json!(true)))).as_deref(),
            Some("made with icc unset, now true")
        );
        let mut failed = record();
        failed.status = Status::Failed;
        assert_eq!(difference(&failed, &record()).as_deref(), Some("it was failed"));
    }

    #[test]
    fn records_come_back_from_their_json() {
        let bytes = to_json(&record());
        assert_eq!(serde_json::from_slice::<SlideRecord>(&bytes).unwrap(), record());
        assert!(bytes.ends_with(b"}\n"));
    }
}
