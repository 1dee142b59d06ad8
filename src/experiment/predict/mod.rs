//! Predicts images that are no slides: a classifier tells each image's class by the mean over its tiles, a segmentation
//! gives each its mask.

mod maps;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use image::RgbImage;

use super::ExperimentError;
use super::images::{self, Listing, decided, failed_image};
use super::pace::{Paced, ran_on};
use super::results;
use crate::engine::{EngineError, model_record};
use crate::inference::{ModelCard, Predictor, PredictorOptions, Task};
use crate::report::{FolderRecord, ImageClass, ImageRecord, PredictedRecord, TileRecord};
use crate::slide;

/// What a slide's file is called where no library is there to look into it.
const SLIDES: [&str; 9] = ["svs", "ndpi", "mrxs", "scn", "vms", "vmu", "svslide", "bif", "dcm"];

/// Classes that a mask of bytes has room for beside what is no class.
const MOST_CLASSES: usize = 255;

/// The record's file.
pub const FILE: &str = "predict.json";

/// What is predicted, and how.
#[derive(Clone, Debug)]
pub struct PredictRequest {
    /// Images, and folders whose own images are taken.
    pub paths: Vec<PathBuf>,
    /// The model.
    pub card: ModelCard,
    /// Where and how it runs.
    pub options: PredictorOptions,
    /// Most tiles of an image that a classifier sees, evenly sampled; 0 for all. A map is of all pixels.
    pub max_tiles: usize,
    /// Where masks and overlays go, and [`FILE`]; tried before the work.
    pub out: Option<PathBuf>,
}

/// What was predicted.
#[derive(Debug)]
pub struct Predictions {
    /// Of every image, or of those before one whose mask or overlay could not be written.
    pub found: PredictedRecord,
    /// Why that one could not be written.
    pub unwritten: Option<ExperimentError>,
}

/// Predicts all images; `say` is told what is being done. One that can't be read is listed, and the others go on; one that
/// can't be written is the last.
///
/// # Errors
/// [`ExperimentError`] if the model can't be had, a path is a slide, there is no image, an image is named twice, or results
/// can't be written or would be written over an input.
pub fn predict(request: &PredictRequest, say: &mut dyn FnMut(&str)) -> Result<Predictions, ExperimentError> {
    let card = &request.card;
    let found = find(&request.paths)?;
    if card.task == Task::Features {
        let reason = "gives features, and no classes to predict".to_owned();
        return Err(images::unsuited(&card.path, reason, "choose a classification or a segmentation, or use run"));
    }
    let out = match (card.task, &request.out) {
        (Task::Segmentation, None) => {
            let reason = "is a segmentation, whose masks need a folder".to_owned();
            return Err(images::unsuited(&card.path, reason, "set out"));
        }
        (_, out) => out.as_deref(),
    };
    if card.task == Task::Segmentation {
        if card.classes.len() > MOST_CLASSES {
            let reason = format!("has {} classes, but a mask has room for {MOST_CLASSES}", card.classes.len());
            return Err(images::unsuited(&card.path, reason, "use slidestream run with csv"));
        }
        // The second time it would predict its own masks and overlays.
        let is_out = |folder: &&Path| out.is_some_and(|out| results::resolved(out) == results::resolved(folder));
        if let Some(folder) = found.iter().filter_map(|group| group.folder.as_deref()).find(is_out) {
            let reason = "is the folder of the images: masks and overlays would be images of it too".to_owned();
            return Err(images::unsuited(folder, reason, "choose another folder with out"));
        }
        no_name_twice(found.iter().flat_map(|group| &group.images))?;
    }
    if let Some(out) = out {
        let images = || found.iter().flat_map(|group| &group.images);
        let maps = images().filter(|_| card.task == Task::Segmentation).flat_map(|path| maps::files(path, out));
        let written: Vec<PathBuf> = maps.chain([out.join(FILE)]).collect();
        results::prepare(out, &written, images().cloned().chain(results::of_model(card)))?;
    }
    let mut session = Paced::new(Predictor::open(card.clone(), &request.options)?);
    let model = model_record(card, session.predictor.variant());
    let ran_on = ran_on(&session.predictor);
    let total: usize = found.iter().map(|group| group.images.len()).sum();
    say(&format!("predicting {total} images with {} on {}", card.name, ran_on.device));
    let (mut images, mut folders, mut failed) = (Vec::new(), Vec::new(), Vec::new());
    let mut unwritten = None;
    for group in &found {
        let before = (images.len(), failed.len());
        for path in &group.images {
            match one(path, request, &mut session, out) {
                Ok(record) => images.push(record),
                Err(error) if images::is_about_one_image(&error) => failed.push(failed_image(path, &error)),
                // A full disk would refuse the others too.
                Err(error) if is_about_output(&error) => {
                    unwritten = Some(error);
                    break;
                }
                Err(error) => return Err(error),
            }
        }
        if let Some(folder) = &group.folder {
            folders.push(together(folder, card, &images[before.0..], failed.len() - before.1));
        }
        if unwritten.is_some() {
            break;
        }
    }
    let max_tiles = if card.task == Task::Segmentation { 0 } else { request.max_tiles };
    let skipped = images::by_extension(&found.iter().flat_map(|group| group.others.clone()).collect::<Vec<_>>());
    let (pace, mut notes) = (session.record(), notes(card, &images));
    notes.extend(images::about_others(&skipped));
    if unwritten.is_some() {
        let left = total - images.len() - failed.len();
        notes.push(format!("Of {left} of {total} images there are no results: one could not be written."));
    }
    let tile_size = card.tile_size;
    let found = PredictedRecord { model, ran_on, tile_size, max_tiles, images, folders, failed, skipped, notes, pace };
    Ok(Predictions { found, unwritten })
}

fn is_about_output(error: &ExperimentError) -> bool {
    matches!(error, ExperimentError::Engine(error) if matches!(**error, EngineError::Output(_)))
}

fn notes(card: &ModelCard, images: &[ImageRecord]) -> Vec<String> {
    let is_padded = |image: &&ImageRecord| images::is_padded((image.width, image.height), card.tile_size);
    let padded: Vec<String> = images.iter().filter(is_padded).map(|image| image.path.clone()).collect();
    #[expect(clippy::cast_possible_truncation, reason = "to be held against 0 and 1")]
    let scores: Vec<f32> =
        images.iter().flat_map(|image| &image.classes).map(|class| class.probability as f32).collect();
    let note = "The model's scores are no probabilities: it has no activation. Set `activation` in its card.";
    let no_probabilities = (!images::are_probabilities(card, scores.iter())).then(|| note.to_owned());
    images::about_padded(&padded, card.tile_size).into_iter().chain(no_probabilities).collect()
}

/// Images that were named together.
struct Group {
    /// `None` for an image that was named itself.
    folder: Option<PathBuf>,
    images: Vec<PathBuf>,
    /// Files of the folder that are no images.
    others: Vec<PathBuf>,
}

fn find(paths: &[PathBuf]) -> Result<Vec<Group>, ExperimentError> {
    let mut groups = Vec::new();
    for path in paths {
        if path.is_dir() {
            let Listing { images, others } = images::in_folder(path)?;
            if images.is_empty() {
                let reason = format!("holds no {} image itself", images::extensions());
                return Err(images::unsuited(
                    path,
                    reason,
                    "name the folder that holds the images; others below are not searched",
                ));
            }
            groups.push(Group { folder: Some(path.clone()), images, others });
        } else {
            not_a_slide(path)?;
            groups.push(Group { folder: None, images: vec![path.clone()], others: Vec::new() });
        }
    }
    no_image_twice(groups.iter().flat_map(|group| &group.images))?;
    Ok(groups)
}

/// An image that counts twice would weigh twice in its folder.
fn no_image_twice<'a>(paths: impl Iterator<Item = &'a PathBuf>) -> Result<(), ExperimentError> {
    let mut seen = BTreeMap::new();
    for path in paths {
        if let Some(other) = seen.insert(results::resolved(path), path) {
            let reason = format!("is the same image as {}", other.display());
            return Err(images::unsuited(path, reason, "name each image once"));
        }
    }
    Ok(())
}

fn is_slide(path: &Path) -> bool {
    let extension = path.extension().map(|extension| extension.to_string_lossy().to_ascii_lowercase());
    extension.is_some_and(|extension| SLIDES.contains(&extension.as_str()))
        || (path.is_file() && slide::detect(path).is_some())
}

fn not_a_slide(path: &Path) -> Result<(), ExperimentError> {
    let reason = || "is a slide, not an image".to_owned();
    if is_slide(path) { Err(images::unsuited(path, reason(), "use slidestream run for slides")) } else { Ok(()) }
}

/// A mask is named after its image, so no two may share a name.
fn no_name_twice<'a>(paths: impl Iterator<Item = &'a PathBuf>) -> Result<(), ExperimentError> {
    let mut names = BTreeMap::new();
    for path in paths {
        if let Some(other) = names.insert(path.file_stem(), path) {
            let reason = format!("would have the same mask file as {}", other.display());
            return Err(images::unsuited(path, reason, "rename one, or predict them into different folders"));
        }
    }
    Ok(())
}

fn one(
    path: &Path,
    request: &PredictRequest,
    session: &mut Paced,
    out: Option<&Path>,
) -> Result<ImageRecord, ExperimentError> {
    not_a_slide(path)?;
    let image = images::pixels(path)?;
    match (request.card.task, out) {
        (Task::Segmentation, Some(out)) => maps::map(path, &image, &request.card, session, out),
        _ => classify(path, &image, request, session),
    }
}

fn classify(
    path: &Path,
    image: &RgbImage,
    request: &PredictRequest,
    session: &mut Paced,
) -> Result<ImageRecord, ExperimentError> {
    let (card, side) = (&request.card, request.card.tile_size);
    let corners = images::whole_tiles(image, side);
    if corners.is_empty() {
        return Err(images::too_small(path, image, side));
    }
    let chosen: Vec<(u32, u32)> = sampled(corners.len(), request.max_tiles).map(|index| corners[index]).collect();
    let mut scores = Vec::with_capacity(chosen.len());
    let batch = session.predictor.total_batch_size();
    for corners in chosen.chunks(batch) {
        let tiles: Vec<Vec<u8>> = corners.iter().map(|corner| images::cut(image, *corner, side)).collect();
        let tiles: Vec<&[u8]> = tiles.iter().map(Vec::as_slice).collect();
        scores.extend(images::classify(&tiles, session)?);
    }
    if let Some(bad) = scores.iter().position(|row| row.iter().any(|score| !score.is_finite())) {
        let (x, y) = chosen[bad];
        let reason = format!("the model gives no number for its tile at {x}, {y}");
        return Err(images::unsuited(path, reason, "try the fp32 variant"));
    }
    let names = |class: Option<usize>| class.map(|class| card.classes[class].name.clone());
    let means: Vec<f32> = means(&scores);
    let label = decided(&means);
    let classes = card.classes.iter().enumerate().map(|(index, class)| ImageClass {
        class: class.name.clone(),
        count: scores.iter().filter(|row| decided(row) == Some(index)).count() as u64,
        probability: f64::from(means[index]),
    });
    let tiles = chosen.iter().zip(&scores).map(|((x, y), row)| TileRecord {
        x: *x,
        y: *y,
        label: names(decided(row)),
        probabilities: row.iter().map(|score| f64::from(*score)).collect(),
    });
    let (width, height) = image.dimensions();
    Ok(ImageRecord {
        path: path.display().to_string(),
        width,
        height,
        grid_tiles: corners.len() as u64,
        covered: corners.len() as f64 * f64::from(side) * f64::from(side) / (f64::from(width) * f64::from(height)),
        label: names(label),
        confidence: label.map(|class| f64::from(means[class])),
        classes: classes.collect(),
        tiles: tiles.collect(),
        files: Vec::new(),
    })
}

/// `most` of `count` places, evenly: index i·count / most, rounded down; all of them if there are no more, or for 0.
fn sampled(count: usize, most: usize) -> impl Iterator<Item = usize> {
    let taken = if most == 0 { count } else { count.min(most) };
    (0..taken).map(move |index| index * count / taken)
}

/// Mean of each class over rows, summed in 64 bits.
fn means(rows: &[Vec<f32>]) -> Vec<f32> {
    let classes = rows.first().map_or(0, Vec::len);
    let mean = |class: usize| rows.iter().map(|row| f64::from(row[class])).sum::<f64>() / rows.len() as f64;
    #[expect(clippy::cast_possible_truncation, reason = "a mean of 32-bit numbers")]
    let means = (0..classes).map(|class| mean(class) as f32).collect();
    means
}

/// What the images of a folder say together.
fn together(folder: &Path, card: &ModelCard, images: &[ImageRecord], failed: usize) -> FolderRecord {
    let is_map = card.task == Task::Segmentation;
    let of_class = |(index, class): (usize, &crate::inference::Class)| ImageClass {
        class: class.name.clone(),
        count: if is_map {
            images.iter().map(|image| image.classes[index].count).sum()
        } else {
            images.iter().filter(|image| image.label.as_ref() == Some(&class.name)).count() as u64
        },
        probability: images.iter().map(|image| image.classes[index].probability).sum::<f64>() / images.len() as f64,
    };
    let classes: Vec<ImageClass> = match images {
        [] => Vec::new(),
        _ => card.classes.iter().enumerate().map(of_class).collect(),
    };
    #[expect(clippy::cast_possible_truncation, reason = "to choose the largest")]
    let scores: Vec<f32> = classes.iter().map(|class| class.probability as f32).collect();
    let label = if is_map || scores.is_empty() { None } else { decided(&scores) };
    FolderRecord {
        path: folder.display().to_string(),
        images: images.len() as u64,
        failed: failed as u64,
        pixels: images.iter().map(ImageRecord::pixels).sum(),
        label: label.map(|class| classes[class].class.clone()),
        confidence: label.map(|class| classes[class].probability),
        classes,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_even_and_all_are_taken_where_there_are_few() {
        let indices = |count, most| sampled(count, most).collect::<Vec<_>>();
        assert_eq!(indices(10, 4), [0, 2, 5, 7]);
        assert_eq!(indices(26, 25)[..3], [0, 1, 2]);
        assert_eq!(indices(26, 25)[24], 24);
        assert_eq!((indices(3, 25), indices(3, 0)), (vec![0, 1, 2], vec![0, 1, 2]));
    }

    #[test]
    fn a_mean_decides_and_one_class_needs_one_half() {
        let rows = [vec![0.9, 0.1], vec![0.2, 0.8], vec![0.2, 0.8]];
        let means = means(&rows);
        assert!((means[0] - 1.3 / 3.0).abs() < 1e-6);
        assert_eq!(decided(&means), Some(1));
        assert_eq!((decided(&[0.49]), decided(&[0.5]), decided(&[f32::NAN, 0.1])), (None, Some(0), None));
    }

    #[test]
    fn two_images_do_not_share_a_mask() {
        let paths = ["a/x.png", "b/x.jpg", "b/y.png"].map(PathBuf::from);
        assert!(no_name_twice(paths[1..].iter()).is_ok());
        let told = no_name_twice(paths.iter()).unwrap_err().to_string();
        assert!(told.contains("b/x.jpg: would have the same mask file as a/x.png"), "{told}");
    }

    #[test]
    fn no_image_counts_twice() {
        let paths = ["a/x.png", "b/x.png", "a/../b/x.png"].map(PathBuf::from);
        assert!(no_image_twice(paths[..2].iter()).is_ok());
        let told = no_image_twice(paths.iter()).unwrap_err().to_string();
        assert_eq!(told, "a/../b/x.png: is the same image as b/x.png");
    }

    #[test]
    fn slides_are_refused_by_name() {
        let told = find(&["a.SVS".into()]).err().unwrap();
        assert!(told.hint().unwrap().contains("slidestream run"));
        assert!(!is_slide(Path::new("a.png")) && !is_slide(Path::new("none.tif")));
    }
}
