//! `slidestream predict`: images that are no slides.

use std::fmt::Write as _;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use slidestream::engine::cohort;
use slidestream::experiment::predict::{self, FILE, PredictRequest, Predictions};
use slidestream::native;
use slidestream::output::write_atomic;
use slidestream::report::{
    FolderRecord, ImageClass, ImageRecord, PREDICT_SCHEMA, PaceRecord, PredictRecord, PredictedRecord, to_json,
};

use super::options::{PredictorArgs, batch_size};
use super::{Failure, Outcome, prepare, say, show, table};

/// More classes have no columns in the table.
const MOST_COLUMNS: usize = 6;

/// The class of each image by the mean over its tiles; of a segmentation its mask and overlay
#[derive(clap::Args, Debug)]
pub(super) struct Args {
    /// Images (png, jpg, bmp, tif, webp), each once, and folders whose own images are taken; at the model's resolution
    #[arg(required = true, value_name = "IMAGE|DIR")]
    paths: Vec<PathBuf>,
    #[command(flatten)]
    predictor: PredictorArgs,
    /// Tiles per batch; with 1 the latency of a single tile is told
    #[arg(long, value_name = "N", value_parser = batch_size, default_value = "16")]
    batch_size: NonZeroUsize,
    /// Most tiles of an image, evenly sampled; 0 takes all (a segmentation always does)
    #[arg(long, value_name = "N", default_value = "25")]
    max_tiles: usize,
    /// Where predict.json goes, and the masks and overlays of a segmentation, which needs it
    #[arg(long, short, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Everything as JSON on stdout, every tile included, instead of the table
    #[arg(long)]
    json: bool,
    /// Say nothing but errors and results
    #[arg(long)]
    quiet: bool,
}

pub(super) fn execute(args: &Args) -> Result<Outcome, Failure> {
    let started = cohort::now();
    native::onnx_runtime()?;
    let request = PredictRequest {
        paths: args.paths.clone(),
        card: args.predictor.card()?,
        options: args.predictor.options(Some(args.batch_size)),
        max_tiles: args.max_tiles,
        out: args.out.clone(),
    };
    let mut talk = |line: &str| {
        if !args.quiet {
            say(line);
        }
    };
    let Predictions { found, unwritten } = predict::predict(&request, &mut talk)?;
    let record = PredictRecord { schema: PREDICT_SCHEMA.to_owned(), account: prepare::account(started), found };
    let written = args.out.as_ref().map_or(Ok(()), |out| write_atomic(&out.join(FILE), &to_json(&record)).map(drop));
    if args.json {
        show(&String::from_utf8_lossy(&to_json(&record)));
    } else {
        show(&summary(&record.found));
    }
    for failed in &record.found.failed {
        say(&format!("not predicted: {}: {}", failed.path, failed.reason));
        failed.hint.iter().for_each(|hint| say(&format!("help: {hint}")));
    }
    // Only now: what was found is not lost with a disk that is full.
    if let Some(error) = unwritten {
        return Err(error.into());
    }
    written?;
    let failed = record.found.failed.len();
    Ok(Outcome::of(failed, failed + record.found.images.len()))
}

fn summary(found: &PredictedRecord) -> String {
    let is_map = found.model.task == "segmentation";
    let classes: &[String] = if found.model.classes.len() > MOST_COLUMNS { &[] } else { &found.model.classes };
    let mut heads = if is_map { vec!["image", "pixels"] } else { vec!["image", "label", "confidence", "tiles"] };
    heads.extend(classes.iter().map(String::as_str));
    let mut rows: Vec<Vec<String>> = Vec::new();
    if !found.images.is_empty() {
        let shows_paths = found.folders.len() > 1;
        rows.extend(found.images.iter().map(|image| image_row(image, shows_paths, is_map, classes.len())));
        rows.extend(found.folders.iter().map(|folder| folder_row(folder, is_map, classes.len())));
    }
    let mut text = if rows.is_empty() { String::new() } else { table(&heads, &rows) };
    for note in left_over(&found.images).iter().chain(&found.notes) {
        writeln!(text, "\n{note}").ok();
    }
    if let Some(pace) = &found.pace {
        writeln!(text, "\n{}", paced(pace, &found.ran_on.device)).ok();
    }
    for file in found.images.iter().flat_map(|image| &image.files) {
        writeln!(text, "{file}").ok();
    }
    text
}

fn image_row(image: &ImageRecord, shows_path: bool, is_map: bool, shown: usize) -> Vec<String> {
    let name = Path::new(&image.path).file_name().unwrap_or_default().to_string_lossy().into_owned();
    let mut row = vec![if shows_path { image.path.clone() } else { name }];
    if is_map {
        row.push(image.pixels().to_string());
    } else {
        row.extend(label(image.label.as_deref(), image.confidence, &image.classes));
        row.push(format!("{} of {}", image.tiles.len(), image.grid_tiles));
    }
    row.extend(shares(&image.classes[..shown], image.pixels(), is_map));
    row
}

fn folder_row(folder: &FolderRecord, is_map: bool, shown: usize) -> Vec<String> {
    let images = counted(folder.images, "image");
    let mut row = vec![format!("{}:", folder.path)];
    if is_map {
        row.push(images);
    } else {
        row.extend(label(folder.label.as_deref(), folder.confidence, &folder.classes));
        row.push(images);
    }
    match folder.classes.get(..shown) {
        Some(classes) => row.extend(shares(classes, folder.pixels, is_map)),
        None => row.resize(row.len() + shown, "–".to_owned()),
    }
    row
}

/// The class and its probability; where a model's only class has less than one half, that it is not this class.
fn label(label: Option<&str>, confidence: Option<f64>, classes: &[ImageClass]) -> [String; 2] {
    match (label, confidence, classes) {
        (Some(label), Some(confidence), _) => [label.to_owned(), format!("{confidence:.3}")],
        (None, _, [only]) => [format!("not {}", only.class), format!("{:.3}", 1.0 - only.probability)],
        _ => ["–".to_owned(), "–".to_owned()],
    }
}

/// Of a classifier the mean probability and how many tiles or images have the class, of a map its share of all pixels,
/// those of no class included.
fn shares(classes: &[ImageClass], pixels: u64, is_map: bool) -> impl Iterator<Item = String> {
    classes.iter().map(move |class| {
        if is_map {
            format!("{:.1} %", 100.0 * class.count as f64 / pixels.max(1) as f64)
        } else {
            format!("{:.3} ({})", class.probability, class.count)
        }
    })
}

/// That tiles don't reach the edges of some images.
fn left_over(images: &[ImageRecord]) -> Option<String> {
    let partly = images.iter().filter(|image| image.covered < 1.0).count();
    let least = images.iter().map(|image| image.covered).fold(1.0, f64::min);
    (partly > 0).then(|| {
        format!(
            "Of {partly} of {} the edge at the right or the bottom is not seen; whole tiles cover at least {:.1} %.",
            counted(images.len() as u64, "image"),
            100.0 * least
        )
    })
}

fn paced(pace: &PaceRecord, device: &str) -> String {
    let ms = &pace.ms_per_tile;
    let (count, p50, p90, p99) = (ms.count, ms.p50, ms.p90, ms.p99);
    match pace.batch_size {
        1 => format!(
            "latency of a tile on {device}, warm: p50 {p50:.2} ms, p90 {p90:.2} ms, p99 {p99:.2} ms ({count} tiles)"
        ),
        batch => format!(
            "{:.1} tiles/s on {device}, warm, in batches of {batch}; {p50:.2} ms a tile p50, {p99:.2} ms p99 ({})",
            pace.tiles_per_sec,
            if count == 1 { "1 batch".to_owned() } else { format!("{count} batches") }
        ),
    }
}

fn counted(count: u64, what: &str) -> String {
    if count == 1 { format!("1 {what}") } else { format!("{count} {what}s") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_one_class_it_is_said_what_is_not_it() {
        let class = |name: &str, probability| ImageClass { class: name.to_owned(), count: 0, probability };
        let only = [class("tumour", 0.25)];
        assert_eq!(label(None, None, &only), ["not tumour", "0.750"]);
        assert_eq!(label(Some("tumour"), Some(0.9), &only), ["tumour", "0.900"]);
        // A folder in which no image could be read.
        assert_eq!(label(None, None, &[]), ["–", "–"]);
    }

    #[test]
    fn shares_of_a_map_are_of_all_its_pixels() {
        let class = |count| ImageClass { class: "a".to_owned(), count, probability: 0.3 };
        let of = |is_map| shares(&[class(25), class(0)], 200, is_map).collect::<Vec<_>>();
        // The rest is of no class.
        assert_eq!(of(true), ["12.5 %", "0.0 %"]);
        assert_eq!(of(false), ["0.300 (25)", "0.300 (0)"]);
    }
}
