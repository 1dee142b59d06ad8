//! What is written down about predicted images, `predict.json`, and how fast a model ran over tiles.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::compare::SummaryRecord;
use super::{AccountRecord, ModelRecord};

/// Schema of [`PredictRecord`].
pub const PREDICT_SCHEMA: &str = "slidestream/predict/1";

/// `predict.json`: a model over images that are no slides.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PredictRecord {
    /// [`PREDICT_SCHEMA`].
    pub schema: String,
    /// When, with what and where it was made.
    #[serde(flatten)]
    pub account: AccountRecord,
    /// What was predicted.
    #[serde(flatten)]
    pub found: PredictedRecord,
}

/// The parts of [`PredictRecord`] that tell nothing of the machine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PredictedRecord {
    /// The model.
    pub model: ModelRecord,
    /// Where it ran.
    pub ran_on: RanOnRecord,
    /// Side of a tile in pixels.
    pub tile_size: u32,
    /// Most tiles of an image; 0 for all, as a segmentation always takes.
    pub max_tiles: usize,
    /// The images, in the order in which they were given, those of a folder sorted.
    pub images: Vec<ImageRecord>,
    /// The folders that were given.
    pub folders: Vec<FolderRecord>,
    /// Images that could not be predicted.
    pub failed: Vec<FailedImage>,
    /// Files of the folders that are no images, by extension in lower case; left out.
    #[serde(default)]
    pub skipped: BTreeMap<String, u64>,
    /// What the reader should know.
    pub notes: Vec<String>,
    /// The model alone; absent if no image could be predicted.
    pub pace: Option<PaceRecord>,
}

/// Where and how a model ran on tiles that were at hand.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RanOnRecord {
    /// Such as `cpu` or `cuda:0,cuda:1`.
    pub device: String,
    /// The execution provider.
    pub provider: String,
    /// Why this device and provider.
    pub reason: String,
    /// Sessions over all devices.
    pub sessions: usize,
    /// Tiles per batch of one session.
    pub batch_size: usize,
    /// Tiles that all sessions predict side by side.
    pub total_batch_size: usize,
    /// Seconds until the sessions were open.
    pub load_secs: f64,
    /// Seconds of the first batches, in which kernels are chosen and compiled; measured apart from all others.
    pub warm_up_secs: f64,
}

/// Sessions, batches and how long the start took: `2 sessions with 8 tiles each; 0.40 s to load, 0.10 s for the first batches`.
#[must_use]
pub fn start_in_words(ran_on: &RanOnRecord) -> String {
    let sessions = if ran_on.sessions == 1 { "1 session".to_owned() } else { format!("{} sessions", ran_on.sessions) };
    let each = if ran_on.sessions == 1 { "" } else { " each" };
    format!(
        "{sessions} with {} tiles{each}; {:.2} s to load, {:.2} s for the first batches",
        ran_on.batch_size, ran_on.load_secs, ran_on.warm_up_secs
    )
}

/// How fast a warm model ran, without reading, decoding or anything else.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct PaceRecord {
    /// Tiles of the largest batch, over all sessions.
    pub batch_size: usize,
    /// Tiles that were timed: all but those of the first batch, where another of its size follows.
    pub tiles: u64,
    /// Seconds that their batches took together.
    pub seconds: f64,
    /// Tiles by seconds.
    pub tiles_per_sec: f64,
    /// Milliseconds of a batch by its tiles, over the full batches; in batches of one the latency of a tile.
    pub ms_per_tile: SummaryRecord,
}

/// An image that can't be taken.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FailedImage {
    /// The image.
    pub path: String,
    /// Why not.
    pub reason: String,
    /// How to put it right.
    pub hint: Option<String>,
}

/// What a model says of an image.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ImageRecord {
    /// The file.
    pub path: String,
    /// Width in pixels.
    pub width: u32,
    /// Height in pixels.
    pub height: u32,
    /// Whole tiles that the image has; of a segmentation, tiles that cover it.
    pub grid_tiles: u64,
    /// Share of the image, 0–1, in its whole tiles: what is left over at the right and the bottom is not seen.
    pub covered: f64,
    /// The most probable class by the mean over tiles; absent for a map, and where the only class has less than one half.
    pub label: Option<String>,
    /// Mean probability of that class.
    pub confidence: Option<f64>,
    /// Each class, in the model's order.
    pub classes: Vec<ImageClass>,
    /// The tiles that were predicted; empty for a map.
    pub tiles: Vec<TileRecord>,
    /// Files that were written.
    pub files: Vec<String>,
}

impl ImageRecord {
    /// Number of its pixels.
    #[must_use]
    pub fn pixels(&self) -> u64 {
        u64::from(self.width) * u64::from(self.height)
    }
}

/// A class in an image.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ImageClass {
    /// Its name.
    pub class: String,
    /// Tiles, or pixels of a map, that have this class: the most probable one, and where classes do not exclude each other
    /// only from one half on.
    pub count: u64,
    /// Mean probability over tiles or pixels.
    pub probability: f64,
}

/// What a model says of a tile.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TileRecord {
    /// Left edge in the image's pixels.
    pub x: u32,
    /// Upper edge in the image's pixels.
    pub y: u32,
    /// The most probable class; absent where the only class has less than one half.
    pub label: Option<String>,
    /// Of each class, in the model's order.
    pub probabilities: Vec<f64>,
}

/// What the images of a folder say together.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FolderRecord {
    /// The folder.
    pub path: String,
    /// Images that were predicted.
    pub images: u64,
    /// Images that could not be.
    pub failed: u64,
    /// Pixels of the predicted images.
    #[serde(default)]
    pub pixels: u64,
    /// The most probable class by the mean of the images' means; absent for maps.
    pub label: Option<String>,
    /// That mean.
    pub confidence: Option<f64>,
    /// Each class: images, or pixels of maps, of which it is the most probable, and the mean of the images' means.
    pub classes: Vec<ImageClass>,
}
