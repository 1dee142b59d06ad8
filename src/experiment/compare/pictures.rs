//! Pictures of what variants see: the maps of the original and of a variant over the slide, and where they differ.

use image::codecs::png::PngEncoder;
use image::imageops::{self, FilterType};
use image::{ExtendedColorType, ImageEncoder, Rgb, RgbImage};

use super::CompareRequest;
use super::course::Course;
use super::speed;
use super::subjects::Subject;
use crate::engine::config::Emit;
use crate::experiment::ExperimentError;
use crate::experiment::optimize::file_error;
use crate::output::OutputError;
use crate::report::compare::PictureRecord;
use crate::stitch::Overview;

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

/// Both overlays as a run draws them, and the difference of the stitched maps; none for features.
pub(super) fn pictures(
    original: &Subject,
    variant: &Subject,
    course: &Course,
    request: &CompareRequest,
) -> Result<Vec<PictureRecord>, ExperimentError> {
    let map = |subject: &Subject| Ok::<_, ExperimentError>(course.walk(&subject.card, &mut subject.open()?, 1)?.map);
    let (Some(before), Some(after)) = (map(original)?, map(variant)?) else { return Ok(Vec::new()) };
    let caption = "The classes over the slide, as a run draws them.";
    let (picture, other, differing) = difference(&before, &after);
    let path = std::path::PathBuf::from("the picture of the difference");
    let png = png(&picture).map_err(|source| OutputError::Image { path, source })?;
    let told = format!(
        "The largest difference of any class's probability: from pale (none) to red ({:.0} points and more); black where \
         the class is another: {other} of {differing} cells of the map.",
        100.0 * FULL
    );
    Ok(vec![
        PictureRecord::new(&format!("the original: {}", original.name), caption, &overlay(original, course, request)?),
        PictureRecord::new(&format!("the variant: {}", variant.name), caption, &overlay(variant, course, request)?),
        PictureRecord::new(&format!("{} against {}", variant.name, original.name), &told, &png),
    ])
}

/// A run's own picture of the course.
fn overlay(subject: &Subject, course: &Course, request: &CompareRequest) -> Result<Vec<u8>, ExperimentError> {
    let out = tempfile::tempdir().map_err(|source| file_error(&std::env::temp_dir(), "written", source))?;
    let mut engine = speed::engine(subject, 1, course.config(Emit::Png), request)?;
    speed::run(&mut engine, course, out.path())?;
    let path = out.path().join("overlays").join("slide.png");
    std::fs::read(&path).map_err(|source| file_error(&path, "read", source))
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
    let factor = (SIDE / picture.width().max(picture.height()).max(1)).max(1);
    let (width, height) = (picture.width() * factor, picture.height() * factor);
    (imageops::resize(&picture, width, height, FilterType::Nearest), other, inferred)
}

fn side(cells: usize) -> u32 {
    u32::try_from(cells).unwrap_or(u32::MAX)
}

fn png(picture: &RgbImage) -> Result<Vec<u8>, image::ImageError> {
    let mut bytes = Vec::new();
    let (width, height) = picture.dimensions();
    PngEncoder::new(&mut bytes).write_image(picture.as_raw(), width, height, ExtendedColorType::Rgb8)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::geometry::{Mpp, PixelSize};

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
    fn differences_have_colours() {
        let (picture, other, inferred) = difference(&map([0, 1, 1], [0, 200, 140]), &map([0, 1, 2], [0, 200, 120]));
        assert_eq!((other, inferred), (1, 2));
        let at = |cell: u32| picture.get_pixel(cell * picture.width() / 3, 0).0;
        assert_eq!((at(0), at(1), at(2)), (NOTHING, [236, 236, 240], OTHER_CLASS));
        let (picture, ..) = difference(&map([0, 1, 1], [0, 200, 255]), &map([0, 1, 1], [0, 200, 180]));
        assert_eq!(picture.get_pixel(picture.width() - 1, 0).0, [178, 24, 43]);
        assert!(png(&picture).unwrap().starts_with(b"\x89PNG"));
    }
}
