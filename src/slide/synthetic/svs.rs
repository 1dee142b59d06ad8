//! Writes a synthetic slide as the file of an Aperio scanner, or as a plain pyramidal TIFF.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use flate2::Compression as DeflateLevel;
use flate2::write::ZlibEncoder;
use image::{Rgb, RgbImage};
use jpeg_encoder::{ColorType, Encoder, EncodingError, SamplingFactor};

use super::SyntheticSlide;
use crate::tiff::{Compression, Container, Layout, Page, PageId, Photometric, TiffError, TiffWriter, Value};

/// How a synthetic slide is stored.
#[derive(Clone, Debug, PartialEq)]
pub struct SvsOptions {
    /// Whether it claims to be an Aperio file; otherwise it is a plain TIFF.
    pub is_aperio: bool,
    /// How tiles are compressed.
    pub encoding: Encoding,
    /// JPEG quality, 1 to 100.
    pub quality: u8,
    /// Side of the compression tiles, a multiple of 16.
    pub native_tile: u16,
    /// Downsample of every level, ascending from 1, each a multiple of the one before.
    pub downsamples: Vec<u32>,
    /// What is written as the resolution.
    pub mpp: MppField,
    /// What is written as the objective's magnification; `None` leaves it out.
    pub app_mag: Option<String>,
    /// An ICC profile to embed.
    pub icc_profile: Option<Vec<u8>>,
    /// Level, column and row of compression tiles that are written as garbage.
    pub damaged_tiles: Vec<(u32, u32, u32)>,
}

/// The compression of tiles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    /// JPEG with halved chroma, as most scanners write.
    JpegYcbcr,
    /// JPEG of red, green and blue, as older Aperio scanners write.
    JpegRgb,
    /// Lossless.
    Deflate,
}

/// What a synthetic slide says about its resolution.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MppField {
    /// The truth.
    True,
    /// Nothing.
    Missing,
    /// This text, however nonsensical; in a plain TIFF, which has no text for it, it must be a number.
    Text(String),
}

impl Default for SvsOptions {
    /// An Aperio file with JPEG tiles of 256 px and levels 1, 4, 16 at 20x.
    fn default() -> Self {
        Self {
            is_aperio: true,
            encoding: Encoding::JpegYcbcr,
            quality: 80,
            native_tile: 256,
            downsamples: vec![1, 4, 16],
            mpp: MppField::True,
            app_mag: Some("20".to_owned()),
            icc_profile: None,
            damaged_tiles: Vec::new(),
        }
    }
}

/// Longest side of the thumbnail that Aperio files carry.
const THUMBNAIL_SIDE: u32 = 256;

impl SyntheticSlide {
    /// Writes the slide to `path`.
    ///
    /// Levels that would have no pixel are left out.
    ///
    /// # Errors
    /// [`TiffError`] if the file can't be written, or as invalid input if the options contradict themselves.
    pub fn write(&self, path: &Path, options: &SvsOptions) -> Result<(), TiffError> {
        options.check()?;
        // Far more than any JPEG of it takes.
        let pixels = u64::from(self.width) * u64::from(self.height);
        let container = Container::for_bytes(pixels.saturating_mul(4));
        let tiff = TiffWriter::new(BufWriter::new(File::create(path)?), container)?;
        let mut file = SvsFile { slide: self, options, tiff };
        let base = file.write_level0_and_thumbnail()?;
        file.write_lower_levels(base)?;
        file.tiff.finish()?.flush()?;
        Ok(())
    }
}

impl SvsOptions {
    fn check(&self) -> Result<(), TiffError> {
        let steps = self.downsamples.windows(2);
        let is_pyramid = self.downsamples.first() == Some(&1)
            && steps.clone().all(|step| step[1] > step[0] && step[1].is_multiple_of(step[0]));
        let tile = u32::from(self.native_tile);
        let fits = self.downsamples.get(1).is_none_or(|second| tile.is_multiple_of(*second));
        if is_pyramid && fits && tile > 0 && tile.is_multiple_of(16) {
            return Ok(());
        }
        let problem = "a pyramid starts at 1, every level is a multiple of the one before, and tiles are a multiple of \
                       16 and of the second level";
        Err(std::io::Error::new(std::io::ErrorKind::InvalidInput, problem).into())
    }
}

struct SvsFile<'a> {
    slide: &'a SyntheticSlide,
    options: &'a SvsOptions,
    tiff: TiffWriter<BufWriter<File>>,
}

impl SvsFile<'_> {
    /// Returns level 1, made on the way; empty if there is none.
    fn write_level0_and_thumbnail(&mut self) -> Result<RgbImage, TiffError> {
        let SyntheticSlide { width, height, .. } = *self.slide;
        let side = u32::from(self.options.native_tile);
        let page = self.add_tiled_page(0, width, height);
        if self.options.is_aperio {
            self.write_thumbnail()?;
        }
        let ratio = self.options.downsamples.get(1).copied().unwrap_or(side);
        let mut next = RgbImage::new(width / ratio, height / ratio);
        for (row, y) in (0..height).step_by(side as usize).enumerate() {
            for (col, x) in (0..width).step_by(side as usize).enumerate() {
                let rgb = self.slide.pixels(x, y, side, side);
                let tile = RgbImage::from_raw(side, side, rgb).unwrap_or_default();
                if self.options.downsamples.len() > 1 {
                    shrink_into(&tile, ratio, (x / ratio, y / ratio), &mut next);
                }
                self.append_tile(page, (0, col, row), tile)?;
            }
        }
        Ok(next)
    }

    fn write_lower_levels(&mut self, mut level: RgbImage) -> Result<(), TiffError> {
        let side = u32::from(self.options.native_tile);
        for index in 1..self.options.downsamples.len() {
            let (width, height) = level.dimensions();
            if width == 0 || height == 0 {
                break;
            }
            let page = self.add_tiled_page(index, width, height);
            for (row, y) in (0..height).step_by(side as usize).enumerate() {
                for (col, x) in (0..width).step_by(side as usize).enumerate() {
                    let at = |dx: u32, dy: u32| *level.get_pixel((x + dx).min(width - 1), (y + dy).min(height - 1));
                    self.append_tile(page, (index, col, row), RgbImage::from_fn(side, side, at))?;
                }
            }
            if let Some(following) = self.options.downsamples.get(index + 1) {
                let ratio = following / self.options.downsamples[index];
                let mut next = RgbImage::new(width / ratio, height / ratio);
                shrink_into(&level, ratio, (0, 0), &mut next);
                level = next;
            }
        }
        Ok(())
    }

    fn add_tiled_page(&mut self, level: usize, width: u32, height: u32) -> PageId {
        let SvsOptions { is_aperio, encoding, native_tile, ref icc_profile, .. } = *self.options;
        let side = u32::from(native_tile);
        let mut tags = Vec::new();
        if encoding == Encoding::JpegYcbcr {
            tags.push((530, Value::Short(vec![2, 2])));
        }
        if let Some(profile) = icc_profile.as_ref().filter(|_| level == 0) {
            tags.push((34675, Value::Undefined(profile.clone())));
        }
        let pixels_per_cm = self.mpp_number().filter(|_| !is_aperio).map(|mpp| {
            let downsample = f64::from(self.options.downsamples[level]);
            (10_000.0 / mpp / downsample, 10_000.0 / mpp / downsample)
        });
        self.tiff.add_page(Page {
            width,
            height,
            layout: Layout::Tiles { width: side, height: side },
            samples: 3,
            photometric: encoding.photometric(),
            compression: encoding.compression(),
            is_reduced: level > 0 && !is_aperio,
            description: is_aperio.then(|| self.description(level, width, height)),
            pixels_per_cm,
            tags,
        })
    }

    /// The second page of an Aperio file: strips, so that it is no level.
    fn write_thumbnail(&mut self) -> Result<(), TiffError> {
        let slide = self.slide;
        let step = slide.width.max(slide.height).div_ceil(THUMBNAIL_SIDE).max(1);
        let (width, height) = ((slide.width / step).max(1), (slide.height / step).max(1));
        let pixel = |x: u32, y: u32| {
            let rgb = slide.pixels((x * step).min(slide.width - 1), (y * step).min(slide.height - 1), 1, 1);
            Rgb([rgb[0], rgb[1], rgb[2]])
        };
        let image = RgbImage::from_fn(width, height, pixel);
        let page = self.tiff.add_page(Page {
            width,
            height,
            layout: Layout::Strips { rows: height },
            samples: 3,
            photometric: Photometric::RGB,
            compression: Compression::DEFLATE,
            is_reduced: false,
            description: Some(self.description(usize::MAX, width, height)),
            pixels_per_cm: None,
            tags: Vec::new(),
        });
        let strip = Encoding::Deflate.encode(&image, 0)?;
        self.tiff.append(page, &strip)?;
        Ok(())
    }

    fn append_tile(&mut self, page: PageId, at: (usize, usize, usize), tile: RgbImage) -> Result<(), TiffError> {
        let is_at = |damaged: &&(u32, u32, u32)| (damaged.0 as usize, damaged.1 as usize, damaged.2 as usize) == at;
        if self.options.damaged_tiles.iter().any(|damaged| is_at(&damaged)) {
            self.tiff.append(page, b"this is no image data")?;
        } else {
            self.tiff.append(page, &self.options.encoding.encode(&tile, self.options.quality)?)?;
        }
        Ok(())
    }

    /// Aperio's ImageDescription.
    fn description(&self, level: usize, width: u32, height: u32) -> String {
        let SyntheticSlide { width: full_width, height: full_height, seed, .. } = *self.slide;
        let SvsOptions { native_tile, quality, encoding, app_mag, .. } = self.options;
        let kind = match encoding {
            Encoding::JpegYcbcr => "JPEG/YCC",
            Encoding::JpegRgb => "JPEG/RGB",
            Encoding::Deflate => "ZIP",
        };
        let head = format!(
            "Aperio Image Library v11.2.1 \r\n{full_width}x{full_height} [0,0 {full_width}x{full_height}] \
             ({native_tile}x{native_tile})"
        );
        if level > 0 {
            return format!("{head} -> {width}x{height} {kind} Q={quality}");
        }
        let mut text = format!("{head} {kind} Q={quality}");
        if let Some(app_mag) = app_mag {
            text += &format!("|AppMag = {app_mag}");
        }
        match &self.options.mpp {
            MppField::True => text += &format!("|MPP = {}", self.slide.mpp),
            MppField::Text(mpp) => text += &format!("|MPP = {mpp}"),
            MppField::Missing => {}
        }
        text + &format!("|ScanScope ID = SYNTHETIC|Filename = seed {seed}")
    }

    fn mpp_number(&self) -> Option<f64> {
        match &self.options.mpp {
            MppField::True => Some(self.slide.mpp),
            MppField::Missing => None,
            MppField::Text(text) => text.parse().ok(),
        }
    }
}

impl Encoding {
    fn photometric(self) -> Photometric {
        if self == Self::JpegYcbcr { Photometric::YCBCR } else { Photometric::RGB }
    }

    fn compression(self) -> Compression {
        if self == Self::Deflate { Compression::DEFLATE } else { Compression::JPEG }
    }

    fn encode(self, tile: &RgbImage, quality: u8) -> Result<Vec<u8>, TiffError> {
        let (colours, sampling) = match self {
            Self::Deflate => {
                let mut encoder = ZlibEncoder::new(Vec::new(), DeflateLevel::fast());
                encoder.write_all(tile)?;
                return Ok(encoder.finish()?);
            }
            Self::JpegYcbcr => (ColorType::Rgb, SamplingFactor::F_2_2),
            // The encoder knows no RGB streams, but passes "YCbCr" samples on as they are, and the TIFF says what
            // they mean.
            Self::JpegRgb => (ColorType::Ycbcr, SamplingFactor::F_1_1),
        };
        let invalid = |error: EncodingError| TiffError::Io(std::io::Error::other(error));
        let side = |pixels: u32| u16::try_from(pixels).unwrap_or(u16::MAX);
        let mut stream = Vec::new();
        let mut encoder = Encoder::new(&mut stream, quality);
        encoder.set_sampling_factor(sampling);
        encoder.encode(tile, side(tile.width()), side(tile.height()), colours).map_err(invalid)?;
        Ok(without_jfif(stream))
    }
}

/// Removes the JFIF header: by it decoders take the samples for YCbCr, whatever the TIFF says.
fn without_jfif(mut stream: Vec<u8>) -> Vec<u8> {
    if let [0xff, 0xd8, 0xff, 0xe0, high, low, ..] = stream[..] {
        stream.drain(2..4 + usize::from(u16::from_be_bytes([high, low])));
    }
    stream
}

/// Averages blocks of `ratio` x `ratio` pixels into `small`, from `(left, top)` on; what doesn't fit is left out.
fn shrink_into(image: &RgbImage, ratio: u32, (left, top): (u32, u32), small: &mut RgbImage) {
    let width = (image.width() / ratio).min(small.width().saturating_sub(left));
    let height = (image.height() / ratio).min(small.height().saturating_sub(top));
    let count = ratio * ratio;
    let row_len = image.width() as usize * 3;
    let mut sums = vec![0u32; width as usize * 3];
    for y in 0..height {
        sums.fill(0);
        for row in image.chunks_exact(row_len).skip((y * ratio) as usize).take(ratio as usize) {
            for (sum, block) in sums.chunks_exact_mut(3).zip(row.chunks_exact(ratio as usize * 3)) {
                for pixel in block.chunks_exact(3) {
                    for channel in 0..3 {
                        sum[channel] += u32::from(pixel[channel]);
                    }
                }
            }
        }
        for (x, sum) in (left..).zip(sums.chunks_exact(3)) {
            let mean = [sum[0], sum[1], sum[2]].map(|sum| u8::try_from((sum + count / 2) / count).unwrap_or(u8::MAX));
            small.put_pixel(x, top + y, Rgb(mean));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::slide::{Slide, SlideError};

    #[test]
    fn written_levels_are_means_of_the_level_before() {
        let mut small = RgbImage::new(3, 2);
        let image = RgbImage::from_fn(4, 2, |x, y| Rgb([u8::try_from(10 * x + y).unwrap(), 100, 7]));
        shrink_into(&image, 2, (1, 1), &mut small);
        // (0 + 10 + 1 + 11) / 4 = 5.5, rounded up.
        assert_eq!(*small.get_pixel(1, 1), Rgb([6, 100, 7]));
        assert_eq!(*small.get_pixel(2, 1), Rgb([26, 100, 7]));
        assert_eq!(*small.get_pixel(0, 0), Rgb([0, 0, 0]));
    }

    #[test]
    fn every_encoding_is_read_back_with_its_metadata() {
        let folder = tempfile::tempdir().unwrap();
        let synthetic = SyntheticSlide::new(700, 530, 5);
        let expected = synthetic.pixels(0, 0, 700, 530);
        for (encoding, is_aperio, most, mean) in [
            (Encoding::Deflate, true, 0, 0.0),
            (Encoding::Deflate, false, 0, 0.0),
            // JPEG at quality 90: bounds seen, rounded up.
            (Encoding::JpegRgb, true, 70, 3.0),
            (Encoding::JpegYcbcr, true, 110, 4.5),
            (Encoding::JpegYcbcr, false, 110, 4.5),
        ] {
            let path = folder.path().join(format!("{encoding:?}-{is_aperio}.tif"));
            let options = SvsOptions { encoding, is_aperio, quality: 90, native_tile: 240, ..SvsOptions::default() };
            let options = SvsOptions { downsamples: vec![1, 2, 4], ..options };
            synthetic.write(&path, &options).unwrap();
            let slide = Slide::open(&path, None).unwrap();
            assert_eq!(slide.vendor, if is_aperio { "aperio" } else { "generic-tiff" });
            let sizes: Vec<_> = slide.levels.iter().map(|level| (level.width, level.height)).collect();
            assert_eq!(sizes, [(700, 530), (350, 265), (175, 132)]);
            assert_eq!(slide.levels[0].native_tile, Some((240, 240)));
            assert_eq!(slide.pixel_size(None).unwrap().x.get(), 0.5);
            let compression = if encoding == Encoding::Deflate { "deflate" } else { "JPEG" };
            assert_eq!(slide.compression.as_deref(), Some(compression));
            let pixels = slide.thumbnail(700).unwrap().image;
            let differences = pixels.iter().zip(&expected).map(|(a, b)| a.abs_diff(*b));
            let sum: f64 = differences.clone().map(f64::from).sum();
            let (found_most, found_mean) = (differences.max().unwrap(), sum / expected.len() as f64);
            assert!(found_most <= most && found_mean <= mean, "{encoding:?}: {found_most}, {found_mean}");
        }
    }

    #[test]
    fn missing_and_nonsensical_resolutions_arrive_as_such() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.svs");
        let open = |mpp: MppField| {
            let options = SvsOptions { mpp, app_mag: Some("40".to_owned()), ..SvsOptions::default() };
            SyntheticSlide::new(300, 300, 1).write(&path, &options).unwrap();
            Slide::open(&path, None).unwrap().pixel_size(None)
        };
        let missing = open(MppField::Missing).unwrap_err();
        assert!(matches!(missing, SlideError::MissingMpp { objective_power: Some(40.0), .. }), "{missing}");
        for text in ["0", "-1", "NaN", "unknown", "1000"] {
            let error = open(MppField::Text(text.to_owned())).unwrap_err();
            assert!(matches!(error, SlideError::InvalidMpp { .. }), "{text}: {error}");
        }
        assert_eq!(open(MppField::Text("0.2457".to_owned())).unwrap().x.get(), 0.2457);
    }

    #[test]
    fn contradictory_options_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.svs");
        for downsamples in [vec![], vec![2], vec![1, 1], vec![1, 3, 4], vec![1, 512]] {
            let options = SvsOptions { downsamples, ..SvsOptions::default() };
            assert!(SyntheticSlide::new(300, 300, 1).write(&path, &options).is_err());
        }
        assert!(!path.exists());
    }
}
