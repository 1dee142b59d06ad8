//! What is written down about a simulation: how fast a model runs without slides, and what that means for one.

use serde::{Deserialize, Serialize};

use std::collections::BTreeMap;

use super::compare::{IntervalRecord, SummaryRecord};
use super::{AccountRecord, ExecutionRecord, ModelRecord, StageRecord};

/// Schema of [`SimulateRecord`].
pub const SIMULATE_SCHEMA: &str = "slidestream/simulate/1";

/// A simulation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SimulateRecord {
    /// [`SIMULATE_SCHEMA`].
    pub schema: String,
    /// When, with what and where it was made.
    #[serde(flatten)]
    pub account: AccountRecord,
    /// What was found out.
    #[serde(flatten)]
    pub found: Simulation,
}

/// The parts of [`SimulateRecord`] that tell nothing of the machine.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Simulation {
    /// The model.
    pub model: ModelRecord,
    /// How large it is and what it costs.
    pub size: ModelSizeRecord,
    /// What may go wrong on the device.
    pub warnings: Vec<String>,
    /// Where and how it ran.
    pub execution: ExecutionRecord,
    /// Seconds until the sessions were open.
    pub load_secs: f64,
    /// Seconds of the first batch of all sessions, in which kernels are chosen and compiled.
    pub first_batch_secs: f64,
    /// Operations per second of the devices' matrix product in the floats of the weights (for 32 bits what the provider
    /// makes of them: on a GPU TF32): what no model exceeds. Absent for integers.
    pub ceiling_flops_per_sec: Option<f64>,
    /// One for each batch size, ascending.
    pub points: Vec<PointRecord>,
    /// Index of the fastest of them.
    pub best: usize,
    /// Largest resident memory of the process since it began to load the model.
    pub peak_host_bytes: Option<u64>,
    /// What it means for a slide.
    pub slide: Option<EstimateRecord>,
}

/// How large a model is and what one tile costs.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ModelSizeRecord {
    /// Elements of all weights.
    pub parameters: u64,
    /// Their bytes as they are stored.
    pub parameter_bytes: u64,
    /// Bytes of a tile as the model takes it.
    #[serde(default)]
    pub input_bytes: u64,
    /// Operations per tile of the products in the graph, a multiply-add being two.
    pub flops: u64,
    /// The same by operator.
    pub flops_by_op: BTreeMap<String, u64>,
    /// Elements that all other operators compute, per tile: sums, activations, norms, softmax, pooling.
    #[serde(default)]
    pub elementwise: u64,
    /// Operators whose cost is not known and not counted, and how many of each.
    pub uncounted: BTreeMap<String, usize>,
    /// The usual formula for a transformer described by its numbers; see `onnx::vit`.
    pub formula: Option<FormulaRecord>,
}

/// What the formula gives, whose tokens may count the class token or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FormulaRecord {
    /// With as many tokens as there are patches.
    pub flops: u64,
    /// With the class token.
    pub flops_with_class_token: u64,
    /// Parameters by formula.
    pub parameters: u64,
}

/// What one batch size gave.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PointRecord {
    /// Tiles per batch.
    pub batch_size: usize,
    /// Median of the rounds, with an interval that covers the true one with 95 % if there are at least six.
    pub tiles_per_sec: IntervalRecord,
    /// Rounds in order.
    pub samples_tiles_per_sec: Vec<f64>,
    /// Milliseconds that a session takes for a batch by its tiles. Sessions run side by side: with n of them a tile is done
    /// every nth part of that.
    pub ms_per_tile: Option<SummaryRecord>,
    /// Operations per second.
    pub flops_per_sec: f64,
    /// Share of the ceiling, 0–1.
    pub share_of_ceiling: Option<f64>,
    /// Largest memory on the devices, less what others held before.
    pub peak_device_bytes: Option<u64>,
    /// Share of the time in which the devices were at work, 0–1.
    pub device_utilisation: Option<f64>,
    /// Of each device; empty for a CPU.
    #[serde(default)]
    pub utilisation_by_device: BTreeMap<String, f64>,
    /// Mean power of the devices.
    pub watts: Option<f64>,
    /// False if the time was up before the median was known well.
    pub is_stable: bool,
    /// What the stages did over all rounds, the first one and what was under way at the end included.
    pub stages: Vec<StageRecord>,
}

/// What the best rate means for a slide.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct EstimateRecord {
    /// The slide.
    pub name: String,
    /// Level-0 pixels; absent if only the number of tiles is known.
    pub width: Option<u64>,
    /// Level-0 pixels.
    pub height: Option<u64>,
    /// Tiles of the grid, which covers the edges too.
    pub grid_tiles: Option<u64>,
    /// Tiles that lie wholly on the slide: `(⌊(w − tile) / stride⌋ + 1) · (⌊(h − tile) / stride⌋ + 1)`, in the model's pixels;
    /// the stride is `tile · (1 − overlap)` unrounded where the overlap is a share. Absent if only the number of tiles is
    /// known.
    pub full_tiles: Option<u64>,
    /// Resolution at level 0 in µm/px; absent if only the number of tiles is known.
    pub mpp: Option<f64>,
    /// What neighbouring tiles of the grid share, in whole pixels of the model; absent if only the number of tiles is
    /// known.
    pub overlap: Option<u32>,
    /// Share of the grid's tiles that have tissue.
    pub tissue_fraction: Option<f64>,
    /// Tiles to infer.
    pub tiles: u64,
    /// Of the model alone.
    pub inference_tiles_per_sec: f64,
    /// Of reading alone, on all readers; absent where no slide was read.
    pub reading_tiles_per_sec: Option<f64>,
    /// Of both together.
    pub tiles_per_sec: f64,
    /// Of the slide.
    pub seconds: f64,
    /// What bounds it, in a sentence, and what the estimate leaves out.
    pub bound_by: String,
    /// Slides of this kind in an hour.
    pub slides_per_hour: f64,
    /// In a day.
    pub slides_per_day: f64,
    /// Power that the energy follows from, in watts: as it was given, else that of the GPUs alone.
    pub watts: Option<f64>,
    /// Whether the power is that of the GPUs alone, without CPU and host.
    #[serde(default)]
    pub watts_are_of_gpus: bool,
    /// Energy of 1,000 slides in kilowatt-hours, if the power is known.
    pub kwh_per_1000_slides: Option<f64>,
}
