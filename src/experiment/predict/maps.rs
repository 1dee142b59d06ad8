//! The mask and the overlay of an image.

use std::path::{Path, PathBuf};

use image::{GrayImage, RgbImage};

use crate::experiment::ExperimentError;
use crate::experiment::images::{self, HALF, ScoreMap};
use crate::experiment::pace::Paced;
use crate::geometry::Level0Rect;
use crate::inference::ModelCard;
use crate::output::{self, ClassStyle, MapArea, Overlay, OverlayClass, Thumbnail};
use crate::report::{ImageClass, ImageRecord};

/// A mask's value where there is no class.
const NO_CLASS: u8 = u8::MAX;

/// The mask and the overlay of an image.
pub(super) fn files(path: &Path, out: &Path) -> [PathBuf; 2] {
    ["mask", "overlay"].map(|kind| out.join(format!("{}.{kind}.png", id(path))))
}

fn id(path: &Path) -> String {
    path.file_stem().unwrap_or_default().to_string_lossy().into_owned()
}

/// Segments an image and writes `ID.mask.png`, whose values are indices of classes and 255 for none, and `ID.overlay.png`.
/// Of a model with one class the mask is 1 where that is, and 0 elsewhere: `evaluate` takes the masks of both kinds.
pub(super) fn map(
    path: &Path,
    image: &RgbImage,
    card: &ModelCard,
    session: &mut Paced,
    out: &Path,
) -> Result<ImageRecord, ExperimentError> {
    let batch = session.predictor.total_batch_size();
    let map = images::segment(image, path, card, session, batch)?;
    if !map.is_complete() {
        let reason = "the model gives no number for some of its pixels".to_owned();
        return Err(images::unsuited(path, reason, "try the fp32 variant"));
    }
    let value = |class: Option<usize>| class.and_then(|class| u8::try_from(class).ok()).unwrap_or(NO_CLASS);
    let classes: Vec<u8> = map.class_map().into_iter().map(value).collect();
    let [mask, overlay] = files(path, out);
    let values = if card.classes.len() == 1 { after_nothing(&classes) } else { classes.clone() };
    if let Some(picture) = GrayImage::from_raw(map.width, map.height, values) {
        output::write_grey_png(&mask, &picture)?;
    }
    output::write_png(&overlay, &drawn(&id(path), image, card, &map, &classes))?;
    let shares = card.classes.iter().enumerate().map(|(index, class)| ImageClass {
        class: class.name.clone(),
        count: classes.iter().filter(|found| usize::from(**found) == index).count() as u64,
        probability: (0..classes.len()).map(|pixel| f64::from(map.probability(index, pixel))).sum::<f64>()
            / classes.len() as f64,
    });
    let files = [&mask, &overlay].map(|file| file.display().to_string());
    Ok(ImageRecord {
        path: path.display().to_string(),
        width: map.width,
        height: map.height,
        grid_tiles: map.tile_count,
        covered: 1.0,
        label: None,
        confidence: None,
        classes: shares.collect(),
        tiles: Vec::new(),
        files: files.to_vec(),
    })
}

/// The classes with 0 for none, and the first from 1 on.
fn after_nothing(classes: &[u8]) -> Vec<u8> {
    classes.iter().map(|class| class.wrapping_add(1)).collect()
}

fn drawn(id: &str, image: &RgbImage, card: &ModelCard, map: &ScoreMap, classes: &[u8]) -> RgbImage {
    let area = Level0Rect { x: 0, y: 0, width: i64::from(map.width), height: i64::from(map.height) };
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "between two bytes")]
    let byte = |probability: f32| (probability.clamp(0.0, 1.0) * 255.0).round() as u8;
    let of_class = |class| (0..classes.len()).map(|pixel| byte(map.probability(class, pixel))).collect();
    let probabilities: Vec<Vec<u8>> = (0..card.classes.len()).map(of_class).collect();
    let styles = card.classes.iter().enumerate().map(|(index, class)| OverlayClass {
        style: ClassStyle { name: class.name.clone(), color: class.color },
        is_background: card.background == Some(index),
    });
    let overlay = Overlay {
        title: id,
        subtitle: &format!("{} at {} µm/px", card.name, card.mpp),
        map: MapArea { width: map.width, height: map.height, area },
        class_index: &after_nothing(classes),
        probabilities: &probabilities.iter().map(Vec::as_slice).collect::<Vec<_>>(),
        classes: &styles.collect::<Vec<_>>(),
        floor: f64::from(HALF),
    };
    // An image says nothing of its resolution; it is taken to be the model's, as its tiles are.
    output::draw_overlay(&Thumbnail { pixels: image, area, um_per_px: card.mpp.get() }, &overlay)
}
