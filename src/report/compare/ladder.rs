//! The steps of a comparison with their times, as they are written down.

use serde::{Deserialize, Serialize};

use crate::measure::{Interval, Samples, Summary};

/// One step of the ladder: the original with this much added.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LadderRow {
    /// Such as `original` or `+ batching`.
    pub name: String,
    /// The variant that ran: a [`ComparedVariant::name`](super::ComparedVariant::name).
    pub variant: String,
    /// Tiles per batch.
    pub batch: usize,
    /// The session alone, on tiles that lie in memory.
    pub model_only: Option<RateRecord>,
    /// From the slide's file to the stitched result.
    pub end_to_end: Option<RateRecord>,
    /// The stage that bounds the rate end to end, and how that is known.
    pub bottleneck: Option<String>,
    /// Largest resident memory of the process.
    pub peak_host_bytes: Option<u64>,
    /// Largest memory on the device.
    pub peak_device_bytes: Option<u64>,
    /// Share of the time in which the device was at work, 0–1.
    pub device_utilisation: Option<f64>,
    /// What the rate means for whole slides.
    pub projected: Vec<ProjectionRecord>,
    /// Why a figure is absent, or what to know about it.
    pub note: Option<String>,
}

/// What a step takes in a process of its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ResourcesRecord {
    /// Largest resident memory of the process.
    pub peak_host_bytes: Option<u64>,
    /// Largest memory on the device, less what others held before.
    pub peak_device_bytes: Option<u64>,
    /// Share of the time in which the device was at work, 0–1; of a CPU over all its cores.
    pub device_utilisation: Option<f64>,
}

/// A rate with the samples it stands on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RateRecord {
    /// Milliseconds per tile over the rounds.
    pub ms_per_tile: SummaryRecord,
    /// Milliseconds per tile of each round, in order.
    #[serde(deserialize_with = "super::numbers")]
    pub samples_ms: Vec<f64>,
    /// From the median.
    #[serde(deserialize_with = "super::number")]
    pub tiles_per_sec: f64,
    /// How many times faster than the original; absent if the original has no such rate.
    pub speedup: Option<IntervalRecord>,
    /// What is odd about the samples, in sentences.
    pub notes: Vec<String>,
}

/// A summary of samples, in their unit.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct SummaryRecord {
    /// Rounds.
    pub count: usize,
    /// Arithmetic mean.
    #[serde(deserialize_with = "super::number")]
    pub mean: f64,
    /// Median.
    #[serde(deserialize_with = "super::number")]
    pub median: f64,
    /// Sample standard deviation; absent for one round.
    pub std: Option<f64>,
    /// Median absolute deviation.
    #[serde(deserialize_with = "super::number")]
    pub mad: f64,
    /// Smallest.
    #[serde(deserialize_with = "super::number")]
    pub min: f64,
    /// Largest.
    #[serde(deserialize_with = "super::number")]
    pub max: f64,
    /// 50th percentile, linear between ranks (Hyndman & Fan's definition 7), as the others.
    #[serde(deserialize_with = "super::number")]
    pub p50: f64,
    /// 90th percentile.
    #[serde(deserialize_with = "super::number")]
    pub p90: f64,
    /// 99th percentile.
    #[serde(deserialize_with = "super::number")]
    pub p99: f64,
}

/// A figure and the interval around it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct IntervalRecord {
    /// The figure.
    #[serde(deserialize_with = "super::number")]
    pub value: f64,
    /// Lower end.
    #[serde(deserialize_with = "super::number")]
    pub low: f64,
    /// Upper end.
    #[serde(deserialize_with = "super::number")]
    pub high: f64,
}

/// What a rate means for a slide of some size.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ProjectionRecord {
    /// Such as `1,000 tiles` or `this slide`.
    pub name: String,
    /// Tiles.
    pub tiles: u64,
    /// Seconds at the measured rate.
    #[serde(deserialize_with = "super::number")]
    pub seconds: f64,
}

impl LadderRow {
    /// The rate that counts: end to end if that was measured, else of the model alone.
    #[must_use]
    pub fn rate(&self) -> Option<&RateRecord> {
        self.end_to_end.as_ref().or(self.model_only.as_ref())
    }
}

impl RateRecord {
    /// The rate of rounds, from the seconds per tile of each.
    #[must_use]
    pub fn new(seconds_per_tile: &Samples, speedup: Option<Interval>) -> Self {
        let in_ms: Vec<f64> = seconds_per_tile.seconds().iter().map(|seconds| seconds * 1e3).collect();
        Self {
            ms_per_tile: SummaryRecord::in_ms(&seconds_per_tile.summary()),
            samples_ms: in_ms,
            tiles_per_sec: 1.0 / seconds_per_tile.median(),
            speedup: speedup.map(IntervalRecord::from),
            notes: seconds_per_tile.notes(),
        }
    }

    /// Seconds for 1,000 and for 57,000 tiles, and for the slide's own.
    #[must_use]
    pub fn projected(&self, slide_tiles: Option<u64>) -> Vec<ProjectionRecord> {
        let sizes = [("1,000 tiles", Some(1_000)), ("57,000 tiles", Some(57_000)), ("this slide", slide_tiles)];
        let project = |(name, tiles): (&str, Option<u64>)| {
            let tiles = tiles?;
            Some(ProjectionRecord { name: name.to_owned(), tiles, seconds: tiles as f64 / self.tiles_per_sec })
        };
        sizes.into_iter().filter_map(project).collect()
    }
}

impl SummaryRecord {
    /// A summary of seconds, in milliseconds.
    #[must_use]
    pub fn in_ms(seconds: &Summary) -> Self {
        Self {
            count: seconds.count,
            mean: seconds.mean * 1e3,
            median: seconds.median * 1e3,
            std: seconds.std.map(|std| std * 1e3),
            mad: seconds.mad * 1e3,
            min: seconds.min * 1e3,
            max: seconds.max * 1e3,
            p50: seconds.p50 * 1e3,
            p90: seconds.p90 * 1e3,
            p99: seconds.p99 * 1e3,
        }
    }
}

impl IntervalRecord {
    /// Whether the figure and both ends are numbers.
    #[must_use]
    pub fn is_finite(&self) -> bool {
        self.value.is_finite() && self.low.is_finite() && self.high.is_finite()
    }
}

impl From<Interval> for IntervalRecord {
    fn from(interval: Interval) -> Self {
        Self { value: interval.value, low: interval.low, high: interval.high }
    }
}
