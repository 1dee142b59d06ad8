//! Pixels of one level of a slide, whoever decodes them.

use std::fmt;
use std::sync::Arc;

use super::native::{self, NativeLevel};
use super::openslide::OpenSlideLevel;
use super::{LevelInfo, Slide, SlideError};
use crate::geometry::{Level, Level0Rect};

/// What a handle of OpenSlide holds of decoded tiles, unless told otherwise.
const OPENSLIDE_CACHE_BYTES: u64 = 32 << 20;

/// One buffer to so many held tiles is kept for new ones, or not found again: threads give back what others took.
pub(super) const UNFILLED: u64 = 5;

/// A rectangle of a level in that level's pixels, `x..x+width` by `y..y+height`; may reach beyond the level.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct LevelRect {
    /// Left edge.
    pub x: i64,
    /// Top edge.
    pub y: i64,
    /// Width in pixels.
    pub width: u32,
    /// Height in pixels.
    pub height: u32,
}

/// How far the pixels that were read lie right of and below those that were asked for, in pixels of the level.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Shift {
    pub x: f64,
    pub y: f64,
}

/// Reads rectangles of one level; each worker has its own.
pub(super) trait LevelSource: fmt::Debug + Send {
    /// Reads a rectangle into `rgb`, whose content is replaced: `[height, width, 3]`, RGB8. What lies outside the slide,
    /// is transparent or absent has the slide's background colour.
    ///
    /// # Errors
    /// [`SlideError::Read`] if the file is damaged there; `rgb` is then undefined, and the source stays usable.
    fn read(&mut self, rect: LevelRect, rgb: &mut Vec<u8>) -> Result<Shift, SlideError>;

    /// Reads a rectangle whose exact start lies `fraction` of a pixel beyond `rect`'s, along x and y, each at most a half. A
    /// source that can't read between pixels takes the nearest ones.
    ///
    /// # Errors
    /// Those of [`read`](Self::read).
    fn read_from(&mut self, rect: LevelRect, _fraction: (f64, f64), rgb: &mut Vec<u8>) -> Result<(), SlideError> {
        self.read(rect, rgb).map(drop)
    }

    /// Lowers the memory that what was decoded may take between two reads, of all sources that share it; more is decoded
    /// again then. Does nothing where that memory is not this program's.
    fn hold_at_most(&mut self, _bytes: usize) {}
}

/// Opens `count` sources of a level, which together will read each of `planned` once. Other rectangles may be read too,
/// but only planned ones share what was decoded.
pub(super) fn open(
    slide: &Slide,
    level: Level,
    planned: impl Iterator<Item = LevelRect>,
    count: usize,
) -> Result<Vec<Box<dyn LevelSource>>, SlideError> {
    let Some(pyramid) = slide.native.as_ref() else {
        let source = || Ok(Box::new(OpenSlideLevel::open(slide, level)?) as Box<dyn LevelSource>);
        return (0..count).map(|_| source()).collect();
    };
    let shared = Arc::new(NativeLevel::open(slide, pyramid, level, planned)?);
    Ok((0..count).map(|_| Box::new(shared.source()) as Box<dyn LevelSource>).collect())
}

/// What reading takes of memory, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReadMemory {
    /// Decoded parts of the file, held for the reads that share them.
    pub held: u64,
    /// What [`TileReader::hold_at_most`](super::TileReader::hold_at_most) can lower that to.
    pub least_held: u64,
    /// Each reader's own.
    pub per_reader: u64,
}

/// What `count` sources of a level take that [`open`] gives, beside the pixels that are asked for.
pub(super) fn memory(
    slide: &Slide,
    level: Level,
    planned: impl Iterator<Item = LevelRect> + Clone,
    count: usize,
) -> Result<ReadMemory, SlideError> {
    let info = slide.level_info(level)?;
    Ok(match &slide.native {
        Some(pyramid) => {
            let (tiles, tile) = native::held_bytes(pyramid, level, planned);
            let held = tiles + tiles / UNFILLED;
            // The tile, and at most as much of its compressed data and of the decoder's own.
            ReadMemory { held, least_held: 0, per_reader: 3 * tile }
        }
        None => {
            // As BGRA, up to the size of OpenSlide's cache, which every handle has for itself.
            let level = u64::from(info.width) * u64::from(info.height) * 4;
            let held = level.min(OPENSLIDE_CACHE_BYTES) * count as u64;
            let read = planned.map(|rect| u64::from(rect.width) * u64::from(rect.height) * 4).max();
            ReadMemory { held, least_held: held, per_reader: read.unwrap_or(0) }
        }
    })
}

impl Slide {
    /// What is known of a level.
    pub(super) fn level_info(&self, level: Level) -> Result<LevelInfo, SlideError> {
        let absurd = || SlideError::AbsurdLevel { path: self.path.clone(), level, width: 0, height: 0 };
        self.levels.get(level.0 as usize).copied().ok_or_else(absurd)
    }
}

impl LevelRect {
    /// The same rectangle on the level-0 frame, for messages.
    pub(super) fn level0(self, level: &LevelInfo) -> Level0Rect {
        #[expect(clippy::cast_possible_truncation, reason = "`as` saturates, and such positions are far off any slide")]
        let scale = |length: f64, downsample: f64| (length * downsample).round() as i64;
        Level0Rect {
            x: scale(self.x as f64, level.downsample_x),
            y: scale(self.y as f64, level.downsample_y),
            width: scale(self.width.into(), level.downsample_x),
            height: scale(self.height.into(), level.downsample_y),
        }
    }

    /// The part of this rectangle on a level of `width` × `height` px; `None` if nothing of it is.
    pub(super) fn clipped(self, (width, height): (u32, u32)) -> Option<Clipped> {
        let clip = |start: i64, len: u32, extent: u32| {
            let end = start.saturating_add(len.into()).min(extent.into());
            let from = start.max(0);
            let len = u32::try_from(end.checked_sub(from)?).ok().filter(|len| *len > 0)?;
            Some((u32::try_from(from).ok()?, len, usize::try_from(from - start).ok()?))
        };
        let ((x, width, left), (y, height, top)) =
            (clip(self.x, self.width, width)?, clip(self.y, self.height, height)?);
        Some(Clipped { x, y, width, height, left, top })
    }
}

/// The part of a rectangle that lies on its level.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Clipped {
    /// Left edge on the level.
    pub x: u32,
    /// Top edge on the level.
    pub y: u32,
    pub width: u32,
    pub height: u32,
    /// Left edge within the rectangle.
    pub left: usize,
    /// Top edge within the rectangle.
    pub top: usize,
}

/// Paints `rgb` in one colour.
pub(super) fn fill(rgb: &mut [u8], colour: [u8; 3]) {
    rgb.chunks_exact_mut(3).for_each(|pixel| pixel.copy_from_slice(&colour));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rectangles_are_cut_at_the_edges_of_the_level() {
        let clip = |x, y, width, height| {
            let clipped = LevelRect { x, y, width, height }.clipped((100, 60))?;
            Some((clipped.x, clipped.y, clipped.width, clipped.height, clipped.left, clipped.top))
        };
        assert_eq!(clip(10, 20, 30, 30), Some((10, 20, 30, 30, 0, 0)));
        assert_eq!(clip(-5, 50, 30, 30), Some((0, 50, 25, 10, 5, 0)));
        assert_eq!(clip(-5, -50, 300, 300), Some((0, 0, 100, 60, 5, 50)));
        for (x, y) in [(100, 0), (0, 60), (-30, 0), (i64::MAX, 0), (0, i64::MIN)] {
            assert_eq!(clip(x, y, 30, 30), None, "{x},{y}");
        }
        assert_eq!(clip(0, 0, 0, 30), None);
    }
}
