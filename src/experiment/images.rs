//! Images that are no slides: finding and reading them, cutting them into tiles, and mapping them tile by tile.

mod decode;
mod jpeg;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use image::codecs::png::PngEncoder;
use image::imageops::{self, FilterType};
use image::{DynamicImage, ExtendedColorType, ImageEncoder, Rgb, RgbImage};
use ndarray::{Axis, s};

use super::ExperimentError;
use crate::inference::{Activation, ModelCard, Prediction, Session, SessionError};
use crate::measure::predicted_class;
use crate::output::OutputError;
use crate::report::FailedImage;

/// Extensions of images that are read.
const EXTENSIONS: [&str; 7] = ["png", "jpg", "jpeg", "bmp", "tif", "tiff", "webp"];

/// From this probability on a tile or pixel has a class that does not exclude others, as in a run without further settings.
pub(super) const HALF: f32 = 0.5;

/// What lies beside an image, as beside a slide that names no colour.
const WHITE: Rgb<u8> = Rgb([u8::MAX; 3]);

/// How an image of another size becomes a tile.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Fit {
    /// Not at all: it must have the tile's size.
    #[default]
    Exact,
    /// Its middle square is brought to the tile's size: what image classifiers expect.
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

/// Whether it is a file with an image's extension, or was: a link to nothing is an image that can't be read.
pub(super) fn is_image(path: &Path) -> bool {
    let extension = path.extension().map(|extension| extension.to_string_lossy().to_ascii_lowercase());
    extension.is_some_and(|extension| EXTENSIONS.contains(&extension.as_str())) && (path.is_file() || is_dangling(path))
}

/// Whether it is a link to nothing.
pub(super) fn is_dangling(path: &Path) -> bool {
    path.is_symlink() && !path.exists()
}

/// What lies in a folder itself, sorted by name.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Listing {
    pub(super) images: Vec<PathBuf>,
    /// Files that are no images.
    pub(super) others: Vec<PathBuf>,
}

/// Lists a folder, but not the folders in it.
pub(super) fn in_folder(folder: &Path) -> Result<Listing, ExperimentError> {
    let wrong = |source| ExperimentError::File { path: folder.to_owned(), doing: "read", source };
    let entries: Vec<_> = std::fs::read_dir(folder).map_err(wrong)?.collect::<Result<_, _>>().map_err(wrong)?;
    let mut files: Vec<PathBuf> = entries.iter().map(std::fs::DirEntry::path).filter(|path| !path.is_dir()).collect();
    files.sort();
    let (images, others) = files.into_iter().partition(|path| is_image(path));
    Ok(Listing { images, others })
}

/// How many files there are of each extension, in lower case; of none it is empty.
pub(super) fn by_extension(files: &[PathBuf]) -> BTreeMap<String, u64> {
    let mut counts = BTreeMap::new();
    for file in files {
        let extension = file.extension().unwrap_or_default().to_string_lossy().to_ascii_lowercase();
        *counts.entry(extension).or_default() += 1;
    }
    counts
}

/// What is said of files that are no images; `None` of none.
pub(super) fn about_others(by_extension: &BTreeMap<String, u64>) -> Option<String> {
    let total: u64 = by_extension.values().sum();
    let kind = |(extension, count): (&String, &u64)| match extension.as_str() {
        "" => format!("{count} without extension"),
        extension => format!("{count} {extension}"),
    };
    let kinds = by_extension.iter().map(kind).collect::<Vec<_>>().join(", ");
    (total > 0).then(|| format!("Files that are not {} were left out: {total} ({kinds}).", extensions()))
}

/// The extensions of images, in words.
pub(super) fn extensions() -> String {
    let [others @ .., last] = &EXTENSIONS;
    format!("{} or {last}", others.join(", "))
}

/// An image as it is stored.
pub(super) fn open(path: &Path) -> Result<DynamicImage, ExperimentError> {
    decode::decode(path)
}

/// An image as RGB; what is transparent is white.
pub(super) fn pixels(path: &Path) -> Result<RgbImage, ExperimentError> {
    Ok(decode::over_white(open(path)?))
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
            "cut tiles of the model's size, or use `evaluate --fit resize`",
        )),
    }
}

/// The middle square brought to `side`, antialiased. Cut first: the whole of a long image would be as large as its shape.
fn middle(image: &RgbImage, side: u32) -> RgbImage {
    let (width, height) = image.dimensions();
    let shorter = width.min(height);
    let (left, top) = ((width - shorter) / 2, (height - shorter) / 2);
    let square = imageops::crop_imm(image, left, top, shorter, shorter).to_image();
    // The triangle filter widens with the reduction: bilinear with antialiasing.
    imageops::resize(&square, side, side, FilterType::Triangle)
}

/// Upper left corners of tiles side by side, row by row; what is left over at the right and the bottom has none.
pub(super) fn whole_tiles(image: &RgbImage, side: u32) -> Vec<(u32, u32)> {
    let (columns, rows) = (image.width() / side, image.height() / side);
    (0..rows).flat_map(|row| (0..columns).map(move |column| (column * side, row * side))).collect()
}

/// The pixels of a tile; what lies outside the image is white, as beside a slide.
pub(super) fn cut(image: &RgbImage, (x, y): (u32, u32), side: u32) -> Vec<u8> {
    let part = imageops::crop_imm(image, x, y, side, side).to_image();
    if part.dimensions() == (side, side) {
        return part.into_raw();
    }
    let mut tile = RgbImage::from_pixel(side, side, WHITE);
    imageops::replace(&mut tile, &part, 0, 0);
    tile.into_raw()
}

/// Whether an image of that size is less than a tile wide or high, so that it is filled up with white to be segmented.
pub(super) fn is_padded((width, height): (u32, u32), side: u32) -> bool {
    width < side || height < side
}

/// What is said of the images that were filled up; `None` of none.
pub(super) fn about_padded(paths: &[String], side: u32) -> Option<String> {
    let (count, first) = (paths.len(), paths.first()?);
    Some(format!(
        "Images smaller than a tile of {side} × {side} px were filled up with white for the model: {count}, such as {first}."
    ))
}

/// The probabilities of an image's pixels.
pub(super) struct ScoreMap {
    pub(super) width: u32,
    pub(super) height: u32,
    pub(super) classes: usize,
    /// Whether a pixel has just one of the classes, or may have none.
    is_exclusive: bool,
    /// Sums over the tiles that cover a pixel, `[class, row, column]`.
    sums: Vec<f32>,
    /// How many tiles cover a pixel, `[row, column]`.
    tiles: Vec<u16>,
    /// Tiles that were predicted.
    pub(super) tile_count: u64,
}

impl ScoreMap {
    /// The most probable class of a pixel, which is given by its index in `[row, column]`; `None` where a score is NaN, and
    /// where classes do not exclude each other and none is as likely as not, as in a run.
    pub(super) fn class_at(&self, pixel: usize) -> Option<usize> {
        // The greatest sum is the greatest mean too.
        let sums: Vec<f32> = (0..self.classes).map(|class| self.sums[class * self.tiles.len() + pixel]).collect();
        predicted_class(&sums).filter(|class| self.is_exclusive || self.probability(*class, pixel) >= HALF)
    }

    /// Whether the model gave a number everywhere.
    pub(super) fn is_complete(&self) -> bool {
        !self.sums.iter().any(|sum| sum.is_nan())
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

/// Segments an image by tiles that overlap as the card says, the last of a row or column shifted to end with the image. An
/// image smaller than a tile is filled up with white at the right and the bottom; the map has the image's own size.
pub(super) fn segment(
    image: &RgbImage,
    path: &Path,
    card: &ModelCard,
    session: &mut dyn Session,
    batch: usize,
) -> Result<ScoreMap, ExperimentError> {
    let (width, height, side) = (image.width(), image.height(), card.tile_size);
    let step = side - card.overlap;
    let corners: Vec<(u32, u32)> =
        starts(height, side, step).flat_map(|y| starts(width, side, step).map(move |x| (x, y))).collect();
    let (pixels, classes) = (width as usize * height as usize, card.classes.len());
    let (sums, tiles, tile_count) = (vec![0.0; classes * pixels], vec![0; pixels], corners.len() as u64);
    let mut map = ScoreMap { width, height, classes, is_exclusive: card.is_exclusive(), sums, tiles, tile_count };
    for corners in corners.chunks(batch) {
        let tiles: Vec<Vec<u8>> = corners.iter().map(|corner| cut(image, *corner, side)).collect();
        let tiles: Vec<&[u8]> = tiles.iter().map(Vec::as_slice).collect();
        let Prediction::Map(maps) = session.predict(&tiles)? else { return Err(other_task(path)) };
        let inside = s![.., .., ..side.min(height) as usize, ..side.min(width) as usize];
        for ((x, y), scores) in corners.iter().zip(maps.slice(inside).axis_iter(Axis(0))) {
            for ((class, row, column), value) in scores.indexed_iter() {
                let at = (*y as usize + row) * width as usize + *x as usize + column;
                map.sums[class * pixels + at] += value;
                map.tiles[at] += u16::from(class == 0);
            }
        }
    }
    Ok(map)
}

/// Where tiles begin along a side, the last one at its end; of a side shorter than a tile at its start alone.
fn starts(length: u32, side: u32, step: u32) -> impl Iterator<Item = u32> {
    let last = length.saturating_sub(side);
    (0..last).step_by(step as usize).chain([last])
}

/// Scores of the tiles of a batch, `[tiles, classes]`; none of a model that does not classify.
pub(super) fn classify(tiles: &[&[u8]], session: &mut dyn Session) -> Result<Vec<Vec<f32>>, SessionError> {
    Ok(match session.predict(tiles)? {
        Prediction::Classes(scores) => scores.outer_iter().map(|row| row.to_vec()).collect(),
        Prediction::Map(_) | Prediction::Features(_) => Vec::new(),
    })
}

/// The class that scores stand for: the most probable one, of a model with one class that class from one half on; `None`
/// for neither, and for NaN.
pub(super) fn decided(scores: &[f32]) -> Option<usize> {
    predicted_class(scores).filter(|_| scores.len() > 1 || scores[0] >= HALF)
}

/// An image that is left out, and why.
pub(super) fn failed_image(path: &Path, error: &ExperimentError) -> FailedImage {
    let text = error.chain();
    let path = path.display().to_string();
    let reason = text.strip_prefix(&format!("{path}: ")).unwrap_or(&text).to_owned();
    FailedImage { path, reason, hint: error.hint() }
}

/// Whether scores can be probabilities; what is no number may be anything.
pub(super) fn are_probabilities<'a>(card: &ModelCard, mut scores: impl Iterator<Item = &'a f32>) -> bool {
    card.activation != Activation::None || scores.all(|score| score.is_nan() || (0.0..=1.0).contains(score))
}

/// Whether an error says that one image, or its mask, is not as it should be, so that others may go on.
pub(super) fn is_about_one_image(error: &ExperimentError) -> bool {
    matches!(
        error,
        ExperimentError::Image { .. }
            | ExperimentError::DamagedImage { .. }
            | ExperimentError::Unsuited { .. }
            | ExperimentError::Labels { .. }
    )
}

/// That an image has no tile to be classified.
pub(super) fn too_small(path: &Path, image: &RgbImage, side: u32) -> ExperimentError {
    let (width, height) = image.dimensions();
    let reason = format!("is {width} × {height} px, less than a tile of {side} × {side}");
    unsuited(path, reason, "give images of the model's resolution, at least as large as its tile")
}

pub(super) fn unsuited(path: &Path, reason: String, hint: impl Into<Cow<'static, str>>) -> ExperimentError {
    ExperimentError::Unsuited { path: path.to_owned(), reason, hint: hint.into() }
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
        assert_eq!(starts(255, 256, 192).collect::<Vec<_>>(), [0]);
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
    }

    #[test]
    fn an_image_smaller_than_a_tile_is_filled_up_with_white() {
        let tile = cut(&gradient(2, 3), (0, 0), 4);
        assert_eq!(tile[..12], [10, 20, 30, 11, 20, 30, 255, 255, 255, 255, 255, 255]);
        assert_eq!((tile.len(), &tile[36..]), (48, &[255; 12][..]));
        for (width, height, tiles) in [(2, 3, 1), (10, 3, 3), (3, 7, 2)] {
            let image = gradient(width, height);
            let mut session = FakeSession::new(Task::Segmentation, 4);
            let map = segment(&image, Path::new("a.png"), &card(4, 1), &mut session, 2).unwrap();
            assert_eq!((map.width, map.height, map.tile_count), (width, height, tiles));
            for (pixel, rgb) in image.pixels().enumerate() {
                let sum: f32 = rgb.0.iter().map(|value| f32::from(*value)).sum();
                assert!((map.probability(0, pixel) - f32::from(rgb.0[0]) / sum).abs() < 1e-6);
            }
        }
        assert_eq!((is_padded((4, 4), 4), is_padded((9, 3), 4), is_padded((3, 9), 4)), (false, true, true));
        let told = about_padded(&["a.png".to_owned(), "b.png".to_owned()], 4).unwrap();
        assert!(told.contains("4 × 4 px were filled up") && told.ends_with(": 2, such as a.png."), "{told}");
        assert_eq!(about_padded(&[], 4), None);
    }

    /// Says how many tiles it has met, by class.
    struct Counting(f32);

    impl Session for Counting {
        fn predict(&mut self, tiles: &[&[u8]]) -> Result<Prediction, SessionError> {
            let maps = tiles.iter().flat_map(|_| {
                self.0 += 1.0;
                [vec![self.0; 16], vec![-self.0; 16]].concat()
            });
            Ok(Prediction::Map(ndarray::Array4::from_shape_vec((tiles.len(), 2, 4, 4), maps.collect()).unwrap()))
        }
    }

    #[test]
    fn overlapping_tiles_are_averaged() {
        let two = ModelCard { classes: card(4, 1).classes[..2].to_vec(), ..card(4, 1) };
        let map = segment(&gradient(7, 4), Path::new("a.png"), &two, &mut Counting(0.0), 2).unwrap();
        let row: Vec<f32> = (0..7).map(|pixel| map.probability(0, pixel)).collect();
        assert_eq!((row, map.probability(1, 3)), (vec![1.0, 1.0, 1.0, 1.5, 2.0, 2.0, 2.0], -1.5));
        assert!(map.is_complete());
    }

    #[test]
    fn classes_that_exclude_no_other_need_one_half() {
        let map = |is_exclusive, sums: &[f32]| ScoreMap {
            width: 1,
            height: 1,
            classes: sums.len(),
            is_exclusive,
            sums: sums.to_vec(),
            tiles: vec![2],
            tile_count: 2,
        };
        assert_eq!((map(true, &[0.2, 0.8]).class_at(0), map(false, &[0.2, 0.8]).class_at(0)), (Some(1), None));
        assert_eq!((map(false, &[1.0]).class_at(0), map(false, &[0.9]).class_at(0)), (Some(0), None));
        let broken = map(false, &[f32::NAN, 1.8]);
        assert_eq!((broken.class_at(0), broken.is_complete()), (None, false));
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
        assert_eq!(fitted, [100; 48]);
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
        std::fs::write(at("MORE.TXT"), "").unwrap();
        std::fs::write(at("Makefile"), "").unwrap();
        std::fs::create_dir(at("c.png")).unwrap();
        let found = in_folder(folder.path()).unwrap();
        assert_eq!(found.images, [at("a.tif"), at("b.TIF")]);
        let told = about_others(&by_extension(&found.others)).unwrap();
        assert_eq!(
            told,
            "Files that are not png, jpg, jpeg, bmp, tif, tiff or webp were left out: 3 (1 without extension, 2 txt)."
        );
        assert_eq!(about_others(&by_extension(&[])), None);
        assert_eq!(pixels(&at("b.TIF")).unwrap(), pixels(&at("a.tif")).unwrap());
        std::fs::write(at("notes.txt"), "no picture").unwrap();
        assert!(matches!(pixels(&at("notes.txt")), Err(ExperimentError::Image { .. })));
    }

    #[cfg(unix)]
    #[test]
    fn a_link_to_nothing_is_an_image_by_its_name() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["a.png", "b.txt"] {
            std::os::unix::fs::symlink("none", folder.path().join(name)).unwrap();
        }
        let found = in_folder(folder.path()).unwrap();
        assert_eq!(
            (found.images, found.others),
            (vec![folder.path().join("a.png")], vec![folder.path().join("b.txt")])
        );
    }
}
