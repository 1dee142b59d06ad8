//! Which tiles of a slide are inferred: resolution, grid or coordinates, tissue, sampling.

use std::num::NonZeroUsize;
use std::path::Path;

use super::EngineError;
use super::config::{TilingConfig, TissueSource};
use crate::geometry::{Level0Rect, PixelSize, TileGrid, TilePlane, TilePosition};
use crate::output::{self, GridLevel, Profile, TileAttributes};
use crate::slide::Slide;
use crate::slide::level::{self, LevelChoice};
use crate::tissue::{Cell, TissueMask, TissueOptions};

/// What will be inferred of one slide.
#[derive(Clone, Debug)]
pub struct SlidePlan {
    /// The slide.
    pub slide: Slide,
    /// The slide at level 0.
    pub pixel_size: PixelSize,
    /// The level that is read.
    pub choice: LevelChoice,
    /// The region at the model's resolution.
    pub plane: TilePlane,
    /// Pixels that neighbouring tiles share.
    pub overlap: u32,
    /// The tiles in order: ascending `(y, x)`.
    pub positions: Vec<TilePosition>,
    /// Tiles of the grid, or of the coordinates file.
    pub grid_tiles: u64,
    /// Tiles without enough tissue.
    pub background_tiles: u64,
    /// Tissue tiles left out by `max_tiles`.
    pub unsampled_tiles: u64,
    /// Where tissue is; `None` if no mask was asked for.
    pub tissue: Option<TissueMask>,
    /// What the reader of the results should know.
    pub notes: Vec<String>,
}

/// Plans one slide.
///
/// # Errors
/// [`EngineError`] if the slide or a mask can't be read, the resolution is not known, or the region lies outside.
pub fn plan(slide: Slide, tiling: &TilingConfig) -> Result<SlidePlan, EngineError> {
    let pixel_size = slide.pixel_size(tiling.slide_mpp.map(PixelSize::square))?;
    let choice = level::choose(&slide.levels, pixel_size, tiling.target_mpp, tiling.mpp_tolerance);
    let extent = slide.extent();
    let region = match tiling.region {
        None => extent,
        Some(region) => region.intersection(extent).ok_or_else(|| EngineError::RegionOutside {
            path: slide.path.clone(),
            region,
            extent,
        })?,
    };
    let plane = TilePlane {
        region,
        downsample_x: choice.downsample_x,
        downsample_y: choice.downsample_y,
        pixel_size: choice.effective,
        tile_size: tiling.tile_size,
    };
    let mut notes = Vec::new();
    if choice.is_enlarged() {
        notes.push(format!(
            "the slide's finest level ({} µm/px) is coarser than the model's {} µm/px and was enlarged",
            pixel_size.x, tiling.target_mpp
        ));
    }
    let (all, tissue) = match &tiling.coords {
        Some(path) => (from_coords(path, &plane)?, None),
        None => (grid(&plane, tiling)?, mask(&slide, pixel_size, &tiling.tissue)?),
    };
    let unreadable = tissue.as_ref().map_or(0.0, |mask| mask.share(Cell::Unreadable));
    if unreadable > 0.0 {
        let percent = 100.0 * unreadable;
        notes
            .push(format!("{percent:.1} % of the slide could not be decoded for the tissue mask: its tiles are tried"));
    }
    let grid_tiles = all.len() as u64;
    let is_tissue = |position: &TilePosition| match &tissue {
        None => true,
        Some(mask) => has_tissue(mask, plane.level0_rect(*position), extent, tiling.min_tissue),
    };
    let tissue_tiles: Vec<TilePosition> = all.into_iter().filter(is_tissue).collect();
    let background_tiles = grid_tiles - tissue_tiles.len() as u64;
    let positions = sample(&tissue_tiles, tiling.max_tiles);
    Ok(SlidePlan {
        unsampled_tiles: (tissue_tiles.len() - positions.len()) as u64,
        slide,
        pixel_size,
        choice,
        plane,
        overlap: tiling.overlap,
        positions,
        grid_tiles,
        background_tiles,
        tissue,
        notes,
    })
}

/// All tiles of the grid, refused beyond what memory holds.
fn grid(plane: &TilePlane, tiling: &TilingConfig) -> Result<Vec<TilePosition>, EngineError> {
    /// 100 million tiles take 3 GB; a slide of 100,000 × 100,000 px has 200,000 tiles of 224 px.
    const MOST: u64 = 100_000_000;
    let grid = TileGrid::new(*plane, tiling.overlap)?;
    if grid.len() > MOST {
        return Err(EngineError::Grid(crate::geometry::GridError::TooManyTiles(u128::from(grid.len()))));
    }
    Ok(grid.coords().map(|coord| grid.position(coord)).collect())
}

/// The tiles of a coordinates file, in order.
fn from_coords(path: &Path, plane: &TilePlane) -> Result<Vec<TilePosition>, EngineError> {
    let (mut points, sizes) = read_coords(path)?;
    let expected = plane.level0_rect(plane.position(0, 0));
    // Both sides round, each by at most half a pixel.
    let differs =
        |(width, height): &(i64, i64)| (width - expected.width).abs() > 1 || (height - expected.height).abs() > 1;
    if let Some(found) = sizes.into_iter().find(differs) {
        let expected = (expected.width, expected.height);
        return Err(EngineError::CoordsTileSize { path: path.to_owned(), found, expected });
    }
    points.sort_unstable_by_key(|(x, y)| (*y, *x));
    points.dedup();
    let is_outside = |(x, y): &(i64, i64)| Level0Rect { x: *x, y: *y, ..expected }.intersection(plane.region).is_none();
    if let Some((x, y)) = points.iter().copied().find(is_outside) {
        return Err(EngineError::CoordsOutside { path: path.to_owned(), x, y });
    }
    Ok(points.into_iter().map(|(x, y)| plane.position_at_level0(x, y)).collect())
}

/// Upper left corners, level-0 px.
type Points = Vec<(i64, i64)>;

/// Corners and tile sizes of a CSV or HDF5 file, in level-0 pixels; no size where the file doesn't tell.
fn read_coords(path: &Path) -> Result<(Points, Vec<(i64, i64)>), EngineError> {
    if path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("csv")) {
        let rects = output::read_coords_csv(path)?;
        return Ok(rects.iter().map(|rect| ((rect.x, rect.y), (rect.width, rect.height))).unzip());
    }
    let coords = output::read_coords_h5(path)?;
    let size = coords.tile_size_level0();
    Ok((coords.points, size.into_iter().collect()))
}

impl SlidePlan {
    /// What an HDF5 file of this plan's tiles says of them; `folder` is where it goes.
    #[must_use]
    pub fn tile_attributes(&self, id: &str, folder: &Path) -> TileAttributes {
        let info = self.slide.levels[self.choice.level.0 as usize];
        let extent = self.slide.extent();
        let level = self.choice.resample.is_none().then_some(GridLevel {
            index: self.choice.level.0,
            downsample: (info.downsample_x, info.downsample_y),
            size: (i64::from(info.width), i64::from(info.height)),
        });
        TileAttributes {
            profile: Profile::Trident,
            tile_size: self.plane.tile_size,
            overlap: self.overlap,
            tile_size_level0: self.plane.level0_rect(self.plane.position(0, 0)).width,
            level,
            slide_size: (extent.width, extent.height),
            level0_magnification: output::nominal_magnification(self.pixel_size.x),
            target_magnification: output::nominal_magnification(self.plane.pixel_size.x),
            name: id.to_owned(),
            folder: folder.to_string_lossy().into_owned(),
        }
    }
}

fn mask(slide: &Slide, pixel_size: PixelSize, source: &TissueSource) -> Result<Option<TissueMask>, EngineError> {
    Ok(match source {
        TissueSource::None => None,
        TissueSource::Otsu => Some(TissueMask::detect(slide, &TissueOptions::new(pixel_size))?),
        TissueSource::Png(path) => Some(TissueMask::from_image_file(path, slide.extent())?),
        TissueSource::GeoJson(path) => Some(TissueMask::from_geojson_file(path, slide.extent())?),
    })
}

/// Whether enough of the tile's part inside the slide is tissue; the padding at the slide's edge does not count.
fn has_tissue(mask: &TissueMask, tile: Level0Rect, extent: Level0Rect, min_tissue: f64) -> bool {
    tile.intersection(extent).is_some_and(|inside| {
        let share = mask.fraction(inside);
        share > 0.0 && share >= min_tissue
    })
}

/// At most `count` of the tiles, evenly sampled: number `int(i · n / count)` for each `i`.
fn sample(tiles: &[TilePosition], count: Option<NonZeroUsize>) -> Vec<TilePosition> {
    match count {
        Some(count) if count.get() < tiles.len() => {
            (0..count.get()).map(|i| tiles[i * tiles.len() / count.get()]).collect()
        }
        _ => tiles.to_vec(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sampling_is_even() {
        let at = |x: i64| TilePosition { x: x as f64, y: 0.0, plane_x: x, plane_y: 0 };
        let tiles: Vec<TilePosition> = (0..10).map(at).collect();
        let taken =
            |count| sample(&tiles, NonZeroUsize::new(count)).iter().map(|tile| tile.plane_x).collect::<Vec<_>>();
        assert_eq!(taken(4), [0, 2, 5, 7]);
        assert_eq!(taken(10).len(), 10);
        assert_eq!(taken(25).len(), 10);
        assert_eq!(taken(0).len(), 10);
    }
}
