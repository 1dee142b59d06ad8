//! Benchmarks of models of one kind: what LoRA costs unmerged and merged, and how vision transformers of many sizes run.

pub mod lora;
pub mod vit;

use crate::report::StageRecord;

/// Share of the time in which the sessions were at work, for a CPU, which does not tell of itself.
fn sessions_busy(stages: &[StageRecord]) -> Option<f64> {
    stages.iter().find(|stage| stage.name == "infer").and_then(StageRecord::utilisation)
}
