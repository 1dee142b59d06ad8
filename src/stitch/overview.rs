//! The whole map at a size that fits memory and a screen, made from the strips as they pass; and the count of classes.

use super::{StitchSpec, Strip, map_size};
use crate::geometry::PixelSize;

/// The whole map at a size that fits memory and a screen, made from the strips as they pass.
#[derive(Clone, Debug, PartialEq)]
pub struct Overview {
    /// Cells per row.
    pub width: usize,
    /// Number of rows.
    pub height: usize,
    /// Level-0 pixels per cell along x.
    pub cell_width: f64,
    /// Level-0 pixels per cell along y.
    pub cell_height: f64,
    /// Size of a cell in µm.
    pub cell_size: PixelSize,
    /// Mean probability over the inferred part of a cell, `[class][row, column]`, 0..=255.
    pub probabilities: Vec<Vec<u8>>,
    /// Classes `[row, column]` as in [`Strip::classes`]: the most probable one of what was inferred in the cell.
    pub classes: Vec<u8>,
}

/// Builds an [`Overview`] and counts classes.
#[derive(Debug)]
pub struct OverviewBuilder {
    overview: Overview,
    factor: usize,
    threshold: Option<f32>,
    /// Sums over the map's rows that the overview's next row is made of: `[class, map column]`, and how many of the
    /// cells were inferred, `[map column]`.
    sums: Vec<u32>,
    counts: Vec<u32>,
    next_row: u64,
    map_height: u64,
    /// Number of map cells of each class; the last one counts those of no class.
    class_cells: Vec<u64>,
}

impl OverviewBuilder {
    /// An overview of at most `max_side` cells per side.
    #[must_use]
    pub fn new(spec: &StitchSpec, max_side: usize) -> Option<Self> {
        let (map_width, map_height) = map_size(spec);
        let longest = map_width.max(usize::try_from(map_height).ok()?);
        let factor = longest.div_ceil(max_side.max(1)).max(1);
        let (width, height) = (map_width.div_ceil(factor), usize::try_from(map_height).ok()?.div_ceil(factor));
        let scale = f64::from(spec.cell) * factor as f64;
        let overview = Overview {
            width,
            height,
            cell_width: spec.plane.downsample_x * scale,
            cell_height: spec.plane.downsample_y * scale,
            cell_size: spec.plane.pixel_size.scaled(scale, scale)?,
            probabilities: vec![Vec::with_capacity(width * height); spec.class_count],
            classes: Vec::with_capacity(width * height),
        };
        Some(Self {
            overview,
            factor,
            threshold: spec.threshold,
            sums: vec![0; map_width * spec.class_count],
            counts: vec![0; map_width],
            next_row: 0,
            map_height,
            class_cells: vec![0; spec.class_count + 1],
        })
    }

    /// Adds the next rows; strips must come from top to bottom without a gap.
    pub fn add(&mut self, strip: &Strip) {
        debug_assert_eq!(strip.first_row, self.next_row, "strips come in order");
        for row in 0..strip.row_count {
            let columns = row * strip.width..(row + 1) * strip.width;
            let classes = &strip.classes[columns.clone()];
            if classes.iter().any(|class| *class > 0) {
                for (count, class) in self.counts.iter_mut().zip(classes) {
                    *count += u32::from(*class > 0);
                }
                let mut cells = [0u64; 256];
                classes.iter().for_each(|class| cells[usize::from(*class)] += 1);
                self.class_cells.iter_mut().zip(&cells[1..]).for_each(|(total, count)| *total += count);
                for (class, sums) in self.sums.chunks_mut(strip.width).enumerate() {
                    let values = &strip.probabilities_of(class)[columns.clone()];
                    sums.iter_mut().zip(values).for_each(|(sum, value)| *sum += u32::from(*value));
                }
            }
            self.next_row += 1;
            if self.next_row.is_multiple_of(self.factor as u64) || self.next_row == self.map_height {
                self.end_row();
            }
        }
    }

    fn end_row(&mut self) {
        let (map_width, class_count) = (self.counts.len(), self.overview.probabilities.len());
        for left in (0..map_width).step_by(self.factor) {
            let columns = left..(left + self.factor).min(map_width);
            let count: u32 = self.counts[columns.clone()].iter().sum();
            let (mut best, mut best_mean) = (class_count, 0);
            for class in 0..class_count {
                let sum: u32 = self.sums[class * map_width..][columns.clone()].iter().sum();
                let mean = (sum + count / 2).checked_div(count).unwrap_or(0);
                if best == class_count || mean > best_mean {
                    (best, best_mean) = (class, mean);
                }
                self.overview.probabilities[class].push(u8::try_from(mean).unwrap_or(u8::MAX));
            }
            if self.threshold.is_some_and(|p| (best_mean as f32) < p * 255.0) {
                best = class_count;
            }
            let class = u8::try_from(best).map_or(u8::MAX, |class| class + 1);
            self.overview.classes.push(if count == 0 { 0 } else { class });
        }
        self.sums.fill(0);
        self.counts.fill(0);
    }

    /// The overview, and the number of map cells of each class (the last number: inferred, but of no class).
    #[must_use]
    pub fn finish(self) -> (Overview, Vec<u64>) {
        (self.overview, self.class_cells)
    }
}
