//! Pixels of tiles at the resolution of the plane.
//!
//! A tile's pixels depend on where it lies and on nothing else: not on its neighbours, the order of reads or the cut of
//! the plane. What lies outside the slide, and what is transparent in it, has the slide's background colour.

use fast_image_resize::{ResizeError, Resizer};

use super::icc::ToSrgb;
use super::level::LevelChoice;
use super::openslide::{Handle, Window, composite};
use super::resample::{Crop, FILTER_REACH, resample};
use super::{LevelInfo, Slide, SlideError};
use crate::geometry::{Level, TilePosition};

/// Pixels of a level that one tile may need: 256 MiB decoded.
const MAX_WINDOW_PX: u64 = 1 << 26;

/// How tiles are read, apart from the resolution.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReadOptions {
    /// Side of the square tiles in plane pixels.
    pub tile_size: u32,
    /// Whether colours are converted to sRGB by the slide's ICC profile, after resampling.
    pub icc: bool,
}

/// Reads tiles of one slide; each worker has its own.
#[derive(Debug)]
pub struct TileReader {
    source: LevelReader,
    choice: LevelChoice,
    tile_size: u32,
    to_srgb: Option<ToSrgb>,
    scratch: Vec<u8>,
}

impl TileReader {
    /// Opens the slide for reading at the chosen resolution.
    ///
    /// # Errors
    /// [`SlideError`] if the file can't be opened any more, a tile would need too much memory, or a conversion to sRGB
    /// is asked for and the slide's profile is unusable. A slide without a profile is no error, see
    /// [`converts_colours`](Self::converts_colours).
    pub fn new(slide: &Slide, choice: &LevelChoice, options: ReadOptions) -> Result<Self, SlideError> {
        let source = LevelReader::open(slide, choice.level)?;
        let reader = Self {
            source,
            choice: *choice,
            tile_size: options.tile_size,
            to_srgb: if options.icc { ToSrgb::of(slide)? } else { None },
            scratch: Vec::new(),
        };
        // Every tile needs as much, so too large a window is told before the first one.
        reader.source.check_size(&reader.view(TilePosition { x: 0.0, y: 0.0, plane_x: 0, plane_y: 0 }))?;
        Ok(reader)
    }

    /// Whether colours are converted: asked for, and the slide has a profile.
    #[must_use]
    pub fn converts_colours(&self) -> bool {
        self.to_srgb.is_some()
    }

    /// Reads the tile at `position` into `rgb`, whose content is replaced: `[tile_size, tile_size, 3]`, RGB8.
    ///
    /// Without resampling, a tile inside the slide is bit for bit what OpenSlide's `read_region` gives at the tile's
    /// position rounded to level-0 pixels.
    ///
    /// # Errors
    /// [`SlideError`] if the file is damaged there. The reader stays usable.
    pub fn read(&mut self, position: TilePosition, rgb: &mut Vec<u8>) -> Result<(), SlideError> {
        let view = self.view(position);
        let side = self.tile_size as usize;
        rgb.resize(side * side * 3, 0);
        match self.choice.resample {
            None => self.source.read_as_is(position, self.tile_size, rgb)?,
            Some(_) => self.source.read_resampled(&view, rgb)?,
        }
        if let Some(to_srgb) = &self.to_srgb {
            to_srgb
                .convert(rgb, &mut self.scratch)
                .map_err(|source| SlideError::IccProfile { path: self.source.slide.path.clone(), source })?;
        }
        Ok(())
    }

    fn view(&self, position: TilePosition) -> View {
        let info = self.source.info;
        let (factor_x, factor_y) = self.choice.resample.map_or((1.0, 1.0), |factors| (factors.x, factors.y));
        View {
            left: position.x / info.downsample_x,
            top: position.y / info.downsample_y,
            factor_x,
            factor_y,
            width: self.tile_size,
            height: self.tile_size,
        }
    }
}

/// A part of a level seen at another scale.
#[derive(Clone, Copy, Debug)]
struct View {
    /// Left edge in pixels of the level.
    left: f64,
    /// Top edge in pixels of the level.
    top: f64,
    /// Pixels of the level per pixel of the view.
    factor_x: f64,
    factor_y: f64,
    /// Size of the view.
    width: u32,
    height: u32,
}

/// A range of pixels of a level along one axis that a view needs.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Span {
    start: i64,
    len: u64,
}

impl Span {
    fn of(left: f64, factor: f64, len: u32) -> Self {
        let margin = (FILTER_REACH * factor.max(1.0)).ceil() + 1.0;
        let end = left + f64::from(len) * factor;
        let start = floor(left - margin);
        Self { start, len: floor(end + margin).abs_diff(start) + 1 }
    }
}

/// Reads one level of a slide, with buffers that are kept from read to read.
#[derive(Debug)]
struct LevelReader {
    slide: Slide,
    level: Level,
    info: LevelInfo,
    handle: Handle,
    resizer: Resizer,
    padded: Vec<u8>,
    resized: Vec<u8>,
}

/// What OpenSlide gave for a range of a level: the part of it that lies on the slide.
struct Part {
    /// Premultiplied BGRA.
    bgra: Vec<u8>,
    /// Where its upper left pixel lies in the range.
    x: usize,
    y: usize,
    width: usize,
    height: usize,
    /// How far its pixels lie beyond whole pixels of the level: OpenSlide takes level-0 positions, and interpolates.
    shift_x: f64,
    shift_y: f64,
}

impl LevelReader {
    fn open(slide: &Slide, level: Level) -> Result<Self, SlideError> {
        let info = slide.levels.get(level.0 as usize).copied().ok_or_else(|| SlideError::AbsurdLevel {
            path: slide.path.clone(),
            level,
            width: 0,
            height: 0,
        })?;
        let handle = Handle::open(&slide.path)?;
        let slide = slide.clone();
        Ok(Self { slide, level, info, handle, resizer: Resizer::new(), padded: Vec::new(), resized: Vec::new() })
    }

    fn check_size(&self, view: &View) -> Result<(), SlideError> {
        let width = Span::of(view.left, view.factor_x, view.width).len;
        let height = Span::of(view.top, view.factor_y, view.height).len;
        if view.width > 0 && view.height > 0 && width.saturating_mul(height) <= MAX_WINDOW_PX {
            return Ok(());
        }
        let (path, level, max_px) = (self.slide.path.clone(), self.level, MAX_WINDOW_PX);
        Err(SlideError::TooLarge { path, level, width, height, max_px })
    }

    /// The level's own pixels, from the one nearest to `position` on.
    fn read_as_is(&mut self, position: TilePosition, side: u32, rgb: &mut [u8]) -> Result<(), SlideError> {
        let background = self.slide.background;
        // Rounded on the level-0 frame, not on the level's, as a caller of read_region would.
        let start = |position: f64, downsample: f64| {
            let address = (position / downsample * self.info.openslide_downsample).round();
            (address, floor((address / self.info.openslide_downsample).round()))
        };
        let (address_x, x) = start(position.x, self.info.downsample_x);
        let (address_y, y) = start(position.y, self.info.downsample_y);
        let spans = (Span { start: x, len: side.into() }, Span { start: y, len: side.into() });
        let part = self.read_part(spans.0, spans.1, (address_x, address_y))?;
        let side = side as usize;
        match part {
            Some(part) if (part.width, part.height) == (side, side) => composite(&part.bgra, background, rgb),
            part => {
                fill(rgb, background);
                let Some(part) = part else { return Ok(()) };
                let rows = rgb.chunks_exact_mut(side * 3).skip(part.y);
                for (row, source) in rows.zip(part.bgra.chunks_exact(part.width * 4)) {
                    composite(source, background, &mut row[part.x * 3..]);
                }
            }
        }
        Ok(())
    }

    fn read_resampled(&mut self, view: &View, rgb: &mut [u8]) -> Result<(), SlideError> {
        let background = self.slide.background;
        let (span_x, span_y) =
            (Span::of(view.left, view.factor_x, view.width), Span::of(view.top, view.factor_y, view.height));
        let address = |span: Span| (span.start.max(0) as f64 * self.info.openslide_downsample).round();
        let Some(part) = self.read_part(span_x, span_y, (address(span_x), address(span_y)))? else {
            fill(rgb, background);
            return Ok(());
        };
        self.resample(view, (span_x, span_y), &part).map_err(|source| SlideError::Resample {
            path: self.slide.path.clone(),
            level: self.level,
            source,
        })?;
        composite(&self.resized, background, rgb);
        Ok(())
    }

    fn resample(&mut self, view: &View, (span_x, span_y): (Span, Span), part: &Part) -> Result<(), ResizeError> {
        let size = |span: Span| u32::try_from(span.len).unwrap_or(u32::MAX);
        let (width, height) = (size(span_x), size(span_y));
        let is_whole = (part.width, part.height) == (width as usize, height as usize);
        let source = if is_whole {
            &part.bgra
        } else {
            // Beyond the slide all has the background's colour, opaque: were it transparent, the filter's overshoot
            // would be clipped in alpha but not in colour, and the slide would get a pale rim.
            let [red, green, blue] = self.slide.background;
            self.padded.clear();
            self.padded.extend([blue, green, red, u8::MAX].repeat(width as usize * height as usize));
            let rows = self.padded.chunks_exact_mut(width as usize * 4).skip(part.y);
            for (row, source) in rows.zip(part.bgra.chunks_exact(part.width * 4)) {
                row[part.x * 4..][..source.len()].copy_from_slice(source);
            }
            &self.padded
        };
        self.resized.resize(view.width as usize * view.height as usize * 4, 0);
        let crop = Crop {
            left: view.left - span_x.start as f64 - part.shift_x,
            top: view.top - span_y.start as f64 - part.shift_y,
            width: f64::from(view.width) * view.factor_x,
            height: f64::from(view.height) * view.factor_y,
        };
        let target = (view.width, view.height, &mut self.resized[..]);
        resample(&mut self.resizer, (width, height, source), crop, target)
    }

    /// Reads what of the range lies on the slide; `None` if nothing does. `address` is the level-0 position of the
    /// range's start; it is not used where the range starts before the slide.
    fn read_part(&mut self, x: Span, y: Span, address: (f64, f64)) -> Result<Option<Part>, SlideError> {
        let clip = |span: Span, address: f64, extent: u32| {
            let end = span.start.saturating_add_unsigned(span.len).min(i64::from(extent));
            let start = span.start.max(0);
            let len = u32::try_from(end.checked_sub(start)?).ok().filter(|len| *len > 0)?;
            let skipped = usize::try_from(start - span.start).ok()?;
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "`as` saturates, as wanted")]
            let address = if span.start < 0 { 0 } else { address as u32 };
            let shift = f64::from(address) / self.info.openslide_downsample - start as f64;
            Some((skipped, len, address, shift))
        };
        let clipped = clip(x, address.0, self.info.width).zip(clip(y, address.1, self.info.height));
        let Some(((x, width, address_x, shift_x), (y, height, address_y, shift_y))) = clipped else {
            return Ok(None);
        };
        let downsample = self.info.openslide_downsample;
        let bgra =
            self.handle.read(Window { level: self.level, x: address_x, y: address_y, width, height, downsample })?;
        let (width, height) = (width as usize, height as usize);
        Ok(Some(Part { bgra, x, y, width, height, shift_x, shift_y }))
    }
}

fn fill(rgb: &mut [u8], colour: [u8; 3]) {
    for pixel in rgb.chunks_exact_mut(3) {
        pixel.copy_from_slice(&colour);
    }
}

fn floor(value: f64) -> i64 {
    #[expect(clippy::cast_possible_truncation, reason = "`as` saturates, and such positions are far off any slide")]
    let whole = value.floor() as i64;
    whole
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::geometry::{Level0Rect, Mpp, PixelSize, TilePlane};
    use crate::slide::level::choose;
    use crate::slide::synthetic::{Encoding, SvsOptions, SyntheticSlide};
    use tempfile::TempDir;

    /// A lossless slide of 1000 x 700 px at 0.5 µm with levels 1, 2, 4.
    fn slide(options: &SvsOptions) -> (TempDir, SyntheticSlide, Slide) {
        let folder = tempfile::tempdir().unwrap();
        let synthetic = SyntheticSlide::new(1000, 700, 11);
        let path = folder.path().join("a.tif");
        let options = SvsOptions { encoding: Encoding::Deflate, downsamples: vec![1, 2, 4], ..options.clone() };
        synthetic.write(&path, &options).unwrap();
        let slide = Slide::open(&path).unwrap();
        (folder, synthetic, slide)
    }

    fn choice(slide: &Slide, target: f64) -> LevelChoice {
        choose(&slide.levels, slide.pixel_size(None).unwrap(), Mpp::new(target).unwrap(), 0.01)
    }

    fn at(choice: &LevelChoice, plane_x: i64, plane_y: i64) -> TilePosition {
        let plane = TilePlane {
            region: Level0Rect { x: 0, y: 0, width: 1000, height: 700 },
            downsample_x: choice.downsample_x,
            downsample_y: choice.downsample_y,
            pixel_size: PixelSize::square(Mpp::new(0.5).unwrap()),
            tile_size: 1,
        };
        plane.position(plane_x, plane_y)
    }

    fn read(slide: &Slide, choice: &LevelChoice, tile_size: u32, plane_x: i64, plane_y: i64) -> Vec<u8> {
        let mut rgb = Vec::new();
        let mut reader = TileReader::new(slide, choice, ReadOptions { tile_size, icc: false }).unwrap();
        reader.read(at(choice, plane_x, plane_y), &mut rgb).unwrap();
        rgb
    }

    #[test]
    fn level_pixels_come_as_they_are_and_the_outside_is_background() {
        let (_folder, synthetic, slide) = slide(&SvsOptions::default());
        let choice = choice(&slide, 0.5);
        assert_eq!(choice.resample, None);
        assert_eq!(read(&slide, &choice, 100, 333, 77), synthetic.pixels(333, 77, 100, 100));
        for (x, y) in [(-30, -40), (950, 650), (-50, 650), (-100, 0), (1000, 0), (i64::from(u32::MAX) * 4, 0)] {
            let tile = read(&slide, &choice, 100, x, y);
            for (index, pixel) in (0..).zip(tile.chunks_exact(3)) {
                let (x, y) = (x + index % 100, y + index / 100);
                let is_inside = (0..1000).contains(&x) && (0..700).contains(&y);
                let inside = |value| u32::try_from(value).unwrap();
                let expected = if is_inside { synthetic.pixels(inside(x), inside(y), 1, 1) } else { vec![255; 3] };
                assert_eq!(pixel, expected, "{x},{y}");
            }
        }
    }

    #[test]
    fn a_big_tile_is_the_mosaic_of_small_ones() {
        let (_folder, _, slide) = slide(&SvsOptions::default());
        // Shrunk from level 0, from level 1, and enlarged; partly beyond the slide.
        for target in [0.83, 1.37, 0.31] {
            let choice = choice(&slide, target);
            assert!(choice.resample.is_some());
            let big = read(&slide, &choice, 192, -20, 120);
            for (row, col) in (0..3).flat_map(|row| (0..3).map(move |col| (row, col))) {
                let small = read(&slide, &choice, 64, -20 + col * 64, 120 + row * 64);
                for (index, line) in small.chunks_exact(64 * 3).enumerate() {
                    let y = usize::try_from(row).unwrap() * 64 + index;
                    let start = (y * 192 + usize::try_from(col).unwrap() * 64) * 3;
                    let most = line.iter().zip(&big[start..]).map(|(a, b)| a.abs_diff(*b)).max();
                    // The filter's weights are rounded to 16 bits from positions that differ in their last digit.
                    assert!(most <= Some(1), "{target}: tile {col},{row} line {index} differs by {most:?}");
                }
            }
        }
    }

    #[test]
    fn shrinking_by_two_agrees_with_the_mean() {
        let (_folder, _, slide) = slide(&SvsOptions::default());
        let direct = choice(&slide, 1.0);
        assert_eq!((direct.level, direct.resample), (Level(1), None));
        let mut only_level0 = slide.clone();
        only_level0.levels.truncate(1);
        let resampled = choice(&only_level0, 1.0);
        assert_eq!(resampled.level, Level(0));
        let (means, filtered) = (read(&slide, &direct, 200, 100, 100), read(&slide, &resampled, 200, 100, 100));
        let sum: f64 = means.iter().zip(&filtered).map(|(a, b)| f64::from(a.abs_diff(*b))).sum();
        // A shift by half a pixel would differ by several times as much.
        assert!(sum / (means.len() as f64) < 4.0, "{}", sum / means.len() as f64);
    }

    #[test]
    fn a_damaged_tile_is_an_error_and_the_next_one_is_read() {
        let damaged = SvsOptions { damaged_tiles: vec![(0, 1, 1)], ..SvsOptions::default() };
        let (_folder, synthetic, slide) = slide(&damaged);
        let choice = choice(&slide, 0.5);
        let mut reader = TileReader::new(&slide, &choice, ReadOptions { tile_size: 256, icc: false }).unwrap();
        let mut rgb = Vec::new();
        for _ in 0..2 {
            let error = reader.read(at(&choice, 256, 256), &mut rgb).unwrap_err();
            assert!(matches!(error, SlideError::Read { level: Level(0), region, .. } if region.x == 256), "{error}");
            reader.read(at(&choice, 512, 256), &mut rgb).unwrap();
            assert_eq!(rgb, synthetic.pixels(512, 256, 256, 256)[..].to_vec());
        }
    }

    #[test]
    fn a_tile_that_needs_too_much_is_refused_before_reading() {
        let (_folder, _, mut slide) = slide(&SvsOptions::default());
        slide.levels.truncate(1);
        for (target, tile_size) in [(50.0, 512), (0.5, 100_000), (0.5, 0)] {
            let error = TileReader::new(&slide, &choice(&slide, target), ReadOptions { tile_size, icc: false });
            assert!(matches!(error, Err(SlideError::TooLarge { .. })), "{target}, {tile_size}");
        }
    }

    #[test]
    fn profiles_are_applied_only_when_asked_for() {
        let (_folder, _, plain) = slide(&SvsOptions::default());
        let profile = moxcms::ColorProfile::new_display_p3().encode().unwrap();
        let (_wide_folder, _, wide) = slide(&SvsOptions { icc_profile: Some(profile), ..SvsOptions::default() });
        let (_bad_folder, _, bad) =
            slide(&SvsOptions { icc_profile: Some(b"nonsense".to_vec()), ..SvsOptions::default() });
        let open = |slide: &Slide, icc| TileReader::new(slide, &choice(slide, 0.5), ReadOptions { tile_size: 64, icc });
        assert!(!open(&plain, true).unwrap().converts_colours());
        assert!(!open(&wide, false).unwrap().converts_colours());
        assert!(!open(&bad, false).unwrap().converts_colours());
        assert!(matches!(open(&bad, true), Err(SlideError::IccProfile { .. })));
        let mut reader = open(&wide, true).unwrap();
        assert!(reader.converts_colours());
        let mut rgb = Vec::new();
        reader.read(at(&choice(&wide, 0.5), 340, 340), &mut rgb).unwrap();
        assert_eq!(rgb.len(), 64 * 64 * 3);
        assert_ne!(rgb, read(&wide, &choice(&wide, 0.5), 64, 340, 340));
    }
}
