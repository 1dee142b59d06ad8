//! The worst errors in small pictures.

use image::imageops::{self, FilterType};
use image::{Rgb, RgbImage};

use super::figures::foreground;
use super::predictions::{self, Mapped, Sample, Segmented};
use crate::experiment::ExperimentError;
use crate::experiment::images::{self, Fit};
use crate::experiment::labels::Labelled;
use crate::experiment::pace::Paced;
use crate::inference::{Class, ModelCard};
use crate::measure::mean_of_some;
use crate::report::WorstRecord;

/// Errors that are shown.
const WORST_TILES: usize = 24;
/// Maps that are shown.
const WORST_MAPS: usize = 6;
/// Longest side of a tile's picture.
const TILE_SIDE: u32 = 128;
/// Longest side of each of a map's three pictures.
const MAP_SIDE: u32 = 240;
/// Between pictures side by side.
const GAP: u32 = 6;
/// How much a class's colour covers the image.
const COVER: f64 = 0.75;
/// What has no label is black.
const NOTHING: [u8; 3] = [0; 3];

/// The wrong samples of which the model was surest.
pub(super) fn of_samples(
    samples: &[Sample],
    labelled: &Labelled,
    card: &ModelCard,
    fit: Fit,
) -> Result<Vec<WorstRecord>, ExperimentError> {
    let mut wrong: Vec<(f64, usize, &Sample)> = samples
        .iter()
        .filter_map(|sample| Some((sample.confidence()?, sample.predicted?, sample)))
        .filter(|(_, predicted, sample)| *predicted != sample.label)
        .collect();
    wrong.sort_by(|(a, ..), (b, ..)| b.total_cmp(a));
    let record = |(confidence, predicted, sample): &(f64, usize, &Sample)| {
        let path = &labelled.items[sample.item].image;
        let tile = images::tile(path, card, fit)?;
        let picture = RgbImage::from_raw(card.tile_size, card.tile_size, tile).unwrap_or_default();
        let name = |class: usize| Some(card.classes[class].name.clone());
        let (label, predicted, png) = (name(sample.label), name(*predicted), images::png(&small(&picture, TILE_SIDE))?);
        Ok(WorstRecord::new(path.display().to_string(), (label, predicted), *confidence, &png))
    };
    wrong.iter().take(WORST_TILES).map(record).collect()
}

/// The images whose maps have the lowest mean Dice: image, mask and map side by side.
pub(super) fn of_maps(
    segmented: &[Segmented],
    labelled: &Labelled,
    card: &ModelCard,
    session: &mut Paced,
) -> Result<Vec<WorstRecord>, ExperimentError> {
    let dice = |image: &Segmented| mean_of_some(&foreground(&image.counts.dice(), card));
    let mut by_dice: Vec<(f64, &Segmented)> =
        segmented.iter().filter_map(|image| Some((dice(image)?, image))).filter(|(dice, _)| *dice < 1.0).collect();
    by_dice.sort_by(|(a, _), (b, _)| a.total_cmp(b));
    let mut worst = Vec::new();
    for (dice, image) in by_dice.into_iter().take(WORST_MAPS) {
        let item = &labelled.items[image.item];
        // Predicted once more: keeping the maps of all images would take memory for nothing.
        let Mapped { image: pixels, truth, map } = predictions::map(item, card, session)?;
        let truth: Vec<Option<usize>> =
            truth.into_iter().map(|label| (label != u8::MAX).then_some(usize::from(label))).collect();
        let pictures = [
            small(&pixels, MAP_SIDE),
            small(&painted(&pixels, &truth, card), MAP_SIDE),
            small(&painted(&pixels, &map.class_map(), card), MAP_SIDE),
        ];
        let png = images::png(&side_by_side(&pictures))?;
        worst.push(WorstRecord::new(item.image.display().to_string(), (None, None), dice, &png));
    }
    Ok(worst)
}

/// An image under the colours of its classes; without a class it is black, and the background class leaves it as it is.
fn painted(image: &RgbImage, classes: &[Option<usize>], card: &ModelCard) -> RgbImage {
    let mut painted = image.clone();
    for (pixel, class) in painted.pixels_mut().zip(classes) {
        let class = class.map(|class| (Some(class) != card.background).then(|| &card.classes[class]));
        pixel.0 = match class {
            None => NOTHING,
            Some(None) => pixel.0,
            Some(Some(Class { color, .. })) => {
                let grey = pixel.0.iter().map(|value| f64::from(*value)).sum::<f64>() / 3.0;
                #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "between two bytes")]
                let mix = |color: u8| (COVER * f64::from(color) + (1.0 - COVER) * grey).round() as u8;
                color.map(mix)
            }
        };
    }
    painted
}

/// No side longer than `side`.
fn small(image: &RgbImage, side: u32) -> RgbImage {
    let longest = image.width().max(image.height());
    if longest <= side {
        return image.clone();
    }
    let scaled = |length: u32| (length * side / longest).max(1);
    imageops::resize(image, scaled(image.width()), scaled(image.height()), FilterType::Triangle)
}

fn side_by_side(pictures: &[RgbImage]) -> RgbImage {
    let width = pictures.iter().map(|picture| picture.width() + GAP).sum::<u32>().saturating_sub(GAP);
    let height = pictures.iter().map(RgbImage::height).max().unwrap_or(0);
    let mut all = RgbImage::from_pixel(width, height, Rgb([255; 3]));
    let mut left = 0;
    for picture in pictures {
        imageops::replace(&mut all, picture, left, 0);
        left += i64::from(picture.width() + GAP);
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inference::BareModel;
    use std::path::Path;

    fn card() -> ModelCard {
        let mut card = ModelCard::load(Path::new("models/cells-vit"), &BareModel::default()).unwrap();
        (card.tile_size, card.background) = (8, Some(1));
        card.classes[0].color = [0, 0, 250];
        card
    }

    #[test]
    fn the_surest_errors_come_first_and_right_ones_not_at_all() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.png");
        RgbImage::new(8, 8).save(&path).unwrap();
        let item = |_| crate::experiment::labels::Item {
            image: path.clone(),
            truth: crate::experiment::labels::Truth::Class(0),
            group: 0,
        };
        let labelled = Labelled {
            path: path.clone(),
            items: (0..4).map(item).collect(),
            groups: 1,
            group_names: Vec::new(),
            others: Vec::new(),
            not: None,
        };
        let rows = [[0.6, 0.4, 0.0, 0.0], [0.3, 0.7, 0.0, 0.0], [0.0, 0.1, 0.9, 0.0], [f32::NAN; 4]];
        let samples: Vec<Sample> =
            rows.into_iter().enumerate().map(|(item, row)| Sample::new(item, 0, 0, row.to_vec())).collect();
        let worst = of_samples(&samples, &labelled, &card(), Fit::Exact).unwrap();
        let told: Vec<_> = worst.iter().map(|worst| worst.predicted.clone().unwrap()).collect();
        assert_eq!(told, ["stroma", "tumour-epithelial"]);
        assert!((worst[0].value - 0.9).abs() < 1e-6 && worst[0].png_base64.starts_with("iVBORw"));
    }

    #[test]
    fn classes_tint_and_the_background_does_not() {
        let image = RgbImage::from_pixel(3, 1, Rgb([90, 120, 150]));
        let painted = painted(&image, &[Some(0), Some(1), None], &card());
        assert_eq!(painted.into_raw(), [30, 30, 218, 90, 120, 150, 0, 0, 0]);
    }

    #[test]
    fn pictures_stand_side_by_side_and_keep_their_shape() {
        let picture = small(&RgbImage::new(400, 100), 200);
        assert_eq!(picture.dimensions(), (200, 50));
        let all = side_by_side(&[picture.clone(), RgbImage::new(10, 60)]);
        assert_eq!((all.dimensions(), all.get_pixel(203, 0).0), ((216, 60), [255; 3]));
    }
}
