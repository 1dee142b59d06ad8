//! What is written down about a model held against labels: `evaluate.json` and the table of its predictions.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::compare::base64;
use super::{AccountRecord, FailedImage, ModelRecord, PaceRecord, RanOnRecord};

/// Schema of [`EvaluateRecord`].
pub const EVALUATE_SCHEMA: &str = "slidestream/evaluate/1";

/// `evaluate.json`: a model against labels.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EvaluateRecord {
    /// [`EVALUATE_SCHEMA`].
    pub schema: String,
    /// When, with what and where it was made.
    #[serde(flatten)]
    pub account: AccountRecord,
    /// What was found out.
    #[serde(flatten)]
    pub found: EvaluatedRecord,
}

/// The parts of [`EvaluateRecord`] that tell nothing of the machine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EvaluatedRecord {
    /// The model.
    pub model: ModelRecord,
    /// Where it ran.
    pub ran_on: RanOnRecord,
    /// Where the labels come from.
    pub labels: String,
    /// How images of another size became tiles: `exact` for not at all, or `resize`.
    pub fit: String,
    /// Labelled images that were predicted.
    pub images: u64,
    /// Labelled items that figures count: images, or pixels of a segmentation.
    pub items: u64,
    /// Items for which the model gave no number; they count as wrong.
    pub not_a_number: u64,
    /// Images or masks that could not be read.
    pub failed: Vec<FailedImage>,
    /// Files in class folders that are no images, by extension in lower case; left out.
    #[serde(default)]
    pub skipped: BTreeMap<String, u64>,
    /// Over all classes.
    pub figures: Figures,
    /// Each class, in the model's order; of a model with one class what is not it follows.
    pub classes: Vec<ClassFigures>,
    /// `[label, predicted]`, with a last column for what was no number.
    pub confusion: Vec<Vec<u64>>,
    /// Confidence against accuracy in bins of equal width; empty where scores are no probabilities, and for a segmentation.
    pub calibration: Vec<BinRecord>,
    /// How the intervals were drawn.
    pub drawn: DrawnRecord,
    /// The worst errors, the worst first.
    pub worst: Vec<WorstRecord>,
    /// The model alone.
    pub pace: Option<PaceRecord>,
    /// Share of the time in which each GPU was at work, 0–1, over the later half; empty for a CPU.
    pub utilisation_by_device: BTreeMap<String, f64>,
    /// Seconds for reading and predicting all images.
    pub seconds: f64,
    /// What is absent, and why.
    pub notes: Vec<String>,
}

impl EvaluatedRecord {
    /// Whether items are pixels.
    #[must_use]
    pub fn is_map(&self) -> bool {
        self.model.task == "segmentation"
    }
}

/// Figures over all classes, 0–1 but for kappa; absent where the task does not have them.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Figures {
    /// Share of the items whose most probable class is right; of a segmentation, of the pixels.
    pub top1: Option<FigureRecord>,
    /// Share whose class is among the five most probable.
    pub top5: Option<FigureRecord>,
    /// Mean recall of the classes that occur.
    pub balanced_accuracy: Option<FigureRecord>,
    /// Area under the ROC curve, mean of each class that occurs against the rest.
    pub auc: Option<FigureRecord>,
    /// Cohen's kappa, −1 to 1.
    pub kappa: Option<FigureRecord>,
    /// Expected calibration error over 15 bins of equal width.
    pub ece: Option<FigureRecord>,
    /// Mean F1 of the classes that are labelled or predicted.
    pub macro_f1: Option<FigureRecord>,
    /// Mean Dice coefficient of the classes that are labelled or predicted but the background, of pixels.
    pub mean_dice: Option<FigureRecord>,
    /// Mean intersection over union of the same classes.
    pub mean_iou: Option<FigureRecord>,
}

impl Figures {
    /// Those that there are, with their names, the most telling first.
    #[must_use]
    pub fn named(&self, are_of_maps: bool) -> Vec<(&'static str, FigureRecord)> {
        let (accuracy, f1) = if are_of_maps { ("pixel accuracy", None) } else { ("top-1", self.macro_f1) };
        [
            ("mean Dice", self.mean_dice),
            ("mean IoU", self.mean_iou),
            (accuracy, self.top1),
            ("top-5", self.top5),
            ("balanced accuracy", self.balanced_accuracy),
            ("AUC", self.auc),
            ("Cohen's kappa", self.kappa),
            ("macro F1", f1),
            ("ECE", self.ece),
        ]
        .into_iter()
        .filter_map(|(name, figure)| Some((name, figure?)))
        .collect()
    }
}

/// A figure, and its interval where there are enough groups to draw from.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct FigureRecord {
    /// The figure.
    pub value: f64,
    /// Lower end of its interval.
    pub low: Option<f64>,
    /// Upper end of its interval.
    pub high: Option<f64>,
}

/// Figures of one class.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ClassFigures {
    /// Its name.
    pub class: String,
    /// Its colour, red, green and blue.
    pub color: [u8; 3],
    /// Items that have it.
    pub support: u64,
    /// Items that were predicted to have it.
    pub predicted: u64,
    /// Share of its predictions that are right; absent if it was never predicted.
    pub precision: Option<FigureRecord>,
    /// Share of its items that were found; absent if none has it.
    pub recall: Option<FigureRecord>,
    /// Harmonic mean of both, which is the Dice coefficient.
    pub f1: Option<FigureRecord>,
    /// Intersection over union.
    pub iou: Option<FigureRecord>,
    /// Area under the ROC curve against the rest; absent for a segmentation.
    pub auc: Option<FigureRecord>,
}

/// Predictions of about one confidence.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct BinRecord {
    /// Confidences are above this.
    pub above: f64,
    /// And at most this.
    pub up_to: f64,
    /// Predictions.
    pub items: u64,
    /// Their mean confidence; absent for none.
    pub confidence: Option<f64>,
    /// Share of them that is right; absent for none.
    pub accuracy: Option<f64>,
}

/// How intervals were drawn.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DrawnRecord {
    /// What was drawn anew: `images` or `groups`.
    pub unit: String,
    /// How many there are.
    pub units: u64,
    /// How often they were drawn.
    pub resamples: u64,
    /// Share of the resamples inside the interval.
    pub confidence: f64,
    /// Seed of the generator.
    pub seed: u64,
}

/// One of the worst errors.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WorstRecord {
    /// The image.
    pub path: String,
    /// Its class; absent for a segmentation.
    pub label: Option<String>,
    /// What the model takes it for; absent for a segmentation.
    pub predicted: Option<String>,
    /// Probability of what the model takes it for; of a segmentation the mean Dice of the image.
    pub value: f64,
    /// The image in small; of a segmentation image, mask and prediction side by side. A PNG file's bytes, base64.
    pub png_base64: String,
}

impl WorstRecord {
    /// An error with its picture, out of a PNG file's bytes.
    #[must_use]
    pub fn new(path: String, (label, predicted): (Option<String>, Option<String>), value: f64, png: &[u8]) -> Self {
        Self { path, label, predicted, value, png_base64: base64(png) }
    }
}

/// What a model says of one labelled image.
#[derive(Clone, Debug, PartialEq)]
pub struct SampleRecord {
    /// The image.
    pub path: String,
    /// Its group; empty for images that are their own.
    pub group: String,
    /// Its class, or its mask.
    pub label: String,
    /// The most probable class; `None` for a segmentation, or if the model gave no number.
    pub predicted: Option<String>,
    /// For each class its probability, or of a segmentation its Dice coefficient, if the class occurs.
    pub values: Vec<Option<f64>>,
}

/// The samples as CSV: path, group, label (or mask), predicted, and for each class `prob_<class>` (or `dice_<class>`);
/// what is absent is empty.
///
/// # Errors
/// The writer's own.
pub fn predictions_csv(model: &ModelRecord, samples: &[SampleRecord]) -> Result<Vec<u8>, csv::Error> {
    let is_map = model.task == "segmentation";
    let (truth, prefix) = if is_map { ("mask", "dice") } else { ("label", "prob") };
    let mut table = csv::Writer::from_writer(Vec::new());
    let heads = ["path", "group", truth].into_iter().chain((!is_map).then_some("predicted")).map(str::to_owned);
    table.write_record(heads.chain(model.classes.iter().map(|class| format!("{prefix}_{class}"))))?;
    for sample in samples {
        let mut row = vec![sample.path.clone(), sample.group.clone(), sample.label.clone()];
        row.extend((!is_map).then(|| sample.predicted.clone().unwrap_or_default()));
        row.extend(sample.values.iter().map(|value| value.map_or_else(String::new, |value| value.to_string())));
        table.write_record(&row)?;
    }
    table.into_inner().map_err(|error| error.into_error().into())
}
