//! The picture of a result: the slide's thumbnail, faded, with each cell tinted in the colour of its strongest class.

use image::{Pixel, RgbImage};
use rayon::prelude::*;

use crate::geometry::Level0Rect;

use super::ClassStyle;
use super::figure::{ColorBar, Figure, LegendItem, blend, percent};

/// Opacity just above the floor, so that a class at the threshold is seen at all.
const LEAST_OPACITY: f64 = 0.2;
/// Opacity at probability 1: the tissue must stay visible.
const MOST_OPACITY: f64 = 0.7;

/// How far the stain fades to grey: the pink of eosin would hide red and orange classes.
const FADE: f64 = 0.65;

/// What the colour bar is blended over: a mean colour of H&E.
const STAIN: [u8; 3] = [226, 196, 214];

/// The slide as the picture shows it.
#[derive(Clone, Copy, Debug)]
pub struct Thumbnail<'a> {
    /// Its pixels.
    pub pixels: &'a RgbImage,
    /// The area that they show.
    pub area: Level0Rect,
    /// Width of one of its pixels in µm, for the scale bar.
    pub um_per_px: f64,
}

/// A map laid over the slide, a value per cell, `[height, width]`.
#[derive(Clone, Copy, Debug)]
pub struct MapArea {
    /// Columns.
    pub width: u32,
    /// Rows.
    pub height: u32,
    /// The area that the cells cover together.
    pub area: Level0Rect,
}

/// A class as the overlay draws it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OverlayClass {
    /// Name and colour.
    pub style: ClassStyle,
    /// Whether it is only counted, not drawn.
    pub is_background: bool,
}

/// What is drawn over the thumbnail.
#[derive(Clone, Copy, Debug)]
pub struct Overlay<'a> {
    /// First line, usually the slide's id.
    pub title: &'a str,
    /// Second line, usually the model and the resolution.
    pub subtitle: &'a str,
    /// Size and place of the maps.
    pub map: MapArea,
    /// Strongest class of each cell: 0 is not inferred, `i` is `classes[i - 1]`.
    pub class_index: &'a [u8],
    /// One map per class: its probability, 255 is 1.
    pub probabilities: &'a [&'a [u8]],
    /// The classes.
    pub classes: &'a [OverlayClass],
    /// Probability below which a cell is not tinted, 0–1.
    pub floor: f64,
}

/// Draws the overlay with its legend, a colour bar and a scale bar.
///
/// Cells whose class or probability is missing from the maps are drawn as not inferred.
#[must_use]
pub fn draw_overlay(thumbnail: &Thumbnail<'_>, overlay: &Overlay<'_>) -> RgbImage {
    let mut picture = thumbnail.pixels.clone();
    let tint = |x: u32, y: u32, pixel: [u8; 3]| {
        let found = overlay.map.cell_at(thumbnail, x, y).and_then(|cell| overlay.at(cell));
        match found.filter(|(class, _)| !class.is_background) {
            Some((class, probability)) => blend(faded(pixel), class.style.color, opacity(probability, overlay.floor)),
            None => faded(pixel),
        }
    };
    let row_bytes = picture.width() as usize * 3;
    let rows = picture.par_chunks_exact_mut(row_bytes.max(1)).zip(0u32..u32::MAX);
    rows.for_each(|(row, y)| {
        for (pixel, x) in row.as_chunks_mut().0.iter_mut().zip(0..) {
            *pixel = tint(x, y, *pixel);
        }
    });
    let mut counts = vec![0u64; overlay.classes.len() + 1];
    for index in overlay.class_index {
        if let Some(count) = counts.get_mut(usize::from(*index)) {
            *count += 1;
        }
    }
    let inferred = counts[1..].iter().sum();
    let item = |(class, count): (&OverlayClass, &u64)| LegendItem {
        color: (!class.is_background).then_some(class.style.color),
        label: class.style.name.clone(),
        value: percent(*count, inferred),
    };
    let colors = overlay.classes.iter().filter(|class| !class.is_background).map(|class| class.style.color);
    Figure {
        picture,
        title: overlay.title,
        subtitle: overlay.subtitle,
        legend_title: "Strongest class",
        legend: overlay.classes.iter().zip(&counts[1..]).map(item).collect(),
        color_bar: Some(ColorBar {
            title: "Its probability".into(),
            under: faded(STAIN),
            colors: colors.collect(),
            opacity,
            floor: overlay.floor,
        }),
        notes: vec![
            "Shares are of the area".into(),
            "that was inferred.".into(),
            format!("Not tinted below {}.", overlay.floor),
        ],
        um_per_px: thumbnail.um_per_px,
    }
    .draw()
}

impl MapArea {
    /// Index of the cell under the centre of a pixel of the thumbnail; `None` beside the map.
    pub(super) fn cell_at(&self, thumbnail: &Thumbnail<'_>, x: u32, y: u32) -> Option<usize> {
        let along =
            |pixel: u32, pixels: u32, [from, extent]: [i64; 2], [map_from, map_extent]: [i64; 2], cells: u32| {
                let level0 = from as f64 + (f64::from(pixel) + 0.5) * extent as f64 / f64::from(pixels);
                let cell = (level0 - map_from as f64) * f64::from(cells) / map_extent.max(1) as f64;
                #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "between 0 and a u32")]
                let cell = (0.0..f64::from(cells)).contains(&cell).then_some(cell as usize);
                cell
            };
        let (shown, map) = (thumbnail.area, self.area);
        let (width, height) = thumbnail.pixels.dimensions();
        let column = along(x, width, [shown.x, shown.width], [map.x, map.width], self.width)?;
        let row = along(y, height, [shown.y, shown.height], [map.y, map.height], self.height)?;
        Some(row * self.width as usize + column)
    }
}

impl Overlay<'_> {
    /// Class of a cell and its probability, 0–1; `None` if the cell was not inferred.
    fn at(&self, cell: usize) -> Option<(&OverlayClass, f64)> {
        let class = usize::from(*self.class_index.get(cell)?).checked_sub(1)?;
        let probability = *self.probabilities.get(class)?.get(cell)?;
        Some((self.classes.get(class)?, f64::from(probability) / 255.0))
    }
}

fn faded(color: [u8; 3]) -> [u8; 3] {
    let luma = image::Rgb(color).to_luma().0[0];
    blend(color, [luma; 3], FADE)
}

/// Opacity of a class at a probability of 0–1.
fn opacity(probability: f64, floor: f64) -> f64 {
    if probability < floor {
        return 0.0;
    }
    let above = (probability - floor) / (1.0 - floor).max(f64::EPSILON);
    LEAST_OPACITY + (MOST_OPACITY - LEAST_OPACITY) * above.min(1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const AREA: Level0Rect = Level0Rect { x: 0, y: 0, width: 400, height: 200 };

    fn class(color: [u8; 3], is_background: bool) -> OverlayClass {
        OverlayClass { style: ClassStyle { name: "c".into(), color }, is_background }
    }

    #[test]
    fn cells_are_found_under_the_centres_of_pixels() {
        let pixels = RgbImage::new(4, 2);
        let thumbnail = Thumbnail { pixels: &pixels, area: AREA, um_per_px: 1.0 };
        // The map covers the right half only, in 2 × 1 cells.
        let map = MapArea { width: 2, height: 1, area: Level0Rect { x: 200, y: 0, width: 200, height: 200 } };
        let cells: Vec<_> = (0..4).map(|x| map.cell_at(&thumbnail, x, 1)).collect();
        assert_eq!(cells, [None, None, Some(0), Some(1)]);
    }

    #[test]
    fn only_inferred_foreground_above_the_floor_is_tinted() {
        let pixels = RgbImage::from_pixel(4, 1, image::Rgb([100, 100, 100]));
        let thumbnail = Thumbnail { pixels: &pixels, area: AREA, um_per_px: 1.0 };
        let overlay = Overlay {
            title: "t",
            subtitle: "s",
            map: MapArea { width: 4, height: 1, area: AREA },
            class_index: &[0, 1, 1, 2],
            probabilities: &[&[255, 255, 100, 0], &[0, 0, 0, 255]],
            classes: &[class([255, 0, 0], false), class([0, 255, 0], true)],
            floor: 0.5,
        };
        let page = draw_overlay(&thumbnail, &overlay);
        // The picture begins a line right of and four lines below the corner of the page.
        let row: Vec<_> = (16..20).map(|x| page.get_pixel(x, 64).0).collect();
        assert_eq!(row, [[100; 3], [209, 30, 30], [100; 3], [100; 3]]);
    }

    #[test]
    fn opacity_begins_at_the_floor() {
        assert_eq!(opacity(0.49, 0.5), 0.0);
        assert_eq!(opacity(0.5, 0.5), LEAST_OPACITY);
        assert_eq!(opacity(1.0, 0.5), MOST_OPACITY);
        assert_eq!(opacity(1.0, 1.0), LEAST_OPACITY);
    }
}
