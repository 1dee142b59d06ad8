//! Polygons with holes along the edges of equal cells in a raster.
//!
//! Traced here and not unioned by a geometry library: cell corners are whole numbers, so walking the edges is exact
//! (areas are cell counts, no snapping) and linear in the raster, where a general union sorts and intersects every run.
//! Cells are neighbours by their edges (4-connectivity). Where two cells of one polygon meet at a corner only, a plain
//! walk would touch itself there; such a ring is cut in two at the corner, so every ring is simple and every polygon
//! valid: its rings may share single points, as the OGC rules allow.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use crate::geometry::Level0Rect;

/// A raster of cells laid over the slide.
#[derive(Clone, Copy, Debug)]
pub struct Cells<'a> {
    /// One value per cell, `[height, width]`.
    pub values: &'a [u8],
    /// Columns.
    pub width: u32,
    /// Rows.
    pub height: u32,
    /// Left edge of the first column, level-0 px.
    pub origin_x: f64,
    /// Top edge of the first row, level-0 px.
    pub origin_y: f64,
    /// Width of a cell, level-0 px.
    pub cell_width: f64,
    /// Height of a cell, level-0 px.
    pub cell_height: f64,
}

/// A ring of corners in cells, `(column edge, row edge)`; the closing point is left out.
pub type CellRing = Vec<(u32, u32)>;

/// A set of edge-connected cells of one value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CellPolygon {
    /// Outer ring, of positive signed area (Σ xᵢyᵢ₊₁ − xᵢ₊₁yᵢ).
    pub exterior: CellRing,
    /// Holes, of negative signed area.
    pub holes: Vec<CellRing>,
    /// Number of cells.
    pub cell_count: u64,
}

impl Cells<'_> {
    /// The polygons of all cells with `value`, in reading order of their first cells.
    ///
    /// Empty if `values` is not `width * height` long.
    #[must_use]
    pub fn polygons(&self, value: u8) -> Vec<CellPolygon> {
        self.polygons_in(value, Window { left: 0, top: 0, right: self.width, bottom: self.height })
    }

    /// As [`polygons`](Self::polygons), of the cells that share area with `bounds` only.
    ///
    /// Corners still lie on cell edges: [`point_within`](Self::point_within) moves those beyond the bounds onto them.
    #[must_use]
    pub fn polygons_within(&self, value: u8, bounds: Level0Rect) -> Vec<CellPolygon> {
        let (left, right) =
            touched(self.origin_x, self.cell_width, self.width, bounds.x as f64, (bounds.x + bounds.width) as f64);
        let (top, bottom) =
            touched(self.origin_y, self.cell_height, self.height, bounds.y as f64, (bounds.y + bounds.height) as f64);
        self.polygons_in(value, Window { left, top, right, bottom })
    }

    /// A corner in level-0 px, clamped to `bounds`.
    #[must_use]
    pub fn point_within(&self, (column, row): (u32, u32), bounds: Level0Rect) -> (f64, f64) {
        let x = self.origin_x + f64::from(column) * self.cell_width;
        let y = self.origin_y + f64::from(row) * self.cell_height;
        let clamp = |value: f64, from: i64, extent: i64| value.max(from as f64).min((from + extent.max(0)) as f64);
        (clamp(x, bounds.x, bounds.width), clamp(y, bounds.y, bounds.height))
    }

    fn polygons_in(&self, value: u8, window: Window) -> Vec<CellPolygon> {
        if self.values.len() as u64 != u64::from(self.width) * u64::from(self.height) {
            return Vec::new();
        }
        let grid = Grid { values: self.values, stride: self.width as usize, window, value };
        trace(&grid, &Runs::of(&grid))
    }
}

/// The columns (or rows) of `count` cells that share more than an edge with `from..to`.
fn touched(origin: f64, size: f64, count: u32, from: f64, to: f64) -> (u32, u32) {
    let edge = |index: u32| origin + f64::from(index) * size;
    let mut indices = (0..count).filter(|index| edge(*index) < to && edge(index + 1) > from);
    let Some(first) = indices.next() else { return (0, 0) };
    (first, indices.next_back().unwrap_or(first) + 1)
}

/// The part of the raster that is looked at, in cells.
#[derive(Clone, Copy, Debug)]
struct Window {
    left: u32,
    top: u32,
    right: u32,
    bottom: u32,
}

/// The raster as inside and outside.
struct Grid<'a> {
    values: &'a [u8],
    stride: usize,
    window: Window,
    value: u8,
}

impl Grid<'_> {
    fn row(&self, row: u32) -> &[u8] {
        let start = row as usize * self.stride;
        &self.values[start + self.window.left as usize..start + self.window.right as usize]
    }

    /// Whether the cell right of column edge `column` and below row edge `row` is inside. May lie outside the window.
    fn is_inside(&self, column: i64, row: i64) -> bool {
        let Window { left, top, right, bottom } = self.window;
        let in_window =
            (i64::from(left)..i64::from(right)).contains(&column) && (i64::from(top)..i64::from(bottom)).contains(&row);
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "within the raster by the test before"
        )]
        let inside = in_window && self.values[row as usize * self.stride + column as usize] == self.value;
        inside
    }
}

/// Maximal horizontal runs of inside cells, joined into components.
struct Runs {
    /// `start..end` columns of each run, row by row.
    spans: Vec<(u32, u32)>,
    /// Where the runs of each row of the window start in `spans`, and the end.
    row_starts: Vec<usize>,
    /// Union-find forest over the runs; a root is the first run of its component.
    parents: Vec<u32>,
}

impl Runs {
    fn of(grid: &Grid<'_>) -> Self {
        let Window { left, top, bottom, .. } = grid.window;
        let mut runs = Self { spans: Vec::new(), row_starts: vec![0], parents: Vec::new() };
        for row in top..bottom {
            let above = runs.row_starts[runs.row_starts.len() - 1];
            let above_from = runs.row_starts.len().checked_sub(2).map_or(above, |index| runs.row_starts[index]);
            let mut upper = above_from;
            let mut column = left;
            for chunk in grid.row(row).chunk_by(|a, b| (*a == grid.value) == (*b == grid.value)) {
                #[expect(clippy::cast_possible_truncation, reason = "a row is at most u32::MAX cells")]
                let end = column + chunk.len() as u32;
                if chunk[0] == grid.value {
                    let run = runs.spans.len();
                    runs.spans.push((column, end));
                    #[expect(clippy::cast_possible_truncation, reason = "2^32 runs would be more than 2^33 cells")]
                    runs.parents.push(run as u32);
                    while upper < above && runs.spans[upper].1 <= column {
                        upper += 1;
                    }
                    let mut touching = upper;
                    while touching < above && runs.spans[touching].0 < end {
                        runs.join(run, touching);
                        touching += 1;
                    }
                }
                column = end;
            }
            runs.row_starts.push(runs.spans.len());
        }
        runs
    }

    fn root(&mut self, mut run: usize) -> usize {
        while self.parents[run] as usize != run {
            let above = self.parents[run] as usize;
            self.parents[run] = self.parents[above];
            run = above;
        }
        run
    }

    fn join(&mut self, a: usize, b: usize) {
        let (a, b) = (self.root(a), self.root(b));
        #[expect(clippy::cast_possible_truncation, reason = "taken from `parents`")]
        let first = a.min(b) as u32;
        self.parents[a.max(b)] = first;
    }
}

/// Walks every boundary once, from its first top edge in reading order.
fn trace(grid: &Grid<'_>, runs: &Runs) -> Vec<CellPolygon> {
    let top = grid.window.top;
    let mut polygons: Vec<CellPolygon> = Vec::new();
    let mut roots = Runs { spans: Vec::new(), row_starts: Vec::new(), parents: runs.parents.clone() };
    // Polygon of each component, at the index of its first run.
    let mut polygon_of = vec![u32::MAX; runs.spans.len()];
    let mut walk = Walk::new(grid);
    for (row, bounds) in (top..).zip(runs.row_starts.windows(2)) {
        for run in bounds[0]..bounds[1] {
            let (start, end) = runs.spans[run];
            let root = roots.root(run);
            if polygon_of[root] == u32::MAX {
                #[expect(clippy::cast_possible_truncation, reason = "no more polygons than runs")]
                let next = polygons.len() as u32;
                polygon_of[root] = next;
                polygons.push(CellPolygon { exterior: Vec::new(), holes: Vec::new(), cell_count: 0 });
            }
            let polygon = &mut polygons[polygon_of[root] as usize];
            polygon.cell_count += u64::from(end - start);
            for column in start..end {
                let is_top_edge = row == top || !grid.is_inside(i64::from(column), i64::from(row) - 1);
                if is_top_edge && !walk.was_walked(column, row) {
                    walk.ring_from(column, row, |ring| {
                        if signed_area(&ring) > 0 { polygon.exterior = ring } else { polygon.holes.push(ring) }
                    });
                }
            }
        }
    }
    polygons
}

/// Walks boundaries with the inside on the right hand (y points down).
struct Walk<'a> {
    grid: &'a Grid<'a>,
    /// A bit per cell: its top edge has been walked. Every ring has a top edge.
    walked: Vec<u64>,
    /// Corners where the ring may touch itself, with their index in the path.
    crossings: HashMap<u64, usize, BuildHasherDefault<CornerHasher>>,
    /// The keys of `crossings`: a table that a long ring has grown is emptied by them, not as a whole for each ring.
    crossed: Vec<u64>,
}

/// Spreads the bits of a corner: the default hash takes half of all time on noise, and no one picks corners in malice.
#[derive(Default)]
struct CornerHasher(u64);

impl Hasher for CornerHasher {
    fn finish(&self) -> u64 {
        self.0 ^ (self.0 >> 32)
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(u64::from(*byte));
        }
    }

    fn write_u64(&mut self, corner: u64) {
        self.0 = (self.0 ^ corner).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
}

fn corner_key((x, y): (u32, u32)) -> u64 {
    u64::from(x) << 32 | u64::from(y)
}

impl<'a> Walk<'a> {
    fn new(grid: &'a Grid<'a>) -> Self {
        Self {
            grid,
            walked: vec![0; grid.values.len().div_ceil(64)],
            crossings: HashMap::default(),
            crossed: Vec::new(),
        }
    }

    fn was_walked(&self, column: u32, row: u32) -> bool {
        let index = row as usize * self.grid.stride + column as usize;
        self.walked[index / 64] >> (index % 64) & 1 == 1
    }

    fn mark(&mut self, column: u32, row: u32) {
        let index = row as usize * self.grid.stride + column as usize;
        self.walked[index / 64] |= 1 << (index % 64);
    }

    /// Walks the boundary that begins with the top edge of a cell; `emit` gets each simple ring of it.
    fn ring_from(&mut self, column: u32, row: u32, mut emit: impl FnMut(CellRing)) {
        for key in self.crossed.drain(..) {
            self.crossings.remove(&key);
        }
        // The start is a corner: the edge to its left is not a top edge, or it would have been met before.
        let start = (column, row);
        let mut path: CellRing = Vec::new();
        let (mut x, mut y) = start;
        let mut heading = Heading::East;
        loop {
            if heading == Heading::East {
                self.mark(x, y);
            }
            (x, y) = heading.step(x, y);
            let ahead_left = heading.ahead_left(x, y);
            let ahead_right = heading.ahead_right(x, y);
            let left = self.grid.is_inside(ahead_left.0, ahead_left.1);
            let next = if !self.grid.is_inside(ahead_right.0, ahead_right.1) {
                heading.right()
            } else if left {
                heading.left()
            } else {
                continue;
            };
            // A right turn past an inside cell ahead on the left: two cells meet at this corner only.
            if left && next == heading.right() {
                let key = corner_key((x, y));
                if let Some(&first) = self.crossings.get(&key) {
                    let ring = path.split_off(first);
                    for corner in &ring[1..] {
                        self.crossings.remove(&corner_key(*corner));
                    }
                    path.push((x, y));
                    emit(ring);
                    heading = next;
                    if (x, y) == start && heading == Heading::East {
                        break;
                    }
                    continue;
                }
                self.crossings.insert(key, path.len());
                self.crossed.push(key);
            }
            path.push((x, y));
            heading = next;
            if (x, y) == start && heading == Heading::East {
                break;
            }
        }
        emit(path);
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Heading {
    East,
    South,
    West,
    North,
}

impl Heading {
    fn right(self) -> Self {
        match self {
            Self::East => Self::South,
            Self::South => Self::West,
            Self::West => Self::North,
            Self::North => Self::East,
        }
    }

    fn left(self) -> Self {
        self.right().right().right()
    }

    /// The next corner; a walk never leaves the raster.
    fn step(self, x: u32, y: u32) -> (u32, u32) {
        match self {
            Self::East => (x + 1, y),
            Self::South => (x, y + 1),
            Self::West => (x - 1, y),
            Self::North => (x, y - 1),
        }
    }

    /// The cell ahead of corner (x, y) on the left hand.
    fn ahead_left(self, x: u32, y: u32) -> (i64, i64) {
        let (x, y) = (i64::from(x), i64::from(y));
        match self {
            Self::East => (x, y - 1),
            Self::South => (x, y),
            Self::West => (x - 1, y),
            Self::North => (x - 1, y - 1),
        }
    }

    /// The cell ahead of corner (x, y) on the right hand.
    fn ahead_right(self, x: u32, y: u32) -> (i64, i64) {
        self.right().ahead_left(x, y)
    }
}

/// Twice the area of a ring, positive if it runs as an exterior.
fn signed_area(ring: &[(u32, u32)]) -> i64 {
    let next = ring.iter().cycle().skip(1);
    let cross = |(a, b): (&(u32, u32), &(u32, u32))| i64::from(a.0) * i64::from(b.1) - i64::from(b.0) * i64::from(a.1);
    ring.iter().zip(next).map(cross).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashSet;

    fn cells(values: &[u8], width: u32) -> Cells<'_> {
        let height = u32::try_from(values.len()).unwrap() / width.max(1);
        Cells { values, width, height, origin_x: 0.0, origin_y: 0.0, cell_width: 1.0, cell_height: 1.0 }
    }

    fn parse(rows: &[&str]) -> (Vec<u8>, u32) {
        let values = rows.iter().flat_map(|row| row.bytes().map(|byte| u8::from(byte == b'#'))).collect();
        (values, u32::try_from(rows[0].len()).unwrap())
    }

    /// Whether the centre of a cell lies in an odd number of rings.
    fn covers(polygon: &CellPolygon, column: u32, row: u32) -> bool {
        let crossings = std::iter::once(&polygon.exterior).chain(&polygon.holes).flat_map(|ring| {
            ring.iter()
                .zip(ring.iter().cycle().skip(1))
                .filter(|(a, b)| a.0 == b.0 && a.0 > column && (a.1.min(b.1)..a.1.max(b.1)).contains(&row))
        });
        crossings.count() % 2 == 1
    }

    #[test]
    fn rings_by_hand() {
        for (rows, want) in [
            (vec!["."], vec![]),
            (vec!["#"], vec![(4, vec![], 1)]),
            (vec!["##", "##"], vec![(4, vec![], 4)]),
            (vec!["#.", "##"], vec![(6, vec![], 3)]),
            (vec!["#.", ".#"], vec![(4, vec![], 1), (4, vec![], 1)]),
            (vec!["###", "#.#", "###"], vec![(4, vec![4], 8)]),
            // The hole touches the outer ring in one corner: cut off, not a ring that touches itself.
            (vec!["##.", "#.#", "###"], vec![(6, vec![4], 7)]),
            // Two holes touch each other in one corner.
            (vec!["####", "#.##", "##.#", "####"], vec![(4, vec![4, 4], 14)]),
            // An island in a hole is its own polygon.
            (vec!["#####", "#...#", "#.#.#", "#...#", "#####"], vec![(4, vec![4], 16), (4, vec![], 1)]),
            // An island that touches the rim of its hole in one corner.
            (vec!["####", "##.#", "#.##", "####"], vec![(4, vec![4, 4], 14)]),
        ] {
            let (values, width) = parse(&rows);
            let found: Vec<_> = cells(&values, width)
                .polygons(1)
                .iter()
                .map(|polygon| {
                    (polygon.exterior.len(), polygon.holes.iter().map(Vec::len).collect::<Vec<_>>(), polygon.cell_count)
                })
                .collect();
            assert_eq!(found, want, "{rows:?}");
        }
    }

    #[test]
    fn a_wrong_length_has_no_polygons() {
        let mut cells = cells(&[1, 1, 1], 3);
        cells.height = 2;
        assert!(cells.polygons(1).is_empty());
    }

    #[test]
    fn cells_outside_the_bounds_are_left_out_and_corners_clamped() {
        let cells = Cells {
            values: &[1; 12],
            width: 4,
            height: 3,
            origin_x: -10.0,
            origin_y: 0.0,
            cell_width: 10.0,
            cell_height: 10.0,
        };
        let bounds = Level0Rect { x: 0, y: 0, width: 25, height: 20 };
        let polygons = cells.polygons_within(1, bounds);
        // The first column and the last row only touch the bounds.
        assert_eq!(polygons.len(), 1);
        assert_eq!(polygons[0].cell_count, 6);
        let corners: HashSet<_> = polygons[0]
            .exterior
            .iter()
            .map(|corner| cells.point_within(*corner, bounds))
            .map(|(x, y)| (x.to_string(), y.to_string()))
            .collect();
        let want = [("0", "0"), ("25", "0"), ("25", "20"), ("0", "20")];
        assert_eq!(corners, want.iter().map(|(x, y)| ((*x).to_owned(), (*y).to_owned())).collect());
        assert!(cells.polygons_within(1, Level0Rect { x: 500, y: 0, width: 5, height: 5 }).is_empty());
    }

    #[test]
    fn noise_on_a_large_raster_takes_seconds_at_most() {
        let side = 2000;
        let mut state = 1u32;
        let values: Vec<u8> = (0..side * side)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                u8::from(state >> 31 == 1)
            })
            .collect();
        let started = std::time::Instant::now();
        let polygons = cells(&values, side).polygons(1);
        let total: u64 = polygons.iter().map(|polygon| polygon.cell_count).sum();
        assert_eq!(total, values.iter().map(|value| u64::from(*value)).sum::<u64>());
        // A hundred times what it takes: guards against a quadratic step, not against a slow machine.
        assert!(started.elapsed().as_secs() < 30);
    }

    proptest! {
        #[test]
        fn polygons_are_valid_and_cover_exactly_their_cells(
            width in 1u32..14, height in 1u32..14, seed in proptest::collection::vec(0u8..3, 14 * 14),
        ) {
            let values: Vec<u8> = seed.into_iter().take((width * height) as usize).collect();
            let polygons = cells(&values, width).polygons(1);
            for polygon in &polygons {
                let area: i64 = signed_area(&polygon.exterior) + polygon.holes.iter().map(|hole| signed_area(hole)).sum::<i64>();
                prop_assert_eq!(area, 2 * i64::try_from(polygon.cell_count).unwrap());
                prop_assert!(signed_area(&polygon.exterior) > 0);
                for hole in &polygon.holes {
                    prop_assert!(signed_area(hole) < 0);
                }
                for ring in std::iter::once(&polygon.exterior).chain(&polygon.holes) {
                    let distinct: HashSet<_> = ring.iter().collect();
                    prop_assert_eq!(distinct.len(), ring.len(), "a ring touches itself");
                    for ((a, b), c) in ring.iter().zip(ring.iter().cycle().skip(1)).zip(ring.iter().cycle().skip(2)) {
                        prop_assert!((a.0 == b.0) != (a.1 == b.1), "an edge is not along the cells");
                        prop_assert!((a.0 == b.0) == (b.1 == c.1), "a corner on a straight edge");
                    }
                }
            }
            for row in 0..height {
                for column in 0..width {
                    let covering = polygons.iter().filter(|polygon| covers(polygon, column, row)).count();
                    let inside = values[(row * width + column) as usize] == 1;
                    prop_assert_eq!(covering, usize::from(inside));
                }
            }
        }
    }
}
