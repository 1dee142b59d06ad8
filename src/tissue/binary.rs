//! A picture of yes and no, and its connected pieces. A slide's mask has up to 16 million cells and is made before the
//! first tile is read, so cells are bits and pieces are runs of them.

use std::ops::Range;

use rayon::prelude::*;

/// Cells in a word.
const WORD: usize = 64;

/// A picture of yes and no.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Binary {
    width: usize,
    height: usize,
    /// Rows of whole words, the first cell in the lowest bit; bits beyond the width are clear.
    bits: Vec<u64>,
}

/// Which cells are neighbours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Connectivity {
    /// Those that share a side.
    Four,
    /// Those that share a side or a corner.
    Eight,
}

impl Binary {
    /// A clear picture.
    pub(super) fn new(width: u32, height: u32) -> Self {
        Self::clear(width as usize, height as usize)
    }

    /// The cells of which `claim` holds.
    pub(super) fn from_fn(width: u32, height: u32, claim: impl Fn(u32, u32) -> bool + Sync) -> Self {
        let mut picture = Self::new(width, height);
        let words = picture.row_words();
        (0..height).into_par_iter().zip(picture.bits.par_chunks_exact_mut(words)).for_each(|(y, row)| {
            for (x, word) in (0..width).step_by(WORD).zip(row) {
                let end = width.min(x + 64);
                *word = (x..end).rev().fold(0, |bits, x| bits << 1 | u64::from(claim(x, y)));
            }
        });
        picture
    }

    /// Whether a cell, which must lie in the picture, is set.
    pub(super) fn get(&self, x: u32, y: u32) -> bool {
        let x = x as usize;
        self.bits[y as usize * self.row_words() + x / WORD] >> (x % WORD) & 1 == 1
    }

    /// Width and height.
    pub(super) fn size(&self) -> (u32, u32) {
        let side = |side: usize| u32::try_from(side).unwrap_or(u32::MAX);
        (side(self.width), side(self.height))
    }

    /// The cells set in either picture; both have the same size.
    pub(super) fn or(mut self, other: &Self) -> Self {
        self.bits.iter_mut().zip(&other.bits).for_each(|(word, other)| *word |= other);
        self
    }

    /// The cells that are not set.
    pub(super) fn not(mut self) -> Self {
        self.bits.iter_mut().for_each(|word| *word = !*word);
        self.trimmed()
    }

    /// Cells at most `radius` columns and rows from a set one.
    pub(super) fn dilated_by_square(&self, radius: u8) -> Self {
        self.dilated(&vec![radius.into(); usize::from(radius) + 1])
    }

    /// Closes gaps between set cells into which no disc of `radius` fits. Beyond the edge all is clear, so that nothing
    /// grows along it.
    pub(super) fn closed_by_disc(&self, radius: u8) -> Self {
        let radius = usize::from(radius);
        let reach = |distance: usize| (radius * radius - distance * distance).isqrt();
        let disc: Vec<usize> = (0..=radius).map(reach).collect();
        let mut padded = Self::clear(self.width + 2 * radius, self.height + 2 * radius);
        for (y, run) in self.runs() {
            padded.set_run(y + radius, run.start + radius..run.end + radius);
        }
        let closed = padded.dilated(&disc).not().dilated(&disc).not();
        let mut cropped = Self::clear(self.width, self.height);
        for (y, run) in closed.runs().filter(|(y, _)| (radius..self.height + radius).contains(y)) {
            let inside = |x: usize| x.saturating_sub(radius).min(self.width);
            cropped.set_run(y - radius, inside(run.start)..inside(run.end));
        }
        cropped
    }

    fn clear(width: usize, height: usize) -> Self {
        Self { width, height, bits: vec![0; width.div_ceil(WORD).max(1) * height] }
    }

    fn row_words(&self) -> usize {
        self.width.div_ceil(WORD).max(1)
    }

    /// Cells within reach of a set one: `reach[d]` columns to both sides in the rows `d` above and below, not growing with
    /// `d`.
    fn dilated(&self, reach: &[usize]) -> Self {
        let words = self.row_words();
        let mut grown = Self::clear(self.width, self.height);
        let mut row = vec![0; words];
        for (y, source) in self.bits.chunks_exact(words).enumerate() {
            if source.iter().all(|word| *word == 0) {
                continue;
            }
            row.copy_from_slice(source);
            let mut width = 0;
            for (distance, wanted) in reach.iter().enumerate().rev() {
                while width < *wanted {
                    widen(&mut row);
                    width += 1;
                }
                let above = y.checked_sub(distance);
                let below = Some(y + distance).filter(|below| *below < self.height);
                for target in above.into_iter().chain(below) {
                    let target = &mut grown.bits[target * words..][..words];
                    target.iter_mut().zip(&row).for_each(|(word, grown)| *word |= grown);
                }
            }
        }
        grown.trimmed()
    }

    /// Clears the bits beyond the width.
    fn trimmed(mut self) -> Self {
        let (words, used) = (self.row_words(), self.width % WORD);
        if used > 0 {
            self.bits.iter_mut().skip(words - 1).step_by(words).for_each(|word| *word &= (1 << used) - 1);
        }
        self
    }

    /// The runs of set cells, row by row.
    fn runs(&self) -> impl Iterator<Item = (usize, Range<usize>)> {
        let words = self.row_words();
        self.bits.chunks_exact(words).enumerate().flat_map(move |(y, row)| {
            let mut next = 0;
            std::iter::from_fn(move || {
                let start = first(row, next, 0)?;
                let end = first(row, start, u64::MAX).unwrap_or(words * WORD).min(self.width);
                next = end;
                Some((y, start..end))
            })
        })
    }

    fn set_run(&mut self, y: usize, run: Range<usize>) {
        let row = y * self.row_words();
        for word in run.start / WORD..run.end.div_ceil(WORD) {
            let from = run.start.saturating_sub(word * WORD);
            let to = (run.end - word * WORD).min(WORD);
            if from < to {
                self.bits[row + word] |= u64::MAX >> (WORD - (to - from)) << from;
            }
        }
    }
}

/// The first cell of a row from `from` on that is set in the row with all bits of `flip` turned.
fn first(row: &[u64], from: usize, flip: u64) -> Option<usize> {
    let mut mask = u64::MAX << (from % WORD);
    for (index, word) in row.iter().enumerate().skip(from / WORD) {
        let found = (word ^ flip) & mask;
        if found != 0 {
            return Some(index * WORD + found.trailing_zeros() as usize);
        }
        mask = u64::MAX;
    }
    None
}

/// Sets the neighbours to the left and right of every set cell of a row.
fn widen(row: &mut [u64]) {
    let mut before = 0;
    for index in 0..row.len() {
        let word = row[index];
        let after = row.get(index + 1).copied().unwrap_or(0);
        row[index] = word | word << 1 | word >> 1 | before >> 63 | after << 63;
        before = word;
    }
}

/// The connected pieces of a picture, each kept or dropped as a whole.
pub(super) struct Pieces {
    width: u32,
    height: u32,
    runs: Vec<Run>,
    sizes: Vec<u64>,
    is_kept: Vec<bool>,
}

/// Cells of a row, and the piece they belong to.
struct Run {
    y: u32,
    x: Range<u32>,
    piece: usize,
}

impl Pieces {
    pub(super) fn of(picture: &Binary, connectivity: Connectivity) -> Self {
        let (width, height) = picture.size();
        let number = |value: usize| u32::try_from(value).unwrap_or(u32::MAX);
        let found = picture.runs().map(|(y, x)| (number(y), number(x.start)..number(x.end)));
        let mut runs: Vec<Run> = found.enumerate().map(|(piece, (y, x))| Run { y, x, piece }).collect();
        let mut parents: Vec<usize> = (0..runs.len()).collect();
        let corner = u32::from(connectivity == Connectivity::Eight);
        // Two fingers: `above` stays at the first run of the row before that may touch the run at `here`.
        let mut above = 0;
        for here in 0..runs.len() {
            let run = &runs[here];
            let is_past =
                |other: &Run| other.y + 1 < run.y || other.y + 1 == run.y && other.x.end + corner <= run.x.start;
            while is_past(&runs[above]) {
                above += 1;
            }
            let touches = |other: &&Run| other.y + 1 == run.y && other.x.start < run.x.end + corner;
            for other in runs[above..here].iter().take_while(touches) {
                join(&mut parents, other.piece, here);
            }
        }
        let mut numbers = vec![usize::MAX; runs.len()];
        let mut sizes = Vec::new();
        for run in &mut runs {
            let root = root(&mut parents, run.piece);
            if numbers[root] == usize::MAX {
                numbers[root] = sizes.len();
                sizes.push(0);
            }
            run.piece = numbers[root];
            sizes[run.piece] += u64::from(run.x.end - run.x.start);
        }
        let is_kept = vec![true; sizes.len()];
        Self { width, height, runs, sizes, is_kept }
    }

    pub(super) fn drop_smaller_than(&mut self, cells: f64) {
        self.is_kept.iter_mut().zip(&self.sizes).for_each(|(kept, size)| *kept &= *size as f64 >= cells);
    }

    pub(super) fn drop_larger_than(&mut self, cells: f64) {
        self.is_kept.iter_mut().zip(&self.sizes).for_each(|(kept, size)| *kept &= *size as f64 <= cells);
    }

    /// Drops every piece with a cell of which `claim` holds.
    pub(super) fn drop_if(&mut self, claim: impl Fn(u32, u32) -> bool) {
        for Run { y, x, piece } in &self.runs {
            let kept = &mut self.is_kept[*piece];
            *kept = *kept && !x.clone().any(|x| claim(x, *y));
        }
    }

    /// Keeps, of those still kept, only pieces with a cell of which `claim` holds.
    pub(super) fn keep_if(&mut self, claim: impl Fn(u32, u32) -> bool) {
        let mut holds = vec![false; self.is_kept.len()];
        for Run { y, x, piece } in &self.runs {
            holds[*piece] = holds[*piece] || self.is_kept[*piece] && x.clone().any(|x| claim(x, *y));
        }
        self.is_kept = holds;
    }

    /// The cells of the pieces that are kept.
    pub(super) fn kept(&self) -> Binary {
        let mut picture = Binary::new(self.width, self.height);
        for Run { y, x, .. } in self.runs.iter().filter(|run| self.is_kept[run.piece]) {
            picture.set_run(*y as usize, x.start as usize..x.end as usize);
        }
        picture
    }
}

/// The run that stands for a run's piece; paths are halved on the way.
fn root(parents: &mut [usize], mut run: usize) -> usize {
    while parents[run] != run {
        parents[run] = parents[parents[run]];
        run = parents[run];
    }
    run
}

fn join(parents: &mut [usize], one: usize, other: usize) {
    let (one, other) = (root(parents, one), root(parents, other));
    // The earlier run stands for both, so that pieces are numbered by their first cell.
    parents[one.max(other)] = one.min(other);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Pictures of several densities and widths around whole words, as cells too: `cells[y][x]`.
    fn pictures() -> impl Iterator<Item = (Binary, Vec<Vec<bool>>)> {
        let cases = [(1, 1), (63, 9), (64, 20), (65, 20), (130, 40), (200, 3)];
        cases.into_iter().flat_map(|size| [2, 20, 60, 95].map(|percent| (size, percent))).map(
            |((width, height), percent)| {
                let mut state: u32 = width * 31 + height + percent;
                let mut cell = || {
                    state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    (state >> 16) % 100 < percent
                };
                let cells: Vec<Vec<bool>> = (0..height).map(|_| (0..width).map(|_| cell()).collect()).collect();
                (Binary::from_fn(width, height, |x, y| cells[y as usize][x as usize]), cells)
            },
        )
    }

    fn of(cells: &[Vec<bool>]) -> Binary {
        let side = |len: usize| u32::try_from(len).unwrap();
        Binary::from_fn(side(cells[0].len()), side(cells.len()), |x, y| cells[y as usize][x as usize])
    }

    /// The cells of `0..width` by `0..height` of which `claim` holds.
    fn cells_of(width: usize, height: usize, claim: impl Fn(usize, usize) -> bool) -> Vec<Vec<bool>> {
        (0..height).map(|y| (0..width).map(|x| claim(x, y)).collect()).collect()
    }

    /// Whether a cell within `reach` of another one, by columns and rows, has the value; outside there is none.
    fn near(cells: &[Vec<bool>], (x, y): (usize, usize), radius: usize, is_disc: bool, value: bool) -> bool {
        let rows = y.saturating_sub(radius)..cells.len().min(y + radius + 1);
        rows.into_iter().any(|row| {
            let columns = x.saturating_sub(radius)..cells[0].len().min(x + radius + 1);
            columns.into_iter().any(|column| {
                let (across, down) = (x.abs_diff(column), y.abs_diff(row));
                cells[row][column] == value && (!is_disc || across * across + down * down <= radius * radius)
            })
        })
    }

    #[test]
    fn cells_are_where_they_were_put() {
        for (picture, cells) in pictures() {
            let (width, height) = picture.size();
            assert_eq!((width as usize, height as usize), (cells[0].len(), cells.len()));
            for (y, row) in (0..).zip(&cells) {
                for (x, cell) in (0..).zip(row) {
                    assert_eq!((picture.get(x, y), picture.clone().not().get(x, y)), (*cell, !*cell));
                }
            }
            assert_eq!(picture.clone().or(&picture.clone().not()).not(), Binary::new(width, height));
        }
    }

    #[test]
    fn growing_and_closing_do_what_they_say() {
        for (picture, cells) in pictures() {
            let (width, height) = (cells[0].len(), cells.len());
            for radius in [0, 1, 2, 5] {
                let r = usize::from(radius);
                let square = cells_of(width, height, |x, y| near(&cells, (x, y), r, false, true));
                assert_eq!(picture.dilated_by_square(radius), of(&square), "{radius}");
                let inside = |x: usize, y: usize| {
                    let (x, y) = (x.checked_sub(r)?, y.checked_sub(r)?);
                    cells.get(y)?.get(x).copied()
                };
                let padded = cells_of(width + 2 * r, height + 2 * r, |x, y| inside(x, y).unwrap_or(false));
                let grown = cells_of(width + 2 * r, height + 2 * r, |x, y| near(&padded, (x, y), r, true, true));
                let closed = cells_of(width, height, |x, y| !near(&grown, (x + r, y + r), r, true, false));
                assert_eq!(picture.closed_by_disc(radius), of(&closed), "{radius}");
            }
        }
    }

    /// The number of each cell's piece, by filling one after the other; `None` where a cell is clear.
    fn numbered(cells: &[Vec<bool>], connectivity: Connectivity) -> Vec<Vec<Option<usize>>> {
        let mut numbers = vec![vec![None; cells[0].len()]; cells.len()];
        let mut next = 0;
        for (y, x) in (0..cells.len()).flat_map(|y| (0..cells[0].len()).map(move |x| (y, x))) {
            let mut open = vec![(y, x)];
            let mut is_new = false;
            while let Some((y, x)) = open.pop() {
                if !cells[y][x] || numbers[y][x].is_some() {
                    continue;
                }
                (numbers[y][x], is_new) = (Some(next), true);
                for (row, column) in (y.saturating_sub(1)..cells.len().min(y + 2))
                    .flat_map(|row| (x.saturating_sub(1)..cells[0].len().min(x + 2)).map(move |column| (row, column)))
                {
                    if connectivity == Connectivity::Eight || row == y || column == x {
                        open.push((row, column));
                    }
                }
            }
            next += usize::from(is_new);
        }
        numbers
    }

    #[test]
    fn pieces_are_what_hangs_together() {
        for (picture, cells) in pictures() {
            for connectivity in [Connectivity::Four, Connectivity::Eight] {
                let numbers = numbered(&cells, connectivity);
                let mut sizes = std::collections::BTreeMap::new();
                numbers.iter().flatten().flatten().for_each(|number| *sizes.entry(*number).or_insert(0u64) += 1);
                let pieces = Pieces::of(&picture, connectivity);
                assert_eq!(pieces.sizes, sizes.values().copied().collect::<Vec<u64>>());
                assert_eq!(pieces.kept(), picture);
                let such = |claim: &dyn Fn(usize) -> bool| {
                    of(&cells_of(cells[0].len(), cells.len(), |x, y| numbers[y][x].is_some_and(claim)))
                };
                let of_kept = |keep: &dyn Fn(&mut Pieces)| {
                    let mut pieces = Pieces::of(&picture, connectivity);
                    keep(&mut pieces);
                    pieces.kept()
                };
                assert_eq!(of_kept(&|pieces| pieces.drop_smaller_than(3.0)), such(&|number| sizes[&number] >= 3));
                assert_eq!(of_kept(&|pieces| pieces.drop_larger_than(2.0)), such(&|number| sizes[&number] <= 2));
                let is_on_top = |number: usize| numbers[0].contains(&Some(number));
                assert_eq!(of_kept(&|pieces| pieces.keep_if(|_, y| y == 0)), such(&is_on_top));
                assert_eq!(of_kept(&|pieces| pieces.drop_if(|_, y| y == 0)), such(&|number| !is_on_top(number)));
            }
        }
    }
}
