//! The mask drawn over a picture of the slide.

use image::{Rgb, RgbImage};

use super::{Cell, TissueMask};

impl TissueMask {
    /// Draws the mask over a thumbnail of the whole slide, of any size: tissue outlined in green, background dimmed,
    /// and what was taken away tinted by its kind.
    #[must_use]
    pub fn draw_over(&self, thumbnail: &RgbImage) -> RgbImage {
        let (width, height) = thumbnail.dimensions();
        let cell = |x: u32, y: u32| {
            let scaled = |position: u32, from: u32, to: u32| {
                (u64::from(position) * u64::from(to) / u64::from(from.max(1))).min(u64::from(to - 1))
            };
            let (col, row) = (scaled(x, width, self.width), scaled(y, height, self.height));
            usize::try_from(row * u64::from(self.width) + col).map_or(Cell::Background, |index| self.cells[index])
        };
        RgbImage::from_fn(width, height, |x, y| {
            let here = cell(x, y);
            let right = cell((x + 1).min(width - 1), y);
            let below = cell(x, (y + 1).min(height - 1));
            if here.is_tissue() != right.is_tissue() || here.is_tissue() != below.is_tissue() {
                return Rgb([0, 150, 60]);
            }
            match tint(here) {
                Some((colour, share)) => blend(*thumbnail.get_pixel(x, y), colour, share),
                None => *thumbnail.get_pixel(x, y),
            }
        })
    }
}

/// Colour and strength in percent of what is laid over a cell.
fn tint(cell: Cell) -> Option<([u8; 3], u16)> {
    match cell {
        Cell::Tissue => None,
        Cell::Background => Some(([128, 128, 128], 25)),
        Cell::Pen => Some(([255, 0, 255], 60)),
        Cell::Border => Some(([0, 160, 255], 60)),
        Cell::Speck => Some(([255, 140, 0], 70)),
        Cell::Unreadable => Some(([255, 0, 0], 60)),
    }
}

fn blend(Rgb(below): Rgb<u8>, above: [u8; 3], percent: u16) -> Rgb<u8> {
    let mix = |below: u8, above: u8| {
        let sum = u16::from(below) * (100 - percent) + u16::from(above) * percent;
        u8::try_from((sum + 50) / 100).unwrap_or(u8::MAX)
    };
    Rgb([mix(below[0], above[0]), mix(below[1], above[1]), mix(below[2], above[2])])
}
