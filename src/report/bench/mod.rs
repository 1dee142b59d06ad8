//! What is written down about a benchmark: `bench.json`, its table, what the numbers say, and what changed since another.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::AccountRecord;
use super::compare::{IntervalRecord, LeftOutRecord};
use super::text::percent;

mod change;
#[cfg(test)]
pub(crate) mod example;
mod insights;
mod show;
mod table;

pub use change::{Change, NotComparable, Rate, Rated, Verdict, changes, regressions};
pub use insights::insights;
pub use show::summary;
pub use table::to_csv;

/// Schema of [`BenchRecord`].
pub const BENCH_SCHEMA: &str = "slidestream/bench/1";

/// `bench.json`: models of one kind, measured one beside the other.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BenchRecord {
    /// [`BENCH_SCHEMA`].
    pub schema: String,
    /// When, with what and where it was made.
    #[serde(flatten)]
    pub account: AccountRecord,
    /// What was found out.
    #[serde(flatten)]
    pub found: Bench,
    /// What the numbers say, in sentences, the recommendation last: see [`insights()`].
    pub insights: Vec<String>,
}

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BenchKind {
    /// A model without and with LoRA; all in turns, the first entry being the model itself.
    Lora,
    /// Vision transformers of many sizes, each in a process of its own.
    Vit,
}

/// The parts of [`BenchRecord`] that tell nothing of the machine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Bench {
    /// What is measured.
    pub kind: BenchKind,
    /// In words.
    pub subject: String,
    /// Layers that adapters are for, by the ends of their names; empty without LoRA.
    #[serde(default)]
    pub lora_targets: Vec<String>,
    /// Each model at one precision and batch size.
    pub entries: Vec<BenchEntry>,
    /// What was asked for and can't be, or failed.
    pub skipped: Vec<LeftOutRecord>,
}

/// A model at one precision and batch size.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BenchEntry {
    /// Unique in the record, and the same in another run of the same thing.
    pub name: String,
    /// The model alone: what entries of other precisions and batch sizes share.
    pub model: String,
    /// `fp32`, `fp16`, `int8`, or `as built` for a model that was not optimised.
    pub precision: String,
    /// The variant of the model's card.
    #[serde(default)]
    pub variant: String,
    /// Such as `cpu` or `cuda:0,cuda:1`.
    pub device: String,
    /// The execution provider.
    #[serde(default)]
    pub provider: String,
    /// Sessions side by side, on all devices together.
    pub sessions: usize,
    /// Samples in a batch of one session.
    pub batch_size: usize,
    /// Samples in the batches of all sessions.
    pub total_batch_size: usize,
    /// Elements of all weights, those of an adapter beside them included.
    pub parameters: u64,
    /// Operations per sample of the products in the graph, a multiply-add being two.
    pub flops: u64,
    /// Of the whole system: median of the rounds with an interval of 95 %.
    pub samples_per_sec: IntervalRecord,
    /// Its inverse, in milliseconds.
    pub ms_per_sample: f64,
    /// Samples per second of each round, in order; in turns, round `i` of all entries ran side by side.
    pub rounds_samples_per_sec: Vec<f64>,
    /// Times as fast as the first entry, from rounds side by side; absent where entries did not run in turns.
    pub ratio: Option<IntervalRecord>,
    /// Seconds of loading and of the first batch, in which kernels are chosen and compiled, in a process of its own.
    #[serde(default)]
    pub start_secs: Option<f64>,
    /// Largest resident memory of a process that does nothing else.
    pub peak_host_bytes: Option<u64>,
    /// Largest memory on the devices, less what others held before.
    pub peak_device_bytes: Option<u64>,
    /// Share of the time in which the devices, or the sessions on a CPU, were at work, 0–1.
    pub utilisation: Option<f64>,
    /// Of each device; empty for a CPU.
    #[serde(default)]
    pub utilisation_by_device: BTreeMap<String, f64>,
    /// False if the time was up before the median was known well.
    pub is_stable: bool,
    /// What LoRA adds; absent for a model without.
    pub lora: Option<LoraRecord>,
    /// Against one device, or one session; absent where there is just one.
    pub scaling: Option<ScalingRecord>,
}

/// What a model takes in a process that does nothing else.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct AloneRecord {
    /// Seconds of loading and of the first batch.
    pub start_secs: Option<f64>,
    /// Largest resident memory of the process.
    pub peak_host_bytes: Option<u64>,
    /// Largest memory on the devices, less what others held before.
    pub peak_device_bytes: Option<u64>,
    /// Share of the time in which the devices, or the sessions on a CPU, were at work, 0–1.
    pub utilisation: Option<f64>,
    /// Of each device; empty for a CPU.
    pub utilisation_by_device: BTreeMap<String, f64>,
}

/// An adapter of random numbers, beside a model's weights or merged into them.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LoraRecord {
    /// The rank r.
    pub rank: usize,
    /// α: updates are scaled by α / r.
    pub alpha: f64,
    /// Whether the weights hold it.
    pub is_merged: bool,
    /// Elements of all A and B.
    pub parameters: u64,
    /// Their share of all that the unmerged model has, 0–1.
    pub share_of_parameters: f64,
    /// Largest difference between the merged and the unmerged model's raw outputs.
    pub max_abs_difference: f64,
    /// What rounding explains; a larger difference is an error.
    pub difference_bound: f64,
}

/// What more devices or sessions bring.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ScalingRecord {
    /// Devices, or sessions on a single one.
    pub replicas: usize,
    /// Samples per second of each round on one.
    pub rounds_of_one: Vec<f64>,
    /// Times as fast as one.
    pub speedup: IntervalRecord,
    /// The speed-up by the number: 1 where nothing is lost.
    pub efficiency: f64,
}

impl BenchEntry {
    /// What it needs of memory: the device's, or the process's on a CPU.
    #[must_use]
    pub fn peak_bytes(&self) -> Option<u64> {
        self.peak_device_bytes.or(self.peak_host_bytes)
    }

    /// How busy it keeps its devices, each where there are several: `98 %, 97 %`; empty if that is not known.
    #[must_use]
    pub fn busy_in_words(&self) -> String {
        match self.utilisation_by_device.len() {
            0 | 1 => self.utilisation.map_or_else(String::new, percent),
            _ => self.utilisation_by_device.values().map(|share| percent(*share)).collect::<Vec<_>>().join(", "),
        }
    }
}

/// Such as `1.01× [0.99, 1.03]`.
pub(super) fn ratio_in_words(ratio: &IntervalRecord) -> String {
    format!("{:.2}× [{:.2}, {:.2}]", ratio.value, ratio.low, ratio.high)
}
