//! How close a variant's outputs are to the original's and to labels, as it is written down.

use serde::{Deserialize, Serialize};

use super::IntervalRecord;

/// A variant's outputs against the original's, on the same tiles.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AgreementRecord {
    /// The variant.
    pub variant: String,
    /// Tiles that were compared.
    pub tiles: u64,
    /// Cosine of the outputs, tile by tile.
    pub cosine: Option<CosineRecord>,
    /// Largest difference of any output value.
    pub max_abs_difference: Option<f64>,
    /// Share of the tiles with the same class.
    pub top1_agreement: Option<f64>,
    /// Dice coefficient of the two class maps, for each class.
    pub dice: Vec<ClassValue>,
    /// Share of the pixels with the same class.
    pub pixel_agreement: Option<f64>,
    /// Tiles that change side of the threshold.
    pub flips: Option<FlipsRecord>,
    /// Output values of the variant that are NaN or infinite.
    pub nan_count: u64,
}

/// Cosines over tiles.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct CosineRecord {
    /// Mean.
    #[serde(deserialize_with = "super::number")]
    pub mean: f64,
    /// First percentile: one tile in a hundred is worse.
    #[serde(deserialize_with = "super::number")]
    pub p1: f64,
    /// Of the worst tile.
    #[serde(deserialize_with = "super::number")]
    pub min: f64,
}

/// A figure of one class.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ClassValue {
    /// The class's name.
    pub class: String,
    /// Absent if the class does not occur.
    pub value: Option<f64>,
}

/// Tiles that change side of a threshold.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct FlipsRecord {
    /// The probability at which a tile counts as positive.
    #[serde(deserialize_with = "super::number")]
    pub threshold: f64,
    /// How many change side.
    pub tiles: u64,
}

/// Variants against labels.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AccuracyRecord {
    /// Where the labels come from.
    pub labels: String,
    /// Labelled items.
    pub items: u64,
    /// What an item is, in the plural: what was drawn anew for the intervals, such as `tiles`.
    pub unit: String,
    /// A row per variant, the original first.
    pub rows: Vec<AccuracyRow>,
}

/// One variant against labels.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AccuracyRow {
    /// The variant.
    pub variant: String,
    /// Share of right items.
    pub accuracy: Option<MetricRecord>,
    /// Mean recall of the classes.
    pub balanced_accuracy: Option<MetricRecord>,
    /// Area under the ROC curve, mean of each class against the rest.
    pub auc: Option<MetricRecord>,
    /// Mean Dice coefficient of the classes.
    pub dice: Option<MetricRecord>,
}

/// A metric, 0–1, and how it differs from the original's.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct MetricRecord {
    /// The metric.
    pub value: IntervalRecord,
    /// This variant's minus the original's, both on the same draws; absent for the original.
    pub difference: Option<IntervalRecord>,
}
