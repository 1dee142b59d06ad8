//! Decodes an image file: the whole of it, or an error that says what is wrong.

use std::error::Error;
use std::fs::{self, File};
use std::io::{self, BufReader, Read, Seek};
use std::path::Path;

use image::{DynamicImage, ImageDecoder, ImageError, ImageFormat, ImageReader, Limits, Rgb, RgbImage, Rgba};

use super::jpeg::{Fault, Jpeg};
use super::{ExperimentError, WHITE, unsuited};

/// What an image may take decoded: with its map of a few classes it is several times as much.
const MOST_BYTES: u64 = 512 << 20;
/// A file's kind shows in so many bytes.
const SIGNATURE_BYTES: u64 = 16;

/// Decodes an image by what is in the file, whatever its name says.
pub(super) fn decode(path: &Path) -> Result<DynamicImage, ExperimentError> {
    let unreadable = |error: io::Error| ExperimentError::Image { path: path.to_owned(), source: error.into() };
    if super::is_dangling(path) {
        return Err(unsuited(path, "is a link to a file that is not there".to_owned(), "mend the link or remove it"));
    }
    if !fs::metadata(path).map_err(unreadable)?.is_file() {
        return Err(unsuited(path, "is no file".to_owned(), "name images, or folders that hold them"));
    }
    let mut file = BufReader::new(File::open(path).map_err(unreadable)?);
    let mut start = Vec::new();
    file.by_ref().take(SIGNATURE_BYTES).read_to_end(&mut start).map_err(unreadable)?;
    if start.is_empty() {
        return Err(damaged(path, "it is empty".to_owned()));
    }
    match image::guess_format(&start).map_err(|error| wrong(path, error))? {
        ImageFormat::Jpeg => {
            file.read_to_end(&mut start).map_err(unreadable)?;
            decode_jpeg(path, start)
        }
        format => {
            file.rewind().map_err(unreadable)?;
            decode_other(file, format, path)
        }
    }
}

fn decode_jpeg(path: &Path, data: Vec<u8>) -> Result<DynamicImage, ExperimentError> {
    let wrong = |fault| match fault {
        Fault::Damaged(reason) => damaged(path, reason),
        Fault::Unsupported(reason) => unsuited(path, reason, "convert it to png"),
    };
    let jpeg = Jpeg::read(data).map_err(wrong)?;
    check_size(path, jpeg.size, jpeg.channels())?;
    jpeg.decode().map_err(wrong)
}

fn decode_other(file: BufReader<File>, format: ImageFormat, path: &Path) -> Result<DynamicImage, ExperimentError> {
    let mut reader = ImageReader::with_format(file, format);
    let mut limits = Limits::default();
    // The image itself, and as much again for what its decoder needs.
    limits.max_alloc = Some(2 * MOST_BYTES);
    reader.limits(limits);
    let decoder = reader.into_decoder().map_err(|error| wrong(path, error))?;
    check_size(path, decoder.dimensions(), decoder.color_type().bytes_per_pixel())?;
    DynamicImage::from_decoder(decoder).map_err(|error| wrong(path, error))
}

fn check_size(path: &Path, (width, height): (u32, u32), pixel_bytes: u8) -> Result<(), ExperimentError> {
    let bytes = (u64::from(width) * u64::from(height)).saturating_mul(u64::from(pixel_bytes));
    if bytes <= MOST_BYTES {
        return Ok(());
    }
    let mib = |bytes: u64| bytes.div_ceil(1 << 20);
    let reason = format!(
        "is {width} × {height} px, which are {} MiB decoded, more than the {} MiB that an image may have",
        mib(bytes),
        mib(MOST_BYTES)
    );
    Err(unsuited(path, reason, TOO_LARGE))
}

/// What to do with an image that is too large.
const TOO_LARGE: &str = "cut it into smaller images, or use slidestream run if it is a slide";

/// A decoder's error: damage, want of memory, or a kind of image that is not read.
fn wrong(path: &Path, error: ImageError) -> ExperimentError {
    match error {
        _ if ends_early(&error) => damaged(path, "its data end early".to_owned()),
        ImageError::Decoding(error) => damaged(path, error.to_string()),
        ImageError::Limits(_) => {
            let reason = format!("needs more memory than the {} MiB that an image may have", MOST_BYTES >> 20);
            unsuited(path, reason, TOO_LARGE)
        }
        source => ExperimentError::Image { path: path.to_owned(), source },
    }
}

fn ends_early(error: &(dyn Error + 'static)) -> bool {
    let is_end = |error: &io::Error| error.kind() == io::ErrorKind::UnexpectedEof;
    let is_here = match error.downcast_ref::<ImageError>() {
        // It does not name what it wraps as its source.
        Some(ImageError::IoError(error)) => is_end(error),
        _ => error.downcast_ref().is_some_and(is_end),
    };
    is_here || error.source().is_some_and(ends_early)
}

fn damaged(path: &Path, reason: String) -> ExperimentError {
    ExperimentError::DamagedImage { path: path.to_owned(), reason }
}

/// An image as RGB: what is transparent lies on white, as on a slide's glass.
pub(super) fn over_white(image: DynamicImage) -> RgbImage {
    if !image.color().has_alpha() {
        return image.into_rgb8();
    }
    let image = image.into_rgba8();
    let mix = |value: u8, white: u8, alpha: u8| {
        let (alpha, rest) = (u32::from(alpha), u32::from(u8::MAX - alpha));
        u8::try_from((u32::from(value) * alpha + u32::from(white) * rest + 127) / 255).unwrap_or(u8::MAX)
    };
    RgbImage::from_fn(image.width(), image.height(), |x, y| {
        let Rgba([red, green, blue, alpha]) = *image.get_pixel(x, y);
        let [r, g, b] = WHITE.0;
        Rgb([mix(red, r, alpha), mix(green, g, alpha), mix(blue, b, alpha)])
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use image::{GrayAlphaImage, LumaA, RgbaImage};

    fn picture() -> RgbImage {
        RgbImage::from_fn(40, 30, |x, y| Rgb([x.to_le_bytes()[0] * 5, y.to_le_bytes()[0] * 7, 90]))
    }

    #[test]
    fn files_that_are_cut_off_are_damaged() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["a.png", "a.bmp", "a.tif", "a.webp", "a.jpg"] {
            let path = folder.path().join(name);
            picture().save(&path).unwrap();
            let whole = fs::read(&path).unwrap();
            assert!(decode(&path).is_ok(), "{name}");
            for part in [20, 40, 60, 80, 90] {
                fs::write(&path, &whole[..whole.len() * part / 100]).unwrap();
                let error = decode(&path).expect_err(&format!("{name} at {part} %"));
                assert!(error.to_string().contains(": is damaged: "), "{part} %: {error}");
            }
            fs::write(&path, "").unwrap();
            assert!(decode(&path).unwrap_err().to_string().ends_with("is damaged: it is empty"), "{name}");
        }
    }

    #[test]
    fn an_image_that_is_too_large_tells_its_size_and_the_limit() {
        assert!(check_size(Path::new("a.png"), (16_384, 10_922), 3).is_ok());
        let error = check_size(Path::new("a.png"), (60_000, 60_000), 3).unwrap_err();
        let expected = "is 60000 × 60000 px, which are 10300 MiB decoded, more than the 512 MiB that";
        assert!(error.to_string().contains(expected), "{error}");
        assert!(error.hint().unwrap().contains("slidestream run"));
        assert!(check_size(Path::new("a.png"), (u32::MAX, u32::MAX), 8).is_err());
    }

    #[test]
    fn what_is_transparent_lies_on_white() {
        let rgba = RgbaImage::from_fn(3, 1, |x, _| Rgba([10, 100, 200, [0, 128, 255][x as usize]]));
        assert_eq!(over_white(rgba.into()).into_raw(), [255, 255, 255, 132, 177, 227, 10, 100, 200]);
        let grey = GrayAlphaImage::from_fn(2, 1, |x, _| LumaA([7, [0, 255][x as usize]]));
        assert_eq!(over_white(grey.into()).into_raw(), [255, 255, 255, 7, 7, 7]);
        assert_eq!(over_white(picture().into()), picture());
    }

    #[test]
    fn a_transparent_colour_of_a_palette_is_white() {
        // Two pixels of a palette of black, which is transparent, and green.
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.png");
        let chunk = |kind: &[u8], data: &[u8]| {
            let mut crc = flate2::Crc::new();
            [kind, data].iter().for_each(|part| crc.update(part));
            let length = u32::try_from(data.len()).unwrap();
            [&length.to_be_bytes(), kind, data, &crc.sum().to_be_bytes()].concat()
        };
        let mut pixels = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::fast());
        io::Write::write_all(&mut pixels, &[0, 0, 1]).unwrap();
        let png = [
            b"\x89PNG\r\n\x1a\n".to_vec(),
            chunk(b"IHDR", &[0, 0, 0, 2, 0, 0, 0, 1, 8, 3, 0, 0, 0]),
            chunk(b"PLTE", &[0, 0, 0, 1, 200, 3]),
            chunk(b"tRNS", &[0]),
            chunk(b"IDAT", &pixels.finish().unwrap()),
            chunk(b"IEND", &[]),
        ];
        fs::write(&path, png.concat()).unwrap();
        assert_eq!(over_white(decode(&path).unwrap()).into_raw(), [255, 255, 255, 1, 200, 3]);
    }

    #[test]
    fn what_is_no_image_says_what_it_is() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.png");
        fs::write(&path, "GIF89a, or so it says").unwrap();
        let error = decode(&path).unwrap_err();
        assert!(error.chain().contains("is no image that can be read: ") && error.chain().contains("Gif"), "{error}");
        assert!(error.hint().unwrap().contains("convert it"));
        assert!(decode(folder.path()).unwrap_err().to_string().contains("is no file"));
        #[cfg(unix)]
        {
            std::os::unix::fs::symlink(folder.path().join("none"), folder.path().join("b.png")).unwrap();
            let told = decode(&folder.path().join("b.png")).unwrap_err().to_string();
            assert!(told.ends_with("b.png: is a link to a file that is not there"), "{told}");
        }
    }
}
