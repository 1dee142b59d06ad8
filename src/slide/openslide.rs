//! The one place that calls OpenSlide for pixels.
//!
//! After an error OpenSlide allows nothing but closing the slide, so [`Handle`] drops its slide then and opens it
//! again on the next call.

use std::path::{Path, PathBuf};

use openslide_rs::errors::OpenSlideError;
use openslide_rs::{Address, OpenSlide, Region, Size};

use super::container::{self, Container};
use super::{SlideError, SlideError as E};
use crate::geometry::{Level, Level0Rect};

/// Opens `path`, telling the reasons for failure apart that OpenSlide lumps together.
pub(super) fn open(path: &Path) -> Result<OpenSlide, SlideError> {
    crate::native::openslide()?;
    let owned = || path.to_owned();
    let io_error = |source: std::io::Error| match source.kind() {
        std::io::ErrorKind::NotFound => E::NotFound { path: owned() },
        _ => E::Io { path: owned(), source },
    };
    let metadata = std::fs::metadata(path).map_err(io_error)?;
    if metadata.is_dir() {
        return Err(E::IsDirectory { path: owned() });
    }
    OpenSlide::new(path).map_err(|source| match (source, container::inspect(path)) {
        (_, Err(error)) => io_error(error),
        (_, Ok(Container::TruncatedTiff { needed, actual })) => E::Truncated { path: owned(), needed, actual },
        (OpenSlideError::UnsupportedFile(_), Ok(container)) => {
            let found = match container {
                Container::Other(found) => found,
                Container::Dicom => "a DICOM file, but no whole-slide image",
                Container::Tiff { compression: None } | Container::TruncatedTiff { .. } => "a TIFF that is not tiled",
                Container::Tiff { compression: Some(_) } => "a tiled TIFF of a kind unknown to it, or cut off",
            };
            E::NotASlide { path: owned(), found }
        }
        (source, Ok(_)) => E::Open { path: owned(), source },
    })
}

/// A slide open for reading, that survives read errors.
#[derive(Debug)]
pub(super) struct Handle {
    path: PathBuf,
    slide: Option<OpenSlide>,
}

/// A rectangle of one level to read.
#[derive(Clone, Copy, Debug)]
pub(super) struct Window {
    /// The level.
    pub level: Level,
    /// Upper left corner in level-0 pixels, as OpenSlide wants it.
    pub x: u32,
    /// See `x`.
    pub y: u32,
    /// Width in pixels of the level, at least 1.
    pub width: u32,
    /// Height in pixels of the level, at least 1.
    pub height: u32,
    /// Level-0 pixels per pixel of the level; only for messages.
    pub downsample: f64,
}

impl Handle {
    pub(super) fn open(path: &Path) -> Result<Self, SlideError> {
        Ok(Self { path: path.to_owned(), slide: Some(open(path)?) })
    }

    /// The pixels of a window: `[height, width, 4]`, premultiplied BGRA, transparent where the slide has none.
    pub(super) fn read(&mut self, window: Window) -> Result<Vec<u8>, SlideError> {
        let slide = match self.slide.take() {
            Some(slide) => slide,
            None => open(&self.path)?,
        };
        let region = Region {
            address: Address { x: window.x, y: window.y },
            level: window.level.0,
            size: Size { w: window.width, h: window.height },
        };
        let pixels = slide.read_region(&region).map_err(|source| SlideError::Read {
            path: self.path.clone(),
            level: window.level,
            region: window.level0_rect(),
            source,
        })?;
        // Only a slide without an error goes back; the other one was closed on the way out.
        self.slide = Some(slide);
        Ok(pixels)
    }
}

impl Window {
    fn level0_rect(&self) -> Level0Rect {
        #[expect(clippy::cast_possible_truncation, reason = "level-0 sizes are checked to be far below 2^53")]
        let scale = |size: u32| (f64::from(size) * self.downsample).round() as i64;
        Level0Rect { x: i64::from(self.x), y: i64::from(self.y), width: scale(self.width), height: scale(self.height) }
    }
}

/// Composites premultiplied BGRA over `background` into RGB of as many pixels.
pub(super) fn composite(bgra: &[u8], background: [u8; 3], rgb: &mut [u8]) {
    for (pixel, out) in bgra.chunks_exact(4).zip(rgb.chunks_exact_mut(3)) {
        let alpha = pixel[3];
        if alpha == u8::MAX {
            (out[0], out[1], out[2]) = (pixel[2], pixel[1], pixel[0]);
        } else {
            for channel in 0..3 {
                out[channel] = over(pixel[2 - channel], alpha, background[channel]);
            }
        }
    }
}

/// One channel of a premultiplied pixel over an opaque one.
fn over(premultiplied: u8, alpha: u8, below: u8) -> u8 {
    let rest = (u16::from(u8::MAX - alpha) * u16::from(below) + 127) / 255;
    u8::try_from(u16::from(premultiplied) + rest).unwrap_or(u8::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn transparency_shows_the_background() {
        let mut rgb = [0; 12];
        // Opaque, fully transparent, half transparent black, and a resampler's overshoot (colour above alpha).
        let bgra = [[1, 2, 3, 255], [0, 0, 0, 0], [0, 0, 0, 128], [255, 255, 255, 250]].concat();
        composite(&bgra, [255, 250, 200], &mut rgb);
        assert_eq!(rgb.to_vec(), [[3, 2, 1], [255, 250, 200], [127, 125, 100], [255, 255, 255]].concat());
    }
}
