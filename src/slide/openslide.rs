//! The one place that calls OpenSlide for pixels.
//!
//! After an error OpenSlide allows nothing but closing the slide, so [`OpenSlideLevel`] drops its slide then and opens it
//! again on the next call.

use std::path::{Path, PathBuf};

use openslide_rs::errors::OpenSlideError;
use openslide_rs::{Address, OpenSlide, Region, Size};

use super::container::{self, Container};
use super::error::DecodeError;
use super::source::{LevelRect, LevelSource, Shift, fill};
use super::{LevelInfo, Slide, SlideError, SlideError as E};
use crate::geometry::Level;

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
    // Opening a pipe would wait for its other end.
    if !metadata.is_file() {
        return Err(E::Io { path: owned(), source: std::io::Error::other("neither a file nor a folder") });
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

/// One level of a slide open for reading, that survives read errors.
#[derive(Debug)]
pub(super) struct OpenSlideLevel {
    path: PathBuf,
    level: Level,
    info: LevelInfo,
    background: [u8; 3],
    slide: Option<OpenSlide>,
}

impl OpenSlideLevel {
    pub(super) fn open(slide: &Slide, level: Level) -> Result<Self, SlideError> {
        let (path, info) = (slide.path.clone(), slide.level_info(level)?);
        let handle = open(&path)?;
        Ok(Self { path, level, info, background: slide.background, slide: Some(handle) })
    }
}

impl LevelSource for OpenSlideLevel {
    fn read(&mut self, rect: LevelRect, rgb: &mut Vec<u8>) -> Result<Shift, SlideError> {
        self.read_shifted(rect, (0.0, 0.0), rgb)
    }

    fn read_from(&mut self, rect: LevelRect, fraction: (f64, f64), rgb: &mut Vec<u8>) -> Result<(), SlideError> {
        self.read_shifted(rect, fraction, rgb).map(drop)
    }
}

impl OpenSlideLevel {
    /// OpenSlide takes level-0 positions and interpolates where they fall between pixels of the level, hence the shift.
    fn read_shifted(&mut self, rect: LevelRect, fraction: (f64, f64), rgb: &mut Vec<u8>) -> Result<Shift, SlideError> {
        let row_bytes = rect.width as usize * 3;
        rgb.resize(row_bytes * rect.height as usize, 0);
        let Some(part) = rect.clipped((self.info.width, self.info.height)) else {
            fill(rgb, self.background);
            return Ok(Shift::default());
        };
        let slide = match self.slide.take() {
            Some(slide) => slide,
            None => open(&self.path)?,
        };
        let downsample = self.info.openslide_downsample;
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a level lies within level 0")]
        let address = |position: u32, skipped: usize, fraction: f64| {
            // What starts before the slide is read from the slide's edge on.
            let exact = f64::from(position) + if skipped == 0 { fraction } else { 0.0 };
            (exact.max(0.0) * downsample).round() as u32
        };
        let (x, y) = (address(part.x, part.left, fraction.0), address(part.y, part.top, fraction.1));
        let region =
            Region { address: Address { x, y }, level: self.level.0, size: Size { w: part.width, h: part.height } };
        let bgra = slide.read_region(&region).map_err(|source| SlideError::Read {
            path: self.path.clone(),
            level: self.level,
            region: rect.level0(&self.info),
            source: DecodeError::OpenSlide(source),
        })?;
        // Only a slide without an error goes back; the other one was closed on the way out.
        self.slide = Some(slide);
        if (part.width, part.height) != (rect.width, rect.height) {
            fill(rgb, self.background);
        }
        let rows = rgb.chunks_exact_mut(row_bytes).skip(part.top);
        for (row, source) in rows.zip(bgra.chunks_exact(part.width as usize * 4)) {
            composite(source, self.background, &mut row[part.left * 3..]);
        }
        let shift = |address: u32, position: u32| f64::from(address) / downsample - f64::from(position);
        Ok(Shift { x: shift(x, part.x), y: shift(y, part.y) })
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
