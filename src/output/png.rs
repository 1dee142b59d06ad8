//! Pictures for people, as PNG.

use std::path::Path;

use image::codecs::png::{CompressionType, FilterType, PngEncoder};
use image::{ExtendedColorType, GrayImage, ImageEncoder, RgbImage};

use super::{OutputError, Written, write_atomic};

/// Writes a picture atomically.
///
/// # Errors
/// [`OutputError::Write`], [`OutputError::Image`] for one that PNG can't hold, such as one without pixels.
pub fn write_png(path: &Path, picture: &RgbImage) -> Result<Written, OutputError> {
    write(path, picture.as_raw(), picture.dimensions(), ExtendedColorType::Rgb8)
}

/// Writes a picture of one channel atomically, such as a mask of class indices.
///
/// # Errors
/// Those of [`write_png`].
pub fn write_grey_png(path: &Path, picture: &GrayImage) -> Result<Written, OutputError> {
    write(path, picture.as_raw(), picture.dimensions(), ExtendedColorType::L8)
}

fn write(
    path: &Path,
    pixels: &[u8],
    (width, height): (u32, u32),
    kind: ExtendedColorType,
) -> Result<Written, OutputError> {
    // Encoded apart from the file: of a write that the system refuses, the encoder keeps the text but not the kind.
    let mut bytes = Vec::new();
    PngEncoder::new_with_quality(&mut bytes, CompressionType::Fast, FilterType::Adaptive)
        .write_image(pixels, width, height, kind)
        .map_err(|source| OutputError::Image { path: path.to_owned(), source })?;
    write_atomic(path, &bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_picture_reads_back() {
        let folder = tempfile::tempdir().unwrap();
        let picture = RgbImage::from_fn(5, 3, |x, y| image::Rgb([x.to_le_bytes()[0], y.to_le_bytes()[0], 200]));
        let written = write_png(&folder.path().join("p.png"), &picture).unwrap();
        assert_eq!(image::open(&written.path).unwrap().into_rgb8(), picture);
    }

    #[test]
    fn a_mask_keeps_its_values() {
        let folder = tempfile::tempdir().unwrap();
        let mask = GrayImage::from_fn(5, 3, |x, y| image::Luma([(x * 3 + y).to_le_bytes()[0]]));
        let written = write_grey_png(&folder.path().join("m.png"), &mask).unwrap();
        assert!(matches!(image::open(&written.path).unwrap(), image::DynamicImage::ImageLuma8(read) if read == mask));
    }
}
