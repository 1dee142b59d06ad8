//! The whole map at a size that fits memory and a screen, made from the strips as they pass; and the count of classes.

use std::ops::Range;

use rayon::prelude::*;

use super::{StitchSpec, Strip, map_size};
use crate::geometry::PixelSize;

/// Columns of the map that are summed together, and passed over where none was inferred.
const BLOCK_COLUMNS: usize = 256;
/// Blocks that one core sums: enough work in a strip to be worth the hand-over.
const BLOCKS_AT_A_TIME: usize = 4;

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
    /// With the rows that have ended.
    overview: Overview,
    blocks: Vec<Block>,
    factor: usize,
    threshold: Option<f32>,
    next_row: u64,
    map_height: u64,
}

/// What becomes of neighbouring columns of the map: blocks are filled on all cores.
#[derive(Debug)]
struct Block {
    /// Of the map; a multiple of the overview's factor, except at the right border.
    columns: Range<usize>,
    /// Sums over the map's rows that the overview's next row is made of: `[class, column]`, and how many of the cells
    /// were inferred, `[column]`.
    sums: Vec<u32>,
    counts: Vec<u32>,
    /// Whether any were inferred since the last row ended.
    is_touched: bool,
    /// The rows that ended with the last strip: `[class][row, cell]` and `[row, cell]`.
    probabilities: Vec<Vec<u8>>,
    classes: Vec<u8>,
    /// Number of map cells by their value in [`Strip::classes`].
    cells: [u64; 256],
}

impl StitchSpec {
    /// Memory of an [`Overview`] of at most `max_side` cells per side, and of the sums that one is made of.
    #[must_use]
    pub fn overview_bytes(&self, max_side: usize) -> u64 {
        let (map_width, map_height) = (map_size(self).0 as u64, map_size(self).1);
        let factor = map_width.max(map_height).div_ceil(max_side.max(1) as u64).max(1);
        let cells = map_width.div_ceil(factor) * map_height.div_ceil(factor);
        (cells + map_width * size_of::<u32>() as u64) * self.planes()
    }
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
            // Whole from the start: memory that grows is copied, and there twice meanwhile.
            probabilities: (0..spec.class_count).map(|_| Vec::with_capacity(width * height)).collect(),
            classes: Vec::with_capacity(width * height),
        };
        let block_width = BLOCK_COLUMNS.div_ceil(factor) * factor;
        let lefts = (0..map_width).step_by(block_width);
        let blocks = lefts.map(|left| Block::new(left..map_width.min(left + block_width), spec.class_count)).collect();
        Some(Self { overview, blocks, factor, threshold: spec.threshold, next_row: 0, map_height })
    }

    /// Adds the next rows; strips must come from top to bottom without a gap.
    pub fn add(&mut self, strip: &Strip) {
        debug_assert_eq!(strip.first_row, self.next_row, "strips come in order");
        let Self { factor, threshold, next_row, map_height, .. } = *self;
        self.blocks.par_iter_mut().with_min_len(BLOCKS_AT_A_TIME).for_each(|block| {
            for row in 0..strip.row_count {
                block.add_row(strip, row);
                let end = next_row + row as u64 + 1;
                if end.is_multiple_of(factor as u64) || end == map_height {
                    block.end_row(factor, threshold);
                }
            }
        });
        self.next_row += strip.row_count as u64;
        self.take_rows();
    }

    /// Moves the rows that have ended from the blocks into the overview.
    fn take_rows(&mut self) {
        let Self { overview, blocks, factor, .. } = self;
        let widths: Vec<usize> = blocks.iter().map(|block| block.columns.len().div_ceil(*factor)).collect();
        let rows = blocks.first().map_or(0, |block| block.classes.len() / widths[0].max(1));
        let take = |whole: &mut Vec<u8>, part: &dyn Fn(&Block) -> &[u8]| {
            for row in 0..rows {
                for (block, width) in blocks.iter().zip(&widths) {
                    whole.extend_from_slice(&part(block)[row * width..(row + 1) * width]);
                }
            }
        };
        for (class, whole) in overview.probabilities.iter_mut().enumerate() {
            take(whole, &|block| &block.probabilities[class]);
        }
        take(&mut overview.classes, &|block| &block.classes);
        for block in blocks {
            block.probabilities.iter_mut().chain([&mut block.classes]).for_each(Vec::clear);
        }
    }

    /// The overview, and the number of map cells of each class (the last number: inferred, but of no class).
    #[must_use]
    pub fn finish(self) -> (Overview, Vec<u64>) {
        let Self { overview, blocks, .. } = self;
        let cells = |value: usize| blocks.iter().map(|block| block.cells[value]).sum();
        let class_cells = (1..overview.probabilities.len() + 2).map(cells).collect();
        (overview, class_cells)
    }
}

impl Block {
    fn new(columns: Range<usize>, class_count: usize) -> Self {
        Self {
            sums: vec![0; columns.len() * class_count],
            counts: vec![0; columns.len()],
            is_touched: false,
            columns,
            probabilities: vec![Vec::new(); class_count],
            classes: Vec::new(),
            cells: [0; 256],
        }
    }

    fn add_row(&mut self, strip: &Strip, row: usize) {
        let columns = row * strip.width + self.columns.start..row * strip.width + self.columns.end;
        let classes = &strip.classes[columns.clone()];
        // Most of a slide is glass. Looked for without a way out before the end, so that it runs on vectors.
        if classes.iter().fold(0, |any, class| any | class) == 0 {
            return;
        }
        self.is_touched = true;
        for (count, class) in self.counts.iter_mut().zip(classes) {
            *count += u32::from(*class > 0);
        }
        classes.iter().for_each(|class| self.cells[usize::from(*class)] += 1);
        for (class, sums) in self.sums.chunks_mut(self.columns.len()).enumerate() {
            let values = &strip.probabilities_of(class)[columns.clone()];
            sums.iter_mut().zip(values).for_each(|(sum, value)| *sum += u32::from(*value));
        }
    }

    fn end_row(&mut self, factor: usize, threshold: Option<f32>) {
        let (width, class_count) = (self.counts.len(), self.probabilities.len());
        if !std::mem::take(&mut self.is_touched) {
            for values in self.probabilities.iter_mut().chain([&mut self.classes]) {
                values.resize(values.len() + width.div_ceil(factor), 0);
            }
            return;
        }
        for left in (0..width).step_by(factor) {
            let columns = left..(left + factor).min(width);
            let count: u32 = self.counts[columns.clone()].iter().sum();
            let (mut best, mut best_mean) = (class_count, 0);
            for class in 0..class_count {
                let sum: u32 = self.sums[class * width..][columns.clone()].iter().sum();
                let mean = (sum + count / 2).checked_div(count).unwrap_or(0);
                if best == class_count || mean > best_mean {
                    (best, best_mean) = (class, mean);
                }
                self.probabilities[class].push(u8::try_from(mean).unwrap_or(u8::MAX));
            }
            if threshold.is_some_and(|p| (best_mean as f32) < p * 255.0) {
                best = class_count;
            }
            let class = u8::try_from(best).map_or(u8::MAX, |class| class + 1);
            self.classes.push(if count == 0 { 0 } else { class });
        }
        self.sums.fill(0);
        self.counts.fill(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::geometry::{Level0Rect, Mpp, PixelSize, TilePlane};

    #[test]
    fn blocks_of_columns_make_one_overview() {
        let (width, height) = (2 * BLOCK_COLUMNS + 301, 8);
        let plane = TilePlane {
            region: Level0Rect { x: 0, y: 0, width: width as i64, height: height as i64 },
            downsample_x: 1.0,
            downsample_y: 1.0,
            pixel_size: PixelSize::square(Mpp::new(0.5).unwrap()),
            tile_size: 64,
        };
        let spec = StitchSpec { plane, cell: 1, class_count: 2, overlap: 0, threshold: None };
        let factor = 3;
        let mut builder = OverviewBuilder::new(&spec, width.div_ceil(factor)).unwrap();
        // Every tenth column and one row were not inferred; class 0 falls from left to right.
        let is_inferred = |x: usize, y: usize| !x.is_multiple_of(10) && y != 4;
        let level = |x: usize, y: usize| if is_inferred(x, y) { u8::try_from(255 - x / 12 - y).unwrap() } else { 0 };
        let class = |x: usize, y: usize| u8::from(is_inferred(x, y)) * if level(x, y) >= 128 { 1 } else { 2 };
        for (first_row, row_count) in [(0, 5), (5, 3)] {
            let all = |value: &dyn Fn(usize, usize) -> u8| -> Vec<u8> {
                (first_row..first_row + row_count)
                    .flat_map(|y| (0..width).map(move |x| (x, y)))
                    .map(|(x, y)| value(x, y))
                    .collect()
            };
            let rest = |x: usize, y: usize| if is_inferred(x, y) { 255 - level(x, y) } else { 0 };
            let probabilities = [all(&level), all(&rest)].concat();
            builder.add(&Strip { first_row: first_row as u64, row_count, width, probabilities, classes: all(&class) });
        }
        let (overview, counts) = builder.finish();
        assert_eq!((overview.width, overview.height), (width.div_ceil(factor), 3));
        for cell in 0..overview.width * overview.height {
            let (left, top) = (cell % overview.width * factor, cell / overview.width * factor);
            let cells =
                (top..height.min(top + factor)).flat_map(|y| (left..width.min(left + factor)).map(move |x| (x, y)));
            let levels: Vec<usize> =
                cells.filter(|(x, y)| is_inferred(*x, *y)).map(|(x, y)| usize::from(level(x, y))).collect();
            let mean = (levels.iter().sum::<usize>() + levels.len() / 2) / levels.len();
            assert_eq!(usize::from(overview.probabilities[0][cell]), mean, "cell {cell}");
            assert_eq!(overview.classes[cell], if mean >= 128 { 1 } else { 2 }, "cell {cell}");
        }
        let of_class = |wanted: u8| {
            (0..height).flat_map(|y| (0..width).map(move |x| (x, y))).filter(|(x, y)| class(*x, *y) == wanted).count()
        };
        assert_eq!(counts, [of_class(1) as u64, of_class(2) as u64, 0]);
    }

    #[test]
    fn columns_that_were_not_inferred_are_of_no_class() {
        let (factor, width, height) = (3, 3 * BLOCK_COLUMNS + 1, 9);
        let region = Level0Rect { x: 0, y: 0, width: width as i64, height };
        let pixel_size = PixelSize::square(Mpp::new(0.5).unwrap());
        let plane = TilePlane { region, downsample_x: 1.0, downsample_y: 1.0, pixel_size, tile_size: 64 };
        let spec = StitchSpec { plane, cell: 1, class_count: 1, overlap: 0, threshold: None };
        let mut builder = OverviewBuilder::new(&spec, width.div_ceil(factor)).unwrap();
        // All was inferred of what becomes the first row, and of the next two the block in the middle.
        let block = BLOCK_COLUMNS.next_multiple_of(factor);
        let middle = |x: usize| (block..2 * block).contains(&x);
        for (first_row, row_count, is_inferred) in [(0, 3, &(|_| true) as &dyn Fn(usize) -> bool), (3, 6, &middle)] {
            let rows = |value: u8| {
                (0..row_count * width).map(|cell| u8::from(is_inferred(cell % width)) * value).collect::<Vec<u8>>()
            };
            builder.add(&Strip { first_row, row_count, width, probabilities: rows(200), classes: rows(1) });
        }
        let (overview, counts) = builder.finish();
        assert_eq!((overview.width, overview.height), (width.div_ceil(factor), 3));
        assert_eq!((overview.classes.len(), overview.probabilities[0].len()), (3 * overview.width, 3 * overview.width));
        for (cell, (class, level)) in overview.classes.iter().zip(&overview.probabilities[0]).enumerate() {
            let (row, x) = (cell / overview.width, cell % overview.width * factor);
            let expected = if row == 0 || middle(x) { (1, 200) } else { (0, 0) };
            assert_eq!((*class, *level), expected, "cell {cell}");
        }
        assert_eq!(counts, [(3 * width + 6 * block) as u64, 0]);
    }
}
