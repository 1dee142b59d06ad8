//! Resolutions, levels, rectangles and the tile grid: pure arithmetic, no I/O.
//!
//! Two frames exist. **Level-0 pixels** are the slide's own and the only frame that crosses modules or reaches a file.
//! The **tile plane** is the region of a run at the resolution that the model sees; its pixels are the pixels of tiles
//! and of stitched maps. [`TilePlane`] holds the one conversion between the two.

use std::fmt;
use std::str::FromStr;

/// Microns per pixel along one axis; finite and greater than 0. Smaller is sharper.
#[derive(Clone, Copy, Debug, PartialEq, PartialOrd)]
pub struct Mpp(f64);

/// Why a number or text is no resolution.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no resolution: microns per pixel must be a number greater than 0")]
pub struct InvalidMpp(pub String);

impl Mpp {
    /// Checks that `value` is finite and greater than 0.
    ///
    /// # Errors
    /// [`InvalidMpp`] with the value as text.
    pub fn new(value: f64) -> Result<Self, InvalidMpp> {
        if value.is_finite() && value > 0.0 { Ok(Self(value)) } else { Err(InvalidMpp(value.to_string())) }
    }

    /// The value in µm/px.
    #[must_use]
    pub fn get(self) -> f64 {
        self.0
    }
}

impl FromStr for Mpp {
    type Err = InvalidMpp;

    fn from_str(text: &str) -> Result<Self, InvalidMpp> {
        let value = text.trim().parse().map_err(|_| InvalidMpp(text.to_owned()))?;
        Self::new(value).map_err(|_| InvalidMpp(text.to_owned()))
    }
}

impl fmt::Display for Mpp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The size of a pixel in µm, its two axes kept apart because some scanners differ in them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PixelSize {
    /// Microns per pixel along x.
    pub x: Mpp,
    /// Microns per pixel along y.
    pub y: Mpp,
}

impl PixelSize {
    /// A square pixel.
    #[must_use]
    pub fn square(mpp: Mpp) -> Self {
        Self { x: mpp, y: mpp }
    }

    /// The pixel that covers `x` × `y` of these pixels; `None` if a factor is not finite and positive.
    #[must_use]
    pub fn scaled(self, x: f64, y: f64) -> Option<Self> {
        Some(Self { x: Mpp::new(self.x.0 * x).ok()?, y: Mpp::new(self.y.0 * y).ok()? })
    }
}

/// What neighbouring tiles share, as pixels or as a share of the tile's side.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Overlap {
    /// Pixels of the tile plane.
    Pixels(u32),
    /// Percent of the tile's side, `0..100`.
    Percent(f64),
}

/// Why a text is no overlap.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no overlap: it must be at least 0 and below the tile, in pixels such as 64px or as a share such as 25%"
)]
pub struct InvalidOverlap(pub String);

impl Overlap {
    /// The overlap in pixels of tiles with this side, rounded to the nearest.
    #[must_use]
    pub fn in_pixels(self, tile_size: u32) -> u32 {
        match self {
            Self::Pixels(pixels) => pixels,
            Self::Percent(percent) => u32::try_from(round(f64::from(tile_size) * percent / 100.0)).unwrap_or(0),
        }
    }
}

impl FromStr for Overlap {
    type Err = InvalidOverlap;

    fn from_str(text: &str) -> Result<Self, InvalidOverlap> {
        let text = text.trim();
        let invalid = || InvalidOverlap(text.to_owned());
        if let Some(percent) = text.strip_suffix('%') {
            let percent: f64 = percent.trim().parse().map_err(|_| invalid())?;
            return if (0.0..100.0).contains(&percent) { Ok(Self::Percent(percent)) } else { Err(invalid()) };
        }
        let pixels = text.strip_suffix("px").unwrap_or(text).trim();
        pixels.parse().map(Self::Pixels).map_err(|_| invalid())
    }
}

impl fmt::Display for Overlap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pixels(pixels) => write!(f, "{pixels}px"),
            Self::Percent(percent) => write!(f, "{percent}%"),
        }
    }
}

/// Index into a slide's pyramid; 0 is the highest resolution.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Level(pub u32);

/// An area of the slide in level-0 pixels, `x..x+width` by `y..y+height`; may reach beyond the slide.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Level0Rect {
    /// Left edge.
    pub x: i64,
    /// Top edge.
    pub y: i64,
    /// Width, at least 0.
    pub width: i64,
    /// Height, at least 0.
    pub height: i64,
}

impl Level0Rect {
    /// The part that lies in `other`, `None` if they share no pixel.
    #[must_use]
    pub fn intersection(self, other: Self) -> Option<Self> {
        let (x, y) = (self.x.max(other.x), self.y.max(other.y));
        let width = (self.x + self.width).min(other.x + other.width) - x;
        let height = (self.y + self.height).min(other.y + other.height) - y;
        (width > 0 && height > 0).then_some(Self { x, y, width, height })
    }

    /// Area in level-0 pixels.
    #[must_use]
    pub fn area(self) -> i64 {
        self.width * self.height
    }
}

/// A cell of a [`TileGrid`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TileCoord {
    /// Column, from the left.
    pub col: u32,
    /// Row, from the top.
    pub row: u32,
}

/// Where one tile lies.
///
/// Tiles are ordered by `(y, x)` on the level-0 frame; a tile's place in that order is its index in the plan.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct TilePosition {
    /// Left edge in level-0 pixels, exact: may fall between pixels on a resampled plane.
    pub x: f64,
    /// Top edge in level-0 pixels, exact.
    pub y: f64,
    /// Left edge in plane pixels, where the stitcher puts the result.
    pub plane_x: i64,
    /// Top edge in plane pixels.
    pub plane_y: i64,
}

/// The region of a run at the resolution that the model sees.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TilePlane {
    /// The region of the slide, within the slide's bounds.
    pub region: Level0Rect,
    /// Level-0 pixels per plane pixel along x.
    pub downsample_x: f64,
    /// Level-0 pixels per plane pixel along y.
    pub downsample_y: f64,
    /// Size of a plane pixel: the effective resolution.
    pub pixel_size: PixelSize,
    /// Side of the square tiles in plane pixels, at least 1.
    pub tile_size: u32,
}

impl TilePlane {
    /// Width in plane pixels: the last pixel may be covered only in part.
    #[must_use]
    pub fn width(&self) -> u64 {
        plane_extent(self.region.width, self.downsample_x)
    }

    /// Height in plane pixels.
    #[must_use]
    pub fn height(&self) -> u64 {
        plane_extent(self.region.height, self.downsample_y)
    }

    /// The position of the tile whose upper left plane pixel is `(plane_x, plane_y)`.
    #[must_use]
    pub fn position(&self, plane_x: i64, plane_y: i64) -> TilePosition {
        TilePosition {
            x: self.region.x as f64 + plane_x as f64 * self.downsample_x,
            y: self.region.y as f64 + plane_y as f64 * self.downsample_y,
            plane_x,
            plane_y,
        }
    }

    /// The position of a tile given by its upper left level-0 pixel; its plane pixel is the nearest one.
    #[must_use]
    pub fn position_at_level0(&self, x: i64, y: i64) -> TilePosition {
        TilePosition {
            x: x as f64,
            y: y as f64,
            plane_x: round((x - self.region.x) as f64 / self.downsample_x),
            plane_y: round((y - self.region.y) as f64 / self.downsample_y),
        }
    }

    /// The level-0 rectangle of the tile at `position`, rounded to whole pixels; every tile has the same size.
    #[must_use]
    pub fn level0_rect(&self, position: TilePosition) -> Level0Rect {
        self.rect_of(position, self.tile_size)
    }

    /// The level-0 rectangle of the square of `side` plane pixels at `position`.
    #[must_use]
    pub fn rect_of(&self, position: TilePosition, side: u32) -> Level0Rect {
        let side = f64::from(side);
        Level0Rect {
            x: round(position.x),
            y: round(position.y),
            width: round(side * self.downsample_x).max(1),
            height: round(side * self.downsample_y).max(1),
        }
    }
}

/// The regular cut of a [`TilePlane`]: every plane pixel lies in at least one tile, and no tile lies wholly outside.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TileGrid {
    /// The plane that is cut.
    pub plane: TilePlane,
    /// Plane pixels from one tile to the next, `1..=tile_size`.
    pub stride: u32,
    /// Columns, at least 1.
    pub cols: u32,
    /// Rows, at least 1.
    pub rows: u32,
}

/// Why a plane can't be cut.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GridError {
    /// The overlap leaves no step from one tile to the next.
    #[error("an overlap of {overlap} px leaves no step between tiles of {tile_size} px")]
    OverlapTooLarge {
        /// Overlap in plane pixels.
        overlap: u32,
        /// Tile side in plane pixels.
        tile_size: u32,
    },
    /// More tiles than can be numbered.
    #[error("the grid would have {0} tiles, more than {max}", max = u32::MAX)]
    TooManyTiles(u128),
}

impl TileGrid {
    /// Cuts `plane` into tiles that overlap by `overlap` plane pixels.
    ///
    /// # Errors
    /// [`GridError`] if no step is left or the tiles can't be numbered in 32 bits.
    pub fn new(plane: TilePlane, overlap: u32) -> Result<Self, GridError> {
        let tile_size = plane.tile_size;
        let stride = tile_size.checked_sub(overlap).filter(|stride| *stride > 0);
        let stride = stride.ok_or(GridError::OverlapTooLarge { overlap, tile_size })?;
        let count = |extent: u64| extent.saturating_sub(u64::from(tile_size)).div_ceil(u64::from(stride)) + 1;
        let (cols, rows) = (count(plane.width()), count(plane.height()));
        let total = u128::from(cols) * u128::from(rows);
        let fits = |value: u64| u32::try_from(value).map_err(|_| GridError::TooManyTiles(total));
        if total > u128::from(u32::MAX) {
            return Err(GridError::TooManyTiles(total));
        }
        Ok(Self { plane, stride, cols: fits(cols)?, rows: fits(rows)? })
    }

    /// Number of tiles.
    #[must_use]
    pub fn len(&self) -> u64 {
        u64::from(self.cols) * u64::from(self.rows)
    }

    /// Never true: a grid has at least one tile.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        false
    }

    /// All cells, row by row: ascending in `(y, x)`.
    pub fn coords(&self) -> impl Iterator<Item = TileCoord> + use<> {
        let (cols, rows) = (self.cols, self.rows);
        (0..rows).flat_map(move |row| (0..cols).map(move |col| TileCoord { col, row }))
    }

    /// Where the tile of a cell lies.
    #[must_use]
    pub fn position(&self, coord: TileCoord) -> TilePosition {
        let stride = i64::from(self.stride);
        self.plane.position(i64::from(coord.col) * stride, i64::from(coord.row) * stride)
    }
}

/// Number of plane pixels that cover `level0` pixels.
fn plane_extent(level0: i64, downsample: f64) -> u64 {
    // A downsample such as 4.00003 (level sizes are rounded) must not add a column for a sliver of a pixel.
    let exact = level0.max(0) as f64 / downsample;
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a slide's extent is far below 2^53")]
    let extent = (exact - 0.01).ceil().max(1.0) as u64;
    extent
}

/// Nearest whole number.
fn round(value: f64) -> i64 {
    #[expect(clippy::cast_possible_truncation, reason = "slide coordinates are far below 2^53")]
    let whole = value.round() as i64;
    whole
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn plane(width: i64, height: i64, downsample: f64, tile_size: u32) -> TilePlane {
        TilePlane {
            region: Level0Rect { x: 30, y: 70, width, height },
            downsample_x: downsample,
            downsample_y: downsample,
            pixel_size: PixelSize::square(Mpp::new(0.25 * downsample).unwrap()),
            tile_size,
        }
    }

    #[test]
    fn mpp_takes_only_positive_finite_numbers() {
        for bad in ["", "0", "-0.25", "NaN", "inf", "20x"] {
            assert!(bad.parse::<Mpp>().is_err(), "{bad:?}");
        }
        assert_eq!(" 0.499 ".parse::<Mpp>().unwrap().get(), 0.499);
    }

    #[test]
    fn overlap_is_pixels_or_a_share() {
        assert_eq!("64px".parse::<Overlap>().unwrap().in_pixels(256), 64);
        assert_eq!("64".parse::<Overlap>().unwrap().in_pixels(256), 64);
        assert_eq!("12.5%".parse::<Overlap>().unwrap().in_pixels(256), 32);
        for bad in ["", "px", "-1px", "100%", "120%", "-10%", "NaN%", "a quarter"] {
            let error = bad.parse::<Overlap>().unwrap_err().to_string();
            assert!(
                error.starts_with(&format!("{bad:?} is no overlap: it must be at least 0 and below the tile")),
                "{error}"
            );
        }
    }

    #[test]
    fn grid_keeps_the_remainder() {
        // 1000 px, tiles of 256: 4 columns, the last reaching 24 px beyond the region.
        let grid = TileGrid::new(plane(1000, 256, 1.0, 256), 0).unwrap();
        assert_eq!((grid.cols, grid.rows), (4, 1));
        let last = grid.position(TileCoord { col: 3, row: 0 });
        assert_eq!(grid.plane.level0_rect(last), Level0Rect { x: 30 + 768, y: 70, width: 256, height: 256 });
    }

    #[test]
    fn grid_on_a_resampled_plane_counts_in_plane_pixels() {
        // 1000 level-0 px at downsample 2.5 are 400 plane px: tiles of 100 with overlap 25 step by 75.
        let grid = TileGrid::new(plane(1000, 1000, 2.5, 100), 25).unwrap();
        assert_eq!((grid.cols, grid.rows, grid.stride), (5, 5, 75));
        let rect = grid.plane.level0_rect(grid.position(TileCoord { col: 1, row: 2 }));
        assert_eq!(rect, Level0Rect { x: 30 + 188, y: 70 + 375, width: 250, height: 250 });
    }

    #[test]
    fn rounded_level_sizes_add_no_sliver_column() {
        let mut plane = plane(4096, 4096, 1.0, 256);
        plane.downsample_x = 4096.0 / 1023.0 * (1023.0 / 1024.0) * 0.999_999;
        assert_eq!(plane.width(), 1024);
    }

    #[test]
    fn overlap_of_a_whole_tile_is_refused() {
        let error = TileGrid::new(plane(1000, 1000, 1.0, 64), 64).unwrap_err();
        assert_eq!(error, GridError::OverlapTooLarge { overlap: 64, tile_size: 64 });
    }

    proptest! {
        #[test]
        fn grid_covers_every_pixel_and_no_tile_is_outside(
            width in 1i64..5000, height in 1i64..5000, tile in 1u32..600, overlap_percent in 0u32..95,
        ) {
            let overlap = tile * overlap_percent / 100;
            let grid = TileGrid::new(plane(width, height, 1.0, tile), overlap).unwrap();
            for (count, extent) in [(grid.cols, width), (grid.rows, height)] {
                let last_start = i64::from(count - 1) * i64::from(grid.stride);
                prop_assert!(last_start + i64::from(tile) >= extent);
                prop_assert!(last_start < extent);
                prop_assert!(grid.stride <= tile);
            }
        }

        #[test]
        fn level0_positions_return_to_their_plane_pixel(
            col in 0u32..300, row in 0u32..300, downsample in 1.0f64..16.0, tile in 8u32..600,
        ) {
            let plane = plane(400_000, 400_000, downsample, tile);
            let grid = TileGrid::new(plane, 0).unwrap();
            let position = grid.position(TileCoord { col, row });
            let rect = plane.level0_rect(position);
            let back = plane.position_at_level0(rect.x, rect.y);
            prop_assert_eq!((back.plane_x, back.plane_y), (position.plane_x, position.plane_y));
        }
    }
}
