//! Pictures for people, as PNG.

use std::path::Path;

use image::codecs::png::{CompressionType, FilterType, PngEncoder};
use image::{ExtendedColorType, ImageEncoder, RgbImage};

use super::{AtomicFile, OutputError, Written};

/// Writes a picture atomically.
///
/// # Errors
/// [`OutputError::Write`], [`OutputError::Image`] for one that PNG can't hold, such as one without pixels.
pub fn write_png(path: &Path, picture: &RgbImage) -> Result<Written, OutputError> {
    let mut file = AtomicFile::create(path)?;
    PngEncoder::new_with_quality(&mut file, CompressionType::Fast, FilterType::Adaptive)
        .write_image(picture.as_raw(), picture.width(), picture.height(), ExtendedColorType::Rgb8)
        .map_err(|error| match error {
            image::ImageError::IoError(source) => OutputError::write(path)(source),
            source => OutputError::Image { path: path.to_owned(), source },
        })?;
    file.commit()
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
