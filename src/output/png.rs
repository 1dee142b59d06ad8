//! Pictures for people, as PNG.

use std::path::Path;

use image::codecs::png::{CompressionType, FilterType, PngEncoder};
use image::{ExtendedColorType, ImageEncoder, RgbImage};

use super::{OutputError, Written, write_atomic};

/// Writes a picture atomically.
///
/// # Errors
/// [`OutputError::Write`], [`OutputError::Image`] for one that PNG can't hold, such as one without pixels.
pub fn write_png(path: &Path, picture: &RgbImage) -> Result<Written, OutputError> {
    // Encoded apart from the file: of a write that the system refuses, the encoder keeps the text but not the kind.
    let mut bytes = Vec::new();
    PngEncoder::new_with_quality(&mut bytes, CompressionType::Fast, FilterType::Adaptive)
        .write_image(picture.as_raw(), picture.width(), picture.height(), ExtendedColorType::Rgb8)
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
}
