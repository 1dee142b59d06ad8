//! Benchmarks of models of one kind: what LoRA costs unmerged and merged, and how vision transformers of many sizes run.

pub mod lora;
pub mod vit;
