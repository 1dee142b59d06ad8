//! Images that are no slides: finding and reading them, cutting them into tiles, and mapping them tile by tile.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use image::codecs::png::PngEncoder;
use image::imageops::{self, FilterType};
use image::{DynamicImage, ExtendedColorType, ImageEncoder, ImageReader, RgbImage};
use ndarray::Axis;

use super::ExperimentError;
use crate::inference::{ModelCard, Prediction, Session, SessionError};
use crate::measure::predicted_class;
use crate::output::OutputError;

/// Extensions of images that are read.
const EXTENSIONS: [&str; 6] = ["png", "jpg", "jpeg", "bmp", "tif", "tiff"];

/// How an image of another size becomes a tile.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Fit {
    /// Not at all: it must have the tile's size.
    #[default]
    Exact,
    /// Its shorter side is brought to the tile's, and the middle is cut out: what image classifiers expect.
    Resize,
}

impl fmt::Display for Fit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Exact => "exact",
            Self::Resize => "resize",
        })
    }
}

impl FromStr for Fit {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let known = [Self::Exact, Self::Resize].into_iter().find(|fit| fit.to_string() == text);
        known.ok_or_else(|| format!("{text:?} is none of exact, resize"))
    }
}

/// Whether it is a file with an image's extension.
pub(super) fn is_image(path: &Path) -> bool {
    let extension = path.extension().map(|extension| extension.to_string_lossy().to_ascii_lowercase());
    path.is_file() && extension.is_some_and(|extension| EXTENSIONS.contains(&extension.as_str()))
}

/// The images that lie in a folder itself, sorted by name.
pub(super) fn in_folder(folder: &Path) -> Result<Vec<PathBuf>, ExperimentError> {
    let wrong = |source| ExperimentError::File { path: folder.to_owned(), doing: "read", source };
    let entries: Vec<_> = std::fs::read_dir(folder).map_err(wrong)?.collect::<Result<_, _>>().map_err(wrong)?;
    let mut found: Vec<PathBuf> = entries.iter().map(std::fs::DirEntry::path).filter(|path| is_image(path)).collect();
    found.sort();
    Ok(found)
}

/// Decodes an image by what is in the file, whatever its name says.
pub(super) fn open(path: &Path) -> Result<DynamicImage, ExperimentError> {
    let wrong = |source| ExperimentError::Image { path: path.to_owned(), source };
    let reader = ImageReader::open(path).and_then(ImageReader::with_guessed_format);
    reader.map_err(|error| wrong(error.into()))?.decode().map_err(wrong)
}

/// An image as RGB.
pub(super) fn pixels(path: &Path) -> Result<RgbImage, ExperimentError> {
    Ok(open(path)?.into_rgb8())
}

/// An image that is one tile.
pub(super) fn tile(path: &Path, card: &ModelCard, fit: Fit) -> Result<Vec<u8>, ExperimentError> {
    let (image, side) = (pixels(path)?, card.tile_size);
    let (width, height) = image.dimensions();
    match fit {
        _ if (width, height) == (side, side) => Ok(image.into_raw()),
        Fit::Resize => Ok(middle(&image, side).into_raw()),
        Fit::Exact => Err(unsuited(
            path,
            format!("is {width} × {height} px, but the model's tiles are {side} × {side}"),
            "cut tiles of the model's size, or let images be resized by fit",
        )),
    }
}

/// The shorter side brought to `side`, antialiased, and the middle square of it.
fn middle(image: &RgbImage, side: u32) -> RgbImage {
    let (width, height) = image.dimensions();
    let shorter = u64::from(width.min(height)).max(1);
    let scaled = |length: u32| {
        let scaled = (u64::from(length) * u64::from(side) + shorter / 2) / shorter;
        u32::try_from(scaled).unwrap_or(u32::MAX).max(side)
    };
    // The triangle filter widens with the reduction, which makes it torchvision's antialiased bilinear.
    let image = imageops::resize(image, scaled(width), scaled(height), FilterType::Triangle);
    let (left, top) = ((image.width() - side) / 2, (image.height() - side) / 2);
    imageops::crop_imm(&image, left, top, side, side).to_image()
}

/// Upper left corners of tiles side by side, row by row; what is left over at the right and the bottom has none.
pub(super) fn whole_tiles(image: &RgbImage, side: u32) -> Vec<(u32, u32)> {
    let (columns, rows) = (image.width() / side, image.height() / side);
    (0..rows).flat_map(|row| (0..columns).map(move |column| (column * side, row * side))).collect()
}

/// The pixels of a tile.
pub(super) fn cut(image: &RgbImage, (x, y): (u32, u32), side: u32) -> Vec<u8> {
    imageops::crop_imm(image, x, y, side, side).to_image().into_raw()
}

/// The probabilities of an image's pixels.
pub(super) struct ScoreMap {
    pub(super) width: u32,
    pub(super) height: u32,
    pub(super) classes: usize,
    /// Sums over the tiles that cover a pixel, `[class, row, column]`.
    sums: Vec<f32>,
    /// How many tiles cover a pixel, `[row, column]`.
    tiles: Vec<u16>,
    /// Tiles that were predicted.
    pub(super) tile_count: u64,
}

impl ScoreMap {
    /// The most probable class of a pixel, which is given by its index in `[row, column]`; `None` where a score is NaN.
    pub(super) fn class_at(&self, pixel: usize) -> Option<usize> {
        // The greatest sum is the greatest mean too.
        predicted_class(&(0..self.classes).map(|class| self.sums[class * self.tiles.len() + pixel]).collect::<Vec<_>>())
    }

    /// Mean probability of a class at a pixel.
    pub(super) fn probability(&self, class: usize, pixel: usize) -> f32 {
        self.sums[class * self.tiles.len() + pixel] / f32::from(self.tiles[pixel].max(1))
    }

    /// The classes of all pixels.
    pub(super) fn class_map(&self) -> Vec<Option<usize>> {
        (0..self.tiles.len()).map(|pixel| self.class_at(pixel)).collect()
    }
}

/// Segments an image by tiles that overlap as the card says, the last of a row or column shifted to end with the image.
pub(super) fn segment(
    image: &RgbImage,
    path: &Path,
    card: &ModelCard,
    session: &mut dyn Session,
    batch: usize,
) -> Result<ScoreMap, ExperimentError> {
    let (width, height, side) = (image.width(), image.height(), card.tile_size);
    if width < side || height < side {
        return Err(too_small(path, image, side));
    }
    let step = side - card.overlap;
    let corners: Vec<(u32, u32)> =
        starts(height, side, step).flat_map(|y| starts(width, side, step).map(move |x| (x, y))).collect();
    let (pixels, classes) = (width as usize * height as usize, card.classes.len());
    let (sums, tiles, tile_count) = (vec![0.0; classes * pixels], vec![0; pixels], corners.len() as u64);
    let mut map = ScoreMap { width, height, classes, sums, tiles, tile_count };
    for corners in corners.chunks(batch) {
        let tiles: Vec<Vec<u8>> = corners.iter().map(|corner| cut(image, *corner, side)).collect();
        let tiles: Vec<&[u8]> = tiles.iter().map(Vec::as_slice).collect();
        let Prediction::Map(maps) = session.predict(&tiles)? else { return Err(other_task(path)) };
        for ((x, y), scores) in corners.iter().zip(maps.axis_iter(Axis(0))) {
            for ((class, row, column), value) in scores.indexed_iter() {
                let at = (*y as usize + row) * width as usize + *x as usize + column;
                map.sums[class * pixels + at] += value;
                map.tiles[at] += u16::from(class == 0);
            }
        }
    }
    Ok(map)
}

/// Where tiles begin along a side, the last one at its end.
fn starts(length: u32, side: u32, step: u32) -> impl Iterator<Item = u32> {
    let last = length - side;
    (0..last).step_by(step as usize).chain([last])
}

/// Scores of tiles `[tiles, classes]`, in batches.
pub(super) fn classify(
    tiles: &[&[u8]],
    session: &mut dyn Session,
    batch: usize,
) -> Result<Vec<Vec<f32>>, SessionError> {
    let mut rows = Vec::with_capacity(tiles.len());
    for tiles in tiles.chunks(batch) {
        if let Prediction::Classes(scores) = session.predict(tiles)? {
            rows.extend(scores.outer_iter().map(|row| row.to_vec()));
        }
    }
    Ok(rows)
}

/// Whether an error says that one image is not as it should be, so that others may go on.
pub(super) fn is_about_one_image(error: &ExperimentError) -> bool {
    matches!(error, ExperimentError::Image { .. } | ExperimentError::Unsuited { .. })
}

/// That an image has no tile.
pub(super) fn too_small(path: &Path, image: &RgbImage, side: u32) -> ExperimentError {
    let (width, height) = image.dimensions();
    let reason = format!("is {width} × {height} px, less than a tile of {side} × {side}");
    unsuited(path, reason, "give images of the model's resolution, at least as large as its tile")
}

pub(super) fn unsuited(path: &Path, reason: String, hint: &'static str) -> ExperimentError {
    ExperimentError::Unsuited { path: path.to_owned(), reason, hint }
}

fn other_task(path: &Path) -> ExperimentError {
    unsuited(path, "can't be segmented: the model gives no map".to_owned(), "choose a model whose task is segmentation")
}

/// A picture as a PNG file's bytes, for a page.
pub(super) fn png(picture: &RgbImage) -> Result<Vec<u8>, ExperimentError> {
    let mut bytes = Vec::new();
    let (width, height) = picture.dimensions();
    PngEncoder::new(&mut bytes)
        .write_image(picture.as_raw(), width, height, ExtendedColorType::Rgb8)
        .map_err(|source| OutputError::Image { path: "a picture of the page".into(), source })?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inference::{BareModel, FakeSession, Task};

    /// The committed UNet's card for another tile, with the three classes of the fake session.
    fn card(side: u32, overlap: u32) -> ModelCard {
        let mut card = ModelCard::load(Path::new("models/cells-unet"), &BareModel::default()).unwrap();
        (card.tile_size, card.overlap) = (side, overlap);
        card.classes.truncate(3);
        card
    }

    fn gradient(width: u32, height: u32) -> RgbImage {
        RgbImage::from_fn(width, height, |x, y| image::Rgb([10 + x.to_le_bytes()[0], 20 + y.to_le_bytes()[0], 30]))
    }

    #[test]
    fn tiles_cover_an_image_to_its_end() {
        assert_eq!(starts(400, 256, 192).collect::<Vec<_>>(), [0, 144]);
        assert_eq!(starts(256, 256, 192).collect::<Vec<_>>(), [0]);
        assert_eq!(starts(500, 256, 192).collect::<Vec<_>>(), [0, 192, 244]);
    }

    #[test]
    fn whole_tiles_leave_the_rest_out() {
        assert_eq!(whole_tiles(&gradient(11, 9), 4), [(0, 0), (4, 0), (0, 4), (4, 4)]);
        assert_eq!(whole_tiles(&gradient(11, 3), 4), []);
        let tile = cut(&gradient(11, 9), (4, 4), 4);
        assert_eq!((tile.len(), &tile[..3], &tile[45..]), (48, &[14, 24, 30][..], &[17, 27, 30][..]));
    }

    #[test]
    fn a_map_is_the_mean_of_the_tiles_over_a_pixel() {
        // The fake session tells each pixel's colour whatever its tile, so that overlaps must not show.
        let (image, card) = (gradient(10, 7), card(4, 1));
        let mut session = FakeSession::new(Task::Segmentation, 4);
        let map = segment(&image, Path::new("a.png"), &card, &mut session, 3).unwrap();
        for (pixel, rgb) in image.pixels().enumerate() {
            let sum: f32 = rgb.0.iter().map(|value| f32::from(*value)).sum();
            for class in 0..3 {
                assert!((map.probability(class, pixel) - f32::from(rgb.0[class]) / sum).abs() < 1e-6);
            }
        }
        assert!(map.class_map().iter().all(|class| *class == Some(2)));
        let small = segment(&gradient(10, 3), Path::new("a.png"), &card, &mut session, 3);
        assert!(small.is_err_and(|error| error.to_string().contains("10 × 3 px, less than a tile of 4 × 4")));
    }

    #[test]
    fn an_image_of_another_size_is_resized_only_when_asked() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.bmp");
        // The left and right quarters are black and white, and cut off.
        let stripes = |x: u32| {
            if x < 4 {
                0
            } else if x >= 12 {
                255
            } else {
                100
            }
        };
        RgbImage::from_fn(16, 8, |x, _| image::Rgb([stripes(x); 3])).save(&path).unwrap();
        let told = tile(&path, &card(4, 0), Fit::Exact).unwrap_err().to_string();
        assert!(told.contains("16 × 8 px, but the model's tiles are 4 × 4"), "{told}");
        let fitted = tile(&path, &card(4, 0), Fit::Resize).unwrap();
        assert_eq!(fitted.len(), 48);
        // Only the outermost columns see what was cut off, by the filter's width.
        assert!(fitted.chunks(12).all(|row| row[3..9] == [100; 6]), "{fitted:?}");
        assert_eq!(tile(&path, &card(8, 0), Fit::Resize).unwrap(), [100; 192]);
    }

    #[test]
    fn images_are_known_by_content_and_listed_in_order() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        gradient(4, 4).save(at("b.png")).unwrap();
        std::fs::rename(at("b.png"), at("b.TIF")).unwrap();
        gradient(4, 4).save(at("a.tif")).unwrap();
        std::fs::write(at("notes.txt"), "").unwrap();
        std::fs::create_dir(at("c.png")).unwrap();
        assert_eq!(in_folder(folder.path()).unwrap(), [at("a.tif"), at("b.TIF")]);
        assert_eq!(pixels(&at("b.TIF")).unwrap(), pixels(&at("a.tif")).unwrap());
        assert!(matches!(pixels(&at("notes.txt")), Err(ExperimentError::Image { .. })));
    }
}
