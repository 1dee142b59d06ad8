//! Where the slide has tissue, so that glass, ink and the scanner's border are not inferred.
//!
//! A [`TissueMask`] is a coarse raster over the whole slide. It is found in the slide's own colours
//! ([`TissueMask::detect`]) or given by the user ([`TissueMask::from_image_file`], [`TissueMask::from_geojson_file`]).
//! What was taken away, and as what, stays in the raster for the picture. The module decides which tiles are worth
//! inferring ([`TissueMask::select`]); it knows no model.

mod binary;
mod detect;
mod user;

use std::path::PathBuf;

pub use self::detect::TissueOptions;
use crate::geometry::{Level0Rect, TileCoord, TileGrid};
use crate::slide::SlideError;

/// What a cell of a [`TissueMask`] shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Cell {
    /// Glass, or outside of a user's mask.
    Background,
    /// Tissue.
    Tissue,
    /// Ink on the glass: no tissue, also where there is some beneath.
    Pen,
    /// The black frame that some scanners leave.
    Border,
    /// A piece of tissue too small to be one.
    Speck,
    /// Not decodable at the level the mask was made from. Counts as tissue: its tiles are tried, and told if they fail.
    Unreadable,
}

impl Cell {
    /// Whether tiles here are worth inferring.
    #[must_use]
    pub fn is_tissue(self) -> bool {
        matches!(self, Self::Tissue | Self::Unreadable)
    }
}

/// A raster of what the slide shows, stretched over the whole of level 0.
#[derive(Clone, Debug)]
pub struct TissueMask {
    width: u32,
    height: u32,
    scale_x: f64,
    scale_y: f64,
    /// `[height, width]`.
    cells: Vec<Cell>,
    /// `[height + 1, width + 1]`: tissue cells above and to the left.
    sums: Vec<u32>,
}

/// Why there is no mask.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TissueError {
    /// The slide can't be read.
    #[error(transparent)]
    Slide(#[from] SlideError),
    /// The mask file can't be read.
    #[error("{}: can't be read", path.display())]
    Io {
        /// The mask file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The mask file is no image.
    #[error("{}: no readable image", path.display())]
    Image {
        /// The mask file.
        path: PathBuf,
        /// The decoder's reason.
        source: image::ImageError,
    },
    /// The mask file is no GeoJSON.
    #[error("{}: no GeoJSON", path.display())]
    GeoJson {
        /// The mask file.
        path: PathBuf,
        /// The parser's reason.
        source: Box<geojson::Error>,
    },
    /// A shape without an area, or with impossible coordinates.
    #[error("{}: feature {feature} {problem}", path.display())]
    Geometry {
        /// The mask file.
        path: PathBuf,
        /// Index of the feature, from 0.
        feature: usize,
        /// What is wrong with it.
        problem: String,
    },
    /// A mask without any shape.
    #[error("{}: no polygon in it", path.display())]
    NoPolygon {
        /// The mask file.
        path: PathBuf,
    },
}

impl TissueError {
    /// What to do about it, in the words of the settings.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Slide(error) => error.hint(),
            Self::Geometry { .. } | Self::NoPolygon { .. } => {
                Some("`tissue_mask` takes polygons and multipolygons in level-0 pixels".to_owned())
            }
            Self::Image { .. } | Self::GeoJson { .. } => {
                Some("`tissue_mask` takes a PNG stretched over the slide, or a GeoJSON file".to_owned())
            }
            Self::Io { .. } => None,
        }
    }
}

impl TissueMask {
    /// A mask of `width` x `height` cells, row by row, over a slide of `extent`.
    ///
    /// Missing cells are background, surplus ones are dropped.
    #[must_use]
    pub fn new(width: u32, height: u32, extent: Level0Rect, mut cells: Vec<Cell>) -> Self {
        let (width, height) = (width.max(1), height.max(1));
        let stride = width as usize + 1;
        cells.resize(width as usize * height as usize, Cell::Background);
        let mut sums = vec![0u32; stride * (height as usize + 1)];
        for (row, line) in cells.chunks_exact(width as usize).enumerate() {
            let mut in_row = 0;
            for (col, cell) in line.iter().enumerate() {
                in_row += u32::from(cell.is_tissue());
                sums[(row + 1) * stride + col + 1] = sums[row * stride + col + 1] + in_row;
            }
        }
        let (scale_x, scale_y) = (extent.width as f64 / f64::from(width), extent.height as f64 / f64::from(height));
        Self { width, height, scale_x, scale_y, cells, sums }
    }

    /// Width in cells.
    #[must_use]
    pub fn width(&self) -> u32 {
        self.width
    }

    /// Height in cells.
    #[must_use]
    pub fn height(&self) -> u32 {
        self.height
    }

    /// Level-0 pixels per cell along x.
    #[must_use]
    pub fn scale_x(&self) -> f64 {
        self.scale_x
    }

    /// Level-0 pixels per cell along y.
    #[must_use]
    pub fn scale_y(&self) -> f64 {
        self.scale_y
    }

    /// All cells: `[height, width]`.
    #[must_use]
    pub fn cells(&self) -> &[Cell] {
        &self.cells
    }

    /// Memory that the mask takes.
    #[must_use]
    pub fn memory_bytes(&self) -> u64 {
        (self.cells.len() * size_of::<Cell>() + self.sums.len() * size_of::<u32>()) as u64
    }

    /// Share of the slide that shows `cell`, 0 to 1.
    #[must_use]
    pub fn share(&self, cell: Cell) -> f64 {
        self.cells.iter().filter(|found| **found == cell).count() as f64 / self.cells.len() as f64
    }

    /// Share of `rect` that is tissue, 0 to 1, exact by area. What reaches beyond the slide counts as no tissue; an
    /// empty rectangle has none.
    #[must_use]
    pub fn fraction(&self, rect: Level0Rect) -> f64 {
        if rect.width <= 0 || rect.height <= 0 {
            return 0.0;
        }
        let (x0, y0) = (rect.x as f64 / self.scale_x, rect.y as f64 / self.scale_y);
        let (width, height) = (rect.width as f64 / self.scale_x, rect.height as f64 / self.scale_y);
        let (x1, y1) = (x0 + width, y0 + height);
        let tissue = self.sum_to(x1, y1) - self.sum_to(x0, y1) - self.sum_to(x1, y0) + self.sum_to(x0, y0);
        (tissue / (width * height)).clamp(0.0, 1.0)
    }

    /// The cells of `grid` with at least `min_tissue` (0 to 1) of tissue, in the grid's order. At 0 that is every cell.
    #[must_use]
    pub fn select(&self, grid: &TileGrid, min_tissue: f64) -> Vec<TileCoord> {
        let is_worth = |coord: &TileCoord| self.fraction(grid.plane.level0_rect(grid.position(*coord))) >= min_tissue;
        grid.coords().filter(is_worth).collect()
    }

    /// Tissue area above and to the left of a point, in cells. Within a cell it is bilinear in the sums at its corners.
    fn sum_to(&self, x: f64, y: f64) -> f64 {
        let split = |value: f64, count: u32| {
            let value = value.clamp(0.0, f64::from(count));
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped to the raster")]
            let whole = (value as usize).min(count as usize - 1);
            (whole, value - whole as f64)
        };
        let ((col, right), (row, down)) = (split(x, self.width), split(y, self.height));
        let stride = self.width as usize + 1;
        let sum = |row: usize, col: usize| f64::from(self.sums[row * stride + col]);
        let upper = sum(row, col) * (1.0 - right) + sum(row, col + 1) * right;
        let lower = sum(row + 1, col) * (1.0 - right) + sum(row + 1, col + 1) * right;
        upper * (1.0 - down) + lower * down
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::geometry::{Mpp, PixelSize, TilePlane};
    use proptest::prelude::*;

    fn rect(x: i64, y: i64, width: i64, height: i64) -> Level0Rect {
        Level0Rect { x, y, width, height }
    }

    /// Cells of 10 x 20 level-0 px: `#` tissue, `p` pen, `?` unreadable.
    fn mask(rows: &[&str]) -> TissueMask {
        let cell = |letter| match letter {
            '#' => Cell::Tissue,
            'p' => Cell::Pen,
            '?' => Cell::Unreadable,
            _ => Cell::Background,
        };
        let (width, height) = (u32::try_from(rows[0].len()).unwrap(), u32::try_from(rows.len()).unwrap());
        let cells = rows.iter().flat_map(|row| row.chars().map(cell)).collect();
        TissueMask::new(width, height, rect(0, 0, i64::from(width) * 10, i64::from(height) * 20), cells)
    }

    #[test]
    fn fractions_known_by_hand() {
        let mask = mask(&["#..", ".#p"]);
        for (rect, expected) in [
            (rect(0, 0, 30, 40), 2.0 / 6.0),
            (rect(0, 0, 10, 20), 1.0),
            (rect(10, 0, 10, 20), 0.0),
            // A quarter of each of the four left cells.
            (rect(5, 10, 10, 20), 0.5),
            // A single pixel.
            (rect(9, 19, 1, 1), 1.0),
            // Half beyond the slide.
            (rect(-10, 0, 20, 20), 0.5),
            (rect(25, 35, 10, 10), 0.0),
            (rect(-100, -100, 50, 50), 0.0),
            (rect(5000, 0, 50, 50), 0.0),
            (rect(0, 0, 0, 10), 0.0),
        ] {
            assert!((mask.fraction(rect) - expected).abs() < 1e-12, "{rect:?}: {}", mask.fraction(rect));
        }
    }

    #[test]
    fn selection_keeps_the_order_and_the_unreadable() {
        let mask = mask(&["#.?", "..#"]);
        let pixel_size = PixelSize::square(Mpp::new(0.5).unwrap());
        let plane =
            TilePlane { region: rect(0, 0, 30, 40), downsample_x: 1.0, downsample_y: 1.0, pixel_size, tile_size: 10 };
        let grid = TileGrid::new(plane, 0).unwrap();
        let found: Vec<_> = mask.select(&grid, 0.5).into_iter().map(|coord| (coord.row, coord.col)).collect();
        assert_eq!(found, [(0, 0), (0, 2), (1, 0), (1, 2), (2, 2), (3, 2)]);
        assert_eq!(mask.select(&grid, 0.0).len(), 12);
        assert_eq!(mask.share(Cell::Unreadable), 1.0 / 6.0);
    }

    proptest! {
        #[test]
        fn fractions_are_shares_and_add_up(
            bits in proptest::collection::vec(any::<bool>(), 35), x in -20i64..120, y in -20i64..120,
            width in 2i64..150, height in 1i64..150, cut in 0.0f64..1.0,
        ) {
            let cells = bits.iter().map(|tissue| if *tissue { Cell::Tissue } else { Cell::Background }).collect();
            let mask = TissueMask::new(7, 5, rect(0, 0, 101, 97), cells);
            #[expect(clippy::cast_possible_truncation, reason = "a share of a small number")]
            let left = ((width as f64 * cut) as i64).clamp(1, width - 1);
            let whole = mask.fraction(rect(x, y, width, height)) * width as f64;
            let parts = mask.fraction(rect(x, y, left, height)) * left as f64
                + mask.fraction(rect(x + left, y, width - left, height)) * (width - left) as f64;
            prop_assert!((0.0..=1.0).contains(&mask.fraction(rect(x, y, width, height))));
            prop_assert!((whole - parts).abs() < 1e-9, "{whole} {parts}");
        }
    }
}
