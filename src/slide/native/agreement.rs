//! Whether the native reader gives the pixels that OpenSlide gives, tried on a handful of tiles when a slide is opened.

use super::pyramid::TiledLevel;
use crate::geometry::Level;
use crate::slide::source::{LevelRect, LevelSource};
use crate::slide::{Slide, SlideError};

/// Largest difference of a channel: two sound JPEG decoders round differently, above all where they enlarge colour.
const MAX_DIFFERENCE: u8 = 4;
/// Largest mean difference of a tile.
const MAX_MEAN_DIFFERENCE: f64 = 0.5;
/// Tiles of each level that are compared, if so many can be.
const TILES: usize = 2;

/// What the comparison found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Agreement {
    /// Tiles that both readers decoded.
    pub tiles: usize,
    /// The largest difference of a channel.
    pub max_difference: u8,
}

/// Compares tiles of every level, those of the most bytes first, where most can differ; `Err` says what differs.
///
/// A tile that OpenSlide can't decode says nothing about the reader and is passed over. Levels that OpenSlide doesn't know
/// can't be compared.
///
/// # Errors
/// Why the native reader must not be used, in words.
pub(crate) fn check(openslide: &Slide, native: &Slide) -> Result<Agreement, String> {
    let mut found = Agreement::default();
    let levels = native.native.iter().flat_map(|pyramid| &pyramid.levels);
    for ((index, tiled), info) in (0..).zip(levels).zip(&openslide.levels) {
        let level = Level(index);
        let one = |slide: &Slide| crate::slide::source::open(slide, level, std::iter::empty(), 1);
        let open = |slide: &Slide| one(slide).map(|mut sources| sources.remove(0)).map_err(|error| error.to_string());
        let (mut theirs, mut ours) = (open(openslide)?, open(native)?);
        let mut compared = 0;
        for tile in candidates(tiled, info.openslide_downsample) {
            if let Some(difference) = compare(theirs.as_mut(), ours.as_mut(), rect_of(tiled, tile))
                .map_err(|what| format!("level {index}, tile {tile}: {what}"))?
            {
                compared += 1;
                found.max_difference = found.max_difference.max(difference);
            }
            if compared == TILES {
                break;
            }
        }
        if compared == 0 {
            return Err(format!("no tile of level {index} could be compared with OpenSlide's"));
        }
        found.tiles += compared;
    }
    Ok(found)
}

/// The tiles worth trying: of those that are there and lie on a whole pixel for OpenSlide, the ones of the most bytes.
fn candidates(level: &TiledLevel, downsample: f64) -> Vec<u32> {
    /// Enough to find some that are sound.
    const MOST: usize = 8;
    let is_whole = |position: i64| {
        let position = position as f64;
        ((position * downsample).round() / downsample - position).abs() < 1e-6
    };
    let is_comparable = |tile: &u32| {
        let rect = rect_of(level, *tile);
        level.tile_data(*tile).is_some() && is_whole(rect.x) && is_whole(rect.y)
    };
    let mut tiles: Vec<u32> = (0..).take(level.tile_byte_counts.len()).filter(is_comparable).collect();
    tiles.sort_by_key(|tile| std::cmp::Reverse(level.tile_byte_counts[*tile as usize]));
    tiles.truncate(MOST);
    tiles
}

fn rect_of(level: &TiledLevel, tile: u32) -> LevelRect {
    let (column, row) = (tile % level.tiles_across(), tile / level.tiles_across());
    LevelRect {
        x: i64::from(column) * i64::from(level.tile_width),
        y: i64::from(row) * i64::from(level.tile_height),
        width: level.tile_width,
        height: level.tile_height,
    }
}

/// The largest difference within a rectangle; `None` if it can't tell anything.
fn compare(theirs: &mut dyn LevelSource, ours: &mut dyn LevelSource, rect: LevelRect) -> Result<Option<u8>, String> {
    let (mut expected, mut rgb) = (Vec::new(), Vec::new());
    match theirs.read(rect, &mut expected) {
        // OpenSlide interpolates between pixels.
        Ok(shift) if shift.x.abs().max(shift.y.abs()) > 1e-6 => return Ok(None),
        Ok(_) => {}
        Err(SlideError::Read { .. }) => return Ok(None),
        Err(error) => return Err(error.to_string()),
    }
    match ours.read(rect, &mut rgb) {
        Ok(_) => {}
        Err(SlideError::Read { source, .. }) => return Err(format!("OpenSlide decodes it, but {source}")),
        Err(error) => return Err(error.to_string()),
    }
    let differences = || rgb.iter().zip(&expected).map(|(ours, theirs)| ours.abs_diff(*theirs));
    let most = differences().max().unwrap_or(0);
    let mean = differences().map(f64::from).sum::<f64>() / rgb.len().max(1) as f64;
    if most > MAX_DIFFERENCE || mean > MAX_MEAN_DIFFERENCE {
        return Err(format!("pixels differ from OpenSlide's by up to {most} levels, by {mean:.2} in the mean"));
    }
    Ok(Some(most))
}
