//! Tile results back onto the slide: blends overlapping tiles and hands out finished rows, band by band.
//!
//! The raster is made of square *cells* of `cell` plane pixels: 1 for a segmentation (a cell is a pixel), the stride
//! for a classification (a cell is what a tile stands for). Tiles come in ascending `(y, x)`, so all rows above the
//! next tile are final and leave as a [`Strip`]; only the rows that one tile row spans are held.
//!
//! Sums are integers: a probability is stored in steps of 1/4095 and multiplied by a weight of at most 4096, so 256
//! tiles may cover a cell before 32 bits overflow, and the result does not depend on the order of addition.

mod overview;

use std::borrow::Cow;
use std::ops::Range;

use ndarray::ArrayView3;
use rayon::prelude::*;

pub use self::overview::{Overview, OverviewBuilder};
use crate::geometry::{TilePlane, TilePosition};

/// Steps between probability 0 and 1 in the sums.
const PROBABILITY_STEPS: f32 = 4095.0;
/// Greatest weight along one axis; the weight of a cell is the product of both.
const AXIS_WEIGHT: u32 = 64;
/// Rows of a strip: a band of 60,000 px with 4 classes then takes 19 MB.
const STRIP_ROWS: usize = 64;
/// Rows of a tile that one core places: some microseconds of work, or the hand-over costs more.
const ROWS_AT_A_TIME: usize = 32;
/// Columns of a row that are finished together: where tiles lie scattered, little between them is finished too.
const PIECE: usize = 256;

/// What is stitched.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StitchSpec {
    /// The plane that the tiles cut.
    pub plane: TilePlane,
    /// Plane pixels per side of a cell, at least 1.
    pub cell: u32,
    /// Number of classes, `1..=254` (a class map holds them in 8 bits).
    pub class_count: usize,
    /// Plane pixels that neighbouring tiles share; maps are blended over them.
    pub overlap: u32,
    /// Where classes exclude each other (softmax) `None`: the most probable one is a cell's class. Otherwise a cell
    /// whose best class stays below this probability is of no class.
    pub threshold: Option<f32>,
}

impl StitchSpec {
    /// Memory of the rows that a [`Stitcher`] holds where tiles lie side by side.
    #[must_use]
    pub fn rows_bytes(&self) -> u64 {
        let (width, height) = map_size(self);
        (self.span() as u64).min(height) * width as u64 * self.planes() * size_of::<u32>() as u64
    }

    /// Memory of a [`Strip`] of as many rows as one has at most.
    #[must_use]
    pub fn strip_bytes(&self) -> u64 {
        let (width, height) = map_size(self);
        (self.strip_rows() as u64).min(height) * width as u64 * self.planes()
    }

    /// Strips that leave when a row of tiles is complete, at most.
    #[must_use]
    pub fn strips_at_once(&self) -> usize {
        self.span().div_ceil(self.strip_rows())
    }

    /// Strips of the whole map, at least.
    #[must_use]
    pub fn strip_count(&self) -> u64 {
        map_size(self).1.div_ceil(self.strip_rows() as u64)
    }

    /// Values of a cell: one for each class, and one more.
    fn planes(&self) -> u64 {
        self.class_count as u64 + 1
    }

    /// Rows that a tile may touch.
    fn span(&self) -> usize {
        self.plane.tile_size.div_ceil(self.cell) as usize + 1
    }

    /// Rows of a strip: a slot of the ring holds one row, and a strip must not need it twice.
    fn strip_rows(&self) -> usize {
        STRIP_ROWS.min(self.span())
    }
}

/// Why something can't be stitched.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a class map holds 1 to 254 classes, not {0}")]
pub struct TooManyClasses(pub usize);

/// Finished rows of the map.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Strip {
    /// First row, in cells.
    pub first_row: u64,
    /// Number of rows.
    pub row_count: usize,
    /// Cells per row.
    pub width: usize,
    /// Probabilities `[class, row, column]`, 0..=255 for 0..=1; 0 where nothing was inferred.
    pub probabilities: Vec<u8>,
    /// Classes `[row, column]`: 0 not inferred, k + 1 class k, `class_count + 1` inferred but of no class.
    pub classes: Vec<u8>,
}

impl Strip {
    /// The probabilities of one class, `[row, column]`.
    #[must_use]
    pub fn probabilities_of(&self, class: usize) -> &[u8] {
        let cells = self.row_count * self.width;
        &self.probabilities[class * cells..(class + 1) * cells]
    }
}

/// Blends tiles into rows.
#[derive(Debug)]
pub struct Stitcher {
    spec: StitchSpec,
    width: usize,
    height: u64,
    /// Ring of rows: cell row `r` lies in slot `r % rows.len()`.
    rows: Vec<Row>,
    /// First row that has not left.
    first_row: u64,
    /// Weights of a map's pixels along one axis.
    window: Vec<u32>,
    spare: Vec<Strip>,
}

/// Sums of one row of cells.
#[derive(Clone, Debug, Default)]
struct Row {
    /// `[class, column]`.
    sums: Vec<u32>,
    weights: Vec<u32>,
    /// Which pieces of [`PIECE`] columns tiles reach into.
    touched: Vec<bool>,
}

/// The lines of a strip that one row becomes.
struct Lines<'a> {
    /// `[column]`, as in [`Strip::classes`].
    classes: &'a mut [u8],
    /// `[class][column]`.
    probabilities: Vec<&'a mut [u8]>,
}

impl Stitcher {
    /// An empty map.
    ///
    /// # Errors
    /// [`TooManyClasses`] if they don't fit a class map.
    pub fn new(spec: StitchSpec) -> Result<Self, TooManyClasses> {
        if spec.class_count == 0 || spec.class_count > 254 {
            return Err(TooManyClasses(spec.class_count));
        }
        let (width, height) = map_size(&spec);
        Ok(Self {
            spec,
            width,
            height,
            rows: vec![Row::default(); spec.span()],
            first_row: 0,
            window: blend_window(spec.plane.tile_size, spec.overlap),
            spare: Vec::new(),
        })
    }

    /// Cells per row.
    #[must_use]
    pub fn width(&self) -> usize {
        self.width
    }

    /// Number of rows.
    #[must_use]
    pub fn height(&self) -> u64 {
        self.height
    }

    /// Takes back a strip that is no longer needed, to use its memory again.
    pub fn recycle(&mut self, strip: Strip) {
        self.spare.push(strip);
    }

    /// Places one tile's class probabilities (`[class]`, 0..=1) on the cells that it covers, by the area it covers.
    ///
    /// Tiles must come in ascending `(y, x)`; the rows above this tile leave through `emit`.
    pub fn place_classes(&mut self, at: TilePosition, probabilities: &[f32], emit: impl FnMut(Strip)) {
        self.advance(at.plane_y, emit);
        let quantised: Vec<u32> = probabilities.iter().map(|p| quantise(*p)).collect();
        let columns = self.cells_covered(at.plane_x, self.width as u64);
        let column = |cell: &(u64, u32)| usize::try_from(cell.0).unwrap_or(usize::MAX);
        let (Some(first), Some(last)) = (columns.first().map(column), columns.last().map(column)) else { return };
        for (y, weight_y) in self.cells_covered(at.plane_y, self.height) {
            let width = self.width;
            let row = self.row_mut(y, first..last + 1);
            for (x, (_, weight_x)) in (first..).zip(&columns) {
                let weight = weight_x * weight_y;
                row.weights[x] += weight;
                for (class, value) in quantised.iter().enumerate() {
                    row.sums[class * width + x] += weight * value;
                }
            }
        }
    }

    /// Places tiles' maps (`[class, tile, tile]`, 0..=1), blended with their neighbours by a smooth window.
    ///
    /// Tiles must come in ascending `(y, x)`, also from call to call; the rows above a tile leave through `emit`.
    pub fn place_maps(&mut self, tiles: &[(TilePosition, ArrayView3<'_, f32>)], mut emit: impl FnMut(Strip)) {
        for side_by_side in tiles.chunk_by(|(left, _), (right, _)| left.plane_y == right.plane_y) {
            self.advance(side_by_side[0].0.plane_y, &mut emit);
            self.place_side_by_side(side_by_side[0].0.plane_y, side_by_side);
        }
    }

    /// Places the maps of tiles whose upper edges lie in one line.
    fn place_side_by_side(&mut self, plane_y: i64, tiles: &[(TilePosition, ArrayView3<'_, f32>)]) {
        let size = i64::from(self.spec.plane.tile_size);
        // The part of the tile inside the plane: the rest is padding.
        let inside = |start: i64, extent: u64| {
            let extent = i64::try_from(extent).unwrap_or(i64::MAX);
            (-start).clamp(0, size)..(extent - start).clamp(0, size)
        };
        let index = |value: i64| usize::try_from(value).unwrap_or(0);
        let tile_rows = inside(plane_y, self.height);
        let top = self.slot(u64::try_from(plane_y + tile_rows.start).unwrap_or(0));
        let (width, class_count, span) = (self.width, self.spec.class_count, self.rows.len());
        let window = &self.window;
        let place = |row: &mut Row, tile_row: usize, at: TilePosition, map: &ArrayView3<'_, f32>| {
            let columns = inside(at.plane_x, width as u64);
            let (first, last) = (index(columns.start), index(columns.end));
            if first >= last {
                return;
            }
            let left = index(at.plane_x + columns.start);
            row.prepare(width, class_count, left..left + last - first);
            let weight_y = window[tile_row];
            let weights = || window[first..last].iter().map(|weight| weight * weight_y);
            for (sum, weight) in row.weights[left..].iter_mut().zip(weights()) {
                *sum += weight;
            }
            for (class, plane) in map.outer_iter().enumerate() {
                let values = plane.row(tile_row);
                let values = values.as_slice().map_or_else(|| Cow::Owned(values.to_vec()), Cow::Borrowed);
                let sums = &mut row.sums[class * width + left..][..last - first];
                for ((sum, weight), value) in sums.iter_mut().zip(weights()).zip(&values[first..]) {
                    *sum += weight * quantise(*value);
                }
            }
        };
        // Each row of the tiles lies in a row of the ring of its own.
        let rows = self.rows.par_iter_mut().enumerate().with_min_len(ROWS_AT_A_TIME.div_ceil(tiles.len()));
        rows.for_each(|(slot, row)| {
            let tile_row = index(tile_rows.start) + (slot + span - top) % span;
            if tile_row < index(tile_rows.end) {
                tiles.iter().for_each(|(at, map)| place(row, tile_row, *at, map));
            }
        });
    }

    /// Hands out all rows that are left.
    pub fn finish(&mut self, mut emit: impl FnMut(Strip)) {
        self.emit_until(self.height, &mut emit);
    }

    /// Hands out the rows that no tile at or below `plane_y` can touch.
    fn advance(&mut self, plane_y: i64, mut emit: impl FnMut(Strip)) {
        let row = u64::try_from(plane_y).unwrap_or(0) / u64::from(self.spec.cell);
        self.emit_until(row.min(self.height), &mut emit);
    }

    fn emit_until(&mut self, end: u64, emit: &mut impl FnMut(Strip)) {
        let most = self.spec.strip_rows();
        while self.first_row < end {
            let count = usize::try_from(end - self.first_row).unwrap_or(most).min(most);
            let strip = self.take_strip(count);
            emit(strip);
        }
    }

    fn take_strip(&mut self, row_count: usize) -> Strip {
        let (width, class_count) = (self.width, self.spec.class_count);
        let cells = row_count * width;
        let mut strip = self.spare.pop().unwrap_or_default();
        strip.first_row = self.first_row;
        strip.row_count = row_count;
        strip.width = width;
        // What an earlier strip left there is overwritten.
        strip.probabilities.resize(cells * class_count, 0);
        strip.classes.resize(cells, 0);
        // Each row is written and emptied while it lies in a core's cache.
        let first_slot = self.slot(self.first_row);
        let span = self.rows.len();
        let mut lines: Vec<Option<Lines<'_>>> = (0..span).map(|_| None).collect();
        for (line, classes) in strip.classes.chunks_exact_mut(width.max(1)).enumerate() {
            lines[(first_slot + line) % span] = Some(Lines { classes, probabilities: Vec::with_capacity(class_count) });
        }
        for (line, values) in strip.probabilities.chunks_exact_mut(width.max(1)).enumerate() {
            if let Some(lines) = &mut lines[(first_slot + line % row_count) % span] {
                lines.probabilities.push(values);
            }
        }
        let threshold = self.spec.threshold;
        // Only these rows are shared out: they lie side by side in a ring that may be ten times as long.
        let leaving = self.rows.iter_mut().zip(lines).filter_map(|(row, lines)| Some((row, lines?)));
        leaving.collect::<Vec<_>>().into_par_iter().for_each(|(row, lines)| row.leave(lines, threshold));
        self.first_row += row_count as u64;
        strip
    }

    fn slot(&self, row: u64) -> usize {
        usize::try_from(row % self.rows.len() as u64).unwrap_or(0)
    }

    /// The row's sums, of which `columns` are about to change.
    fn row_mut(&mut self, row: u64, columns: Range<usize>) -> &mut Row {
        let slot = self.slot(row);
        let row = &mut self.rows[slot];
        row.prepare(self.width, self.spec.class_count, columns);
        row
    }

    /// The cells that a tile starting at plane pixel `start` covers along one axis, with their weights (1..=64, by the
    /// share of the cell that is covered).
    fn cells_covered(&self, start: i64, extent: u64) -> Vec<(u64, u32)> {
        let cell = i64::from(self.spec.cell);
        let end = start + i64::from(self.spec.plane.tile_size);
        let extent = i64::try_from(extent).unwrap_or(i64::MAX);
        let cells = start.max(0) / cell..((end + cell - 1) / cell).clamp(0, extent);
        cells
            .map(|index| {
                let covered = end.min((index + 1) * cell) - start.max(index * cell);
                let weight = u32::try_from((covered * i64::from(AXIS_WEIGHT) + cell - 1) / cell).unwrap_or(1);
                (u64::try_from(index).unwrap_or(0), weight.clamp(1, AXIS_WEIGHT))
            })
            .collect()
    }
}

impl Row {
    /// Makes room for sums, of which `columns` are about to change. The memory is made on first use, so that rows without
    /// tissue cost nothing.
    fn prepare(&mut self, width: usize, class_count: usize, columns: Range<usize>) {
        if self.weights.is_empty() {
            self.weights.resize(width, 0);
            self.sums.resize(width * class_count, 0);
            self.touched.resize(width.div_ceil(PIECE), false);
        }
        self.touched[columns.start / PIECE..columns.end.div_ceil(PIECE)].fill(true);
    }

    /// Writes what the tiles said, now that no more will come, and empties the row.
    fn leave(&mut self, mut lines: Lines<'_>, threshold: Option<f32>) {
        let width = lines.classes.len();
        for (piece, left) in (0..width).step_by(PIECE).enumerate() {
            let columns = left..width.min(left + PIECE);
            // A row that no tile has reached yet has no pieces.
            match self.touched.get_mut(piece).map(std::mem::take) {
                Some(true) => self.leave_piece(columns, &mut lines, threshold),
                Some(false) | None => lines.clear(columns),
            }
        }
    }

    /// Writes and empties some columns, class by class: the loops run on vectors, and what they need stays close.
    fn leave_piece(&mut self, columns: Range<usize>, lines: &mut Lines<'_>, threshold: Option<f32>) {
        let width = self.weights.len();
        let weights = &mut self.weights[columns.clone()];
        let mut scales = [0.0; PIECE];
        for (scale, weight) in scales.iter_mut().zip(&*weights) {
            *scale = 255.0 / PROBABILITY_STEPS / (*weight).max(1) as f32;
        }
        let mut best = [0; PIECE];
        let classes = &mut lines.classes[columns.clone()];
        classes.fill(1);
        for (class, line) in lines.probabilities.iter_mut().enumerate() {
            let sums = &mut self.sums[class * width..][columns.clone()];
            for ((out, sum), scale) in line[columns.clone()].iter_mut().zip(&*sums).zip(&scales) {
                // The sum is a whole number below 2^28, and the product at most 255.
                #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "0..=255 by construction")]
                let level = (*sum as f32 * scale + 0.5) as u8;
                *out = level;
            }
            let value = u8::try_from(class + 1).unwrap_or(u8::MAX);
            for ((out, best), sum) in classes.iter_mut().zip(&mut best).zip(&*sums) {
                *out = if *sum > *best { value } else { *out };
                *best = (*best).max(*sum);
            }
            sums.fill(0);
        }
        if let Some(threshold) = threshold {
            let none = u8::try_from(lines.probabilities.len() + 1).unwrap_or(u8::MAX);
            for ((out, best), weight) in classes.iter_mut().zip(&best).zip(&*weights) {
                let is_reached = *best as f32 >= threshold * PROBABILITY_STEPS * *weight as f32;
                *out = if is_reached { *out } else { none };
            }
        }
        for (out, weight) in classes.iter_mut().zip(&*weights) {
            *out = if *weight == 0 { 0 } else { *out };
        }
        weights.fill(0);
    }
}

impl Lines<'_> {
    /// Where no tile is.
    fn clear(&mut self, columns: Range<usize>) {
        for line in self.probabilities.iter_mut().map(|line| &mut **line).chain([&mut *self.classes]) {
            line[columns.clone()].fill(0);
        }
    }
}

/// Width and height of the map in cells.
fn map_size(spec: &StitchSpec) -> (usize, u64) {
    let cell = u64::from(spec.cell);
    let width = spec.plane.width().div_ceil(cell);
    (usize::try_from(width).unwrap_or(usize::MAX), spec.plane.height().div_ceil(cell))
}

/// A probability in whole steps; values outside 0..=1 are clamped, NaN is 0.
fn quantise(probability: f32) -> u32 {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "the cast saturates, NaN becomes 0")]
    let steps = (probability.min(1.0) * PROBABILITY_STEPS + 0.5) as u32;
    steps
}

/// Weights along one axis of a tile: a raised cosine over the pixels shared with a neighbour, so that the weights of
/// two neighbours add up to a constant and no seam shows; never 0, so that pixels at the slide's edge count.
fn blend_window(tile_size: u32, overlap: u32) -> Vec<u32> {
    let ramp = overlap.min(tile_size / 2);
    let weight = |x: u32| {
        let from_edge = x.min(tile_size - 1 - x);
        if from_edge >= ramp {
            return AXIS_WEIGHT;
        }
        let phase = (f64::from(from_edge) + 0.5) / f64::from(ramp) * std::f64::consts::PI;
        let share = (1.0 - phase.cos()) / 2.0;
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "0..=64 by construction")]
        let weight = (share * f64::from(AXIS_WEIGHT)).round() as u32;
        weight.max(1)
    };
    (0..tile_size).map(weight).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::geometry::{Level0Rect, Mpp, PixelSize, TileGrid};
    use ndarray::Array3;
    use proptest::prelude::*;

    fn plane(width: i64, height: i64, tile_size: u32) -> TilePlane {
        TilePlane {
            region: Level0Rect { x: 0, y: 0, width, height },
            downsample_x: 1.0,
            downsample_y: 1.0,
            pixel_size: PixelSize::square(Mpp::new(0.5).unwrap()),
            tile_size,
        }
    }

    /// Stitches all tiles of a grid, so many at once, and puts the strips together.
    fn stitch(
        spec: StitchSpec,
        grid: &TileGrid,
        at_once: usize,
        mut place: impl FnMut(&mut Stitcher, &[TilePosition], &mut dyn FnMut(Strip)),
    ) -> (Vec<Vec<u8>>, Vec<u8>, Overview, Vec<u64>) {
        let mut stitcher = Stitcher::new(spec).unwrap();
        let mut overview = OverviewBuilder::new(&spec, 4).unwrap();
        let (mut probabilities, mut classes) = (vec![Vec::new(); spec.class_count], Vec::new());
        let mut emit = |strip: Strip| {
            for (class, all) in probabilities.iter_mut().enumerate() {
                all.extend_from_slice(strip.probabilities_of(class));
            }
            classes.extend_from_slice(&strip.classes);
            overview.add(&strip);
        };
        let positions: Vec<TilePosition> = grid.coords().map(|coord| grid.position(coord)).collect();
        for positions in positions.chunks(at_once) {
            place(&mut stitcher, positions, &mut emit);
        }
        stitcher.finish(&mut emit);
        let (overview, counts) = overview.finish();
        (probabilities, classes, overview, counts)
    }

    #[test]
    fn memory_known_by_hand() {
        let region = Level0Rect { x: 0, y: 0, width: 100, height: 20 };
        let pixel_size = PixelSize::square(Mpp::new(0.5).unwrap());
        let plane = TilePlane { region, downsample_x: 1.0, downsample_y: 1.0, pixel_size, tile_size: 8 };
        let spec = StitchSpec { plane, cell: 1, class_count: 3, overlap: 0, threshold: None };
        // A tile may touch 9 rows: of 100 cells, with the sums of 3 classes and the weights.
        assert_eq!(spec.rows_bytes(), 9 * 100 * 4 * 4);
        assert_eq!((spec.strip_bytes(), spec.strips_at_once(), spec.strip_count()), (9 * 100 * 4, 1, 3));
        // Halved to 50 × 10 cells, from sums of a row of the map.
        assert_eq!(spec.overview_bytes(50), (50 * 10 + 100 * 4) * 4);
        let large = TilePlane { tile_size: 256, region: Level0Rect { height: 300, ..region }, ..plane };
        let spec = StitchSpec { plane: large, ..spec };
        assert_eq!((spec.strip_bytes(), spec.strips_at_once(), spec.strip_count()), (64 * 100 * 4, 5, 5));
    }

    #[test]
    fn classes_land_in_their_cells() {
        // 3 × 2 cells of 10 px, the last column cut; tile k has probability k/10 of class 0.
        let plane = plane(25, 20, 10);
        let grid = TileGrid::new(plane, 0).unwrap();
        let spec = StitchSpec { plane, cell: 10, class_count: 2, overlap: 0, threshold: None };
        let mut k = 0u8;
        let (probabilities, classes, overview, counts) = stitch(spec, &grid, 1, |stitcher, at, emit| {
            let p = f32::from(k) / 10.0;
            stitcher.place_classes(at[0], &[p, 1.0 - p], emit);
            k += 2;
        });
        // 0, 0.2, 0.4, 0.6, 0.8, 1.0 in steps of 1/255
        assert_eq!(probabilities[0], [0, 51, 102, 153, 204, 255]);
        assert_eq!(probabilities[1], [255, 204, 153, 102, 51, 0]);
        assert_eq!(classes, [2, 2, 2, 1, 1, 1]);
        assert_eq!(counts, [3, 3, 0]);
        assert_eq!((overview.width, overview.height, overview.classes), (3, 2, vec![2, 2, 2, 1, 1, 1]));
    }

    #[test]
    fn overlapping_tiles_are_averaged_by_area() {
        // Tiles of 10 px every 5: cell 1 (px 5..10) lies in tiles 0 and 1, cell 0 in tile 0 alone.
        let plane = plane(15, 10, 10);
        let grid = TileGrid::new(plane, 5).unwrap();
        assert_eq!((grid.cols, grid.rows), (2, 1));
        let spec = StitchSpec { plane, cell: 5, class_count: 1, overlap: 5, threshold: Some(0.5) };
        let mut values = [1.0, 0.0].into_iter();
        let (probabilities, classes, ..) = stitch(spec, &grid, 1, |stitcher, at, emit| {
            stitcher.place_classes(at[0], &[values.next().unwrap()], emit);
        });
        assert_eq!(probabilities[0], [255, 128, 0, 255, 128, 0]);
        // 0.5 reaches the threshold of 0.5; below it a cell is of no class (class_count + 1).
        assert_eq!(classes, [1, 1, 2, 1, 1, 2]);
    }

    #[test]
    fn the_window_adds_up_to_a_constant_over_the_overlap() {
        for (tile, overlap) in [(256u32, 64u32), (96, 24), (10, 5), (7, 0)] {
            let window = blend_window(tile, overlap);
            let stride = (tile - overlap) as usize;
            for x in 0..overlap as usize {
                let sum = window[stride + x] + window[x];
                assert!((63..=66).contains(&sum), "tile {tile}, overlap {overlap}, pixel {x}: {sum}");
            }
            assert!(window.iter().all(|weight| (1..=AXIS_WEIGHT).contains(weight)));
        }
    }

    #[test]
    fn rows_without_tiles_are_not_inferred() {
        let plane = plane(8, 300, 8);
        let spec = StitchSpec { plane, cell: 1, class_count: 1, overlap: 0, threshold: None };
        let mut stitcher = Stitcher::new(spec).unwrap();
        let map = Array3::from_elem((1, 8, 8), 1.0);
        let mut classes = Vec::new();
        stitcher.place_maps(&[(plane.position(0, 200), map.view())], |strip| classes.extend(strip.classes));
        stitcher.finish(|strip| classes.extend(strip.classes));
        assert_eq!(classes.len(), 8 * 300);
        let inferred: Vec<usize> = (0..300).filter(|row| classes[row * 8] == 1).collect();
        assert_eq!(inferred, (200..208).collect::<Vec<_>>());
    }

    #[test]
    fn nothing_is_inferred_between_scattered_tiles() {
        let (width, side) = (3 * PIECE + 40, 16);
        let plane = plane(width as i64, 3 * side as i64, 16);
        let spec = StitchSpec { plane, cell: 1, class_count: 2, overlap: 0, threshold: None };
        let mut stitcher = Stitcher::new(spec).unwrap();
        let map = Array3::from_shape_fn((2, side, side), |(class, ..)| if class == 0 { 0.0 } else { 1.0 });
        // In the first row one tile lies across two pieces and one at the end; then one beside what was there; then none.
        for (row, lefts) in [vec![3, PIECE - 5, width - side], vec![PIECE + 100, 2 * PIECE], vec![]].iter().enumerate()
        {
            // The strip held other things before.
            let cells = side * width;
            stitcher.recycle(Strip { probabilities: vec![7; 2 * cells], classes: vec![7; cells], ..Strip::default() });
            let position = |left: &usize| plane.position(*left as i64, (row * side) as i64);
            let tiles: Vec<_> = lefts.iter().map(|left| (position(left), map.view())).collect();
            stitcher.place_maps(&tiles, |_| {});
            let mut strips = Vec::new();
            stitcher.emit_until(((row + 1) * side) as u64, &mut |strip| strips.push(strip));
            let [strip] = &strips[..] else { panic!("{} strips", strips.len()) };
            for cell in 0..cells {
                let is_inferred = lefts.iter().any(|left| (*left..left + side).contains(&(cell % width)));
                let found = [strip.classes[cell], strip.probabilities_of(0)[cell], strip.probabilities_of(1)[cell]];
                assert_eq!(found, if is_inferred { [2, 0, 255] } else { [0; 3] }, "cell {cell} of row {row}");
            }
        }
    }

    #[test]
    fn class_count_is_checked() {
        let spec = StitchSpec { plane: plane(8, 8, 8), cell: 1, class_count: 255, overlap: 0, threshold: None };
        assert_eq!(Stitcher::new(spec).unwrap_err(), TooManyClasses(255));
    }

    proptest! {
        /// Tiles that all say the same about a pixel leave it as it is, whatever the cut: no seam.
        #[test]
        fn a_map_cut_into_tiles_comes_back(
            width in prop_oneof![1i64..90, 500i64..620], height in 1i64..160, tile in 4u32..40, overlap_percent in 0u32..50, seed in 0u32..1000,
            at_once in 1usize..9,
        ) {
            let plane = plane(width, height, tile);
            let overlap = tile * overlap_percent / 100;
            let grid = TileGrid::new(plane, overlap).unwrap();
            let spec = StitchSpec { plane, cell: 1, class_count: 2, overlap, threshold: None };
            let truth = |class: usize, y: i64, x: i64| {
                let hash = (x * 31 + y * 17 + i64::from(seed)) % 101;
                let p = hash as f32 / 100.0;
                if class == 0 { p } else { 1.0 - p }
            };
            let (probabilities, classes, _, counts) = stitch(spec, &grid, at_once, |stitcher, positions, emit| {
                let side = tile as usize;
                let map = |at: &TilePosition| Array3::from_shape_fn((2, side, side), |(class, y, x)| {
                    let (y, x) = (at.plane_y + y as i64, at.plane_x + x as i64);
                    // Padding says something else: it must not reach the map.
                    if x < width && y < height { truth(class, y, x) } else { 0.123 }
                });
                let maps: Vec<Array3<f32>> = positions.iter().map(map).collect();
                let tiles: Vec<_> = positions.iter().copied().zip(maps.iter().map(|map| map.view())).collect();
                stitcher.place_maps(&tiles, emit);
            });
            prop_assert_eq!(counts.iter().sum::<u64>(), (width * height).cast_unsigned());
            for y in 0..height {
                for x in 0..width {
                    let index = usize::try_from(y * width + x).unwrap();
                    for (class, map) in probabilities.iter().enumerate() {
                        let expected = truth(class, y, x) * 255.0;
                        prop_assert!((f32::from(map[index]) - expected).abs() <= 0.6);
                    }
                    let p = truth(0, y, x);
                    if (p - 0.5).abs() > 0.01 {
                        prop_assert_eq!(classes[index], if p > 0.5 { 1 } else { 2 });
                    }
                }
            }
        }
    }
}
