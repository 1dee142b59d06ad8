//! The one filter by which pixels change their scale.

use fast_image_resize::images::{TypedImage, TypedImageRef};
use fast_image_resize::pixels::U8x3;
use fast_image_resize::{CropBoxError, FilterType, ResizeAlg, ResizeError, ResizeOptions, Resizer};

/// Bicubic (a = -0.5), widened when it shrinks so that nothing aliases: the filter of Pillow's `resize` by default, hence
/// what models have been trained on (Pillow rounds between its two directions, so its pixels differ by a level or two). Lanczos3 costs half as much again and rings at the edge of tissue and glass; a
/// box or bilinear filter is cheaper but blurs at factors just above 1.
const FILTER: FilterType = FilterType::CatmullRom;

/// Reach of the filter to each side in pixels, at a factor of 1.
pub(super) const FILTER_REACH: f64 = 2.0;

/// A part of an image, in its pixels.
#[derive(Clone, Copy, Debug)]
pub(super) struct Crop {
    pub left: f64,
    pub top: f64,
    pub width: f64,
    pub height: f64,
}

/// Resamples `crop` of `source` so that it fills `target`: both are a width, a height and RGB8 pixels.
pub(super) fn resample(
    resizer: &mut Resizer,
    source: (u32, u32, &[u8]),
    crop: Crop,
    target: (u32, u32, &mut [u8]),
) -> Result<(), ResizeError> {
    let too_short = |_| ResizeError::SrcCroppingError(CropBoxError::SizeIsOutOfImageBoundaries);
    // The typed calls, because the others build the filters of all thirteen pixel types, which takes minutes.
    let source = TypedImageRef::<U8x3>::from_buffer(source.0, source.1, source.2).map_err(too_short)?;
    let mut target = TypedImage::<U8x3>::from_buffer(target.0, target.1, target.2).map_err(too_short)?;
    let options = ResizeOptions::new().resize_alg(ResizeAlg::Convolution(FILTER)).use_alpha(false).crop(
        crop.left,
        crop.top,
        crop.width,
        crop.height,
    );
    resizer.resize_typed(&source, &mut target, &options)
}
