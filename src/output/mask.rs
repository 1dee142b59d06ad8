//! The picture of a tissue mask: labels tinted and outlined over the slide's thumbnail, so that a person can check it.

use image::RgbImage;

use super::ClassStyle;
use super::figure::{Figure, LegendItem, blend, percent};
use super::overlay::{MapArea, Thumbnail};

/// Opacity of the tint; the outline is opaque.
const TINT: f64 = 0.3;

/// A value of the mask and what it means, such as tissue, removed pen or filled hole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MaskLabel {
    /// Value of its cells.
    pub value: u8,
    /// Name and colour.
    pub style: ClassStyle,
}

/// A mask over the slide.
#[derive(Clone, Copy, Debug)]
pub struct MaskPicture<'a> {
    /// First line, usually the slide's id.
    pub title: &'a str,
    /// Second line, usually the method and its threshold.
    pub subtitle: &'a str,
    /// Size and place of the mask.
    pub map: MapArea,
    /// A value per cell, `[height, width]`; those without a label are left as they are.
    pub values: &'a [u8],
    /// The labels that are drawn.
    pub labels: &'a [MaskLabel],
}

/// Draws the mask with its legend and a scale bar.
#[must_use]
pub fn draw_mask(thumbnail: &Thumbnail<'_>, mask: &MaskPicture<'_>) -> RgbImage {
    let (width, height) = thumbnail.pixels.dimensions();
    let label_at = |x: u32, y: u32| {
        let value = *mask.values.get(mask.map.cell_at(thumbnail, x, y)?)?;
        mask.labels.iter().find(|label| label.value == value)
    };
    // The outline grows with the picture: one pixel vanishes when a large page is scaled to the screen.
    let line = (width.max(height) / 600).max(1);
    let mut picture = thumbnail.pixels.clone();
    for (x, y, pixel) in picture.enumerate_pixels_mut() {
        let Some(label) = label_at(x, y) else { continue };
        let neighbours = [
            (x.saturating_sub(line), y),
            ((x + line).min(width - 1), y),
            (x, y.saturating_sub(line)),
            (x, (y + line).min(height - 1)),
        ];
        let is_outline =
            neighbours.into_iter().any(|(x, y)| label_at(x, y).is_none_or(|other| other.value != label.value));
        pixel.0 = blend(pixel.0, label.style.color, if is_outline { 1.0 } else { TINT });
    }
    let count = |value: u8| mask.values.iter().filter(|cell| **cell == value).count() as u64;
    let total = mask.values.len() as u64;
    let item = |label: &MaskLabel| LegendItem {
        color: Some(label.style.color),
        label: label.style.name.clone(),
        value: percent(count(label.value), total),
    };
    Figure {
        picture,
        title: mask.title,
        subtitle: mask.subtitle,
        legend_title: "Mask",
        legend: mask.labels.iter().map(item).collect(),
        color_bar: None,
        notes: vec!["Shares are of the whole area.".into()],
        um_per_px: thumbnail.um_per_px,
    }
    .draw()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::geometry::Level0Rect;

    #[test]
    fn labels_are_tinted_inside_and_opaque_at_their_rim() {
        let area = Level0Rect { x: 0, y: 0, width: 50, height: 50 };
        let pixels = RgbImage::from_pixel(5, 5, image::Rgb([100, 100, 100]));
        let mut values = [1; 25];
        values[0] = 0;
        let label = MaskLabel { value: 1, style: ClassStyle { name: "tissue".into(), color: [0, 200, 0] } };
        let mask = MaskPicture {
            title: "t",
            subtitle: "s",
            map: MapArea { width: 5, height: 5, area },
            values: &values,
            labels: &[label],
        };
        let page = draw_mask(&Thumbnail { pixels: &pixels, area, um_per_px: 1.0 }, &mask);
        let at = |x: u32, y: u32| page.get_pixel(16 + x, 64 + y).0;
        assert_eq!(at(0, 0), [100; 3], "no label");
        assert_eq!(at(1, 0), [0, 200, 0], "rim");
        assert_eq!(at(2, 2), [70, 130, 70], "inside");
        assert_eq!(at(4, 4), [70, 130, 70], "the border of the picture is no rim");
    }
}
