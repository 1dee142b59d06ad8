//! The slide: what it is, how sharp it is, and its pixels.
//!
//! [`Slide`] is what can be known without decoding a pixel and keeps no file open, so it can be copied to every worker.
//! Pixels come from a [`TileReader`], one per worker, at the resolution that [`level::choose`] settled on, or as a
//! whole from [`Slide::thumbnail`]. Two readers decode them: OpenSlide, which reads every format, and our own for tiled
//! TIFF, which is several times as fast ([`Reader`]). All positions are level-0 pixels. Nothing here knows models,
//! threads or tissue.

mod container;
mod dicom;
mod discover;
mod error;
mod icc;
pub mod level;
mod native;
mod openslide;
mod reader;
mod resample;
mod source;
pub mod synthetic;
mod thumbnail;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use image::RgbImage;
use openslide_rs::OpenSlide;

use self::container::Container;
pub use self::discover::{Discovery, discover};
pub use self::error::{DecodeError, SlideError};
pub use self::level::{LevelChoice, Resample};
pub use self::native::TileError;
#[cfg(fuzzing)]
pub use self::native::hostile;
use self::native::pyramid::{Dialect, Pyramid};
pub use self::reader::{ReadOptions, TileReader};
pub use self::source::ReadMemory;
pub use self::thumbnail::Thumbnail;
use crate::geometry::{Level, Level0Rect, Mpp, PixelSize};

/// Microns per pixel outside of which no slide scanner works.
const BELIEVABLE_MPP: std::ops::RangeInclusive<f64> = 0.01..=100.0;

/// Longest believable side of a slide in pixels: 2.5 m at 0.25 µm.
const MAX_SIDE: u32 = 10_000_000;

/// A whole-slide image: its metadata.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Slide {
    /// The file that was opened.
    pub path: PathBuf,
    /// OpenSlide's name of the format, such as `aperio`; `ome-tiff` is ours.
    pub vendor: String,
    /// The pyramid, finest first; at least one level.
    pub levels: Vec<LevelInfo>,
    /// Everything the file says about itself, as text.
    pub properties: BTreeMap<String, String>,
    /// Names of the associated images, such as `label`.
    pub associated_images: Vec<String>,
    /// Magnification of the objective, if known; never computed with.
    pub objective_power: Option<f64>,
    /// The colour of what was not scanned, RGB; white if the file doesn't say.
    pub background: [u8; 3],
    /// How level 0 is compressed, if known.
    pub compression: Option<String>,
    /// Who decodes the pixels.
    pub reader: Reader,
    /// Why this reader, in words.
    pub reader_reason: String,
    /// What the native reader knows of the file, if it is the one.
    native: Option<Arc<Pyramid>>,
}

/// Who decodes a slide's pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reader {
    /// OpenSlide, for every format that it knows.
    OpenSlide,
    /// Our own, for tiled TIFF: Aperio SVS, OME-TIFF and plain pyramids of JPEG, deflate, LZW or uncompressed tiles.
    Native,
}

impl Reader {
    /// The word in settings and records.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::OpenSlide => "openslide",
            Self::Native => "native",
        }
    }
}

impl FromStr for Reader {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let known = [Self::OpenSlide, Self::Native].into_iter().find(|reader| reader.as_str() == text);
        known.ok_or_else(|| format!("{text:?} is no reader: auto, openslide or native"))
    }
}

/// One level of the pyramid.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LevelInfo {
    /// Width in pixels.
    pub width: u32,
    /// Height in pixels.
    pub height: u32,
    /// Level-0 pixels per pixel along x, finite and at least 1.
    pub downsample_x: f64,
    /// Level-0 pixels per pixel along y.
    pub downsample_y: f64,
    /// OpenSlide's own downsample, by which it turns level-0 positions into those of the level.
    pub openslide_downsample: f64,
    /// Width and height of the file's compression tiles, if known.
    pub native_tile: Option<(u32, u32)>,
}

impl Slide {
    /// Opens the slide at `path` and reads its metadata; `reader` decodes its pixels.
    ///
    /// `None` takes the native reader where a handful of its tiles agree with OpenSlide's, or where OpenSlide does not
    /// know the file at all, and OpenSlide otherwise.
    ///
    /// # Errors
    /// [`SlideError`] if the file is missing, is no slide, is cut off or contradicts itself, or if the native reader was
    /// asked for and can't read it right.
    pub fn open(path: impl AsRef<Path>, reader: Option<Reader>) -> Result<Self, SlideError> {
        let path = path.as_ref();
        let mut slide = match Self::open_by_openslide(path) {
            Ok(slide) => slide,
            // No format of OpenSlide's: perhaps one of ours.
            Err(error @ SlideError::NotASlide { .. }) if reader != Some(Reader::OpenSlide) => {
                return match (native::pyramid_of(path).and_then(Pyramid::without_openslide), reader) {
                    (Ok(pyramid), _) => Self::of_pyramid(path, pyramid),
                    (Err(reason), Some(_)) => Err(not_native(path, &reason)),
                    (Err(_), None) => Err(error),
                };
            }
            Err(error) => return Err(error),
        };
        match reader {
            Some(Reader::OpenSlide) => "it was asked for".clone_into(&mut slide.reader_reason),
            Some(Reader::Native) => {
                slide = slide.read_natively().map_err(|(slide, reason)| not_native(&slide.path, &reason))?;
            }
            None => {
                slide = slide.read_natively().unwrap_or_else(|(slide, reason)| Self { reader_reason: reason, ..*slide })
            }
        }
        Ok(slide)
    }

    fn open_by_openslide(path: &Path) -> Result<Self, SlideError> {
        let openslide = openslide::open(path)?;
        let part = |part: &str| {
            let (path, part) = (path.to_owned(), part.to_owned());
            move |source| SlideError::Part { path, part, source }
        };
        let names = openslide.property_names().map_err(part("the list of properties"))?;
        let properties: BTreeMap<String, String> =
            names.into_iter().filter_map(|name| Some((name.clone(), openslide.property_value(&name).ok()?))).collect();
        let associated_images = openslide.associated_image_names().map_err(part("the list of associated images"))?;
        let text = |name: &str| properties.get(name).map(String::as_str);
        let tile =
            |index: usize, side: &str| properties.get(&format!("openslide.level[{index}].tile-{side}"))?.parse().ok();
        let sizes = openslide.all_level_dimensions().iter().zip(openslide.all_level_downsamples());
        let levels = sizes.enumerate().map(|(index, (size, downsample))| {
            (size.w, size.h, *downsample, tile(index, "width").zip(tile(index, "height")))
        });
        Ok(Self {
            path: path.to_owned(),
            vendor: text("openslide.vendor").unwrap_or("unknown").to_owned(),
            levels: checked_levels(path, levels)?,
            associated_images,
            objective_power: text("openslide.objective-power").and_then(|power| power.trim().parse().ok()),
            background: text("openslide.background-color").and_then(parse_rgb).unwrap_or([u8::MAX; 3]),
            compression: compression(path, &properties),
            properties,
            reader: Reader::OpenSlide,
            reader_reason: String::new(),
            native: None,
        })
    }

    /// The same slide read by the native reader; itself with the reason if that would not read it right.
    fn read_natively(self) -> Result<Self, (Box<Self>, String)> {
        let mut pyramid = match native::pyramid_of(&self.path) {
            Ok(pyramid) => pyramid,
            Err(error) => return Err((Box::new(self), error.to_string())),
        };
        let theirs: Vec<(u32, u32)> = self.levels.iter().map(|level| (level.width, level.height)).collect();
        pyramid.crop(&theirs);
        let ours: Vec<(u32, u32)> = pyramid.levels.iter().map(|level| (level.width, level.height)).collect();
        // Of an OME-TIFF OpenSlide sees the first level alone: the others lie in sub-directories.
        let knows_more = pyramid.dialect == Dialect::Ome && ours.len() > 1 && theirs[..] == ours[..1];
        let native = if theirs == ours {
            Self { reader: Reader::Native, native: Some(Arc::new(pyramid)), ..self.clone() }
        } else if knows_more {
            match Self::of_pyramid(&self.path, pyramid) {
                Ok(native) => native,
                Err(error) => return Err((Box::new(self), error.to_string())),
            }
        } else {
            return Err((Box::new(self), "its levels are not those that OpenSlide finds".to_owned()));
        };
        match native::agreement::check(&self, &native) {
            Ok(found) => {
                let (tiles, most) = (found.tiles, found.max_difference);
                let more = if knows_more { ", which sees only the first level," } else { "" };
                let reader_reason =
                    format!("{tiles} of its tiles differ from OpenSlide's{more} by at most {most} of 255");
                Ok(Self { reader_reason, ..native })
            }
            Err(reason) => Err((Box::new(self), reason)),
        }
    }

    /// A slide that OpenSlide does not know. Its resolution goes by the names of OpenSlide's properties.
    fn of_pyramid(path: &Path, pyramid: Pyramid) -> Result<Self, SlideError> {
        let first = pyramid.levels.first().map_or((0, 0), |level| (level.width, level.height));
        let levels = pyramid.levels.iter().map(|level| {
            let ratio = |level0: u32, level: u32| f64::from(level0) / f64::from(level);
            let downsample = f64::midpoint(ratio(first.0, level.width), ratio(first.1, level.height));
            (level.width, level.height, downsample, Some((level.tile_width, level.tile_height)))
        });
        let mut properties = BTreeMap::from([("tiff.ImageDescription".to_owned(), pyramid.description.clone())]);
        if let Some((x, y)) = pyramid.mpp {
            properties.insert("openslide.mpp-x".to_owned(), x.to_string());
            properties.insert("openslide.mpp-y".to_owned(), y.to_string());
        }
        Ok(Self {
            path: path.to_owned(),
            vendor: pyramid.dialect.as_str().to_owned(),
            levels: checked_levels(path, levels)?,
            associated_images: Vec::new(),
            objective_power: None,
            background: [u8::MAX; 3],
            compression: compression(path, &properties),
            properties,
            reader: Reader::Native,
            reader_reason: "OpenSlide does not know this file".to_owned(),
            native: Some(Arc::new(pyramid)),
        })
    }

    /// The whole of level 0.
    #[must_use]
    pub fn extent(&self) -> Level0Rect {
        let (width, height) = self.levels.first().map_or((0, 0), |level| (level.width, level.height));
        Level0Rect { x: 0, y: 0, width: i64::from(width), height: i64::from(height) }
    }

    /// The part of level 0 that was scanned: the whole, unless the file says otherwise (MIRAX does).
    #[must_use]
    pub fn bounds(&self) -> Level0Rect {
        let number = |name: &str| self.properties.get(&format!("openslide.bounds-{name}"))?.parse::<u32>().ok();
        let extent = self.extent();
        let bounds = (|| {
            let (x, y) = (i64::from(number("x")?), i64::from(number("y")?));
            Level0Rect { x, y, width: number("width")?.into(), height: number("height")?.into() }.intersection(extent)
        })();
        bounds.unwrap_or(extent)
    }

    /// The size of a level-0 pixel: `slide_mpp` if given, else what the file says, x and y kept apart.
    ///
    /// # Errors
    /// [`SlideError`] if nothing tells the resolution, or what does is not believable. It is never guessed from the
    /// magnification.
    pub fn pixel_size(&self, slide_mpp: Option<PixelSize>) -> Result<PixelSize, SlideError> {
        if let Some(given) = slide_mpp {
            return Ok(PixelSize {
                x: self.believable("slide_mpp", &given.x.to_string())?,
                y: self.believable("slide_mpp", &given.y.to_string())?,
            });
        }
        // Read as text: openslide-rs parses to f32 and drops what it can't parse.
        let [x, y] = ["openslide.mpp-x", "openslide.mpp-y"].map(|name| (name, self.properties.get(name)));
        match (x, y) {
            ((x_name, Some(x)), (y_name, Some(y))) => {
                Ok(PixelSize { x: self.believable(x_name, x)?, y: self.believable(y_name, y)? })
            }
            ((name, Some(one)), (_, None)) | ((_, None), (name, Some(one))) => {
                Ok(PixelSize::square(self.believable(name, one)?))
            }
            // An Aperio file whose text isn't a number keeps it here, and has no openslide.mpp-x.
            _ => match self.properties.get("aperio.MPP") {
                Some(text) => Ok(PixelSize::square(self.believable("aperio.MPP", text)?)),
                None => Err(SlideError::MissingMpp { path: self.path.clone(), objective_power: self.objective_power }),
            },
        }
    }

    /// Decodes an associated image, composited over white.
    ///
    /// # Errors
    /// [`SlideError`] if there is none of that name or it can't be decoded.
    pub fn associated_image(&self, name: &str) -> Result<RgbImage, SlideError> {
        let unknown = || SlideError::NoAssociatedImage { path: self.path.clone(), name: name.to_owned() };
        if !self.associated_images.iter().any(|known| known == name) {
            return Err(unknown());
        }
        let (size, bgra) = openslide::open(&self.path)?.read_associated_buffer(name).map_err(|source| {
            SlideError::Part { path: self.path.clone(), part: format!("the associated image {name:?}"), source }
        })?;
        let mut rgb = vec![0; bgra.len() / 4 * 3];
        openslide::composite(&bgra, [u8::MAX; 3], &mut rgb);
        RgbImage::from_raw(size.w, size.h, rgb).ok_or_else(unknown)
    }

    /// The bytes of the ICC profile of the levels, `None` if the file has none.
    ///
    /// # Errors
    /// [`SlideError`] if the file can't be opened any more or the profile not be read.
    pub fn icc_profile(&self) -> Result<Option<Vec<u8>>, SlideError> {
        if let Some(pyramid) = &self.native {
            return Ok(pyramid.icc_profile.clone());
        }
        openslide::open(&self.path)?.icc_profile().map_err(|source| SlideError::Part {
            path: self.path.clone(),
            part: "the ICC profile".to_owned(),
            source,
        })
    }

    fn believable(&self, property: &'static str, text: &str) -> Result<Mpp, SlideError> {
        text.parse().ok().filter(|mpp: &Mpp| BELIEVABLE_MPP.contains(&mpp.get())).ok_or_else(|| {
            SlideError::InvalidMpp {
                path: self.path.clone(),
                property,
                value: text.to_owned(),
                objective_power: self.objective_power,
            }
        })
    }
}

/// The name of the format of `path`, `None` if it is no slide; no pixel is decoded.
#[must_use]
pub fn detect(path: impl AsRef<Path>) -> Option<String> {
    let path = path.as_ref();
    // Opening a pipe would wait for its other end.
    crate::native::openslide().ok().filter(|_| path.is_file())?;
    let by_us =
        || Some(native::pyramid_of(path).and_then(Pyramid::without_openslide).ok()?.dialect.as_str().to_owned());
    OpenSlide::detect_vendor(path).ok().or_else(by_us)
}

fn not_native(path: &Path, reason: &impl ToString) -> SlideError {
    SlideError::NotNative { path: path.to_owned(), reason: reason.to_string() }
}

/// Width, height, downsample by OpenSlide's formula, and native tile of a level.
type FoundLevel = (u32, u32, f64, Option<(u32, u32)>);

fn checked_levels(path: &Path, found: impl Iterator<Item = FoundLevel>) -> Result<Vec<LevelInfo>, SlideError> {
    let mut levels: Vec<LevelInfo> = Vec::new();
    for (index, (width, height, downsample, native_tile)) in (0..).zip(found) {
        let first = levels.first().map_or((width, height), |first| (first.width, first.height));
        let is_sound = (1..=MAX_SIDE.min(first.0)).contains(&width) && (1..=MAX_SIDE.min(first.1)).contains(&height);
        if !is_sound || !downsample.is_finite() || downsample < 1.0 {
            return Err(SlideError::AbsurdLevel { path: path.to_owned(), level: Level(index), width, height });
        }
        let (downsample_x, downsample_y) = axis_downsamples(first, (width, height), downsample);
        let openslide_downsample = downsample;
        levels.push(LevelInfo { width, height, downsample_x, downsample_y, openslide_downsample, native_tile });
    }
    if levels.is_empty() {
        return Err(SlideError::AbsurdLevel { path: path.to_owned(), level: Level(0), width: 0, height: 0 });
    }
    Ok(levels)
}

/// The downsample of each axis: OpenSlide's for both, unless the level is truly scaled unevenly.
///
/// OpenSlide takes the mean of both axes' ratios. Where they differ only because the level's size was rounded to whole
/// pixels, its value is kept, so that a tile is the one that everybody else reads at that position.
fn axis_downsamples(level0: (u32, u32), level: (u32, u32), openslide: f64) -> (f64, f64) {
    let ratio = |level0: u32, level: u32| f64::from(level0) / f64::from(level);
    let rounding = |level: u32| openslide / f64::from(level);
    let (x, y) = (ratio(level0.0, level.0), ratio(level0.1, level.1));
    let is_rounding = (x - y).abs() <= 2.0 * (rounding(level.0) + rounding(level.1));
    if is_rounding { (openslide, openslide) } else { (x, y) }
}

fn parse_rgb(hex: &str) -> Option<[u8; 3]> {
    let value = u32::from_str_radix(hex, 16).ok().filter(|_| hex.len() == 6)?;
    let [_, red, green, blue] = value.to_be_bytes();
    Some([red, green, blue])
}

fn compression(path: &Path, properties: &BTreeMap<String, String>) -> Option<String> {
    match container::inspect(path).ok()? {
        Container::Tiff { compression } => compression,
        Container::Dicom => Some(
            match properties.get("dicom.TransferSyntaxUID")?.as_str() {
                "1.2.840.10008.1.2" | "1.2.840.10008.1.2.1" => "none",
                "1.2.840.10008.1.2.4.50" => "JPEG",
                "1.2.840.10008.1.2.4.90" | "1.2.840.10008.1.2.4.91" => "JPEG 2000",
                other => other,
            }
            .to_owned(),
        ),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use flate2::write::ZlibEncoder;

    use super::native::tiff_builder::{TiffBuilder, Values, rgb_image, with};
    use super::synthetic::{SvsOptions, SyntheticSlide};
    use super::*;

    fn slide_with(properties: &[(&str, &str)]) -> Slide {
        let properties = properties.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        Slide {
            path: "case-7.svs".into(),
            vendor: "aperio".to_owned(),
            levels: vec![LevelInfo {
                width: 1000,
                height: 800,
                downsample_x: 1.0,
                downsample_y: 1.0,
                openslide_downsample: 1.0,
                native_tile: None,
            }],
            properties,
            associated_images: Vec::new(),
            objective_power: Some(20.0),
            background: [255; 3],
            compression: None,
            reader: Reader::OpenSlide,
            reader_reason: String::new(),
            native: None,
        }
    }

    #[test]
    fn nonsensical_resolutions_are_refused_with_their_text() {
        for text in ["0", "-0.25", "NaN", "inf", "0,25", "", "20x", "1e300", "352.77", "0.0005"] {
            let error = slide_with(&[("openslide.mpp-x", text), ("openslide.mpp-y", "0.25")]).pixel_size(None);
            let error = error.unwrap_err();
            assert!(matches!(&error, SlideError::InvalidMpp { value, .. } if value == text), "{text:?}: {error}");
            assert!(error.hint().unwrap().contains("`slide_mpp`"));
        }
    }

    #[test]
    fn resolution_comes_from_the_setting_then_the_file_axis_by_axis() {
        let mpp = |value| Mpp::new(value).unwrap();
        let slide = slide_with(&[("openslide.mpp-x", "0.2498"), ("openslide.mpp-y", "0.2512")]);
        assert_eq!(slide.pixel_size(None).unwrap(), PixelSize { x: mpp(0.2498), y: mpp(0.2512) });
        let given = PixelSize::square(mpp(0.5));
        assert_eq!(slide.pixel_size(Some(given)).unwrap(), given);
        assert!(slide.pixel_size(Some(PixelSize::square(mpp(500.0)))).is_err());
        let one_axis = slide_with(&[("openslide.mpp-y", "0.25")]).pixel_size(None).unwrap();
        assert_eq!(one_axis, PixelSize::square(mpp(0.25)));
        let missing = slide_with(&[]).pixel_size(None).unwrap_err();
        assert_eq!(missing.to_string(), "case-7.svs: no resolution (mpp) in the metadata");
        assert!(missing.hint().unwrap().contains("about 0.50"));
        let text = slide_with(&[("aperio.MPP", "unknown")]).pixel_size(None).unwrap_err();
        assert!(text.to_string().contains("aperio.MPP is \"unknown\""), "{text}");
    }

    #[test]
    fn the_native_reader_is_taken_where_it_agrees_and_refused_where_it_does_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.svs");
        SyntheticSlide::new(900, 600, 1).write(&path, &SvsOptions::default()).unwrap();
        let auto = Slide::open(&path, None).unwrap();
        assert_eq!(auto.reader, Reader::Native);
        assert!(auto.reader_reason.contains("differ from OpenSlide's by at most"), "{}", auto.reader_reason);
        let asked = Slide::open(&path, Some(Reader::OpenSlide)).unwrap();
        assert_eq!((asked.reader, asked.native.is_none()), (Reader::OpenSlide, true));
        assert_eq!(detect(&path).as_deref(), Some("aperio"));
        // No TIFF at all: OpenSlide's own message, whoever was to read it, unless that is us.
        let text = folder.path().join("notes.txt");
        std::fs::write(&text, "no slide").unwrap();
        assert!(matches!(Slide::open(&text, None), Err(SlideError::NotASlide { .. })));
        let error = Slide::open(&text, Some(Reader::Native)).unwrap_err();
        assert!(matches!(error, SlideError::NotNative { .. }) && error.hint().is_some(), "{error}");
        assert_eq!(detect(&text), None);
    }

    #[test]
    fn a_pyramid_that_only_we_know_has_its_metadata_and_pixels() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.ome.tif");
        let xml = "<OME><Image><Pixels PhysicalSizeX=\"0.25\" PhysicalSizeY=\"0.25\"/></Image></OME>";
        let mut tiff = TiffBuilder::new(false, false);
        let mut encoder = ZlibEncoder::new(Vec::new(), flate2::Compression::default());
        encoder.write_all(&[[10, 20, 30]; 256].concat()).unwrap();
        let deflated = encoder.finish().unwrap();
        let tile = (tiff.data(&deflated), u32::try_from(deflated.len()).unwrap());
        let child = rgb_image((32, 16), 16, (8, 1), &[tile; 2]);
        let (child, _) = tiff.loose_directory(&child);
        let base = rgb_image((64, 32), 16, (8, 1), &[tile; 8]);
        let base = with(with(base, 270, Values::Text(xml)), 330, Values::Long(vec![child]));
        tiff.directory(&base);
        std::fs::write(&path, tiff.finish()).unwrap();
        let slide = Slide::open(&path, None).unwrap();
        assert_eq!((slide.vendor.as_str(), slide.reader), ("ome-tiff", Reader::Native), "{}", slide.reader_reason);
        assert!(detect(&path).is_some());
        assert_eq!(
            slide.levels.iter().map(|level| (level.width, level.height)).collect::<Vec<_>>(),
            [(64, 32), (32, 16)]
        );
        assert_eq!(slide.pixel_size(None).unwrap(), PixelSize::square(Mpp::new(0.25).unwrap()));
        let thumbnail = slide.thumbnail(32).unwrap();
        assert_eq!(thumbnail.level, Level(1));
        assert!(thumbnail.image.pixels().all(|pixel| pixel.0 == [10, 20, 30]));
        assert!(slide.associated_images.is_empty() && slide.icc_profile().unwrap().is_none());
    }

    #[test]
    fn bounds_stay_within_the_slide() {
        let bounds = |x, width| {
            slide_with(&[
                ("openslide.bounds-x", x),
                ("openslide.bounds-y", "10"),
                ("openslide.bounds-width", width),
                ("openslide.bounds-height", "100"),
            ])
            .bounds()
        };
        assert_eq!(bounds("20", "300"), Level0Rect { x: 20, y: 10, width: 300, height: 100 });
        assert_eq!(bounds("900", "300"), Level0Rect { x: 900, y: 10, width: 100, height: 100 });
        let extent = Level0Rect { x: 0, y: 0, width: 1000, height: 800 };
        assert_eq!(bounds("2000", "300"), extent);
        assert_eq!(bounds("-5", "300"), extent);
    }

    #[test]
    fn rounded_level_sizes_keep_one_downsample() {
        // 2220 x 2967 at a quarter: 555 and 741.75, stored as 741.
        let mean = f64::midpoint(4.0, 2967.0 / 741.0);
        assert_eq!(axis_downsamples((2220, 2967), (555, 741), mean), (mean, mean));
        // Halved along x only.
        assert_eq!(axis_downsamples((2000, 3000), (1000, 3000), 1.5), (2.0, 1.0));
    }

    #[test]
    fn colours_are_six_hex_digits() {
        assert_eq!(parse_rgb("FFf0E0"), Some([255, 240, 224]));
        for bad in ["", "FFF", "GG0000", "FFFFFF00", "é0000"] {
            assert_eq!(parse_rgb(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn files_that_are_no_slide_say_why() {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str, content: &[u8]| {
            let path = folder.path().join(name);
            std::fs::write(&path, content).unwrap();
            path
        };
        let open = |path: &Path| Slide::open(path, None).unwrap_err();
        assert!(matches!(open(&folder.path().join("none.svs")), SlideError::NotFound { .. }));
        assert!(matches!(open(folder.path()), SlideError::IsDirectory { .. }));
        for (name, content, found) in [
            ("empty.svs", &b""[..], "an empty file"),
            ("text.svs", b"slide,mpp\n", "a text file"),
            ("photo.svs", b"\xff\xd8\xff\xe0", "a JPEG image"),
        ] {
            let error = open(&file(name, content));
            assert!(error.to_string().ends_with(&format!("({found})")), "{error}");
        }
        let path = folder.path().join("whole.svs");
        synthetic::SyntheticSlide::new(600, 400, 1).write(&path, &synthetic::SvsOptions::default()).unwrap();
        assert_eq!(detect(&path).as_deref(), Some("aperio"));
        let whole = std::fs::read(&path).unwrap();
        // Directories come last, so that a cut anywhere loses them; cut within them, it is OpenSlide that tells.
        let cut = open(&file("cut.svs", &whole[..whole.len() / 2]));
        assert!(matches!(cut, SlideError::Truncated { .. }), "{cut}");
        assert!(cut.hint().is_some());
        for missing in [1, 50, 200] {
            open(&file("cut-end.svs", &whole[..whole.len() - missing]));
        }
    }

    #[test]
    fn associated_images_are_read_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.svs");
        synthetic::SyntheticSlide::new(512, 256, 1).write(&path, &synthetic::SvsOptions::default()).unwrap();
        let slide = Slide::open(&path, None).unwrap();
        assert_eq!(slide.associated_images, ["thumbnail"]);
        assert_eq!(slide.associated_image("thumbnail").unwrap().dimensions(), (256, 128));
        assert!(matches!(slide.associated_image("label"), Err(SlideError::NoAssociatedImage { .. })));
        assert_eq!(slide.icc_profile().unwrap(), None);
    }
}
