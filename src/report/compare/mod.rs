//! What is written down about a comparison of variants: `compare.json`, its table, and what the numbers say.
//!
//! A number that was not measured is absent; one that is not finite is `null` in JSON and `NaN` when read back.

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer, Serialize};

use super::AccountRecord;

mod conclusions;
#[cfg(test)]
pub(crate) mod example;
mod ladder;
mod quality;
mod table;

pub(super) use conclusions::fastest;
pub use conclusions::{Verdict, conclusions, verdict};
pub use ladder::{IntervalRecord, LadderRow, ProjectionRecord, RateRecord, ResourcesRecord, SummaryRecord};
pub use quality::{AccuracyRecord, AccuracyRow, AgreementRecord, ClassValue, CosineRecord, FlipsRecord, MetricRecord};
pub use table::to_csv;

/// Schema of [`CompareRecord`].
pub const COMPARE_SCHEMA: &str = "slidestream/compare/1";

/// `compare.json`: variants of models over the same tiles, step by step from the original to everything together.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CompareRecord {
    /// [`COMPARE_SCHEMA`].
    pub schema: String,
    /// When, with what and where it was made.
    #[serde(flatten)]
    pub account: AccountRecord,
    /// What was found out.
    #[serde(flatten)]
    pub found: Findings,
    /// What the numbers say, in sentences: see [`conclusions()`].
    pub conclusions: Vec<String>,
}

/// What a comparison finds out: the parts of [`CompareRecord`] that tell nothing of the machine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Findings {
    /// The models; the first one's first variant is the original.
    pub models: Vec<ComparedModel>,
    /// Variants that are not compared, and why.
    pub left_out: Vec<LeftOutRecord>,
    /// What they ran over.
    pub input: ComparedInput,
    /// How the times were taken.
    pub measuring: MeasuringRecord,
    /// The steps; the first is the original.
    pub ladder: Vec<LadderRow>,
    /// Each variant's outputs against the original's.
    pub agreement: Vec<AgreementRecord>,
    /// Each variant against labels, if there are any.
    pub accuracy: Option<AccuracyRecord>,
    /// What a variant must keep to be recommended.
    pub gates: Vec<GateRecord>,
    /// Maps to look at: of the original, of a variant, their difference.
    pub pictures: Vec<PictureRecord>,
}

/// A variant that is not compared.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeftOutRecord {
    /// Its name.
    pub name: String,
    /// Why not.
    pub why: String,
    /// Whether it was to be compared, and failed: then no gate is passed. False for one that is made for elsewhere.
    #[serde(default)]
    pub is_failure: bool,
}

/// A model with the variants that were compared.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ComparedModel {
    /// The card's name.
    pub name: String,
    /// `classification`, `segmentation` or `features`.
    pub task: String,
    /// Class names in the order of the model's outputs; empty for features.
    pub classes: Vec<String>,
    /// Tile side in pixels.
    pub tile_size: u32,
    /// Its variants.
    pub variants: Vec<ComparedVariant>,
}

/// A variant, and where it ran.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ComparedVariant {
    /// Its name everywhere in the record, such as `fp16`; unique in it.
    pub name: String,
    /// Its file.
    pub file: String,
    /// Size of the file with its external data.
    pub bytes: u64,
    /// SHA-256 of the file.
    pub sha256: String,
    /// The execution provider.
    pub provider: String,
    /// Such as `cpu` or `cuda:0`.
    pub device: String,
    /// Options of the session and the provider, by name.
    pub options: BTreeMap<String, String>,
}

/// The tiles of a comparison.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ComparedInput {
    /// The slide's file, or what else the tiles were taken from.
    pub source: String,
    /// Tiles that were measured.
    pub tiles: u64,
    /// Tiles that a run over the whole slide would infer; absent if there is no slide.
    pub slide_tiles: Option<u64>,
}

/// How the times were taken.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MeasuringRecord {
    /// Rounds before the first that counts.
    pub warmup_rounds: u64,
    /// Rounds that count, of the step with the fewest.
    pub rounds: u64,
    /// Whether each round runs every step once, one after the other, so that what slows the machine slows all.
    pub is_interleaved: bool,
    /// Rounds end when the 95 % interval of every median is within this share of it.
    #[serde(deserialize_with = "number")]
    pub tolerance: f64,
    /// Seconds after which they end in any case.
    #[serde(deserialize_with = "number")]
    pub time_limit_secs: f64,
    /// Seconds that they took.
    #[serde(deserialize_with = "number")]
    pub seconds: f64,
    /// Whether they ended because the medians were known well enough.
    pub is_stable: bool,
    /// Why they ended, in a sentence.
    pub note: String,
    /// Share of the resamples inside an interval.
    #[serde(deserialize_with = "number")]
    pub confidence: f64,
    /// Resamples of an interval.
    pub resamples: u64,
    /// Seed of the resamples.
    pub seed: u64,
}

/// A limit on one figure of one variant.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GateRecord {
    /// The variant.
    pub variant: String,
    /// The figure, such as `mean cosine`.
    pub name: String,
    /// Whether the limit is the least or the most.
    pub bound: Bound,
    /// The limit.
    #[serde(deserialize_with = "number")]
    pub limit: f64,
    /// The figure; absent if there is none, which fails.
    pub value: Option<f64>,
    /// Whether the limit is kept.
    pub passed: bool,
    /// Why, in a sentence.
    pub reason: String,
}

/// Which side of a limit is good.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Bound {
    /// The limit or more.
    AtLeast,
    /// The limit or less.
    AtMost,
}

/// A picture on the page.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PictureRecord {
    /// What it shows, in a few words.
    pub title: String,
    /// What its colours mean.
    pub caption: String,
    /// The PNG file's bytes, base64 (RFC 4648 §4).
    pub png_base64: String,
}

impl CompareRecord {
    /// The name of the original: the first variant of the first model.
    #[must_use]
    pub fn original(&self) -> Option<&str> {
        self.found.models.first()?.variants.first().map(|variant| variant.name.as_str())
    }

    /// What was found out about a variant's outputs.
    #[must_use]
    pub fn agreement_of(&self, variant: &str) -> Option<&AgreementRecord> {
        self.found.agreement.iter().find(|agreement| agreement.variant == variant)
    }
}

impl PictureRecord {
    /// A picture out of a PNG file's bytes.
    #[must_use]
    pub fn new(title: &str, caption: &str, png: &[u8]) -> Self {
        Self { title: title.to_owned(), caption: caption.to_owned(), png_base64: base64(png) }
    }
}

/// RFC 4648 §4, with padding.
pub(super) fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for group in bytes.chunks(3) {
        let at = |index: usize| u32::from(group.get(index).copied().unwrap_or(0));
        let bits = at(0) << 16 | at(1) << 8 | at(2);
        // n bytes fill n + 1 characters.
        for character in 0..4 {
            let index = (bits >> (18 - 6 * character)) & 63;
            text.push(if character <= group.len() { char::from(ALPHABET[index as usize]) } else { '=' });
        }
    }
    text
}

fn number<'de, D: Deserializer<'de>>(from: D) -> Result<f64, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or(f64::NAN))
}

fn numbers<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<f64>, D::Error> {
    let numbers: Vec<Option<f64>> = Vec::deserialize(from)?;
    Ok(numbers.into_iter().map(|number| number.unwrap_or(f64::NAN)).collect())
}

#[cfg(test)]
mod tests {
    use super::example::example;
    use super::*;
    use crate::measure::Samples;
    use crate::report::{compare_html, to_json};

    #[test]
    fn a_comparison_comes_back_from_its_json() {
        let record = example();
        let read: CompareRecord = serde_json::from_slice(&to_json(&record)).unwrap();
        // Numbers may differ in their last bit, which the page does not show.
        assert_eq!(compare_html(&read), compare_html(&record));
        assert_eq!(
            (read.found.models, read.conclusions, read.found.pictures),
            (record.found.models, record.conclusions, record.found.pictures)
        );
    }

    #[test]
    fn what_is_not_finite_passes_through_json() {
        let mut record = example();
        let rate = record.found.ladder[1].end_to_end.as_mut().unwrap();
        (rate.tiles_per_sec, rate.samples_ms[3], rate.ms_per_tile.p99) = (f64::NAN, f64::INFINITY, f64::NAN);
        rate.speedup = Some(IntervalRecord { value: f64::NAN, low: f64::NEG_INFINITY, high: f64::INFINITY });
        record.found.agreement[0].cosine = Some(CosineRecord { mean: f64::NAN, p1: f64::NAN, min: f64::NAN });
        record.found.agreement[0].max_abs_difference = Some(f64::INFINITY);
        (record.found.gates[0].limit, record.found.gates[0].value) = (f64::NAN, Some(f64::NAN));
        record.found.measuring.tolerance = f64::NAN;
        let read: CompareRecord = serde_json::from_slice(&to_json(&record)).unwrap();
        assert!(read.found.ladder[1].end_to_end.as_ref().unwrap().samples_ms[3].is_nan());
        assert_eq!(read.found.agreement[0].max_abs_difference, None);
        assert!(read.found.ladder[1].end_to_end.as_ref().unwrap().speedup.unwrap().low.is_nan());
        assert_eq!(compare_html(&read), compare_html(&record));
    }

    #[test]
    fn base64_matches_the_standards_examples() {
        let texts = ["", "f", "fo", "foo", "foob", "fooba", "foobar"].map(|text| base64(text.as_bytes()));
        assert_eq!(texts, ["", "Zg==", "Zm8=", "Zm9v", "Zm9vYg==", "Zm9vYmE=", "Zm9vYmFy"]);
        assert_eq!(base64(&[0xfb, 0xff]), "+/8=");
    }

    #[test]
    fn a_rate_comes_from_its_rounds() {
        let seconds = Samples::new(vec![0.010, 0.020, 0.030]).unwrap();
        let rate = RateRecord::new(&seconds, None);
        assert_eq!((rate.tiles_per_sec, rate.ms_per_tile.median, rate.ms_per_tile.count), (50.0, 20.0, 3));
        assert_eq!(rate.samples_ms, [10.0, 20.0, 30.0]);
        let projected = rate.projected(Some(100));
        let seconds: Vec<_> = projected.iter().map(|projected| (projected.tiles, projected.seconds)).collect();
        assert_eq!(seconds, [(1_000, 20.0), (57_000, 1140.0), (100, 2.0)]);
        assert_eq!(rate.projected(None).len(), 2);
    }
}
