//! Pixels of tiles at the resolution of the plane.
//!
//! A tile's pixels depend on where it lies and on nothing else: not on its neighbours, the order of reads or the cut of
//! the plane. What lies outside the slide, and what is transparent in it, has the slide's background colour.

use std::path::PathBuf;

use fast_image_resize::Resizer;

use super::icc::ToSrgb;
use super::level::LevelChoice;
use super::resample::{Crop, FILTER_REACH, resample};
use super::source::{self, LevelRect, LevelSource, ReadMemory};
use super::{LevelInfo, Slide, SlideError};
use crate::geometry::TilePosition;

/// Pixels of a level that one tile may need: 192 MiB decoded.
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
    path: PathBuf,
    source: Box<dyn LevelSource>,
    cut: Cut,
    to_srgb: Option<ToSrgb>,
    resizer: Resizer,
    window: Vec<u8>,
    converted: Vec<u8>,
}

impl TileReader {
    /// Opens `count` readers of a slide at the chosen resolution, which together will read each tile of `planned` once:
    /// so they share what neighbouring tiles need of the file. Other tiles may be read too, at the price of decoding for
    /// each alone.
    ///
    /// # Errors
    /// [`SlideError`] if the file can't be opened any more, a tile would need too much memory, or a conversion to sRGB
    /// is asked for and the slide's profile is unusable. A slide without a profile is no error, see
    /// [`converts_colours`](Self::converts_colours).
    pub fn several(
        slide: &Slide,
        choice: &LevelChoice,
        options: ReadOptions,
        planned: &[TilePosition],
        count: usize,
    ) -> Result<Vec<Self>, SlideError> {
        let cut = Cut { info: slide.level_info(choice.level)?, choice: *choice, tile_size: options.tile_size };
        // Every tile needs as much, so too large a window is told before the first one.
        cut.check_size(slide)?;
        let to_srgb = if options.icc { ToSrgb::of(slide)? } else { None };
        let rects = planned.iter().map(|position| cut.rect(*position));
        let reader = |source| Self {
            path: slide.path.clone(),
            source,
            cut,
            to_srgb: to_srgb.clone(),
            resizer: Resizer::new(),
            window: Vec::new(),
            converted: Vec::new(),
        };
        Ok(source::open(slide, choice.level, rects, count)?.into_iter().map(reader).collect())
    }

    /// Opens a single reader, see [`several`](Self::several).
    ///
    /// # Errors
    /// Those of [`several`](Self::several).
    pub fn new(
        slide: &Slide,
        choice: &LevelChoice,
        options: ReadOptions,
        planned: &[TilePosition],
    ) -> Result<Self, SlideError> {
        Ok(Self::several(slide, choice, options, planned, 1)?.remove(0))
    }

    /// What `count` readers of [`several`](Self::several) take of memory.
    ///
    /// # Errors
    /// [`SlideError`] if there is no such level.
    pub fn memory(
        slide: &Slide,
        choice: &LevelChoice,
        options: ReadOptions,
        planned: &[TilePosition],
        count: usize,
    ) -> Result<ReadMemory, SlideError> {
        let cut = Cut { info: slide.level_info(choice.level)?, choice: *choice, tile_size: options.tile_size };
        let rects = planned.iter().map(|position| cut.rect(*position));
        let memory = source::memory(slide, choice.level, rects, count)?;
        let [(_, width), (_, height)] = cut.spans(&cut.view(TilePosition::default()));
        let tile = u64::from(options.tile_size) * u64::from(options.tile_size) * 3;
        // Resampling needs the window and, between its two directions, less than as much.
        let window = if choice.resample.is_some() { 2 * 3 * width * height } else { 0 };
        let converted = if options.icc { tile } else { 0 };
        Ok(ReadMemory { per_reader: memory.per_reader + window + converted, ..memory })
    }

    /// Lowers the memory that decoded parts of the file may take, for all readers that were opened together; what is not
    /// held is decoded again.
    pub fn hold_at_most(&mut self, bytes: u64) {
        let tiles = bytes / (source::UNFILLED + 1) * source::UNFILLED;
        self.source.hold_at_most(usize::try_from(tiles).unwrap_or(usize::MAX));
    }

    /// Whether colours are converted: asked for, and the slide has a profile.
    #[must_use]
    pub fn converts_colours(&self) -> bool {
        self.to_srgb.is_some()
    }

    /// Reads the tile at `position` into `rgb`, whose content is replaced: `[tile_size, tile_size, 3]`, RGB8.
    ///
    /// Without resampling a tile has the level's own pixels, from the one nearest to its position on. Read by OpenSlide it
    /// is bit for bit what its `read_region` gives at the position rounded to level-0 pixels, which may lie between pixels of
    /// a coarser level.
    ///
    /// # Errors
    /// [`SlideError`] if the file is damaged there. The reader stays usable.
    pub fn read(&mut self, position: TilePosition, rgb: &mut Vec<u8>) -> Result<(), SlideError> {
        let Self { path, source, cut, to_srgb, resizer, window, converted } = self;
        let rect = cut.rect(position);
        if cut.choice.resample.is_none() {
            let view = cut.view(position);
            source.read_from(rect, (view.left - rect.x as f64, view.top - rect.y as f64), rgb)?;
        } else {
            let shift = source.read(rect, window)?;
            let view = cut.view(position);
            let side = cut.tile_size;
            rgb.resize(side as usize * side as usize * 3, 0);
            let crop = Crop {
                left: view.left - rect.x as f64 - shift.x,
                top: view.top - rect.y as f64 - shift.y,
                width: f64::from(side) * view.factor_x,
                height: f64::from(side) * view.factor_y,
            };
            resample(resizer, (rect.width, rect.height, window), crop, (side, side, rgb))
                .map_err(|source| SlideError::Resample { path: path.clone(), level: cut.choice.level, source })?;
        }
        if let Some(to_srgb) = to_srgb {
            to_srgb.convert(rgb, converted).map_err(|source| SlideError::IccProfile { path: path.clone(), source })?;
        }
        Ok(())
    }
}

/// How tiles are cut from a level.
#[derive(Clone, Copy, Debug)]
struct Cut {
    info: LevelInfo,
    choice: LevelChoice,
    tile_size: u32,
}

/// A tile as a part of a level seen at another scale.
#[derive(Clone, Copy, Debug)]
struct View {
    /// Left edge in pixels of the level.
    left: f64,
    /// Top edge in pixels of the level.
    top: f64,
    /// Pixels of the level per pixel of the tile.
    factor_x: f64,
    factor_y: f64,
}

impl Cut {
    fn view(&self, position: TilePosition) -> View {
        let (factor_x, factor_y) = self.choice.resample.map_or((1.0, 1.0), |factors| (factors.x, factors.y));
        let (left, top) = (position.x / self.info.downsample_x, position.y / self.info.downsample_y);
        View { left, top, factor_x, factor_y }
    }

    /// The pixels of the level that the tile at `position` needs.
    fn rect(&self, position: TilePosition) -> LevelRect {
        let view = self.view(position);
        if self.choice.resample.is_none() {
            let nearest = |edge: f64| floor(edge.round());
            let side = self.tile_size;
            return LevelRect { x: nearest(view.left), y: nearest(view.top), width: side, height: side };
        }
        let [(x, width), (y, height)] = self.spans(&view);
        let side = |len: u64| u32::try_from(len).unwrap_or(u32::MAX);
        LevelRect { x, y, width: side(width), height: side(height) }
    }

    /// Start and length along both axes of what the filter reads for a view.
    fn spans(&self, view: &View) -> [(i64, u64); 2] {
        let span = |left: f64, factor: f64| {
            let margin = (FILTER_REACH * factor.max(1.0)).ceil() + 1.0;
            let end = left + f64::from(self.tile_size) * factor;
            let start = floor(left - margin);
            (start, floor(end + margin).abs_diff(start) + 1)
        };
        [span(view.left, view.factor_x), span(view.top, view.factor_y)]
    }

    fn check_size(&self, slide: &Slide) -> Result<(), SlideError> {
        let view = self.view(TilePosition { x: 0.0, y: 0.0, plane_x: 0, plane_y: 0 });
        let [(_, width), (_, height)] = self.spans(&view);
        if self.tile_size > 0 && width.saturating_mul(height) <= MAX_WINDOW_PX {
            return Ok(());
        }
        let (path, level, max_px) = (slide.path.clone(), self.choice.level, MAX_WINDOW_PX);
        Err(SlideError::TooLarge { path, level, width, height, max_px })
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
    use crate::geometry::{Level, Level0Rect, Mpp, PixelSize, TilePlane};
    use crate::slide::Reader;
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
        let slide = Slide::open(&path, None).unwrap();
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
        let mut reader = TileReader::new(slide, choice, ReadOptions { tile_size, icc: false }, &[]).unwrap();
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
        let mut reader = TileReader::new(&slide, &choice, ReadOptions { tile_size: 256, icc: false }, &[]).unwrap();
        let mut rgb = Vec::new();
        for _ in 0..2 {
            let error = reader.read(at(&choice, 256, 256), &mut rgb).unwrap_err();
            assert!(matches!(error, SlideError::Read { level: Level(0), region, .. } if region.x == 256), "{error}");
            reader.read(at(&choice, 512, 256), &mut rgb).unwrap();
            assert_eq!(rgb, synthetic.pixels(512, 256, 256, 256)[..].to_vec());
        }
    }

    #[test]
    fn both_readers_give_the_same_tiles() {
        for (encoding, most) in [(Encoding::Deflate, 0), (Encoding::JpegYcbcr, 4), (Encoding::JpegRgb, 4)] {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("a.svs");
            let options = SvsOptions { encoding, downsamples: vec![1, 2, 4], ..SvsOptions::default() };
            SyntheticSlide::new(1000, 700, 11).write(&path, &options).unwrap();
            let open = |reader| Slide::open(&path, Some(reader)).unwrap();
            let (native, openslide) = (open(Reader::Native), open(Reader::OpenSlide));
            assert_eq!((native.levels.clone(), &native.properties), (openslide.levels.clone(), &openslide.properties));
            // Level 0 and 1 as they are, and shrunk from each: the filter may round differently by a level.
            for (target, rounding) in [(0.5, 0), (1.0, 0), (0.83, 1), (1.37, 1)] {
                let choice = choice(&native, target);
                for (x, y) in [(0, 0), (100, 77), (-30, -40), (300, 200)] {
                    let tiles = [&native, &openslide].map(|slide| read(slide, &choice, 128, x, y));
                    let difference = tiles[0].iter().zip(&tiles[1]).map(|(a, b)| a.abs_diff(*b)).max();
                    assert!(difference <= Some(most + rounding), "{encoding:?} {target} {x},{y}: {difference:?}");
                }
            }
        }
    }

    #[test]
    fn a_tile_that_needs_too_much_is_refused_before_reading() {
        let (_folder, _, mut slide) = slide(&SvsOptions::default());
        slide.levels.truncate(1);
        for (target, tile_size) in [(50.0, 512), (0.5, 100_000), (0.5, 0)] {
            let error = TileReader::new(&slide, &choice(&slide, target), ReadOptions { tile_size, icc: false }, &[]);
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
        let open =
            |slide: &Slide, icc| TileReader::new(slide, &choice(slide, 0.5), ReadOptions { tile_size: 64, icc }, &[]);
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
