//! Pictures of what variants see: the maps of the original and of a variant over the slide, and where they differ.

use image::imageops::{self, FilterType};
use image::{Rgb, RgbImage};

use super::course::Course;
use super::subjects::Subject;
use crate::engine::SlidePicture;
use crate::experiment::{ExperimentError, images};
use crate::geometry::Level0Rect;
use crate::inference::{ModelCard, Task};
use crate::report::compare::PictureRecord;
use crate::stitch::Overview;

/// How much a class's colour covers the slide.
const COVER: f64 = 0.65;
/// Where nothing was inferred.
const NOTHING: [u8; 3] = [255, 255, 255];
/// No difference.
const SAME: [f64; 3] = [236.0, 236.0, 240.0];
/// A difference of [`FULL`] or more.
const DIFFERENT: [f64; 3] = [178.0, 24.0, 43.0];
/// Another class.
const OTHER_CLASS: [u8; 3] = [20, 20, 20];
/// The difference of a probability that has the full colour.
const FULL: f64 = 0.25;
/// A smaller map is enlarged to about this side, in whole steps.
const SIDE: u32 = 900;

/// The stitched maps of both over the slide, and their difference; none for features.
pub(super) fn pictures(
    original: &Subject,
    variant: &Subject,
    course: &Course,
) -> Result<Vec<PictureRecord>, ExperimentError> {
    if original.card.task == Task::Features {
        return Ok(Vec::new());
    }
    let map = |subject: &Subject| Ok::<_, ExperimentError>(course.walk(&subject.card, &mut subject.open()?, 1)?.map);
    let (Some(before), Some(after)) = (map(original)?, map(variant)?) else { return Ok(Vec::new()) };
    let slide = SlidePicture::new(&course.plan)?;
    let over_slide = |map: &Overview| over_slide(map, &original.card, &slide, course.plan.plane.region);
    let (differing, other, inferred) = difference(&before, &after);
    let colours = colours(&original.card);
    let caption = format!("The most probable classes over the slide: {colours}.");
    let told = format!(
        "The largest difference of any class's probability, from pale (none) to red ({:.0} points and more); black \
         where the class is another, {:.2} % of the map.",
        100.0 * FULL,
        100.0 * other as f64 / inferred.max(1) as f64
    );
    Ok(vec![
        PictureRecord::new(&format!("the original: {}", original.name), &caption, &images::png(&over_slide(&before))?),
        PictureRecord::new(&format!("the variant: {}", variant.name), &caption, &images::png(&over_slide(&after))?),
        PictureRecord::new(&format!("{} against {}", variant.name, original.name), &told, &images::png(&differing)?),
    ])
}

/// Every class that is drawn with its colour, such as `stroma #e8b21a`.
fn colours(card: &ModelCard) -> String {
    let drawn = card.classes.iter().enumerate().filter(|(index, _)| card.background != Some(*index));
    let named = drawn.map(|(_, class)| {
        let [red, green, blue] = class.color;
        format!("{} #{red:02x}{green:02x}{blue:02x}", class.name)
    });
    named.collect::<Vec<_>>().join(", ")
}

/// The classes of a map of `region` in their colours, and the slide where there is none or the background.
fn over_slide(map: &Overview, card: &ModelCard, slide: &SlidePicture, region: Level0Rect) -> RgbImage {
    let factor = enlargement(map);
    let SlidePicture { pixels, area } = slide;
    RgbImage::from_fn(side(map.width) * factor, side(map.height) * factor, |x, y| {
        let level0 = |cell: u32, size: f64| (f64::from(cell) + 0.5) / f64::from(factor) * size;
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "held within the picture")]
        let at = |level0: f64, length: i64, size: u32| {
            (level0 / length as f64 * f64::from(size)).clamp(0.0, f64::from(size.saturating_sub(1))) as u32
        };
        let left = (region.x - area.x) as f64 + level0(x, map.cell_width);
        let top = (region.y - area.y) as f64 + level0(y, map.cell_height);
        let under = pixels.get_pixel(at(left, area.width, pixels.width()), at(top, area.height, pixels.height())).0;
        let cell = (y / factor) as usize * map.width + (x / factor) as usize;
        let class = map.classes.get(cell).and_then(|class| usize::from(*class).checked_sub(1));
        let drawn = class.filter(|class| card.background != Some(*class)).and_then(|class| card.classes.get(class));
        let Some(class) = drawn else { return Rgb(under) };
        let grey = under.iter().map(|value| f64::from(*value)).sum::<f64>() / 3.0;
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "between two bytes")]
        let mix = |colour: u8| (COVER * f64::from(colour) + (1.0 - COVER) * grey).round() as u8;
        Rgb(class.color.map(mix))
    })
}

/// How often a cell's side is repeated.
fn enlargement(map: &Overview) -> u32 {
    (SIDE / side(map.width.max(map.height)).max(1)).max(1)
}

/// The picture of the difference, how many cells are of another class, and how many were inferred.
fn difference(before: &Overview, after: &Overview) -> (RgbImage, usize, usize) {
    let (mut other, mut inferred) = (0, 0);
    let mut picture = RgbImage::from_pixel(side(before.width), side(before.height), Rgb(NOTHING));
    for (index, pixel) in picture.pixels_mut().enumerate() {
        let (Some(&a), Some(&b)) = (before.classes.get(index), after.classes.get(index)) else { continue };
        if a == 0 && b == 0 {
            continue;
        }
        inferred += 1;
        if a != b {
            other += 1;
            *pixel = Rgb(OTHER_CLASS);
            continue;
        }
        let pairs = before.probabilities.iter().zip(&after.probabilities);
        let largest = pairs.map(|(a, b)| a[index].abs_diff(b[index])).max().unwrap_or(0);
        let share = (f64::from(largest) / 255.0 / FULL).min(1.0);
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "between two bytes")]
        let mix = |channel: usize| (SAME[channel] + (DIFFERENT[channel] - SAME[channel]) * share).round() as u8;
        *pixel = Rgb([mix(0), mix(1), mix(2)]);
    }
    let factor = enlargement(before);
    let (width, height) = (picture.width() * factor, picture.height() * factor);
    (imageops::resize(&picture, width, height, FilterType::Nearest), other, inferred)
}

fn side(cells: usize) -> u32 {
    u32::try_from(cells).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::geometry::{Mpp, PixelSize};
    use crate::inference::BareModel;
    use std::path::Path;

    fn map(classes: [u8; 3], first: [u8; 3]) -> Overview {
        Overview {
            width: 3,
            height: 1,
            cell_width: 1.0,
            cell_height: 1.0,
            cell_size: PixelSize::square(Mpp::new(0.5).unwrap()),
            probabilities: vec![first.to_vec(), first.map(|p| 255 - p).to_vec()],
            classes: classes.to_vec(),
        }
    }

    #[test]
    fn classes_cover_the_slide_and_the_background_does_not() {
        let mut card = ModelCard::load(Path::new("models/cells-vit"), &BareModel::default()).unwrap();
        card.background = Some(1);
        card.classes[0].color = [0, 0, 255];
        let area = Level0Rect { x: 10, y: 20, width: 3, height: 1 };
        let slide =
            SlidePicture { pixels: RgbImage::from_fn(3, 1, |x, _| Rgb([100 * u8::try_from(x).unwrap(); 3])), area };
        let picture = over_slide(&map([0, 1, 2], [0, 200, 120]), &card, &slide, area);
        let at = |cell: u32| picture.get_pixel(cell * picture.width() / 3 + 1, 0).0;
        assert_eq!((at(0), at(1), at(2)), ([0; 3], [35, 35, 201], [200; 3]));
        assert!(colours(&card).starts_with("lymphocyte #0000ff, stroma #"));
    }

    #[test]
    fn differences_have_colours() {
        let (picture, other, inferred) = difference(&map([0, 1, 1], [0, 200, 140]), &map([0, 1, 2], [0, 200, 120]));
        assert_eq!((other, inferred), (1, 2));
        let at = |cell: u32| picture.get_pixel(cell * picture.width() / 3, 0).0;
        assert_eq!((at(0), at(1), at(2)), (NOTHING, [236, 236, 240], OTHER_CLASS));
        let (picture, ..) = difference(&map([0, 1, 1], [0, 200, 255]), &map([0, 1, 1], [0, 200, 180]));
        assert_eq!(picture.get_pixel(picture.width() - 1, 0).0, [178, 24, 43]);
        assert!(images::png(&picture).unwrap().starts_with(b"\x89PNG"));
    }
}
