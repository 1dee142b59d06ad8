//! The part of the slide that every step runs over, and the walk over it one thing after the other.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::engine::config::{Emit, OnFailure, RunConfig, TilingConfig};
use crate::engine::plan::{self, SlidePlan};
use crate::engine::stitch_spec;
use crate::experiment::ExperimentError;
use crate::geometry::Level0Rect;
use crate::inference::{ModelCard, Prediction, Session};
use crate::slide::{ReadOptions, Slide, TileReader};
use crate::stitch::{Overview, OverviewBuilder, Stitcher};

/// Longest side of the maps that a walk gives, in cells.
const MAP_SIDE: usize = 1024;

/// Where tissue is densest on the slide, so many tiles of it.
pub(super) struct Course {
    pub(super) plan: SlidePlan,
    /// Tiles that were asked for.
    pub(super) wanted: usize,
    /// Tissue tiles of the whole slide.
    pub(super) slide_tiles: u64,
    tiling: TilingConfig,
}

/// What a walk gave.
pub(super) struct Walk {
    /// The stitched map; `None` for features.
    pub(super) map: Option<Overview>,
    /// Time spent reading, inferring and stitching.
    pub(super) busy: [Duration; 3],
}

impl Course {
    /// About `wanted` tissue tiles of the slide, side by side.
    pub(super) fn new(path: &Path, card: &ModelCard, wanted: usize) -> Result<Self, ExperimentError> {
        let mut tiling = TilingConfig::of(card);
        let mut plan = plan::plan(Slide::open(path, tiling.reader)?, &tiling)?;
        let slide_tiles = plan.positions.len() as u64;
        if plan.positions.is_empty() {
            return Err(ExperimentError::NoTiles { path: path.to_owned() });
        }
        if plan.positions.len() > wanted {
            tiling.region = Some(densest(&plan, wanted));
            plan = plan::plan(Slide::open(path, tiling.reader)?, &tiling)?;
        }
        Ok(Self { plan, wanted, slide_tiles, tiling })
    }

    /// Number of tiles.
    pub(super) fn tiles(&self) -> usize {
        self.plan.positions.len()
    }

    /// What a run over it does, writing `emit`.
    pub(super) fn config(&self, emit: Emit) -> RunConfig {
        RunConfig {
            tiling: self.tiling.clone(),
            threshold: f64::from(super::THRESHOLD),
            emit: vec![emit],
            on_tile_error: OnFailure::Fail,
            on_nonfinite: OnFailure::Skip,
            icc: false,
        }
    }

    /// Reads, infers and stitches in turn, in this thread.
    pub(super) fn walk(
        &self,
        card: &ModelCard,
        session: &mut dyn Session,
        batch: usize,
    ) -> Result<Walk, ExperimentError> {
        let plan = &self.plan;
        let options = ReadOptions { tile_size: plan.plane.tile_size, icc: false };
        let mut reader = TileReader::new(&plan.slide, &plan.choice, options, &plan.positions)?;
        let spec = stitch_spec(card, &self.config(Emit::Csv), plan);
        let mut stitcher = spec.map(Stitcher::new).transpose()?;
        let mut map = spec.and_then(|spec| OverviewBuilder::new(&spec, MAP_SIDE));
        let mut pixels = vec![Vec::new(); batch];
        let mut busy = [Duration::ZERO; 3];
        let mut lap = Instant::now();
        let mut clock = |stage: usize| {
            let now = Instant::now();
            busy[stage] += now - lap;
            lap = now;
        };
        for positions in plan.positions.chunks(batch) {
            for (position, pixels) in positions.iter().zip(&mut pixels) {
                reader.read(*position, pixels)?;
            }
            clock(0);
            let filled: Vec<&[u8]> = pixels[..positions.len()].iter().map(Vec::as_slice).collect();
            let prediction = session.predict(&filled)?;
            clock(1);
            if let (Some(stitcher), Some(map)) = (&mut stitcher, &mut map) {
                match &prediction {
                    Prediction::Classes(all) => {
                        for (position, values) in positions.iter().zip(all.outer_iter()) {
                            stitcher.place_classes(*position, &values.to_vec(), |strip| map.add(&strip));
                        }
                    }
                    Prediction::Map(all) => {
                        let tiles: Vec<_> = positions.iter().copied().zip(all.outer_iter()).collect();
                        stitcher.place_maps(&tiles, |strip| map.add(&strip));
                    }
                    Prediction::Features(_) => {}
                }
            }
            clock(2);
        }
        if let (Some(stitcher), Some(map)) = (&mut stitcher, &mut map) {
            stitcher.finish(|strip| map.add(&strip));
        }
        clock(2);
        Ok(Walk { map: map.map(|map| map.finish().0), busy })
    }
}

impl Walk {
    /// What bounds it, in words.
    pub(super) fn bottleneck(&self) -> String {
        let total: f64 = self.busy.iter().map(Duration::as_secs_f64).sum();
        let stages = ["read", "infer", "stitch"].into_iter().zip(self.busy);
        let most = stages.max_by_key(|(_, busy)| *busy);
        most.map_or_else(String::new, |(stage, busy)| {
            let share = 100.0 * busy.as_secs_f64() / total.max(f64::MIN_POSITIVE);
            format!("{stage} ({share:.0} % of the time, one thing after the other)")
        })
    }
}

/// The square of about `wanted` tiles that has most tissue tiles, of those that lie on a grid of such squares.
fn densest(plan: &SlidePlan, wanted: usize) -> Level0Rect {
    let plane = &plan.plane;
    #[expect(clippy::cast_possible_truncation, reason = "a root of a number of tiles")]
    let side = ((wanted.max(1) as f64).sqrt().ceil() as i64) * i64::from(plane.tile_size - plan.overlap);
    let mut tissue: BTreeMap<(i64, i64), usize> = BTreeMap::new();
    for position in &plan.positions {
        *tissue.entry((position.plane_y / side, position.plane_x / side)).or_default() += 1;
    }
    // The first of equals.
    let most = tissue.iter().rev().max_by_key(|(_, count)| **count);
    let (row, column) = most.map_or((0, 0), |(place, _)| *place);
    let corner = plane.level0_rect(plane.position(column * side, row * side));
    #[expect(clippy::cast_possible_truncation, reason = "within the slide")]
    let level0 = |downsample: f64| ((side + i64::from(plan.overlap)) as f64 * downsample).floor() as i64;
    let (width, height) = (level0(plane.downsample_x), level0(plane.downsample_y));
    Level0Rect { x: corner.x, y: corner.y, width, height }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inference::{BareModel, FakeSession, Task};
    use crate::slide::synthetic::{Encoding, SvsOptions, SyntheticSlide};

    #[test]
    fn a_course_is_part_of_the_slides_tissue_and_its_walk_a_map() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("slide.svs");
        let options = SvsOptions { encoding: Encoding::Deflate, ..SvsOptions::default() };
        SyntheticSlide::new(2000, 1500, 1).write(&path, &options).unwrap();
        let mut card = ModelCard::load(Path::new("models/cells-vit"), &BareModel::default()).unwrap();
        card.classes.truncate(FakeSession::CHANNELS);
        card.background = None;
        let all = Course::new(&path, &card, 100_000).unwrap();
        assert_eq!(all.tiles() as u64, all.slide_tiles);
        let some = Course::new(&path, &card, 25).unwrap();
        assert_eq!(some.slide_tiles, all.slide_tiles);
        assert!((10..=36).contains(&some.tiles()), "{}", some.tiles());
        let walk = some.walk(&card, &mut FakeSession::new(Task::Classification, 96), 4).unwrap();
        let map = walk.map.as_ref().unwrap();
        let inferred = map.classes.iter().filter(|class| **class > 0).count();
        assert!(inferred >= some.tiles() / 2 && inferred <= some.tiles(), "{inferred}");
        assert!(walk.bottleneck().contains("% of the time"));
    }
}
