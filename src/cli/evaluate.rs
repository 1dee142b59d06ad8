//! `slidestream evaluate`: a model against labelled images.

use std::fmt::Write as _;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use slidestream::engine::cohort;
use slidestream::experiment::evaluate::{self, EvaluateRequest, FILES, Fit};
use slidestream::native;
use slidestream::output::write_atomic;
use slidestream::report::{
    EVALUATE_SCHEMA, EvaluateRecord, FigureRecord, SampleRecord, evaluate_html, predictions_csv, start_in_words,
    to_json,
};

use super::options::{PredictorArgs, batch_size};
use super::{Failure, Outcome, columns, prepare, say, show, table};

/// What labels and masks say.
const LABELS: &str = "\
Labels and folders have the names of classes; the values of a mask are indices of classes, or 255
for what has no label. Of a model with one class, 1 is that class too, and one other name, whatever
it is, such as normal or 0, stands for what is not it, and is told; a mask has 1 or 255 where the
class is, and 0 elsewhere. No image may be labelled twice.";

/// Writes evaluate.json, evaluate.html and predictions.csv; exit code 3 if images can't be read
#[derive(clap::Args, Debug)]
#[command(after_help = LABELS)]
pub(super) struct Args {
    /// A folder with a folder of images per class, or a CSV with the columns path,label or path,mask and perhaps group
    #[arg(value_name = "DIR|CSV")]
    labels: PathBuf,
    #[command(flatten)]
    predictor: PredictorArgs,
    /// Tiles per batch [default: by the device]
    #[arg(long, value_name = "N", value_parser = batch_size)]
    batch_size: Option<NonZeroUsize>,
    /// How an image of another size becomes a tile: exact (it is an error) or resize (shorter side, then the middle)
    #[arg(long, value_name = "HOW", default_value = "exact")]
    fit: Fit,
    /// Where the files go [default: MODEL-evaluate beside the model]
    #[arg(long, short, value_name = "DIR")]
    out: Option<PathBuf>,
    /// The record as JSON on stdout, instead of the summary
    #[arg(long)]
    json: bool,
    /// Say nothing but errors and results
    #[arg(long)]
    quiet: bool,
}

pub(super) fn execute(args: &Args) -> Result<Outcome, Failure> {
    let started = cohort::now();
    native::onnx_runtime()?;
    let request = EvaluateRequest {
        card: args.predictor.card()?,
        labels: args.labels.clone(),
        options: args.predictor.options(args.batch_size),
        fit: args.fit,
        out: args.out.clone().unwrap_or_else(|| prepare::beside(&args.predictor.model, "evaluate")),
    };
    let mut talk = |line: &str| {
        if !args.quiet {
            say(line);
        }
    };
    let evaluation = evaluate::evaluate(&request, &mut talk)?;
    let record = EvaluateRecord {
        schema: EVALUATE_SCHEMA.to_owned(),
        account: prepare::account(started),
        found: evaluation.found,
    };
    let written = write(&record, &evaluation.samples, &request.out);
    if args.json {
        show(&String::from_utf8_lossy(&to_json(&record)));
    } else {
        show(&summary(&record, written.as_ref().map_or(&[], Vec::as_slice)));
    }
    for failed in &record.found.failed {
        say(&format!("not read: {}: {}", failed.path, failed.reason));
        failed.hint.iter().for_each(|hint| say(&format!("help: {hint}")));
    }
    // Only now: what was found is not lost with a disk that is full.
    written?;
    Ok(if record.found.failed.is_empty() { Outcome::Done } else { Outcome::Partly })
}

/// Writes the files, which are returned.
fn write(record: &EvaluateRecord, samples: &[SampleRecord], out: &Path) -> Result<Vec<PathBuf>, Failure> {
    let [page, json, table] = FILES.map(|name| out.join(name));
    let predictions = predictions_csv(&record.found.model, samples);
    let predictions = predictions.map_err(|error| Failure { message: error.to_string(), hint: None, code: 1 })?;
    write_atomic(&table, &predictions)?;
    write_atomic(&page, evaluate_html(record).as_bytes())?;
    write_atomic(&json, &to_json(record))?;
    Ok(vec![page, json, table])
}

fn summary(record: &EvaluateRecord, written: &[PathBuf]) -> String {
    let found = &record.found;
    let is_map = found.is_map();
    let figures = found.figures.named(is_map).into_iter().map(|(name, figure)| {
        let (low, high) = interval(&figure);
        vec![name.to_owned(), format!("{:.4}", figure.value), low, high]
    });
    let mut text = table(&["figure", "value", "95 % from", "to"], &figures.collect::<Vec<_>>());
    text.push('\n');
    let (items, f1) = if is_map { ("pixels", "Dice") } else { ("images", "F1") };
    let classes = found.classes.iter().map(|class| {
        let last = if is_map { class.iou } else { class.auc };
        let figures = [class.precision, class.recall, class.f1, last].map(number);
        [vec![class.class.clone(), class.support.to_string()], figures.to_vec()].concat()
    });
    let heads = ["class", items, "precision", "recall", f1, if is_map { "IoU" } else { "AUC" }];
    text.push_str(&table(&heads, &classes.collect::<Vec<_>>()));
    text.push('\n');
    let mut facts = Vec::new();
    if let Some(pace) = &found.pace {
        let ms = &pace.ms_per_tile;
        let whole = found.images as f64 / found.seconds;
        let line = format!(
            "{:.1} tiles/s, {:.2} ms p50, {:.2} ms p99 a tile in batches of {}; {whole:.1} images/s with reading",
            pace.tiles_per_sec, ms.p50, ms.p99, pace.batch_size
        );
        facts.push(("model alone", line));
    }
    facts.push(("start", start_in_words(&found.ran_on)));
    if !found.utilisation_by_device.is_empty() {
        let of = found.utilisation_by_device.iter().map(|(device, busy)| format!("{device} {:.0} %", 100.0 * busy));
        facts.push(("at work", of.collect::<Vec<_>>().join(", ")));
    }
    let drawn = &found.drawn;
    if drawn.resamples > 0 {
        facts.push(("intervals", format!("{} draws of {} {}", drawn.resamples, drawn.units, drawn.unit)));
    }
    facts.push(("images", format!("{} predicted, {} not read", found.images, found.failed.len())));
    text.push_str(&columns(facts));
    for note in &found.notes {
        writeln!(text, "{note}").ok();
    }
    for file in written {
        writeln!(text, "{}", file.display()).ok();
    }
    text
}

fn number(figure: Option<FigureRecord>) -> String {
    figure.map_or_else(|| "–".to_owned(), |figure| format!("{:.3}", figure.value))
}

fn interval(figure: &FigureRecord) -> (String, String) {
    let end = |end: Option<f64>| end.map_or_else(|| "–".to_owned(), |end| format!("{end:.4}"));
    (end(figure.low), end(figure.high))
}
