//! The account of an optimisation: what was done to every node, and what came of it (`optimize.json`).

use std::collections::BTreeMap;

use serde::Serialize;

use super::{HardwareRecord, LibraryRecord};

/// The schema's name and version.
pub const OPTIMIZE_SCHEMA: &str = "slidestream/optimize/1";

/// The whole account.
#[derive(Clone, Debug, Serialize)]
pub struct OptimizeRecord {
    /// [`OPTIMIZE_SCHEMA`].
    pub schema: String,
    /// When it began, UTC.
    pub started: String,
    /// Of this program.
    pub version: String,
    /// As it was typed.
    pub command: Vec<String>,
    /// Native libraries by name.
    pub libraries: BTreeMap<String, LibraryRecord>,
    /// The machine.
    pub hardware: HardwareRecord,
    /// The model's card or file.
    pub source: String,
    /// Hash of the original's weights.
    pub sha256: String,
    /// `cpu` or `cuda`.
    pub made_for: String,
    /// The tiles that variants were compared on.
    pub tiles: String,
    /// The tiles that INT8 was calibrated on, if it was.
    pub calibration: Option<String>,
    /// What was written, and what was tried and dropped.
    pub variants: Vec<VariantRecord>,
}

/// One variant.
#[derive(Clone, Debug, Serialize)]
pub struct VariantRecord {
    /// Its name in the card.
    pub name: String,
    /// The file; `None` if it was dropped.
    pub file: Option<String>,
    /// Bytes of the file, weights beside it included.
    pub bytes: u64,
    /// Hash as in the card.
    pub sha256: String,
    /// The provider that it is for.
    pub provider: String,
    /// Options of the provider or the session.
    pub options: BTreeMap<String, String>,
    /// Against the original, on the same tiles.
    pub agreement: VariantAgreement,
    /// Against the original, in turns; `None` where the device is not in this machine.
    pub speed: Option<SpeedRecord>,
    /// Whether it is worth its while here.
    pub is_recommended: bool,
    /// Why, or why not; what it needs.
    pub note: String,
    /// The passes in order.
    pub passes: Vec<PassRecord>,
}

/// How close a variant is to the original.
#[derive(Clone, Debug, Serialize)]
pub struct VariantAgreement {
    /// Tiles compared.
    pub tiles: usize,
    /// Mean cosine of the raw outputs of a tile.
    pub mean_cosine: f64,
    /// Least cosine.
    pub min_cosine: f64,
    /// Greatest difference of raw outputs; `None` if a value is not finite.
    pub max_abs_difference: Option<f64>,
    /// Share of tiles (pixels) with the same most probable class.
    pub top1_agreement: Option<f64>,
    /// Outputs that are infinite or not a number.
    pub nonfinite: usize,
}

/// How fast a variant is.
#[derive(Clone, Debug, Serialize)]
pub struct SpeedRecord {
    /// How many times faster than the original: median of the rounds.
    pub ratio: f64,
    /// Interval of 95 %.
    pub low: f64,
    /// Interval of 95 %.
    pub high: f64,
    /// Median milliseconds per tile.
    pub ms_per_tile: f64,
    /// Tiles per batch.
    pub batch: usize,
    /// Seconds of every round of the original.
    pub original_secs: Vec<f64>,
    /// Seconds of every round of this one.
    pub secs: Vec<f64>,
}

/// What one pass did.
#[derive(Clone, Debug, Serialize)]
pub struct PassRecord {
    /// The pass.
    pub pass: String,
    /// Nodes that it was applied to.
    pub applied: usize,
    /// One per node that it is about.
    pub nodes: Vec<NodeRecord>,
}

/// What a pass did with a node.
#[derive(Clone, Debug, Serialize)]
pub struct NodeRecord {
    /// Its name.
    pub node: String,
    /// Its operator.
    pub op: String,
    /// Whether it was changed.
    pub is_applied: bool,
    /// What it became, or why it stayed.
    pub what: String,
}
