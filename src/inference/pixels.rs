//! Writes tiles into a model's input: resized, normalised, in its layout and element type.

use fast_image_resize::images::{TypedImage, TypedImageRef};
use fast_image_resize::pixels::U8x3;
use fast_image_resize::{FilterType, ResizeAlg, ResizeOptions, Resizer};
use half::f16;

use super::card::ModelCard;
use super::contract::{Contract, Layout};
use crate::onnx::{ElementType, Tensor, Values};

/// What every byte of every channel becomes: `[channel][byte]`.
pub(super) type Table<T> = [[T; 256]; 3];

/// The table of `(byte / 255 - mean) / std`.
pub(super) fn normalisation(card: &ModelCard) -> Table<f32> {
    std::array::from_fn(|channel| {
        let mut row = [0.0; 256];
        for (value, byte) in row.iter_mut().zip(0..=u8::MAX) {
            // In f64, so that the value is the nearest float whatever the order of a framework's operations.
            let unit = f64::from(byte) / 255.0;
            let normal = (unit - f64::from(card.mean[channel])) / f64::from(card.std[channel]);
            #[expect(clippy::cast_possible_truncation, reason = "the model's precision")]
            let normal = normal as f32;
            *value = normal;
        }
        row
    })
}

/// The same in half precision.
pub(super) fn to_f16(table: &Table<f32>) -> Table<f16> {
    table.map(|row| row.map(f16::from_f32))
}

/// Bytes as they are.
pub(super) fn identity() -> Table<u8> {
    let mut row = [0; 256];
    for (value, byte) in row.iter_mut().zip(0..=u8::MAX) {
        *value = byte;
    }
    [row; 3]
}

/// Writes one image, `[side, side, 3]` RGB, to `into`, which is as long as `rgb`.
pub(super) fn write<T: Copy>(rgb: &[u8], table: &Table<T>, layout: Layout, into: &mut [T]) {
    let [red, green, blue] = table;
    match layout {
        Layout::Nhwc => {
            for (value, pixel) in into.chunks_exact_mut(3).zip(rgb.chunks_exact(3)) {
                value[0] = red[usize::from(pixel[0])];
                value[1] = green[usize::from(pixel[1])];
                value[2] = blue[usize::from(pixel[2])];
            }
        }
        Layout::Nchw => {
            let (reds, others) = into.split_at_mut(rgb.len() / 3);
            let (greens, blues) = others.split_at_mut(rgb.len() / 3);
            let planes = reds.iter_mut().zip(greens).zip(blues);
            for (((r, g), b), pixel) in planes.zip(rgb.chunks_exact(3)) {
                *r = red[usize::from(pixel[0])];
                *g = green[usize::from(pixel[1])];
                *b = blue[usize::from(pixel[2])];
            }
        }
    }
}

/// Tiles as the model is given them, in its layout and element type; each `[tile_size, tile_size, 3]` RGB8.
#[must_use]
pub fn image_tensor(card: &ModelCard, contract: &Contract, tiles: &[&[u8]]) -> Tensor {
    let side = contract.side;
    let dims = match contract.layout {
        Layout::Nchw => [tiles.len(), 3, side, side],
        Layout::Nhwc => [tiles.len(), side, side, 3],
    };
    let mut resizer = card.resize.map(|side| TileResizer::new(card.tile_size, side));
    let mut images = Vec::with_capacity(tiles.len());
    for tile in tiles {
        let resized = resizer.as_mut().and_then(|resizer| resizer.resize(tile));
        images.push(resized.unwrap_or(tile).to_vec());
    }
    fn fill<T: Copy + Default>(images: &[Vec<u8>], table: &Table<T>, layout: Layout) -> Vec<T> {
        let mut values = vec![T::default(); images.iter().map(Vec::len).sum()];
        let len = images.first().map_or(1, Vec::len);
        for (rgb, into) in images.iter().zip(values.chunks_exact_mut(len)) {
            write(rgb, table, layout, into);
        }
        values
    }
    let table = normalisation(card);
    let values = match contract.element {
        ElementType::U8 => Values::U8(fill(&images, &identity(), contract.layout)),
        ElementType::F16 => Values::F16(fill(&images, &to_f16(&table), contract.layout)),
        _ => Values::F32(fill(&images, &table, contract.layout)),
    };
    Tensor { dims: dims.to_vec(), values }
}

/// Brings tiles to the side that the model sees: bilinear and antialiased, as torchvision's `Resize` is.
pub(super) struct TileResizer {
    resizer: Resizer,
    from: u32,
    to: u32,
    image: Vec<u8>,
}

impl TileResizer {
    pub(super) fn new(from: u32, to: u32) -> Self {
        Self { resizer: Resizer::new(), from, to, image: vec![0; to as usize * to as usize * 3] }
    }

    /// Bytes of a resized tile.
    pub(super) fn image_len(&self) -> usize {
        self.image.len()
    }

    /// The resized tile; `None` if `rgb` hasn't the size that was set.
    pub(super) fn resize(&mut self, rgb: &[u8]) -> Option<&[u8]> {
        // The typed calls, because the others build the filters of all thirteen pixel types, which takes minutes.
        let source = TypedImageRef::<U8x3>::from_buffer(self.from, self.from, rgb).ok()?;
        let mut target = TypedImage::<U8x3>::from_buffer(self.to, self.to, &mut self.image).ok()?;
        let options = ResizeOptions::new().resize_alg(ResizeAlg::Convolution(FilterType::Bilinear)).use_alpha(false);
        self.resizer.resize_typed(&source, &mut target, &options).ok()?;
        Some(&self.image)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layouts_differ_in_order_only() {
        let rgb = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12];
        let mut values = [0; 12];
        write(&rgb, &identity(), Layout::Nhwc, &mut values);
        assert_eq!(values, rgb);
        write(&rgb, &identity(), Layout::Nchw, &mut values);
        assert_eq!(values, [1, 4, 7, 10, 2, 5, 8, 11, 3, 6, 9, 12]);
    }

    #[test]
    fn a_resized_tile_keeps_its_colours() {
        let flat = [10, 20, 30].repeat(8 * 8);
        let mut resizer = TileResizer::new(8, 4);
        assert_eq!(resizer.resize(&flat).unwrap(), [10, 20, 30].repeat(4 * 4));
        assert!(resizer.resize(&flat[3..]).is_none());
    }
}
